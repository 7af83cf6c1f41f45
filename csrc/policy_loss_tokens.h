// A block of tokens, over vectors of double as wide as POLICY_LOSS_BYTES says (the compiler's vector extension). Of token t:
//   d = clamp(logp - old), 0 where both are -inf, r = its own exp(d) or its group's ratio, c = min(exp(clamp(old - rollout)), cap)
//   l = -c min(r A, clip(r) A) + kl exp(d) k3(clamp(ref - logp)) - w H              k3(x) = exp(x) - 1 - x
//   dl/dlogp = -c r A [not clipped] + kl exp(d) (k3 - expm1(clamp(ref - logp)) [not clamped]),   dl/dH = -w
// all over the denominator. exp, expm1 and k3 come from one polynomial without cancellation.
//
// Compiled once per instruction set: internal linkage, and no inline function of the standard library (see floats.h).
#pragma once

#include <string.h>

#include "policy_loss.h"
#include "values_lanes.h"

namespace acpo {
namespace {

typedef double vec __attribute__((vector_size(POLICY_LOSS_BYTES)));
typedef int64_t mask __attribute__((vector_size(POLICY_LOSS_BYTES)));
typedef uint64_t word __attribute__((vector_size(POLICY_LOSS_BYTES)));
constexpr int W = POLICY_LOSS_BYTES / 8;

constexpr double LIMIT = 20.0;  // LOG_RATIO_LIMIT of acpo_kernels/reference.py
constexpr double INF = __builtin_inf();

inline vec set(double x) { return x - vec{}; }  // x - 0 is x, -0 included
inline vec load(const double* p) {
  vec x;
  memcpy(&x, p, sizeof x);
  return x;
}
inline void store(double* p, vec x) { memcpy(p, &x, sizeof x); }
inline mask load(const int64_t* p) {
  mask m;
  memcpy(&m, p, sizeof m);
  return m;
}
inline vec keep(mask m, vec x) { return reinterpret_cast<vec>(m & reinterpret_cast<mask>(x)); }  // 0 elsewhere
inline vec choose(mask m, vec a, vec b) { return m ? a : b; }
inline vec clamp(vec x, vec low, vec high) {  // a NaN stays
  x = choose(x < low, low, x);
  return choose(x > high, high, x);
}
inline vec limited(vec x) { return clamp(x, set(-LIMIT), set(LIMIT)); }
inline vec difference(vec a, vec b) { return choose(a == b, vec{}, a - b); }  // 0 of two that are -inf; a NaN stays
inline vec smaller(vec x, vec best) { return choose((x < best) | (x != x), x, best); }  // a NaN stays
inline vec larger(vec x, vec best) { return choose((x > best) | (x != x), x, best); }

inline double total(vec x) {
  double lanes[W], sum = 0.0;
  store(lanes, x);
  for (double lane : lanes) sum += lane;
  return sum;
}
inline int64_t total(mask m) {
  int64_t sum = 0;
  for (int i = 0; i < W; ++i) sum -= m[i];
  return sum;
}

// For |x| <= LIMIT: with x = n log 2 + f, n an integer and |f| <= log(2)/2, exp(x) = 2^n (1 + f + g) and g = f^2 q(f).
// Where n = 0, expm1(x) = f + g and exp(x) - 1 - x = g: nothing cancels.
struct Exp {
  vec exp, expm1, k3;
};
inline Exp exp_of(vec x) {
  const vec t = x * 0x1.71547652b82fep0 + 0x1.8p52, n = t - 0x1.8p52;             // 1.5 2^52 rounds to an integer
  const vec f = (x - n * 0x1.62e42feep-1) - n * 0x1.a39ef35793c76p-33;            // log 2 in two parts: the first times n is exact
  vec q = set(1.0 / 6227020800.0);                                                // q = sum f^k / (k+2)!, to 1e-17
  constexpr double terms[] = {1.0 / 479001600.0, 1.0 / 39916800.0, 1.0 / 3628800.0, 1.0 / 362880.0, 1.0 / 40320.0, 1.0 / 5040.0,
                              1.0 / 720.0,       1.0 / 120.0,      1.0 / 24.0,      1.0 / 6.0,      1.0 / 2.0};
  for (double term : terms) q = q * f + term;
  const vec g = f * f * q;
  const vec power = reinterpret_cast<vec>((reinterpret_cast<word>(t) + 1023) << 52);  // 2^n: n is in the low bits of t
  const vec e = (1.0 + (f + g)) * power;
  const mask small = n == 0.0;
  return {e, choose(small, f + g, e - 1.0), choose(small, g, (e - 1.0) - x)};
}

struct Block {
  alignas(64) int64_t kept[TOKENS];  // -1 where a token counts
  int64_t count, padded;

