"""From outcomes and attribution to one advantage a token."""

from __future__ import annotations

import torch
from torch import Tensor

from acpo_kernels import SegmentCredit, Segments, segment_credit

from .attribution import Attribution, zero_variance
from .config import CreditConfig


def outcome_advantages(rewards: Tensor, group_size: int, kind: str) -> Tensor:
    """A_i of each rollout within its group, [B]: grpo (R - mean)/std, rloo R - mean of the others, centred R - mean.

    A group whose rewards are all equal gives exactly 0.
    """
    groups = rewards.view(-1, group_size)
    centred = groups - groups.mean(1, keepdim=True)
    centred = torch.where((groups == groups[:, :1]).all(1, keepdim=True), 0.0, centred)
    if kind == "grpo":
        centred = centred / (groups.std(1, keepdim=True, correction=0) + 1e-6)
    elif kind == "rloo":
        centred = centred * group_size / (group_size - 1)
    return centred.flatten()


def confident_rewards(outcome: Tensor, confidence: Tensor, group_size: int, omega: float) -> Tensor:
    """r = R - omega (c - R)^2, the Brier score beside the outcome; plain R in groups without both outcomes, where it would train
    nothing but self-certainty."""
    rewards = outcome - omega * (confidence - outcome).square()
    return torch.where(zero_variance(outcome, group_size), outcome, rewards)


def keep_side(advantages: Tensor, plain: Tensor) -> Tensor:
    """Advantages clipped at 0 on the other side of the plain outcome's: a right answer is never punished for being unsure."""
    return torch.where(plain > 0, advantages.clamp(min=0.0), torch.where(plain < 0, advantages.clamp(max=0.0), advantages))


def token_advantages(
    advantages: Tensor, attribution: Attribution | None, outcome: Tensor, segments: Segments, group_size: int, config: CreditConfig
) -> SegmentCredit:
    """The credit form of the configuration, restricted to the rollouts of its scope. Reliability 0 is the outcome advantage, bitwise.

    additive, from a source's own shaping c_k (hindsight): z_k = clip((c_k - mean of the group) / std of the batch, +-3), added with
    `gain`. From phi alone (tree): dVhat_k / max(std of the group's outcomes, 1/4). weights: bounded conserving weights from phi.
    """
    if attribution is None or config.form == "none":
        zero = torch.zeros(segments.num_segments, device=advantages.device)
        return segment_credit(zero, segments, advantages, form="additive", reliability=0.0, scale=1.0)
    sequence, ordinary = segments.segment_sequence_ids(), ~segments.is_terminal()
    scope = attribution.rows & zero_variance(outcome, group_size) if config.scope == "zero_variance" else attribution.rows
    reliability = attribution.reliability * scope.to(advantages.dtype)
    use = (scope[sequence] & ordinary).to(advantages.dtype)
    scale: float | Tensor
    if config.form == "weights":
        scores = attribution.phi.to(advantages.dtype)
        scale = (scores.abs() * use).sum() / use.sum().clamp(min=1.0) + 1e-6
    elif attribution.shaping is None:
        spread = outcome.view(-1, group_size).std(1, correction=0).clamp(min=0.25).repeat_interleave(group_size)
        scores, scale = attribution.phi.to(advantages.dtype) / spread[sequence].to(advantages.dtype), 1.0
    else:
        shaping = attribution.shaping.to(advantages.dtype)
        group = sequence // group_size
        groups = torch.zeros(segments.num_sequences // group_size, dtype=shaping.dtype, device=shaping.device)
        mean = groups.index_add(0, group, shaping * use) / groups.index_add(0, group, use).clamp(min=1.0)
        scores = (shaping - mean[group]) * use
        scale = (scores.square().sum() / use.sum().clamp(min=1.0)).sqrt() + 1e-6
    return segment_credit(scores, segments, advantages, form=config.form, bound=config.bound, gain=config.gain, reliability=reliability, scale=scale)
