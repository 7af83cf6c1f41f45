"""What each reasoning step did to the probability of success: phi (signed, for credit) and iota (nats, for the information budget).

Every source gives EVIDENCE e_k at each boundary k, in log-odds, about the outcome R of the rollout. One calibrator turns evidence
into Vhat_k, logit Vhat_k = a + b logit(base) + c e_k, fitted on the last batches before it predicts the next (prequential); one
reliability says how much better that is than what was known before the first step. Then

    phi_k = Vhat_k - Vhat_{k-1},      iota_k = log Phat(R | s_k) - log Phat(R | s_{k-1}),

which telescope for any Vhat.

* hindsight: e_k is the sum of l_t = log pi(y_t | q, a*, y_<t) - log pi(y_t | q, y_<t) up to k. Its shaping for the additive credit is
  the segment sum of the centred l_t + KL_t, zero-mean under the policy's own sampling.
* tree: e_k is the log-odds step from the leave-one-out group mean to the group's prefix tree.
"""

from __future__ import annotations

from collections import defaultdict, deque
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from acpo_kernels import Segments, segment_reduce

MIN_BOUNDARIES = 200  # a reliability from fewer is noise
FIT_BATCHES = 8
MINORITY = 0.05  # least share of the rarer outcome for skill to be measured
DECAY = 0.9
SLOPE, THRESHOLD = 3.0, 0.05  # reliability = min(1, SLOPE * skill), 0 below THRESHOLD


@dataclass
class Evidence:
    """What a source saw: evidence [S] (log-odds, running from the start of the rollout), shaping [S] (signed credit of the segment
    itself, nats; None: phi serves), and the rollouts [B] that it looked at."""

    evidence: Tensor
    shaping: Tensor | None
    rows: Tensor


@dataclass
class Attribution:
    """phi, iota, values (Vhat_k) and previous (Vhat_{k-1}) a segment [S]; shaping [S] or None; rows [B]; reliability in [0, 1]."""

    phi: Tensor
    iota: Tensor
    values: Tensor
    previous: Tensor
    shaping: Tensor | None
    rows: Tensor
    reliability: float


def hindsight_evidence(log_ratio: Tensor, kl: Tensor, segments: Segments, mask: Tensor, rows: Tensor, clamp: float) -> Evidence:
    """Evidence of the hindsight stream; `mask` leaves out tokens that spell the answer. Not finite counts as 0."""
    log_ratio, kl = (torch.nan_to_num(x, nan=0.0, posinf=0.0, neginf=0.0) for x in (log_ratio, kl))
    raw, centred = segment_reduce(torch.stack([log_ratio, log_ratio + kl]), segments, mask=mask)
    return Evidence(running_sum(raw, segments), centred.clamp(-clamp, clamp), rows)


def tree_evidence(prefixes: list[list[bytes]], rewards: Tensor, group_size: int, segments: Segments, kappa: float) -> Evidence:
    """Evidence of the leave-one-out prefix tree: prefixes[b][k] identifies all tokens of rollout b up to its boundary k.

    V_{-i}(s) = (sum_{j != i, prefix_j = s} R_j + kappa Rbar_{-i}) / (n_{-i} + kappa)
    """
    outcome = rewards.tolist()
    values = []
    for begin in range(0, len(prefixes), group_size):
        group = range(begin, begin + group_size)
        through: dict[bytes, list[float]] = defaultdict(list)
        for b in group:
            for prefix in prefixes[b]:
                through[prefix].append(outcome[b])
        total = sum(outcome[b] for b in group)
        for b in group:
            base = (total - outcome[b]) / (group_size - 1)
            for prefix in prefixes[b]:
                others, n = sum(through[prefix]) - outcome[b], len(through[prefix]) - 1
                values.append((others + kappa * base) / (n + kappa) if n + kappa > 0 else base)
    value = torch.tensor(values, dtype=rewards.dtype, device=rewards.device)
    base = leave_one_out(rewards, group_size)[segments.segment_sequence_ids()]
    low = 0.5 / group_size
    return Evidence(torch.logit(value, low) - torch.logit(base, low), None, torch.ones_like(rewards, dtype=torch.bool))


def leave_one_out(rewards: Tensor, group_size: int) -> Tensor:
    """Mean outcome of the other rollouts of the group, [B]."""
    groups = rewards.view(-1, group_size)
    return ((groups.sum(1, keepdim=True) - groups) / (group_size - 1)).flatten()


