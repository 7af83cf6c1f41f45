// Log-prob and entropy of rows of logits, and their gradient: the contract is acpo_kernels/logprob_entropy.py.
#pragma once

#include <cstdint>

namespace acpo {

enum class Dtype { float32, bfloat16, float16, float64 };

constexpr int64_t MIN_WORK = 1 << 15;  // logits a range of rows should hold: below it handing it to a thread costs more

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

bool counts(const LogitRows& rows, int64_t r);
const char* begin_of(const LogitRows& rows, int64_t r);
double temperature_of(const LogitRows& rows, int64_t r);
double logit(const LogitRows& rows, int64_t r, int64_t j);
void set_value(void* values, Dtype dtype, int64_t r, double value);  // of results: float32, or float64 for float64 logits
int64_t first_bad_id(const LogitRows& rows);  // the first row that counts and whose id is outside [0, V), or -1

// The results of the forward pass, float32 [N] (float64 [N] for float64 logits). `maximum` is that of the logits, before the
// temperature; `logsumexp` is centred: of (logit - maximum) / temperature. Rows that do not count hold 0.
struct RowStatistics {
  void *logp, *entropy, *maximum, *logsumexp;
};

// Returns -1, or, having written nothing, the first row that counts and whose id is outside [0, V).
int64_t logprob_entropy_forward(const LogitRows& rows, const RowStatistics& out, int threads);

// gradient: contiguous [N, V] of the logits' dtype, or null: then it takes the place of the logits, each after it was read.
// grad_logp and grad_entropy: the dtype of the results, or null for zeros.
// Rows that do not count, or whose incoming gradients are both 0, become 0 without their logits being read.
// saved.logp is not used.
void logprob_entropy_backward(const LogitRows& rows, const RowStatistics& saved, const void* grad_logp,
                              const void* grad_entropy, void* gradient, int threads);

// One row, compiled once for each instruction set. Indexed by Dtype (float64 has one scalar form, elsewhere). RowSums, RowResult,
// finish_row and row_f64 serve hindsight_information.cpp too.
struct RowSums {
  float top;              // the maximum so far, m
  double rest, weighted;  // sum of exp((x - m) / T) without one maximum; of exp((x - m) / T) (m - x)
  bool bad;               // +inf was seen, or NaN among nothing but -inf (any other NaN is in the sums)
};
constexpr RowSums NO_ELEMENTS = {-__builtin_inff(), 0.0, 0.0, false};
// logp of the logit x_t, entropy, maximum and centred logsumexp; four NaN for what is no distribution.
struct RowResult {
  double logp, entropy, maximum, logsumexp;
};
RowResult finish_row(const RowSums& sums, double x_t, double temperature);
RowResult row_f64(const double* x, int64_t vocab, int64_t target, double temperature);  // of a whole row

struct RowGradient {
  double entropy, maximum, logsumexp, grad_logp, grad_entropy;
};
using ScanRow = void (*)(const void* x, int64_t n, double temperature, RowSums* sums);
using BackwardRow = void (*)(const void* x, int64_t vocab, int64_t target, double temperature, const RowGradient& g, void* out);
struct RowKernels {
  ScanRow scan[3];
  BackwardRow backward[3];
};
extern const RowKernels logprob_entropy_baseline, logprob_entropy_avx2, logprob_entropy_avx512;

}  // namespace acpo
