"""The optimiser steps of one batch of rollouts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .batch import Batch
from .guard import Guard, NotFinite, finite
from .ranks import Ranks, full

if TYPE_CHECKING:
    from .clock import Clock
    from .config import Config
    from .policy import Policy

MEANS = ("clip_ratio/low_mean", "clip_ratio/high_mean", "kl/old", "kl/ref")
TINY = float(np.finfo(np.float64).tiny)


def update(
    batch: Batch,
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    config: Config,
    *,
    order: np.ndarray,
    step: int,
    stage: int,
    clock: Clock,
    guard: Guard,
    ranks: Ranks,
) -> tuple[dict[str, float], int]:
    """One optimiser step a minibatch of `order`, rollouts [B] without those that the verifier left out; returns the losses' metrics, and how many
    tokens were read by forwards that GRPO does not have. A loss's denominator is that of its whole optimiser step, so micro-batches change nothing.
    An optimiser step whose loss or gradient is not finite is not taken, and counts in no other metric."""
    settings = config.loss
    rate = config.optimizer.learning_rate * min(1.0, step / max(1, config.optimizer.warmup_steps))
    for group in optimizer.param_groups:
        group["lr"] = rate
    clip = (settings.clip_low, min(config.stages.clip_high, settings.clip_high) if stage == 2 else settings.clip_high)
    left_out = batch.sequence["left_out"].cpu().numpy()
    totals = {"loss": 0.0, "grad_norm": 0.0, **dict.fromkeys((*MEANS, "ratio/ess"), 0.0), "ratio/max": 1.0, "ratio/min": 1.0, "optimizer/left_out": 0}
    count, taken, again = 0.0, 0, 0
    for minibatch in np.array_split(order, settings.minibatches):
        rows = minibatch[~left_out[minibatch]].tolist()
        if not rows:
            continue
        optimizer.zero_grad(set_to_none=True)
        try:
            sums = gradients(batch, rows, policy, config, clip, ranks)
            with clock("optimizer"):
                norm = optimizer_step(policy, optimizer, config.optimizer.max_grad_norm)
        except NotFinite as error:
            totals["optimizer/left_out"] += 1
            guard.leave_out(error, f"step {step}", policy, batch.select(rows).token, learning_rate=rate, rollouts=len(rows))
            continue
        guard.taken()
        if not taken:  # the weights were still those that scored: how far this is from 1 is the loop's own error
            totals["ratio/first_off"] = max(sums["ratio/max"] - 1.0, 1.0 - sums["ratio/min"])
        taken += 1
        count += sums["tokens"]
        again += int(sums["again"])
        for name in MEANS:
            totals[name] += sums[name]
        totals["ratio/ess"] += sums["ratio"] * sums["ratio"] / max(sums["squared"], TINY)
        for name, best in (("ratio/max", max), ("ratio/min", min)):
            totals[name] = best(totals[name], sums[name])
        totals["loss"] += sums["loss"]
        totals["grad_norm"] += norm
    for name in (*MEANS, "ratio/ess"):
        totals[name] /= max(count, 1.0)
    for name in ("loss", "grad_norm"):
        totals[name] /= max(taken, 1)
    return {**totals, "learning_rate": rate}, again


def gradients(batch: Batch, rows: list[int], policy: Policy, config: Config, clip: tuple[float, float], ranks: Ranks) -> dict[str, float]:
    """Adds the gradient of one optimiser step, a micro-batch after the other, by every rank for its share. Returns loss, tokens and sums over tokens
    (of the ratio and its square as well), and the tokens that a further forward read, of all ranks together. NotFinite for a loss, on every rank."""
    settings = config.loss
    corrected = config.rollout.engine != "local" and settings.rollout_cap > 0  # the local engine samples from these very weights
    lengths = batch.segments.cu_seqlens.diff()
    tokens = sum(batch.lengths[b] for b in rows)
    sums = {**dict.fromkeys(("loss", "tokens", "ratio", "squared", "again", *MEANS), 0.0), "ratio/max": 1.0, "ratio/min": 1.0}
    for part_rows, counts in ranks.parts(batch, rows, config.trainer.micro_batch_tokens, policy.packed):
        part = batch.select(part_rows)
        if settings.denominator == "tokens":
            denominator: float | Tensor = float(max(tokens, 1))
        elif settings.denominator == "sequences":
            denominator = lengths[part_rows].clamp(min=1).float() * len(rows)
        else:
            denominator = float(config.rollout.max_new_tokens * len(rows))
        result = policy(
            part.prompts, part.responses(), part.token["old_logp"], part.token["advantages"], part.segments,
            temperature=batch.temperature, clip=clip, ratio=settings.ratio, denominator=denominator,
            entropy_weight=part.token.get("entropy_weight"), ref_logp=part.token.get("ref_logp"),
            kl_weight=settings.kl_weight if "ref_logp" in part.token else 0.0,
            rollout_logp=part.token["rollout_logp"] if corrected else None, rollout_cap=settings.rollout_cap or 1.0,
            mask=None if counts else torch.zeros_like(part.token["ids"], dtype=torch.bool),
        )  # fmt: skip
        (result.loss * ranks.size if ranks.sharded else result.loss).backward()  # FSDP2 takes the mean over ranks
        if not counts:
            continue
        sums["loss"] += float(result.loss.detach())
        if "covariant" in part.token:
            sums["again"] += covariance_penalty(part, policy, config, denominator)
        names = ("tokens", "ratio/max", "ratio/min", "ratio/mean", "ratio/ess", *MEANS)
        figures = torch.stack([result.metrics[name].double() for name in names])
        share, largest, smallest, ratio, ess, *means = figures.tolist()  # one wait for the device
        sums["tokens"] += share
        sums["ratio"] += share * ratio
        sums["squared"] += share * ratio * ratio / max(ess, TINY)  # effective sizes of parts are no parts of an effective size
        for name, value in zip(MEANS, means, strict=True):
            sums[name] += share * value
        sums["ratio/max"], sums["ratio/min"] = max(sums["ratio/max"], largest), min(sums["ratio/min"], smallest)
    sums = ranks.added(sums)
    finite("loss", torch.tensor(sums["loss"]))
    ranks.sum_gradients(policy.trained().values())
    return sums


def optimizer_step(policy: Policy, optimizer: torch.optim.Optimizer, most: float) -> float:
    """The step along the gradient, whose norm is clipped to `most` and returned. NotFinite, and no step, where it is no number."""
    norm = finite("gradient norm", full(torch.nn.utils.clip_grad_norm_(policy.parameters(), most)))
    optimizer.step()
    return norm


def covariance_penalty(part: Batch, policy: Policy, config: Config, denominator: float | Tensor) -> int:
    """The gradient of KL-Cov: a KL to the policy that sampled, on the chosen tokens alone; another forward of the few rollouts that hold one. Returns
    how many tokens that read."""
    sequence = part.segments.sequence_ids()
    rows = torch.unique(sequence[part.token["covariant"]]).tolist()
    if not rows:
        return 0
    few = part.select(rows)
    penalty = policy(
        few.prompts, few.responses(), few.token["old_logp"], torch.zeros_like(few.token["advantages"]), few.segments, mask=few.token["covariant"],
        temperature=few.temperature, ref_logp=few.token["old_logp"], kl_weight=config.entropy.covariance_weight,
        denominator=denominator[rows] if isinstance(denominator, Tensor) else denominator,
    )  # fmt: skip
    penalty.loss.backward()
    return few.segments.num_tokens + sum(map(len, few.prompts))
