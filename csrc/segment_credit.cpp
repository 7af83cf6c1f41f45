#include "segment_credit.h"

#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include "segment_reduce.h"

namespace acpo {
namespace {

// Neumaier's compensated sum: the error is one rounding of the result, however many terms there are.
struct Compensated {
  double sum = 0.0, lost = 0.0;
  void operator+=(double x) {
    const double next = sum + x;
    lost += std::fabs(sum) >= std::fabs(x) ? (sum - next) + x : (x - next) + sum;
    sum = next;
  }
  double value() const { return sum + lost; }
};

// float32 results: a sum in double errs by less than 2^-24 for any number of segments that fits in memory.
struct Plain {
  double sum = 0.0;
  void operator+=(double x) { sum += x; }
  double value() const { return sum; }
};
template <class Real>
using Total = std::conditional_t<std::is_same_v<Real, double>, Compensated, Plain>;

double sign(double x) { return static_cast<double>((x > 0.0) - (x < 0.0)); }
double clamp(double x, double low, double high) { return x < low ? low : x > high ? high : x; }  // a NaN stays

struct Count {
  int64_t count = 0;
  void operator+=(const Count& other) { count += other.count; }
};

constexpr int64_t SEGMENTS = 2048;  // below so many segments one thread takes them all

template <class Real>
class Credit {
 public:
  Credit(const SegmentCredit& of, Real* token_advantages, Real* weights)
      : of_(of), h_(of.hierarchy), credit_(token_advantages), weights_(weights), groups_(of.hierarchy, false) {}

  void run(int threads) {
    values_.resize(static_cast<size_t>(h_.segments));
    per_segment_.resize(static_cast<size_t>(h_.segments));
    if (of_.mask != nullptr && !of_.additive) count_tokens(threads);
    const bool own = !of_.scales && of_.scale == 0.0;
    spreads_.resize(own ? static_cast<size_t>(h_.sequences) : 0);
    rollouts(threads, [&](int64_t b) { read(b); });
    inverse_ = 1.0 / (own ? own_scale() : of_.scales ? static_cast<Real>(of_.scales[0]) : of_.scale);
    rollouts(threads, [&](int64_t b) { of_.additive ? additive(b) : weights(b); });
    parallel_for(h_.tokens, SHARE, threads, [&](int64_t first, int64_t last) { broadcast(first, last); });
  }

 private:
  template <class Body>
  void rollouts(int threads, Body body) {
    const int64_t grain = h_.segments == 0 ? h_.sequences : std::max<int64_t>(1, h_.sequences * (SEGMENTS / 4) / h_.segments);
    parallel_for(h_.sequences, grain, h_.segments <= SEGMENTS ? 1 : threads, [&](int64_t b, int64_t last) {
      for (; b < last; ++b) body(b);
    });
  }

  int64_t first(int64_t b) const { return h_.sequence_offsets[b]; }
  int64_t last(int64_t b) const { return h_.sequence_offsets[b + 1]; }

  // The segment of rollout b that is left out of the rule for the others, or -1.
  int64_t apart(int64_t b) const {
    return of_.exclude_terminal && of_.terminal != nullptr && of_.terminal[b] && last(b) > first(b) ? last(b) - 1 : -1;
  }

  // phi of rollout b, 0 where the score is not finite, and its share of the scale
  void read(int64_t b) {
    for (int64_t s = first(b); s < last(b); ++s) {
      const double x = of_.scores[s];
      values_[s] = std::fabs(x) <= std::numeric_limits<double>::max() ? x : 0.0;
    }
    if (spreads_.empty()) return;
    const int64_t ordinary = last(b) - (apart(b) >= 0);
    double total = 0.0;
    for (int64_t s = first(b); s < ordinary; ++s) total += of_.additive ? values_[s] * values_[s] : std::fabs(values_[s]);
    spreads_[b] = total;
  }

  double own_scale() const {
    double total = 0.0;
    int64_t ordinary = h_.segments;
    for (int64_t b = 0; b < h_.sequences; ++b) {
      total += spreads_[b];
      ordinary -= apart(b) >= 0;
    }
    const double mean = total / static_cast<double>(std::max<int64_t>(ordinary, 1));
    return (of_.additive ? std::sqrt(mean) : mean) + 1e-6;
  }

