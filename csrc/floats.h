// The 16-bit floating types and their conversions. Everything here has internal linkage: this header is compiled with
// several instruction sets, and the linker must never take the AVX-512 copy of a function for the baseline.
// For the same reason files that include it use no inline function of the standard library.
#pragma once

#include <stdint.h>

namespace acpo {
namespace {

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

union FloatBits {
  float f;
  uint32_t u;
};

inline float as_float(uint32_t u) {
  FloatBits b;
  b.u = u;
  return b.f;
}

inline uint32_t as_bits(float f) {
  FloatBits b;
  b.f = f;
  return b.u;
}

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return as_float(static_cast<uint32_t>(x.bits) << 16); }
inline float to_float(fp16 x) {
  // The exponent and mantissa moved into place are 2^-112 times the number, subnormal numbers included.
  const uint32_t magnitude = x.bits & 0x7fffu;
  uint32_t bits = as_bits(as_float(magnitude << 13) * 0x1p112f);
  if (magnitude >= 0x7c00u) bits = 0x7f800000u | magnitude << 13;
  return as_float(bits | static_cast<uint32_t>(x.bits & 0x8000u) << 16);
}

inline void from_float(float x, float* out) { *out = x; }
inline void from_float(float x, bf16* out) {
  const uint32_t u = as_bits(x);
  out->bits = x != x ? 0x7fc0 : static_cast<uint16_t>((u + 0x7fffu + (u >> 16 & 1u)) >> 16);
}
inline void from_float(float x, fp16* out) {
  const uint32_t u = as_bits(x), sign = u >> 16 & 0x8000u, magnitude = u & 0x7fffffffu;
  uint32_t half;
  if (x != x) {
    half = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // 65520 and more round to infinity
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 puts the rounding at 2^-24
    half = as_bits(as_float(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude + 0xfffu + (magnitude >> 13 & 1u) - 0x38000000u) >> 13;
  }
  out->bits = static_cast<uint16_t>(sign | half);
}

}  // namespace
}  // namespace acpo
