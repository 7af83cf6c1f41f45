// One row, over the `Simd` that was included before: logits x_j, temperature T, maximum m, d_j = (x_j - m) / T,
//   rest    = sum of exp(d_j) over all j but ONE that holds the maximum       so that a confident row does not lose it
//   l       = log1p(rest)                 logp    = d_t - l                    beside 1
//   entropy = l - sum_j p_j d_j           p_j     = exp(d_j) / (1 + rest)
//   dlogits_j = (g_logp ([j = t] - p_j) + g_entropy p_j (l - d_j - entropy)) / T,   1 - p_t by expm1
// The row is walked once in blocks that stay in L1: the maximum of a block, then its sums against the running maximum,
// whose rare changes rescale the sums. Sums are float32, in 4 accumulators x lanes that are emptied after GROUP
// additions (equal terms all round the same way, and their errors add up); from there on sums are double.
//
// Compiled once per instruction set: internal linkage, and no inline function of the standard library (see floats.h).
#pragma once

#include <math.h>
#include <string.h>

#include "logprob_entropy.h"

namespace acpo {
namespace {

constexpr int64_t BLOCK = 4096;  // 16 KB of float32: two blocks fit a 48 KB L1
constexpr int64_t GROUP = 8;
constexpr double LOG2E = 1.4426950408889634;
constexpr float INF = __builtin_inff();
constexpr float MAX = 3.4028234663852886e38f;

using vec = Simd::vec;
using mask = Simd::mask;
constexpr int W = Simd::lanes;

// 2^64 exp(u / T) for u <= 0, as 2^n 2^f with n an integer and |f| <= 1/2. The factor 2^64 keeps exp(-131) and what lies
// above it normal numbers, at no cost: it is in the polynomial. Below it `cut` gives 0, exactly.
struct Exp {
  vec scale_n, first, second, magic, c0, c1, c2, c3, c4, c5, c6;
  float cut;       // the smallest u
  double inverse;  // of the factor

  explicit Exp(double temperature) {
    const double k = LOG2E / temperature;
    const bool cold = temperature < 1e6;  // past it u itself may be large, and 2^64 u would overflow
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
    // The minimax polynomial of degree 6 of 2^f: relative error 1.9e-9, 1.6e-8 with its coefficients in float32
    c0 = Simd::set(static_cast<float>(factor));
    c1 = Simd::set(static_cast<float>(0x1.62e430p-1 * factor));
    c2 = Simd::set(static_cast<float>(0x1.ebfbdap-3 * factor));
    c3 = Simd::set(static_cast<float>(0x1.c6aed2p-5 * factor));
    c4 = Simd::set(static_cast<float>(0x1.3b2dbep-7 * factor));
    c5 = Simd::set(static_cast<float>(0x1.5f464ep-10 * factor));
    c6 = Simd::set(static_cast<float>(0x1.41d294p-13 * factor));
  }

  // The smallest logit that counts beside the maximum `top`.
  float floor(float top) const {
    const float x = top + cut;
    return x > -MAX ? x : -MAX;
  }

