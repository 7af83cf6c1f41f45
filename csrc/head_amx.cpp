// The three products of the head from bf16 on AMX: tiles of 16 x 32 bf16, 16 x 16 float32 sums, at 1,024 products a cycle where
// AVX-512 has 32. Products of bf16 are exact in float32, so this is float32 accumulation:
//
//   logits   Z [v, n]     A = W       B = X^T
//   weight   dW [v, h]    A = G       B = X       the float32 gradient G as the sum of three bf16 numbers: 24 bits
//   hidden   dX^T [h, n]  A = W^T     B = G
//
// A tile of A is 16 rows of 64 bytes, one of B 16 rows of 64 bytes 128 bytes apart; two of each against four of C fill the eight
// tile registers. DEPTH panels of k at a time: 16 x 2 KB of B stay in the L1 while the rows of A pass. A sum goes on from piece to
// piece in its order.
#include "head_operands.h"

namespace acpo {
namespace {

constexpr int64_t DEPTH = 16, SIDE = 16, PARTS = MOST_PARTS;

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Tiles 0 to 3 are C, 4 and 5 A, 6 and 7 B.
template <bool TALL, bool WIDE>
void piece(const Summands& of, const uint16_t* a, int64_t panel, const uint16_t* b, int64_t depth, float* c, bool add) {
  constexpr int64_t ROW = PANEL * sizeof(float);
  if (add) {
    _tile_loadd(0, c, ROW);
    if (WIDE) _tile_loadd(1, c + SIDE, ROW);
    if (TALL) _tile_loadd(2, c + SIDE * PANEL, ROW);
    if (TALL && WIDE) _tile_loadd(3, c + SIDE * PANEL + SIDE, ROW);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t part = 0; part < of.count; ++part) {
    const uint16_t *x = a + part * of.a, *y = b + part * of.b;
    for (int64_t k = 0; k < depth; ++k, x += panel, y += TILE_B) {
      _tile_loadd(4, x, 64);
      _tile_loadd(6, y, 128);
      _tile_dpbf16ps(0, 4, 6);
      if (WIDE) {
        _tile_loadd(7, y + PANEL, 128);
        _tile_dpbf16ps(1, 4, 7);
      }
      if (TALL) {
        _tile_loadd(5, x + SIDE * PANEL, 64);
        _tile_dpbf16ps(2, 5, 6);
        if (WIDE) _tile_dpbf16ps(3, 5, 7);
      }
    }
  }
  _tile_stored(0, c, ROW);
  if (WIDE) _tile_stored(1, c + SIDE, ROW);
  if (TALL) _tile_stored(2, c + SIDE * PANEL, ROW);
  if (TALL && WIDE) _tile_stored(3, c + SIDE * PANEL + SIDE, ROW);
}

template <bool WIDE>
void all_rows(const Summands& of, const uint16_t* a, int64_t panel, int64_t rows, const uint16_t* b, int64_t depth, float* c, bool add) {
  int64_t v = 0;
  for (; v + 2 * SIDE <= rows; v += 2 * SIDE) piece<true, WIDE>(of, a + v * PANEL, panel, b, depth, c + v * PANEL, add);
  for (; v < rows; v += SIDE) {
    const int64_t n = rows - v < SIDE ? rows - v : SIDE;
    if (n == SIDE) {
      piece<false, WIDE>(of, a + v * PANEL, panel, b, depth, c + v * PANEL, add);
    } else {  // the last rows: those of A go on with zeros, c does not
      alignas(64) float part[SIDE * PANEL] = {};
      memcpy(part, c + v * PANEL, static_cast<size_t>(n * PANEL) * sizeof(float));
      piece<false, WIDE>(of, a + v * PANEL, panel, b, depth, part, add);
      memcpy(c + v * PANEL, part, static_cast<size_t>(n * PANEL) * sizeof(float));
    }
  }
}

void tiles_product(const Summands& of, const uint16_t* a, int64_t panel, int64_t rows, int64_t depth, const uint16_t* b, int64_t columns, float* c,
                   bool add) {
  static const TileConfig config;
  _tile_loadconfig(&config);
  const int64_t all = (depth + PANEL - 1) / PANEL;
  for (int64_t k = 0; k < all; k += DEPTH) {
    const int64_t n = all - k < DEPTH ? all - k : DEPTH;
    if (columns > SIDE) {
      all_rows<true>(of, a + k * panel, panel, rows, b + k * TILE_B, n, c, add || k > 0);
    } else {
      all_rows<false>(of, a + k * panel, panel, rows, b + k * TILE_B, n, c, add || k > 0);
    }
  }
  _tile_release();
}

// The bf16 nearest to each lane, in the low half of its word; NaN stays NaN.
inline __m512i nearest(__m512 x) {
  const __m512i u = _mm512_castps_si512(x), odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i r = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd), 16);
  return _mm512_mask_mov_epi32(r, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
}

void split_tiles(const float* g, int64_t rows, int64_t whole, int64_t lanes, int64_t from, uint16_t* const* as_a, uint16_t* const* as_b) {
  for (int64_t v = 0; v < whole; v += 2) {
    for (int64_t lane = 0; lane < PANEL; lane += 16) {
      const int64_t n = lanes - lane < 0 ? 0 : lanes - lane < 16 ? lanes - lane : 16;
      const __mmask16 in = static_cast<__mmask16>((1u << n) - 1u);
      __m512 x[2];
      for (int i = 0; i < 2; ++i) x[i] = v + i < rows ? _mm512_maskz_loadu_ps(in, g + (v + i) * PANEL + lane) : _mm512_setzero_ps();
      for (int part = 0; part < PARTS; ++part) {
        __m512i u[2];
        for (int i = 0; i < 2; ++i) {
          u[i] = nearest(x[i]);
          x[i] = _mm512_sub_ps(x[i], _mm512_castsi512_ps(_mm512_slli_epi32(u[i], 16)));
          if (as_a[part] != nullptr && v + i < rows) {
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(as_a[part] + (v + i) * PANEL + lane), _mm512_cvtepi32_epi16(u[i]));
          }
        }
        if (as_b[part] == nullptr) continue;
        const int64_t pair = (from + v) / 2;
        _mm512_storeu_si512(as_b[part] + (pair * PANEL + lane) * 2, _mm512_or_si512(u[0], _mm512_slli_epi32(u[1], 16)));
      }
    }
  }
}

void tiles_logits(const uint16_t* a, int64_t panel, int64_t rows, int64_t depth, const uint16_t* b, int64_t columns, float* c, Ahead) {
  tiles_product({1, 0, 0}, a, panel, rows, depth, b, columns, c, false);
}

}  // namespace

const HeadWords head_tiles = {PARTS, pack_words, transpose_words, tiles_logits, tiles_product, split_tiles, nullptr, nullptr};

}  // namespace acpo
