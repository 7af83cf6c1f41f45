#include "segment_credit.h"

#include <cmath>
#include <vector>

#include "isa.h"
#include "segment_reduce.h"

namespace acpo {
namespace {

const CreditKernels& credit_kernels() { return ACPO_KERNELS(segment_credit); }

double sign(double x) { return static_cast<double>((x > 0.0) - (x < 0.0)); }

void operator+=(Compensated& to, const Compensated& x) {
  const double next = to.sum + x.sum;
  to.lost += x.lost + (std::fabs(to.sum) >= std::fabs(x.sum) ? (to.sum - next) + x.sum : (x.sum - next) + to.sum);
  to.sum = next;
}

struct Spread {
  double sum = 0.0;
  void operator+=(const Spread& other) { sum += other.sum; }
};

struct Sums : CreditSums {
  void operator+=(const Sums& other) {
    bounded += other.bounded;
    weighted += other.weighted;
    tokens += other.tokens;
  }
};

struct Count {
  int64_t count = 0;
  void operator+=(const Count& other) { count += other.count; }
};

// Segments whose tokens are written at a time
constexpr int64_t BLOCK = 512;

template <class Real>
class Credit {
 public:
  Credit(const SegmentCredit& of, Real* token_advantages, Real* weights)
      : of_(of), h_(of.hierarchy), credit_(token_advantages), weights_(weights), longest_(h_.check()), rollouts_(h_.sequence_offsets, h_.sequences, h_.segments) {}

  void run(int threads) {
    const Shares of_tokens(Groups(h_, false), TOKENS_GRAIN, longest_.tokens), of_segments(rollouts_, SEGMENTS_GRAIN, longest_.segments);
    scale_ = of_.scales ? static_cast<Real>(of_.scales[0]) : of_.scale != 0.0 ? of_.scale : own_scale(of_segments, threads);
    if (!of_.additive) conserve(of_tokens, of_segments, threads);
    const GroupTokens tokens{h_.token_offsets, nullptr, h_.tokens, of_.mask};
    const auto& spread = group_kernels().typed[of_.mask != nullptr][static_cast<int>(REAL)];
    of_tokens.run(
        1, threads,
        [&](int64_t, int64_t first, int64_t last) {
          for (; first < last; first += BLOCK) {
            Real values[BLOCK];
            const int64_t behind = std::min(first + BLOCK, last);
            assign(first, behind, values);
            spread.gradients[0](nullptr, tokens, first, behind, values, nullptr, credit_);
          }
        },
        [&](int64_t, size_t i, int64_t, int64_t begin, int64_t end) {
          const int64_t s = of_tokens.longs()[i].group;
          Real value, weight;
          assign(s, s + 1, &value, begin == h_.token_offsets[s] ? weights_ + s : &weight);
          spread.gradient_piece[0](nullptr, tokens, begin, end, value, 1, 0.0, credit_);
        });
  }

 private:
  static constexpr bool DOUBLE = sizeof(Real) == sizeof(double);
  static constexpr Dtype REAL = DOUBLE ? Dtype::float64 : Dtype::float32;

  int64_t first(int64_t b) const { return h_.sequence_offsets[b]; }
  int64_t last(int64_t b) const { return h_.sequence_offsets[b + 1]; }

  // The segment of rollout b that is left out of the rule for the others, or -1.
  int64_t apart(int64_t b) const {
    return of_.exclude_terminal && of_.terminal != nullptr && of_.terminal[b] && last(b) > first(b) ? last(b) - 1 : -1;
  }

  CreditRule rule(int64_t b) const {
    const double advantage = static_cast<Real>(of_.advantages[b]), inverse = 1.0 / scale_;
    const double reliability = of_.reliabilities ? static_cast<Real>(of_.reliabilities[b]) : of_.reliability;
    const int64_t except = apart(b);
    if (of_.additive) return {advantage, inverse, -3.0, 3.0, reliability * of_.gain, 1.0, except, 1.0, false};
    const bool flat = last(b) - first(b) - (except >= 0) < 2;
    return {advantage, of_.gain * sign(advantage) * inverse, 1.0 - of_.bound, 1.0 + of_.bound, reliability, 1.0, except, 1.0, flat};
  }

