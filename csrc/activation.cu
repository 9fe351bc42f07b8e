// Activation functions of the MLP, with the addition of a bias before them: SwiGLU, and GELU in two forms.
#include "launch.h"

namespace helix {
namespace {

constexpr float kSqrtTwoOverPi = 0.7978845608f;
constexpr float kCubic = 0.044715f;
constexpr float kSqrtHalf = 0.7071067812f;
constexpr float kGaussian = 0.3989422804f;  // 1 / sqrt(2 pi)

// Results in 16 bits do not show the errors of the approximate instructions, which take a fraction of the time.
template <class T>
struct Sigmoid {
  float value, slope;  // slope is value * (1 - value), which that formula would round away near 1

  HELIX_HD explicit Sigmoid(float x) {
#ifdef __CUDA_ARCH__
    constexpr bool kFast = sizeof(T) == 2;
    const float e = kFast ? __expf(-fabsf(x)) : expf(-fabsf(x));
    const float r = kFast ? __fdividef(1.0f, 1.0f + e) : 1.0f / (1.0f + e);
#else
    const float e = std::exp(-std::fabs(x)), r = 1.0f / (1.0f + e);
#endif
    value = x < 0.0f ? e * r : r;
    slope = e * r * r;
  }
};

// sigmoid(2u) is (1 + tanh(u)) / 2.
template <class T>
struct GeluTanh {
  HELIX_HD static float value(float x) { return x * half(x).value; }

  HELIX_HD static float slope(float x) {
    const Sigmoid<T> s = half(x);
    return s.value + 2.0f * kSqrtTwoOverPi * x * (1.0f + 3.0f * kCubic * x * x) * s.slope;
  }

  HELIX_HD static Sigmoid<T> half(float x) {
    return Sigmoid<T>(2.0f * kSqrtTwoOverPi * x * (1.0f + kCubic * x * x));
  }
};

template <class T>
struct GeluErf {
  HELIX_HD static float value(float x) { return x * half(x); }
  HELIX_HD static float slope(float x) { return half(x) + x * kGaussian * expf(-0.5f * x * x); }
  HELIX_HD static float half(float x) { return 0.5f * (1.0f + erff(x * kSqrtHalf)); }
};

// x and bias of W elements; a missing bias is none at all.
template <int W, class T>
HELIX_HD void load_biased(const T* x, const T* bias, float (&to)[W]) {
  load<W>(x, to);
  if (bias == nullptr) return;
  float shift[W];
  load<W>(bias, shift);
#pragma unroll
  for (int i = 0; i < W; ++i) to[i] += shift[i];
}

template <class T, class Function>
struct Gelu {
  static constexpr int width = 16 / sizeof(T);
  T* out;
  const T *input, *bias;
  int64_t length;

  template <int W>
  HELIX_HD void at(int64_t row, int64_t element) const {
    float x[W];
    load_biased<W>(input + row * length + element, bias ? bias + element : nullptr, x);
#pragma unroll
    for (int i = 0; i < W; ++i) x[i] = Function::value(x[i]);
    store<W>(out + row * length + element, x);
  }
};

template <class T, class Function>
struct GeluBackward {
  static constexpr int width = 16 / sizeof(T);
  T* grad_input;
  const T *grad, *input, *bias;
  int64_t length;

  template <int W>
  HELIX_HD void at(int64_t row, int64_t element) const {
    float x[W], upper[W];
    load_biased<W>(input + row * length + element, bias ? bias + element : nullptr, x);
    load<W>(grad + row * length + element, upper);
#pragma unroll
    for (int i = 0; i < W; ++i) x[i] = upper[i] * Function::slope(x[i]);
    store<W>(grad_input + row * length + element, x);
  }
};

// silu(gate) * up, where a row of the input is the gate's `length` elements and then as many of up.
template <class T>
struct SwiGLU {
  static constexpr int width = 16 / sizeof(T);
  T* out;
  const T *input, *bias;
  int64_t length;

  template <int W>
  HELIX_HD void at(int64_t row, int64_t element) const {
    const T* x = input + 2 * row * length + element;
    float gate[W], up[W];
    load_biased<W>(x, bias ? bias + element : nullptr, gate);
    load_biased<W>(x + length, bias ? bias + length + element : nullptr, up);
#pragma unroll
    for (int i = 0; i < W; ++i) gate[i] *= Sigmoid<T>(gate[i]).value * up[i];
    store<W>(out + row * length + element, gate);
  }
};

template <class T>
struct SwiGLUBackward {
  static constexpr int width = 16 / sizeof(T);
  T* grad_input;
  const T *grad, *input, *bias;
  int64_t length;

