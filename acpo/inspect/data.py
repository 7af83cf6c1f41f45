"""What there is to look at: the groups of one training step, with their rollouts and the steps of each, read from a run's rollouts/.

SURPRISE is what one sorts by to find where credit and outcome disagree. With R the outcome of a rollout, s = +1 where R > 1/2, -1 where R < 1/2 and
0 at 1/2 or without an outcome, over the rollout's steps k other than the answer, of n_k tokens with mean advantage c_k:

    surprise = sum_k n_k max(0, -s c_k) / sum_k n_k

the credit per token that pulls against the outcome: negative credit in a right rollout, positive credit in a wrong one. Its unit is that of an
advantage; 0 is a rollout that no step of which was credited against its outcome.
"""

from __future__ import annotations

import difflib
import itertools
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ORDERS = ("surprise", "outcome", "length", "sampled")

# Of a step: name, label, short label, sign (does it have one, or only a size), what it is, unit. None stands where nothing was measured.
MEASURES = (
    ("credit", "credit", "credit", True, "what enters the loss: mean advantage of the step's tokens", ""),
    ("own", "own part", "own", True, "what the step itself adds: its credit - its rollout's advantage", ""),
    ("phi", "phi", "φ", True, "change of the estimated probability of success: V after the step - V before it", ""),
    ("iota", "information", "info", True, "about the outcome that came: log P(R | after the step) - log P(R | before it)", "nats"),
    ("hindsight", "hindsight", "hint", True, "shared with the reference answer: sum of l, log-prob with the answer in the prompt - without", "nats"),
    ("centred", "hindsight, centred", "hint°", True, "sum of l + KL, what the policy's own choice added: 0 for a token that it was sure of", "nats"),
    ("value", "V", "V", False, "estimated probability of success after the step", ""),
    ("weight", "weight", "w", False, "factor on the rollout's advantage, mean 1 (credit.form=weights; the additive form leaves it at 1)", ""),
    ("entropy", "entropy", "H", False, "of the policy at the step's tokens, mean", "nats"),
    ("logp", "log-prob", "logp", False, "of the step's tokens under the policy that wrote them, mean", "nats"),
)  # fmt: skip

# Why a step ends where it does: a mark, and words.
RULES = {
    "paragraph": ("¶", "a blank line"),
    "line": ("↵", "the end of a line"),
    "step": ("#", "the end of a line before a list item or a “Step n” head"),
    "lead": ("↘", "a line break that its sentence runs over"),
    "sentence": (".", "the end of a sentence"),
    "marker": ("»", "a word that turns the thought comes next (Wait, So, But …)"),
    "think": ("⟩", "</think>"),
    "entropy": ("?", "the policy was in doubt about the next token (a fork)"),
    "answer": ("=", "the answer begins"),
    "length": ("…", "no rule: the longest step allowed"),
    "fixed": ("…", "pieces of one length (segmenter.fixed)"),
    "score": ("*", "the caller's own scores"),
    "end": ("■", "the end of the rollout"),
    "other": ("*", "a rule that this version does not know"),
}
STATUS = {
    "malformed": "malformed", "unparseable": "no readable answer", "timeout": "verifier timed out", "crash": "verifier crashed",
    "gold": "reference answer unreadable", "error": "verifier raised", "skipped": "verifier skipped it",
}  # fmt: skip


class InspectError(ValueError):
    """Nothing can be shown: the message says of what, and what exists instead."""


@dataclass
class Step:
    """One segment: text[start:end] of its rollout; numbers as in MEASURES, None where nothing was measured."""

    start: int
    end: int
    tokens: int
    rule: str
    answer: bool = False
    credit: float | None = None
    own: float | None = None
    phi: float | None = None
    iota: float | None = None
    hindsight: float | None = None
    centred: float | None = None
    value: float | None = None
    weight: float | None = None
    entropy: float | None = None
    logp: float | None = None


@dataclass
class Rollout:
    number: int  # its place in the group, from 1
    text: str
    steps: list[Step]
    outcome: float | None  # None: no verdict, or left out
    status: str | None  # of the verdict, one of acpo.verify's; None: not known
    given: str | None  # the answer that was read from it
    finished: bool
    advantage: float | None
    reliability: float | None
    source: str | None = None  # of phi, information and V

    @property
    def tokens(self) -> int:
        return sum(step.tokens for step in self.steps)

    @property
    def surprise(self) -> float:
        """The equation of the module docstring."""
        side = 0 if self.outcome is None else (self.outcome > 0.5) - (self.outcome < 0.5)
        steps = [s for s in self.steps if not s.answer and s.credit is not None]
        against = sum(s.tokens * max(0.0, -side * s.credit) for s in steps)
        return against / max(1, sum(s.tokens for s in steps))

    @property
    def verdict(self) -> str:
        """In words: right, wrong, a share in between, or why there is none."""
        if self.outcome is None:
            return f"left out: {STATUS[self.status]}" if self.status in STATUS else "no verdict"
        word = {0.0: "wrong", 1.0: "right"}.get(self.outcome, f"{self.outcome:.2f}")
        return f"{word}: {STATUS[self.status]}" if self.status in STATUS else word


