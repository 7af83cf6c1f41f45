// Sums over a row of logits x_j, on which every operation here stands, over the `Simd` that was included before. With the running
// maximum m and the temperature T,
//   rest     = sum of exp((x_j - m) / T) over all j but ONE that holds the maximum    so that a confident row does not lose it
//   weighted = sum of exp((x_j - m) / T) (m - x_j) >= 0                               beside 1
// The row is walked once in groups of 32 vectors that stay in L1: is there a larger maximum, then the group's sums against
// the running one, whose rare changes rescale what was summed. Sums are float32 in 2 accumulators x lanes that are emptied
// after 16 additions, and their sums after 8 (equal terms all round the same way, and their errors add up); from there on
// sums are double.
//
// The price of a vector: 1 max, sub, max, 10 for the exponential (fma, sub, fms, fma; 5 fma; scale), add, fma: 15
// instructions on two 512-bit ports, 7.5 cycles, 8.1 at the clock of 512-bit arithmetic (0.93 of the scalar one, Sapphire
// Rapids at 4.15 GHz); 9.2 measured on a row in L2, 2.2 ns. bf16 adds a shift and an and for two vectors, twice.
// Reading 64 bytes takes a core 1.5 ns from L3 (39 MB) and 3.4 to 4 ns from DRAM (311 MB).
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

// 2^64 exp(u / T) for u <= 0, as 2^n 2^f with n an integer and |f| <= 1/2. The factor 2^64 keeps exp(-131) and what lies
// above it normal numbers, at no cost: it is in the polynomial. Below it `cut` gives 0, exactly.
struct Exp {
  vec scale_n, first, second, magic, c0, c1, c2, c3, c4, c5;
  float cut;       // the smallest u
  double inverse;  // of the factor
  double per_t;
  bool cold;

  explicit Exp(double temperature) {
    const double k = LOG2E / temperature;
    per_t = 1.0 / temperature;
    cold = temperature < 1e6;  // past it u itself may be large, and 2^64 u would overflow
    const double factor = cold ? 0x1p64 : 1.0;
    inverse = 1.0 / factor;
    cut = static_cast<float>((cold ? -188.0 : -125.0) / k);
    if (!(cut > -MAX)) cut = -MAX;
    const float rounded = static_cast<float>(k);
    scale_n = Simd::set(rounded);
    if constexpr (Simd::has_fma) {  // f = u k - n, with k in two parts
      first = scale_n;
      second = Simd::set(static_cast<float>(k - rounded));
    } else {  // f = (u - n / k) k, with 1 / k in two parts: the first has 16 bits, so that its product with n is exact
      const float part = as_float(as_bits(static_cast<float>(1.0 / k)) & 0xffffff00u);
      first = Simd::set(part);
      second = Simd::set(static_cast<float>(1.0 / k - part));
    }
    magic = Simd::set(0x1.8p23f);  // adding it rounds to an integer
    // The minimax polynomial of degree 5 of 2^f among those with c0 = 1: relative error 9.5e-8 with its coefficients in float32
    c0 = Simd::set(static_cast<float>(factor));
    c1 = Simd::set(static_cast<float>(0x1.62e42ap-1 * factor));
    c2 = Simd::set(static_cast<float>(0x1.ebf9bep-3 * factor));
    c3 = Simd::set(static_cast<float>(0x1.c6b70ap-5 * factor));
    c4 = Simd::set(static_cast<float>(0x1.3cea6ap-7 * factor));
    c5 = Simd::set(static_cast<float>(0x1.5bb9ccp-10 * factor));
  }

  // The smallest logit that counts beside the maximum `top`.
  float floor(float top) const {
    const float x = top + cut;
    return x > -MAX ? x : -MAX;
  }

  // K vectors in lockstep. One vector is a chain of 12 dependent instructions of 4 cycles; the scheduler (97 entries on Golden Cove)
  // does not reach far enough down the program to find the next chains behind it.
  template <int K>
  void parts(const vec (&u)[K], vec (&p)[K], vec (&t)[K], vec (&n)[K]) const {
    vec f[K];
    for (int k = 0; k < K; ++k) t[k] = Simd::fma(u[k], scale_n, magic);
    for (int k = 0; k < K; ++k) n[k] = Simd::sub(t[k], magic);
    if constexpr (Simd::has_fma) {
      for (int k = 0; k < K; ++k) f[k] = Simd::fms(u[k], first, n[k]);
      for (int k = 0; k < K; ++k) f[k] = Simd::fma(u[k], second, f[k]);
    } else {
      for (int k = 0; k < K; ++k) f[k] = Simd::mul(Simd::sub(Simd::sub(u[k], Simd::mul(n[k], first)), Simd::mul(n[k], second)), scale_n);
    }
    for (int k = 0; k < K; ++k) p[k] = Simd::fma(c5, f[k], c4);
    for (int k = 0; k < K; ++k) p[k] = Simd::fma(p[k], f[k], c3);
    for (int k = 0; k < K; ++k) p[k] = Simd::fma(p[k], f[k], c2);
    for (int k = 0; k < K; ++k) p[k] = Simd::fma(p[k], f[k], c1);
    for (int k = 0; k < K; ++k) p[k] = Simd::fma(p[k], f[k], c0);
  }

