"""Advantages of a generation batch from its rewards, by TRL's formula: stage 2 needs it once more with other outcomes."""

from __future__ import annotations

import torch
from torch import Tensor
from trl.trainer.utils import nanstd


def group_advantages(rewards: Tensor, weights: Tensor, group_size: int, scale: str) -> Tensor:
    """rewards [B,F] of all processes, NaN where a function gave none; `multi_objective_aggregation="sum_then_normalize"`. A test holds it equal to
    GRPOTrainer's, to the bit."""
    summed = (rewards * weights.to(rewards.device).unsqueeze(0)).nansum(dim=1)
    summed[torch.isnan(rewards).all(dim=1)] = torch.nan
    groups = summed.view(-1, group_size)
    mean = torch.nanmean(groups, dim=1).repeat_interleave(group_size, dim=0)
    advantages = summed - mean
    if scale == "group":
        advantages = advantages / (nanstd(groups, dim=1).repeat_interleave(group_size, dim=0) + 1e-4)
    elif scale == "batch":
        advantages = advantages / (nanstd(summed).expand_as(summed) + 1e-4)
    return torch.nan_to_num(advantages, nan=0.0)
