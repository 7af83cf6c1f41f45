"""Regulation of policy entropy: the temperature of stage 1, and a bonus whose weight follows a target and which goes where the outcome is open."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from acpo_kernels import Segments

from .attribution import Attribution, binary_entropy
from .config import EntropyConfig
from .stages import Stages

FIRST_BATCHES = 3  # H_0 is measured on these, never a copied constant
DECAY = 0.9
STEP, STEP_MOST = 1e-4, 5e-3  # Skywork-OR1's: what its weight moves by, and where it ends
HEAT_SUCCESS = (0.25, 0.35)  # where rollouts begin to be heated, and where in full
HEAT_ENTROPY = 0.3  # nats a token, above which they never are
PATIENCE = 20  # batches of too little entropy at the highest weight before KL-Cov comes on


@dataclass
class EntropyController:
    """weight <- clip(weight exp(rate (target - H)/target)) outside a dead band, H the running mean of the token entropy. The target
    falls from start H_0 to end H_0 over training and is half of that in stage 2.

    Baselines: `constant`; `step`, the controller of Skywork-OR1 (arXiv 2505.22312): the weight moves by 1e-4 a batch within [0, 0.005], up where H
    is below the target and down elsewhere, and there is a bonus only while H is at or below it. KL-Cov (`covariant_tokens`) comes on for good where
    the target controller has been at its highest weight with H below half the target for 20 batches.
    """

    config: EntropyConfig
    weight: float = 0.0
    batches: int = 0
    first: float = 0.0
    running: float = 0.0
    short: int = 0  # batches in a row with too little entropy although the weight is at its highest
    covariance: bool = False
    below: bool = False  # step: whether H is at or below the target

    def __post_init__(self):
        self.weight = self.config.weight if self.config.controller in ("target", "constant") else 0.0
        self.covariance = self.config.covariance == "always"

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
        if self.batches < FIRST_BATCHES or target <= 0:
            return
        if self.config.controller == "step":
            self.below = self.running <= target
            self.weight = min(max(self.weight + (STEP if self.running < target else -STEP), 0.0), STEP_MOST)
        if self.config.controller != "target":
            return
        error = (target - self.running) / target
        if abs(error) > self.config.dead_band:
            step = math.exp(self.config.rate * max(-20.0, error))
            self.weight = min(max(self.weight * step, self.config.min_weight), self.config.max_weight)
        self.short = self.short + 1 if self.weight >= self.config.max_weight and self.running < 0.5 * target else 0
        if self.short >= PATIENCE and self.config.covariance == "fallback":
            self.covariance = True

    def exploration(self, most: float, stages: Stages) -> float:
        """What the sampling temperature of the next batch is multiplied by, in [1, most]:

            1 + (most - 1) clip((S - 0.25) / 0.1, 0, 1) clip(2 - 2 H / 0.3, 0, 1)

        S is the running success of the sampled problems, H the running entropy in nats a token. Heat spreads a policy that has closed up, and costs
        success: where little succeeds there is none to spare, and a policy that is spread out already needs none. 1 in stage 2, without two stages
        and before the first batch. The rule is ours; E3-RL4LLMs (arXiv 2505.18573) holds entropy by temperature as well.
        """
        if not stages.config.two or stages.stage == 2 or stages.success is None or not self.batches:
            return 1.0
        low, full = HEAT_SUCCESS
        affords = min(max((stages.success - low) / (full - low), 0.0), 1.0)
        return 1.0 + (most - 1.0) * affords * min(max(2.0 - 2.0 * self.running / HEAT_ENTROPY, 0.0), 1.0)

    def token_weights(self, segments: Segments, attribution: Attribution | None, mask: Tensor | None = None) -> Tensor | None:
        """weight g_k a token [N]: g = h_b(Vhat_{k-1}) / log 2 drawn towards 1 by the reliability, 0 on the answer, scaled to mean one over the tokens
        that the policy wrote (mask [N], None: all), the answer's among them; 0 on the others. None without a bonus."""
        if self.weight == 0.0 or (self.config.controller == "step" and not self.below):
            return None
        gate = torch.ones(segments.num_segments, dtype=torch.float64, device=segments.device)
        if self.config.gated and attribution is not None:
            reliability = attribution.reliability[segments.segment_sequence_ids()]
            gate = gate + reliability * (binary_entropy(attribution.previous) / math.log(2.0) - 1.0)
        gate = torch.where(segments.is_terminal(), 0.0, gate)
        tokens = gate[segments.segment_ids()]
        mean = tokens.mean() if mask is None else tokens[mask].mean()
        tokens = self.weight * tokens / mean.clamp(min=1e-6)
        return (tokens if mask is None else torch.where(mask, tokens, 0.0)).to(torch.float32)

    def state(self) -> dict:
        return {name: getattr(self, name) for name in ("weight", "batches", "first", "running", "short", "covariance", "below")}

    def load(self, state: dict) -> None:
        for name, value in state.items():
            setattr(self, name, value)


def covariant_tokens(advantages: Tensor, logp: Tensor, share: float) -> Tensor:
    """KL-Cov (arXiv 2505.22617): which tokens [N] have the highest (A_t - mean A)(log pi_t - mean log pi), a share of them and at least one. Entropy
    falls by minus that covariance; those tokens get a penalty on how far the policy moves."""
    covariance = (advantages - advantages.mean()) * (logp - logp.mean())
    chosen = torch.zeros_like(covariance, dtype=torch.bool)
    if len(covariance):
        chosen[covariance.topk(max(1, round(share * len(covariance)))).indices] = True
    return chosen
