// The ragged hierarchy on the CPU: tokens in segments, segments in sequences, as offsets. Work is balanced by tokens, whatever the
// lengths of the groups, and no result depends on the number of threads: a group is cut at fixed distances from its own first token.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "logprob_entropy.h"
#include "threads.h"

namespace acpo {

// One value a token, segment or sequence, read where it lies: a float tensor of one dimension. data == nullptr: not given.
struct Values {
  const void* data;
  Dtype dtype;
  int64_t stride;  // in elements

  explicit operator bool() const { return data != nullptr; }
  double operator[](int64_t i) const;
};

struct Hierarchy {
  const int64_t* token_offsets;     // [segments + 1]
  const int64_t* sequence_offsets;  // [sequences + 1]
  int64_t tokens, segments, sequences;

  // Throws std::invalid_argument unless both start at 0, do not decrease and end at `tokens` and `segments`: the offsets were checked
  // when the Segments object was made, and could have been written to since.
  void check() const;
};

// The segments, or the sequences, as ranges of tokens.
struct Groups {
  const int64_t* offsets;
  const int64_t* through;  // null for segments; for sequences where each one begins in `offsets`
  int64_t count, tokens;

  Groups(const Hierarchy& h, bool sequences)
      : offsets(h.token_offsets),
        through(sequences ? h.sequence_offsets : nullptr),
        count(sequences ? h.sequences : h.segments),
        tokens(h.tokens) {}

  int64_t begin(int64_t g) const { return offsets[through == nullptr ? g : through[g]]; }
  int64_t end(int64_t g) const { return begin(g + 1); }

  // The group that holds token t.
  int64_t of(int64_t t) const {
    int64_t low = 0, high = count;  // begin(low) <= t, begin(high) > t or high == count
    while (high - low > 1) {
      const int64_t middle = low + (high - low) / 2;
      (begin(middle) <= t ? low : high) = middle;
    }
    return low;
  }

  // run(g, first, last) for each group's part of the tokens [first, last), in order; empty groups are left out.
  template <class Run>
  void runs(int64_t first, int64_t last, Run run) const {
    for (int64_t g = first < last ? of(first) : count; first < last; ++g) {
      const int64_t to = std::min(end(g), last);
      if (to > first) run(g, first, to);
      first = std::max(first, to);
    }
  }
};

constexpr int64_t PIECE = 8192;        // tokens: a longer group is added up in pieces of this many
constexpr int64_t SHARE = 1 << 15;     // tokens that a thread takes at a time: some 10 us, what it costs to wake it
constexpr int64_t SERIAL = 2 * SHARE;  // work below this stays on the caller's thread

// part(channel, group, begin, end) -> Part over the tokens of one group or a piece of it; Part::operator+= joins pieces in their order;
// done(channel, group, Part). Each channel's groups, on at most `threads` threads.
template <class Part, class OfTokens, class Done>
void reduce(const Groups& groups, int64_t channels, int threads, OfTokens part, Done done) {
  // A group's place on the axis that is shared out: its first token plus its number, so that empty groups count for something and
  // no two groups lie in one place.
  const auto place = [&](int64_t g) { return groups.begin(g) + g; };
  const int64_t length = groups.tokens + groups.count, shares = (length + SHARE - 1) / SHARE;
  struct Long {
    int64_t group, slot;
  };
  std::vector<Long> longs;
  int64_t slots = 0;
  if (groups.tokens > PIECE) {
    for (int64_t g = 0; g < groups.count; ++g) {
      const int64_t n = groups.end(g) - groups.begin(g);
      if (n <= PIECE) continue;
      longs.push_back({g, slots});
      slots += (n + PIECE - 1) / PIECE;
    }
  }
  std::vector<Part> pieces(static_cast<size_t>(slots * channels));
  const auto slot_of = [&](int64_t g) {
    return std::lower_bound(longs.begin(), longs.end(), g, [](const Long& l, int64_t group) { return l.group < group; })->slot;
  };
  const int64_t items = shares * channels;
  parallel_for(items, 1, channels * length <= SERIAL ? 1 : threads, [&](int64_t item, int64_t last_item) {
    for (; item < last_item; ++item) {
      const int64_t channel = item / shares, first = item % shares * SHARE, last = std::min(first + SHARE, length);
      int64_t low = 0, high = groups.count;  // the first group at or behind `first`
      while (low < high) {
        const int64_t middle = low + (high - low) / 2;
        if (place(middle) < first) {
          low = middle + 1;
        } else {
          high = middle;
        }
      }
      if (low > 0) --low;  // the one before may have pieces here
      int64_t end = groups.begin(low);
      for (int64_t g = low; g < groups.count; ++g) {
        const int64_t begin = end;
        if (begin + g >= last) break;
        end = groups.end(g);
        if (end - begin <= PIECE) {
          if (begin + g >= first) done(channel, g, part(channel, g, begin, end));
          continue;
        }
        const int64_t slot = channel * slots + slot_of(g);
        for (int64_t k = 0; begin + k * PIECE < end; ++k) {
          const int64_t at = begin + g + k * PIECE;
          if (at < first) continue;
          if (at >= last) break;
          pieces[slot + k] = part(channel, g, begin + k * PIECE, std::min(begin + (k + 1) * PIECE, end));
        }
      }
    }
  });
  for (int64_t channel = 0; channel < channels; ++channel) {
    for (size_t i = 0; i < longs.size(); ++i) {
      const int64_t next = i + 1 < longs.size() ? longs[i + 1].slot : slots;
      Part all = pieces[channel * slots + longs[i].slot];
      for (int64_t k = longs[i].slot + 1; k < next; ++k) all += pieces[channel * slots + k];
      done(channel, longs[i].group, all);
    }
  }
}

}  // namespace acpo
