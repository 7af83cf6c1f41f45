// Rows of hindsight_information, over the `Simd` that was included before: one reading of both streams, whose logits are x_j (policy p)
// and y_j (hindsight q), m_p and m_q their running maxima, e_p = exp((x - m_p) / T), e_q = exp((y - m_q) / T).
//
// A divergence is a sum of non-negative terms, so that near-equal streams keep their digits:
//   KL(p || q) = sum p h(d),   KL(q || p) = sum q h(-d),   h(s) = e^s - 1 - s >= 0,   d = log q - log p
// but d wants the two logsumexps, which one reading does not have yet. It is taken about a provisional `centre` c instead of the true
// difference l_q - l_p of the logsumexps. With D = d + k, k = (l_q - l_p) - c, sum p = sum q = 1 gives
//   sum p h(D) = KL(p || q) + h(k),   sum q h(-D) = KL(q || p) + h(-k)
// so the price of a centre that is off by k is h(k), about k^2 / 2, to be subtracted: nothing where k is small beside the d. The
// centre is set when a maximum rises (the tokens that hold the mass) BEFORE that group's terms are summed, and where k^2 exceeds the
// divergence so far; the sums then move with it, exactly, by the same algebra (moved_divergence).
//
// Where |D| < 1 a term is e D^2 (a(D^2) +- D b(D^2)), relative error 1.1e-7; elsewhere nothing much cancels, and it is left
// to four sums, with R = exp(-c):
//   sum e_p h(D) = R sum e_q - sum e_p - sum e_p D,   sum e_q h(-D) = sum e_p / R - sum e_q + sum e_q D
// The price of a pair of vectors: 2 x 15 for the sums of row_sums.h, and 21 for these: 51 instructions, 27.5 cycles.
//
// Everything is the mirror image of itself: streams that change places give the same bits with the divergences changed over.
#pragma once

#include "hindsight_information.h"
#include "row_sums.h"

namespace acpo {
namespace {

constexpr float NEAR = 1.0f;  // D^2 below which the series is used

// Of at most a group, in float32.
struct Terms {
  vec near_p, near_q, far_p, far_q, far_pd, far_qd;

  void clear() { near_p = near_q = far_p = far_q = far_pd = far_qd = Simd::set(0.0f); }

  void add(vec e_p, vec e_q, vec d, vec d2, mask far) {
    const vec a2 = Simd::fma(d2, Simd::set(0x1.a2c5e4p-16f), Simd::set(0x1.6c272cp-10f));
    const vec a = Simd::fma(d2, Simd::fma(d2, a2, Simd::set(0x1.555504p-5f)), Simd::set(0.5f));
    const vec b2 = Simd::fma(d2, Simd::set(0x1.aa419ep-13f), Simd::set(0x1.10fce8p-7f));
    const vec b = Simd::mul(d, Simd::fma(d2, b2, Simd::set(0x1.55557cp-3f)));
    near_p = Simd::fma_unless(far, Simd::mul(e_p, d2), Simd::add(a, b), near_p);
    near_q = Simd::fma_unless(far, Simd::mul(e_q, d2), Simd::sub(a, b), near_q);
    far_p = Simd::add_where(far, far_p, e_p);
    far_q = Simd::add_where(far, far_q, e_q);
    far_pd = Simd::fma_where(far, e_p, d, far_pd);
    far_qd = Simd::fma_where(far, e_q, d, far_qd);
  }

  vec kl(vec r) const { return Simd::add(Simd::sub(Simd::sub(Simd::mul(far_q, r), far_p), far_pd), near_p); }
  vec information(vec one_over_r) const { return Simd::add(Simd::add(Simd::sub(Simd::mul(far_p, one_over_r), far_q), far_qd), near_q); }
};

struct PairWalk {
  Walk p, q;
  double kl = 0.0, information = 0.0, centre = 0.0;  // a float32 number
  bool only_p = false, only_q = false;
  vec kl_sum = Simd::set(0.0f), information_sum = Simd::set(0.0f);
  int pending = 0;

  bool begun() const { return p.row.top > -INF && q.row.top > -INF; }

  static double mass(const Walk& w, const Exp& exp_of) { return 1.0 + w.row.rest + Simd::reduce_add(w.sum) * exp_of.inverse; }

