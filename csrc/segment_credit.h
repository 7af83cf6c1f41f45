// From a rollout's advantage and its segments' scores to token advantages: the contract is acpo_kernels/segment_credit.py.
#pragma once

#include <cstdint>

#include "groups.h"

namespace acpo {

struct SegmentCredit {
  Hierarchy hierarchy;
  Values scores, advantages;  // [S], [B]
  const uint8_t* terminal;    // [B], or null
  const uint8_t* mask;        // [N], or null
  bool additive, exclude_terminal;
  double bound, gain;
  double reliability;
  Values reliabilities;  // 0-d (stride 0) or [B]; not given: `reliability`
  double scale;          // 0: the batch's own
  Values scales;         // 0-d; not given: `scale`
};

// token_advantages [N] and weights [S]: float32, or float64 for float64 scores.
void segment_credit(const SegmentCredit& of, void* token_advantages, void* weights, int threads);

}  // namespace acpo
