// Reasoning steps from token ids: scores of the text (automaton.h), forking tokens, the answer span, the best partition.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "automaton.h"
#include "partition.h"

namespace acpo {

// A packed batch: sequence b holds the ids [offsets[b], offsets[b + 1]). ids are int32, or int64 where wide.
struct PackedIds {
  const void* ids;
  bool wide;
  const int64_t* offsets;
  int64_t sequences;

  int64_t tokens() const { return offsets[sequences]; }
};

struct Evidence {
  const float* scores = nullptr;          // [N], from Segmenter::read; nullptr: scan now
  const float* entropy = nullptr;         // [N]; entropy[t] of the prediction OF token t
  const double* threshold = nullptr;      // nullptr: the 0.9-quantile of the sequence
  const int64_t* answer_start = nullptr;  // [B]; -1: detect, or with `detected` there is none
  bool detected = false;                  // answer_start is what Segmenter::read found
};

struct Cut {
  std::vector<int32_t> ends;   // inside the sequence, exclusive
  std::vector<uint8_t> rules;  // why each one is there, on request
  bool terminal = false;
};

using RuleScores = std::array<int32_t, kTextRules>;

class Segmenter {
 public:
  Segmenter(Automaton automaton, Limits limits, int64_t target_tokens, float fork_score);

  // out[t] := the score of the boundary after token t; answer_start[b] := where the answer of sequence b is detected, -1: nowhere.
  void read(const PackedIds& batch, int threads, float* out, int64_t* answer_start) const;
  std::vector<Cut> cut(const PackedIds& batch, const Evidence& evidence, bool explain, int threads) const;

 private:
  struct Scratch;
  void check(const PackedIds& batch, int threads) const;
  Marks scan(const PackedIds& batch, int64_t b, uint8_t* rules) const;
  const RuleScores& score_rules(const Marks& marks) const { return rule_scores_[marks.monologue]; }
  int64_t answer(const Marks& marks, int64_t count, const uint8_t* rules) const;
  void forks(const float* entropy, int64_t count, int64_t reasoning, const double* threshold, Scratch& scratch) const;
  int64_t price(int64_t reasoning, Scratch& scratch) const;
  Cut cut_one(const PackedIds& batch, int64_t b, const Evidence& evidence, bool explain, Scratch& scratch) const;

  Automaton automaton_;
  Limits limits_;
  int64_t target_tokens_;
  int32_t fork_score_;
  RuleScores rule_scores_[2];  // of a text and of a monologue
};

}  // namespace acpo
