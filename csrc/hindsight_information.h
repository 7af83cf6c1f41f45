// Two streams of logits of the same tokens: log-probs, entropy and both divergences. The contract is
// acpo_kernels/hindsight_information.py.
#pragma once

#include "logprob_entropy.h"

namespace acpo {

// The results, float32 [N] (float64 [N] for float64 logits). Rows that do not count hold 0.
struct HindsightResults {
  void *logp, *hindsight_logp, *entropy, *log_ratio, *kl, *information;
};

// ids, mask and temperatures are those of `policy`; `hindsight` gives its logits and their layout alone.
// Returns -1, or, having written nothing, the first row that counts and whose id is outside [0, V).
int64_t hindsight_information(const LogitRows& policy, const LogitRows& hindsight, const HindsightResults& out, int threads);

// Both streams of a row, p of policy and q of hindsight.
struct PairSums {
  RowSums p, q;
  double kl, information;  // sum of e_p h(D), and of e_q h(-D): see hindsight_information_row.h
  double centre;           // D_j = ((y_j - m_q) - (x_j - m_p)) / T - centre
  bool only_p, only_q;     // some column is possible under this one alone
};

// One row, compiled once for each instruction set. Indexed by Dtype.
using ScanPair = void (*)(const void* x, const void* y, int64_t vocab, double temperature, PairSums* sums);
struct PairKernels {
  ScanPair scan[3];
};
extern const PairKernels hindsight_information_baseline, hindsight_information_avx2, hindsight_information_avx512;

// sum of e_p h(D) after the maxima rose by rise_p T and rise_q T and the centre went to `to`; the masses are sums of e_p and e_q before.
// With the streams changed over and the centres negated: the other divergence.
double moved_divergence(double sum, double mass_p, double mass_q, double rise_p, double rise_q, double centre, double to);

}  // namespace acpo
