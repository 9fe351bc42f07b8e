// Addition of a gradient in low precision to a sum in fp32.
#include "launch.h"

namespace helix {
namespace {

template <class T>
struct Accumulate {
  static constexpr int width = 16 / sizeof(T);
  float* total;
  const T* gradient;

  template <int W>
  HELIX_HD void at(int64_t, int64_t element) const {
    float sum[W], addend[W];
    load<W>(total + element, sum);
    load<W>(gradient + element, addend);
#pragma unroll
    for (int i = 0; i < W; ++i) sum[i] += addend[i];
    store<W>(total + element, sum);
  }
};

}  // namespace
}  // namespace helix

extern "C" int helix_accumulate(float* total, const void* gradient, int64_t count, int dtype, void* stream) {
  using namespace helix;
  return with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Accumulate<T> body{total, static_cast<const T*>(gradient)};
    const Columns columns = cut(count, body.width, 1, {{total, 4, 0}, {gradient, sizeof(T), 0}});
    return launch(body, columns, 1, stream);
  });
}

extern "C" const char* helix_error_string(int error) {
  switch (error) {
    case kTooLarge:
      return "more elements than a kernel launch can index";
    case kUnknownType:
      return "unknown element type or activation function";
    case kTooMany:
      return "too many tensors";
  }
#ifdef __CUDACC__
  return cudaGetErrorString(static_cast<cudaError_t>(error));
#else
  return "unknown error";
#endif
}
