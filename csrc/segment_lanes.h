// The tokens of one group, over vectors as wide as SEGMENT_BYTES says: most groups are a vector or two long, so there is no scalar rest.
// BLOCK tokens are taken at a time, the last ones under a mask: how many vectors a group fills is what no branch predictor can know, and
// a wrong guess costs more than the vectors.
//
// Compiled once per instruction set: internal linkage, and no inline function of the standard library (see floats.h).
#pragma once

#include <string.h>

#include "floats.h"
#include "logprob_entropy.h"

#if defined(__x86_64__)
#include <immintrin.h>
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC bug 105593: its own intrinsics begin from an undefined register
#endif
#endif

#define ACPO_INLINE inline __attribute__((always_inline))

namespace acpo {
namespace {

constexpr int BLOCK = SEGMENT_BYTES == 16 ? 16 : 32;  // tokens
constexpr double INF = __builtin_inf();

// As a member of a template: an attribute on a local typedef is lost where its size depends on a parameter.
template <class E, int BYTES>
struct Sized {
  typedef E vector __attribute__((vector_size(BYTES)));
};
template <class E, int BYTES = SEGMENT_BYTES>
using Vector = typename Sized<E, BYTES>::vector;

template <class Real>
struct MaskOf {
  using integer = int32_t;
};
template <>
struct MaskOf<double> {
  using integer = int64_t;
};
template <class Real>
using Integer = typename MaskOf<Real>::integer;  // what a comparison of Real gives

template <class T, class U>
ACPO_INLINE T read(const U* p) {
  T x;
  memcpy(&x, p, sizeof x);
  return x;
}

// f(At<0>{}) ... f(At<N - 1>{}): vectors in arrays stay in registers where every index is a constant.
template <int K>
struct At {
  static constexpr int k = K;
};
template <int N, int K = 0, class F>
ACPO_INLINE void each(F f) {
  if constexpr (K < N) {
    f(At<K>{});
    each<N, K + 1>(f);
  }
}

// float32 lanes for the 16-bit types too
template <class T>
struct LanesOf {
  using Real = float;
};
template <>
struct LanesOf<double> {
  using Real = double;
};

#if SEGMENT_BYTES == 64

// Lanes under mask registers: what a mask leaves out is not read.
template <class Real>
struct Lanes {
  using vec = Vector<Real>;
  using mask = uint32_t;  // bit i: token i of the block
  static constexpr int W = SEGMENT_BYTES / sizeof(Real), STEPS = BLOCK / W;

  static mask first(int64_t n) { return static_cast<mask>((uint64_t{1} << (n < BLOCK ? n : BLOCK)) - 1); }
  static mask kept(const uint8_t* tokens, mask m) {
    const __m256i bytes = _mm256_maskz_loadu_epi8(m, tokens);
    return _mm256_test_epi8_mask(bytes, bytes);
  }
  static vec load(const float* p, mask m, int k) { return reinterpret_cast<vec>(_mm512_maskz_loadu_ps(static_cast<__mmask16>(m >> k * W), p + k * W)); }
  static vec load(const double* p, mask m, int k) { return reinterpret_cast<vec>(_mm512_maskz_loadu_pd(static_cast<__mmask8>(m >> k * W), p + k * W)); }
  static __m256i halves(const void* p, mask m, int k) { return _mm256_maskz_loadu_epi16(static_cast<__mmask16>(m >> k * W), static_cast<const uint16_t*>(p) + k * W); }
  static vec load(const bf16* p, mask m, int k) {
    return reinterpret_cast<vec>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves(p, m, k)), 16));
  }
  static vec load(const fp16* p, mask m, int k) { return reinterpret_cast<vec>(_mm512_cvtph_ps(halves(p, m, k))); }
  static Vector<Integer<Real>> vector(mask m, int k) {
    if constexpr (W == 16) {
      return reinterpret_cast<Vector<int32_t>>(_mm512_movm_epi32(static_cast<__mmask16>(m >> k * W)));
    } else {
      return reinterpret_cast<Vector<int64_t>>(_mm512_movm_epi64(static_cast<__mmask8>(m >> k * W)));
    }
  }
};

// step(At<k>, vector, lanes) over x[0, n): lanes left out hold 0.
template <bool MASKED, class T, class Step>
ACPO_INLINE void over(const T* x, const uint8_t* tokens, int64_t n, int64_t /*available*/, Step step) {
  using L = Lanes<typename LanesOf<T>::Real>;
  for (int64_t i = 0; i < n; i += BLOCK) {
    auto m = L::first(n - i);
    if (MASKED) m = L::kept(tokens + i, m);
    each<L::STEPS>([&](auto at) __attribute__((always_inline)) { step(at, L::load(x + i, m, at.k), L::vector(m, at.k)); });
  }
}

