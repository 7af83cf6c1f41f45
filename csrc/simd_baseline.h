// Four float32 lanes in the vector extension of GCC and Clang: SSE2 on x86-64, NEON on aarch64, nothing assumed of either.
#pragma once

#include <string.h>

#include "floats.h"

namespace acpo {
namespace {

struct Simd {
  typedef float vec __attribute__((vector_size(16)));
  typedef int32_t mask __attribute__((vector_size(16)));
  static constexpr int lanes = 4;
  static constexpr bool has_fma = false;  // a x b + c may round twice

  static vec set(float x) { return vec{x, x, x, x}; }
  static vec load(const float* p) {
    vec x;
    memcpy(&x, p, sizeof x);
    return x;
  }
  static vec load(const bf16* p) { return vec{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])}; }
  static vec load(const fp16* p) { return vec{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])}; }
  template <class T>
  static void load_pair(const T* p, vec* a, vec* b) {
    *a = load(p);
    *b = load(p + lanes);
  }
  // The two halves of each 32-bit word: two vectors of elements in some order, where it does not matter.
  static void load_pair(const bf16* p, vec* a, vec* b) {
    typedef uint32_t words __attribute__((vector_size(16)));
    words u;
    memcpy(&u, p, sizeof u);
    *a = reinterpret_cast<vec>(u << 16);
    *b = reinterpret_cast<vec>(u & 0xffff0000u);
  }
  static void store(float* p, vec x) { memcpy(p, &x, sizeof x); }
  static void store(bf16* p, vec x) {
    for (int i = 0; i < lanes; ++i) from_float(x[i], p + i);
  }
  static void store(fp16* p, vec x) {
    for (int i = 0; i < lanes; ++i) from_float(x[i], p + i);
  }

  static vec add(vec a, vec b) { return a + b; }
  static vec sub(vec a, vec b) { return a - b; }
  static vec mul(vec a, vec b) { return a * b; }
  static vec fma(vec a, vec b, vec c) { return a * b + c; }
  static vec fms(vec a, vec b, vec c) { return a * b - c; }
  static vec max(vec x, vec best) { return x > best ? x : best; }  // a NaN in x gives best
  static float reduce_add(vec x) { return (x[0] + x[2]) + (x[1] + x[3]); }
  static float reduce_max(vec x) {
    const float a = x[0] > x[2] ? x[0] : x[2], b = x[1] > x[3] ? x[1] : x[3];
    return a > b ? a : b;
  }

  static mask not_less(vec a, vec b) { return ~(a < b); }  // a >= b, or one is NaN
  static mask equal(vec a, vec b) { return a == b; }
  static mask and_not(mask a, mask b) { return a & ~b; }
  static mask either(mask a, mask b) { return a | b; }
  static int count(mask m) { return -(m[0] + m[1] + m[2] + m[3]); }
  static vec keep(mask m, vec x) { return reinterpret_cast<vec>(m & reinterpret_cast<mask>(x)); }  // 0 elsewhere
  static vec add_where(mask m, vec a, vec b) { return a + keep(m, b); }  // a elsewhere
  static vec fma_where(mask m, vec a, vec b, vec c) { return m ? a * b + c : c; }  // c elsewhere
  static vec fma_unless(mask m, vec a, vec b, vec c) { return m ? c : a * b + c; }
  static vec at_least(vec x, vec low) { return x < low ? low : x; }  // a NaN in x stays
  // p 2^n, with n in the low bits of t = n + 1.5 2^23
  static vec scale(vec p, vec t, vec /*n*/) {
    typedef uint32_t bits __attribute__((vector_size(16)));
    const bits e = reinterpret_cast<bits>(t) << 23;
    return reinterpret_cast<vec>(reinterpret_cast<bits>(p) + e);
  }
  static vec keep_scale(mask m, vec p, vec t, vec n) { return keep(m, scale(p, t, n)); }

  // 2^n 2^exponent, with n in the low bits of t = n + 1.5 2^23; the tables of the wider instruction sets have more roots than 2 itself.
  static constexpr int roots = 1;
  using Powers = vec;
  static Powers powers(int exponent) { return set(as_float(static_cast<uint32_t>(127 + exponent) << 23)); }
  static vec power(Powers factor, vec t) { return scale(factor, t, t); }

  // What a walk over u >= 0 met: a u past a limit, a negative one. A NaN it does not see.
  struct Met {
    vec high = set(0.0f), low = set(0.0f);
    void operator()(vec u) {
      high = u > high ? u : high;
      low = u < low ? u : low;
    }
    bool past(float limit) const { return count(high > set(limit)) != 0; }
    bool negative() const { return count(low < set(0.0f)) != 0; }
  };
  static vec at_most(vec x, vec high) { return x > high ? high : x; }  // a NaN in x stays
  static double sum(vec x) { return (static_cast<double>(x[0]) + x[2]) + (static_cast<double>(x[1]) + x[3]); }
};

}  // namespace
}  // namespace acpo
