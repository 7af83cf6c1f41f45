"""Held-out evaluation: greedy accuracy, and pass@k from sampled rollouts."""

from __future__ import annotations

import math

import numpy as np
import torch

from .problems import Problem
from .rollout import Engine
from .verify import exact_match


def pass_at_k(right: np.ndarray, samples: int, k: int) -> float:
    """Unbiased estimate of the probability that one of k samples is right, from c right among n: 1 - C(n-c, k)/C(n, k)."""
    return float(np.mean([1.0 - math.comb(samples - int(c), k) / math.comb(samples, k) for c in right]))


def evaluate(
    engine: Engine,
    tokenizer,
    problems: list[Problem],
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    extract: str,
    samples: int,
    generator: torch.Generator,
) -> dict[str, float]:
    """`eval/accuracy` (greedy), and with samples > 0 `eval/pass@1` and `eval/pass@samples` at temperature 1, drawn from a generator of its own."""

    def right(prompts: list[list[int]], temperature: float, problems: list[Problem]) -> np.ndarray:
        rollouts = engine.generate(prompts, max_new_tokens=max_new_tokens, temperature=temperature, generator=generator)
        texts = tokenizer.batch_decode([r.ids for r in rollouts], skip_special_tokens=True)
        return np.array([exact_match(p, t, extract) for p, t in zip(problems, texts, strict=True)])

    out = {"eval/accuracy": float(right(prompts, 0.0, problems).mean())}
    if samples:
        repeated = [p for p in prompts for _ in range(samples)]
        counts = right(repeated, 1.0, [p for p in problems for _ in range(samples)]).reshape(-1, samples).sum(1)
        for k in sorted({1, samples}):
            out[f"eval/pass@{k}"] = pass_at_k(counts, samples, k)
    return out
