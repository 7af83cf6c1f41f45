"""Evaluation: greedy accuracy, pass@k and majority@k, each with a 95 % interval.

A rollout is right where its reward is 1. What the verifier left out is not counted: neither right nor wrong, nor among the n of a problem.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from .batch import on_host
from .problems import Problem
from .rollout import Engine
from .verify import Pending, Verifier

CHUNK = 256  # rollouts that are sampled together; they are verified beside the next ones
RESAMPLES = 10_000


@dataclass
class Evaluation:
    """Values under eval/*, their 95 % intervals where they were asked for, and what the verifier counted."""

    values: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    verify: dict[str, float] = field(default_factory=dict)


def pass_at_k(right: np.ndarray, samples: np.ndarray | int, k: int) -> np.ndarray:
    """Unbiased estimate, a problem, of the probability that one of k samples is right, from c right among n: 1 - C(n-c, k)/C(n, k); NaN if n < k."""
    n = np.broadcast_to(np.asarray(samples), np.shape(right)).tolist()
    return np.array([1.0 - math.comb(n - c, k) / math.comb(n, k) if n >= k else math.nan for c, n in zip(right.tolist(), n, strict=True)])


def majority_at_k(right: np.ndarray, answers: list[list[str | None]], k: int) -> np.ndarray:
    """Whether the answer that most of k samples give is right, a problem: the mean over its disjoint blocks of k samples. Answers are one where their
    normal forms are; of equally frequent ones the first wins; without any answer it is wrong. right [P, n] is NaN for what was left out; NaN where
    fewer than k are left."""
    out = []
    for flags, given in zip(right, answers, strict=True):
        kept = [(r, a) for r, a in zip(flags.tolist(), given, strict=True) if not math.isnan(r)]
        won = []
        for begin in range(0, len(kept) - k + 1, k):
            block = [(r, a) for r, a in kept[begin : begin + k] if a is not None]
            top = Counter(a for _, a in block).most_common(1)  # in the order of first appearance among equals
            won.append(next(r for r, a in block if a == top[0][0]) if top else 0.0)
        out.append(float(np.mean(won)) if won else math.nan)
    return np.array(out)


def bootstrap(values: np.ndarray, seed: int = 0, resamples: int = RESAMPLES) -> tuple[float, float]:
    """95 % interval of the mean over problems: the 2.5 and 97.5 percentiles of the means of resampled problems (with replacement). The rollouts of a
    problem stay together. Where all problems agree it has no width, however few they are."""
    rng, known = np.random.default_rng(seed), values[~np.isnan(values)]
    if not len(known):
        return math.nan, math.nan
    rows = max(1, 2**22 // len(known))
    means = [known[rng.integers(len(known), size=(min(rows, resamples - i), len(known)))].mean(1) for i in range(0, resamples, rows)]
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return float(low), float(high)


def evaluate(
    engine: Engine,
    tokenizer,
    problems: list[Problem],
    prompts: list[list[int]],
    verifier: Verifier,
    *,
    max_new_tokens: int,
    samples: int,
    generator: torch.Generator,
    temperature: float = 1.0,
    ks: list[int] | None = None,
    intervals: bool = False,
    advance: Callable[[int], None] = lambda _: None,
) -> Evaluation:
    """`eval/accuracy` (greedy), and with samples > 0 `eval/pass@k` for k in ks (default: 1 and samples) and `eval/majority@k` for those above 1.

    The samples come from a generator of their own. advance(n) is told of every n rollouts.
    """

    def judged(temperature: float, each: int) -> tuple[np.ndarray, list[list[str | None]]]:
        asked = [i for i in range(len(problems)) for _ in range(each)]
        pending: list[Pending] = []
        answers: list[str | None] = []
        for begin in range(0, len(asked), CHUNK):
            chunk = asked[begin : begin + CHUNK]
            rollouts = engine.generate([prompts[i] for i in chunk], max_new_tokens=max_new_tokens, temperature=temperature, generator=generator)
            texts = tokenizer.batch_decode(on_host([r.ids for r in rollouts]), skip_special_tokens=True)
            pending.append(verifier.submit([problems[i] for i in chunk], texts))
            answers += [verifier.answer(text) for text in texts] if each > 1 else [None] * len(chunk)
            advance(len(chunk))
        verdicts = [v for part in pending for v in part.result()]
        verifier.whole([problems[i] for i in asked], [v.status for v in verdicts])
        rewards = [math.nan if v.reward is None else v.reward for v in verdicts]
        right = np.array([r if math.isnan(r) else float(r >= 1.0) for r in rewards]).reshape(-1, each)
        return right, [answers[i * each : (i + 1) * each] for i in range(len(problems))]

    verifier.metrics()  # what was counted before is not this evaluation's
    found = {"eval/accuracy": judged(0.0, 1)[0][:, 0]}
    if samples:
        right, answers = judged(temperature, samples)
        counts, known = np.nansum(right, 1).astype(int), (~np.isnan(right)).sum(1)
        for k in sorted(set(ks or (1, samples))):
            found[f"eval/pass@{k}"] = pass_at_k(counts, known, k)
            if k > 1:
                found[f"eval/majority@{k}"] = majority_at_k(right, answers, k)
    out = Evaluation(verify=verifier.metrics())
    for name, values in found.items():
        out.values[name] = float(np.nanmean(values)) if not np.isnan(values).all() else math.nan
        if intervals:
            out.intervals[name] = bootstrap(values)
    return out
