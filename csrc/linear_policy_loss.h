// From hidden states to the policy loss and its gradients: the contract is acpo_kernels/linear_policy_loss.py.
#pragma once

#include <cstdint>

#include "head.h"
#include "policy_loss.h"

namespace acpo {

// Gradients are for an incoming gradient of 1; those that are null are not computed.
struct LinearPolicyLossResults {
  float *loss, *metrics, *logp, *entropy;  // 0-d, [10], [N], [N]: of all zeros on entry
  void *hidden, *weight;                   // in the head's dtype: [N, H] of all zeros on entry, [V, H]
  float* bias;                             // [V]
};

// head.rows and head.count are not used: the rows are those that loss.mask does not leave out. loss.logp and loss.entropy are not used
// either. The work, in units of 2 V H for each row that takes part: 1 for the logits of an unmasked row, 2 for a row with a gradient, and 1
// more to compute its logits again where its gradient hangs on the rows behind it (`grouped`) and there are more than LOGITS_ROWS.
void linear_policy_loss(const Head& head, const PolicyLoss& loss, const LinearPolicyLossResults& out, int threads);

// Rows of logits that are held, float32: 155 MB at V = 151,936, whatever N is (for N <= 256 that is as large as the N x V logits). Each
// multiple of it costs another pass over weight and its gradient, which are 544 MB each at H = 896. Twice as many where rows without
// a gradient leave gaps, which are closed first.
constexpr int64_t LOGITS_ROWS = 256;

}  // namespace acpo
