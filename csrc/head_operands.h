// Operands of the products from bf16: see HeadWords in head_kernels.h. Included by each of its implementations, which compile a copy of their own.
#pragma once

#include <immintrin.h>
#include <string.h>

#include "head_kernels.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC bug 105593, as in simd_avx512.h
#endif

namespace acpo {
namespace {

void pack_words(const uint16_t* from, int64_t stride, int64_t rows, int64_t width, uint16_t* to, int64_t panel) {
  constexpr int64_t SIDE = 16;
  const int64_t whole = (rows + SIDE - 1) / SIDE * SIDE;
  for (int64_t v = 0; v < whole; ++v) {
    for (int64_t h = 0; h < width; h += PANEL) {
      const int64_t n = width - h < PANEL ? width - h : PANEL;
      uint16_t* out = to + h / PANEL * panel + v * PANEL;
      if (v < rows && n == PANEL) {
        _mm512_storeu_si512(out, _mm512_loadu_si512(from + v * stride + h));
      } else {
        memset(out, 0, PANEL * sizeof(uint16_t));
        if (v < rows) memcpy(out, from + v * stride + h, static_cast<size_t>(n) * sizeof(uint16_t));
      }
    }
  }
}

// 16 x 16 words, turned over.
inline void turn(__m512i* r) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

// Words of two rows of W at one h, 16 h at a time; 16 such pairs turned over are 32 rows of one h.
void transpose_words(const uint16_t* from, int64_t stride, int64_t rows, int64_t width, uint16_t* to) {
  for (int64_t h = 0; h < width; h += 16) {
    const int64_t n = width - h < 16 ? width - h : 16;
    const __mmask16 in = static_cast<__mmask16>((1u << n) - 1u);
    __m512i r[16];
    for (int i = 0; i < 16; ++i) {
      const __m256i even = 2 * i < rows ? _mm256_maskz_loadu_epi16(in, from + 2 * i * stride + h) : _mm256_setzero_si256();
      const __m256i odd = 2 * i + 1 < rows ? _mm256_maskz_loadu_epi16(in, from + (2 * i + 1) * stride + h) : _mm256_setzero_si256();
      r[i] = _mm512_or_si512(_mm512_cvtepu16_epi32(even), _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
    }
    turn(r);
    for (int64_t i = 0; i < n; ++i) _mm512_storeu_si512(to + (h + i) * PANEL, r[i]);
  }
}

}  // namespace
}  // namespace acpo
