"""The named tuples that operations return."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

METRICS = (
    "tokens", "clip_ratio/low_mean", "clip_ratio/high_mean", "ratio/mean", "ratio/min", "ratio/max", "ratio/ess", "kl/old", "kl/ref", "entropy",
)  # fmt: skip


class LogprobEntropy(NamedTuple):
    """Of each row, of the shape of ids, nats: the log-prob of its token and the entropy of its distribution."""

    logp: Tensor
    entropy: Tensor


class HindsightInformation(NamedTuple):
    """Of each row, of the shape of ids, nats: log-prob under the policy and under hindsight, the policy's entropy, hindsight_logp - logp,
    KL(policy || hindsight) and KL(hindsight || policy)."""

    logp: Tensor
    hindsight_logp: Tensor
    entropy: Tensor
    log_ratio: Tensor
    kl: Tensor
    information: Tensor


class SegmentCredit(NamedTuple):
    """token_advantages [N], and weights [S], 1 in the additive form."""

    token_advantages: Tensor
    weights: Tensor


class PolicyLoss(NamedTuple):
    """The loss, 0-d, which alone is differentiable, and metrics by name, each 0-d."""

    loss: Tensor
    metrics: dict[str, Tensor]


class LinearPolicyLoss(NamedTuple):
    """As PolicyLoss, with each row's log-prob and entropy [N], detached."""

    loss: Tensor
    metrics: dict[str, Tensor]
    logp: Tensor
    entropy: Tensor