  double own_scale(const Shares& shares, int threads) const {
    std::vector<double> of_rollout(static_cast<size_t>(h_.sequences));
    reduce<Spread>(
        rollouts_, shares, 1, threads,
        [&](int64_t, int64_t b, int64_t begin, int64_t end) { return Spread{kernels_.spread(of_, begin, end - (end == last(b) && apart(b) >= 0))}; },
        [&](int64_t, int64_t b, const Spread& all) { of_rollout[b] = all.sum; });
    double total = 0.0;
    int64_t ordinary = h_.segments;
    for (int64_t b = 0; b < h_.sequences; ++b) {
      total += of_rollout[b];
      ordinary -= apart(b) >= 0;
    }
    const double mean = total / static_cast<double>(std::max<int64_t>(ordinary, 1));
    return (of_.additive ? std::sqrt(mean) : mean) + 1e-6;
  }

  // For each rollout by what its weights are multiplied, and w~ of its terminal segment.
  void conserve(const Shares& of_tokens, const Shares& of_segments, int threads) {
    std::vector<int64_t> segments, counts;
    if (of_.mask != nullptr && of_tokens.pieces() > 0) {
      const GroupKernels& kernels = group_kernels();
      std::vector<Count> parts(static_cast<size_t>(of_tokens.pieces()));
      of_tokens.run(
          1, threads, [](int64_t, int64_t, int64_t) {},
          [&](int64_t, size_t, int64_t k, int64_t begin, int64_t end) { parts[k] = {kernels.count(of_.mask + begin, end - begin, h_.tokens - begin)}; });
      of_tokens.join(1, parts, [&](int64_t, size_t i, const Count& all) {
        segments.push_back(of_tokens.longs()[i].group);
        counts.push_back(all.count);
      });
    }
    const LongCounts longs{segments.data(), counts.data(), static_cast<int64_t>(segments.size())};
    conserved_.resize(static_cast<size_t>(h_.sequences));
    reduce<Sums>(
        rollouts_, of_segments, 1, threads,
        [&](int64_t, int64_t b, int64_t begin, int64_t end) {
          Sums sums;
          const CreditRule r = rule(b);
          if (!r.flat) kernels_.sums[DOUBLE](of_, r, longs, begin, end - (end == last(b) && r.except >= 0), &sums);
          return sums;
        },
        [&](int64_t, int64_t b, Sums all) {
          const CreditRule r = rule(b);
          double of_except = 1.0;
          if (r.flat) return;
          if (r.except >= 0) {
            of_except = 1.0 + r.rho * (all.bounded.value() / static_cast<double>(r.except - first(b)) - 1.0);
            const int64_t begin = h_.token_offsets[r.except], end = h_.token_offsets[r.except + 1];
            const double n = static_cast<double>(of_.mask == nullptr ? end - begin : group_kernels().count(of_.mask + begin, end - begin, h_.tokens - begin));
            all.weighted += {n * of_except, 0.0};
            all.tokens += n;
          }
          conserved_[b] = {all.weighted.value() > 0.0 ? all.tokens / all.weighted.value() : 1.0, of_except};
        });
  }

  // values[s - begin], and the weights, of the segments [begin, end)
  void assign(int64_t begin, int64_t end, Real* values, Real* weights = nullptr) const {
    if (weights == nullptr) weights = weights_ + begin;
    for (int64_t b = rollouts_.of(begin); begin < end; ++b) {
      const int64_t n = std::min(last(b), end) - begin;
      if (n <= 0) continue;
      CreditRule r = rule(b);
      if (!of_.additive) r.conserve = conserved_[b].by, r.of_except = conserved_[b].of_except;
      kernels_.values[DOUBLE](of_, r, begin, begin + n, weights, values);
      begin += n;
      weights += n;
      values += n;
    }
  }

  struct Conserved {
    double by, of_except;
  };

  const CreditKernels& kernels_ = credit_kernels();
  const SegmentCredit& of_;
  const Hierarchy& h_;
  Real *credit_, *weights_;
  Hierarchy::Most longest_;
  Groups rollouts_;  // of segments
  double scale_ = 1.0;
  std::vector<Conserved> conserved_;  // weights: of each rollout
};

}  // namespace

void segment_credit(const SegmentCredit& of, void* token_advantages, void* weights, int threads) {
  if (of.scores.dtype == Dtype::float64) {
    Credit<double>(of, static_cast<double*>(token_advantages), static_cast<double*>(weights)).run(threads);
  } else {
    Credit<float>(of, static_cast<float*>(token_advantages), static_cast<float*>(weights)).run(threads);
  }
}

}  // namespace acpo
