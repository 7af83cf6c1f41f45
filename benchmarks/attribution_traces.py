"""Does hindsight find where a real solution went wrong? A language model reads solutions whose first wrong step people have marked (ProcessBench).

    python -m benchmarks.attribution_traces MODEL STEPS ANSWERS [KEY=VALUE ...] [--subset gsm8k] [--wrong] [--most N] [--out FILE]

MODEL is a folder with a causal language model and its tokenizer, STEPS ProcessBench's JSON lines (subset, problem, steps, label: the first wrong
step, -1: none), ANSWERS JSON lines with `problem` and `answer`. Where that has none of a problem, the answer is that of a solution of STEPS that
ends right; solutions of other problems are left out. The model reads every solution twice, with and without the answer in the prompt, with the
trainer's kernels and the settings given (`problems.chat=true` for a model that chats), and a wrong one a third time, with the answer that IT gives in
the prompt; literal copies of the answers are left out as in training, steps are those that were marked.

    first error   share of wrong solutions whose first wrong step a signal names: the lowest hindsight (sum over the step of l + KL, what training
                  adds to the advantage), the lowest phi (of l), the lowest contrast (hindsight less the same of the answer given: what a hint does
                  to any solution is in both; without a readable other answer it is hindsight), the lowest mean log-prob (surprisal), the highest
                  mean entropy, the most frequent place in the other half (position), always the first; chance is the mean of 1 / steps
    outcome       area under the curve that tells solutions without an error from those with one, by the same sums over a solution (by hindsight: the
                  evidence), and by the mean over its steps of their log-prob

A solution is the unit: 95 % percentile bootstrap over solutions, differences from each baseline paired.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from acpo import config
from acpo.attribution import answer_copies
from acpo.batch import Batch
from acpo.inspect.text import score, tokenized
from acpo.policy import build
from acpo.problems import HINT, Problem
from acpo.prompts import Prompts
from acpo.verify.answers import extract_answer, normalise
from acpo_kernels import Segments, segment_reduce

from . import outputs

BASELINES = ("surprisal", "entropy", "position", "first", "chance")
JUDGED = ("hindsight", "phi", "contrast")
SIGNALS = (*JUDGED, *BASELINES)
BOOTSTRAP = 10_000


def answer_given(row: dict, extract: str = "auto") -> str:
    """The answer that the solution comes to, empty where none can be read."""
    return extract_answer("\n\n".join(row["steps"]), extract) or ""


def solutions(steps: Path, answers: Path, subset: str, most: int, wrong_alone: bool = False) -> list[dict]:
    """ProcessBench's rows that have a known answer: wrong ones and right ones by turns, so that the first `most` hold both, or wrong ones alone."""
    rows = list(map(json.loads, steps.read_text(encoding="utf-8").splitlines()))
    known = {row["problem"].strip(): given for row in rows if row.get("final_answer_correct") and (given := answer_given(row))}
    known |= {row["problem"].strip(): row["answer"] for row in map(json.loads, answers.read_text(encoding="utf-8").splitlines())}
    rows = [
        {**row, "answer": known[row["problem"].strip()]}
        for row in rows
        if row["subset"] in subset.split(",") and row["problem"].strip() in known and len(row["steps"]) > 1
    ]
    wrong, right = ([row for row in rows if (row["label"] >= 0) == is_wrong] for is_wrong in (True, False))
    by_turns = [row for pair in itertools.zip_longest(wrong, [] if wrong_alone else right) for row in pair if row is not None]
    return by_turns[: most or None]


def marked_segments(texts: list[str], marked: list[list[str]], ends: list[list[int]]) -> Segments:
    """The marked steps, joined by a blank line, as segments of tokens that end at these characters. A step may be left without a token."""
    offsets, sequences = [0], [0]
    for text, steps, at in zip(texts, marked, ends, strict=True):
        behind = list(itertools.accumulate(len(step) + 2 for step in steps))  # where the next step begins, in characters
        behind[-1] = len(text)
        begin = offsets[-1]
        offsets += [begin + int(np.searchsorted(at, end, side="right")) for end in behind]
        sequences.append(sequences[-1] + len(steps))
    return Segments(torch.tensor(offsets), torch.tensor(sequences))


