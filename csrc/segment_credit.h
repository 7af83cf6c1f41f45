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

// What follows is compiled once for each instruction set: segments of one rollout, in double.

// Neumaier's compensated sum: the error is one rounding of the result, however many terms there are.
struct Compensated {
  double sum = 0.0, lost = 0.0;
  double value() const { return sum + lost; }
};

// The rule of one rollout: form "weights"   bounded = clamp(1 + toward phi, low, high),   w~ = 1 + rho (bounded - 1)
//                          form "additive"  shaping = rho clamp(toward phi, low, high)
struct CreditRule {
  double advantage, toward, low, high, rho;
  double conserve;    // weights: by what all w~ are multiplied
  int64_t except;     // the terminal segment, which has a rule of its own, or -1
  double of_except;   // its w~
  bool flat;          // weights: w = 1
};

struct CreditSums {
  Compensated bounded, weighted;
  double tokens = 0.0;  // whole numbers
};

// The unmasked tokens of the long segments, which are counted in pieces
struct LongCounts {
  const int64_t *segments, *counts;
  int64_t size;
};

struct CreditKernels {
  // The sum of |phi| or phi^2 over the segments [begin, end)
  double (*spread)(const SegmentCredit& of, int64_t begin, int64_t end);
  // Of the segments [begin, end), none of which is terminal; [1]: compensated, for float64 results
  void (*sums[2])(const SegmentCredit& of, const CreditRule& rule, const LongCounts& longs, int64_t begin, int64_t end, CreditSums* sums);
  // weights[i] and the advantage of the tokens, values[i], of segment begin + i; [1]: float64
  void (*values[2])(const SegmentCredit& of, const CreditRule& rule, int64_t begin, int64_t end, void* weights, void* values);
};
extern const CreditKernels segment_credit_baseline, segment_credit_avx2, segment_credit_avx512;

}  // namespace acpo