  vec operator()(mask kept, vec u) const {
    const vec t = Simd::fma(u, scale_n, magic), n = Simd::sub(t, magic);
    vec f;
    if constexpr (Simd::has_fma) {
      f = Simd::fma(u, second, Simd::fms(u, first, n));
    } else {
      f = Simd::mul(Simd::sub(Simd::sub(u, Simd::mul(n, first)), Simd::mul(n, second)), scale_n);
    }
    vec p = Simd::fma(c6, f, c5);
    p = Simd::fma(p, f, c4);
    p = Simd::fma(p, f, c3);
    p = Simd::fma(p, f, c2);
    p = Simd::fma(p, f, c1);
    p = Simd::fma(p, f, c0);
    return Simd::keep_scale(kept, p, t, n);
  }
};

// The last elements of a row, fewer than one vector, padded with -inf, which counts for nothing.
template <class T>
struct Tail {
  T padded[W];
  Tail(const T* x, int64_t n) {
    for (T& p : padded) from_float(-INF, &p);
    memcpy(padded, x, static_cast<size_t>(n) * sizeof(T));
  }
};

// The maximum without the NaN.
template <class T>
float block_max(const T* x, int64_t n) {
  vec a = Simd::set(-INF), b = a, c = a, d = a;
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W) {
    vec z[4];
    Simd::load_pair(x + i, z, z + 1);
    Simd::load_pair(x + i + 2 * W, z + 2, z + 3);
    a = Simd::max(z[0], a);
    b = Simd::max(z[1], b);
    c = Simd::max(z[2], c);
    d = Simd::max(z[3], d);
  }
  for (; i + W <= n; i += W) a = Simd::max(Simd::load(x + i), a);
  if (i < n) b = Simd::max(Simd::load(Tail<T>(x + i, n - i).padded), b);
  return Simd::reduce_max(Simd::max(Simd::max(a, b), Simd::max(c, d)));
}

template <class T>
bool has_nan(const T* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const float f = to_float(x[i]);
    if (f != f) return true;
  }
  return false;
}

struct Sums {
  double rest, weighted;  // sum of e, and of e (m - x) >= 0
  int64_t maxima;         // with WITHOUT_TOP: how many elements hold the maximum; they are not in the sums
};

template <class T, bool WITHOUT_TOP>
Sums block_sums(const T* x, int64_t n, float top, const Exp& exp_of) {
  const Exp e_of = exp_of;  // by value: its members stay in registers
  const vec m = Simd::set(top), low = Simd::set(e_of.floor(top));
  double sum = 0.0, weighted = 0.0;
  int64_t maxima = 0;
  auto step = [&](vec z, vec& s, vec& w) __attribute__((always_inline)) {
    mask kept = Simd::not_less(z, low);
    if constexpr (WITHOUT_TOP) {
      const mask is_top = Simd::equal(z, m);
      maxima += Simd::count(is_top);
      kept = Simd::and_not(kept, is_top);
    }
    const vec u = Simd::keep(kept, Simd::sub(z, m));
    const vec e = e_of(kept, u);
    s = Simd::add(s, e);
    w = Simd::fma(e, u, w);
  };
  int64_t i = 0;
  while (i < n) {
    vec s[4], w[4];
    for (int k = 0; k < 4; ++k) s[k] = w[k] = Simd::set(0.0f);
    const int64_t end = i + GROUP * 4 * W < n ? i + GROUP * 4 * W : n;
    for (; i + 4 * W <= end; i += 4 * W) {
      for (int k = 0; k < 4; k += 2) {
        // The next block, while the arithmetic of this one runs
        __builtin_prefetch(x + i + k * W + BLOCK);
        if (sizeof(T) == 4) __builtin_prefetch(x + i + (k + 1) * W + BLOCK);
        vec z[2];
        Simd::load_pair(x + i + k * W, z, z + 1);
        step(z[0], s[k], w[k]);
        step(z[1], s[k + 1], w[k + 1]);
      }
    }
    for (; i + W <= end; i += W) step(Simd::load(x + i), s[0], w[0]);
    if (i < end) {
      step(Simd::load(Tail<T>(x + i, end - i).padded), s[1], w[1]);
      i = end;
    }
    sum += Simd::reduce_add(Simd::add(Simd::add(s[0], s[1]), Simd::add(s[2], s[3])));
    weighted -= Simd::reduce_add(Simd::add(Simd::add(w[0], w[1]), Simd::add(w[2], w[3])));
  }
  return {sum * e_of.inverse, weighted * e_of.inverse, maxima};
}

