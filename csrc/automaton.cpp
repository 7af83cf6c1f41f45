#include "automaton.h"

#include <algorithm>
#include <stdexcept>

#include "scan.h"

namespace acpo {

Trie::Trie(const std::vector<std::pair<std::string, uint8_t>>& patterns) {
  for (const auto& [text, bits] : patterns) {
    for (const char c : text) {
      uint8_t& cls = class_[static_cast<uint8_t>(c)];
      if (cls == 0) cls = static_cast<uint8_t>(width_++);
    }
  }
  next_.assign(width_, 0);
  payload_.assign(1, 0);
  for (const auto& [text, bits] : patterns) {
    if (text.empty()) throw std::invalid_argument("markers must not hold an empty string");
    size_t node = 0;
    for (const char c : text) {
      const size_t edge = node * width_ + class_[static_cast<uint8_t>(c)];
      if (next_[edge] == 0) {
        if (payload_.size() > UINT16_MAX) throw std::invalid_argument("markers must fit a trie of 65,536 nodes: give fewer or shorter ones");
        next_[edge] = static_cast<uint16_t>(payload_.size());
        payload_.push_back(0);
        next_.resize(next_.size() + width_, 0);
      }
      node = next_[edge];
    }
    payload_[node] |= bits;
  }
}

Automaton::Automaton(std::string_view bytes, std::span<const int64_t> lengths, int64_t vocab_size,
                     std::vector<std::pair<std::string, uint8_t>> patterns, std::array<float, kTextRules> weights)
    : vocab_size_(vocab_size), weights_(weights), trie_(patterns), text_(bytes) {
  if (bytes.size() > UINT32_MAX) throw std::invalid_argument("the vocabulary's text must be shorter than 4 GiB");
  tokens_.resize(static_cast<size_t>(vocab_size) + 1);
  size_t at = 0;
  for (size_t i = 0; i < tokens_.size(); ++i) {
    const size_t length = i < lengths.size() ? static_cast<size_t>(lengths[i]) : 0;
    const std::string_view text = std::string_view(text_).substr(at, length);
    Token& token = tokens_[i];
    token = {static_cast<uint32_t>(at), is_plain(text), 0, 0, 0};
    for (const char ch : text) {
      const auto c = static_cast<uint8_t>(ch);
      token.last = c;
      if (!bytes::is_space(c)) token.solid = 1, token.last_solid = c;
    }
    at += length;
  }
}

// Plain: only bytes that mean nothing in a quiet state, and no pattern that begins inside it is finished or still open at
// its end, whatever comes before it.
bool Automaton::is_plain(std::string_view text) const {
  if (text.empty()) return false;  // an opaque token is skipped without touching the state
  int solid = 0;
  bool capital = false;
  for (size_t i = 0; i < text.size(); ++i) {
    const auto c = static_cast<uint8_t>(text[i]);
    if (!bytes::is_space(c)) ++solid, capital = bytes::is_upper(c);
    if (c >= 0x80 || (c < 0x20 && c != '\t') || c == '.' || c == '!' || c == '?' || c == '$' || c == '\\' || c == '<') return false;
    if (i > 0 && bytes::is_word(c) && bytes::is_word(static_cast<uint8_t>(text[i - 1]))) continue;
    uint16_t node = 0;
    for (size_t j = i;; ++j) {
      if (j == text.size()) return false;
      node = trie_.child(node, static_cast<uint8_t>(text[j]));
      if (node == 0) break;
      if (trie_.payload(node) != 0) return false;
    }
  }
  return solid != 1 || !capital;  // one capital alone may be an initial: its full stop ends no sentence
}

template <class Id>
Marks Automaton::scan(const Id* ids, int64_t count, uint8_t* rules) const {
  std::fill_n(rules, count, static_cast<uint8_t>(Rule::length));
  Scan state(*this, rules, count);
  for (int64_t t = 0; t < count; ++t) {
    const Token* token = &tokens_[static_cast<size_t>(ids[t])];
    if (token->plain && state.quiet()) {
      state.skip(t, *token);
      continue;
    }
    if (token[1].begin != token->begin) state.feed(t, std::string_view(text_.data() + token->begin, token[1].begin - token->begin));
  }
  return state.finish();
}

template Marks Automaton::scan(const int32_t*, int64_t, uint8_t*) const;
template Marks Automaton::scan(const int64_t*, int64_t, uint8_t*) const;

}  // namespace acpo
