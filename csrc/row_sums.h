// Sums over a row of logits x_j, on which every operation here stands, over the `Simd` that was included before. With the running
// maximum m and the temperature T,
//   rest     = sum of exp((x_j - m) / T) over all j but ONE that holds the maximum    so that a confident row does not lose it
//   weighted = sum of exp((x_j - m) / T) (m - x_j) >= 0                               beside 1
// The row is walked once in groups of 32 vectors: each is summed against the maximum so far, and again, slowly, where it turns out to hold
// a larger one, whose rare changes rescale what was summed before. Sums are float32 in one accumulator of lanes, to which pairs are added,
// emptied after 16 additions, and their sums after 8 (equal terms all round the same way, and their errors add up); from there on sums
// are double.
//
// The price of a vector, AVX-512: sub, a maximum of bits, 10 for the exponential (fma, sub, fms, fma; fma, mul, fma; permute, shift, add),
// add, fma: 14 instructions, 7 of them for the two multipliers. Zen 4, which does two 512-bit instructions a cycle, one of them an fma:
// 7 cycles at least, 9.5 measured on rows in L3 (3.67 GHz). bf16 adds a shift and an and for two vectors. Reading 64 bytes takes a core
// 4 cycles from L3 and 11 from DRAM, both cores reading.
//
// Compiled once per instruction set: internal linkage, and no inline function of the standard library (see floats.h).
#pragma once

#include <math.h>
#include <string.h>

#include "logprob_entropy.h"

namespace acpo {
namespace {

constexpr double LOG2E = 1.4426950408889634;
constexpr float INF = __builtin_inff();
constexpr float MAX = 3.4028234663852886e38f;

using vec = Simd::vec;
using mask = Simd::mask;
constexpr int W = Simd::lanes;
constexpr int LOCKSTEP = 4;                  // vectors worked on side by side, see Exp
constexpr int64_t GROUP = 32 * W, GROUPS = 8;  // elements between two tests of the maximum, groups between two sums in double
constexpr int64_t AHEAD = 1024;                // elements: a page of float32 ahead of the arithmetic, where the hardware's prefetcher stops

// 2^64 exp(-u / T) for u >= 0, as 2^(n / R) 2^(f / R) with n an integer, |f| <= 1/2 and R = Simd::roots: the first from a table of R
// numbers, the second a polynomial p(f) with p(0) = 1. The factor 2^64 keeps exp(-131) and what lies above it normal numbers. Past `cut`
// the exponent has no room left.
struct Exp {
  typename Simd::Powers powers;
  vec scale_n, first, second, magic, c1, c2, c3, c4, c5;
  float cut;       // the largest u
  double inverse;  // of the factor
  double per_t;
  bool cold;

  explicit Exp(double temperature) {
    const double k = LOG2E / temperature, steps = -k * Simd::roots;
    per_t = 1.0 / temperature;
    cold = temperature < 1e6;  // past it u itself may be large, and 2^64 u would overflow
    powers = Simd::powers(cold ? 64 : 0);
    inverse = cold ? 0x1p-64 : 1.0;
    cut = static_cast<float>((cold ? 188.0 : 125.0) / k);
    if (!(cut < MAX)) cut = MAX;
    const float rounded = static_cast<float>(steps);
    scale_n = Simd::set(rounded);
    if constexpr (Simd::has_fma) {  // f = u k - n, with k in two parts
      first = scale_n;
      second = Simd::set(static_cast<float>(steps - rounded));
    } else {  // f = (u - n / k) k, with 1 / k in two parts: the first has 16 bits, so that its product with n is exact
      const float part = as_float(as_bits(static_cast<float>(1.0 / steps)) & 0xffffff00u);
      first = Simd::set(part);
      second = Simd::set(static_cast<float>(1.0 / steps - part));
    }
    magic = Simd::set(0x1.8p23f);  // adding it rounds to an integer
    // Minimax polynomials in the relative error, with their coefficients in float32
    if constexpr (Simd::roots == 32) {  // 5.3e-8, and 5.6e-8 of the table's
      c1 = Simd::set(0x1.62e584p-6f), c2 = Simd::set(0x1.ebfbecp-13f);
    } else if constexpr (Simd::roots == 8) {  // 2.7e-8, and 5.6e-8 of the table's
      c1 = Simd::set(0x1.62e432p-4f), c2 = Simd::set(0x1.ec0c32p-9f), c3 = Simd::set(0x1.c6a004p-14f);
    } else {  // 9.5e-8
      c1 = Simd::set(0x1.62e42ap-1f), c2 = Simd::set(0x1.ebf9bep-3f), c3 = Simd::set(0x1.c6b70ap-5f);
      c4 = Simd::set(0x1.3cea6ap-7f), c5 = Simd::set(0x1.5bb9ccp-10f);
    }
  }

