// The best way to cut one sequence: an exact dynamic programme over its token boundaries.
#pragma once

#include <cstdint>
#include <vector>

namespace acpo {

// Scores are whole multiples of 2^-20, so that sums are exact and a tie is a tie on every machine.
constexpr int kScoreBits = 20;

struct Limits {
  int64_t min_tokens, max_tokens, max_segments;
};

// Buffers of one thread, kept between sequences: 24 bytes a token, 32 where the count is limited.
struct PartitionScratch {
  std::vector<int64_t> value;
  std::vector<int32_t> from, queue, fewest, most;
};

// Appends to `ends` the exclusive ends of the segments of count >= 1 tokens. Over all ways with
//   min_tokens <= n_k <= max_tokens and K <= max_segments
// it maximises sum(score[e - 1] - price) over the inner ends e, where score[t] >= 0 belongs to the boundary after token t;
// of equal ways the one whose last inner end is latest, then the one before it, and so on. Fewer than min_tokens tokens are
// one segment. max_tokens is raised to the least value with which a way exists.
void partition(const int32_t* score, int64_t count, int64_t price, const Limits& limits, PartitionScratch& scratch, std::vector<int32_t>& ends);

}  // namespace acpo
