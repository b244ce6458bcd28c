// What host and device code share: function qualifiers, element types and their conversion to arithmetic types.
#pragma once

#include <cstdint>
#include <cstring>

// Always inlined: a function compiled with wide instructions must not be the one that the linker keeps for old CPUs.
#if defined(__CUDACC__)
#define EVAD_HOST_DEVICE __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define EVAD_HOST_DEVICE __attribute__((always_inline)) inline
#else
#define EVAD_HOST_DEVICE inline
#endif

struct CUstream_st;

namespace evad {

using Stream = CUstream_st*;  // cudaStream_t, where CUDA's headers are absent

// Codes of element types, as evad_kernels/_backend.py passes them.
enum class DType : int { float32 = 0, float64 = 1, float16 = 2, bfloat16 = 3 };

struct float16 {
  uint16_t bits;
};
struct bfloat16 {
  uint16_t bits;
};

// Sums run in float, except for double.
template <class T>
struct accumulate {
  using type = float;
};
template <>
struct accumulate<double> {
  using type = double;
};
template <class T>
using accumulate_t = typename accumulate<T>::type;

EVAD_HOST_DEVICE float bits_to_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

EVAD_HOST_DEVICE uint32_t float_to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

EVAD_HOST_DEVICE uint64_t double_to_bits(double value) {
  uint64_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

EVAD_HOST_DEVICE float to_float(bfloat16 x) { return bits_to_float(static_cast<uint32_t>(x.bits) << 16); }

EVAD_HOST_DEVICE float to_float(float16 x) {
#if defined(__CUDA_ARCH__)
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(x.bits));
  return value;
#else
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t rest = x.bits & 0x7fffu;
  if (rest >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | (rest & 0x3ffu) << 13);  // infinity, NaN
  // Scaling by 2^112 renormalises subnormal halves exactly.
  return bits_to_float(sign | float_to_bits(bits_to_float(rest << 13) * bits_to_float(0x77800000u)));
#endif
}

EVAD_HOST_DEVICE float to_float(float x) { return x; }
EVAD_HOST_DEVICE double to_float(double x) { return x; }

// a * b + c, one rounding on a GPU; CPU kernels contract where their flags say so (CMakeLists.txt).
template <class F>
EVAD_HOST_DEVICE F multiply_add(F a, F b, F c) {
#if defined(__CUDA_ARCH__)
  return fma(a, b, c);
#else
  return a * b + c;
#endif
}

template <class T>
EVAD_HOST_DEVICE T from_float(accumulate_t<T> x);

template <>
EVAD_HOST_DEVICE float from_float<float>(float x) {
  return x;
}
template <>
EVAD_HOST_DEVICE double from_float<double>(double x) {
  return x;
}
// Round to nearest, ties to even; a NaN stays a NaN.
template <>
EVAD_HOST_DEVICE bfloat16 from_float<bfloat16>(float x) {
  const uint32_t bits = float_to_bits(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>(bits >> 16 | 0x40u)};
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}
template <>
EVAD_HOST_DEVICE float16 from_float<float16>(float x) {
  const uint32_t bits = float_to_bits(x);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
  const uint32_t rest = bits & 0x7fffffffu;
  if (rest > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};   // NaN
  if (rest >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // rounds to infinity
  if (rest < 0x38800000u) {                                                 // subnormal half: let the adder round
    const float shifted = bits_to_float(rest) + 0.5f;
    return {static_cast<uint16_t>(sign | (float_to_bits(shifted) - 0x3f000000u))};
  }
  return {static_cast<uint16_t>(sign | (rest - 0x38000000u + 0xfffu + (rest >> 13 & 1u)) >> 13)};
}

// Bytes of an element.
inline int64_t element_size(DType dtype) {
  return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2;
}

// Calls body(T{}) with the element type that a code stands for.
template <class Body>
void with_dtype(DType dtype, Body&& body) {
  switch (dtype) {
    case DType::float32: return body(float{});
    case DType::float64: return body(double{});
    case DType::float16: return body(float16{});
    case DType::bfloat16: return body(bfloat16{});
  }
}

}  // namespace evad

// A kernel file's last line: INSTANTIATE(T) for every element type.
#define EVAD_FOR_EVERY_DTYPE(INSTANTIATE) \
  INSTANTIATE(float) INSTANTIATE(double) INSTANTIATE(evad::float16) INSTANTIATE(evad::bfloat16)
