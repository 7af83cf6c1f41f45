"""Supervised examples for the warm-up on a synthetic task: its own traces, some behind a prompt that holds the answer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .problems import Problem
from .synthetic import Chain, Multiplication


@dataclass(frozen=True)
class Example:
    prompt: str
    response: str
    weights: tuple[float, ...]  # loss weight a character of the response, the end token excluded


def examples(task: Multiplication | Chain, problems: list[Problem], count: int, hinted: float, rng: np.random.Generator) -> list[Example]:
    """The hint is the trace's OWN final answer, right or wrong: so the hinted policy learns the true conditional of what the policy
    itself would write, not the answer key."""
    out = []
    for index in rng.integers(len(problems), size=count).tolist():
        problem = problems[index]
        trace = task.trace(problem, rng)
        prompt = problem.hinted_prompt(trace.answer) if rng.random() < hinted else problem.prompt
        out.append(Example(prompt, trace.text, trace.weights))
    return out