def read(settings: config.Config, rows: list[dict]) -> list[dict[str, list[float]]]:
    """Of every solution, what each signal says of its steps (lower: wrong), by name."""
    policy, tokenizer = build(settings, writes=False)
    prompts = Prompts(settings.problems, tokenizer)
    problems = [
        Problem(row["id"], settings.problems.template.replace("{problem}", row["problem"]), row["answer"], hint=settings.problems.hint or HINT)
        for row in rows
    ]
    texts = ["\n\n".join(row["steps"]) for row in rows]
    packed = tokenized(tokenizer, texts)
    given = [answer_given(row, settings.verify.extract) if row["label"] >= 0 else "" for row in rows]
    given = [mine if normalise(mine) != normalise(row["answer"]) else "" for mine, row in zip(given, rows, strict=True)]
    other = [b for b, mine in enumerate(given) if mine]
    progress = Progress(console=Console(stderr=True))
    bar = progress.add_task("solutions", total=len(rows) + len(other))

    def read_with(answers: list[str], chosen: list[int]) -> dict[str, Tensor]:
        """old_logp, entropy and, by these answers in the prompt, log_ratio and kl of the tokens of the chosen solutions."""
        batch = Batch.from_responses([prompts.prompt(problems[b].prompt) for b in chosen], [packed[b].ids for b in chosen])
        hinted = [prompts.prompt(problems[b].hinted_prompt(answers[b])) for b in chosen]
        score(batch, policy, torch.ones(len(chosen), dtype=torch.bool), hinted, settings, lambda n: progress.advance(bar, n))
        return {name: value.double() for name, value in batch.token.items() if name != "ids"}

    segments = marked_segments(texts, [row["steps"] for row in rows], [p.ends for p in packed])
    with progress:
        token = read_with([row["answer"] for row in rows], list(range(len(rows))))
        centred = token["log_ratio"] + token["kl"]
        less = torch.zeros_like(centred)
        if other:
            against = read_with(given, other)
            less[torch.isin(segments.sequence_ids(), torch.tensor(other))] = against["log_ratio"] + against["kl"]
    keep, keep_given = (
        answer_copies([p.ids for p in packed], [prompts.spellings(answer) for answer in answers])
        for answers in ([row["answer"] for row in rows], given)
    )
    phi, hindsight = segment_reduce(torch.stack([token["log_ratio"], centred]), segments, mask=keep)
    contrast = segment_reduce(centred - less, segments, mask=keep & keep_given)
    surprisal, certainty = segment_reduce(torch.stack([token["old_logp"], -token["entropy"]]), segments, reduce="mean")
    cut = segments.sequence_offsets.tolist()
    named = {"hindsight": hindsight, "phi": phi, "contrast": contrast, "surprisal": surprisal, "entropy": certainty}
    return [{name: value[a:b].tolist() for name, value in named.items()} for a, b in itertools.pairwise(cut)]


def first_errors(rows: list[dict], found: list[dict[str, list[float]]]) -> dict[str, np.ndarray]:
    """Of every wrong solution, whether each signal names its first wrong step (of steps that tie for the lowest each a share), [wrong]."""
    wrong = [(row, signal) for row, signal in zip(rows, found, strict=True) if row["label"] >= 0]
    # Of the other half: among all others each place has one less where it is right, which of places that are as frequent never takes that one.
    places = [Counter(row["label"] for row, _ in wrong[1 - half :: 2]) for half in (0, 1)]
    hits: dict[str, list[float]] = {name: [] for name in SIGNALS}
    for i, (row, signal) in enumerate(wrong):
        label, count = row["label"], len(row["steps"])
        for name, values in signal.items():
            lowest = [k for k, v in enumerate(values) if v == min(values)]
            hits[name].append((label in lowest) / len(lowest))
        others = {place: n for place, n in places[i % 2].items() if place < count}
        hits["position"].append(float(max(others, key=lambda place: (others[place], -place), default=0) == label))
        hits["first"].append(float(label == 0))
        hits["chance"].append(1 / count)
    return {name: np.array(values) for name, values in hits.items()}


