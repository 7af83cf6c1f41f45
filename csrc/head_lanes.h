// The softmax of panels of logits [v][32], a lane a row, over the `Simd` that was included before. The equations are those of
// logprob_entropy_row.h, and so is the polynomial; here each lane has its own maximum, temperature and sums. Sums are float32
// over GROUP vocabulary entries in 4 accumulators, and double from there on.
#pragma once

#include <math.h>

#include "head_tile.h"

namespace acpo {
namespace {

constexpr int64_t GROUP = 32;
constexpr float INF = __builtin_inff();
constexpr float MAX = 3.4028234663852886e38f;
constexpr double LN2 = 0.6931471805599453;

// 2^64 exp(u / T) where u = z - top is kept, 0 elsewhere; `x` becomes u log2(e) / T.
struct LaneExp {
  vec log2e, first, second;

  LaneExp(const LaneScales& s, int64_t lane)
      : log2e(Simd::load(s.log2e + lane)), first(Simd::load(s.first + lane)), second(Simd::load(s.second + lane)) {}

  explicit LaneExp(double temperature) {
    LaneScales s;
    set_scale(temperature, Simd::has_fma, 0, &s);
    log2e = Simd::set(s.log2e[0]);
    first = Simd::set(s.first[0]);
    second = Simd::set(s.second[0]);
  }

