#include "logprob_entropy.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "isa.h"
#include "threads.h"

namespace acpo {
namespace {

constexpr int64_t IGNORED = -100;
constexpr int64_t MIN_WORK = 1 << 15;  // logits a range of rows should hold: below it handing it to a thread costs more

const RowKernels& row_kernels() {
#if defined(__x86_64__)
  switch (isa()) {
    case Isa::avx512:
      return logprob_entropy_avx512;
    case Isa::avx2:
      return logprob_entropy_avx2;
    case Isa::baseline:
      break;
  }
#else
  isa();  // an ACPO_CPU_ISA that this machine lacks is an error here too
#endif
  return logprob_entropy_baseline;
}

int64_t size_of(Dtype dtype) { return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2; }

bool counts(const LogitRows& rows, int64_t r) { return rows.ids[r] != IGNORED && (rows.mask == nullptr || rows.mask[r] != 0); }

const char* begin_of(const LogitRows& rows, int64_t r) {
  const int64_t at = r / rows.inner * rows.stride_outer + r % rows.inner * rows.stride_inner;
  return static_cast<const char*>(rows.logits) + at * size_of(rows.dtype);
}

double temperature_of(const LogitRows& rows, int64_t r) { return rows.temperatures == nullptr ? rows.temperature : rows.temperatures[r]; }

double value(const void* values, Dtype dtype, int64_t r) {
  if (values == nullptr) return 0.0;
  return dtype == Dtype::float64 ? static_cast<const double*>(values)[r] : static_cast<const float*>(values)[r];
}

// The equations of logprob_entropy_row.h in double, for the oracle's sake and gradcheck: plain loops.
void forward_row_f64(const double* x, int64_t vocab, int64_t target, double temperature, double* out[4]) {
  const double inf = std::numeric_limits<double>::infinity();
  const int64_t at = std::max_element(x, x + vocab) - x;
  double rest = 0.0, weighted = 0.0;
  for (int64_t j = 0; j < vocab; ++j) {
    if (j == at || x[j] == -inf) continue;
    const double d = (x[j] - x[at]) / temperature, e = std::exp(d);
    rest += e;
    weighted -= e * d;
  }
  if (rest != rest || std::isinf(x[at])) {
    for (int k = 0; k < 4; ++k) *out[k] = std::numeric_limits<double>::quiet_NaN();
    return;
  }
  const double l = std::log1p(rest);
  *out[0] = (x[target] - x[at]) / temperature - l;
  *out[1] = l + weighted / (1.0 + rest);
  *out[2] = x[at];
  *out[3] = l;
}

void backward_row_f64(const double* x, int64_t vocab, int64_t target, double temperature, const RowGradient& g, double* out) {
  for (int64_t j = 0; j < vocab; ++j) {
    const double d = (x[j] - g.maximum) / temperature, log_p = d - g.logsumexp, p = std::exp(log_p);
    const double through_entropy = p == 0.0 ? 0.0 : g.grad_entropy * p * (-log_p - g.entropy);
    const double through_logp = g.grad_logp * (j == target ? -std::expm1(log_p) : -p);
    out[j] = (through_logp + through_entropy) / temperature;
  }
}

}  // namespace

int64_t logprob_entropy_forward(const LogitRows& rows, const RowStatistics& out, int threads) {
  for (int64_t r = 0; r < rows.count; ++r) {
    if (counts(rows, r) && (rows.ids[r] < 0 || rows.ids[r] >= rows.vocab)) return r;
  }
  const RowKernels& kernels = row_kernels();
  parallel_for(rows.count, MIN_WORK / rows.vocab, threads, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      void* const results[4] = {out.logp, out.entropy, out.maximum, out.logsumexp};
      if (rows.dtype == Dtype::float64) {
        double* to[4];
        for (int k = 0; k < 4; ++k) *(to[k] = static_cast<double*>(results[k]) + r) = 0.0;
        if (counts(rows, r)) {
          forward_row_f64(reinterpret_cast<const double*>(begin_of(rows, r)), rows.vocab, rows.ids[r], temperature_of(rows, r), to);
        }
      } else {
        float* to[4];
        for (int k = 0; k < 4; ++k) *(to[k] = static_cast<float*>(results[k]) + r) = 0.0f;
        if (counts(rows, r)) {
          kernels.forward[static_cast<int>(rows.dtype)](begin_of(rows, r), rows.vocab, rows.ids[r], temperature_of(rows, r), to[0],
                                                        to[1], to[2], to[3]);
        }
      }
    }
  });
  return -1;
}

void logprob_entropy_backward(const LogitRows& rows, const RowStatistics& saved, const void* grad_logp, const void* grad_entropy,
                              void* gradient, int threads) {
  const RowKernels& kernels = row_kernels();
  const int64_t bytes = rows.vocab * size_of(rows.dtype);
  parallel_for(rows.count, MIN_WORK / rows.vocab, threads, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      char* to = static_cast<char*>(gradient) + r * bytes;
      RowGradient g{};
      g.grad_logp = value(grad_logp, rows.dtype, r);
      g.grad_entropy = value(grad_entropy, rows.dtype, r);
      if (!counts(rows, r) || (g.grad_logp == 0.0 && g.grad_entropy == 0.0)) {
        std::memset(to, 0, static_cast<size_t>(bytes));
        continue;
      }
      g.entropy = value(saved.entropy, rows.dtype, r);
      g.maximum = value(saved.maximum, rows.dtype, r);
      g.logsumexp = value(saved.logsumexp, rows.dtype, r);
      if (rows.dtype == Dtype::float64) {
        backward_row_f64(reinterpret_cast<const double*>(begin_of(rows, r)), rows.vocab, rows.ids[r], temperature_of(rows, r), g,
                         reinterpret_cast<double*>(to));
      } else {
        kernels.backward[static_cast<int>(rows.dtype)](begin_of(rows, r), rows.vocab, rows.ids[r], temperature_of(rows, r), g, to);
      }
    }
  });
}

}  // namespace acpo
