// The automaton's state while it reads one sequence.
#pragma once

#include "automaton.h"

namespace acpo {

namespace bytes {
constexpr bool is_space(uint8_t c) { return c == ' ' || (c >= '\t' && c <= '\r'); }
constexpr bool is_digit(uint8_t c) { return c >= '0' && c <= '9'; }
constexpr bool is_upper(uint8_t c) { return c >= 'A' && c <= 'Z'; }
constexpr bool is_letter(uint8_t c) { return is_upper(c) || (c >= 'a' && c <= 'z'); }
constexpr bool is_word(uint8_t c) { return is_letter(c) || is_digit(c); }
// One byte that stands for a character outside ASCII.
constexpr uint8_t kLetter = 0x80, kSymbol = 0x81, kSentenceEnd = 0x82, kCloser = 0x83, kSpace = 0x84;
uint8_t classify(const uint8_t* c, int length);
}  // namespace bytes

class Scan {
 public:
  Scan(const Automaton& automaton, uint8_t* rules, int64_t count) : a_(automaton), rules_(rules), count_(count) {}

  // In a quiet state a plain token changes nothing but the bytes last seen.
  bool quiet() const { return quiet_; }
  void skip(int64_t t, const Automaton::Token& token) {
    prev_ = token.last;
    if (token.solid) {
      solid_ = token.last_solid;
      solid_token_ = t;
      content_ = true;
    }
  }
  void feed(int64_t t, std::string_view text);
  Marks finish();

 private:
  // text, dollar and blank run the rules of text. In dollar ($.. that may still turn out to be a price) their results are held
  // back until the closing $ drops them or the end of the line releases them; in blank (after a blank line inside \[..) until the
  // closing \] drops them or anything that no formula holds releases them. info is the rest of the line that opens a fence: one more
  // backtick in it, and it was code in the text.
  enum class Mode : uint8_t { text, dollar, blank, paren, bracket, display, info, fence };
  enum class Head : uint8_t { off, start, bullet, star, hash, number, number_end, item, tick };  // item: behind a list mark and its space
  enum class Dollar : uint8_t { none, open, close, display };
  struct Held {
    Rule rule;
    int64_t token;
  };

  // What a boundary after `token` is about to change, so that a formula can take it back.
  struct Before {
    int64_t token = -1, sentence = 0, previous_sentence = 0, sentences = 1, paragraph = 0;
    uint8_t rule = 0;
  };

  bool holds_back() const { return mode_ == Mode::dollar || mode_ == Mode::blank; }
  bool reads_text() const { return mode_ == Mode::text || holds_back(); }
  bool in_fence() const { return mode_ == Mode::info || mode_ == Mode::fence; }
  void byte(uint8_t c);
  void newline();
  void space(uint8_t c);
  void solid(uint8_t c);
  void wide(uint8_t c);
  bool clause_here() const;
  void begin_solid(uint8_t c);
  void resolve_sentence(uint8_t c);
  bool resolve_dollar(uint8_t c);
  void full_stop(uint8_t c);
  void line_head(uint8_t c);
  void fence_tick(uint8_t c);
  void become_step();
  void line_break(uint8_t c);
  Before before(int64_t token) const { return {token, sentence_, previous_sentence_, sentences_, paragraph_, rules_[token]}; }
  void take_back(const Before& before);
  void enter(Mode mode, int64_t opened, bool display);
  void hold_back(Mode mode);
  void drop_held();
  void leave_math(bool stop, int64_t token);
  void release_held();
  void match(uint8_t c);
  void match_wide();
  void start_match(uint8_t c);
  void arrive(uint8_t c);
  void accept(uint8_t bits);
  void emit(Rule rule, int64_t token);
  void put_or_hold(Rule rule, int64_t token);
  void put(Rule rule, int64_t token);
  void start_sentence(int64_t token);

  const Automaton& a_;
  uint8_t* rules_;
  int64_t count_;
  int64_t t_ = 0;             // the token being read
  bool token_solid_ = false;  // a byte of it was not a space
  bool quiet_ = false;

  Mode mode_ = Mode::text;
  uint8_t prev_ = 0;          // the byte before
  uint8_t solid_ = 0;         // the last byte (or class) that is not a space; 0: nothing yet
  int64_t solid_token_ = -1;
  bool content_ = false;      // something but white space since the start or the last <think> tag

  int newlines_ = 0;          // line breaks in the white space that is being read
  int64_t newline_token_ = -1;

  int64_t pending_ = -1;      // the token that may end a sentence: what follows decides
  bool pending_space_ = false, pending_wide_ = false, pending_strict_ = false;
  bool initial_ = false;      // the word so far is one capital letter at a line start or after a full stop: "J. S. Bach"
  bool abbreviation_ = false;

  Head head_ = Head::start;
  int64_t head_token_ = -1;   // the line break before this line's head
  int ticks_ = 0, fence_ticks_ = 0;  // backticks of the run that is read, and of the one that opened the fence
  int64_t tick_token_ = -1;   // of the first of them
  bool quoted_ = false, quoted_fence_ = false;  // the line, and the one that opened the fence, begins with >

  bool escape_ = false;       // an odd number of backslashes just before
  Dollar dollar_ = Dollar::none;
  std::vector<Held> held_;
  Before held_before_;         // of what is held
  int64_t held_aloud_ = 0;
  bool dollar_stop_ = false;   // the formula ended in a full stop
  bool opens_line_ = false;    // the byte just read began the line, and it may open a formula
  Before break_;               // of the line break before it
  Before first_;               // of the last boundary; of the first where several lie in its token

  uint16_t node_ = 0;         // in the trie; 0: no pattern is open
  uint8_t awaiting_ = 0;      // patterns that end in a letter: the next byte tells whether the word does
  int64_t start_token_ = -1;  // the boundary before the open pattern; -1: it begins inside a token
  bool start_clause_ = false, start_head_ = false;
  bool clause_ = true;        // a clause may begin at the byte being read

  uint8_t wide_bytes_[4] = {};
  int wide_length_ = 0, wide_need_ = 0;
  bool wide_fresh_ = false;

  int64_t sentence_ = 0, previous_sentence_ = 0, paragraph_ = 0;
  int64_t sentences_ = 1, aloud_ = 0;  // how many so far, and how many words of thinking aloud
  Marks marks_;
};

}  // namespace acpo
