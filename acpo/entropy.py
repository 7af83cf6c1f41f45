"""Regulation of policy entropy: the weight of the bonus follows a target, and the bonus goes where the outcome is still open."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from acpo_kernels import Segments

from .attribution import Attribution
from .config import EntropyConfig

FIRST_BATCHES = 3  # H_0 is measured on these, never a copied constant
DECAY = 0.9


@dataclass
class EntropyController:
    """weight <- clip(weight exp(rate (target - H)/target)) outside a dead band, H the running mean of the token entropy. The target
    falls from start H_0 to end H_0 over training and is half of that in stage 2."""

    config: EntropyConfig
    weight: float = 0.0
    batches: int = 0
    first: float = 0.0
    running: float = 0.0

    def __post_init__(self):
        self.weight = 0.0 if self.config.controller == "none" else self.config.weight

    def target(self, progress: float, stage: int) -> float:
        share = self.config.start + (self.config.end - self.config.start) * min(max(progress, 0.0), 1.0)
        return self.first * share * (0.5 if stage == 2 else 1.0)

    def update(self, entropy: float, progress: float, stage: int) -> None:
        """entropy is the mean token entropy of a batch, progress the share of training that is done."""
        if not math.isfinite(entropy):
            return
        self.batches += 1
        if self.batches <= FIRST_BATCHES:
            self.first += (entropy - self.first) / self.batches
        self.running = entropy if self.batches == 1 else DECAY * self.running + (1 - DECAY) * entropy
        target = self.target(progress, stage)
        if self.config.controller != "target" or self.batches < FIRST_BATCHES or target <= 0:
            return
        error = (target - self.running) / target
        if abs(error) > self.config.dead_band:
            step = math.exp(self.config.rate * max(-20.0, error))
            self.weight = min(max(self.weight * step, self.config.min_weight), self.config.max_weight)

    def token_weights(self, segments: Segments, attribution: Attribution | None, base: Tensor) -> Tensor | None:
        """weight g_k a token [N]: g = h_b(Vhat_{k-1}) / log 2 drawn towards 1 by the reliability, 0 on the answer, mean one.

        base [B] stands in for Vhat where no source looked. None without a bonus.
        """
        if self.weight == 0.0:
            return None
        sequence = segments.segment_sequence_ids()
        gate = torch.ones(segments.num_segments, dtype=torch.float64, device=base.device)
        if self.config.gated and attribution is not None and attribution.reliability > 0:
            open_ = torch.where(attribution.rows[sequence], attribution.previous, base.double()[sequence])
            gate = 1.0 + attribution.reliability * (binary_entropy(open_) / math.log(2.0) - 1.0)
        gate = torch.where(segments.is_terminal(), 0.0, gate)
        tokens = gate[segments.segment_ids()]
        return (self.weight * tokens / tokens.mean().clamp(min=1e-6)).to(torch.float32)

    def state(self) -> dict:
        return {"weight": self.weight, "batches": self.batches, "first": self.first, "running": self.running}

    def load(self, state: dict) -> None:
        self.weight, self.batches, self.first, self.running = state["weight"], state["batches"], state["first"], state["running"]


def binary_entropy(p: Tensor) -> Tensor:
    """h_b(p) = -p log p - (1-p) log(1-p), nats."""
    return -(torch.xlogy(p, p) + torch.xlogy(1 - p, 1 - p))