  // The smallest logit that counts beside the maximum `top`.
  float floor(float top) const {
    const float x = top - cut;
    return x > -MAX ? x : -MAX;
  }

  // K vectors in lockstep. One vector is a chain of 10 dependent instructions of 4 cycles; the scheduler (97 entries on Golden Cove)
  // does not reach far enough down the program to find the next chains behind it.
  template <int K>
  __attribute__((always_inline)) void operator()(const vec (&u)[K], vec (&e)[K]) const {
    vec t[K], f[K], p[K];
    for (int k = 0; k < K; ++k) t[k] = Simd::fma(u[k], scale_n, magic);
    for (int k = 0; k < K; ++k) p[k] = Simd::sub(t[k], magic);
    if constexpr (Simd::has_fma) {
      for (int k = 0; k < K; ++k) f[k] = Simd::fms(u[k], first, p[k]);
      for (int k = 0; k < K; ++k) f[k] = Simd::fma(u[k], second, f[k]);
    } else {
      for (int k = 0; k < K; ++k) f[k] = Simd::mul(Simd::sub(Simd::sub(u[k], Simd::mul(p[k], first)), Simd::mul(p[k], second)), scale_n);
    }
    if constexpr (Simd::roots == 32) {
      for (int k = 0; k < K; ++k) p[k] = Simd::fma(c2, f[k], c1);
    } else if constexpr (Simd::roots == 8) {
      for (int k = 0; k < K; ++k) p[k] = Simd::fma(c3, f[k], c2);
      for (int k = 0; k < K; ++k) p[k] = Simd::fma(p[k], f[k], c1);
    } else {
      for (int k = 0; k < K; ++k) p[k] = Simd::fma(c5, f[k], c4);
      for (int k = 0; k < K; ++k) p[k] = Simd::fma(p[k], f[k], c3);
      for (int k = 0; k < K; ++k) p[k] = Simd::fma(p[k], f[k], c2);
      for (int k = 0; k < K; ++k) p[k] = Simd::fma(p[k], f[k], c1);
    }
    for (int k = 0; k < K; ++k) p[k] = Simd::mul(p[k], f[k]);
    for (int k = 0; k < K; ++k) t[k] = Simd::power(powers, t[k]);
    for (int k = 0; k < K; ++k) e[k] = Simd::fma(t[k], p[k], t[k]);
  }