@dataclass
class Group:
    number: int  # its place in the training step, from 1
    problem: str
    prompt: str
    answer: str
    rollouts: list[Rollout]

    @property
    def pass_rate(self) -> float | None:
        known = [r.outcome for r in self.rollouts if r.outcome is not None]
        return sum(known) / len(known) if known else None

    @property
    def surprise(self) -> float:
        return max((r.surprise for r in self.rollouts), default=0.0)

    @property
    def twins(self) -> dict[int, int]:
        """For a rollout whose text another one has, the first number with that text: a policy that is sure of itself repeats itself."""
        first: dict[str, int] = {}
        for rollout in sorted(self.rollouts, key=lambda r: r.number):
            first.setdefault(rollout.text, rollout.number)
        return {r.number: first[r.text] for r in self.rollouts if first[r.text] != r.number}


@dataclass
class View:
    """Everything that is shown at a time. notes are what a reader must know about the numbers."""

    title: str
    step: int | None
    groups: list[Group]
    notes: list[str] = field(default_factory=list)

    @property
    def rollouts(self) -> list[Rollout]:
        return [r for g in self.groups for r in g.rollouts]

    def scale(self, measure: str = "credit") -> float:
        """The size that gets the full shade: the 98 % quantile of |x| over all steps, so that one outlier does not bleach the others."""
        sizes = sorted(abs(x) for r in self.rollouts for s in r.steps if (x := getattr(s, measure)) is not None)
        return (sizes[min(len(sizes) - 1, int(0.98 * len(sizes)))] or sizes[-1]) if sizes else 0.0

    @property
    def measures(self) -> list[tuple]:
        """Those of MEASURES that were measured."""
        return [m for m in MEASURES if any(getattr(s, m[0]) is not None for r in self.rollouts for s in r.steps)]

    def sort(self, order: str) -> None:
        """Groups and rollouts by ORDERS: highest surprise, lowest outcome (no verdict last) or most tokens first; ties stay as they were sampled.
        A group counts as its most surprising or longest rollout, or by its mean outcome."""
        last = math.inf
        keys = {
            "surprise": (lambda g: -g.surprise, lambda r: -r.surprise),
            "outcome": (lambda g: last if g.pass_rate is None else g.pass_rate, lambda r: last if r.outcome is None else r.outcome),
            "length": (lambda g: -max((r.tokens for r in g.rollouts), default=0), lambda r: -r.tokens),
            "sampled": (lambda g: g.number, lambda r: r.number),
        }
        of_group, of_rollout = keys[order]
        self.groups.sort(key=lambda g: (of_group(g), g.number))
        for group in self.groups:
            group.rollouts.sort(key=lambda r: (of_rollout(r), r.number))

    def only(self, problem: str) -> None:
        """Keeps the groups of one problem."""
        kept = [g for g in self.groups if g.problem == problem]
        if not kept:
            names = list(dict.fromkeys(g.problem for g in self.groups))
            place = f"step {self.step}" if self.step is not None else self.title
            raise InspectError(f"{place} has no problem {problem!r}{_nearest(problem, names)}; it has {_listed(names)}")
        self.groups = kept


def read_run(run: Path, step: int | None = None, problem: str | None = None) -> View:
    """The rollouts of a training step: the newest one, or with a problem the newest that asked it."""
    steps = _steps(run)
    if step is not None and step not in steps:
        raise InspectError(f"{run} holds no rollouts of step {step}; it has step{'s' * (len(steps) > 1)} {_ranges(sorted(steps))}")
    if step is None:
        step = max(steps)
        if problem is not None:
            asked = {s: set(_columns(steps[s], ["problem"])["problem"]) for s in sorted(steps, reverse=True)}
            step = next((s for s, names in asked.items() if problem in names), None)
            if step is None:
                names = sorted(set().union(*asked.values()))
                raise InspectError(f"no step of {run} asked problem {problem!r}{_nearest(problem, names)}; asked were {_listed(names)}")
    view = View(clean(run.resolve().name), step, *_groups(steps[step], _reader(run)))
    if problem is not None:
        view.only(problem)
    return view


