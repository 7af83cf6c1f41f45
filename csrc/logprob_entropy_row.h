// The rows of logprob_entropy, over the `Simd` that was included before. From the sums of row_sums.h, d_j = (x_j - m) / T,
//   l       = log1p(rest)                 logp    = d_t - l
//   entropy = l - sum_j p_j d_j           p_j     = exp(d_j) / (1 + rest)
//   dlogits_j = (g_logp ([j = t] - p_j) + g_entropy p_j (l - d_j - entropy)) / T,   1 - p_t by expm1
// The gradient may take the place of the logits: x_t is read first, and each vector before it is written.
#pragma once

#include "row_sums.h"

namespace acpo {
namespace {

template <class T>
void scan_row(const void* x, int64_t n, double temperature, RowSums* sums) {
  add_row(static_cast<const T*>(x), n, Exp(temperature), *sums);
}

template <class T>
void backward_row(const void* logits, int64_t vocab, int64_t target, double temperature, const RowGradient& g, void* out) {
  const T* x = static_cast<const T*>(logits);
  T* grad = static_cast<T*>(out);
  if (g.logsumexp != g.logsumexp) {
    for (int64_t i = 0; i < vocab; ++i) from_float(__builtin_nanf(""), grad + i);
    return;
  }
  const Exp exp_of(temperature);
  const double per_t = 1.0 / temperature, p_top = exp(-g.logsumexp), x_t = to_float(x[target]);
  const float top = static_cast<float>(g.maximum);
  // dlogits_j = e_j (a + b u_j) / T, u_j = m - x_j: one 1/T apart, since 1/T^2 overflows below 1e-19 and meets u = 0
  const vec a = Simd::set(static_cast<float>(p_top * (g.grad_entropy * (g.logsumexp - g.entropy) - g.grad_logp)));
  const vec b = Simd::set(static_cast<float>(per_t * p_top * g.grad_entropy));
  const vec m = Simd::set(top), low = Simd::set(exp_of.floor(top)), inverse = Simd::set(static_cast<float>(exp_of.inverse * per_t));
  auto step = [&](vec z) __attribute__((always_inline)) {
    const mask kept = Simd::not_less(z, low);
    const vec u = Simd::keep(kept, Simd::sub(m, z));
    return Simd::mul(Simd::mul(Simd::fma(b, u, a), inverse), exp_of(kept, u));
  };
  int64_t i = 0;
  for (; i + W <= vocab; i += W) Simd::store(grad + i, step(Simd::load(x + i)));
  if (i < vocab) {
    Tail<T> tail(x + i, vocab - i);
    Simd::store(tail.padded, step(Simd::load(tail.padded)));
    memcpy(grad + i, tail.padded, static_cast<size_t>(vocab - i) * sizeof(T));
  }
  const double d = (x_t - top) * per_t, p = exp(d - g.logsumexp);
  double at_target = -g.grad_logp * expm1(d - g.logsumexp);
  if (p > 0.0) at_target += g.grad_entropy * p * (g.logsumexp - d - g.entropy);
  from_float(static_cast<float>(at_target * per_t), grad + target);
}

constexpr RowKernels kernels = {{scan_row<float>, scan_row<bf16>, scan_row<fp16>}, {backward_row<float>, backward_row<bf16>, backward_row<fp16>}};

}  // namespace
}  // namespace acpo
