// Rows of hindsight_information, over the `Simd` that was included before: one reading of both streams, whose logits are x_j (policy p)
// and y_j (hindsight q), m_p and m_q their running maxima, u_j = m_p - x_j, v_j = m_q - y_j, e_p = exp(-u / T), e_q = exp(-v / T).
//
// A divergence is a sum of non-negative terms:
//   KL(p || q) = sum p h(d),   KL(q || p) = sum q h(-d),   h(s) = e^s - 1 - s >= 0,   d = log q - log p
// but d wants the two logsumexps, which one reading does not have yet. It is taken about a provisional `centre` c instead of the true
// difference l_q - l_p of the logsumexps. With D = d + k, k = (l_q - l_p) - c, sum p = sum q = 1 gives
//   sum p h(D) = KL(p || q) + h(k),   sum q h(-D) = KL(q || p) + h(-k)
// so the price of a centre that is off by k is h(k), about k^2 / 2, to be subtracted: nothing where k is small beside the d. The
// centre is set when a maximum rises (the tokens that hold the mass) BEFORE that group's terms are summed, and where k^2 exceeds the
// divergence so far; the sums then move with it, exactly, by the same algebra (moved_divergence).
//
// The terms are summed in one of two forms, block by block (a block: up to 8 groups whose maxima and centre are the same). With R = exp(-c),
// * plainly, from four sums, two of which the log-probs want anyway:
//     sum e_p h(D) = R sum e_q - sum e_p - sum e_p D,   sum e_q h(-D) = sum e_p / R - sum e_q + sum e_q D
// * carefully, term by term: e D^2 (a(D^2) +- D b(D^2)) where |D| < 1, relative error 1.1e-7; the plain form elsewhere.
// The plain form cancels. Each lane's sums over a block have a relative error of the exponential (1.1e-7 at most, e = 5e-8 in the root mean
// square) and of float32 sums. Where errors are independent, those of lanes A_i with the mass A = sum e_p + R sum e_q add up to
// e sqrt(sum A_i^2) <= e sqrt(max A_i x A). So a block may be summed plainly if afterwards, K being the divergence so far,
//   K - k^2 M >= A / 24 with A of all plain blocks so far,   and   K - k^2 M >= 2 A_i of each lane of this block.
// K - h(k) M is the least of sum e_p h(D) over all centres, a sum of non-negative terms: it never falls, so that at the end these blocks have
// added at most about e sqrt(24 / 2) = 1.7e-7 of it. Errors are not independent where the logits have few values or lie close together,
// which the exponential rounds alike (then the bound is 24 e). So besides
// * the blocks that were summed carefully were summed plainly too, and the two forms must agree to that same 1.7e-7 over all of them (Trust),
// * of a sample of the block's columns no more than a sixteenth lie within T / 32 of their neighbour, or of the one half a group before (crowded).
// What does not pass is summed again, carefully, from the L1 or L2. What a block would have been allowed is what the next one tries first.
//
// Memory: each logit is read once from DRAM or L3, and again from L1 or L2 (up to 2 x 16 KB) where its group has a new maximum or its
// block must be summed again. The price of a pair of vectors in the plain form, AVX-512: 2 x 13 for the sums of row_sums.h, 1 for the
// entropy, 4 for these.
//
// Everything is the mirror image of itself: streams that change places give the same bits with the divergences changed over.
#pragma once

#include "hindsight_information.h"
#include "row_sums.h"

namespace acpo {
namespace {

constexpr float NEAR = 1.0f;  // D^2 below which the series is used
constexpr double PLAIN = 1.0 / 24.0, AGREE = 1.7e-7;  // divergence over mass, difference over divergence
constexpr int CROWD = 16;                           // one neighbouring pair in so many may lie close together

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

// Of a group of both streams: sums of e_p, e_p u, e_q, e_p D T and e_q D T, and where it was summed carefully the divergences.
struct PairGroup {
  vec s_p, w_p, s_q, d_p, d_q, kl, information;
  typename Simd::Met met_p, met_q;

  bool raised() const { return met_p.negative() || met_q.negative(); }
  bool past(float cut) const { return met_p.past(cut) || met_q.past(cut); }
};

// How far the plain form was off where a block was summed in both.
struct Trust {
  double off = 0.0, sum = 0.0;

