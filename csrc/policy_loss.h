// The policy loss of packed tokens and its gradients, in one pass: the contract is acpo_kernels/policy_loss.py.
#pragma once

#include <cstdint>

#include "groups.h"

namespace acpo {

enum class Ratio { token, segment, sequence };

struct PolicyLoss {
  Hierarchy hierarchy;
  const uint8_t* mask;  // [N], or null
  Values logp, old_logp, advantages, entropy, entropy_weights, ref_logp, rollout_logp;  // [N]; logp and advantages are given
  double clip_low, clip_high;
  Ratio ratio;
  bool has_entropy_weight;  // a number; `entropy_weights` come before it
  double entropy_weight, kl_weight, rollout_cap;
  double denominator;   // 0: the number of unmasked tokens
  Values denominators;  // 0-d, [B] or [N], as denominators_of says; not given: `denominator`
  enum class Of { all, sequence, token } denominators_of;

  // Whether a token's ratio is a mean over others. On-policy every ratio is 1, at every level.
  bool grouped() const { return ratio != Ratio::token && old_logp; }
};

constexpr int POLICY_METRICS = 10;  // in the order of METRICS in acpo_kernels/_results.py

// loss 0-d, metrics [10], grad_logp and grad_entropy [N] (null: not wanted): float32, or float64 for float64 logp. The gradients are
// those for an incoming gradient of 1.
void policy_loss(const PolicyLoss& of, void* loss, void* metrics, void* grad_logp, void* grad_entropy, int threads);

// The gradients of the tokens [first, last) alone, bitwise those of the whole call, where no ratio is `grouped`. The hierarchy was checked.
void policy_loss_gradients(const PolicyLoss& of, int64_t first, int64_t last, void* grad_logp, void* grad_entropy, int threads);

// What follows is compiled once for each instruction set: blocks of tokens, in double throughout, so that float64 is no other path.
constexpr int64_t TOKENS = 256;  // a block: some ten arrays of 2 KB stay in L1

struct TokenSums {
  int64_t tokens = 0, low = 0, high = 0;  // unmasked; clipped below, above
  double loss = 0.0, ratio = 0.0, ratio_squared = 0.0, kl_old = 0.0, kl_ref = 0.0, entropy = 0.0;
  double smallest, largest;  // ratio
};

// Of the tokens [begin, begin + n), n <= TOKENS, one value each: the ratio and by what clip is divided (null: of the token itself, and 1),
// and the denominator.
struct TokenKernels {
  void (*loss)(const PolicyLoss& of, int64_t begin, int64_t n, const double* ratio, const double* narrower, const double* denominator,
               void* grad_logp, void* grad_entropy, TokenSums* sums);
  // The sum of the clamped log-ratios of the unmasked ones among [begin, end), and their number
  double (*log_ratios)(const PolicyLoss& of, int64_t begin, int64_t end, int64_t* count);
};
extern const TokenKernels policy_loss_baseline, policy_loss_avx2, policy_loss_avx512;

}  // namespace acpo
