// Logits from bf16 with VDPBF16PS: two exact products a lane, summed in float32, at twice the rate of float32 (Zen 4 starts one a cycle,
// as it does a 512-bit FMA). Operands lie as the AMX tiles' do: A [i][32 k], B [16 pairs of k][32 columns][2], so that a word of A holds
// the two k that a word of B holds. A tile of C is 14 rows x 2 vectors, all of k at once; a row's sum depends on nothing beside it.
// The instruction takes subnormal numbers for 0.
#include <immintrin.h>
#include <string.h>

#include "head_kernels.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC bug 105593, as in simd_avx512.h
#endif

namespace acpo {
namespace {

constexpr int64_t LANES = 16;
constexpr int TILE_ROWS = 14;
constexpr int64_t DEPTH = 8;  // panels of k at a time: 16 KB of B stay in a 32 KB L1 beside 7 KB of A

template <int R, int VECTORS>
void tile(const uint16_t* a, int64_t panel, const uint16_t* b, int64_t panels, float* c, bool add, Ahead* next, int64_t lines) {
  __m512 sum[R][VECTORS];
#pragma GCC unroll 14
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < VECTORS; ++j) sum[i][j] = add ? _mm512_loadu_ps(c + i * PANEL + j * LANES) : _mm512_setzero_ps();
  for (; panels > 0; --panels, a += panel) {
    fetch(next, lines);
    for (int64_t k = 0; k < PANEL; k += 2, b += 2 * PANEL) {
      __m512i y[VECTORS];
#pragma GCC unroll 2
      for (int j = 0; j < VECTORS; ++j) y[j] = _mm512_loadu_si512(b + 2 * j * LANES);
#pragma GCC unroll 14
      for (int i = 0; i < R; ++i) {
        int32_t word;  // of 16-bit numbers
        memcpy(&word, a + i * PANEL + k, sizeof word);
        const __m512i x = _mm512_set1_epi32(word);
#pragma GCC unroll 2
        for (int j = 0; j < VECTORS; ++j) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], (__m512bh)x, (__m512bh)y[j]);
      }
    }
  }
#pragma GCC unroll 14
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < VECTORS; ++j) _mm512_storeu_ps(c + i * PANEL + j * LANES, sum[i][j]);
}

using Tile = void (*)(const uint16_t*, int64_t, const uint16_t*, int64_t, float*, bool, Ahead*, int64_t);

template <int VECTORS, int R = TILE_ROWS>
Tile tile_of(int64_t rows) {
  if constexpr (R == 0) {
    return nullptr;
  } else {
    return rows == R ? tile<R, VECTORS> : tile_of<VECTORS, R - 1>(rows);
  }
}

void pairs_product(const uint16_t* a, int64_t panel, int64_t rows, int64_t depth, const uint16_t* b, int64_t columns, float* c, Ahead next) {
  const int64_t all = (depth + PANEL - 1) / PANEL, tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;
  const int64_t lines = (next.lines + all * tiles - 1) / (all * tiles);
  for (int64_t k = 0; k < all; k += DEPTH) {
    const int64_t n = all - k < DEPTH ? all - k : DEPTH;
    for (int64_t t = 0, begin = 0; t < tiles; ++t) {
      const int64_t end = rows * (t + 1) / tiles;
      const Tile run = columns > LANES ? tile_of<2>(end - begin) : tile_of<1>(end - begin);
      run(a + k * panel + begin * PANEL, panel, b + k * TILE_B, n, c + begin * PANEL, k > 0, &next, lines);
      begin = end;
    }
  }
}

void pack_pairs(const uint16_t* from, int64_t stride, int64_t rows, int64_t width, uint16_t* to, int64_t panel) {
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

}  // namespace

const HeadPairs head_pairs = {pack_pairs, pairs_product};

}  // namespace acpo
