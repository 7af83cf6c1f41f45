// Formulas and code fences: where no boundary lies.
#include "scan.h"

#include <algorithm>

namespace acpo {

using bytes::is_digit;
using bytes::is_space;

// Three backticks at a line start open or close a code fence.
void Scan::fence_tick(uint8_t c) {
  ticks_ = c != '`' ? 0 : head_ == Head::start ? 1 : ticks_ + 1;
  head_ = c == '`' && (head_ == Head::start || head_ == Head::tick) ? Head::tick : Head::off;
  if (head_ == Head::tick && ticks_ == 3) {
    if (holds_back()) release_held();
    mode_ = mode_ == Mode::fence ? Mode::text : Mode::fence;
    head_ = Head::off;
  }
}

// A display formula belongs to the words before it, whatever white space stands between.
void Scan::take_break_back() {
  rules_[break_.token] = break_.rule;
  put(Rule::lead, break_.token);
  if (sentence_ != break_.sentence) --sentences_;
  sentence_ = break_.sentence;
  previous_sentence_ = break_.previous_sentence;
  paragraph_ = break_.paragraph;
}

void Scan::enter_math(Mode mode) {
  if (holds_back()) release_held();
  mode_ = mode;
}

void Scan::hold_back(Mode mode) {
  mode_ = mode;
  held_sentence_ = sentence_;
  held_sentences_ = sentences_;
  held_aloud_ = aloud_;
}

// The formula is closed: nothing in it was a boundary.
void Scan::drop_held() {
  held_.clear();
  sentence_ = held_sentence_;
  sentences_ = held_sentences_;
  aloud_ = held_aloud_;
  // What the formula says it says in its sentence.
  marks_.boxed = std::min(marks_.boxed, sentence_);
  marks_.stated = std::min(marks_.stated, sentence_);
  if (mode_ == Mode::blank) mode_ = Mode::bracket;
}

void Scan::leave_math(bool stop, int64_t token) {
  mode_ = Mode::text;
  if (!stop) return;
  pending_ = token;  // "\(x = 5.\) Then"
  pending_space_ = pending_wide_ = pending_strict_ = false;
}

void Scan::release_held() {
  for (const Held& h : held_) put(h.rule, h.token);
  held_.clear();
  mode_ = Mode::text;
}

// What follows a $ tells what it was; the rules are pandoc's: an opening $ has no space after it, a closing one none
// before it and no digit after it. True if c was the second half of $$ and is done with.
bool Scan::resolve_dollar(uint8_t c) {
  const Dollar what = dollar_;
  dollar_ = Dollar::none;
  switch (what) {
    case Dollar::open:
      if (c == '$') {
        if (break_.fresh) take_break_back();
        mode_ = Mode::display;
        return true;
      }
      if (!is_space(c)) hold_back(Mode::dollar);
      return false;
    case Dollar::close:
      if (is_digit(c)) return false;
      drop_held();
      leave_math(dollar_stop_, solid_token_);
      return false;
    case Dollar::display:
      if (c != '$') return false;
      leave_math(dollar_stop_, t_);
      return true;
    case Dollar::none: break;
  }
  return false;
}

}  // namespace acpo