def _steps(run: Path) -> dict[int, Path]:
    if not run.is_dir():
        raise InspectError(f"no such run directory: {run}{_runs_beside(run)}")
    found = {int(n): p for p in (run / "rollouts").glob("step-*.parquet") if (n := p.stem.removeprefix("step-")).isdigit()}
    if not found and not (run / "metrics.jsonl").exists():
        raise InspectError(f"{run} is no run directory: it has no rollouts and no metrics.jsonl{_runs_beside(run)}")
    if not found:
        raise InspectError(
            f"{run} holds no rollouts: no step is finished yet, trainer.keep_rollouts was false, or pyarrow was not installed "
            "when it ran (pip install -e '.[report]', then train again)"
        )
    return found


def _runs_beside(run: Path) -> str:
    names = sorted(p.parent.name for folder in (run, run.parent) for p in folder.glob("*/metrics.jsonl"))
    return f" (there is {_listed(names)})" if names else ""


def _columns(path: Path, columns: list[str] | None = None) -> dict[str, list]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise ImportError(f"{path} needs pyarrow: pip install -e '.[report]'") from None
    try:
        return parquet.read_table(path, columns=columns).to_pydict()
    except (OSError, pyarrow.ArrowException) as error:
        raise InspectError(f"cannot read {path}: {' '.join(str(error).split())[:200]}") from None


def _reader(run: Path):
    """From a rollout's text to the answer that the run's verifier read in it; a function that finds none without the run's configuration."""
    from .. import config
    from ..config import ConfigError
    from ..verify import kind_of
    from ..verify.answers import extract_answer

    try:
        of_run = config.load(run / "config.yaml")
    except ConfigError:
        return lambda text: None
    settings = of_run.verify
    if kind_of(of_run) not in ("exact", "math"):
        return lambda text: None

    def read(text: str) -> str | None:
        if settings.after:
            _, found, text = text.rpartition(settings.after)
            if not found:
                return None
        return extract_answer(text, settings.extract)

    return read


def _groups(path: Path, read) -> tuple[list[Group], list[str]]:
    columns = _columns(path)
    needed = ("problem", "answer", "prompt", "response", "outcome", "segment_tokens", "segment_ends", "segment_rule")
    missing = [name for name in needed if name not in columns]
    if missing:
        raise InspectError(f"{path} has no column {', '.join(missing)}: an older version wrote it, and where its steps lie in the text is not known")
    optional = [f"segment_{n}" for n, *_ in MEASURES if n != "own"] + [
        "group",
        "verdict",
        "finished",
        "advantage",
        "reliability",
        "source",
        "answered",
    ]
    absent = [name for name in optional if name not in columns]
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    groups: list[Group] = []
    # Rollouts of one problem stand side by side; the column tells two groups of the same problem apart.
    for number, (_, members) in enumerate(itertools.groupby(rows, key=lambda r: (r.get("group"), r["problem"])), 1):
        members = list(members)
        first = members[0]
        rollouts = [_rollout(n, row, read) for n, row in enumerate(members, 1)]
        groups.append(Group(number, clean(first["problem"]), clean(first["prompt"]), clean(first["answer"]), rollouts))
    notes = [f"not measured in this step: {', '.join(n.removeprefix('segment_') for n in absent)}"] if absent else []
    return groups, notes


def _rollout(number: int, row: dict[str, Any], read) -> Rollout:
    count, advantage = len(row["segment_tokens"]), finite(row.get("advantage"))
    lists = {n: row.get(f"segment_{n}") or [None] * count for n, *_ in MEASURES if n != "own"}
    if not len(row["segment_ends"]) == len(row["segment_rule"]) == count or any(len(values) != count for values in lists.values()):
        raise InspectError(f"rollout {number} of problem {clean(row['problem'])!r} has lists of different lengths: the file is not the trainer's")
    steps, start = [], 0
    for k in range(count):
        numbers = {n: finite(values[k]) for n, values in lists.items()}
        own = None if advantage is None or numbers["credit"] is None else numbers["credit"] - advantage
        answer = bool(row.get("answered")) and k == count - 1
        rule = row["segment_rule"][k] if row["segment_rule"][k] in RULES else "other"
        steps.append(Step(start, row["segment_ends"][k], row["segment_tokens"][k], rule, answer, own=own, **numbers))
        start = row["segment_ends"][k]
    text = clean(row["response"])
    return Rollout(
        number,
        text,
        steps,
        finite(row["outcome"]),
        row.get("verdict"),
        read(text),
        row.get("finished", True),
        advantage,
        finite(row.get("reliability")),
        row.get("source"),
    )


def finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)


def clean(text: str) -> str:
    """Half of a surrogate pair cannot be written down: a replacement character stands for it."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _listed(names: list[str], most: int = 12) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _nearest(name: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _ranges(numbers: list[int]) -> str:
    """1, 2, 3, 7 as 1 to 3, 7."""
    parts = []
    for _, run in itertools.groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
        run = [n for _, n in run]
        parts.append(str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" if len(run) > 2 else f"{run[0]}, {run[1]}")
    return ", ".join(parts)
