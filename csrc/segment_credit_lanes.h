// The rule of segment_credit, over vectors of double: blocks of segments, so that scores of every type are read once into the cache.
//
// Compiled once per instruction set: internal linkage, and no inline function of the standard library (see floats.h).
#pragma once

#include "segment_credit.h"
#include "segment_lanes.h"
#include "values_lanes.h"

namespace acpo {
namespace {

using vec = Vector<double>;
constexpr int W = SEGMENT_BYTES / 8;
constexpr int64_t SEGMENTS = 128;  // of a block: its arrays of 1 KB stay in L1

inline vec set(double x) { return x - vec{}; }  // x - 0 is x, -0 included
inline vec load(const double* p) { return read<vec>(p); }
inline void store(double* p, vec x) { memcpy(p, &x, sizeof x); }
inline vec clamp(vec x, double low, double high) {  // a NaN stays
  x = x < low ? set(low) : x;
  return x > high ? set(high) : x;
}

// phi of n segments, 0 where the score is not finite and behind the last
void read_block(const Values& scores, int64_t begin, int64_t n, double* phi) {
  read_values(scores, begin, n, phi);
  for (int64_t i = n; i % W != 0; ++i) phi[i] = 0.0;
  for (int64_t i = 0; i < n; i += W) {
    const vec x = load(phi + i);
    store(phi + i, x - x == 0.0 ? x : vec{});
  }
}

double spread_of(const SegmentCredit& of, int64_t begin, int64_t end) {
  vec sum{};
  alignas(64) double phi[SEGMENTS];
  for (; begin < end; begin += SEGMENTS) {
    const int64_t n = end - begin < SEGMENTS ? end - begin : SEGMENTS;
    read_block(of.scores, begin, n, phi);
    for (int64_t i = 0; i < n; i += W) {
      const vec x = load(phi + i);
      sum += of.additive ? x * x : x < 0.0 ? -x : x;
    }
  }
  return fold<double>(sum, [](auto a, auto b) { return a + b; });
}

// The unmasked tokens of n segments, 0 behind the last
void lengths_of(const SegmentCredit& of, const LongCounts& longs, int64_t begin, int64_t n, double* lengths) {
  const int64_t* offsets = of.hierarchy.token_offsets + begin;
  if (of.mask == nullptr) {
    for (int64_t i = 0; i < n; ++i) lengths[i] = static_cast<double>(offsets[i + 1] - offsets[i]);
  } else {
    int64_t at = 0;
    for (int64_t behind = longs.size; at < behind;) {  // the first one at or behind `begin`
      const int64_t middle = at + (behind - at) / 2;
      if (longs.segments[middle] < begin) {
        at = middle + 1;
      } else {
        behind = middle;
      }
    }
    for (int64_t i = 0; i < n; ++i) {
      if (at < longs.size && longs.segments[at] == begin + i) {
        lengths[i] = static_cast<double>(longs.counts[at++]);
      } else {
        lengths[i] = static_cast<double>(count_of(of.mask + offsets[i], offsets[i + 1] - offsets[i], of.hierarchy.tokens - offsets[i]));
      }
    }
  }
  for (int64_t i = n; i % W != 0; ++i) lengths[i] = 0.0;
}

ACPO_INLINE vec bounded_of(const CreditRule& rule, vec phi) { return clamp(1.0 + rule.toward * phi, rule.low, rule.high); }
ACPO_INLINE vec weight_of(const CreditRule& rule, vec bounded) { return 1.0 + rule.rho * (bounded - 1.0); }

inline void add(Compensated* to, double x) {
  const double next = to->sum + x;
  to->lost += __builtin_fabs(to->sum) >= __builtin_fabs(x) ? (to->sum - next) + x : (x - next) + to->sum;
  to->sum = next;
}

template <class Real>
void sums_of(const SegmentCredit& of, const CreditRule& rule, const LongCounts& longs, int64_t begin, int64_t end, CreditSums* sums) {
  vec bounded{}, weighted{}, tokens{};
  alignas(64) double phi[SEGMENTS], lengths[SEGMENTS];
  for (; begin < end; begin += SEGMENTS) {
    const int64_t n = end - begin < SEGMENTS ? end - begin : SEGMENTS;
    read_block(of.scores, begin, n, phi);
    lengths_of(of, longs, begin, n, lengths);
    for (int64_t i = 0; i < n; i += W) {
      vec x = bounded_of(rule, load(phi + i));
      const vec length = load(lengths + i), w = weight_of(rule, x);
      tokens += length;
      if constexpr (sizeof(Real) == sizeof(float)) {  // in double a sum errs by less than 2^-24 for any number of segments
        for (int64_t k = n - i; k < W; ++k) x[k] = 0.0;
        bounded += x;
        weighted += length * w;
      } else {
        for (int k = 0; k < W && i + k < n; ++k) add(&sums->bounded, x[k]), add(&sums->weighted, length[k] * w[k]);
      }
    }
  }
  const auto sum = [](auto a, auto b) __attribute__((always_inline)) { return a + b; };
  sums->tokens += fold<double>(tokens, sum);
  sums->bounded.sum += fold<double>(bounded, sum);
  sums->weighted.sum += fold<double>(weighted, sum);
}

template <class Real>
void values_of(const SegmentCredit& of, const CreditRule& rule, int64_t begin, int64_t end, void* to_weights, void* to_values) {
  Real *weights = static_cast<Real*>(to_weights), *values = static_cast<Real*>(to_values);
  const Real advantage = static_cast<Real>(rule.advantage);
  if (of.additive || rule.flat) {
    for (int64_t i = 0; i < end - begin; ++i) weights[i] = 1;
  }
  if (rule.flat) {
    for (int64_t i = 0; i < end - begin; ++i) values[i] = advantage;
    return;
  }
  alignas(64) double phi[SEGMENTS];
  for (; begin < end; begin += SEGMENTS, weights += SEGMENTS, values += SEGMENTS) {
    const int64_t n = end - begin < SEGMENTS ? end - begin : SEGMENTS, except = rule.except - begin;
    read_block(of.scores, begin, n, phi);
    if (of.additive) {
      if (except >= 0 && except < n) phi[except] = 0.0;
      for (int64_t i = 0; i < n; i += W) store(phi + i, rule.rho * clamp(rule.toward * load(phi + i), rule.low, rule.high));
      for (int64_t i = 0; i < n; ++i) values[i] = phi[i] == 0.0 ? advantage : static_cast<Real>(rule.advantage + phi[i]);  // -0.0 + 0.0 is not -0.0
    } else {
      for (int64_t i = 0; i < n; i += W) store(phi + i, weight_of(rule, bounded_of(rule, load(phi + i))));
      if (except >= 0 && except < n) phi[except] = rule.of_except;
      for (int64_t i = 0; i < n; ++i) weights[i] = static_cast<Real>(phi[i] * rule.conserve);
      for (int64_t i = 0; i < n; ++i) values[i] = advantage * weights[i];
    }
  }
}

constexpr CreditKernels kernels = {spread_of, {sums_of<float>, sums_of<double>}, {values_of<float>, values_of<double>}};

}  // namespace
}  // namespace acpo
