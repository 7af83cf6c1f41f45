#include "logprob_entropy.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "floats.h"
#include "isa.h"
#include "threads.h"

namespace acpo {
namespace {

constexpr int64_t IGNORED = -100;
constexpr double NOT_A_NUMBER = std::numeric_limits<double>::quiet_NaN();
constexpr RowResult NOT_A_DISTRIBUTION = {NOT_A_NUMBER, NOT_A_NUMBER, NOT_A_NUMBER, NOT_A_NUMBER};

const RowKernels& row_kernels() { return ACPO_KERNELS(logprob_entropy); }

int64_t size_of(Dtype dtype) { return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2; }

double value(const void* values, Dtype dtype, int64_t r) {
  if (values == nullptr) return 0.0;
  return dtype == Dtype::float64 ? static_cast<const double*>(values)[r] : static_cast<const float*>(values)[r];
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

void set_value(void* values, Dtype dtype, int64_t r, double value) {
  if (dtype == Dtype::float64) {
    static_cast<double*>(values)[r] = value;
  } else {
    static_cast<float*>(values)[r] = static_cast<float>(value);
  }
}

bool counts(const LogitRows& rows, int64_t r) { return rows.ids[r] != IGNORED && (rows.mask == nullptr || rows.mask[r] != 0); }

const char* begin_of(const LogitRows& rows, int64_t r) {
  const int64_t at = r / rows.inner * rows.stride_outer + r % rows.inner * rows.stride_inner;
  return static_cast<const char*>(rows.logits) + at * size_of(rows.dtype);
}

double temperature_of(const LogitRows& rows, int64_t r) { return rows.temperatures == nullptr ? rows.temperature : rows.temperatures[r]; }

double logit(const LogitRows& rows, int64_t r, int64_t j) {
  const char* x = begin_of(rows, r);
  switch (rows.dtype) {
    case Dtype::float64:
      return reinterpret_cast<const double*>(x)[j];
    case Dtype::float32:
      return reinterpret_cast<const float*>(x)[j];
    case Dtype::bfloat16:
      return to_float(reinterpret_cast<const bf16*>(x)[j]);
    case Dtype::float16:
      return to_float(reinterpret_cast<const fp16*>(x)[j]);
  }
  return 0.0;
}

int64_t first_bad_id(const LogitRows& rows) {
  for (int64_t r = 0; r < rows.count; ++r) {
    if (counts(rows, r) && (rows.ids[r] < 0 || rows.ids[r] >= rows.vocab)) return r;
  }
  return -1;
}

RowResult finish_row(const RowSums& sums, double x_t, double temperature) {
  if (sums.bad || std::isinf(sums.top) || sums.rest != sums.rest || sums.weighted != sums.weighted) return NOT_A_DISTRIBUTION;
  const double l = std::log1p(sums.rest);
  return {(x_t - sums.top) / temperature - l, l + sums.weighted / temperature / (1.0 + sums.rest), sums.top, l};
}

// The equations of logprob_entropy_row.h in double, for the oracle's sake and gradcheck: plain loops.
RowResult row_f64(const double* x, int64_t vocab, int64_t target, double temperature) {
  const double inf = std::numeric_limits<double>::infinity();
  const int64_t at = std::max_element(x, x + vocab) - x;
  double rest = 0.0, weighted = 0.0;
  for (int64_t j = 0; j < vocab; ++j) {
    if (j == at || x[j] == -inf) continue;
    const double d = (x[j] - x[at]) / temperature, e = std::exp(d);
    rest += e;
    weighted -= e * d;
  }
  if (rest != rest || !std::isfinite(x[at])) return NOT_A_DISTRIBUTION;
  const double l = std::log1p(rest);
  return {(x[target] - x[at]) / temperature - l, l + weighted / (1.0 + rest), x[at], l};
}

int64_t logprob_entropy_forward(const LogitRows& rows, const RowStatistics& out, int threads) {
  if (const int64_t bad = first_bad_id(rows); bad >= 0) return bad;
  const RowKernels& kernels = row_kernels();
  parallel_for(rows.count, MIN_WORK / rows.vocab, threads, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      RowResult row{};
      if (counts(rows, r) && rows.dtype == Dtype::float64) {
        row = row_f64(reinterpret_cast<const double*>(begin_of(rows, r)), rows.vocab, rows.ids[r], temperature_of(rows, r));
      } else if (counts(rows, r)) {
        RowSums sums = NO_ELEMENTS;
        kernels.scan[static_cast<int>(rows.dtype)](begin_of(rows, r), rows.vocab, temperature_of(rows, r), &sums);
        row = finish_row(sums, logit(rows, r, rows.ids[r]), temperature_of(rows, r));
      }
      set_value(out.logp, rows.dtype, r, row.logp);
      set_value(out.entropy, rows.dtype, r, row.entropy);
      set_value(out.maximum, rows.dtype, r, row.maximum);
      set_value(out.logsumexp, rows.dtype, r, row.logsumexp);
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
      char* to = gradient != nullptr ? static_cast<char*>(gradient) + r * bytes : const_cast<char*>(begin_of(rows, r));
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