def area(right: np.ndarray, wrong: np.ndarray) -> float:
    """Area under the curve: how often one of `right` is above one of `wrong`, ties half."""
    return float((np.sign(right[:, None] - wrong[None]) / 2 + 0.5).mean())


def interval(statistic, *samples: np.ndarray) -> list[float]:
    """[value, low, high]: the statistic of the samples and its 95 % bootstrap interval, each sample resampled by itself."""
    rng = np.random.default_rng(0)
    drawn = [statistic(*(s[rng.integers(len(s), size=len(s))] for s in samples)) for _ in range(BOOTSTRAP if len(samples) == 1 else BOOTSTRAP // 10)]
    return [round(float(x), 4) for x in (statistic(*samples), *np.quantile(drawn, [0.025, 0.975]))]


def summary(rows: list[dict], found: list[dict[str, list[float]]]) -> dict:
    hits = first_errors(rows, found)
    is_wrong = np.array([row["label"] >= 0 for row in rows])
    sums = {"hindsight": [sum(s["hindsight"]) for s in found], "phi": [sum(s["phi"]) for s in found]}
    sums["surprisal"] = [float(np.mean(s["surprisal"])) for s in found]
    return {
        "wrong": int(is_wrong.sum()), "right": int((~is_wrong).sum()),
        "first_error": {name: interval(np.mean, values) for name, values in hits.items()},
        "over": {
            name: {other: interval(np.mean, hits[name] - hits[other]) for other in (*(("hindsight",) if name == "contrast" else ()), *BASELINES)}
            for name in JUDGED
        },
        "outcome": {
            name: interval(area, np.array(values)[~is_wrong], np.array(values)[is_wrong]) for name, values in sums.items() if not is_wrong.all()
        },
    }  # fmt: skip


def table(result: dict) -> str:
    def cell(x: list[float], sign: str = "") -> str:
        return f"{x[0]:{sign}.2f} [{x[1]:{sign}.2f}, {x[2]:{sign}.2f}]"

    lines = [f"{result['wrong']} solutions with a wrong step, {result['right']} without", "", "| signal | first error | outcome |", "|---|---|---|"]
    for name in SIGNALS:
        outcome = result["outcome"].get(name)
        lines.append(f"| {name} | {cell(result['first_error'][name])} | {cell(outcome) if outcome else ''} |")
    for name, over in result["over"].items():
        lines += ["", f"{name} over " + ", ".join(f"{baseline} {cell(x, '+')}" for baseline, x in over.items())]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attribution_traces", description="Hindsight against steps that people marked.")
    parser.add_argument("model")
    parser.add_argument("steps", type=Path)
    parser.add_argument("answers", type=Path)
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--subset", default="gsm8k", help="of ProcessBench, several joined by commas")
    parser.add_argument("--wrong", action="store_true", help="the wrong solutions alone: nothing of the outcome")
    parser.add_argument("--most", type=int, default=0, help="solutions, wrong ones and right ones by turns; 0: all")
    parser.add_argument("--out", type=outputs.file, help="every figure, and every solution's signals, as JSON")
    options = parser.parse_args(arguments)
    rows = solutions(options.steps, options.answers, options.subset, options.most, options.wrong)
    if len({row["label"] >= 0 for row in rows}) < (1 if options.wrong else 2):
        kinds = "with" if options.wrong else "with and without"
        wanted = f"solutions of subset {options.subset!r} {kinds} a wrong step, whose problems stand in {options.answers}"
        parser.error(f"wanted {wanted}: found {len(rows)}")
    base = {"policy.path": options.model, "problems.path": str(options.answers)}
    settings = config.load(None, options.settings, ("command line", base))
    found = read(settings, rows)
    result = {"model": Path(options.model).name, "settings": options.settings, "subset": options.subset, **summary(rows, found)}
    print(table(result))
    if options.out:
        each = [
            {"id": row["id"], "label": row["label"], **{n: [round(x, 4) for x in v] for n, v in s.items()}}
            for row, s in zip(rows, found, strict=True)
        ]
        options.out.write_text(json.dumps({**result, "solutions": each}) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
