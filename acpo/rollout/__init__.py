"""Sampling engines. One protocol: token ids in, token ids, behaviour log-probs and the finish reason out."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Sample(NamedTuple):
    """One rollout: ids [T] with the end token when there is one, log-probs [T] under the policy that sampled, and whether it ended."""

    ids: Tensor
    logp: Tensor
    finished: bool


class Engine(Protocol):
    def generate(self, prompts: list[list[int]], *, max_new_tokens: int, temperature: float, generator: torch.Generator) -> list[Sample]:
        """One rollout a prompt, in their order. temperature=0 is greedy (log-probs at temperature 1)."""
        ...