#else

// -1 in the first n lanes of a block
template <class Integer>
struct Edge {
  Integer at[2 * BLOCK];
  constexpr Edge() : at{} {
    for (int i = 0; i < BLOCK; ++i) at[i] = -1;
  }
};

template <class Real>
struct Lanes {
  using vec = Vector<Real>;
  using mask = Vector<Integer<Real>>;
  static constexpr int W = SEGMENT_BYTES / sizeof(Real), STEPS = BLOCK / W;
  static constexpr Edge<Integer<Real>> edge{};

  static mask first(int64_t n, int k) { return read<mask>(edge.at + (BLOCK - (n < BLOCK ? n : BLOCK)) + k * W); }
  static mask kept(const uint8_t* tokens) {  // of bytes that are 0 or 1
    return -__builtin_convertvector(read<Vector<uint8_t, W>>(tokens), mask);
  }
  static vec load(const Real* p) { return read<vec>(p); }
  static vec load(const bf16* p) {
    return reinterpret_cast<vec>(__builtin_convertvector(read<Vector<uint16_t, 2 * W>>(p), Vector<uint32_t>) << 16);
  }
  static vec load(const fp16* p) {
    vec x;
    for (int i = 0; i < W; ++i) x[i] = to_float(p[i]);
    return x;
  }
  static vec keep(mask m, vec x) { return reinterpret_cast<vec>(m & reinterpret_cast<mask>(x)); }
};

// step(At<k>, vector, lanes) over x[0, n), of which x[0, available) may be read: lanes left out hold 0.
template <bool MASKED, class T, class Step>
ACPO_INLINE void over(const T* x, const uint8_t* tokens, int64_t n, int64_t available, Step step) {
  using L = Lanes<typename LanesOf<T>::Real>;
  for (int64_t i = 0; i < n; i += BLOCK) {
    const T* from = x + i;
    const uint8_t* of = tokens + i;
    T rest[BLOCK];
    uint8_t of_rest[BLOCK];
    if (__builtin_expect(i + BLOCK > available, 0)) {  // the end of the array: what lies behind it is not ours to read
      memset(rest, 0, sizeof rest);
      memcpy(rest, from, static_cast<size_t>(available - i) * sizeof(T));
      from = rest;
      if (MASKED) {
        memset(of_rest, 0, sizeof of_rest);
        memcpy(of_rest, of, static_cast<size_t>(available - i));
        of = of_rest;
      }
    }
    each<L::STEPS>([&](auto at) __attribute__((always_inline)) {
      auto m = L::first(n - i, at.k);
      if (MASKED) m &= L::kept(of + at.k * L::W);
      step(at, L::keep(m, L::load(from + at.k * L::W)), m);
    });
  }
}

#endif

// The lower and the upper half of a vector; through memory where there is no instruction that the compiler would find.
template <class E, class V>
ACPO_INLINE Vector<E, sizeof(V) / 2> lower(V x) {
#if SEGMENT_BYTES == 64
  if constexpr (sizeof(V) == 64) return reinterpret_cast<Vector<E, 32>>(_mm512_castsi512_si256(reinterpret_cast<__m512i>(x)));
#endif
#if SEGMENT_BYTES >= 32
  if constexpr (sizeof(V) == 32) return reinterpret_cast<Vector<E, 16>>(_mm256_castsi256_si128(reinterpret_cast<__m256i>(x)));
#endif
  return read<Vector<E, sizeof(V) / 2>>(&x);
}
template <class E, class V>
ACPO_INLINE Vector<E, sizeof(V) / 2> upper(V x) {
#if SEGMENT_BYTES == 64
  if constexpr (sizeof(V) == 64) return reinterpret_cast<Vector<E, 32>>(_mm512_extracti64x4_epi64(reinterpret_cast<__m512i>(x), 1));
#endif
#if SEGMENT_BYTES >= 32
  if constexpr (sizeof(V) == 32) return reinterpret_cast<Vector<E, 16>>(_mm256_extracti128_si256(reinterpret_cast<__m256i>(x), 1));
#endif
  return read<Vector<E, sizeof(V) / 2>>(reinterpret_cast<const char*>(&x) + sizeof x / 2);
}

