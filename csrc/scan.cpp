#include "scan.h"

#include <algorithm>
#include <cstring>

namespace acpo {

namespace bytes {

// Only what the rules ask of a character: is it white space, the end of a sentence, something that closes a quotation, a
// colon or comma, another sign, or a letter (everything else, Chinese above all).
uint8_t classify(const uint8_t* c, int length) {
  if (length == 2) {
    if (c[0] == 0xC2) return c[1] == 0xA0 ? kSpace : kSymbol;                  // no-break space; Latin-1 signs
    return c[0] == 0xC3 && (c[1] == 0x97 || c[1] == 0xB7) ? kSymbol : kLetter;  // times, divided by
  }
  if (length == 4) return c[0] == 0xF0 && c[1] == 0x9F ? kSymbol : kLetter;  // emoji
  if (length != 3) return kLetter;
  const int last_two = c[1] << 8 | c[2];
  if (c[0] == 0xE2) {  // general punctuation, arrows, operators
    if ((last_two >= 0x8080 && last_two <= 0x808A) || last_two == 0x80AF) return kSpace;
    return last_two == 0x8099 || last_two == 0x809D ? kCloser : kSymbol;  // right quotation marks
  }
  if (c[0] == 0xE3 && c[1] == 0x80) {  // CJK punctuation
    if (c[2] == 0x80) return kSpace;
    if (c[2] == 0x82) return kSentenceEnd;
    return c[2] == 0x8B || c[2] == 0x8D || c[2] == 0x8F || c[2] == 0x91 ? kCloser : kSymbol;
  }
  if (c[0] == 0xEF && (c[1] == 0xBC || c[1] == 0xBD)) {  // full-width forms
    switch (last_two) {
      case 0xBC81: case 0xBC9F: return kSentenceEnd;
      case 0xBC89: return kCloser;
      case 0xBC9A: return ':';
      case 0xBC8C: return ',';
      default: return kSymbol;
    }
  }
  return kLetter;
}

}  // namespace bytes

using namespace bytes;

namespace {

// A text thinks aloud if such words stand in it not once by chance and often enough, one in 32 sentences or more. So says no
// written solution out of 2,507 (ProcessBench, Qwen2.5-Math) and 130 of 135 traces of reasoning models (R1's, QwQ's).
constexpr int64_t kAloudLeast = 2, kAloudSentences = 32;

// A \[ that is still open after so many boundaries was never a formula; this also bounds the memory.
constexpr size_t kHeldMost = 64;

// In rules_, until the end tells whether the text is a monologue: a line break that its sentence runs over.
constexpr uint8_t kRunsOn = 0x80;

bool is_stop(uint8_t c) { return c == '.' || c == '!' || c == '?'; }
bool is_one_of(uint8_t c, const char* set) { return c != 0 && std::strchr(set, c) != nullptr; }
bool is_closer(uint8_t c) { return is_one_of(c, ")\"'*]}_`"); }
// After a full stop and a space: a lower-case letter goes on with the sentence, and so does an operator ("5! = 120").
bool starts_sentence(uint8_t c) { return is_upper(c) || is_digit(c) || is_one_of(c, "\"'([\\$*_#`"); }

}  // namespace

void Scan::feed(int64_t t, std::string_view text) {
  t_ = t;
  token_solid_ = false;
  for (const char c : text) byte(static_cast<uint8_t>(c));
  quiet_ = pending_ < 0 && newlines_ == 0 && node_ == 0 && awaiting_ == 0 && head_ == Head::off && !escape_ && dollar_ == Dollar::none &&
           wide_need_ == 0 && !initial_ && mode_ != Mode::info;
}

Marks Scan::finish() {
  if (dollar_ == Dollar::close) drop_held();
  for (const Held& h : held_) put(h.rule, h.token);
  if (!content_) marks_.after_think = -1;  // nothing follows the tag
  marks_.monologue = aloud_ >= kAloudLeast && aloud_ * kAloudSentences >= sentences_;
  uint8_t* const rules = rules_;  // a store through it may change any member, as far as the compiler knows
  const int64_t count = count_;
  if (marks_.monologue) {
    const auto lead = static_cast<uint8_t>(Rule::lead);
    for (int64_t t = 0; t < count; ++t) rules[t] = rules[t] & kRunsOn ? lead : rules[t];
  } else {
    for (int64_t t = 0; t < count; ++t) rules[t] &= static_cast<uint8_t>(~kRunsOn);
  }
  return marks_;
}

void Scan::byte(uint8_t c) {
  if (awaiting_ != 0) {
    const uint8_t bits = awaiting_;
    awaiting_ = 0;
    if (!is_word(c) && c != '-' && c != '\'') accept(bits);  // "Nowhere", "First-order", "answer isn't"
  }
  if (dollar_ != Dollar::none && resolve_dollar(c)) {
    prev_ = solid_ = c;
    solid_token_ = t_;
    token_solid_ = true;
    return;
  }
  if (c >= 0x80) {
    wide(c);
  } else {
    wide_need_ = 0;  // a character that broke off is dropped
    if (c == '\n') {
      newline();
    } else if (is_space(c)) {
      space(c);
    } else {
      solid(c);
    }
  }
  prev_ = c;
}

void Scan::newline() {
  if (mode_ == Mode::dollar) release_held();  // $..$ closes on its line or is no formula: a price swallows nothing
  if (mode_ == Mode::info) mode_ = Mode::fence;
  node_ = 0;
  pending_ = -1;  // the line break is the better boundary
  escape_ = false;
  head_ = Head::off;
  ++newlines_;
  newline_token_ = t_;
}

void Scan::space(uint8_t c) {
  escape_ = false;
  pending_space_ = true;
  if (node_ != 0) match(c);
  const bool item = head_ == Head::bullet || head_ == Head::star || head_ == Head::number_end;
  if (item || head_ == Head::hash) become_step();
  if (head_ != Head::start && head_ != Head::item) head_ = item ? Head::item : Head::off;
}

bool Scan::clause_here() const { return content_ && (newlines_ > 0 || !(is_word(solid_) || solid_ == kLetter)); }

void Scan::solid(uint8_t c) {
  clause_ = clause_here();
  const bool display = opens_line_;  // with the byte before this one
  begin_solid(c);
  abbreviation_ = false;
  match(c);
  token_solid_ = true;
  const bool escaped = escape_;
  escape_ = c == '\\' && !escaped;
  const bool word_start = is_upper(c) && !is_word(prev_) && (head_ == Head::start || solid_ == '.');
  if (in_fence()) {
    fence_tick(c);
  } else if (escaped) {
    head_ = Head::off;
    if (c == ']' && mode_ == Mode::blank) drop_held();
    if (c == '(' && reads_text()) enter(Mode::paren, solid_token_, false);
    if (c == '[' && reads_text()) enter(Mode::bracket, solid_token_, display);
    if ((c == ')' && mode_ == Mode::paren) || (c == ']' && mode_ == Mode::bracket)) leave_math(solid_ == '.', t_);
  } else if (c == '$' && mode_ != Mode::paren && mode_ != Mode::bracket) {
    head_ = Head::off;
    // An opening $ inside $..$ (space before it): the first one was a price, and this one may begin a formula.
    if (mode_ == Mode::blank || (mode_ == Mode::dollar && is_space(prev_))) release_held();
    dollar_ = mode_ == Mode::text ? Dollar::open : mode_ == Mode::dollar ? Dollar::close : Dollar::display;
    dollar_stop_ = solid_ == '.';
  } else if (reads_text()) {
    if (is_stop(c)) full_stop(c);
    line_head(c);
  }
  initial_ = word_start;
  if (reads_text() || c != '\\') solid_ = c;  // in a formula its closing "\)" must see what stands before
  solid_token_ = t_;
}

// The first byte after white space, or any other that is none: line breaks and sentence ends are decided here.
void Scan::begin_solid(uint8_t c) {
  opens_line_ = false;
  if (newlines_ > 0) {
    line_break(c);
    newlines_ = 0;
  } else if (pending_ >= 0) {
    resolve_sentence(c);
  }
  content_ = true;
}

void Scan::line_break(uint8_t c) {
  if (mode_ == Mode::fence) {
    if (!quoted_fence_ || c == '>') {
      head_ = Head::start;
      return;
    }
    mode_ = Mode::text;  // a fence ends with the quote around it
  }
  quoted_ = false;
  if (newlines_ > 1 && mode_ != Mode::blank) {
    // A blank line ends every formula, closed or not: otherwise a lone opening would swallow the rest. Only \[ may go on, because
    // its end looks different from its beginning.
    if (mode_ == Mode::bracket) {
      hold_back(Mode::blank);
    } else {
      mode_ = Mode::text;
    }
  }
  if (!reads_text()) return;
  head_token_ = -1;
  head_ = Head::start;
  if (!content_) return;
  head_token_ = newline_token_;
  opens_line_ = c == '\\' || c == '$';
  break_ = before(newline_token_);
  emit(newlines_ > 1 ? Rule::paragraph : Rule::line, newline_token_);
  // "We get:" and a lower-case letter: in a monologue the sentence runs on.
  if (mode_ == Mode::text && (solid_ == ':' || solid_ == ',' || (c >= 'a' && c <= 'z'))) rules_[newline_token_] |= kRunsOn;
}

void Scan::resolve_sentence(uint8_t c) {
  if (!pending_space_ && (c == kCloser || c == kSentenceEnd || (c < 0x80 && (is_closer(c) || is_stop(c))))) {
    pending_ = t_;
    return;
  }
  bool ends = pending_wide_;  // no space follows a Chinese sentence
  if (!ends && pending_space_) ends = c >= 0x80 || (pending_strict_ ? is_upper(c) : starts_sentence(c));
  const int64_t token = pending_;
  pending_ = -1;
  if (ends && reads_text()) emit(Rule::sentence, token);
}

void Scan::full_stop(uint8_t c) {
  if (abbreviation_ || head_ == Head::number || (c == '.' && initial_)) return;
  pending_ = t_;
  pending_space_ = pending_wide_ = false;
  pending_strict_ = c == '!';  // "5! 3" and "n! (n-1)!" are factorials
}

void Scan::line_head(uint8_t c) {
  switch (head_) {
    case Head::start:
      if (c == '-' || c == '+') head_ = Head::bullet;
      else if (c == '*') head_ = Head::star;
      else if (c == '#') head_ = Head::hash;
      else if (c == '`') fence_tick(c);
      else if (is_digit(c)) head_ = Head::number;
      else if (c == '>') quoted_ = true;
      else if (c != '_') head_ = Head::off;
      break;
    case Head::star: head_ = c == '*' ? Head::start : Head::off; break;  // "**" only makes the head bold
    case Head::hash: head_ = c == '#' ? Head::hash : Head::off; break;
    case Head::number:
      if (!is_digit(c)) head_ = c == '.' || c == ')' ? Head::number_end : Head::off;
      break;
    case Head::number_end: head_ = c == '*' ? Head::number_end : Head::off; break;
    case Head::item:
    case Head::tick: fence_tick(c); break;
    default: head_ = Head::off;
  }
}

void Scan::become_step() {
  if (head_token_ >= 0 && reads_text()) put_or_hold(Rule::step, head_token_);
}

void Scan::wide(uint8_t c) {
  if (c >= 0xC0) {
    wide_length_ = 0;
    wide_need_ = c >= 0xF0 ? 4 : c >= 0xE0 ? 3 : 2;
    wide_fresh_ = !token_solid_;
    clause_ = clause_here();
  } else if (wide_need_ == 0) {  // a stray continuation byte: an unknown letter
    wide_length_ = 0;
    wide_need_ = 1;
    wide_fresh_ = !token_solid_;
  }
  escape_ = false;
  token_solid_ = true;
  wide_bytes_[wide_length_++] = c;
  if (--wide_need_ > 0) {
    match_wide();
    return;
  }
  const uint8_t kind = classify(wide_bytes_, wide_length_);
  if (kind == kSpace) {
    node_ = 0;
    space(' ');
    return;
  }
  begin_solid(kind);
  match_wide();
  if (reads_text()) {
    const bool bullet = head_ == Head::start && wide_length_ == 3 && std::memcmp(wide_bytes_, "\xE2\x80\xA2", 3) == 0;
    head_ = bullet ? Head::bullet : Head::off;
    if (kind == kSentenceEnd) {
      pending_ = t_;
      pending_wide_ = true;
      pending_space_ = pending_strict_ = false;
    }
  } else {
    head_ = Head::off;
  }
  initial_ = false;
  solid_ = kind;
  solid_token_ = t_;
}

void Scan::match(uint8_t c) {
  if (node_ != 0) {
    node_ = a_.trie_.child(node_, c);
    if (node_ != 0) return arrive(c);
  }
  if (!(is_word(c) && is_word(prev_)) && !(c == '\\' && escape_)) start_match(c);
}

// Without word borders a pattern may begin at any character, also inside another that has just failed.
void Scan::match_wide() {
  const uint8_t c = wide_bytes_[wide_length_ - 1];
  if (node_ != 0) {
    node_ = a_.trie_.child(node_, c);
    if (node_ != 0) return arrive(c);
  }
  const bool solid = token_solid_;
  token_solid_ = !wide_fresh_;
  start_match(wide_bytes_[0]);
  token_solid_ = solid;
  for (int i = 1; i < wide_length_ && node_ != 0; ++i) node_ = a_.trie_.child(node_, wide_bytes_[i]);
  if (node_ != 0 && wide_length_ > 1) arrive(c);
}

void Scan::start_match(uint8_t c) {
  node_ = a_.trie_.child(0, c);
  if (node_ == 0) return;
  start_token_ = token_solid_ ? -1 : std::max(solid_token_, newline_token_);
  if (start_token_ == t_) start_token_ = -1;  // its own token begins with the line break
  start_clause_ = clause_;
  start_head_ = (head_ == Head::start || newlines_ > 0) && reads_text();  // a wide character's line begins when it is complete
  arrive(c);
}

void Scan::arrive(uint8_t c) {
  const uint8_t bits = a_.trie_.payload(node_);
  if (bits == 0) return;
  if (is_letter(c)) {
    awaiting_ = bits;
  } else {
    accept(bits);
  }
}

void Scan::accept(uint8_t bits) {
  if (bits & (pattern::think_open | pattern::think_close)) {  // stronger than any formula or fence around them
    if (holds_back()) release_held();
    mode_ = Mode::text;
    pending_ = -1;
    const bool close = bits & pattern::think_close;
    if (close) put(Rule::think, t_);
    marks_ = {};
    if (close) marks_.after_think = t_ + 1;
    marks_.thinking = !close;
    content_ = false;
    sentence_ = previous_sentence_ = paragraph_ = t_ + 1;
    first_ = {};
    return;
  }
  if (in_fence()) return;
  // "The answer is:" and the box on the next line are one statement.
  if (bits & pattern::boxed) {
    const bool continues = marks_.stated >= std::max(paragraph_, previous_sentence_);
    marks_.boxed = continues ? marks_.stated : sentence_;
  }
  if (!reads_text()) return;
  if (bits & pattern::aloud) ++aloud_;
  if (bits & pattern::answer) marks_.stated = sentence_;
  if (bits & pattern::abbreviation) abbreviation_ = true;
  if ((bits & pattern::head) && start_head_) become_step();
  if ((bits & pattern::marker) && start_clause_ && start_token_ >= 0) emit(Rule::marker, start_token_);
}

void Scan::emit(Rule rule, int64_t token) {
  if (token != first_.token) first_ = before(token);
  put_or_hold(rule, token);
  if (rule == Rule::paragraph) paragraph_ = token + 1;
  // A line that ends in a colon or a comma goes on: its sentence does too.
  if (rule != Rule::marker && !(rule == Rule::line && (solid_ == ':' || solid_ == ','))) start_sentence(token + 1);
}

void Scan::put_or_hold(Rule rule, int64_t token) {
  if (holds_back() && held_.size() == kHeldMost) release_held();
  if (holds_back()) {
    held_.push_back({rule, token});
  } else {
    put(rule, token);
  }
}

void Scan::put(Rule rule, int64_t token) {
  const auto code = static_cast<uint8_t>(rule);
  if (a_.weights_[code & ~kRunsOn] > a_.weights_[rules_[token] & ~kRunsOn]) rules_[token] = code;
}

void Scan::start_sentence(int64_t token) {
  if (token == sentence_) return;
  previous_sentence_ = sentence_;
  sentence_ = token;
  ++sentences_;
}

}  // namespace acpo
