"""Words and signs that the terminal and the page share."""

from __future__ import annotations

import re

from .data import View

SURPRISE = (
    "Where credit and outcome disagree. With R the outcome of a rollout and s = +1 where R > 1/2, -1 where R < 1/2, else 0, over its steps k "
    "other than the answer, of n_k tokens with credit c_k: surprise = sum n_k max(0, -s c_k) / sum n_k, the credit per token that pulls against "
    "the outcome: negative credit in a right rollout, positive credit in a wrong one, in units of an advantage. 0: no step was credited against it."
)
ROLLOUT = (
    ("A", "its advantage within its group: credit = A + own part in the additive form, A times the weight in the other"),
    ("surprise", "see below"),
    ("tree 0.97", "the source of phi, information and V, and how far it was trusted: from 0 (credit is A alone) to 1"),
    ("#8 = #5", "the two have the same text"),
    ("read", "the answer that was read from it"),
)
_HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\U000e0000-\U000e007f]"
)


def visible(text: str) -> str:
    """Characters that would steer a terminal, or hide or reorder what stands in a rollout, as signs: controls (an ANSI escape is \u27e8U+001B\u27e9),
    bidirectional overrides and invisible ones. Line ends and tabs stay."""
    return _HIDDEN.sub(lambda m: f"\u27e8U+{ord(m[0]):04X}\u27e9", text)


def summary(view: View) -> str:
    """What is shown, in one line."""
    rollouts = view.rollouts
    known = [r.outcome for r in rollouts if r.outcome is not None]
    right, wrong = sum(x > 0.5 for x in known), sum(x < 0.5 for x in known)
    counts = [f"{right} right", f"{wrong} wrong"]
    if right + wrong < len(known):
        counts.append(f"{len(known) - right - wrong} in between")
    if len(known) < len(rollouts):
        counts.append(f"{len(rollouts) - len(known)} without verdict")
    step = f"step {view.step} · " if view.step is not None else ""
    return f"{step}{plural(len(view.groups), 'problem')} · {plural(len(rollouts), 'rollout')}: {', '.join(counts)}"


def plural(count: int, word: str) -> str:
    return f"{count:,} {word}{'' if count == 1 else 's'}"