  void learn(double plain, double careful) {
    if (!(fabs(plain - careful) <= MAX)) return;
    off += plain - careful;
    sum += careful;
  }
  void scale(double by) { off *= by, sum *= by; }
  bool good() const { return sum > 0.0 && fabs(off) <= AGREE * sum; }
};

struct PairWalk {
  Walk p, q;
  double kl = 0.0, information = 0.0, centre = 0.0;
  double r = 1.0, one_over_r = 1.0;  // exp(-centre), exp(centre)
  float shift = 0.0f;                // centre T
  bool only_p = false, only_q = false;
  double plain_p = 0.0, plain_q = 0.0;  // masses that were summed plainly
  Trust of_kl, of_information;
  bool plain = false, low = false;  // how the next block is tried
  int groups = 0;                   // of this block
  vec mass_p = Simd::set(0.0f), mass_q = mass_p, d_p = mass_p, d_q = mass_p, kl_sum = mass_p, information_sum = mass_p;

  bool begun() const { return p.row.top > -INF && q.row.top > -INF; }

  static double mass(const Walk& w, const Exp& exp_of) { return 1.0 + w.row.rest + Simd::sum(w.sum) * exp_of.inverse; }

  void set_centre(float to, const Exp& exp_of) {
    shift = to;
    centre = to * exp_of.per_t;
    r = exp(-centre);
    one_over_r = exp(centre);
  }

  // To the maxima of now, from top_p and top_q; the masses are those before.
  void move(double mass_p, double mass_q, float top_p, float top_q, float to, const Exp& exp_of) {
    const double rise_p = (static_cast<double>(p.row.top) - top_p) * exp_of.per_t;
    const double rise_q = (static_cast<double>(q.row.top) - top_q) * exp_of.per_t;
    kl = moved_divergence(kl, mass_p, mass_q, rise_p, rise_q, centre, to * exp_of.per_t);
    information = moved_divergence(information, mass_q, mass_p, rise_q, rise_p, -centre, -(to * exp_of.per_t));
    plain_p *= exp(-rise_p);
    plain_q *= exp(-rise_q);
    of_kl.scale(exp(-rise_p));
    of_information.scale(exp(-rise_q));
    set_centre(to, exp_of);
  }

  // The true centre times T; at an infinite T both streams are uniform, and there is none.
  static float true_shift(double mass_p, double mass_q, const Exp& exp_of) {
    return exp_of.per_t == 0.0 ? 0.0f : static_cast<float>((log(mass_q) - log(mass_p)) / exp_of.per_t);
  }

