// Where the text behind token ids may be cut: one automaton over bytes that runs across token borders.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace acpo {

// What put a boundary there. The first ones come from the text; the rest are added by the segmenter.
enum class Rule : uint8_t { length, lead, sentence, marker, line, step, paragraph, think, entropy, answer, end, score };
constexpr int kTextRules = 8;  // length (no rule: score 0) .. think

// What a pattern means where it is found; a trie node holds several as bits.
namespace pattern {
constexpr uint8_t marker = 1;        // a discourse marker: at the start of a clause, boundary before it
constexpr uint8_t head = 2;          // "Step 1": at the start of a line, makes the line break a step head
constexpr uint8_t abbreviation = 4;  // its full stop ends no sentence
constexpr uint8_t answer = 8;        // "answer is": the sentence that holds it states the answer
constexpr uint8_t boxed = 16;        // "\boxed{"
constexpr uint8_t think_open = 32;
constexpr uint8_t think_close = 64;
constexpr uint8_t aloud = 128;       // "Hmm", "let me": its author thinks aloud
}  // namespace pattern

// All patterns as one trie over byte classes (bytes that occur in no pattern share class 0).
class Trie {
 public:
  explicit Trie(const std::vector<std::pair<std::string, uint8_t>>& patterns);
  // The child of a node, 0 where there is none (0 is the root, which is nobody's child).
  uint16_t child(uint16_t node, uint8_t byte) const { return next_[node * width_ + class_[byte]]; }
  uint8_t payload(uint16_t node) const { return payload_[node]; }

 private:
  std::array<uint8_t, 256> class_{};
  size_t width_ = 1;
  std::vector<uint16_t> next_;
  std::vector<uint8_t> payload_;
};

// What one sequence tells beside its boundaries: where its answer may begin, as token indices (-1 where there is no such mark).
struct Marks {
  int64_t boxed = -1;        // the sentence of the last \boxed{
  int64_t stated = -1;       // the sentence of the last "answer is", "Answer:", ...
  int64_t after_think = -1;  // the token after </think>
  bool thinking = false;     // <think> is still open at the end: a truncated rollout
  bool monologue = false;    // the text thinks aloud: its steps are sentences
};

class Automaton {
 public:
  // bytes: of all tokens in a row, lengths[i] of token i; ids in [lengths.size(), vocab_size) are opaque (no bytes).
  // weights: the score of each text rule; where two rules meet at one token the heavier one stays.
  Automaton(std::string_view bytes, std::span<const int64_t> lengths, int64_t vocab_size, std::vector<std::pair<std::string, uint8_t>> patterns,
            std::array<float, kTextRules> weights);

  int64_t vocab_size() const { return vocab_size_; }
  float weight(uint8_t rule) const { return weights_[rule]; }

  // rules[t] := the Rule of the boundary after token t (length: none). Ids must lie in [0, vocab_size).
  template <class Id>
  Marks scan(const Id* ids, int64_t count, uint8_t* rules) const;

 private:
  friend class Scan;
  // 8 bytes a vocabulary entry beside its text: enough to skip a plain token without reading it.
  struct Token {
    uint32_t begin;      // of its text; the next entry's begin ends it
    uint8_t plain;       // holds nothing that could begin or end anything, in a quiet state
    uint8_t solid;       // it has a byte that is not a space
    uint8_t last;        // its last byte
    uint8_t last_solid;  // its last byte that is not a space
  };
  bool is_plain(std::string_view text) const;

  int64_t vocab_size_;
  std::array<float, kTextRules> weights_;
  Trie trie_;
  std::string text_;
  std::vector<Token> tokens_;  // vocab_size + 1
};

}  // namespace acpo
