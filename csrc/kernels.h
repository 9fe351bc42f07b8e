// The launchers: plain C, pointers of the device, sizes in elements, a stream; they return at once.
//
// Callers have checked sizes, types and devices: see helixpipe/kernels. A result of 0 is success, a positive
// one a cudaError_t, a negative one of those below.
#pragma once

#include <stdint.h>

enum HelixError { kSuccess = 0, kTooLarge = -1, kUnknownType = -2, kTooMany = -3 };

enum HelixActivation { kSwiGLU = 0, kGeluTanh = 1, kGeluErf = 2 };

#define HELIX_MOST_TENSORS 16

// A tensor of four dimensions, the last of which is dense; sizes and strides in elements.
struct HelixTensor {
  const void* data;
  int64_t sizes[4];
  int64_t strides[4];
};

#ifdef __cplusplus
extern "C" {
#endif

// Adds a partial attention output, with the log-sum-exp of its scores, to another, in place.
// output and part: three sizes of rows by `width` elements, log_sum_exp and part_log_sum_exp: as many floats;
// each with strides of its own for the rows.
int helix_merge_attention(void* output, int dtype, const int64_t* output_strides, float* log_sum_exp,
                          const int64_t* log_sum_exp_strides, const void* part, int part_dtype,
                          const int64_t* part_strides, const float* part_log_sum_exp,
                          const int64_t* part_log_sum_exp_strides, const int64_t* sizes, int64_t width,
                          void* stream);

// out [rows, width] from input [rows, width], or [rows, 2 * width] for SwiGLU; bias may be null.
int helix_activation(void* out, const void* input, const void* bias, int64_t rows, int64_t width, int dtype,
                     int activation, void* stream);

// grad_input, which may be input itself, from grad [rows, width].
int helix_activation_backward(void* grad_input, const void* grad, const void* input, const void* bias,
                              int64_t rows, int64_t width, int dtype, int activation, void* stream);

// Copies up to HELIX_MOST_TENSORS tensors one after the other into a dense buffer.
int helix_pack(void* buffer, const struct HelixTensor* tensors, int count, int element_bytes, void* stream);

// total += gradient.
int helix_accumulate(float* total, const void* gradient, int64_t count, int dtype, void* stream);

// What a result means.
const char* helix_error_string(int error);

#ifdef __cplusplus
}
#endif