  void empty(const Exp& exp_of) {
    kl += Simd::reduce_add(kl_sum) * exp_of.inverse;
    information += Simd::reduce_add(information_sum) * exp_of.inverse;
    kl_sum = information_sum = Simd::set(0.0f);
    pending = 0;
  }

  // To the maxima of now, from top_p and top_q; the masses are those before.
  void move(double mass_p, double mass_q, float top_p, float top_q, double to, const Exp& exp_of) {
    const double rise_p = (static_cast<double>(p.row.top) - top_p) * exp_of.per_t;
    const double rise_q = (static_cast<double>(q.row.top) - top_q) * exp_of.per_t;
    kl = moved_divergence(kl, mass_p, mass_q, rise_p, rise_q, centre, to);
    information = moved_divergence(information, mass_q, mass_p, rise_q, rise_p, -centre, -to);
    centre = to;
  }

  double true_centre(const Exp& exp_of) const { return static_cast<float>(log(mass(q, exp_of)) - log(mass(p, exp_of))); }

  // Any number of elements of streams that have begun; -inf is taken for nothing, exactly.
  template <class T>
  __attribute__((noinline)) void add_slowly(const T* x, const T* y, int64_t n, const Exp& exp_of) {
    const vec low_p = Simd::set(exp_of.floor(p.row.top)), low_q = Simd::set(exp_of.floor(q.row.top));
    const vec per_t = Simd::set(static_cast<float>(exp_of.per_t));
    const vec c = Simd::set(static_cast<float>(centre)), zero = Simd::set(0.0f), dead = Simd::set(-INF), lowest = Simd::set(-MAX);
    Terms terms;
    terms.clear();
    auto step = [&](vec x_p, vec x_q) __attribute__((always_inline)) {
      const mask dead_p = Simd::equal(x_p, dead), dead_q = Simd::equal(x_q, dead);
      only_p = only_p || Simd::count(Simd::and_not(dead_q, dead_p)) != 0;
      only_q = only_q || Simd::count(Simd::and_not(dead_p, dead_q)) != 0;
      const mask one_dead = Simd::either(dead_p, dead_q), kept_p = Simd::not_less(x_p, low_p), kept_q = Simd::not_less(x_q, low_q);
      const vec u = Simd::sub(x_p, p.top), v = Simd::sub(x_q, q.top);
      vec d = Simd::keep(Simd::and_not(Simd::equal(zero, zero), one_dead), Simd::fms(Simd::sub(v, u), per_t, c));
      d = Simd::at_least(d, lowest);  // finite logits may lie further apart than the largest number
      d = Simd::sub(zero, Simd::at_least(Simd::sub(zero, d), lowest));
      vec d2 = Simd::mul(d, d);
      const mask far = Simd::either(Simd::not_less(d2, Simd::set(NEAR)), one_dead);
      d2 = Simd::keep(Simd::and_not(Simd::equal(zero, zero), far), d2);
      terms.add(exp_of(kept_p, Simd::keep(kept_p, u)), exp_of(kept_q, Simd::keep(kept_q, v)), d, d2, far);
    };
    int64_t i = 0;
    for (; i + W <= n; i += W) step(Simd::load(x + i), Simd::load(y + i));
    if (i < n) step(Simd::load(Tail<T>(x + i, n - i).padded), Simd::load(Tail<T>(y + i, n - i).padded));
    const double r = exp(-centre);
    kl += Simd::reduce_add(terms.kl(Simd::set(static_cast<float>(r)))) * exp_of.inverse;
    information += Simd::reduce_add(terms.information(Simd::set(static_cast<float>(exp(centre))))) * exp_of.inverse;
  }

