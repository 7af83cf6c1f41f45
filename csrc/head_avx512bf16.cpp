// The products from bf16 with VDPBF16PS: two exact products a lane, summed in float32, at twice the rate of float32 (Zen 4 starts one a
// cycle, as it does a 512-bit FMA). A tile of C is 14 rows x 2 vectors; a row's sum depends on nothing beside it. The instruction takes
// subnormal numbers for 0.
#include "head_operands.h"

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

// C = or += A B over `all` panels of k. What comes next is fetched meanwhile, `lines` a tile and panel.
void multiply(const uint16_t* a, int64_t panel, int64_t rows, int64_t all, const uint16_t* b, int64_t columns, float* c, bool add, Ahead* next,
              int64_t lines) {
  const int64_t tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;
  for (int64_t k = 0; k < all; k += DEPTH) {
    const int64_t n = all - k < DEPTH ? all - k : DEPTH;
    for (int64_t t = 0, begin = 0; t < tiles; ++t) {
      const int64_t end = rows * (t + 1) / tiles;
      const Tile run = columns > LANES ? tile_of<2>(end - begin) : tile_of<1>(end - begin);
      run(a + k * panel + begin * PANEL, panel, b + k * TILE_B, n, c + begin * PANEL, add || k > 0, next, lines);
      begin = end;
    }
  }
}

void pairs_logits(const uint16_t* a, int64_t panel, int64_t rows, int64_t depth, const uint16_t* b, int64_t columns, float* c, Ahead next) {
  const int64_t all = (depth + PANEL - 1) / PANEL, tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;
  multiply(a, panel, rows, all, b, columns, c, false, &next, (next.lines + all * tiles - 1) / (all * tiles));
}

void pairs_product(const Summands& of, const uint16_t* a, int64_t panel, int64_t rows, int64_t depth, const uint16_t* b, int64_t columns, float* c,
                   bool add) {
  Ahead none{};
  for (int64_t part = 0; part < of.count; ++part) {
    multiply(a + part * of.a, panel, rows, (depth + PANEL - 1) / PANEL, b + part * of.b, columns, c, add || part > 0, &none, 0);
  }
}

// Rows of g as bf16, to the nearest: lanes of one row, 0 past `in`.
inline __m512i rounded(const float* g, __mmask32 in) {
  const __m512 low = _mm512_maskz_loadu_ps(static_cast<__mmask16>(in), g), high = _mm512_maskz_loadu_ps(static_cast<__mmask16>(in >> LANES), g + LANES);
  return (__m512i)_mm512_cvtne2ps_pbh(high, low);
}

void split_pairs(const float* g, int64_t rows, int64_t whole, int64_t lanes, int64_t from, uint16_t* const* as_a, uint16_t* const* as_b) {
  const __mmask32 in = static_cast<__mmask32>((uint64_t{1} << lanes) - 1);
  alignas(64) uint16_t order[2][2 * LANES];  // what lies at place i of the lower and the upper half of a pair of rows
  for (int i = 0; i < 4 * LANES; ++i) order[i / (2 * LANES)][i % (2 * LANES)] = static_cast<uint16_t>(i / 2 + i % 2 * 2 * LANES);
  const __m512i lower = _mm512_load_si512(order[0]), upper = _mm512_load_si512(order[1]);
  for (int64_t v = 0; v < whole; v += 2) {
    __m512i u[2];
    for (int i = 0; i < 2; ++i) {
      u[i] = v + i < rows ? rounded(g + (v + i) * PANEL, in) : _mm512_setzero_si512();
      if (as_a[0] != nullptr && v + i < rows) _mm512_storeu_si512(as_a[0] + (v + i) * PANEL, u[i]);
    }
    if (as_b[0] == nullptr) continue;
    uint16_t* const to = as_b[0] + (from + v) / 2 * 2 * PANEL;
    _mm512_storeu_si512(to, _mm512_permutex2var_epi16(u[0], lower, u[1]));
    _mm512_storeu_si512(to + PANEL, _mm512_permutex2var_epi16(u[0], upper, u[1]));
  }
}

int64_t residues_of_pairs(const float* g, int64_t rows, int64_t lanes, const float* keep, Residue* to) {
  const __mmask32 in = static_cast<__mmask32>((uint64_t{1} << lanes) - 1);
  const __m512 low = _mm512_loadu_ps(keep), high = _mm512_loadu_ps(keep + LANES);
  int64_t count = 0;
  for (int64_t v = 0; v < rows; ++v, g += PANEL) {
    const __mmask16 first = _mm512_cmp_ps_mask(_mm512_abs_ps(_mm512_loadu_ps(g)), low, _CMP_GT_OQ);
    const __mmask16 second = _mm512_cmp_ps_mask(_mm512_abs_ps(_mm512_loadu_ps(g + LANES)), high, _CMP_GT_OQ);
    uint32_t large = (first | static_cast<uint32_t>(second) << LANES) & in;
    if (large == 0) continue;
    alignas(64) uint16_t nearest[2 * LANES];
    _mm512_store_si512(nearest, rounded(g, in));
    for (; large != 0; large &= large - 1) {
      const int lane = __builtin_ctz(large);
      const uint32_t bits = static_cast<uint32_t>(nearest[lane]) << 16;
      float held;
      memcpy(&held, &bits, sizeof held);
      to[count++] = {static_cast<int32_t>(v), lane, g[lane] - held};
    }
  }
  return count;
}

void add_pairs(float factor, const uint16_t* x, int64_t count, float* to) {
  const __m512 f = _mm512_set1_ps(factor);
  for (int64_t i = 0; i < count; i += LANES) {
    const __mmask16 in = static_cast<__mmask16>(count - i < LANES ? (1u << (count - i)) - 1u : 0xffffu);
    const __m512 value = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(in, x + i)), 16));
    _mm512_mask_storeu_ps(to + i, in, _mm512_fmadd_ps(f, value, _mm512_maskz_loadu_ps(in, to + i)));
  }
}

}  // namespace

const HeadWords head_pairs = {1, pack_words, transpose_words, pairs_logits, pairs_product, split_pairs, residues_of_pairs, add_pairs};

}  // namespace acpo