// The doubles of the lower and the upper half
ACPO_INLINE void widen(Vector<float> x, Vector<double>* low, Vector<double>* high) {
#if SEGMENT_BYTES == 64
  *low = reinterpret_cast<Vector<double>>(_mm512_cvtps_pd(reinterpret_cast<__m256>(lower<float>(x))));
  *high = reinterpret_cast<Vector<double>>(_mm512_cvtps_pd(reinterpret_cast<__m256>(upper<float>(x))));
#elif SEGMENT_BYTES == 32
  *low = reinterpret_cast<Vector<double>>(_mm256_cvtps_pd(reinterpret_cast<__m128>(lower<float>(x))));
  *high = reinterpret_cast<Vector<double>>(_mm256_cvtps_pd(reinterpret_cast<__m128>(upper<float>(x))));
#elif defined(__x86_64__)
  *low = reinterpret_cast<Vector<double>>(_mm_cvtps_pd(x));
  *high = reinterpret_cast<Vector<double>>(_mm_cvtps_pd(_mm_movehl_ps(x, x)));
#else
  *low = __builtin_convertvector(lower<float>(x), Vector<double>);
  *high = __builtin_convertvector(upper<float>(x), Vector<double>);
#endif
}

// All lanes joined, half onto half.
template <class E, class V, class Join>
ACPO_INLINE E fold(V x, Join join) {
  if constexpr (sizeof(V) > 16) {
    return fold<E>(join(lower<E>(x), upper<E>(x)), join);
  } else if constexpr (sizeof(E) == 8) {
    return join(static_cast<E>(x[0]), static_cast<E>(x[1]));
  } else {
    return join(join(static_cast<E>(x[0]), static_cast<E>(x[2])), join(static_cast<E>(x[1]), static_cast<E>(x[3])));
  }
}
template <int N, class V, class Join>
ACPO_INLINE V fold_vectors(const V (&x)[N], Join join) {
  if constexpr (N == 1) {
    return x[0];
  } else {
    V half[N / 2];
    each<N / 2>([&](auto at) __attribute__((always_inline)) { half[at.k] = join(x[at.k], x[at.k + N / 2]); });
    return fold_vectors(half, join);
  }
}

template <class V>
ACPO_INLINE V larger(V x, V best) {
  return x > best ? x : best;  // a NaN in x gives best
}

// How many of the n bytes, which are 0 or 1, are 1; tokens[0, available) may be read.
ACPO_INLINE int64_t count_of(const uint8_t* tokens, int64_t n, int64_t available) {
#if SEGMENT_BYTES == 64
  (void)available;
  int64_t count = 0;
  for (int64_t i = 0; i < n; i += 64) {
    const __mmask64 m = n - i < 64 ? (uint64_t{1} << (n - i)) - 1 : ~uint64_t{0};
    const __m512i bytes = _mm512_maskz_loadu_epi8(m, tokens + i);
    count += __builtin_popcountll(_mm512_test_epi8_mask(bytes, bytes));
  }
  return count;
#else
  // Eight at a time: the product's highest byte is their sum.
  constexpr uint64_t ONES = 0x0101010101010101u;
  int64_t count = 0, i = 0;
  for (; i + 8 <= n; i += 8) count += static_cast<int64_t>(read<uint64_t>(tokens + i) * ONES >> 56);
  if (i == n) return count;
  if (i + 8 <= available) {
    uint64_t eight = read<uint64_t>(tokens + i);
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    eight <<= 8 * (8 - (n - i));
#else
    eight >>= 8 * (8 - (n - i));
#endif
    return count + static_cast<int64_t>(eight * ONES >> 56);
  }
  for (; i < n; ++i) count += tokens[i];
  return count;
#endif
}

// to[from, until) = value, 0 where a token is masked: 128 bytes at a time, the length of most groups. The last ones may be written past
// `until`, as far as `last`: the next group's tokens come after them.
template <bool MASKED, class T>
ACPO_INLINE void spread(T* to, const uint8_t* tokens, int64_t from, int64_t until, int64_t last, T value) {
  constexpr int STEP = 128 / sizeof(T);
  const T zero{};
  for (; from < until && from + STEP <= last; from += STEP) {
    for (int k = 0; k < STEP; ++k) to[from + k] = !MASKED || tokens[from + k] ? value : zero;
  }
  for (; from < until; ++from) to[from] = !MASKED || tokens[from] ? value : zero;
}

}  // namespace
}  // namespace acpo
