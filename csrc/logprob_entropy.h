// Log-prob and entropy of rows of logits, and their gradient: the contract is acpo_kernels/logprob_entropy.py.
#pragma once

#include <cstdint>

namespace acpo {

enum class Dtype { float32, bfloat16, float16, float64 };

// Row r of N = `count` rows begins at (r / inner) * stride_outer + (r % inner) * stride_inner; strides count elements.
struct LogitRows {
  const void* logits;
  Dtype dtype;
  int64_t count, vocab, inner, stride_outer, stride_inner;
  const int64_t* ids;          // [N]
  const uint8_t* mask;         // [N], or null: every row counts
  double temperature;          // of every row, unless
  const double* temperatures;  // [N], or null
};

// The results of the forward pass, float32 [N] (float64 [N] for float64 logits). `maximum` is that of the logits, before the
// temperature; `logsumexp` is centred: of (logit - maximum) / temperature. Rows that do not count hold 0.
struct RowStatistics {
  void *logp, *entropy, *maximum, *logsumexp;
};

// Returns -1, or, having written nothing, the first row that counts and whose id is outside [0, V).
int64_t logprob_entropy_forward(const LogitRows& rows, const RowStatistics& out, int threads);

// gradient: contiguous [N, V] of the logits' dtype. grad_logp and grad_entropy: the dtype of the results, or null for zeros.
// Rows that do not count, or whose incoming gradients are both 0, become 0 without their logits being read.
// saved.logp is not used.
void logprob_entropy_backward(const LogitRows& rows, const RowStatistics& saved, const void* grad_logp,
                              const void* grad_entropy, void* gradient, int threads);

// One row, compiled once for each instruction set. Indexed by Dtype (float64 has one scalar form, elsewhere).
struct RowGradient {
  double entropy, maximum, logsumexp, grad_logp, grad_entropy;
};
using ForwardRow = void (*)(const void* x, int64_t vocab, int64_t target, double temperature, float* logp, float* entropy,
                            float* maximum, float* logsumexp);
using BackwardRow = void (*)(const void* x, int64_t vocab, int64_t target, double temperature, const RowGradient& g, void* out);
struct RowKernels {
  ForwardRow forward[3];
  BackwardRow backward[3];
};
extern const RowKernels logprob_entropy_baseline, logprob_entropy_avx2, logprob_entropy_avx512;

}  // namespace acpo
