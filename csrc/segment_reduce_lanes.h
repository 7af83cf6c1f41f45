// Sums, maxima and their gradients over the tokens of groups. Added up in double: a group's order of adding depends on its length alone.
//
// Compiled once per instruction set: internal linkage, and no inline function of the standard library (see floats.h).
#pragma once

#include "segment_lanes.h"
#include "segment_reduce.h"

namespace acpo {
namespace {

template <class T>
using Result = typename LanesOf<T>::Real;  // float32, or float64 for float64

template <bool MASKED, class T>
ACPO_INLINE double sum_of(const T* x, const uint8_t* tokens, int64_t n, int64_t available) {
  const auto add = [](auto a, auto b) __attribute__((always_inline)) { return a + b; };
  Vector<double> sum[BLOCK * sizeof(double) / SEGMENT_BYTES]{};
  over<MASKED>(x, tokens, n, available, [&](auto at, auto v, auto) __attribute__((always_inline)) {
    if constexpr (sizeof(v[0]) == sizeof(double)) {
      sum[at.k] += v;
    } else {
      Vector<double> low, high;
      widen(v, &low, &high);
      sum[2 * at.k] += low;
      sum[2 * at.k + 1] += high;
    }
  });
  return fold<double>(fold_vectors(sum, add), add);
}

template <bool MASKED, class T>
ACPO_INLINE double max_of(const T* x, const uint8_t* tokens, int64_t n, int64_t available) {
  using L = Lanes<Result<T>>;
  const auto join = [](auto a, auto b) __attribute__((always_inline)) { return larger(b, a); };
  typename L::vec best[L::STEPS], low = typename L::vec{} - static_cast<Result<T>>(INF);
  Vector<Integer<Result<T>>> nan{};
  each<L::STEPS>([&](auto at) __attribute__((always_inline)) { best[at.k] = low; });
  over<MASKED>(x, tokens, n, available, [&](auto at, auto v, auto m) __attribute__((always_inline)) {
    best[at.k] = larger(m ? v : low, best[at.k]);
    nan |= v != v;
  });
  const double top = fold<Result<T>>(fold_vectors(best, join), join);
  return fold<Integer<Result<T>>>(nan, [](auto a, auto b) { return a | b; }) ? __builtin_nan("") : top;
}

// The groups [first, last), each shorter than a piece: out[g]
template <class T, bool MASKED, Reduce OF>
void groups_of(const void* values, const GroupTokens& groups, int64_t first, int64_t last, void* out) {
  const T* x = static_cast<const T*>(values);
  const auto at = [&](int64_t g) { return groups.offsets[groups.through == nullptr ? g : groups.through[g]]; };
  int64_t begin = at(first);
  for (int64_t g = first; g < last; ++g) {
    const int64_t end = at(g + 1), n = end - begin, available = groups.tokens - begin;
    const uint8_t* tokens = MASKED ? groups.mask + begin : nullptr;
    double all;
    if constexpr (OF == Reduce::max) {
      all = max_of<MASKED>(x + begin, tokens, n, available);
    } else {
      all = sum_of<MASKED>(x + begin, tokens, n, available);
      if constexpr (OF == Reduce::mean) {
        const int64_t count = MASKED ? count_of(tokens, n, available) : n;
        all /= static_cast<double>(count > 1 ? count : 1);
      }
    }
    static_cast<Result<T>*>(out)[g - first] = static_cast<Result<T>>(all);
    begin = end;
  }
}

template <class T, bool MASKED, bool MAX>
double piece_of(const void* values, const GroupTokens& groups, int64_t begin, int64_t end) {
  const T* x = static_cast<const T*>(values) + begin;
  const uint8_t* tokens = MASKED ? groups.mask + begin : nullptr;
  return (MAX ? max_of<MASKED, T> : sum_of<MASKED, T>)(x, tokens, end - begin, groups.tokens - begin);
}

int64_t count_tokens(const uint8_t* tokens, int64_t n, int64_t available) { return count_of(tokens, n, available); }

// The tokens of x[0, n) that attain `top`
template <bool MASKED, class T>
ACPO_INLINE int64_t ties_of(const T* x, const uint8_t* tokens, int64_t n, int64_t available, Result<T> top) {
  Vector<Integer<Result<T>>> ties{};
  over<MASKED>(x, tokens, n, available, [&](auto, auto v, auto m) __attribute__((always_inline)) { ties += m & (v == top); });
  return -static_cast<int64_t>(fold<Integer<Result<T>>>(ties, [](auto a, auto b) { return a + b; }));
}

template <class T, bool MASKED>
int64_t ties(const void* values, const GroupTokens& groups, int64_t begin, int64_t end, double top) {
  return ties_of<MASKED>(static_cast<const T*>(values) + begin, MASKED ? groups.mask + begin : nullptr, end - begin, groups.tokens - begin,
                         static_cast<Result<T>>(top));
}

inline void narrow(double x, double* out) { *out = x; }
template <class T>
void narrow(double x, T* out) {
  from_float(static_cast<float>(x), out);
}
inline double value_of(double x) { return x; }
template <class T>
Result<T> value_of(T x) {
  return to_float(x);
}

// gradient[begin, end) of one group, or of a piece of one; as far as `last` may be written to
template <class T, bool MASKED, bool MAX>
ACPO_INLINE void gradient_of(const T* x, const uint8_t* mask, int64_t begin, int64_t end, int64_t last, Result<T> grad, int64_t by, Result<T> top,
                             T* gradient) {
  T value;
  const T zero{};
  narrow(by > 1 ? static_cast<double>(grad) / static_cast<double>(by) : grad, &value);
  if constexpr (!MAX) return spread<MASKED>(gradient, mask, begin, end, last, value);
  constexpr int STEP = 128 / sizeof(T);
  for (; begin < end && begin + STEP <= last; begin += STEP) {
    for (int k = 0; k < STEP; ++k) gradient[begin + k] = (value_of(x[begin + k]) == top) & (!MASKED || mask[begin + k]) ? value : zero;
  }
  for (; begin < end; ++begin) gradient[begin] = (value_of(x[begin]) == top) & (!MASKED || mask[begin]) ? value : zero;
}

template <class T, bool MASKED, Reduce OF>
void gradients_of(const void* values, const GroupTokens& groups, int64_t first, int64_t last, const void* grad, const void* output, void* gradient) {
  const T* x = static_cast<const T*>(values);
  const auto at = [&](int64_t g) { return groups.offsets[groups.through == nullptr ? g : groups.through[g]]; };
  const int64_t behind = at(last);
  int64_t begin = at(first);
  for (int64_t g = first; g < last; ++g) {
    const int64_t end = at(g + 1), n = end - begin, available = groups.tokens - begin;
    const uint8_t* tokens = MASKED ? groups.mask + begin : nullptr;
    const Result<T> top = OF == Reduce::max ? static_cast<const Result<T>*>(output)[g - first] : Result<T>(0);
    int64_t by = 1;
    if constexpr (OF == Reduce::max) by = ties_of<MASKED>(x + begin, tokens, n, available, top);
    if constexpr (OF == Reduce::mean) by = MASKED ? count_of(tokens, n, available) : n;
    gradient_of<T, MASKED, OF == Reduce::max>(x, groups.mask, begin, end, behind, static_cast<const Result<T>*>(grad)[g - first], by, top,
                                              static_cast<T*>(gradient));
    begin = end;
  }
}

template <class T, bool MASKED, bool MAX>
void gradient_piece(const void* values, const GroupTokens& groups, int64_t begin, int64_t end, double grad, int64_t by, double top, void* gradient) {
  gradient_of<T, MASKED, MAX>(static_cast<const T*>(values), groups.mask, begin, end, end, static_cast<Result<T>>(grad), by,
                              static_cast<Result<T>>(top), static_cast<T*>(gradient));
}

bool spans(const int64_t* offsets, int64_t count, int64_t* longest) {
  constexpr int W = SEGMENT_BYTES / 8;
  using longs = Vector<int64_t>;
  longs wrong{}, high{};
  int64_t i = 0;
  const auto step = [&](longs from, longs to) __attribute__((always_inline)) {
    using words = Vector<uint64_t>;
    const longs n = reinterpret_cast<longs>(reinterpret_cast<words>(to) - reinterpret_cast<words>(from));
    wrong |= to < from;
    high = n > high ? n : high;
  };
  for (; i + W <= count; i += W) step(read<longs>(offsets + i), read<longs>(offsets + i + 1));
  for (; i < count; ++i) step(longs{} + offsets[i], longs{} + offsets[i + 1]);
  *longest = fold<int64_t>(high, [](auto a, auto b) { return larger(a, b); });
  return fold<int64_t>(wrong, [](auto a, auto b) { return a | b; }) == 0;
}

template <class T, bool MASKED>
constexpr GroupKernels::Typed typed = {
    {groups_of<T, MASKED, Reduce::sum>, groups_of<T, MASKED, Reduce::mean>, groups_of<T, MASKED, Reduce::max>},
    {piece_of<T, MASKED, false>, piece_of<T, MASKED, true>},
    ties<T, MASKED>,
    {gradients_of<T, MASKED, Reduce::sum>, gradients_of<T, MASKED, Reduce::mean>, gradients_of<T, MASKED, Reduce::max>},
    {gradient_piece<T, MASKED, false>, gradient_piece<T, MASKED, true>},
};

constexpr GroupKernels kernels = {
    {{typed<float, false>, typed<bf16, false>, typed<fp16, false>, typed<double, false>},
     {typed<float, true>, typed<bf16, true>, typed<fp16, true>, typed<double, true>}},
    count_tokens,
    spans,
};

}  // namespace
}  // namespace acpo