  // A group in which neither stream holds a new maximum.
  template <class T>
  __attribute__((always_inline)) void add_group(const T* x, const T* y, const Exp& exp_of) {
    const vec zero = Simd::set(0.0f), cut = Simd::set(exp_of.cut), m_p = p.top, m_q = q.top;
    const vec per_t = Simd::set(static_cast<float>(exp_of.per_t)), c = Simd::set(static_cast<float>(centre)), near = Simd::set(NEAR);
    vec s_p[2] = {zero, zero}, w_p[2] = {zero, zero}, s_q[2] = {zero, zero}, w_q[2] = {zero, zero};
    Terms terms;
    terms.clear();
    for (int64_t j = 0; j < GROUP; j += 2 * W) {
      vec u[4], e[4], d[2];  // two of p, two of q
      prefetch_pair(x + j + AHEAD);
      prefetch_pair(y + j + AHEAD);
      Simd::load_pair(x + j, u, u + 1);
      Simd::load_pair(y + j, u + 2, u + 3);
      for (int k = 0; k < 4; ++k) u[k] = Simd::sub(u[k], k < 2 ? m_p : m_q);
      for (int k = 0; k < 2; ++k) d[k] = Simd::fms(Simd::sub(u[k + 2], u[k]), per_t, c);
      for (int k = 0; k < 4; ++k) u[k] = Simd::at_least(u[k], cut);
      exp_of(u, e);
      for (int k = 0; k < 2; ++k) {
        s_p[k] = Simd::add(s_p[k], e[k]);
        s_q[k] = Simd::add(s_q[k], e[k + 2]);
        w_p[k] = Simd::fma(e[k], u[k], w_p[k]);
        w_q[k] = Simd::fma(e[k + 2], u[k + 2], w_q[k]);
      }
      for (int k = 0; k < 2; ++k) {
        const vec d2 = Simd::mul(d[k], d[k]);
        terms.add(e[k], e[k + 2], d[k], d2, Simd::not_less(d2, near));
      }
    }
    p.add_group(s_p, w_p, exp_of);
    q.add_group(s_q, w_q, exp_of);
    const vec of_kl = terms.kl(Simd::set(static_cast<float>(exp(-centre))));
    const vec of_information = terms.information(Simd::set(static_cast<float>(exp(centre))));
    const vec both = Simd::add(of_kl, of_information), none = Simd::sub(both, both);  // 0, or NaN where a term is not finite
    if (Simd::count(Simd::equal(none, none)) != W) {
      add_slowly(x, y, GROUP, exp_of);
      return;
    }
    kl_sum = Simd::add(kl_sum, of_kl);
    information_sum = Simd::add(information_sum, of_information);
    if (++pending == GROUPS) {
      empty(exp_of);
      const double to = true_centre(exp_of), k = to - centre;
      const double mass_p = mass(p, exp_of), mass_q = mass(q, exp_of);
      if (k * k * mass_p > kl || k * k * mass_q > information) move(mass_p, mass_q, p.row.top, q.row.top, to, exp_of);
    }
  }
};

template <class T>
void scan_pair(const void* policy, const void* hindsight, int64_t vocab, double temperature, PairSums* sums) {
  const T *x = static_cast<const T*>(policy), *y = static_cast<const T*>(hindsight);
  const Exp exp_of(temperature);
  PairWalk walk;
  for (int64_t i = 0; i < vocab; i += GROUP) {
    const bool whole = vocab - i >= GROUP;
    const bool p_keeps = whole && walk.p.keeps_maximum(x + i, exp_of), q_keeps = whole && walk.q.keeps_maximum(y + i, exp_of);
    const int64_t n = whole ? GROUP : vocab - i;
    if (p_keeps && q_keeps) {
      walk.add_group(x + i, y + i, exp_of);
      continue;
    }
    walk.empty(exp_of);
    const bool had_begun = walk.begun();
    const double mass_p = PairWalk::mass(walk.p, exp_of), mass_q = PairWalk::mass(walk.q, exp_of);
    const float top_p = walk.p.row.top, top_q = walk.q.row.top;
    p_keeps ? walk.p.add_group(x + i, exp_of) : walk.p.add_slowly(x + i, n, exp_of);
    q_keeps ? walk.q.add_group(y + i, exp_of) : walk.q.add_slowly(y + i, n, exp_of);
    if (!walk.begun()) continue;
    const double to = walk.true_centre(exp_of);
    if (had_begun) {
      walk.move(mass_p, mass_q, top_p, top_q, to, exp_of);
      walk.add_slowly(x + i, y + i, n, exp_of);
    } else {  // one of the streams was -inf so far
      walk.centre = to;
      walk.add_slowly(x, y, i + n, exp_of);
    }
  }
  walk.p.empty(exp_of);
  walk.q.empty(exp_of);
  walk.empty(exp_of);
  *sums = {walk.p.row, walk.q.row, walk.kl, walk.information, walk.centre, walk.only_p, walk.only_q};
}

constexpr PairKernels kernels = {{scan_pair<float>, scan_pair<bf16>, scan_pair<fp16>}};

}  // namespace
}  // namespace acpo
