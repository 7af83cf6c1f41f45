#include "partition.h"

#include <algorithm>
#include <utility>

namespace acpo {
namespace {

constexpr int kAims = 8;  // interpolations before secants alone, which cannot stall, go on
constexpr int64_t kUnreachable = INT64_MIN / 2;

struct Problem {
  const int32_t* score;
  int64_t count, min_tokens, max_tokens;

  int64_t gain(int64_t end, int64_t price) const { return end == count ? 0 : score[end - 1] - price; }
};

// value[e] = gain(e) + max of value[b] over e - max <= b <= e - min, by a queue of candidates with falling values: linear.
// Of equal values the queue keeps the latest. Returns the number of segments of the way it appends.
int64_t solve(const Problem& p, int64_t price, PartitionScratch& s, std::vector<int32_t>& ends) {
  s.value.resize(p.count + 1);
  s.from.resize(p.count + 1);
  s.queue.resize(p.count + 1);
  int64_t* value = s.value.data();
  int32_t *from = s.from.data(), *queue = s.queue.data();
  int64_t head = 0, tail = 0;
  value[0] = 0;
  for (int64_t e = 1; e <= p.count; ++e) {
    const int64_t entering = e - p.min_tokens;
    if (entering >= 0 && value[entering] != kUnreachable) {
      while (tail > head && value[queue[tail - 1]] <= value[entering]) --tail;
      queue[tail++] = static_cast<int32_t>(entering);
    }
    if (head < tail && queue[head] < e - p.max_tokens) ++head;  // one enters a step, so at most one leaves
    value[e] = head < tail ? value[queue[head]] + p.gain(e, price) : kUnreachable;
    from[e] = head < tail ? queue[head] : -1;
  }
  const size_t first = ends.size();
  for (int64_t e = p.count; e > 0; e = from[e]) ends.push_back(static_cast<int32_t>(e));
  std::reverse(ends.begin() + first, ends.end());
  return static_cast<int64_t>(ends.size() - first);
}

// The same values with the count carried along: of equal values the fewest (sign 1) or the most (sign -1) segments.
void solve_counting(const Problem& p, int64_t price, PartitionScratch& s, std::vector<int32_t>& counts, int sign) {
  s.value.resize(p.count + 1);
  s.queue.resize(p.count + 1);
  counts.resize(p.count + 1);
  int64_t* value = s.value.data();
  int32_t *segments = counts.data(), *queue = s.queue.data();
  int64_t head = 0, tail = 0;
  value[0] = 0;
  segments[0] = 0;
  for (int64_t e = 1; e <= p.count; ++e) {
    const int64_t entering = e - p.min_tokens;
    if (entering >= 0 && value[entering] != kUnreachable) {
      const auto worse = [&](int32_t b) {
        return value[b] < value[entering] || (value[b] == value[entering] && sign * segments[b] >= sign * segments[entering]);
      };
      while (tail > head && worse(queue[tail - 1])) --tail;
      queue[tail++] = static_cast<int32_t>(entering);
    }
    if (head < tail && queue[head] < e - p.max_tokens) ++head;
    value[e] = head < tail ? value[queue[head]] + p.gain(e, price) : kUnreachable;
    segments[e] = head < tail ? segments[queue[head]] + 1 : 0;
  }
}

// At most max_segments, where the best way at this price has more: `count` segments with a sum of scores `score`. A way's value
// depends on each segment alone, and if (b, e) and a segment around it are allowed lengths, so are the two that cross: the weights
// have the Monge property, so the best score v(K) of exactly K segments is concave in K, and raising the price until K is among the
// best counts is exact: any such price gives the same ways of K segments. The least one is v(K + 1) - v(K), a whole number, or the
// price as it was.
void solve_limited(const Problem& p, int64_t price, int64_t max_segments, int64_t count, int64_t score, PartitionScratch& s,
                   std::vector<int32_t>& ends) {
  struct Point {
    int64_t price, count, score;  // count: the fewest segments that are best at this price
  };
  Point low{price - 1, count, score}, high{};  // low is too low, high is not
  const auto try_price = [&](int64_t at) {
    solve_counting(p, at, s, s.fewest, 1);
    const int64_t fewest = s.fewest[p.count];
    const Point point{at, fewest, s.value[p.count] + at * (fewest - 1)};
    if (fewest > max_segments) {
      low = point;
      return false;
    }
    high = point;
    std::swap(s.fewest, s.from);  // from: the fewest at `high`
    return true;
  };
  // The count falls about evenly from one score to the next one above: the price that leaves max_segments is sought among them.
  std::vector<int32_t>& scores = s.most;
  scores.clear();
  for (int64_t t = 0; t + 1 < p.count; ++t) {
    if (p.score[t] > price) scores.push_back(p.score[t]);
  }
  std::sort(scores.begin(), scores.end());
  const auto rank = [&](int64_t at) { return std::lower_bound(scores.begin(), scores.end(), at) - scores.begin(); };
  const auto size = static_cast<int64_t>(scores.size());
  int64_t first_try = size < max_segments ? price : scores[size - max_segments];
  // At a price above every score only the lengths ask for cuts; where they ask for bad ones, a better cut more may still pay.
  while (!try_price(first_try)) first_try += first_try / 4 + 1;
  for (int tries = 0; high.count < max_segments && high.price - low.price > 1; ++tries) {
    // v is straight between the two points where its slope there is already the higher price.
    const int64_t slope = (low.score - high.score) / (low.count - high.count);
    if (slope >= high.price) break;
    const int64_t below = rank(low.price), above = rank(high.price);
    const int64_t aim = above - (above - below) * (2 * (max_segments - high.count) + 1) / (2 * (low.count - high.count));
    const int64_t at = tries < kAims && above - below > 4 && aim < size ? scores[aim] : slope;
    try_price(std::clamp(at, low.price + 1, high.price - 1));
  }
  const bool raised = high.price > price;  // if not, a way with few enough is as good as any at the price as it was
  price = high.price;
  std::swap(s.fewest, s.from);
  // Where the fewest segments are all that may be spent, the search ended with this very price: the values are there, and whatever
  // is among the fewest can be spent.
  const bool exactly = high.count == max_segments;
  if (!exactly) solve_counting(p, price, s, s.most, -1);  // leaves the same values
  // Backwards from the end, always the latest start of a segment from which the segments left can be spent.
  const size_t first = ends.size();
  int64_t left = max_segments;
  for (int64_t e = p.count; e > 0;) {
    ends.push_back(static_cast<int32_t>(e));
    --left;
    const int64_t wanted = s.value[e] - p.gain(e, price);
    int64_t b = e - p.min_tokens;
    while (s.value[b] != wanted || s.fewest[b] > left || (raised && !exactly && s.most[b] < left)) --b;
    e = b;
  }
  std::reverse(ends.begin() + first, ends.end());
}

}  // namespace

void partition(const int32_t* score, int64_t count, int64_t price, const Limits& limits, PartitionScratch& scratch,
               std::vector<int32_t>& ends) {
  const int64_t most = std::max<int64_t>(1, std::min(limits.max_segments, count / limits.min_tokens));
  const Problem p{score, count, std::min(limits.min_tokens, count), std::max(limits.max_tokens, (count + most - 1) / most)};
  const size_t first = ends.size();
  const int64_t found = solve(p, price, scratch, ends);
  if (found <= limits.max_segments) return;
  ends.resize(first);
  solve_limited(p, price, limits.max_segments, found, scratch.value[count] + price * (found - 1), scratch, ends);
}

}  // namespace acpo