template <class T>
void forward_row(const void* logits, int64_t vocab, int64_t target, double temperature, float* logp, float* entropy, float* maximum,
                 float* logsumexp) {
  const T* x = static_cast<const T*>(logits);
  const Exp exp_of(temperature);
  const double per_t = 1.0 / temperature;
  float top = -INF;
  double rest = 0.0, weighted = 0.0;
  bool bad = false;
  for (int64_t begin = 0; begin < vocab && !bad; begin += BLOCK) {
    const int64_t n = vocab - begin < BLOCK ? vocab - begin : BLOCK;
    const float high = block_max(x + begin, n);
    if (high > top) {
      if (top > -INF) {
        const double d = (static_cast<double>(high) - top), e = exp(-d * per_t);
        weighted = e > 0.0 ? e * (weighted + (1.0 + rest) * d) : 0.0;
        rest = (1.0 + rest) * e;
      }
      top = high;
      bad = top == INF;
      const Sums sums = block_sums<T, true>(x + begin, n, top, exp_of);
      rest += sums.rest + static_cast<double>(sums.maxima - 1);
      weighted += sums.weighted;
    } else if (top == -INF) {
      bad = has_nan(x + begin, n);
    } else {
      const Sums sums = block_sums<T, false>(x + begin, n, top, exp_of);
      rest += sums.rest;
      weighted += sums.weighted;
    }
  }
  if (bad || top == -INF || rest != rest) {
    *logp = *entropy = *maximum = *logsumexp = __builtin_nanf("");
    return;
  }
  const double l = log1p(rest);
  *logp = static_cast<float>((static_cast<double>(to_float(x[target])) - top) * per_t - l);
  *entropy = static_cast<float>(l + weighted * per_t / (1.0 + rest));
  *maximum = top;
  *logsumexp = static_cast<float>(l);
}

template <class T>
void backward_row(const void* logits, int64_t vocab, int64_t target, double temperature, const RowGradient& g, void* out) {
  const T* x = static_cast<const T*>(logits);
  T* grad = static_cast<T*>(out);
  if (g.logsumexp != g.logsumexp) {
    for (int64_t i = 0; i < vocab; ++i) from_float(__builtin_nanf(""), grad + i);
    return;
  }
  const Exp exp_of(temperature);
  const double per_t = 1.0 / temperature, p_top = exp(-g.logsumexp), x_t = to_float(x[target]);
  const float top = static_cast<float>(g.maximum);
  // dlogits_j = e_j (a + b u_j), u_j = x_j - m
  const vec a = Simd::set(static_cast<float>(per_t * p_top * (g.grad_entropy * (g.logsumexp - g.entropy) - g.grad_logp)));
  const vec b = Simd::set(static_cast<float>(-per_t * per_t * p_top * g.grad_entropy));
  const vec m = Simd::set(top), low = Simd::set(exp_of.floor(top)), inverse = Simd::set(static_cast<float>(exp_of.inverse));
  auto step = [&](vec z) __attribute__((always_inline)) {
    const mask kept = Simd::not_less(z, low);
    const vec u = Simd::keep(kept, Simd::sub(z, m));
    return Simd::mul(Simd::mul(Simd::fma(b, u, a), inverse), exp_of(kept, u));
  };
  int64_t i = 0;
  for (; i + W <= vocab; i += W) Simd::store(grad + i, step(Simd::load(x + i)));
  if (i < vocab) {
    Tail<T> tail(x + i, vocab - i);
    Simd::store(tail.padded, step(Simd::load(tail.padded)));
    memcpy(grad + i, tail.padded, static_cast<size_t>(vocab - i) * sizeof(T));
  }
  const double d = (x_t - top) * per_t, p = exp(d - g.logsumexp);
  double at_target = -g.grad_logp * expm1(d - g.logsumexp);
  if (p > 0.0) at_target += g.grad_entropy * p * (g.logsumexp - d - g.entropy);
  from_float(static_cast<float>(at_target * per_t), grad + target);
}

constexpr RowKernels row_kernels = {{forward_row<float>, forward_row<bf16>, forward_row<fp16>},
                                    {backward_row<float>, backward_row<bf16>, backward_row<fp16>}};

}  // namespace
}  // namespace acpo
