// The three matrix products of head_kernels.h over the `Simd` that was included before.
//
// A tile of C is R rows by one or two vectors of columns, held in registers: for each k, R elements of A are broadcast against
// the B vectors. 14 x 2 of 32 AVX-512 registers (28 fused multiply-adds for 16 loads), 6 x 2 of 16 elsewhere. Rows are dealt
// evenly over the tiles that they need, so that no tile is left nearly empty.
#pragma once

#include <string.h>
#if defined(__SSE__)
#include <xmmintrin.h>
#endif

#include "head_kernels.h"

namespace acpo {
namespace {

constexpr int LANES = Simd::lanes;
constexpr int TILE_ROWS = LANES == 16 ? 14 : 6;
using vec = Simd::vec;
using mask = Simd::mask;

enum class Along { rows, columns };

// c[R][VECTORS x LANES] = or += sum over k < depth; A element (i, k): a[32 i + k % 32 + (k / 32) panel], or a[i + 32 k].
template <Along A, int R, int VECTORS>
void tile(const float* a, int64_t panel, const float* b, int64_t depth, float* c, int64_t stride, bool add, Ahead* next, int64_t lines) {
  vec sum[R][VECTORS];
#pragma GCC unroll 14
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < VECTORS; ++j) sum[i][j] = Simd::set(0.0f);
  auto step = [&](const float* x, int64_t row) __attribute__((always_inline)) {
    vec y[VECTORS];
#pragma GCC unroll 2
    for (int j = 0; j < VECTORS; ++j) y[j] = Simd::load(b + j * LANES);
#pragma GCC unroll 14
    for (int i = 0; i < R; ++i) {
      const vec e = Simd::set(x[i * row]);
#pragma GCC unroll 2
      for (int j = 0; j < VECTORS; ++j) sum[i][j] = Simd::fma(e, y[j], sum[i][j]);
    }
    b += PANEL;
  };
  if constexpr (A == Along::rows) {
    for (; depth > 0; depth -= PANEL, a += panel) {
      const int64_t n = depth < PANEL ? depth : PANEL;
      fetch(next, lines);
      for (int64_t k = 0; k < n; ++k) step(a + k, PANEL);
    }
  } else {
    for (int64_t k = 0; k < depth; ++k) step(a + k * PANEL, 1);
  }
#pragma GCC unroll 14
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < VECTORS; ++j) {
      float* to = c + i * stride + j * LANES;
      Simd::store(to, add ? Simd::add(Simd::load(to), sum[i][j]) : sum[i][j]);
    }
}

using Tile = void (*)(const float*, int64_t, const float*, int64_t, float*, int64_t, bool, Ahead*, int64_t);

template <Along A, int VECTORS, int R = TILE_ROWS>
Tile tile_of(int64_t rows) {
  if constexpr (R == 0) {
    return nullptr;
  } else {
    return rows == R ? tile<A, R, VECTORS> : tile_of<A, VECTORS, R - 1>(rows);
  }
}

// All rows of C against one piece of k: `columns` columns rounded up to whole vectors.
template <Along A>
void piece(const float* a, int64_t panel, const float* b, int64_t depth, int64_t rows, int64_t columns, float* c, int64_t stride, bool add,
           Ahead* next, int64_t lines) {
  const int64_t tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;
  for (int64_t j = 0; j < columns; j += 2 * LANES) {
    const bool two = columns - j > LANES;
    for (int64_t t = 0, begin = 0; t < tiles; ++t) {
      const int64_t end = rows * (t + 1) / tiles;
      const Tile run = two ? tile_of<A, 2>(end - begin) : tile_of<A, 1>(end - begin);
      run(a + begin * (A == Along::rows ? PANEL : 1), panel, b + j, depth, c + begin * stride + j, stride, add, next, lines);
      begin = end;
    }
  }
}

