// Eight float32 lanes. Needs AVX2, FMA and F16C.
#pragma once

#include <immintrin.h>

#include "floats.h"

namespace acpo {
namespace {

struct Simd {
  using vec = __m256;
  using mask = __m256;
  static constexpr int lanes = 8;
  static constexpr bool has_fma = true;

  static vec set(float x) { return _mm256_set1_ps(x); }
  static vec load(const float* p) { return _mm256_loadu_ps(p); }
  static vec load(const bf16* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16));
  }
  static vec load(const fp16* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  // Two vectors of elements in some order: where it does not matter, bf16 needs half the instructions.
  template <class T>
  static void load_pair(const T* p, vec* a, vec* b) {
    *a = load(p);
    *b = load(p + lanes);
  }
  static void load_pair(const bf16* p, vec* a, vec* b) {
    const __m256i u = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    *a = _mm256_castsi256_ps(_mm256_slli_epi32(u, 16));
    *b = _mm256_castsi256_ps(_mm256_and_si256(u, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
  }
  static void store(float* p, vec x) { _mm256_storeu_ps(p, x); }
  static void store(bf16* p, vec x) {
    const __m256i u = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    __m256i r = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd), 16);
    r = _mm256_blendv_epi8(r, _mm256_set1_epi32(0x7fc0), _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q)));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_packus_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1)));
  }
  static void store(fp16* p, vec x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }

  static vec add(vec a, vec b) { return _mm256_add_ps(a, b); }
  static vec sub(vec a, vec b) { return _mm256_sub_ps(a, b); }
  static vec mul(vec a, vec b) { return _mm256_mul_ps(a, b); }
  static vec fma(vec a, vec b, vec c) { return _mm256_fmadd_ps(a, b, c); }
  static vec fms(vec a, vec b, vec c) { return _mm256_fmsub_ps(a, b, c); }
  static vec max(vec x, vec best) { return _mm256_max_ps(x, best); }  // a NaN in x gives best
  static float reduce_add(vec x) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
  }
  static float reduce_max(vec x) {
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
  }

  static mask not_less(vec a, vec b) { return _mm256_cmp_ps(a, b, _CMP_NLT_UQ); }  // a >= b, or one is NaN
  static mask equal(vec a, vec b) { return _mm256_cmp_ps(a, b, _CMP_EQ_OQ); }
  static mask and_not(mask a, mask b) { return _mm256_andnot_ps(b, a); }
  static mask either(mask a, mask b) { return _mm256_or_ps(a, b); }
  static int count(mask m) { return __builtin_popcount(_mm256_movemask_ps(m)); }
  static vec keep(mask m, vec x) { return _mm256_and_ps(m, x); }  // 0 elsewhere
  static vec add_where(mask m, vec a, vec b) { return _mm256_add_ps(a, keep(m, b)); }  // a elsewhere
  static vec fma_where(mask m, vec a, vec b, vec c) { return _mm256_blendv_ps(c, fma(a, b, c), m); }  // c elsewhere
  static vec fma_unless(mask m, vec a, vec b, vec c) { return _mm256_blendv_ps(fma(a, b, c), c, m); }
  static vec at_least(vec x, vec low) { return _mm256_max_ps(low, x); }  // a NaN in x stays
  // p 2^n, with n in the low bits of t = n + 1.5 2^23
  static vec scale(vec p, vec t, vec /*n*/) {
    const __m256i e = _mm256_slli_epi32(_mm256_castps_si256(t), 23);
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), e));
  }
  static vec keep_scale(mask m, vec p, vec t, vec n) { return _mm256_and_ps(m, scale(p, t, n)); }

  // 2^(n / roots) 2^exponent, with n in the low bits of t = n + 1.5 2^23: what the last three bits of n say, and the rest of n added to
  // the exponent. The table's numbers have those three bits taken off their mantissas, where the shifted n puts them back.
  static constexpr int roots = 8;
  using Powers = vec;
  static Powers powers(int exponent) {
    const vec table = _mm256_setr_ps(ROOTS[0], ROOTS[4], ROOTS[8], ROOTS[12], ROOTS[16], ROOTS[20], ROOTS[24], ROOTS[28]);
    const __m256i j = _mm256_slli_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), 20);
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_sub_epi32(_mm256_castps_si256(table), j), _mm256_set1_epi32(exponent << 23)));
  }
  static vec power(Powers table, vec t) {
    const __m256i n = _mm256_castps_si256(t), root = _mm256_castps_si256(_mm256_permutevar8x32_ps(table, n));
    return _mm256_castsi256_ps(_mm256_add_epi32(root, _mm256_slli_epi32(n, 20)));
  }

  // What a walk over u >= 0 met: the largest of their bits tells a u past a limit, and one that is negative or NaN.
  struct Met {
    __m256i bits = _mm256_setzero_si256();
    void operator()(vec u) { bits = _mm256_max_epu32(bits, _mm256_castps_si256(u)); }
    bool past(float limit) const { return over(as_bits(limit)); }
    bool negative() const { return over(0x7f800000u); }
    bool over(uint32_t limit) const {
      const __m256i least = _mm256_set1_epi32(static_cast<int>(limit + 1));
      return _mm256_movemask_epi8(_mm256_cmpeq_epi32(_mm256_max_epu32(bits, least), bits)) != 0;
    }
  };
  static vec at_most(vec x, vec high) { return _mm256_min_ps(high, x); }  // a NaN in x stays
  static double sum(vec x) {
    const __m256d s = _mm256_add_pd(_mm256_cvtps_pd(_mm256_castps256_ps128(x)), _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1)));
    const __m128d h = _mm_add_pd(_mm256_castpd256_pd128(s), _mm256_extractf128_pd(s, 1));
    return _mm_cvtsd_f64(_mm_add_sd(h, _mm_unpackhi_pd(h, h)));
  }
};

}  // namespace
}  // namespace acpo