  void count_tokens(int threads) {
    const GroupKernels& kernels = group_kernels();
    counts_.resize(static_cast<size_t>(h_.segments));
    reduce<Count>(
        groups_, 1, threads, [&](int64_t, int64_t, int64_t begin, int64_t end) { return Count{kernels.count(of_.mask + begin, end - begin, groups_.tokens - begin)}; },
        [&](int64_t, int64_t s, const Count& all) { counts_[s] = all.count; });
  }

  double length(int64_t s) const { return static_cast<double>(counts_.empty() ? groups_.end(s) - groups_.begin(s) : counts_[s]); }
  double reliability(int64_t b) const { return of_.reliabilities ? static_cast<Real>(of_.reliabilities[b]) : of_.reliability; }

  void additive(int64_t b) {
    const double most = reliability(b) * of_.gain;
    const int64_t except = apart(b);
    const Real advantage = static_cast<Real>(of_.advantages[b]);
    for (int64_t s = first(b); s < last(b); ++s) {
      const double shaping = s == except ? 0.0 : most * clamp(values_[s] * inverse_, -3.0, 3.0);
      per_segment_[s] = shaping == 0.0 ? advantage : static_cast<Real>(advantage + shaping);  // -0.0 + 0.0 is not -0.0
      weights_[s] = 1;
    }
  }

  void weights(int64_t b) {
    const int64_t begin = first(b), end = last(b), except = apart(b), ordinary = end - (except >= 0);
    const Real advantage = static_cast<Real>(of_.advantages[b]);
    if (ordinary - begin < 2) {
      for (int64_t s = begin; s < end; ++s) per_segment_[s] = advantage, weights_[s] = 1;
      return;
    }
    const double toward = of_.gain * sign(advantage) * inverse_, low = 1.0 - of_.bound, high = 1.0 + of_.bound, rho = reliability(b);
    Total<Real> sum, weighted, total;
    for (int64_t s = begin; s < ordinary; ++s) {
      const double bounded = clamp(1.0 + toward * values_[s], low, high);
      values_[s] = 1.0 + rho * (bounded - 1.0);
      sum += bounded;
      weighted += length(s) * values_[s];
      total += length(s);
    }
    if (except >= 0) {
      values_[except] = 1.0 + rho * (sum.value() / static_cast<double>(ordinary - begin) - 1.0);
      weighted += length(except) * values_[except];
      total += length(except);
    }
    const double conserve = weighted.value() > 0.0 ? total.value() / weighted.value() : 1.0;
    for (int64_t s = begin; s < end; ++s) {
      weights_[s] = static_cast<Real>(values_[s] * conserve);
      per_segment_[s] = advantage * weights_[s];
    }
  }

  // A vector at a time: the last one of a segment may write past it, as far as `last`, and the next segment comes after it.
  void broadcast(int64_t first, int64_t last) const {
    constexpr int STEP = 128 / sizeof(Real);  // the length of most segments: no branch to guess
    groups_.runs(first, last, [&](int64_t s, int64_t t, int64_t end) {
      const Real value = per_segment_[s];
      if (of_.mask == nullptr) {
        for (; t < end && t + STEP <= last; t += STEP) {
          for (int k = 0; k < STEP; ++k) credit_[t + k] = value;
        }
        for (; t < end; ++t) credit_[t] = value;
      } else {
        for (; t < end && t + STEP <= last; t += STEP) {
          for (int k = 0; k < STEP; ++k) credit_[t + k] = of_.mask[t + k] ? value : Real(0);
        }
        for (; t < end; ++t) credit_[t] = of_.mask[t] ? value : Real(0);
      }
    });
  }

  const SegmentCredit& of_;
  const Hierarchy& h_;
  Real *credit_, *weights_;
  Groups groups_;
  double inverse_ = 1.0;           // of the scale
  std::vector<int64_t> counts_;    // unmasked tokens of each segment; empty without a mask
  std::vector<double> values_;     // phi of each segment, then its weight before conservation
  std::vector<double> spreads_;    // of each rollout, where the scale is the batch's own
  std::vector<Real> per_segment_;  // the advantage of each segment's tokens
};

}  // namespace

void segment_credit(const SegmentCredit& of, void* token_advantages, void* weights, int threads) {
  of.hierarchy.check();
  if (of.scores.dtype == Dtype::float64) {
    Credit<double>(of, static_cast<double*>(token_advantages), static_cast<double*>(weights)).run(threads);
  } else {
    Credit<float>(of, static_cast<float*>(token_advantages), static_cast<float*>(weights)).run(threads);
  }
}

}  // namespace acpo