void logits_product(const float* weight, int64_t panel, int64_t rows, int64_t width, const float* hidden, int64_t lanes, float* z, Ahead next) {
  const int64_t steps = (width + PANEL - 1) / PANEL * ((rows + TILE_ROWS - 1) / TILE_ROWS), lines = (next.lines + steps - 1) / steps;
  for (int64_t k = 0; k < width; k += CHUNK) {
    const int64_t depth = width - k < CHUNK ? width - k : CHUNK;
    piece<Along::rows>(weight + k / PANEL * panel, panel, hidden + k * PANEL, depth, rows, lanes, z, PANEL, k > 0, &next, lines);
  }
}

void hidden_product(const float* g, const float* weight, int64_t rows, int64_t lanes, float* c) {
  Ahead none{};
  for (int64_t k = 0; k < rows; k += CHUNK_HIDDEN) {
    const int64_t depth = rows - k < CHUNK_HIDDEN ? rows - k : CHUNK_HIDDEN;
    piece<Along::columns>(g + k * PANEL, 0, weight + k * PANEL, depth, lanes, PANEL, c, PANEL, true, &none, 0);
  }
}

void weight_product(const float* g, int64_t panel, int64_t rows, const float* hidden, int64_t count, float* c, int64_t stride, int64_t columns) {
  Ahead none{};
  for (int64_t k = 0; k < count; k += CHUNK) {
    const int64_t depth = count - k < CHUNK ? count - k : CHUNK;
    const float* a = g + k / PANEL * panel;
    if (columns == PANEL) {
      piece<Along::rows>(a, panel, hidden + k * PANEL, depth, rows, PANEL, c, stride, k > 0, &none, 0);
      continue;
    }
    for (int64_t v = 0; v < rows; v += TILE_ROWS) {  // the last panel of H: whole vectors, of which only the columns leave
      const int64_t n = rows - v < TILE_ROWS ? rows - v : TILE_ROWS;
      float part[TILE_ROWS * PANEL];
      piece<Along::rows>(a + v * PANEL, panel, hidden + k * PANEL, depth, n, columns, part, PANEL, false, &none, 0);
      for (int64_t i = 0; i < n; ++i) {
        for (int64_t j = 0; j < columns; ++j) {
          float* to = c + (v + i) * stride + j;
          *to = k > 0 ? *to + part[i * PANEL + j] : part[i * PANEL + j];
        }
      }
    }
  }
}

template <class T>
void pack_panels(const void* from, int64_t stride, int64_t rows, int64_t width, float* to, int64_t panel) {
  const T* x = static_cast<const T*>(from);
  for (int64_t i = 0; i < rows; ++i, x += stride) {
    int64_t j = 0;
    for (; j + PANEL <= width; j += PANEL) {
      float* out = to + j / PANEL * panel + i * PANEL;
      for (int64_t k = 0; k < PANEL; k += LANES) Simd::store(out + k, Simd::load(x + j + k));
    }
    if (j < width) {
      float* out = to + j / PANEL * panel + i * PANEL;
      for (int64_t k = 0; k < PANEL; ++k) out[k] = j + k < width ? to_float(x[j + k]) : 0.0f;
    }
  }
}

template <class T>
void round_all(const float* from, int64_t count, void* to) {
  T* out = static_cast<T*>(to);
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) Simd::store(out + i, Simd::load(from + i));
  for (; i < count; ++i) from_float(from[i], out + i);
}

// A line that is stored whole need not be read first.
template <class T>
void leave_all(const float* from, int64_t count, void* to) {
#if defined(__SSE__)
  constexpr int64_t LINE = 64 / sizeof(T);
  if (reinterpret_cast<uintptr_t>(to) % 64 == 0) {
    for (; count >= LINE; count -= LINE, from += LINE, to = static_cast<T*>(to) + LINE) {
      alignas(64) T line[LINE];
      for (int64_t k = 0; k < LINE; k += LANES) Simd::store(line + k, Simd::load(from + k));
      float words[16];
      memcpy(words, line, sizeof words);
      for (int k = 0; k < 16; k += 4) _mm_stream_ps(static_cast<float*>(to) + k, _mm_loadu_ps(words + k));
    }
    _mm_sfence();
  }
#endif
  round_all<T>(from, count, to);
}

}  // namespace
}  // namespace acpo
