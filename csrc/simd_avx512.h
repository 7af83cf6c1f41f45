// Sixteen float32 lanes. Needs AVX-512 F, BW, DQ and VL.
#pragma once

#include <immintrin.h>

#include "floats.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC bug 105593: its own intrinsics begin from an undefined register
#endif

namespace acpo {
namespace {

struct Simd {
  using vec = __m512;
  using mask = __mmask16;
  static constexpr int lanes = 16;
  static constexpr bool has_fma = true;

  static vec set(float x) { return _mm512_set1_ps(x); }
  static vec load(const float* p) { return _mm512_loadu_ps(p); }
  static vec load(const bf16* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16));
  }
  static vec load(const fp16* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  // Two vectors of elements in some order: where it does not matter, bf16 needs half the instructions.
  template <class T>
  static void load_pair(const T* p, vec* a, vec* b) {
    *a = load(p);
    *b = load(p + lanes);
  }
  static void load_pair(const bf16* p, vec* a, vec* b) {
    const __m512i u = _mm512_loadu_si512(p);
    *a = _mm512_castsi512_ps(_mm512_slli_epi32(u, 16));
    *b = _mm512_castsi512_ps(_mm512_and_si512(u, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
  }
  static void store(float* p, vec x) { _mm512_storeu_ps(p, x); }
  static void store(bf16* p, vec x) {
    const __m512i u = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    __m512i r = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd), 16);
    r = _mm512_mask_mov_epi32(r, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(r));
  }
  static void store(fp16* p, vec x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }

  static vec add(vec a, vec b) { return _mm512_add_ps(a, b); }
  static vec sub(vec a, vec b) { return _mm512_sub_ps(a, b); }
  static vec mul(vec a, vec b) { return _mm512_mul_ps(a, b); }
  static vec fma(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }
  static vec fms(vec a, vec b, vec c) { return _mm512_fmsub_ps(a, b, c); }
  static vec max(vec x, vec best) { return _mm512_max_ps(x, best); }  // a NaN in x gives best
  static float reduce_add(vec x) { return _mm512_reduce_add_ps(x); }
  static float reduce_max(vec x) { return _mm512_reduce_max_ps(x); }

  static mask not_less(vec a, vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_NLT_UQ); }  // a >= b, or one is NaN
  static mask equal(vec a, vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
  static mask and_not(mask a, mask b) { return a & static_cast<mask>(~b); }
  static mask either(mask a, mask b) { return a | b; }
  static int count(mask m) { return __builtin_popcount(m); }
  static vec keep(mask m, vec x) { return _mm512_maskz_mov_ps(m, x); }  // 0 elsewhere
  static vec add_where(mask m, vec a, vec b) { return _mm512_mask_add_ps(a, m, a, b); }  // a elsewhere
  static vec fma_where(mask m, vec a, vec b, vec c) { return _mm512_mask3_fmadd_ps(a, b, c, m); }  // c elsewhere
  static vec fma_unless(mask m, vec a, vec b, vec c) { return fma_where(static_cast<mask>(~m), a, b, c); }
  static vec at_least(vec x, vec low) { return _mm512_max_ps(low, x); }  // a NaN in x stays
  static vec scale(vec p, vec /*t*/, vec n) { return _mm512_scalef_ps(p, n); }
  static vec keep_scale(mask m, vec p, vec /*t*/, vec n) { return _mm512_maskz_scalef_ps(m, p, n); }

  // 2^(n / roots) 2^exponent, with n in the low bits of t = n + 1.5 2^23: what the last five bits of n say, and the rest of n added to
  // the exponent. The table's numbers have those five bits taken off their mantissas, where the shifted n puts them back.
  static constexpr int roots = 32;
  struct Powers {
    vec low, high;
  };
  static Powers powers(int exponent) {
    const __m512i j = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), more = _mm512_set1_epi32(exponent << 23);
    const __m512i low = _mm512_sub_epi32(_mm512_castps_si512(load(ROOTS)), _mm512_slli_epi32(j, 18));
    const __m512i high = _mm512_sub_epi32(_mm512_castps_si512(load(ROOTS + 16)), _mm512_slli_epi32(_mm512_add_epi32(j, _mm512_set1_epi32(16)), 18));
    return {_mm512_castsi512_ps(_mm512_add_epi32(low, more)), _mm512_castsi512_ps(_mm512_add_epi32(high, more))};
  }
  static vec power(const Powers& table, vec t) {
    const __m512i n = _mm512_castps_si512(t), root = _mm512_castps_si512(_mm512_permutex2var_ps(table.low, n, table.high));
    return _mm512_castsi512_ps(_mm512_add_epi32(root, _mm512_slli_epi32(n, 18)));
  }

  // What a walk over u >= 0 met: the largest of their bits tells a u past a limit, and one that is negative or NaN.
  struct Met {
    __m512i bits = _mm512_setzero_si512();
    void operator()(vec u) { bits = _mm512_max_epu32(bits, _mm512_castps_si512(u)); }
    bool past(float limit) const { return over(as_bits(limit)); }
    bool negative() const { return over(0x7f800000u); }
    bool over(uint32_t limit) const { return _mm512_cmpgt_epu32_mask(bits, _mm512_set1_epi32(static_cast<int>(limit))) != 0; }
  };
  static vec at_most(vec x, vec high) { return _mm512_min_ps(high, x); }  // a NaN in x stays
  static double sum(vec x) {
    const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(x)), high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1));
    return _mm512_reduce_add_pd(_mm512_add_pd(low, high));
  }
};

}  // namespace
}  // namespace acpo