  Block(const PolicyLoss& of, int64_t begin, int64_t n) : count(n), padded((n + W - 1) / W * W) {
    if (of.mask == nullptr) {
      for (int64_t i = 0; i < n; ++i) kept[i] = -1;
    } else {
      for (int64_t i = 0; i < n; ++i) kept[i] = -static_cast<int64_t>(of.mask[begin + i] != 0);
    }
    for (int64_t i = n; i < padded; ++i) kept[i] = 0;
  }

  // Zeros where a token does not count.
  void load(const Values& values, int64_t begin, double* out) const {
    read_values(values, begin, count, out);
    for (int64_t i = count; i < padded; ++i) out[i] = 0.0;
    for (int64_t i = 0; i < padded; i += W) store(out + i, keep(acpo::load(kept + i), acpo::load(out + i)));
  }
};

inline void write(const double* x, int64_t begin, int64_t n, Dtype dtype, void* out) {
  if (dtype == Dtype::float64) {
    memcpy(static_cast<double*>(out) + begin, x, static_cast<size_t>(n) * sizeof(double));
  } else {
    float* to = static_cast<float*>(out) + begin;
    for (int64_t i = 0; i < n; ++i) to[i] = static_cast<float>(x[i]);
  }
}

template <bool GROUPED>
void block_loss(const PolicyLoss& of, int64_t begin, int64_t n, const double* group_ratio, const double* narrower, const double* denominator,
                void* grad_logp, void* grad_entropy, TokenSums* sums) {
  const Block block(of, begin, n);
  alignas(64) double logp[TOKENS], old[TOKENS], advantages[TOKENS], ref[TOKENS], rollout[TOKENS], entropy[TOKENS], weights[TOKENS],
      of_logp[TOKENS], of_entropy[TOKENS];
  block.load(of.logp, begin, logp);
  block.load(of.advantages, begin, advantages);
  if (of.old_logp) block.load(of.old_logp, begin, old);
  if (of.ref_logp) block.load(of.ref_logp, begin, ref);
  if (of.rollout_logp) block.load(of.rollout_logp, begin, rollout);
  if (of.entropy) block.load(of.entropy, begin, entropy);
  if (of.entropy_weights) block.load(of.entropy_weights, begin, weights);
  const bool weighted = of.entropy_weights || of.has_entropy_weight;

  const vec zero{};
  vec loss{}, ratio{}, squared{}, kl_old{}, kl_ref{}, entropies{}, smallest = set(INF), largest = set(-INF);
  mask tokens{}, below{}, above{};
  for (int64_t i = 0; i < block.padded; i += W) {
    const mask kept = load(block.kept + i);
    const vec lp = load(logp + i), a = load(advantages + i), before = of.old_logp ? load(old + i) : lp, over = load(denominator + i);
    const vec d = limited(difference(lp, before));
    const Exp own = exp_of(d);
    // exp(-d) - 1 + d, which for a small d is (d^2 - k3(d) + d k3(d)) / exp(d): nothing cancels
    const vec inverse = 1.0 / own.exp;
    const vec backwards = choose((d > -0.25) & (d < 0.25), (d * d - own.k3 + d * own.k3) * inverse, (inverse - 1.0) + d);
    vec r = own.exp, low = set(of.clip_low), high = set(of.clip_high);
    if constexpr (GROUPED) {
      r = load(group_ratio + i);
      const vec by = load(narrower + i);
      low = low / by;
      high = high / by;
    }
    const vec bounded = clamp(r, 1.0 - low, 1.0 + high) * a, free = r * a;
    const mask clipped = bounded < free;  // the minimum; on a border of the clip the gradient is whole, and a NaN stays
    vec surrogate = choose(clipped, bounded, free), grad = choose(clipped, zero, -free);
    if (of.rollout_logp) {
      const vec drift = exp_of(limited(difference(before, load(rollout + i)))).exp, cap = set(of.rollout_cap);
      const vec c = choose(drift > cap, cap, drift);
      surrogate = surrogate * c;
      grad = grad * c;
    }
    vec l = -surrogate;
    if (of.ref_logp) {
      const vec delta = difference(load(ref + i), lp);
      const Exp e = exp_of(limited(delta));
      const mask inside = (delta >= -LIMIT) & (delta <= LIMIT);
      const vec k3 = own.exp * e.k3;
      l = l + of.kl_weight * k3;
      grad = grad + of.kl_weight * (k3 - own.exp * keep(inside, e.expm1));
      kl_ref += keep(kept, k3);
    }
    if (of.entropy) {
      const vec h = load(entropy + i);
      vec minus_weight{};
      if (weighted) {
        minus_weight = zero - (of.entropy_weights ? load(weights + i) : set(of.entropy_weight));
        l = l + minus_weight * h;
      }
      store(of_entropy + i, keep(kept, minus_weight / over));
      entropies += h;
    }
    store(of_logp + i, keep(kept, grad / over));
    loss += keep(kept, l / over);
    tokens += kept;
    below += kept & (r < 1.0 - low) & (a < 0.0);
    above += kept & (r > 1.0 + high) & (a > 0.0);
    ratio += keep(kept, r);
    squared += keep(kept, r * r);
    kl_old += keep(kept, backwards);
    smallest = smaller(choose(kept, r, smallest), smallest);
    largest = larger(choose(kept, r, largest), largest);
  }
  if (grad_logp != nullptr) write(of_logp, begin, n, of.logp.dtype, grad_logp);
  if (grad_entropy != nullptr && of.entropy) write(of_entropy, begin, n, of.logp.dtype, grad_entropy);
  sums->tokens += total(tokens);
  sums->low += total(below);
  sums->high += total(above);
  sums->loss += total(loss);
  sums->ratio += total(ratio);
  sums->ratio_squared += total(squared);
  sums->kl_old += total(kl_old);
  sums->kl_ref += total(kl_ref);
  sums->entropy += total(entropies);
  for (int i = 0; i < W; ++i) {
    if (smallest[i] < sums->smallest || smallest[i] != smallest[i]) sums->smallest = smallest[i];
    if (largest[i] > sums->largest || largest[i] != largest[i]) sums->largest = largest[i];
  }
}

void tokens_loss(const PolicyLoss& of, int64_t begin, int64_t n, const double* ratio, const double* narrower, const double* denominator,
                 void* grad_logp, void* grad_entropy, TokenSums* sums) {
  (ratio == nullptr ? block_loss<false> : block_loss<true>)(of, begin, n, ratio, narrower, denominator, grad_logp, grad_entropy, sums);
}

double tokens_log_ratios(const PolicyLoss& of, int64_t begin, int64_t end, int64_t* count) {
  vec sum{};
  mask tokens{};
  for (; begin < end; begin += TOKENS) {
    const int64_t n = end - begin < TOKENS ? end - begin : TOKENS;
    const Block block(of, begin, n);
    alignas(64) double logp[TOKENS], old[TOKENS];
    block.load(of.logp, begin, logp);
    block.load(of.old_logp, begin, old);
    for (int64_t i = 0; i < block.padded; i += W) {
      sum += limited(difference(load(logp + i), load(old + i)));  // 0 where a token does not count
      tokens += load(block.kept + i);
    }
  }
  *count = total(tokens);
  return total(sum);
}

constexpr TokenKernels token_kernels = {tokens_loss, tokens_log_ratios};

}  // namespace
}  // namespace acpo