def zero_variance(outcome: Tensor, group_size: int) -> Tensor:
    """Which rollouts belong to a group whose outcomes are all equal, [B]."""
    groups = outcome.view(-1, group_size)
    return (groups == groups[:, :1]).all(1).repeat_interleave(group_size)


def running_sum(values: Tensor, segments: Segments) -> Tensor:
    """Sum of a rollout's segments up to and including each, [S]."""
    total = torch.nn.functional.pad(values.double().cumsum(0), (1, 0))
    start = total[segments.sequence_offsets[:-1]][segments.segment_sequence_ids()]
    return (total[1:] - start).to(values.dtype)


def previous_in_sequence(values: Tensor, first: Tensor, segments: Segments) -> Tensor:
    """The value at the boundary before each segment: that of the segment before it, first [B] for a rollout's first segment."""
    out = values.roll(1)
    starts = segments.sequence_offsets[:-1]
    has = segments.sequence_offsets.diff() > 0
    out[starts[has]] = first[has].to(out.dtype)
    return out


@dataclass
class Calibrator:
    """Platt scaling, logit Vhat_k = a + b logit(base) + c evidence, from the last batches; and the same without the evidence for Vhat_0,
    what can be said before the first step. Both by penalised maximum likelihood, drawn towards trusting the inputs: (0, 1, 1), (0, 1)."""

    with_evidence: list[float] = field(default_factory=lambda: [0.0, 1.0, 1.0])
    before: list[float] = field(default_factory=lambda: [0.0, 1.0])
    batches: deque = field(default_factory=lambda: deque(maxlen=FIT_BATCHES))  # rows logit(base), evidence, outcome, weight

    def predict(self, base: Tensor, evidence: Tensor, low: float) -> Tensor:
        a, b, c = self.with_evidence
        return torch.sigmoid(a + b * torch.logit(base.double(), low) + c * evidence.double()).clamp(low, 1.0 - low)

    def predict_before(self, base: Tensor, low: float) -> Tensor:
        a, b = self.before
        return torch.sigmoid(a + b * torch.logit(base.double(), low)).clamp(low, 1.0 - low)

    def fit(self, base: Tensor, evidence: Tensor, outcome: Tensor, weight: Tensor, low: float) -> None:
        """Adds a batch of boundaries and fits again. weight says how much of an independent outcome each is: the boundaries of one rollout
        share its outcome. Evidence that points the wrong way gets coefficient 0."""
        if len(outcome):
            rows = torch.stack([torch.logit(base.double(), low), evidence.double(), outcome.double(), weight.double()])
            self.batches.append(rows.cpu().numpy())
        if not self.batches:
            return
        logit, seen, y, independent = np.concatenate(self.batches, 1)
        one = np.ones_like(logit)
        self.with_evidence = logistic_fit(np.stack([one, logit, seen], 1), y, independent, np.array([0.0, 1.0, 1.0]))
        self.with_evidence[2] = max(0.0, self.with_evidence[2])
        self.before = logistic_fit(np.stack([one, logit], 1), y, independent, np.array([0.0, 1.0]))

    def both_outcomes(self) -> bool:
        """Whether the batches that the next prediction rests on hold both outcomes: without that, skill cannot be told from luck."""
        mean = float(np.concatenate([b[2] for b in self.batches]).mean()) if self.batches else 0.0
        return MINORITY <= mean <= 1.0 - MINORITY

    def state(self) -> dict:
        return {"with_evidence": self.with_evidence, "before": self.before, "batches": [b.tolist() for b in self.batches]}

    def load(self, state: dict) -> None:
        self.with_evidence, self.before = list(state["with_evidence"]), list(state["before"])
        self.batches = deque((np.array(b, dtype=np.float64).reshape(4, -1) for b in state["batches"]), maxlen=FIT_BATCHES)


def logistic_fit(features: np.ndarray, y: np.ndarray, weight: np.ndarray, prior: np.ndarray) -> list[float]:
    """Weighted logistic regression by Newton's method under the penalty |w - prior|^2 / 2. In numpy: for a few hundred rows torch's
    threads cost more than the arithmetic."""
    w = prior.copy()
    for _ in range(50):
        p = 1.0 / (1.0 + np.exp(-np.clip(features @ w, -500.0, 500.0)))
        gradient = features.T @ (weight * (p - y)) + (w - prior)
        hessian = features.T @ (features * (weight * p * (1 - p))[:, None]) + np.eye(len(w))
        step = np.clip(np.linalg.solve(hessian, gradient), -1.0, 1.0)
        w -= step
        if np.abs(step).max() < 1e-9:
            break
    return w.tolist()


