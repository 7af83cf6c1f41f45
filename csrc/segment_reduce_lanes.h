// The tokens of one group, over vectors of double as wide as SEGMENT_REDUCE_BYTES says (the compiler's vector extension): most groups
// are a few vectors long, so there is no scalar rest: the last vectors read past the group, inside the array, and what they read too
// much is cut off by a mask. Added up in double: with four sums a group's order of adding depends on its length alone.
//
// Compiled once per instruction set: internal linkage, and no inline function of the standard library (see floats.h).
#pragma once

#include <string.h>

#include "floats.h"
#include "segment_reduce.h"

namespace acpo {
namespace {

constexpr int W = SEGMENT_REDUCE_BYTES / 8;
typedef double vec __attribute__((vector_size(SEGMENT_REDUCE_BYTES)));
typedef int64_t mask __attribute__((vector_size(SEGMENT_REDUCE_BYTES)));
constexpr double INF = __builtin_inf();

inline vec load(const double* p) {
  vec x;
  memcpy(&x, p, sizeof x);
  return x;
}
inline vec load(const float* p) {
  typedef float floats __attribute__((vector_size(4 * W)));
  floats x;
  memcpy(&x, p, sizeof x);
  return __builtin_convertvector(x, vec);
}
inline vec load(const bf16* p) {
  typedef uint16_t halves __attribute__((vector_size(2 * W)));
  typedef uint32_t words __attribute__((vector_size(4 * W)));
  typedef float floats __attribute__((vector_size(4 * W)));
  halves x;
  memcpy(&x, p, sizeof x);
  return __builtin_convertvector(reinterpret_cast<floats>(__builtin_convertvector(x, words) << 16), vec);
}
inline vec load(const fp16* p) {
  float x[W];
  for (int i = 0; i < W; ++i) x[i] = to_float(p[i]);
  return load(x);
}

inline mask kept(const uint8_t* p) {  // of bytes that are 0 or 1
  typedef uint8_t bytes __attribute__((vector_size(W)));
  bytes x;
  memcpy(&x, p, sizeof x);
  return -__builtin_convertvector(x, mask);
}

// The first n lanes of STEP vectors in a row, n < 0 like 0 and n > STEP W like STEP W: vector k.
constexpr int STEP = 4;
struct Edge {
  int64_t at[2 * STEP * W];
  constexpr Edge() : at{} {
    for (int i = 0; i < STEP * W; ++i) at[i] = -1;
  }
};
constexpr Edge edge{};
inline mask first(int64_t n, int k) {
  mask m;
  memcpy(&m, edge.at + (STEP * W - (n < STEP * W ? n : STEP * W)) + k * W, sizeof m);
  return m;
}

inline vec choose(mask m, vec a, vec b) { return reinterpret_cast<vec>((m & reinterpret_cast<mask>(a)) | (~m & reinterpret_cast<mask>(b))); }
inline vec larger(vec x, vec best) { return choose((x > best) | (x != x), x, best); }  // a NaN stays

// step(k, vector, lanes) over x[0, n), of which x[0, available) may be read. Always STEP vectors at a time, under masks: how many vectors
// a group fills is what no branch predictor can know, and a wrong guess costs more than three vectors.
template <bool MASKED, class T, class Step>
void over(const T* x, const uint8_t* tokens, int64_t n, int64_t available, Step step) {
  int64_t i = 0;
  for (; i < n && i + STEP * W <= available; i += STEP * W) {
    for (int k = 0; k < STEP; ++k) {
      mask lanes = first(n - i, k);
      if (MASKED) lanes &= kept(tokens + i + k * W);
      step(k, load(x + i + k * W), lanes);
    }
  }
  if (i >= n) return;
  T rest[STEP * W] = {};
  uint8_t of_rest[STEP * W] = {};
  memcpy(rest, x + i, static_cast<size_t>(n - i) * sizeof(T));
  if (MASKED) memcpy(of_rest, tokens + i, static_cast<size_t>(n - i));
  for (int k = 0; k < STEP; ++k) {
    mask lanes = first(n - i, k);
    if (MASKED) lanes &= kept(of_rest + k * W);
    step(k, load(rest + k * W), lanes);
  }
}

template <class T, bool MASKED>
double sum_of(const void* values, const uint8_t* tokens, int64_t n, int64_t available) {
  vec sum0{}, sum1{}, sum2{}, sum3{};
  over<MASKED>(static_cast<const T*>(values), tokens, n, available, [&](int k, vec x, mask m) __attribute__((always_inline)) {
    x = reinterpret_cast<vec>(reinterpret_cast<mask>(x) & m);
    k == 0 ? sum0 += x : k == 1 ? sum1 += x : k == 2 ? sum2 += x : sum3 += x;
  });
  const vec sum = (sum0 + sum2) + (sum1 + sum3);
  double total = 0.0;
  for (int i = 0; i < W; ++i) total += sum[i];
  return total;
}

template <class T, bool MASKED>
double max_of(const void* values, const uint8_t* tokens, int64_t n, int64_t available) {
  const vec low = vec{} - INF;
  vec best = low, other = low;
  over<MASKED>(static_cast<const T*>(values), tokens, n, available, [&](int k, vec x, mask m) __attribute__((always_inline)) {
    x = choose(m, x, low);
    k % 2 == 0 ? best = larger(x, best) : other = larger(x, other);
  });
  best = larger(other, best);
  double top = best[0];
  for (int i = 1; i < W; ++i) top = best[i] > top || best[i] != best[i] ? best[i] : top;
  return top;
}

// Bytes that are 0 or 1, eight at a time: the product's highest byte is their sum.
int64_t count_of(const uint8_t* tokens, int64_t n, int64_t available) {
  constexpr uint64_t ONES = 0x0101010101010101u;
  int64_t count = 0, i = 0;
  for (; i + 8 <= n; i += 8) {
    uint64_t eight;
    memcpy(&eight, tokens + i, 8);
    count += static_cast<int64_t>(eight * ONES >> 56);
  }
  if (i < n && i + 8 <= available) {
    uint8_t eight[8];
    memcpy(eight, tokens + i, 8);
    for (int k = 0; k < 8; ++k) count += i + k < n ? eight[k] : 0;
  } else {
    for (; i < n; ++i) count += tokens[i];
  }
  return count;
}

constexpr GroupKernels kernels = {
    {{sum_of<float, false>, sum_of<bf16, false>, sum_of<fp16, false>, sum_of<double, false>},
     {sum_of<float, true>, sum_of<bf16, true>, sum_of<fp16, true>, sum_of<double, true>}},
    {{max_of<float, false>, max_of<bf16, false>, max_of<fp16, false>, max_of<double, false>},
     {max_of<float, true>, max_of<bf16, true>, max_of<fp16, true>, max_of<double, true>}},
    count_of,
};

}  // namespace
}  // namespace acpo
