#include "policy_loss.h"

#include <cmath>
#include <limits>
#include <vector>

#include "isa.h"
#include "segment_reduce.h"

namespace acpo {
namespace {

constexpr double INF = std::numeric_limits<double>::infinity();
constexpr int64_t BLOCKS = 16;  // blocks of tokens that a thread takes at a time: some 10 us, what it costs to wake it

const TokenKernels& token_kernels() { return ACPO_KERNELS(policy_loss); }

double larger(double x, double best) { return x > best || x != x ? x : best; }  // a NaN stays
double smaller(double x, double best) { return x < best || x != x ? x : best; }

struct Sum {
  double sum = 0.0;
  int64_t count = 0;
  void operator+=(const Sum& other) {
    sum += other.sum;
    count += other.count;
  }
};

template <class Real>
void write(const TokenSums& all, void* loss, void* metrics) {
  const double count = static_cast<double>(all.tokens), safe = count < 1.0 ? 1.0 : count;
  const double spread = safe * all.ratio_squared, tiny = std::numeric_limits<Real>::min();
  const double values[POLICY_METRICS] = {
      count,
      static_cast<double>(all.low) / safe,
      static_cast<double>(all.high) / safe,
      all.ratio / safe,
      all.smallest,
      all.largest,
      all.ratio * all.ratio / (spread < tiny ? tiny : spread),
      all.kl_old / safe,
      all.kl_ref / safe,
      all.entropy / safe,
  };
  *static_cast<Real*>(loss) = static_cast<Real>(all.loss);
  for (int i = 0; i < POLICY_METRICS; ++i) static_cast<Real*>(metrics)[i] = static_cast<Real>(values[i]);
}

TokenSums nothing() {
  TokenSums none{};
  none.smallest = INF;
  none.largest = -INF;
  return none;
}

// One value a group of the ratio: exp of its mean log-ratio, and by what clip is divided. Empty where a token's ratio is its own.
struct GroupRatios {
  std::vector<double> ratio, narrower;
};

GroupRatios group_ratios(const PolicyLoss& of, int threads) {
  GroupRatios result;
  if (!of.grouped()) return result;
  const TokenKernels& kernels = token_kernels();
  const Groups groups(of.hierarchy, of.ratio == Ratio::sequence);
  result.ratio.resize(static_cast<size_t>(groups.count));
  result.narrower.resize(static_cast<size_t>(groups.count), 1.0);
  reduce<Sum>(
      groups, Shares(groups), 1, threads,
      [&](int64_t, int64_t, int64_t begin, int64_t end) {
        Sum part;
        part.sum = kernels.log_ratios(of, begin, end, &part.count);
        return part;
      },
      [&](int64_t, int64_t g, const Sum& all) {
        const double n = all.count > 1 ? static_cast<double>(all.count) : 1.0;
        result.ratio[g] = std::exp(all.sum / n);
        // The mean of n_k log-ratios is sqrt(n_k) times less noisy than one.
        if (of.ratio == Ratio::segment) result.narrower[g] = std::sqrt(n);
      });
  return result;
}

// The tokens [first, last). What a token gives does not depend on where the blocks begin.
TokenSums tokens_loss(const PolicyLoss& of, const GroupRatios& of_group, int64_t first, int64_t last, void* grad_logp, void* grad_entropy,
                      int threads) {
  const Hierarchy& h = of.hierarchy;
  const TokenKernels& kernels = token_kernels();
  const Groups groups(h, of.ratio == Ratio::sequence), sequences(h, true);
  const bool grouped = !of_group.ratio.empty(), single = !of.denominators || of.denominators_of == PolicyLoss::Of::all;
  double denominator = of.denominator;
  if (of.denominators && single) {
    denominator = of.denominators[0];
  } else if (single && denominator == 0.0) {
    const int64_t count = of.mask == nullptr ? h.tokens : group_kernels().count(of.mask, h.tokens, h.tokens);
    denominator = count > 1 ? static_cast<double>(count) : 1.0;
  }
  const int64_t blocks = (last - first + TOKENS - 1) / TOKENS, shares = (blocks + BLOCKS - 1) / BLOCKS;
  std::vector<TokenSums> sums(static_cast<size_t>(shares), nothing());
  parallel_for(shares, 1, threads, [&](int64_t share, int64_t last_share) {
    for (; share < last_share; ++share) {
      alignas(64) double ratio[TOKENS], by[TOKENS], over[TOKENS];
      for (double& x : over) x = single ? denominator : 1.0;
      for (int i = 0; i < TOKENS; ++i) ratio[i] = by[i] = 1.0;
      for (int64_t block = share * BLOCKS; block < std::min((share + 1) * BLOCKS, blocks); ++block) {
        const int64_t begin = first + block * TOKENS, end = std::min(begin + TOKENS, last);
        if (grouped) {
          groups.runs(begin, end, [&](int64_t g, int64_t from, int64_t to) {
            std::fill(ratio + (from - begin), ratio + (to - begin), of_group.ratio[g]);
            std::fill(by + (from - begin), by + (to - begin), of_group.narrower[g]);
          });
        }
        if (!single && of.denominators_of == PolicyLoss::Of::sequence) {
          sequences.runs(begin, end, [&](int64_t b, int64_t from, int64_t to) {
            std::fill(over + (from - begin), over + (to - begin), of.denominators[b]);
          });
        } else if (!single) {
          for (int64_t t = begin; t < end; ++t) over[t - begin] = of.denominators[t];
        }
        kernels.loss(of, begin, end - begin, grouped ? ratio : nullptr, by, over, grad_logp, grad_entropy, &sums[share]);
      }
    }
  });
  TokenSums all = nothing();
  for (const TokenSums& part : sums) {
    all.tokens += part.tokens;
    all.low += part.low;
    all.high += part.high;
    all.loss += part.loss;
    all.ratio += part.ratio;
    all.ratio_squared += part.ratio_squared;
    all.kl_old += part.kl_old;
    all.kl_ref += part.kl_ref;
    all.entropy += part.entropy;
    all.smallest = smaller(part.smallest, all.smallest);
    all.largest = larger(part.largest, all.largest);
  }
  return all;
}

}  // namespace

void policy_loss(const PolicyLoss& of, void* loss, void* metrics, void* grad_logp, void* grad_entropy, int threads) {
  of.hierarchy.check();
  const TokenSums all = tokens_loss(of, group_ratios(of, threads), 0, of.hierarchy.tokens, grad_logp, grad_entropy, threads);
  if (of.logp.dtype == Dtype::float64) {
    write<double>(all, loss, metrics);
  } else {
    write<float>(all, loss, metrics);
  }
}

void policy_loss_gradients(const PolicyLoss& of, int64_t first, int64_t last, void* grad_logp, void* grad_entropy, int threads) {
  tokens_loss(of, {}, first, last, grad_logp, grad_entropy, threads);
}

}  // namespace acpo