@dataclass
class Reliability:
    """Skill of Vhat over what was known before the steps: 3 (1 - M1/M0) from averages over earlier batches, 0 without evidence of any."""

    fixed: float | None = None
    m1: float = 0.0
    m0: float = 0.0
    boundaries: int = 0

    @property
    def value(self) -> float:
        if self.fixed is not None:
            return self.fixed
        if self.boundaries < MIN_BOUNDARIES or self.m0 <= 0:
            return 0.0
        raw = SLOPE * (1.0 - self.m1 / self.m0)
        return 0.0 if raw < THRESHOLD else min(raw, 1.0)

    def update(self, values: Tensor, first: Tensor, base: Tensor, outcome: Tensor) -> None:
        if not len(outcome):
            return
        error = [float((x.double() - outcome.double()).square().mean()) for x in (values, first, base)]
        self.m1 = DECAY * self.m1 + (1 - DECAY) * error[0]
        self.m0 = DECAY * self.m0 + (1 - DECAY) * min(error[1], error[2])
        self.boundaries += len(outcome)

    def state(self) -> dict:
        return {"m1": self.m1, "m0": self.m0, "boundaries": self.boundaries}

    def load(self, state: dict) -> None:
        self.m1, self.m0, self.boundaries = state["m1"], state["m0"], state["boundaries"]


class Attributor:
    """Calibrates a source's evidence and measures its reliability, in that order: predict, score, then fit."""

    def __init__(self, reliability: float | None = None):
        self.calibrator, self.reliability = Calibrator(), Reliability(reliability)

    def __call__(self, evidence: Evidence, outcome: Tensor, base: Tensor, segments: Segments, group_size: int) -> Attribution:
        """base [B] is the probability of success known before the steps; outcome [B] the verifier's R in [0, 1]."""
        low = 0.5 / group_size
        sequence = segments.segment_sequence_ids()
        terminal = segments.is_terminal()
        seen = evidence.rows[sequence]
        first = self.calibrator.predict_before(base, low)
        values = self.calibrator.predict(base[sequence], torch.where(seen, evidence.evidence, 0.0), low)
        values = torch.where(seen, values, first[sequence])
        # After the answer the outcome is known: the terminal boundary belongs to it, and takes no part in phi of the steps.
        values = torch.where(terminal & seen, outcome.double()[sequence].clamp(low, 1.0 - low), values)
        before = previous_in_sequence(values, first, segments)
        r = outcome.double()[sequence]
        iota = r * (values / before).log() + (1 - r) * ((1 - values) / (1 - before)).log()
        reliability = self.reliability.value  # of earlier batches: this batch's outcomes do not choose it

        order = torch.arange(segments.num_segments, device=sequence.device) - segments.sequence_offsets[:-1][sequence]
        ordinary = torch.zeros(segments.num_sequences, dtype=torch.int64, device=sequence.device).index_add(0, sequence, (~terminal).long())
        later = seen & ~terminal & (2 * (order + 1) > ordinary[sequence])
        at = sequence[later]
        if self.calibrator.both_outcomes():
            self.reliability.update(values[later], first[at], base[at], outcome[at])
        use = seen & ~terminal
        at = sequence[use]
        independent = torch.where(zero_variance(outcome, group_size), 1.0 / group_size, 1.0) / ordinary.clamp(min=1)
        self.calibrator.fit(base[at], evidence.evidence[use], outcome[at], independent[at], low)
        return Attribution(values - before, iota, values, before, evidence.shaping, evidence.rows, reliability)

    def state(self) -> dict:
        return {"calibrator": self.calibrator.state(), "reliability": self.reliability.state()}

    def load(self, state: dict) -> None:
        self.calibrator.load(state["calibrator"])
        self.reliability.load(state["reliability"])


def answer_copies(responses: list[Tensor], spellings: list[list[list[int]]]) -> Tensor:
    """False at tokens of literal copies of the answer: spellings[b] holds the token sequences that spell rollout b's answer."""
    masks = []
    for response, forms in zip(responses, spellings, strict=True):
        mask = torch.ones(len(response), dtype=torch.bool)
        for form in forms:
            n = len(form)
            if 0 < n <= len(response):
                hits = (response.unfold(0, n, 1) == torch.tensor(form, device=response.device)).all(1).nonzero().flatten().tolist()
                for at in hits:
                    mask[at : at + n] = False
        masks.append(mask)
    return torch.cat(masks).to(responses[0].device)
