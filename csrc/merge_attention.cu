// Merge of attention over one set of keys with attention over another, by the log-sum-exp of their scores:
// with L = log(exp(a) + exp(b)), the output is exp(a - L) * A + exp(b - L) * B.
#include "launch.h"

namespace helix {
namespace {

// A row's place in three dimensions.
struct Place {
  int64_t first, second, third;

  HELIX_HD int64_t offset(const int64_t (&strides)[3]) const {
    return first * strides[0] + second * strides[1] + third * strides[2];
  }
};

// Rows in three dimensions, the last of them the fastest.
struct Rows {
  int64_t sizes[3];

  HELIX_HD Place place(int64_t row) const {
    const Division inner(row, sizes[2]), outer(inner.quotient, sizes[1]);
    return {int64_t(outer.quotient), int64_t(outer.remainder), int64_t(inner.remainder)};
  }
};

// The log-sum-exps of a row. Minus infinity: the row saw no key; FlashAttention-2 then says plus infinity.
struct Sums {
  float own, part, merged;

  HELIX_HD Sums(float own_sum, float part_sum) : own(seen(own_sum)), part(seen(part_sum)) {
    const float larger = own > part ? own : part, smaller = own > part ? part : own;
    merged = smaller == -INFINITY ? larger : larger + log1pf(expf(smaller - larger));
    // A comparison with NaN is false: it must not get lost.
    if (own != own || part != part) merged = own + part;
  }

  // Of a row's share in the merged one; nothing of a row that saw no key, whatever stands in its output.
  HELIX_HD float weight(float sum) const { return sum == -INFINITY ? 0.0f : expf(sum - merged); }

  HELIX_HD static float seen(float sum) { return sum == INFINITY ? -INFINITY : sum; }
};

template <class T, class P>
struct MergeOutputs {
  static constexpr int width = 16 / (sizeof(T) < sizeof(P) ? sizeof(T) : sizeof(P));
  T* output;
  const P* part;
  const float *log_sum_exp, *part_log_sum_exp;
  Rows rows;
  int64_t output_strides[3] = {}, part_strides[3] = {}, sum_strides[3] = {}, part_sum_strides[3] = {};

  template <int W>
  HELIX_HD void at(int64_t row, int64_t element) const {
    const Place place = rows.place(row);
    T* own = output + place.offset(output_strides) + element;
    float value[W], other[W];
    load<W>(own, value);
    load<W>(part + place.offset(part_strides) + element, other);
    const Sums sums(log_sum_exp[place.offset(sum_strides)], part_log_sum_exp[place.offset(part_sum_strides)]);
    const float scale = sums.weight(sums.own), part_scale = sums.weight(sums.part);
#pragma unroll
    for (int i = 0; i < W; ++i)
      value[i] = (scale == 0.0f ? 0.0f : value[i] * scale) +
                 (part_scale == 0.0f ? 0.0f : other[i] * part_scale);
    store<W>(own, value);
  }
};

// Runs after all outputs: every thread of a row needs the sum as it was.
struct MergeSums {
  static constexpr int width = 1;
  float* log_sum_exp;
  const float* part_log_sum_exp;
  Rows rows;
  int64_t strides[3], part_strides[3];

  template <int W>
  HELIX_HD void at(int64_t, int64_t row) const {
    const Place place = rows.place(row);
    float* own = log_sum_exp + place.offset(strides);
    *own = Sums(*own, part_log_sum_exp[place.offset(part_strides)]).merged;
  }
};

void copy(int64_t (&to)[3], const int64_t* from) {
  for (int i = 0; i < 3; ++i) to[i] = from[i];
}

// A multiple of every stride between rows is a multiple of their greatest common divisor.
int64_t common_stride(const int64_t* strides, const int64_t* sizes) {
  int64_t divisor = 0;
  for (int i = 0; i < 3; ++i) {
    int64_t a = divisor, b = sizes[i] > 1 ? strides[i] : 0;
    while (b != 0) {
      const int64_t rest = a % b;
      a = b;
      b = rest;
    }
    divisor = a;
  }
  return divisor;
}

template <class T, class P>
int merge(MergeOutputs<T, P> body, const MergeSums& sums, int64_t width, void* stream) {
  const int64_t* sizes = body.rows.sizes;
  const int64_t rows = sizes[0] * sizes[1] * sizes[2];
  const Columns columns =
      cut(width, body.width, rows,
          {{body.output, sizeof(T), common_stride(body.output_strides, sizes) * int64_t(sizeof(T))},
           {body.part, sizeof(P), common_stride(body.part_strides, sizes) * int64_t(sizeof(P))}});
  const int error = launch(body, columns, rows, stream);
  return error ? error : launch(sums, Columns{0, 0, rows}, 1, stream);
}

}  // namespace
}  // namespace helix

extern "C" int helix_merge_attention(void* output, int dtype, const int64_t* output_strides,
                                     float* log_sum_exp, const int64_t* log_sum_exp_strides, const void* part,
                                     int part_dtype, const int64_t* part_strides,
                                     const float* part_log_sum_exp, const int64_t* part_log_sum_exp_strides,
                                     const int64_t* sizes, int64_t width, void* stream) {
  using namespace helix;
  MergeSums sums{log_sum_exp, part_log_sum_exp, {}, {}, {}};
  copy(sums.rows.sizes, sizes);
  copy(sums.strides, log_sum_exp_strides);
  copy(sums.part_strides, part_log_sum_exp_strides);
  return with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return with_type(part_dtype, [&](auto* part_type) -> int {
      using P = std::remove_pointer_t<decltype(part_type)>;
      // An output is of its parts' type, or in fp32 to sum them up.
      if constexpr (std::is_same_v<T, P> || std::is_same_v<T, float>) {
        MergeOutputs<T, P> body{static_cast<T*>(output), static_cast<const P*>(part), log_sum_exp,
                                part_log_sum_exp, sums.rows};
        copy(body.output_strides, output_strides);
        copy(body.part_strides, part_strides);
        copy(body.sum_strides, log_sum_exp_strides);
        copy(body.part_sum_strides, part_log_sum_exp_strides);
        return merge(body, sums, width, stream);
      } else {
        return kUnknownType;
      }
    });
  });
}
