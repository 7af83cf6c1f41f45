"""The optimiser steps of one batch of rollouts."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .batch import Batch

if TYPE_CHECKING:
    from .clock import Clock
    from .config import Config
    from .policy import Policy

STANDS = "the last checkpoint stands; a lower optimizer.learning_rate is the usual way out"
MEANS = ("clip_ratio/low_mean", "clip_ratio/high_mean", "kl/old", "kl/ref", "ratio/ess")


class TrainingError(RuntimeError):
    """Training cannot go on; the last checkpoint stands."""


def update(
    batch: Batch, policy: Policy, optimizer: torch.optim.Optimizer, config: Config, *, order: np.ndarray, step: int, stage: int, clock: Clock
) -> dict[str, float]:
    """One optimiser step a minibatch of `order`, rollouts [B] without those that the verifier left out; returns the losses' metrics.
    A loss's denominator is that of its whole optimiser step, so micro-batches change nothing."""
    settings = config.loss
    corrected = config.rollout.engine != "local" and settings.rollout_cap > 0  # the local engine samples from these very weights
    rate = config.optimizer.learning_rate * min(1.0, step / max(1, config.optimizer.warmup_steps))
    for group in optimizer.param_groups:
        group["lr"] = rate
    clip = (settings.clip_low, config.stages.clip_high if stage == 2 else settings.clip_high)
    left_out = batch.sequence["left_out"].cpu().numpy()
    lengths = batch.segments.cu_seqlens.diff()
    totals: dict[str, float] = defaultdict(float, {"loss": 0.0, "grad_norm": 0.0})
    count, first = 0.0, True
    for minibatch in np.array_split(order, settings.minibatches):
        rows = minibatch[~left_out[minibatch]].tolist()
        if not rows:
            continue
        tokens = sum(batch.lengths[b] for b in rows)
        optimizer.zero_grad(set_to_none=True)
        for part_rows in batch.micro_batches(rows, config.trainer.micro_batch_tokens):
            part = batch.select(part_rows)
            if settings.denominator == "tokens":
                denominator: float | Tensor = float(max(tokens, 1))
            elif settings.denominator == "sequences":
                denominator = lengths[part_rows].clamp(min=1).float() * len(rows)
            else:
                denominator = float(config.rollout.max_new_tokens * len(rows))
            result = policy(
                part.prompts, part.responses(), part.token["old_logp"], part.token["advantages"], part.segments,
                temperature=config.rollout.temperature, clip=clip, ratio=settings.ratio, denominator=denominator,
                entropy_weight=part.token.get("entropy_weight"), ref_logp=part.token.get("ref_logp"),
                kl_weight=config.stages.kl_weight if "ref_logp" in part.token else 0.0,
                rollout_logp=part.token["rollout_logp"] if corrected else None, rollout_cap=settings.rollout_cap or 1.0,
            )  # fmt: skip
            if not math.isfinite(result.loss.item()):
                raise TrainingError(f"the loss is {result.loss.item()} at step {step}: the step is not taken and {STANDS}")
            result.loss.backward()
            if "covariant" in part.token:
                covariance_penalty(part, policy, config, denominator)
            totals["loss"] += result.loss.item() / settings.minibatches
            share = float(result.metrics["tokens"])
            count += share
            for name in MEANS:
                totals[name] += share * float(result.metrics[name])
            for name, best in (("ratio/max", max), ("ratio/min", min)):
                totals[name] = best(totals.get(name, 1.0), float(result.metrics[name]))
            if first:  # the weights are still those that scored: how far this is from 1 is the loop's own error
                totals["ratio/first_off"] = max(totals["ratio/max"] - 1.0, 1.0 - totals["ratio/min"])
        first = False
        with clock("optimizer"):
            norm = float(torch.nn.utils.clip_grad_norm_(policy.parameters(), config.optimizer.max_grad_norm))
            if not math.isfinite(norm):
                raise TrainingError(f"the gradient norm is {norm} at step {step}: the step is not taken and {STANDS}")
            optimizer.step()
        totals["grad_norm"] += norm / settings.minibatches
    for name in MEANS:
        totals[name] /= max(count, 1.0)
    return {**totals, "learning_rate": rate}


def covariance_penalty(part: Batch, policy: Policy, config: Config, denominator: float | Tensor) -> None:
    """The gradient of KL-Cov: a KL to the policy that sampled, on the chosen tokens alone; another forward of the few rollouts that hold one."""
    sequence = part.segments.sequence_ids()
    rows = torch.unique(sequence[part.token["covariant"]]).tolist()
    if not rows:
        return
    few = part.select(rows)
    penalty = policy(
        few.prompts, few.responses(), few.token["old_logp"], torch.zeros_like(few.token["advantages"]), few.segments, mask=few.token["covariant"],
        temperature=config.rollout.temperature, ref_logp=few.token["old_logp"], kl_weight=config.entropy.covariance_weight,
        denominator=denominator[rows] if isinstance(denominator, Tensor) else denominator,
    )  # fmt: skip
    penalty.loss.backward()
