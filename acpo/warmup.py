"""Supervised examples for the warm-up on a synthetic task: its own traces, some behind a prompt that holds the answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .problems import Problem
from .synthetic import Chain, Multiplication

if TYPE_CHECKING:
    from .policy import Policy
    from .prompts import Prompts


@dataclass(frozen=True)
class Example:
    prompt: str
    response: str
    weights: tuple[float, ...]  # loss weight a character of the response, the end token excluded


def examples(
    task: Multiplication | Chain, problems: list[Problem], count: int, hinted: float, rng: np.random.Generator, probed: float = 0.0, suffix: str = ""
) -> list[Example]:
    """The hint is the trace's OWN final answer, right or wrong: so the hinted policy learns the true conditional of what the policy
    itself would write, not the answer key. A share `probed` breaks off after some of the lines and gives that answer behind the suffix; the loss is
    on the answer alone, so that sampling never learns to break off."""
    out = []
    for index in rng.integers(len(problems), size=count).tolist():
        problem = problems[index]
        trace = task.trace(problem, rng)
        prompt = problem.hinted_prompt(trace.answer) if rng.random() < hinted else problem.prompt
        if probed and prompt is problem.prompt and rng.random() < probed / max(1.0 - hinted, 1e-9):
            lines = trace.text.splitlines(keepends=True)[:-1]
            head = "".join(lines[: int(rng.integers(len(lines) + 1))]) + suffix
            out.append(Example(prompt, head + trace.answer, (0.0,) * len(head) + (1.0,) * len(trace.answer)))
        else:
            out.append(Example(prompt, trace.text, trace.weights))
    return out


def imitation_loss(policy: Policy, prompts: Prompts, drawn: list[Example]) -> Tensor:
    """-sum w log pi / sum w over the tokens of the examples, their end tokens with weight 1."""
    responses = [torch.tensor([*prompts.encode(e.response), prompts.tokenizer.eos_token_id], device=policy.device) for e in drawn]
    weights = torch.tensor([w for e in drawn for w in (*e.weights, 1.0)], device=policy.device)
    hidden = policy.hidden([prompts.prompt(e.prompt) for e in drawn], responses)
    logp, _ = policy.score(hidden, torch.cat(responses), 1.0)
    return -(logp * weights).sum() / weights.sum()
