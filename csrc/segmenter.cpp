#include "segmenter.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <functional>
#include <limits>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

#include "threads.h"

namespace acpo {
namespace {

constexpr double kQuantile = 0.9;     // a tenth of the tokens fork: method.md, r = 0.1
// A segment may be this many times target_tokens long on average before finer boundaries pay: paragraphs are steps as their
// author made them (ProcessBench's average 40 to 166 tokens in nine of ten traces, at most 256 in 99 of 100), finer ones only
// stand in for them.
constexpr int64_t kParagraphSlack = 4, kSlack = 2;
constexpr float kMaxScore = 64;       // keeps every sum of the dynamic programme inside 63 bits

int32_t fixed(float score) { return static_cast<int32_t>(std::lround(static_cast<double>(score) * (1 << kScoreBits))); }
float floating(int32_t score) { return static_cast<float>(score) / (1 << kScoreBits); }

// About 64 ranges a thread: sequences differ in length.
int64_t grain(int64_t sequences, int threads) { return std::max<int64_t>(1, sequences / (int64_t{64} * std::max(threads, 1))); }

// The first value outside its range, or -1. The place is looked for only where there is one: without it the loop runs at the speed of
// memory, on every thread.
template <class T, class Outside>
int64_t first_outside(const T* values, int64_t count, int threads, Outside outside) {
  std::atomic<bool> found{false};
  parallel_for(count, int64_t{1} << 16, threads, [&](int64_t begin, int64_t end) {
    bool any = false;
    for (int64_t t = begin; t < end; ++t) any |= outside(values[t]);
    if (any) found.store(true, std::memory_order_relaxed);
  });
  return found ? std::find_if(values, values + count, outside) - values : -1;
}

template <class Id>
void check_ids(const Id* ids, int64_t count, int64_t vocab_size, int threads) {
  using Unsigned = std::make_unsigned_t<Id>;  // in which a negative id is very large
  const int64_t t = first_outside(ids, count, threads, [&](Id id) { return static_cast<Unsigned>(id) >= static_cast<Unsigned>(vocab_size); });
  if (t < 0) return;
  throw std::invalid_argument("ids must lie in [0, vocab_size) with vocab_size = " + std::to_string(vocab_size) + ", got " +
                              std::to_string(ids[t]) + " at index " + std::to_string(t));
}

void check_values(const char* name, const float* values, int64_t count, float low, float high, const char* wanted, int threads) {
  const int64_t t = first_outside(values, count, threads, [&](float x) { return !(x >= low && x <= high); });
  if (t < 0) return;
  throw std::invalid_argument(std::string(name) + " must be " + wanted + ", got " + std::to_string(values[t]) + " at index " + std::to_string(t));
}

// Of equal boundaries the one that closes the longer stretch counts more, by a 1024th a token: where not all can be taken (min_tokens,
// max_segments) the cuts spread over the text. At most 112 tokens count, so that the sum stays below half the distance (1/8) of the
// two nearest of the default scores: the price still lies between them.
constexpr int64_t kStretchMost = 112;
constexpr int kStretchBits = kScoreBits - 10;

void prefer_long_stretches(int64_t count, int32_t* score) {
  int64_t last = -1;
  for (int64_t t = 0; t < count; ++t) {
    if (score[t] == 0) continue;
    score[t] += static_cast<int32_t>(std::min(t - last, kStretchMost)) << kStretchBits;
    last = t;
  }
}

}  // namespace

// Buffers of one thread, kept between its sequences; 29 bytes a token of the longest.
struct Segmenter::Scratch {
  std::vector<uint8_t> rules;
  std::vector<int32_t> score;
  PartitionScratch partition;
};

Segmenter::Segmenter(Automaton automaton, Limits limits, int64_t target_tokens, float fork_score)
    : automaton_(std::move(automaton)), limits_(limits), target_tokens_(target_tokens), fork_score_(fixed(fork_score)) {
  for (uint8_t r = 0; r < kTextRules; ++r) rule_scores_[0][r] = fixed(automaton_.weight(r));
  // Who thinks aloud takes a step with a sentence: it is worth a paragraph there, and all above it rises with it.
  rule_scores_[1] = rule_scores_[0];
  const int32_t lift = std::max(0, rule_scores_[0][static_cast<size_t>(Rule::paragraph)] - rule_scores_[0][static_cast<size_t>(Rule::sentence)]);
  for (auto r = static_cast<size_t>(Rule::sentence); r < kTextRules; ++r) {
    rule_scores_[1][r] = rule_scores_[0][r] == 0 ? 0 : std::min(rule_scores_[0][r] + lift, fixed(kMaxScore));
  }
}

void Segmenter::check(const PackedIds& batch, int threads) const {
  for (int64_t b = 0; b < batch.sequences; ++b) {
    if (batch.offsets[b + 1] - batch.offsets[b] > INT32_MAX / 2) {
      throw std::invalid_argument("cu_seqlens: a sequence must be shorter than 2^30 tokens");
    }
  }
  if (batch.wide) {
    check_ids(static_cast<const int64_t*>(batch.ids), batch.tokens(), automaton_.vocab_size(), threads);
  } else {
    check_ids(static_cast<const int32_t*>(batch.ids), batch.tokens(), automaton_.vocab_size(), threads);
  }
}

Marks Segmenter::scan(const PackedIds& batch, int64_t b, uint8_t* rules) const {
  const int64_t begin = batch.offsets[b], count = batch.offsets[b + 1] - begin;
  if (batch.wide) return automaton_.scan(static_cast<const int64_t*>(batch.ids) + begin, count, rules);
  return automaton_.scan(static_cast<const int32_t*>(batch.ids) + begin, count, rules);
}

void Segmenter::read(const PackedIds& batch, int threads, float* out, int64_t* answer_start) const {
  check(batch, threads);
  parallel_for(batch.sequences, grain(batch.sequences, threads), threads, [&](int64_t first, int64_t last) {
    std::vector<uint8_t> rules;
    for (int64_t b = first; b < last; ++b) {
      const int64_t begin = batch.offsets[b], count = batch.offsets[b + 1] - begin;
      rules.resize(count);
      const Marks marks = scan(batch, b, rules.data());
      std::array<float, kTextRules> scores;
      std::transform(score_rules(marks).begin(), score_rules(marks).end(), scores.begin(), floating);
      for (int64_t t = 0; t < count; ++t) out[begin + t] = scores[rules[t]];
      answer_start[b] = answer(marks, count, rules.data());
    }
  });
}

std::vector<Cut> Segmenter::cut(const PackedIds& batch, const Evidence& evidence, bool explain, int threads) const {
  check(batch, threads);
  const float largest = std::numeric_limits<float>::max();
  if (evidence.entropy) check_values("entropy", evidence.entropy, batch.tokens(), -largest, largest, "finite", threads);
  if (evidence.scores) check_values("scores", evidence.scores, batch.tokens(), 0, kMaxScore, "in [0, 64]", threads);
  std::vector<Cut> cuts(batch.sequences);
  parallel_for(batch.sequences, grain(batch.sequences, threads), threads, [&](int64_t first, int64_t last) {
    Scratch scratch;
    for (int64_t b = first; b < last; ++b) cuts[b] = cut_one(batch, b, evidence, explain, scratch);
  });
  return cuts;
}

Cut Segmenter::cut_one(const PackedIds& batch, int64_t b, const Evidence& evidence, bool explain, Scratch& s) const {
  const int64_t begin = batch.offsets[b], count = batch.offsets[b + 1] - begin;
  Cut cut;
  if (count == 0) return cut;
  int64_t start = evidence.answer_start ? evidence.answer_start[b] : -1;
  const bool detect = start < 0 && !evidence.detected;
  s.score.resize(count);
  s.rules.resize(count);
  if (!evidence.scores || detect || explain) {
    const Marks marks = scan(batch, b, s.rules.data());
    const RuleScores& scores = score_rules(marks);
    for (int64_t t = 0; t < count; ++t) s.score[t] = scores[s.rules[t]];
    if (detect) start = answer(marks, count, s.rules.data());
  }
  if (evidence.scores) {
    for (int64_t t = 0; t < count; ++t) s.score[t] = fixed(evidence.scores[begin + t]);
  }
  Limits limits = limits_;
  if (start > 0 && limits.max_segments == 1) start = -1;  // one segment a sequence leaves no room for a span of its own
  cut.terminal = start >= 0;
  const int64_t reasoning = start < 0 ? count : start;
  if (reasoning > 0) {
    std::vector<int32_t>& kept = s.partition.queue;
    kept.clear();
    if (evidence.entropy) forks(evidence.entropy + begin, count, reasoning, evidence.threshold, s);
    const int64_t lambda = price(reasoning, s);
    prefer_long_stretches(reasoning, s.score.data());
    for (const int32_t t : kept) {
      if (s.score[t] == 0 && explain) s.rules[t] = static_cast<uint8_t>(Rule::entropy);
      s.score[t] += fork_score_;
    }
    if (cut.terminal) --limits.max_segments;
    partition(s.score.data(), reasoning, lambda, limits, s.partition, cut.ends);
  }
  if (cut.terminal) cut.ends.push_back(static_cast<int32_t>(count));
  if (explain) {
    for (const int32_t e : cut.ends) {
      uint8_t rule = s.rules[e - 1];
      // The caller's own scores need not agree with the text.
      if (evidence.scores && rule != static_cast<uint8_t>(Rule::entropy) && s.score[e - 1] == 0) rule = static_cast<uint8_t>(Rule::length);
      if (rule == static_cast<uint8_t>(Rule::length) && s.score[e - 1] > 0) rule = static_cast<uint8_t>(Rule::score);
      cut.rules.push_back(e == count ? static_cast<uint8_t>(Rule::end) : e == start ? static_cast<uint8_t>(Rule::answer) : rule);
    }
  }
  return cut;
}

// Where the detected answer span begins, -1: none. A mark farther than max_tokens from the end states no FINAL answer, and
// a rollout that is still thinking has none. The text after </think> is the answer where nothing in it says more exactly;
// where it is longer than a segment may be, its best boundary inside the last max_tokens begins the span.
int64_t Segmenter::answer(const Marks& marks, int64_t count, const uint8_t* rules) const {
  const int64_t earliest = count - limits_.max_tokens;
  if (marks.thinking) return -1;
  // A sentence that ends in the last token begins its successor behind it, even where that token also states the answer: then it is the answer.
  if (marks.boxed >= 0 && marks.boxed >= earliest) return std::min(marks.boxed, count - 1);
  if (marks.stated >= 0 && marks.stated >= earliest) return std::min(marks.stated, count - 1);
  if (marks.after_think < 0 || marks.after_think >= count) return -1;
  if (marks.after_think >= earliest) return marks.after_think;
  const RuleScores& scores = score_rules(marks);
  int64_t best = earliest;
  for (int64_t start = earliest; start < count; ++start) {
    if (scores[rules[start - 1]] > scores[rules[best - 1]]) best = start;
  }
  return scores[rules[best - 1]] > 0 ? best : -1;
}

// Collects in partition.queue the tokens after which the policy forks: entropy of the next one at or above the threshold
// (and above 0), and the highest within min_tokens on either side, of equal ones the last. `reasoning` tokens are cut.
void Segmenter::forks(const float* entropy, int64_t count, int64_t reasoning, const double* threshold, Scratch& s) const {
  double level = 0;
  if (threshold) {
    level = static_cast<float>(*threshold);  // as the entropies are: one that equals it forks
  } else {
    // The quantile with linear interpolation. Floats that are not negative are ordered as their bits are.
    std::vector<int32_t>& bits = s.partition.from;
    bits.resize(count);
    for (int64_t t = 0; t < count; ++t) bits[t] = std::bit_cast<int32_t>(entropy[t] > 0 ? entropy[t] : 0.0f);
    const double position = kQuantile * static_cast<double>(count - 1);
    const auto at = bits.begin() + static_cast<int64_t>(position);
    std::nth_element(bits.begin(), at, bits.end());
    level = std::bit_cast<float>(*at);
    if (at + 1 != bits.end()) {
      const double above = std::bit_cast<float>(*std::min_element(at + 1, bits.end()));
      level += (position - std::floor(position)) * (above - level);
    }
  }
  // A stack of forking tokens with falling entropy: below a token stands the nearest one before it that beats it, and a
  // token is popped by the nearest one after it that beats it. Dropped ones are marked by their complement.
  std::vector<int32_t>&kept = s.partition.queue, &stack = s.partition.fewest;
  stack.clear();
  for (int64_t t = 1; t < reasoning; ++t) {
    if (!(entropy[t] > 0 && entropy[t] >= level)) continue;
    bool beaten = false;
    const auto index = static_cast<int32_t>(kept.size());
    const auto token = [&](int32_t i) { return int64_t{kept[i] < 0 ? ~kept[i] : kept[i]} + 1; };
    while (!stack.empty() && entropy[token(stack.back())] <= entropy[t]) {
      const int32_t j = stack.back();
      if (kept[j] >= 0 && t - token(j) < limits_.min_tokens) kept[j] = ~kept[j];
      stack.pop_back();
    }
    if (!stack.empty()) beaten = t - token(stack.back()) < limits_.min_tokens;
    const auto boundary = static_cast<int32_t>(t - 1);
    kept.push_back(beaten ? ~boundary : boundary);
    stack.push_back(index);
  }
  std::erase_if(kept, [](int32_t t) { return t < 0; });
}

// lambda. Every boundary of one level of score pays or none does, so the price lies halfway between two levels. The level that
// pays is the paragraph's if cutting at paragraphs alone leaves segments of at most kParagraphSlack target_tokens on average;
// else the highest one that, with all above it, leaves at most kSlack target_tokens; else all pay. So a text of paragraphs is
// cut into paragraphs, one long paragraph into lines or sentences, and a column of short lines into lines. A fork adds to a
// boundary's score but not to its level: forks make no level of their own beside boundaries of the text.
int64_t Segmenter::price(int64_t reasoning, Scratch& s) const {
  std::vector<int32_t>& levels = s.partition.from;
  levels.clear();
  for (int64_t t = 0; t + 1 < reasoning; ++t) {
    if (s.score[t] > 0) levels.push_back(s.score[t]);
  }
  for (const int32_t t : s.partition.queue) {
    if (s.score[t] == 0 && fork_score_ > 0) levels.push_back(fork_score_);
  }
  if (levels.empty()) return int64_t{1} << kScoreBits;  // only lengths count: any price asks for as few cuts as possible
  const int32_t paragraph = rule_scores_[0][static_cast<size_t>(Rule::paragraph)];
  const auto paragraphs = std::count_if(levels.begin(), levels.end(), [&](int32_t l) { return l >= paragraph; });
  int32_t level = paragraph;
  if (paragraphs < std::max<int64_t>(1, reasoning / (kParagraphSlack * target_tokens_))) {
    const auto wanted = std::max<int64_t>(1, reasoning / (kSlack * target_tokens_));
    const auto at = levels.begin() + std::min<int64_t>(wanted, static_cast<int64_t>(levels.size())) - 1;
    std::nth_element(levels.begin(), at, levels.end(), std::greater<>());
    level = std::min(*at, paragraph);
  }
  int32_t lower = 0;
  for (const int32_t l : levels) {
    if (l < level) lower = std::max(lower, l);
  }
  return (int64_t{level} + lower) / 2;
}

}  // namespace acpo
