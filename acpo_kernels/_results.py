"""The named tuples that operations return."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

METRICS = (
    "tokens", "clip_ratio/low_mean", "clip_ratio/high_mean", "ratio/mean", "ratio/min", "ratio/max", "ratio/ess", "kl/old", "kl/ref", "entropy",
)  # fmt: skip


class LogprobEntropy(NamedTuple):
    logp: Tensor
    entropy: Tensor


class HindsightInformation(NamedTuple):
    logp: Tensor
    hindsight_logp: Tensor
    entropy: Tensor
    log_ratio: Tensor
    kl: Tensor
    information: Tensor


class SegmentCredit(NamedTuple):
    token_advantages: Tensor
    weights: Tensor


class PolicyLoss(NamedTuple):
    loss: Tensor
    metrics: dict[str, Tensor]


class LinearPolicyLoss(NamedTuple):
    loss: Tensor
    metrics: dict[str, Tensor]
    logp: Tensor
    entropy: Tensor
