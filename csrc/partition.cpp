#include "partition.h"

#include <algorithm>
#include <utility>

namespace acpo {
namespace {

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

// At most max_segments, where the best way has more. A way's value depends on each segment alone, and if (b, e) and a
// segment around it are allowed lengths, so are the two that cross: the weights have the Monge property, so the best score
// v(K) of exactly K segments is concave in K, and raising the price until K is among the best counts is exact. The least such
// price, v(K + 1) - v(K), is a whole number; secants of v find it in a few steps.
void solve_limited(const Problem& p, int64_t price, int64_t max_segments, PartitionScratch& s, std::vector<int32_t>& ends) {
  struct Point {
    int64_t price, count, score;  // count: the fewest segments that are best at this price
  };
  const auto at = [&](int64_t price) -> Point {
    solve_counting(p, price, s, s.fewest, 1);
    const int64_t count = s.fewest[p.count];
    return {price, count, s.value[p.count] + price * (count - 1)};
  };
  Point low = at(price);
  const bool raised = low.count > max_segments;  // if not, a way with few enough is as good as any at this very price
  if (raised) {
    // At a price above every score only the lengths ask for cuts; where they ask for bad ones, a better cut more may still pay.
    Point high = at(1 + int64_t{*std::max_element(p.score, p.score + p.count)});
    while (high.count > max_segments) low = high, high = at(2 * high.price);
    while (high.price - low.price > 1) {
      const int64_t secant = (low.score - high.score) / (low.count - high.count);
      if (secant >= high.price) break;  // v is straight between the two
      const Point middle = at(std::max(secant, low.price + 1));
      (middle.count > max_segments ? low : high) = middle;
    }
    price = high.price;
    at(price);
  }
  solve_counting(p, price, s, s.most, -1);  // leaves the same values
  // Backwards from the end, always the latest start of a segment from which the segments left can be spent.
  const size_t first = ends.size();
  int64_t left = max_segments;
  for (int64_t e = p.count; e > 0;) {
    ends.push_back(static_cast<int32_t>(e));
    --left;
    const int64_t wanted = s.value[e] - p.gain(e, price);
    int64_t b = e - p.min_tokens;
    while (s.value[b] != wanted || s.fewest[b] > left || (raised && s.most[b] < left)) --b;
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
  if (solve(p, price, scratch, ends) <= limits.max_segments) return;
  ends.resize(first);
  solve_limited(p, price, limits.max_segments, scratch, ends);
}

}  // namespace acpo
