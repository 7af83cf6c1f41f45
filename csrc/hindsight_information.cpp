#include "hindsight_information.h"

#include <cmath>
#include <limits>

#include "isa.h"
#include "threads.h"

namespace acpo {
namespace {

constexpr double INFINITE = std::numeric_limits<double>::infinity(), NOT_A_NUMBER = std::numeric_limits<double>::quiet_NaN();

const PairKernels& pair_kernels() { return ACPO_KERNELS(hindsight_information); }

struct PairResult {
  double logp, hindsight_logp, entropy, log_ratio, kl, information;
};

// For float64, whose tests compare with the definition: plain loops, once both logsumexps are known.
PairResult pair_f64(const double* x, const double* y, int64_t vocab, int64_t target, double temperature) {
  const RowResult p = row_f64(x, vocab, target, temperature), q = row_f64(y, vocab, target, temperature);
  if (p.maximum != p.maximum || q.maximum != q.maximum) return {p.logp, q.logp, p.entropy, NOT_A_NUMBER, NOT_A_NUMBER, NOT_A_NUMBER};
  double kl = 0.0, information = 0.0;
  bool only_p = false, only_q = false;
  for (int64_t j = 0; j < vocab; ++j) {
    const bool dead_p = x[j] == -INFINITE, dead_q = y[j] == -INFINITE;
    only_p = only_p || (dead_q && !dead_p);
    only_q = only_q || (dead_p && !dead_q);
    const double log_p = (x[j] - p.maximum) / temperature - p.logsumexp, log_q = (y[j] - q.maximum) / temperature - q.logsumexp;
    const double a = std::exp(log_p), b = std::exp(log_q), d = log_q - log_p;
    if (dead_p || dead_q) {
      kl += b;
      information += a;
    } else if (std::fabs(d) < 0.25) {
      kl += a * (std::expm1(d) - d);
      information += b * (std::expm1(-d) + d);
    } else {
      kl += (b - a) - a * d;
      information += (a - b) + b * d;
    }
  }
  kl = only_p ? INFINITE : kl < 0.0 ? 0.0 : kl;
  information = only_q ? INFINITE : information < 0.0 ? 0.0 : information;
  return {p.logp, q.logp, p.entropy, q.logp - p.logp, kl, information};
}

PairResult pair(const LogitRows& policy, const LogitRows& hindsight, int64_t r, const PairKernels& kernels) {
  const double temperature = temperature_of(policy, r);
  const void *x = begin_of(policy, r), *y = begin_of(hindsight, r);
  PairSums s{};
  kernels.scan[static_cast<int>(policy.dtype)](x, y, policy.vocab, temperature, &s);
  const double x_t = logit(policy, r, policy.ids[r]), y_t = logit(hindsight, r, policy.ids[r]);
  const RowResult p = finish_row(s.p, x_t, temperature), q = finish_row(s.q, y_t, temperature);
  PairResult result{p.logp, q.logp, p.entropy, NOT_A_NUMBER, NOT_A_NUMBER, NOT_A_NUMBER};
  if (p.maximum != p.maximum || q.maximum != q.maximum) return result;
  // From the logits: the difference of two log-probs near -10 that were rounded to float32 would have an error of 1e-6.
  result.log_ratio = ((y_t - q.maximum) - (x_t - p.maximum)) / temperature - (q.logsumexp - p.logsumexp);
  const double mass_p = 1.0 + s.p.rest, mass_q = 1.0 + s.q.rest, to = q.logsumexp - p.logsumexp;
  const double kl = moved_divergence(s.kl, mass_p, mass_q, 0.0, 0.0, s.centre, to) / mass_p;
  const double information = moved_divergence(s.information, mass_q, mass_p, 0.0, 0.0, -s.centre, -to) / mass_q;
  result.kl = s.only_p ? INFINITE : kl < 0.0 ? 0.0 : kl;
  result.information = s.only_q ? INFINITE : information < 0.0 ? 0.0 : information;
  return result;
}

}  // namespace

// With S = sum e_p D = R M_q - M_p - sum, R = exp(-centre), and D' = D - k afterwards:
//   sum' = R' M_q' - M_p' - sum e_p' (D - k) = fall (sum) + k M_p' + (R' M_q' - fall R M_q)
// whose bracket is (e^-k - 1) fall R M_q: for a small k that is where its digits are.
double moved_divergence(double sum, double mass_p, double mass_q, double rise_p, double rise_q, double centre, double to) {
  const double k = (rise_q - rise_p) + (to - centre), fall = std::exp(-rise_p);
  const double before = std::exp(-rise_p - centre) * mass_q;
  if (std::fabs(k) < 1.0) return fall * sum + (std::expm1(-k) + k) * (fall * mass_p) + std::expm1(-k) * (before - fall * mass_p);
  return fall * sum + k * (fall * mass_p) + (std::exp(-rise_q - to) * mass_q - before);
}

int64_t hindsight_information(const LogitRows& policy, const LogitRows& hindsight, const HindsightResults& out, int threads) {
  if (const int64_t bad = first_bad_id(policy); bad >= 0) return bad;
  const PairKernels& kernels = pair_kernels();
  parallel_for(policy.count, MIN_WORK / 2 / policy.vocab, threads, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      PairResult row{};
      if (counts(policy, r) && policy.dtype == Dtype::float64) {
        row = pair_f64(reinterpret_cast<const double*>(begin_of(policy, r)), reinterpret_cast<const double*>(begin_of(hindsight, r)),
                       policy.vocab, policy.ids[r], temperature_of(policy, r));
      } else if (counts(policy, r)) {
        row = pair(policy, hindsight, r, kernels);
      }
      set_value(out.logp, policy.dtype, r, row.logp);
      set_value(out.hindsight_logp, policy.dtype, r, row.hindsight_logp);
      set_value(out.entropy, policy.dtype, r, row.entropy);
      set_value(out.log_ratio, policy.dtype, r, row.log_ratio);
      set_value(out.kl, policy.dtype, r, row.kl);
      set_value(out.information, policy.dtype, r, row.information);
    }
  });
  return -1;
}

}  // namespace acpo
