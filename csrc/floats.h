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

// 2^(j / 32), rounded
constexpr float ROOTS[32] = {
    0x1p0f, 0x1.059b0ep0f, 0x1.0b5586p0f, 0x1.11301ep0f, 0x1.172b84p0f, 0x1.1d4874p0f, 0x1.2387a6p0f, 0x1.29e9ep0f,
    0x1.306fep0f, 0x1.371a74p0f, 0x1.3dea64p0f, 0x1.44e086p0f, 0x1.4bfdaep0f, 0x1.5342b6p0f, 0x1.5ab07ep0f, 0x1.6247ecp0f,
    0x1.6a09e6p0f, 0x1.71f75ep0f, 0x1.7a1148p0f, 0x1.82589ap0f, 0x1.8ace54p0f, 0x1.93737cp0f, 0x1.9c4918p0f, 0x1.a5503cp0f,
    0x1.ae89fap0f, 0x1.b7f77p0f, 0x1.c199bep0f, 0x1.cb720ep0f, 0x1.d5818ep0f, 0x1.dfc974p0f, 0x1.ea4afap0f, 0x1.f50766p0f,
};

}  // namespace
}  // namespace acpo