  // Any number of elements of streams that have begun; -inf is taken for nothing, exactly.
  template <class T>
  __attribute__((noinline)) void add_slowly(const T* x, const T* y, int64_t n, const Exp& exp_of) {
    const vec low_p = Simd::set(exp_of.floor(p.row.top)), low_q = Simd::set(exp_of.floor(q.row.top));
    const vec per_t = Simd::set(static_cast<float>(exp_of.per_t));
    const vec c = Simd::set(shift), zero = Simd::set(0.0f), dead = Simd::set(-INF), lowest = Simd::set(-MAX);
    Terms terms;
    terms.clear();
    auto step = [&](vec x_p, vec x_q) __attribute__((always_inline)) {
      const mask dead_p = Simd::equal(x_p, dead), dead_q = Simd::equal(x_q, dead);
      only_p = only_p || Simd::count(Simd::and_not(dead_q, dead_p)) != 0;
      only_q = only_q || Simd::count(Simd::and_not(dead_p, dead_q)) != 0;
      const mask one_dead = Simd::either(dead_p, dead_q), kept_p = Simd::not_less(x_p, low_p), kept_q = Simd::not_less(x_q, low_q);
      const vec u = Simd::sub(p.top, x_p), v = Simd::sub(q.top, x_q);
      vec d = Simd::keep(Simd::and_not(Simd::equal(zero, zero), one_dead), Simd::mul(Simd::sub(Simd::sub(u, v), c), per_t));
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
    kl += Simd::sum(terms.kl(Simd::set(static_cast<float>(r)))) * exp_of.inverse;
    information += Simd::sum(terms.information(Simd::set(static_cast<float>(one_over_r)))) * exp_of.inverse;
  }

  template <bool plainly, bool below, class T>
  __attribute__((always_inline)) void sum_pair(const T* x, const T* y, const Exp& exp_of, PairGroup& g) {
    const vec zero = Simd::set(0.0f), cut = Simd::set(exp_of.cut), m_p = p.top, m_q = q.top;
    const vec per_t = Simd::set(static_cast<float>(exp_of.per_t)), c = Simd::set(shift), near = Simd::set(NEAR);
    g.s_p = g.w_p = g.s_q = g.d_p = g.d_q = zero;
    Terms terms;
    terms.clear();
    for (int64_t j = 0; j < GROUP; j += 2 * W) {
      vec u[4], e[4], d[2];  // two of p, two of q
      prefetch_pair(x + j + AHEAD);
      prefetch_pair(y + j + AHEAD);
      Simd::load_pair(x + j, u, u + 1);
      Simd::load_pair(y + j, u + 2, u + 3);
      for (int k = 0; k < 4; ++k) u[k] = Simd::sub(k < 2 ? m_p : m_q, u[k]);
      for (int k = 0; k < 4; ++k) k < 2 ? g.met_p(u[k]) : g.met_q(u[k]);
      for (int k = 0; k < 2; ++k) d[k] = Simd::sub(Simd::sub(u[k], u[k + 2]), c);
      if (below) {
        for (int k = 0; k < 4; ++k) u[k] = Simd::at_most(u[k], cut);
      }
      exp_of(u, e);
      g.s_p = Simd::add(g.s_p, Simd::add(e[0], e[1]));
      g.s_q = Simd::add(g.s_q, Simd::add(e[2], e[3]));
      for (int k = 0; k < 2; ++k) {
        g.w_p = Simd::fma(e[k], u[k], g.w_p);
        g.d_p = Simd::fma(e[k], d[k], g.d_p);
        g.d_q = Simd::fma(e[k + 2], d[k], g.d_q);
        if (!plainly) {
          const vec by_t = Simd::mul(d[k], per_t), d2 = Simd::mul(by_t, by_t);
          terms.add(e[k], e[k + 2], by_t, d2, Simd::not_less(d2, near));
        }
      }
    }
    if (plainly) return;
    g.kl = terms.kl(Simd::set(static_cast<float>(r)));
    g.information = terms.information(Simd::set(static_cast<float>(one_over_r)));
  }

  template <bool plainly, class T>
  __attribute__((always_inline)) bool try_group(const T* x, const T* y, const Exp& exp_of, PairGroup& g) {
    if (!low) {
      g.met_p = g.met_q = {};
      sum_pair<plainly, false>(x, y, exp_of, g);
      if (g.raised()) return false;
      if (!g.past(exp_of.cut)) return true;
      low = true;
    }
    g.met_p = g.met_q = {};
    sum_pair<plainly, true>(x, y, exp_of, g);
    return !g.raised();
  }

  static bool finite(const PairGroup& g) {
    const vec both = Simd::add(g.kl, g.information), none = Simd::sub(both, both);  // 0, or NaN where a term is not finite
    return Simd::count(Simd::equal(none, none)) == W;
  }

  // False, having done nothing, where a stream holds a new maximum or a NaN.
  template <class T>
  bool add_group(const T* x, const T* y, const Exp& exp_of) {
    PairGroup g;
    if (!(plain ? try_group<true>(x, y, exp_of, g) : try_group<false>(x, y, exp_of, g))) return false;
    p.take(g.s_p, g.w_p, exp_of);
    q.take(g.s_q, Simd::set(0.0f), exp_of);
    mass_p = Simd::add(mass_p, g.s_p);
    mass_q = Simd::add(mass_q, g.s_q);
    d_p = Simd::add(d_p, g.d_p);
    d_q = Simd::add(d_q, g.d_q);
    if (!plain && finite(g)) {
      kl_sum = Simd::add(kl_sum, g.kl);
      information_sum = Simd::add(information_sum, g.information);
    } else if (!plain) {
      add_slowly(x, y, GROUP, exp_of);
    }
    ++groups;
    return true;
  }

  // The divergences alone of a group without a larger maximum.
  template <class T>
  __attribute__((noinline)) void add_terms(const T* x, const T* y, const Exp& exp_of) {
    PairGroup g;
    if (!exp_of.cold || !try_group<false>(x, y, exp_of, g) || !finite(g)) return add_slowly(x, y, GROUP, exp_of);
    kl += Simd::sum(g.kl) * exp_of.inverse;
    information += Simd::sum(g.information) * exp_of.inverse;
  }

  // Ends a block, whose groups end before x and y.
  template <class T>
  __attribute__((noinline)) void close(const T* x, const T* y, const Exp& exp_of) {
    if (groups == 0) return;
    const double inverse = exp_of.inverse, d_scale = inverse * exp_of.per_t;
    const double block_p = Simd::sum(mass_p) * inverse, block_q = Simd::sum(mass_q) * inverse;
    const double plain_kl = (r * block_q - block_p) - Simd::sum(d_p) * d_scale;
    const double plain_information = (one_over_r * block_p - block_q) + Simd::sum(d_q) * d_scale;
    const double before_kl = kl, before_information = information;
    if (plain) {
      kl += plain_kl;
      information += plain_information;
    } else {
      const double careful_kl = Simd::sum(kl_sum) * inverse, careful_information = Simd::sum(information_sum) * inverse;
      kl += careful_kl;
      information += careful_information;
      of_kl.learn(plain_kl, careful_kl);
      of_information.learn(plain_information, careful_information);
    }
    const double all_p = mass(p, exp_of), all_q = mass(q, exp_of);
    const float to = true_shift(all_p, all_q, exp_of);
    const double k = to * exp_of.per_t - centre;
    const double here_p = plain_p + block_p, here_q = plain_q + block_q;
    const bool enough = of_kl.good() && is_enough(kl - k * k * all_p, here_p + r * here_q, mass_p, inverse) &&  //
                        of_information.good() && is_enough(information - k * k * all_q, here_q + one_over_r * here_p, mass_q, inverse) &&
                        !crowded(x - groups * GROUP, groups, exp_of.per_t) && !crowded(y - groups * GROUP, groups, exp_of.per_t);
    if (plain && enough) {
      plain_p = here_p;
      plain_q = here_q;
    } else if (plain) {
      kl = before_kl;
      information = before_information;
      for (int64_t back = groups * GROUP; back > 0; back -= GROUP) add_terms(x - back, y - back, exp_of);
    }
    plain = enough;
    groups = 0;
    mass_p = mass_q = d_p = d_q = kl_sum = information_sum = Simd::set(0.0f);
    if (k * k * all_p > kl || k * k * all_q > information) move(all_p, all_q, p.row.top, q.row.top, to, exp_of);
  }

  template <class T>
  static bool crowded(const T* x, int groups, double per_t) {
    const vec wide = Simd::set(static_cast<float>(1.0 / (32.0 * 32.0 * per_t * per_t)));
    int beside = 0, ahead = 0;
    vec a, b, before = Simd::set(INF);
    for (int64_t j = 0; j < groups * GROUP; j += GROUP / 2) {
      Simd::load_pair(x + j, &a, &b);
      const vec d = Simd::sub(a, b), d2 = Simd::sub(a, before);
      beside += Simd::count(Simd::not_less(wide, Simd::mul(d, d)));
      ahead += Simd::count(Simd::not_less(wide, Simd::mul(d2, d2)));
      before = a;
    }
    return std::max(beside, ahead) * CROWD > groups * 2 * W;
  }

  static bool is_enough(double divergence, double mass, vec lanes, double inverse) {
    return divergence >= PLAIN * mass && divergence >= 2.0 * inverse * Simd::reduce_max(lanes);
  }
};

template <class T>
void scan_pair(const void* policy, const void* hindsight, int64_t vocab, double temperature, PairSums* sums) {
  const T *x = static_cast<const T*>(policy), *y = static_cast<const T*>(hindsight);
  const Exp exp_of(temperature);
  PairWalk walk;
  for (int64_t i = 0; i < vocab; i += GROUP) {
    const bool whole = vocab - i >= GROUP;
    if (whole && walk.p.can_sum(exp_of) && walk.q.can_sum(exp_of) && walk.add_group(x + i, y + i, exp_of)) {
      if (walk.groups == GROUPS) walk.close(x + i + GROUP, y + i + GROUP, exp_of);
      continue;
    }
    walk.close(x + i, y + i, exp_of);
    const int64_t n = whole ? GROUP : vocab - i;
    const bool had_begun = walk.begun();
    const double mass_p = PairWalk::mass(walk.p, exp_of), mass_q = PairWalk::mass(walk.q, exp_of);
    const float top_p = walk.p.row.top, top_q = walk.q.row.top;
    whole ? walk.p.add_group(x + i, exp_of) : walk.p.add_slowly(x + i, n, exp_of);
    whole ? walk.q.add_group(y + i, exp_of) : walk.q.add_slowly(y + i, n, exp_of);
    if (!walk.begun()) continue;
    const float to = PairWalk::true_shift(PairWalk::mass(walk.p, exp_of), PairWalk::mass(walk.q, exp_of), exp_of);
    if (had_begun) {
      walk.move(mass_p, mass_q, top_p, top_q, to, exp_of);
      whole ? walk.add_terms(x + i, y + i, exp_of) : walk.add_slowly(x + i, y + i, n, exp_of);
    } else {  // one of the streams was -inf so far
      walk.set_centre(to, exp_of);
      walk.add_slowly(x, y, i + n, exp_of);
    }
  }
  walk.p.empty(exp_of);
  walk.q.empty(exp_of);
  walk.close(x + vocab, y + vocab, exp_of);
  *sums = {walk.p.row, walk.q.row, walk.kl, walk.information, walk.centre, walk.only_p, walk.only_q};
}

constexpr PairKernels kernels = {{scan_pair<float>, scan_pair<bf16>, scan_pair<fp16>}};

}  // namespace
}  // namespace acpo
