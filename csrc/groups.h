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
  // when the Segments object was made, and could have been written to since. Returns the most tokens in a segment, segments in a sequence.
  struct Most {
    int64_t tokens, segments;
  };
  Most check() const;
};

// The segments, or the sequences, as ranges of tokens.
struct Groups {
  const int64_t* offsets;
  const int64_t* through;  // null for segments; for sequences where each one begins in `offsets`
  int64_t count, tokens;

  Groups(const int64_t* offsets, int64_t count, int64_t tokens) : offsets(offsets), through(nullptr), count(count), tokens(tokens) {}
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

// How work is cut, in items of a group.
struct Grain {
  int64_t piece;   // a longer group is cut into pieces of this many
  int64_t share;   // what a thread takes at a time: some 10 us, what it costs to wake it
  int64_t serial;  // work up to this stays on the caller's thread
};
constexpr Grain TOKENS_GRAIN = {8192, 1 << 15, 1 << 16}, SEGMENTS_GRAIN = {1024, 2048, 4096};

// The groups of each channel, shared out by what they hold: short groups many at a time, the pieces of the long ones one by one.
class Shares {
 public:
  struct Long {
    int64_t group, slot;  // the number of its first piece
  };

  // longest: no group is longer; where that is known and short, none is looked at
  explicit Shares(const Groups& groups, const Grain& grain = TOKENS_GRAIN, int64_t longest = INT64_MAX) : groups_(groups), grain_(grain) {
    for (int64_t g = 0; std::min(longest, groups.tokens) > grain.piece && g < groups.count; ++g) {
      const int64_t n = groups.end(g) - groups.begin(g);
      if (n <= grain.piece) continue;
      longs_.push_back({g, pieces_});
      pieces_ += (n + grain.piece - 1) / grain.piece;
    }
  }

  int64_t pieces() const { return pieces_; }
  const std::vector<Long>& longs() const { return longs_; }

  // shorts(channel, first, last): groups [first, last), none of them long; piece(channel, index among the long groups, number of the piece,
  // begin, end). On at most `threads` threads; each short group comes up once and whole, each piece once.
  template <class Shorts, class Piece>
  void run(int64_t channels, int threads, Shorts shorts, Piece piece) const {
    const int64_t length = groups_.tokens + groups_.count, share = grain_.share, shares = (length + share - 1) / share;
    const auto item = [&](int64_t channel, int64_t part) {
      if (part >= shares) {
        const int64_t number = part - shares;
        const auto behind = std::upper_bound(longs_.begin(), longs_.end(), number, [](int64_t at, const Long& l) { return at < l.slot; });
        const auto [group, slot] = behind[-1];
        const int64_t begin = groups_.begin(group) + (number - slot) * grain_.piece;
        piece(channel, static_cast<size_t>(behind - longs_.begin() - 1), number, begin, std::min(begin + grain_.piece, groups_.end(group)));
        return;
      }
      int64_t first = from(part * share);
      const int64_t last = from(std::min((part + 1) * share, length));
      for (auto l = std::lower_bound(longs_.begin(), longs_.end(), first, [](const Long& x, int64_t g) { return x.group < g; });
           l != longs_.end() && l->group < last; ++l) {
        if (first < l->group) shorts(channel, first, l->group);
        first = l->group + 1;
      }
      if (first < last) shorts(channel, first, last);
    };
    const int64_t parts = shares + pieces_;
    parallel_for(parts * channels, 1, channels * length <= grain_.serial ? 1 : threads, [&](int64_t i, int64_t end) {
      for (; i < end; ++i) item(i / parts, i % parts);
    });
  }

  // done(channel, index, Part) of each long group: its pieces added up in their order.
  template <class Part, class Done>
  void join(int64_t channels, const std::vector<Part>& of_pieces, Done done) const {
    for (int64_t channel = 0; channel < channels; ++channel) {
      for (size_t i = 0; i < longs_.size(); ++i) {
        const int64_t next = i + 1 < longs_.size() ? longs_[i + 1].slot : pieces_;
        Part all = of_pieces[channel * pieces_ + longs_[i].slot];
        for (int64_t k = longs_[i].slot + 1; k < next; ++k) all += of_pieces[channel * pieces_ + k];
        done(channel, i, all);
      }
    }
  }

 private:
  // A group's place on the axis that is shared out is its first token plus its number, so that empty groups count for something and no
  // two groups lie in one place. The first group at or behind `place`:
  int64_t from(int64_t place) const {
    int64_t low = 0, high = groups_.count;
    while (low < high) {
      const int64_t middle = low + (high - low) / 2;
      if (groups_.begin(middle) + middle < place) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  }

  Groups groups_;
  Grain grain_;
  std::vector<Long> longs_;
  int64_t pieces_ = 0;
};

// part(channel, group, begin, end) -> Part over the tokens of one group or a piece of it; Part::operator+= joins pieces in their order;
// done(channel, group, Part). Each channel's groups, on at most `threads` threads.
template <class Part, class OfTokens, class Done>
void reduce(const Groups& groups, const Shares& shares, int64_t channels, int threads, OfTokens part, Done done) {
  std::vector<Part> pieces(static_cast<size_t>(shares.pieces() * channels));
  shares.run(
      channels, threads,
      [&](int64_t channel, int64_t g, int64_t last) {
        for (; g < last; ++g) done(channel, g, part(channel, g, groups.begin(g), groups.end(g)));
      },
      [&](int64_t channel, size_t i, int64_t k, int64_t begin, int64_t end) {
        pieces[channel * shares.pieces() + k] = part(channel, shares.longs()[i].group, begin, end);
      });
  shares.join(channels, pieces, [&](int64_t channel, size_t i, const Part& all) { done(channel, shares.longs()[i].group, all); });
}

}  // namespace acpo