  __attribute__((always_inline)) vec operator()(mask kept, vec u, vec* x) const {
    const vec magic = Simd::set(0x1.8p23f + 64.0f);  // adding it rounds to an integer; 64 more in the exponent
    const vec t = Simd::fma(u, log2e, magic), n = Simd::sub(t, magic);
    vec f;
    if constexpr (Simd::has_fma) {
      f = Simd::fma(u, second, Simd::fms(u, log2e, n));
    } else {
      f = Simd::mul(Simd::sub(Simd::sub(u, Simd::mul(n, first)), Simd::mul(n, second)), log2e);
    }
    *x = Simd::add(n, f);
    vec p = Simd::fma(Simd::set(0x1.41d294p-13f), f, Simd::set(0x1.5f464ep-10f));
    p = Simd::fma(p, f, Simd::set(0x1.3b2dbep-7f));
    p = Simd::fma(p, f, Simd::set(0x1.c6aed2p-5f));
    p = Simd::fma(p, f, Simd::set(0x1.ebfbdap-3f));
    p = Simd::fma(p, f, Simd::set(0x1.62e430p-1f));
    p = Simd::fma(p, f, Simd::set(1.0f));
    return Simd::keep_scale(kept, p, t, Simd::add(n, Simd::set(64.0f)));
  }
};

// The smallest logit that counts beside `top`.
inline vec lane_floor(vec top, vec cut) { return Simd::max(Simd::add(top, cut), Simd::set(-MAX)); }

template <bool WITHOUT_TOP>
void lane_sums(const float* z, int64_t rows, int64_t lane, const LaneScales& scales, const float* excluded, Lanes* state) {
  const LaneExp exp_of(scales, lane);
  const vec top = Simd::load(state->top + lane), low = lane_floor(top, Simd::load(scales.cut + lane));
  const vec out = Simd::load(excluded), one = Simd::set(1.0f);
  vec maxima = Simd::set(0.0f);
  for (int64_t begin = 0; begin < rows; begin += GROUP) {
    const int64_t end = begin + GROUP < rows ? begin + GROUP : rows;
    vec s[4], w[4];
    for (int k = 0; k < 4; ++k) s[k] = w[k] = Simd::set(0.0f);
    auto step = [&](int64_t v, int k) __attribute__((always_inline)) {
      const vec y = Simd::load(z + v * PANEL + lane);
      mask kept = Simd::not_less(y, low);
      if constexpr (WITHOUT_TOP) {
        const mask is_top = Simd::equal(y, out);
        maxima = Simd::add(maxima, Simd::keep(is_top, one));
        kept = Simd::and_not(kept, is_top);
      }
      vec x;
      const vec e = exp_of(kept, Simd::keep(kept, Simd::sub(y, top)), &x);
      s[k] = Simd::add(s[k], e);
      w[k] = Simd::fma(e, x, w[k]);
    };
    int64_t v = begin;
    for (; v + 4 <= end; v += 4)
      for (int k = 0; k < 4; ++k) step(v + k, k);
    for (; v < end; ++v) step(v, 0);
    float sum[LANES], weighted[LANES];
    Simd::store(sum, Simd::add(Simd::add(s[0], s[1]), Simd::add(s[2], s[3])));
    Simd::store(weighted, Simd::add(Simd::add(w[0], w[1]), Simd::add(w[2], w[3])));
    for (int i = 0; i < LANES; ++i) {
      state->rest[lane + i] += static_cast<double>(sum[i]) * 0x1p-64;
      state->weighted[lane + i] -= static_cast<double>(weighted[i]) * (0x1p-64 * LN2);
    }
  }
  if constexpr (WITHOUT_TOP) {
    float count[LANES];
    Simd::store(count, maxima);
    for (int i = 0; i < LANES; ++i) {
      if (excluded[i] == excluded[i]) state->rest[lane + i] += static_cast<double>(count[i]) - 1.0;
    }
  }
}

void statistics_of(const float* z, int64_t rows, int64_t lanes, const LaneScales& scales, Lanes* state) {
  for (int64_t lane = 0; lane < lanes; lane += LANES) {
    vec best[4];
    for (vec& b : best) b = Simd::set(-INF);
    int64_t v = 0;
    for (; v + 4 <= rows; v += 4)
      for (int k = 0; k < 4; ++k) best[k] = Simd::max(Simd::load(z + (v + k) * PANEL + lane), best[k]);
    for (; v < rows; ++v) best[0] = Simd::max(Simd::load(z + v * PANEL + lane), best[0]);
    alignas(64) float high[LANES], excluded[LANES];
    Simd::store(high, Simd::max(Simd::max(best[0], best[1]), Simd::max(best[2], best[3])));
    bool raised = false;
    for (int i = 0; i < LANES; ++i) {
      float& top = state->top[lane + i];
      excluded[i] = __builtin_nanf("");
      if (!(high[i] > top)) continue;
      double &rest = state->rest[lane + i], &weighted = state->weighted[lane + i];
      if (top > -INF) {
        const double d = (static_cast<double>(high[i]) - top) * scales.inverse[lane + i], e = exp(-d);
        weighted = e > 0.0 ? e * (weighted + (1.0 + rest) * d) : 0.0;
        rest = (1.0 + rest) * e;
      }
      top = excluded[i] = high[i];
      raised = true;
    }
    // The element that raised the maximum is left out of the sums, in the block that holds it.
    if (raised) {
      lane_sums<true>(z, rows, lane, scales, excluded, state);
    } else {
      lane_sums<false>(z, rows, lane, scales, excluded, state);
    }
  }
}

void gradient_of(float* z, int64_t rows, int64_t lanes, const LaneScales& scales, const LaneGradient& g, float softcap) {
  const vec one = Simd::set(1.0f), per_cap = Simd::set(softcap > 0.0f ? 1.0f / softcap : 0.0f), unit = Simd::set(0x1p-64f);
  for (int64_t lane = 0; lane < lanes; lane += LANES) {
    const LaneExp exp_of(scales, lane);
    const vec top = Simd::load(g.top + lane), low = lane_floor(top, Simd::load(scales.cut + lane));
    const vec a = Simd::load(g.a + lane), b = Simd::load(g.b + lane);
    for (int64_t v = 0; v < rows; ++v) {
      float* at = z + v * PANEL + lane;
      const vec y = Simd::load(at);
      const mask kept = Simd::not_less(y, low);
      vec x;
      const vec e = Simd::mul(exp_of(kept, Simd::keep(kept, Simd::sub(y, top)), &x), unit);
      vec out = Simd::mul(Simd::fma(b, x, a), e);
      if (softcap > 0.0f) {
        const vec r = Simd::mul(y, per_cap);
        out = Simd::mul(out, Simd::sub(one, Simd::mul(r, r)));
      }
      Simd::store(at, out);
    }
  }
}

// Near x = 0 the three summands come from (exp(-x) - 1 + x) / x^2 = even(x^2) - x odd(x^2), to 2e-9 up to 1/2: they keep their
// relative accuracy where the streams nearly agree.
void divergence_of(const float* p, const float* q, int64_t rows, int64_t lanes, const LaneScales& scales, Divergence* out) {
  const vec half = Simd::set(0.5f), unit = Simd::set(0x1p-64f), one = Simd::set(1.0f), zero = Simd::set(0.0f), lowest = Simd::set(-MAX);
  for (int64_t lane = 0; lane < lanes; lane += LANES) {
    const LaneExp exp_of(scales, lane);
    const vec top_p = Simd::load(out->top_p + lane), top_q = Simd::load(out->top_q + lane), cut = Simd::load(scales.cut + lane);
    const vec low_p = lane_floor(top_p, cut), low_q = lane_floor(top_q, cut), between = Simd::sub(top_p, top_q);
    float per_t[LANES];
    for (int i = 0; i < LANES; ++i) per_t[i] = static_cast<float>(scales.inverse[lane + i]);
    const vec inverse = Simd::load(per_t);
    vec only_p = Simd::load(out->only_p + lane), only_q = Simd::load(out->only_q + lane);
    for (int64_t begin = 0; begin < rows; begin += GROUP) {
      const int64_t end = begin + GROUP < rows ? begin + GROUP : rows;
      vec forward = zero, backward = zero, moved = zero;
      for (int64_t v = begin; v < end; ++v) {
        const vec y = Simd::load(p + v * PANEL + lane), z = Simd::load(q + v * PANEL + lane);
        const mask in_p = Simd::not_less(y, lowest), in_q = Simd::not_less(z, lowest);
        const mask both = Simd::and_not(in_p, Simd::and_not(in_p, in_q));
        only_p = Simd::add(only_p, Simd::keep(Simd::and_not(in_p, in_q), one));
        only_q = Simd::add(only_q, Simd::keep(Simd::and_not(in_q, in_p), one));
        const mask kept_p = Simd::not_less(y, low_p), kept_q = Simd::not_less(z, low_q);
        vec unused;
        const vec a = Simd::mul(exp_of(kept_p, Simd::keep(kept_p, Simd::sub(y, top_p)), &unused), unit);
        const vec b = Simd::mul(exp_of(kept_q, Simd::keep(kept_q, Simd::sub(z, top_q)), &unused), unit);
        const vec x = Simd::keep(both, Simd::mul(Simd::sub(Simd::sub(y, z), between), inverse)), s = Simd::mul(x, x);
        vec even = Simd::fma(Simd::set(1.0f / 40320), s, Simd::set(1.0f / 720)), odd = Simd::fma(Simd::set(1.0f / 362880), s, Simd::set(1.0f / 5040));
        even = Simd::fma(Simd::fma(even, s, Simd::set(1.0f / 24)), s, half);
        odd = Simd::mul(Simd::fma(Simd::fma(odd, s, Simd::set(1.0f / 120)), s, Simd::set(1.0f / 6)), x);
        const vec ax = Simd::mul(a, x), bx = Simd::mul(b, x), difference = Simd::sub(b, a);
        const vec near_forward = Simd::mul(Simd::mul(ax, x), Simd::sub(even, odd)), near_backward = Simd::mul(Simd::mul(bx, x), Simd::add(even, odd));
        const mask far = Simd::not_less(s, Simd::set(0.25f));  // NaN is far
        if (Simd::count(far) == 0) {  // streams that nearly agree
          forward = Simd::add(forward, near_forward);
          backward = Simd::add(backward, near_backward);
          moved = Simd::add(moved, Simd::sub(near_forward, ax));
          continue;
        }
        auto choose = [&](vec there, vec here) __attribute__((always_inline)) {
          return Simd::add(Simd::keep(far, there), Simd::keep(Simd::and_not(Simd::equal(zero, zero), far), here));
        };
        forward = Simd::add(forward, choose(Simd::add(difference, ax), near_forward));
        backward = Simd::sub(backward, choose(Simd::add(difference, bx), Simd::sub(zero, near_backward)));
        moved = Simd::add(moved, choose(difference, Simd::sub(near_forward, ax)));
      }
      float sums[3][LANES];
      Simd::store(sums[0], forward);
      Simd::store(sums[1], backward);
      Simd::store(sums[2], moved);
      for (int i = 0; i < LANES; ++i) {
        out->forward[lane + i] += static_cast<double>(sums[0][i]);
        out->backward[lane + i] += static_cast<double>(sums[1][i]);
        out->moved[lane + i] += static_cast<double>(sums[2][i]);
      }
    }
    Simd::store(out->only_p + lane, only_p);
    Simd::store(out->only_q + lane, only_q);
  }
}

// tanh: below 0.625 the polynomial of Cephes' tanhf, above it (1 - e) / (1 + e) with e = exp(-2 |x|).
__attribute__((always_inline)) inline vec tanh_of(vec x, const LaneExp& exp_of) {
  const vec zero = Simd::set(0.0f), one = Simd::set(1.0f);
  const vec size = Simd::max(Simd::sub(zero, x), x), s = Simd::mul(x, x);
  vec p = Simd::fma(Simd::set(-5.70498872745e-3f), s, Simd::set(2.06390887954e-2f));
  p = Simd::fma(p, s, Simd::set(-5.37397155531e-2f));
  p = Simd::fma(p, s, Simd::set(1.33314422036e-1f));
  p = Simd::fma(p, s, Simd::set(-3.33332819422e-1f));
  const vec near_zero = Simd::fma(Simd::mul(p, s), x, x);
  const mask all = Simd::equal(zero, zero), large = Simd::not_less(size, Simd::set(0.625f)), positive = Simd::not_less(x, zero);
  vec unused;
  const vec bounded = Simd::max(Simd::sub(zero, size), Simd::set(-20.0f));  // tanh is 1 in float32 from 9.1 on
  const vec e = Simd::mul(exp_of(all, bounded, &unused), Simd::set(0x1p-64f));
  const vec r = Simd::sub(one, e) / Simd::add(one, e);
  const vec far = Simd::sub(Simd::keep(Simd::and_not(large, Simd::and_not(all, positive)), r), Simd::keep(Simd::and_not(large, positive), r));
  const vec out = Simd::add(far, Simd::keep(Simd::and_not(all, large), near_zero));
  const mask known = Simd::equal(x, x);
  return Simd::add(Simd::keep(known, out), Simd::keep(Simd::and_not(all, known), x));
}

// z + bias, and then softcap tanh(z / softcap).
void finish_logits(float* z, int64_t rows, int64_t lanes, const float* bias, float softcap) {
  const LaneExp exp_of(0.5);
  const vec cap = Simd::set(softcap);
  for (int64_t v = 0; v < rows; ++v) {
    const vec add = Simd::set(bias == nullptr ? 0.0f : bias[v]);
    for (int64_t lane = 0; lane < lanes; lane += LANES) {
      float* at = z + v * PANEL + lane;
      vec y = Simd::load(at);
      if (bias != nullptr) y = Simd::add(y, add);
      if (softcap > 0.0f) y = Simd::mul(cap, tanh_of(y / cap, exp_of));
      Simd::store(at, y);
    }
  }
}

void bias_sums(const float* g, int64_t rows, int64_t lanes, float* sums) {
  for (int64_t v = 0; v < rows; ++v) {
    vec s = Simd::load(g + v * PANEL);
    for (int64_t lane = LANES; lane < lanes; lane += LANES) s = Simd::add(s, Simd::load(g + v * PANEL + lane));
    sums[v] += Simd::reduce_add(s);
  }
}

constexpr HeadKernels head_kernels = {Simd::has_fma,
                                      {pack_panels<float>, pack_panels<bf16>, pack_panels<fp16>},
                                      logits_product,
                                      hidden_product,
                                      weight_product,
                                      finish_logits,
                                      statistics_of,
                                      gradient_of,
                                      divergence_of,
                                      bias_sums,
                                      {round_all<float>, round_all<bf16>, round_all<fp16>},
                                      {leave_all<float>, leave_all<bf16>, leave_all<fp16>}};

}  // namespace
}  // namespace acpo