  template <int K>
  void operator()(const vec (&u)[K], vec (&e)[K]) const {
    vec p[K], t[K], n[K];
    parts(u, p, t, n);
    for (int k = 0; k < K; ++k) e[k] = Simd::scale(p[k], t[k], n[k]);
  }

  vec operator()(mask kept, vec u) const {
    const vec us[1] = {u};
    vec p[1], t[1], n[1];
    parts(us, p, t, n);
    return Simd::keep_scale(kept, p[0], t[0], n[0]);
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
    if (r.top > -INF) {
      const double d = static_cast<double>(top) - r.top, e = exp(-d * exp_of.per_t);
      r.weighted = e > 0.0 ? e * (r.weighted + (1.0 + r.rest) * d) : 0.0;
      r.rest = (1.0 + r.rest) * e;
    }
    r.top = top;
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
    const vec u = Simd::keep(kept, Simd::sub(z, m)), e = exp_of(kept, u);
    s = Simd::add(s, e);
    w = Simd::fma(e, u, w);
  };
  for (i = 0; i + W <= n; i += W) step(Simd::load(x + i));
  step(Simd::load(tail.padded));
  r.rest += Simd::reduce_add(s) * exp_of.inverse + (raised ? static_cast<double>(maxima - 1) : 0.0);
  r.weighted -= Simd::reduce_add(w) * exp_of.inverse;
}

// The sums of a row while it is walked: the last groups are still in float32.
struct Walk {
  RowSums row = NO_ELEMENTS;
  vec top = Simd::set(-INF), sum = Simd::set(0.0f), weighted = Simd::set(0.0f);
  int pending = 0;

  void empty(const Exp& exp_of) {
    row.rest += Simd::reduce_add(sum) * exp_of.inverse;
    row.weighted -= Simd::reduce_add(weighted) * exp_of.inverse;
    sum = weighted = Simd::set(0.0f);
    pending = 0;
  }

  // Whether a group can be summed against the maximum so far.
  template <class T>
  bool keeps_maximum(const T* x, const Exp& exp_of) const {
    vec high[LOCKSTEP];
    for (vec& h : high) h = top;
    for (int64_t j = 0; j < GROUP; j += LOCKSTEP * W) {
      vec z[LOCKSTEP];
      for (int k = 0; k < LOCKSTEP; k += 2) Simd::load_pair(x + j + k * W, z + k, z + k + 1);
      for (int k = 0; k < LOCKSTEP; ++k) high[k] = Simd::max(z[k], high[k]);
    }
    return !Simd::any_greater(Simd::max(Simd::max(high[0], high[1]), Simd::max(high[2], high[3])), top) && row.top > -INF && exp_of.cold;
  }

  void add_group(const vec (&s)[2], const vec (&w)[2], const Exp& exp_of) {
    sum = Simd::add(sum, Simd::add(s[0], s[1]));
    weighted = Simd::add(weighted, Simd::add(w[0], w[1]));
    if (++pending == GROUPS) empty(exp_of);
  }

  template <class T>
  void add_group(const T* x, const Exp& exp_of) {
    const vec zero = Simd::set(0.0f), cut = Simd::set(exp_of.cut), m = top;
    vec s[2] = {zero, zero}, w[2] = {zero, zero};
    for (int64_t j = 0; j < GROUP; j += LOCKSTEP * W) {
      vec u[LOCKSTEP], e[LOCKSTEP];
      for (int k = 0; k < LOCKSTEP; k += 2) {
        prefetch_pair(x + j + k * W + AHEAD);
        Simd::load_pair(x + j + k * W, u + k, u + k + 1);
      }
      for (int k = 0; k < LOCKSTEP; ++k) u[k] = Simd::at_least(Simd::sub(u[k], m), cut);
      exp_of(u, e);
      for (int k = 0; k < LOCKSTEP; ++k) s[k % 2] = Simd::add(s[k % 2], e[k]);
      for (int k = 0; k < LOCKSTEP; ++k) w[k % 2] = Simd::fma(e[k], u[k], w[k % 2]);
    }
    add_group(s, w, exp_of);
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
  for (; i + GROUP <= n; i += GROUP) {
    if (walk.keeps_maximum(x + i, e_of)) {
      walk.add_group(x + i, e_of);
    } else {
      walk.add_slowly(x + i, GROUP, e_of);
    }
  }
  walk.add_slowly(x + i, n - i, e_of);
  row = walk.row;
}

}  // namespace
}  // namespace acpo