  // Where u is kept; 0 elsewhere, where u is 0.
  vec operator()(mask kept, vec u) const {
    const vec us[1] = {u};
    vec e[1];
    (*this)(us, e);
    return Simd::keep(kept, e[0]);
  }
};

// The lines of two vectors.
template <class T>
void prefetch_pair(const T* x) {
  __builtin_prefetch(x);
  if (sizeof(T) == 4) __builtin_prefetch(x + W);
}

// The last elements of a row, fewer than one vector, padded with -inf, which counts for nothing.
template <class T>
struct Tail {
  T padded[W];
  Tail(const T* x, int64_t n) {
    for (T& p : padded) from_float(-INF, &p);
    memcpy(padded, x, static_cast<size_t>(n) * sizeof(T));
  }
};

template <class T>
bool has_nan(const T* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const float f = to_float(x[i]);
    if (f != f) return true;
  }
  return false;
}

// The sums of a row beside a larger maximum.
inline void rise(float to, double per_t, RowSums& r) {
  if (r.top > -INF) {
    const double d = static_cast<double>(to) - r.top, e = exp(-d * per_t);
    r.weighted = e > 0.0 ? e * (r.weighted + (1.0 + r.rest) * d) : 0.0;
    r.rest = (1.0 + r.rest) * e;
  }
  r.top = to + 0.0f;  // never -0: 0 beside it would look like a larger maximum
}

// Adds elements to the sums of a row, whatever their number: what holds a larger maximum than those before, and the end of a row.
// Takes -inf for nothing exactly.
template <class T>
__attribute__((noinline)) void add_slowly(const T* x, int64_t n, const Exp& exp_of, RowSums& r) {
  vec high = Simd::set(-INF);
  int64_t i = 0;
  for (; i + W <= n; i += W) high = Simd::max(Simd::load(x + i), high);
  const Tail<T> tail(x + i, n - i);
  const float top = Simd::reduce_max(Simd::max(Simd::load(tail.padded), high));  // without the NaN
  const bool raised = top > r.top;
  if (raised) {
    rise(top, exp_of.per_t, r);
    r.bad = r.bad || top == INF;
  } else if (r.top == -INF) {
    r.bad = r.bad || has_nan(x, n);
    return;
  }
  const vec m = Simd::set(r.top), low = Simd::set(exp_of.floor(r.top));
  int64_t maxima = 0;
  vec s = Simd::set(0.0f), w = s;
  auto step = [&](vec z) __attribute__((always_inline)) {
    mask kept = Simd::not_less(z, low);
    if (raised) {
      const mask is_top = Simd::equal(z, m);
      maxima += Simd::count(is_top);
      kept = Simd::and_not(kept, is_top);
    }
    const vec u = Simd::keep(kept, Simd::sub(m, z)), e = exp_of(kept, u);
    s = Simd::add(s, e);
    w = Simd::fma(e, u, w);
  };
  for (i = 0; i + W <= n; i += W) step(Simd::load(x + i));
  step(Simd::load(tail.padded));
  r.rest += Simd::sum(s) * exp_of.inverse + (raised ? static_cast<double>(maxima - 1) : 0.0);
  r.weighted += Simd::sum(w) * exp_of.inverse;
}

// Of a group, in float32: of e and of e u.
struct GroupSums {
  vec s, w;
  typename Simd::Met met;
};

// A group against the maximum m: good for nothing where `met` tells of a negative u, which is a larger maximum, or a NaN. Without `low`,
// nor where it tells of a u past the cut.
template <bool low, class T>
__attribute__((always_inline)) inline void sum_group(const T* x, vec m, const Exp& exp_of, GroupSums& g) {
  const vec zero = Simd::set(0.0f), cut = Simd::set(exp_of.cut);
  g.s = g.w = zero;
  for (int64_t j = 0; j < GROUP; j += LOCKSTEP * W) {
    vec u[LOCKSTEP], e[LOCKSTEP];
    for (int k = 0; k < LOCKSTEP; k += 2) {
      prefetch_pair(x + j + k * W + AHEAD);
      Simd::load_pair(x + j + k * W, u + k, u + k + 1);
    }
    for (int k = 0; k < LOCKSTEP; ++k) u[k] = Simd::sub(m, u[k]);
    for (int k = 0; k < LOCKSTEP; ++k) g.met(u[k]);
    if (low) {
      for (int k = 0; k < LOCKSTEP; ++k) u[k] = Simd::at_most(u[k], cut);
    }
    exp_of(u, e);
    for (int k = 0; k < LOCKSTEP; k += 2) g.s = Simd::add(g.s, Simd::add(e[k], e[k + 1]));
    for (int k = 0; k < LOCKSTEP; ++k) g.w = Simd::fma(e[k], u[k], g.w);
  }
}

// The sums of a row while it is walked: the last groups are still in float32.
struct Walk {
  RowSums row = NO_ELEMENTS;
  vec top = Simd::set(-INF), sum = Simd::set(0.0f), weighted = Simd::set(0.0f);
  int pending = 0;
  bool low = false;  // some u was past the cut

  void empty(const Exp& exp_of) {
    row.rest += Simd::sum(sum) * exp_of.inverse;
    row.weighted += Simd::sum(weighted) * exp_of.inverse;
    sum = weighted = Simd::set(0.0f);
    pending = 0;
  }

  bool can_sum(const Exp& exp_of) const { return row.top > -INF && exp_of.cold; }

  void take(vec s, vec w, const Exp& exp_of) {
    sum = Simd::add(sum, s);
    weighted = Simd::add(weighted, w);
    if (++pending == GROUPS) empty(exp_of);
  }

  // False where the group holds a larger maximum or a NaN.
  template <class T>
  __attribute__((always_inline)) bool try_group(const T* x, const Exp& exp_of) {
    GroupSums g;
    if (!low) {
      sum_group<false>(x, top, exp_of, g);
      if (g.met.negative()) return false;
      low = g.met.past(exp_of.cut);
    }
    if (low) {
      g.met = {};
      sum_group<true>(x, top, exp_of, g);
      if (g.met.negative()) return false;
    }
    take(g.s, g.w, exp_of);
    return true;
  }

  template <class T>
  void add_group(const T* x, const Exp& exp_of) {
    if (!can_sum(exp_of) || !try_group(x, exp_of)) add_slowly(x, GROUP, exp_of);
  }

  template <class T>
  void add_slowly(const T* x, int64_t n, const Exp& exp_of) {
    empty(exp_of);
    acpo::add_slowly(x, n, exp_of, row);
    top = Simd::set(row.top);
  }
};

template <class T>
void add_row(const T* x, int64_t n, const Exp& exp_of, RowSums& row) {
  const Exp e_of = exp_of;  // by value: its members stay in registers
  Walk walk;
  walk.row = row;
  walk.top = Simd::set(row.top);
  int64_t i = 0;
  for (; i + GROUP <= n; i += GROUP) walk.add_group(x + i, e_of);
  walk.add_slowly(x + i, n - i, e_of);
  row = walk.row;
}

}  // namespace
}  // namespace acpo
