// Element types, and their conversion to and from float.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define HELIX_HD __host__ __device__ __forceinline__
#else
#define HELIX_HD inline
#endif

namespace helix {

// Codes of the Python side.
enum DType : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

struct Float16 {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

HELIX_HD float float_of_bits(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

HELIX_HD uint32_t bits_of_float(float value) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(value);
#else
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
#endif
}

HELIX_HD float to_float(float value) { return value; }

HELIX_HD float to_float(BFloat16 value) { return float_of_bits(uint32_t(value.bits) << 16); }

HELIX_HD float to_float(Float16 value) {
#ifdef __CUDA_ARCH__
  return __half2float(__ushort_as_half(value.bits));
#else
  const uint32_t sign = uint32_t(value.bits & 0x8000) << 16;
  const uint32_t exponent = (value.bits >> 10) & 0x1f, fraction = value.bits & 0x3ff;
  if (exponent == 0x1f) return float_of_bits(sign | 0x7f800000 | (fraction << 13));
  if (exponent == 0) return std::copysign(std::ldexp(float(fraction), -24), float_of_bits(sign | 0x3f800000));
  return float_of_bits(sign | ((exponent + 112) << 23) | (fraction << 13));
#endif
}

template <class T>
HELIX_HD T from_float(float value);

template <>
HELIX_HD float from_float<float>(float value) {
  return value;
}

// To nearest, ties to even, like the device's instruction.
template <>
HELIX_HD BFloat16 from_float<BFloat16>(float value) {
#ifdef __CUDA_ARCH__
  return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
#else
  const uint32_t bits = bits_of_float(value);
  if (std::isnan(value)) return {0x7fff};
  return {uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
#endif
}

template <>
HELIX_HD Float16 from_float<Float16>(float value) {
#ifdef __CUDA_ARCH__
  return {__half_as_ushort(__float2half_rn(value))};
#else
  const uint16_t sign = (bits_of_float(value) >> 16) & 0x8000;
  const float size = std::fabs(value);
  if (std::isnan(value)) return {0x7fff};
  if (size >= 65520.0f) return {uint16_t(sign | 0x7c00)};
  // The host rounds to nearest even, too: once scaled, the last kept bit is the unit.
  int exponent = size > 0 ? std::ilogb(size) : -14;
  if (exponent < -14) exponent = -14;
  const uint32_t scaled = uint32_t(std::nearbyint(std::ldexp(size, 10 - exponent)));
  // Without its leading bit, which a subnormal number does not have; carries move on into the exponent.
  return {uint16_t(sign | (((exponent + 14) << 10) + scaled))};
#endif
}

}  // namespace helix