  template <int W>
  HELIX_HD void at(int64_t row, int64_t element) const {
    const int64_t place = 2 * row * length + element;
    float gate[W], up[W], upper[W];
    load_biased<W>(input + place, bias ? bias + element : nullptr, gate);
    load_biased<W>(input + place + length, bias ? bias + length + element : nullptr, up);
    load<W>(grad + row * length + element, upper);
#pragma unroll
    for (int i = 0; i < W; ++i) {
      const Sigmoid<T> sigmoid(gate[i]);
      const float silu = gate[i] * sigmoid.value;
      gate[i] = upper[i] * up[i] * (sigmoid.value + gate[i] * sigmoid.slope);
      up[i] = upper[i] * silu;
    }
    // Both halves have been read: the result may stand where the input was.
    store<W>(grad_input + place, gate);
    store<W>(grad_input + place + length, up);
  }
};

template <class T>
Columns gated_cut(int64_t length, int64_t rows, const T* narrow, const T* other, const T* wide,
                  const T* other_wide, const T* bias) {
  const int64_t size = sizeof(T), row = length * size;
  const auto upper = [&](const T* start) { return start == nullptr ? nullptr : start + length; };
  return cut(length, 16 / sizeof(T), rows,
             {{narrow, size, row},
              {other, size, row},
              {wide, size, 2 * row},
              {upper(wide), size, 2 * row},
              {other_wide, size, 2 * row},
              {upper(other_wide), size, 2 * row},
              {bias, size, 0},
              {upper(bias), size, 0}});
}

template <class Body, class T>
int launch_gelu(Body body, int64_t rows, const T* first, const T* second, const T* third, const T* bias,
                void* stream) {
  if (bias == nullptr) {  // nothing depends on the place in a row
    body.length *= rows;
    rows = 1;
  }
  const int64_t size = sizeof(T), row = body.length * size;
  const Columns columns =
      cut(body.length, body.width, rows,
          {{first, size, row}, {second, size, row}, {third, size, row}, {bias, size, 0}});
  return launch(body, columns, rows, stream);
}

template <class T>
int forward(T* out, const T* input, const T* bias, int64_t rows, int64_t length, int activation,
            void* stream) {
  const T* none = nullptr;
  switch (activation) {
    case kSwiGLU:
      return launch(SwiGLU<T>{out, input, bias, length},
                    gated_cut<T>(length, rows, out, none, input, none, bias), rows, stream);
    case kGeluTanh:
      return launch_gelu(Gelu<T, GeluTanh<T>>{out, input, bias, length}, rows, (const T*)out, input, none,
                         bias, stream);
    case kGeluErf:
      return launch_gelu(Gelu<T, GeluErf<T>>{out, input, bias, length}, rows, (const T*)out, input, none,
                         bias, stream);
  }
  return kUnknownType;
}

template <class T>
int backward(T* grad_input, const T* grad, const T* input, const T* bias, int64_t rows, int64_t length,
             int activation, void* stream) {
  switch (activation) {
    case kSwiGLU:
      return launch(SwiGLUBackward<T>{grad_input, grad, input, bias, length},
                    gated_cut<T>(length, rows, grad, nullptr, input, grad_input, bias), rows, stream);
    case kGeluTanh:
      return launch_gelu(GeluBackward<T, GeluTanh<T>>{grad_input, grad, input, bias, length}, rows,
                         (const T*)grad_input, grad, input, bias, stream);
    case kGeluErf:
      return launch_gelu(GeluBackward<T, GeluErf<T>>{grad_input, grad, input, bias, length}, rows,
                         (const T*)grad_input, grad, input, bias, stream);
  }
  return kUnknownType;
}

}  // namespace
}  // namespace helix

extern "C" int helix_activation(void* out, const void* input, const void* bias, int64_t rows, int64_t width,
                                int dtype, int activation, void* stream) {
  return helix::with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return helix::forward(static_cast<T*>(out), static_cast<const T*>(input), static_cast<const T*>(bias),
                          rows, width, activation, stream);
  });
}

extern "C" int helix_activation_backward(void* grad_input, const void* grad, const void* input,
                                         const void* bias, int64_t rows, int64_t width, int dtype,
                                         int activation, void* stream) {
  return helix::with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return helix::backward(static_cast<T*>(grad_input), static_cast<const T*>(grad),
                           static_cast<const T*>(input), static_cast<const T*>(bias), rows, width, activation,
                           stream);
  });
}
