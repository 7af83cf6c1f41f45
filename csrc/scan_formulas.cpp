// Formulas and code fences: where no boundary lies.
#include "scan.h"

#include <algorithm>

namespace acpo {

using bytes::is_digit;
using bytes::is_space;

// Three backticks at a line start or behind a list mark open a code fence, and as many as opened it close it.
void Scan::fence_tick(uint8_t c) {
  const bool first = head_ == Head::start || head_ == Head::item;
  if (c == '>' && first) return;  // a quoted line
  if (c != '`' || !(first || head_ == Head::tick)) {
    if (c == '`' && mode_ == Mode::info) mode_ = Mode::text;
    head_ = Head::off;
    return;
  }
  head_ = Head::tick;
  if (first) ticks_ = 0, tick_token_ = t_;
  ++ticks_;
  if (mode_ == Mode::fence) {
    if (ticks_ == fence_ticks_) mode_ = Mode::text;
  } else if (mode_ == Mode::info) {
    fence_ticks_ = ticks_;  // opened by more than three
  } else if (ticks_ == 3) {
    enter(Mode::info, tick_token_, false);
    fence_ticks_ = ticks_;
    quoted_fence_ = quoted_;
  }
}

void Scan::take_back(const Before& before) {
  rules_[before.token] = before.rule;
  sentence_ = before.sentence;
  previous_sentence_ = before.previous_sentence;
  sentences_ = before.sentences;
  paragraph_ = before.paragraph;
  // What was said behind the boundary is said in the sentence before it.
  marks_.boxed = std::min(marks_.boxed, sentence_);
  marks_.stated = std::min(marks_.stated, sentence_);
}

// A formula or a fence opens, its first byte in the token `opened`: what boundaries that token holds lie before it, but would be set behind it.
// A display formula at the start of a line belongs to the words before it, whatever white space stands between.
void Scan::enter(Mode mode, int64_t opened, bool display) {
  if (holds_back()) release_held();
  if (display) {
    take_back(break_);
    put(Rule::lead, break_.token);
  }
  if (first_.token == opened) take_back(first_);
  mode_ = mode;
}

void Scan::hold_back(Mode mode) {
  mode_ = mode;
  held_before_ = before(t_);
  held_aloud_ = aloud_;
}

// The formula is closed: nothing in it was a boundary.
void Scan::drop_held() {
  held_.clear();
  take_back(held_before_);
  aloud_ = held_aloud_;
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
        enter(Mode::display, solid_token_, opens_line_);
        return true;
      }
      if (is_space(c)) return false;
      hold_back(Mode::dollar);
      if (first_.token == solid_token_) {  // the token of the $: see enter
        held_.push_back({static_cast<Rule>(rules_[solid_token_]), solid_token_});
        held_before_ = first_;
        rules_[solid_token_] = first_.rule;
      }
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
