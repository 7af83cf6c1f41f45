// The head of a language model without its N x V logits: log-prob, entropy and gradients from hidden states. The contract is
// acpo_kernels/linear_logprob_entropy.py.
//
// Cost in units of 2 N V H, the product of N rows: forward 1; backward 1 for the logits again (none where the caller kept
// them), 1 for dHidden, 1 for dWeight, each only if asked for. N counts the rows in `rows`: the caller leaves out what is
// masked or has no upstream gradient, and such a row's hidden state is never read.
//
// The vocabulary is walked in slices of 4,032 entries made of blocks of 112 (a block of W in float32 is 459 KB at H = 1024 and
// stays in a 2 MB L2 with a panel of hidden states): per block the logits of 32 rows at a time, their softmax while they are in
// the L1, and dW of the block, complete once all rows have passed; per slice dHidden. What is held beside inputs and results, for R
// rows: 12 R H bytes (the hidden states twice, dHidden), 16 KB H (a slice of W; for more than 1,024 rows of 16-bit weights another of dW),
// and the logits of a slice, 16 MB: 100 MB at R = 4096, H = 1024.
//
// From bf16 (head_words.cpp) AMX multiplies at ten times the rate of float32. The gradient of the logits is three bf16 numbers: dHidden and
// dWeight are three products each, which makes 8 units in all where float32 has 4. VDPBF16PS multiplies at twice the rate: one bf16 number
// and the residues of the large ones, 4 units.
#pragma once

#include <cstdint>

#include "logprob_entropy.h"

namespace acpo {

struct Head {
  const void* hidden;  // [N, H], rows hidden_stride elements apart, and so below
  int64_t hidden_stride;
  const void* weight;  // [V, H]
  int64_t weight_stride;
  Dtype dtype;  // of both; not float64
  int64_t vocab, width;
  const float* bias;           // [V], or null
  double softcap;              // 0: none
  double temperature;          // of every row, unless
  const double* temperatures;  // [N], or null
  const int64_t* ids;          // [N], inside [0, V) for the rows below
  const int64_t* rows;         // the rows to work on, ascending
  int64_t count;
};

// float32 [N]; entries of rows that are not worked on are left alone. As RowStatistics: `logsumexp` is centred, over the temperature.
struct HeadStatistics {
  float *logp, *entropy, *maximum, *logsumexp;
};

struct HeadGradient {
  const float *grad_logp, *grad_entropy;  // [N], or null for zeros
  void* hidden;                           // [N, H] contiguous, or null: rows that are not worked on are left alone
  Dtype hidden_dtype;                     // the head's, or float32
  void* weight;                           // [V, H] contiguous, or null
  Dtype weight_dtype;                     // the head's, or float32
  float* bias;                            // [V], or null
  bool add;                               // to sum (to weight, where that is null: float32 then) and bias; otherwise they are written
  float* sum = nullptr;                   // [V, H] or null: dWeight of several calls, of which the last rounds it to weight
};

// Floats in a buffer of logits of `count` rows, which forward fills and backward reads. Its layout is the kernels' own; it begins at
// a multiple of 64 bytes.
int64_t head_logits_size(int64_t vocab, int64_t count);

// logits may be null.
void head_forward(const Head& head, float* logits, const HeadStatistics& out, int threads);

// logits as head_forward left them for the same rows, or null: they are computed again.
void head_backward(const Head& head, const float* logits, const HeadStatistics& saved, const HeadGradient& out, int threads);

// What several calls left in HeadGradient::sum, to weight.
void head_round(const Head& head, const float* sum, void* weight, int threads);

// float32 [N], as HeadStatistics: the six results of acpo_kernels/linear_hindsight_information.py. No buffer of logits: forward only.
struct HindsightStatistics {
  float *logp, *hindsight_logp, *entropy, *log_ratio, *kl, *information;
};
void head_hindsight(const Head& head, const void* hindsight_hidden, int64_t hindsight_stride, const HindsightStatistics& out, int threads);

// Rows multiplied since the process began, for tests of what is not computed: in logits, dHidden, dWeight.
struct HeadWork {
  int64_t logits, hidden, weight;
};
HeadWork head_work();

}  // namespace acpo
