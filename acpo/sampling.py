"""From the rollouts of a step's questions to its batch."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .batch import Batch
from .verify import STATUSES


class Group(NamedTuple):
    """The rollouts of one question."""

    problem: int  # its place among the training problems
    prompt: list[int]
    samples: list[Any]  # of rollout.Sample
    rewards: np.ndarray  # [G], NaN where the verifier left a rollout out
    statuses: list[str]  # [G], of verify.STATUSES

    @property
    def mixed(self) -> bool:
        """Whether it has more than one outcome: without, GRPO has no gradient."""
        return len(np.unique(self.rewards[~np.isnan(self.rewards)])) > 1


def assembled(groups: list[Group], temperature: float, device: torch.device) -> tuple[np.ndarray, Batch, Tensor]:
    """(problem of each group, batch of B rollouts, outcome [B] in float32 with NaN for what was left out)."""
    samples = [sample for group in groups for sample in group.samples]
    prompts = [group.prompt for group in groups for _ in group.samples]
    batch = Batch.from_responses(prompts, [s.ids for s in samples], temperature, rollout_logp=[s.logp for s in samples])
    outcome = torch.tensor(np.concatenate([group.rewards for group in groups]), dtype=torch.float32, device=device)
    batch.sequence["finished"] = torch.tensor([s.finished for s in samples], device=device)
    batch.sequence["left_out"] = outcome.isnan()
    batch.sequence["verdict"] = torch.tensor([STATUSES.index(status) for group in groups for status in group.statuses], device=device)
    return np.array([group.problem for group in groups]), batch, outcome
