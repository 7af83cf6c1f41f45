"""What each reasoning step did to the probability of success: phi (signed, for credit) and iota (nats, for the information budget).

Every source gives EVIDENCE e_k at each boundary k, in log-odds, about the outcome R of the rollout. One calibrator turns evidence
into Vhat_k, logit Vhat_k = a + b logit(base) + c e_k, fitted on the last batches before it predicts the next (prequential); one
reliability says how much better that is than what was known before the first step. Then

    phi_k = Vhat_k - Vhat_{k-1},      iota_k = log Phat(R | s_k) - log Phat(R | s_{k-1}),

which telescope for any Vhat.

* hindsight: e_k is the sum of l_t = log pi(y_t | q, a*, y_<t) - log pi(y_t | q, y_<t) up to k. Its shaping for the additive credit is
  the segment sum of the centred l_t + KL_t, zero-mean under the policy's own sampling.
* tree: e_k is the log-odds step from the leave-one-out group mean to the group's prefix tree (tree.py).
* probe: e_k is the change of the log-odds of the right answer, were the policy to answer now (probe.py).
* head: e_k is what a small reader of the hidden state at b_k adds to what is known before (head.py).
* entropy: an upper bound of what a step can tell; no sign, no skill, an ablation.

For the additive credit every source also gives a SCORE a segment, in units of an advantage (`Attributor`), and where several sources look at a
rollout the one of highest reliability speaks (`pick`).

What is made of evidence is a hundred operations on some hundred numbers: on the host, in numpy's float64, where each takes a microsecond. Tensors go
in and come out.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from acpo_kernels import Segments, segment_reduce

from .batch import on_host
from .tree import Prefixes, tree_values

MIN_BOUNDARIES = 200  # a reliability from fewer is noise
FIT_BATCHES = 8
MINORITY = 0.05  # least share of the rarer outcome for skill to be measured
DECAY = 0.9
SLOPE, THRESHOLD = 3.0, 0.05  # reliability = min(1, slope * skill), 0 below THRESHOLD


@dataclass
class Evidence:
    """What a source saw: evidence [S] (log-odds, running from the start of the rollout), shaping [S] (signed credit of the segment
    itself, nats; None: phi serves), the rollouts [B] that it looked at, those of them that its credit is for (None: all), and which segments [S]
    changed the state at all (None: all)."""

    evidence: Tensor
    shaping: Tensor | None
    rows: Tensor
    acts: Tensor | None = None
    changed: Tensor | None = None
    unsigned: bool = False  # evidence says how much, the outcome says which way


@dataclass
class Attribution:
    """phi, iota, values (Vhat_k), previous (Vhat_{k-1}), score and changed a segment [S]; rows [B]; reliability [B] in [0, 1], 0 outside of rows;
    source [B], the place of the source that speaks among those picked from, where rows hold; counts_as [B], the rollout whose group weight it takes
    (None: its own)."""

    phi: Tensor
    iota: Tensor
    values: Tensor
    previous: Tensor
    score: Tensor
    changed: Tensor
    rows: Tensor
    reliability: Tensor
    source: Tensor | None = None
    counts_as: Tensor | None = None


def hindsight_evidence(log_ratio: Tensor, kl: Tensor, segments: Segments, mask: Tensor | None, rows: Tensor, clamp: float) -> Evidence:
    """Evidence of the hindsight stream; `mask` leaves out tokens that spell the answer. Not finite counts as 0."""
    log_ratio, kl = (torch.nan_to_num(x, nan=0.0, posinf=0.0, neginf=0.0) for x in (log_ratio, kl))
    raw, centred = segment_reduce(torch.stack([log_ratio, log_ratio + kl]), segments, mask=mask)
    return Evidence(running_sum(raw, segments), centred.clamp(-clamp, clamp), rows)


def tree_evidence(
    prefixes: Prefixes, rewards: Tensor, group_size: int, segments: Segments, kappa: float, by_state: bool, rows: Tensor, before: bool = False
) -> Evidence:
    """Evidence of the leave-one-out prefix tree on the given rollouts: logit V - logit of the others' mean."""
    value = tree_values(prefixes, rewards, group_size, kappa, by_state, before)
    base = leave_one_out(rewards, group_size)[segments.segment_sequence_ids()]
    low = 0.5 / group_size
    changed = torch.tensor([c for rollout in prefixes.changed for c in rollout], dtype=torch.bool, device=rewards.device)
    return Evidence((torch.logit(value, low) - torch.logit(base, low)).to(rewards.dtype), None, rows, changed=changed)


def entropy_evidence(entropy: Tensor, rewards: Tensor, group_size: int, segments: Segments, rows: Tensor, mask: Tensor | None = None) -> Evidence:
    """The upper bound of what a step can tell about the outcome, min(mean H_k / H_ref, h_b(mean outcome of the others) / log 2), H_ref the
    batch's mean: where learning is possible. It has no sign and no skill to measure: an ablation."""
    low = 0.5 / group_size
    base = leave_one_out(rewards, group_size).double().clamp(low, 1.0 - low)
    mean = segment_reduce(torch.nan_to_num(entropy), segments, reduce="mean", mask=mask).double()
    reference = (entropy if mask is None else entropy[mask]).double().mean()
    bound = torch.minimum(mean / reference.clamp(min=1e-6), binary_entropy(base)[segments.segment_sequence_ids()] / math.log(2.0))
    return Evidence(bound, None, rows, unsigned=True)


def binary_entropy(p: Tensor) -> Tensor:
    """h_b(p) = -p log p - (1-p) log(1-p), nats."""
    return -(torch.xlogy(p, p) + torch.xlogy(1 - p, 1 - p))


def host(values: Tensor) -> np.ndarray:
    """float64 on the host, bool where it is bool."""
    values = values.detach().cpu()
    return (values if values.dtype == torch.bool else values.double()).numpy()


def layout(segments: Segments) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """On the host: sequence offsets [B+1], the sequence of each segment [S], which segments are terminal [S]."""
    offsets = segments.sequence_offsets.cpu().numpy()
    counts = np.diff(offsets)
    terminal = np.zeros(segments.num_segments, dtype=bool)
    if segments.terminal is not None:
        terminal[offsets[1:][host(segments.terminal) & (counts > 0)] - 1] = True
    return offsets, np.repeat(np.arange(len(counts)), counts), terminal


def clipped(x: np.ndarray, low: float, high: float) -> np.ndarray:
    """np.clip, which takes three times as long for a few numbers."""
    return np.minimum(np.maximum(x, low), high)


def logit(p: np.ndarray, low: float) -> np.ndarray:
    """log(p / (1 - p)) of p within [low, 1 - low]."""
    p = clipped(p, low, 1.0 - low)
    return np.log(p / (1.0 - p))


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x))."""
    return 1.0 / (1.0 + np.exp(-clipped(x, -500.0, 500.0)))


def information(outcome: np.ndarray, after: np.ndarray, before: np.ndarray) -> np.ndarray:
    """iota = log Phat(R | after) - log Phat(R | before) of values in (0, 1), nats."""
    return outcome * np.log(after / before) + (1 - outcome) * np.log((1 - after) / (1 - before))


def leave_one_out(rewards: Tensor, group_size: int) -> Tensor:
    """Mean outcome of the other rollouts of the group, [B]. NaN, here and below, is an outcome that the verifier left out: it takes no part."""
    groups = rewards.view(-1, group_size)
    known = ~groups.isnan()
    others = (known.sum(1, keepdim=True) - known.long()).clamp(min=1)
    return ((groups.nansum(1, keepdim=True) - groups.nan_to_num()) / others).flatten()


def zero_variance(outcome: Tensor, group_size: int) -> Tensor:
    """Which rollouts belong to a group whose outcomes are all equal, [B]."""
    groups = outcome.view(-1, group_size)
    least, most = groups.nan_to_num(nan=math.inf).amin(1), groups.nan_to_num(nan=-math.inf).amax(1)
    return (least >= most).repeat_interleave(group_size)


def group_std(outcome: Tensor, group_size: int) -> Tensor:
    """Standard deviation of the outcomes of each group (divided by their number), 0 where there are none, [groups]."""
    groups = outcome.view(-1, group_size)
    known = (~groups.isnan()).sum(1).clamp(min=1)
    centred = (groups - groups.nanmean(1, keepdim=True)).nan_to_num()
    return (centred.square().sum(1) / known).sqrt()


def one_of_each(outcome: Tensor, group_size: int) -> Tensor:
    """The first rollout above and the first below (or at) the mean of its group, in groups whose outcomes differ, [B]."""
    groups = outcome.view(-1, group_size)
    mean = groups.nanmean(1, keepdim=True)
    above, below = groups > mean, groups <= mean
    first = (above & (above.cumsum(1) == 1)) | (below & (below.cumsum(1) == 1))
    return first.flatten() & ~zero_variance(outcome, group_size)


def running_sum(values: Tensor, segments: Segments) -> Tensor:
    """Sum of a rollout's segments up to and including each, [S]."""
    total = torch.nn.functional.pad(values.double().cumsum(0), (1, 0))
    start = total[segments.sequence_offsets[:-1]][segments.segment_sequence_ids()]
    return (total[1:] - start).to(values.dtype)


def place_in_sequence(segments: Segments) -> Tensor:
    """The place of each segment in its rollout, from 0, [S]."""
    sequence = segments.segment_sequence_ids()
    return torch.arange(segments.num_segments, device=sequence.device) - segments.sequence_offsets[:-1][sequence]


def previous_in_sequence(values: np.ndarray, first: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """The value [S] at the boundary before each segment: that of the segment before it, first [B] for a rollout's first segment; sequence offsets
    [B+1]."""
    out = np.empty_like(values)
    out[1:] = values[:-1]
    has = np.diff(offsets) > 0
    out[offsets[:-1][has]] = first[has]
    return out


@dataclass
class Calibrator:
    """Platt scaling, logit Vhat_k = a + b logit(base) + c evidence, from the last batches; and the same without the evidence for Vhat_0,
    what can be said before the first step. Both by penalised maximum likelihood, drawn towards trusting the inputs: (0, 1, 1), (0, 1)."""

    with_evidence: list[float] = field(default_factory=lambda: [0.0, 1.0, 1.0])
    before: list[float] = field(default_factory=lambda: [0.0, 1.0])
    batches: deque = field(default_factory=lambda: deque(maxlen=FIT_BATCHES))  # rows logit(base), evidence, outcome, weight

    def predict(self, base: np.ndarray, evidence: np.ndarray, low: float) -> np.ndarray:
        a, b, c = self.with_evidence
        return clipped(sigmoid(a + b * logit(base, low) + c * evidence), low, 1.0 - low)

    def predict_before(self, base: np.ndarray, low: float) -> np.ndarray:
        a, b = self.before
        return clipped(sigmoid(a + b * logit(base, low)), low, 1.0 - low)

    def fit(self, base: np.ndarray, evidence: np.ndarray, outcome: np.ndarray, weight: np.ndarray, low: float) -> None:
        """Adds a batch of boundaries and fits again. weight says how much of an independent outcome each is: the boundaries of one rollout
        share its outcome. Evidence that points the wrong way gets coefficient 0, and Vhat_k is Vhat_0."""
        if not len(outcome):
            return
        self.batches.append(np.stack([logit(base, low), evidence, outcome, weight]))
        known, seen, y, independent = np.concatenate(self.batches, 1)
        features = np.stack([np.ones_like(known), known, seen])
        self.with_evidence = logistic_fit(features, y, independent, np.array([0.0, 1.0, 1.0]), self.with_evidence)
        self.before = logistic_fit(features[:2], y, independent, np.array([0.0, 1.0]), self.before)
        if self.with_evidence[2] <= 0.0:  # a and b were fitted beside it, and mean nothing without it
            self.with_evidence = [*self.before, 0.0]

    def both_outcomes(self) -> bool:
        """Whether the batches that the next prediction rests on hold both outcomes: without that, skill cannot be told from luck."""
        mean = float(np.concatenate([b[2] for b in self.batches]).mean()) if self.batches else 0.0
        return MINORITY <= mean <= 1.0 - MINORITY

    def state(self) -> dict:
        return {"with_evidence": self.with_evidence, "before": self.before, "batches": [b.tolist() for b in self.batches]}

    def load(self, state: dict) -> None:
        self.with_evidence, self.before = list(state["with_evidence"]), list(state["before"])
        self.batches = deque((np.array(b, dtype=np.float64).reshape(4, -1) for b in state["batches"]), maxlen=FIT_BATCHES)


def logistic_fit(features: np.ndarray, y: np.ndarray, weight: np.ndarray, prior: np.ndarray, start: list[float]) -> list[float]:
    """Weighted logistic regression of features [k,n] by Newton's method under the penalty |w - prior|^2 / 2, from `start` (the last fit is near the
    next)."""
    w, penalty = np.array(start), np.eye(len(start))
    for _ in range(50):
        p = sigmoid(w @ features)
        gradient = features @ (weight * (p - y)) + (w - prior)
        hessian = (features * (weight * p * (1 - p))) @ features.T + penalty
        step = clipped(np.linalg.solve(hessian, gradient), -1.0, 1.0)
        w -= step
        if np.abs(step).max() < 1e-6:  # what is left then is its square
            break
    return w.tolist()


@dataclass
class Reliability:
    """Skill of Vhat over what was known before the steps: 3 (1 - M1/M0) from averages over earlier batches, 0 without evidence of any."""

    fixed: float | None = None
    slope: float = SLOPE
    m1: float = 0.0
    m0: float = 0.0
    boundaries: int = 0

    @property
    def value(self) -> float:
        if self.fixed is not None:
            return self.fixed
        if self.boundaries < MIN_BOUNDARIES or self.m0 <= 0:
            return 0.0
        raw = self.slope * (1.0 - self.m1 / self.m0)
        return 0.0 if raw < THRESHOLD else min(raw, 1.0)

    def update(self, values: np.ndarray, first: np.ndarray, base: np.ndarray, outcome: np.ndarray) -> None:
        if not len(outcome):
            return
        error = [float(np.square(x - outcome).mean()) for x in (values, first, base)]
        self.m1 = DECAY * self.m1 + (1 - DECAY) * error[0]
        self.m0 = DECAY * self.m0 + (1 - DECAY) * min(error[1], error[2])
        self.boundaries += len(outcome)

    def state(self) -> dict:
        return {"m1": self.m1, "m0": self.m0, "boundaries": self.boundaries}

    def load(self, state: dict) -> None:
        self.m1, self.m0, self.boundaries = state["m1"], state["m0"], state["boundaries"]


class Attributor:
    """Calibrates a source's evidence and measures its reliability, in that order: predict, score, then fit.

    The score of a segment, for the additive credit, in units of an advantage:

        from the source's own shaping c_k   shaping_gain clip((c_k - mean of the group) / std of the batch, +-3)
        from phi                            value_gain phi_k / max(std of the group's outcomes, 1/4), or value_gain phi_k where the
                                            outcome's advantage is not divided by that std either (per_std False: rloo, centred)
    """

    def __init__(
        self, reliability: float | None = None, shaping_gain: float = 0.5, value_gain: float = 1.0, slope: float = SLOPE, per_std: bool = True
    ):
        self.calibrator, self.reliability = Calibrator(), Reliability(reliability, slope)
        self.shaping_gain, self.value_gain, self.per_std = shaping_gain, value_gain, per_std
        self.batches = 0  # attributed so far

    def __call__(self, evidence: Evidence, outcome: Tensor, base: Tensor, segments: Segments, group_size: int) -> Attribution:
        """base [B] is the probability of success known before the steps; outcome [B] the verifier's R in [0, 1]."""
        self.batches += 1
        if evidence.unsigned:
            return self._unsigned(evidence, outcome, base, segments)
        low, device = 0.5 / group_size, outcome.device
        known, rows = host(base), host(evidence.rows)
        offsets, sequence, terminal = layout(segments)
        first = self.calibrator.predict_before(known, low)
        if not rows.any():
            return self._unseen(evidence, torch.from_numpy(first[sequence]).to(device), segments)
        right = host(outcome.nan_to_num())  # what the verifier left out is in no source's rows
        same, seen, read = host(zero_variance(outcome, group_size)), rows[sequence], host(evidence.evidence)
        values = np.where(seen, self.calibrator.predict(known[sequence], np.where(seen, read, 0.0), low), first[sequence])
        # After the answer the outcome is known: the terminal boundary belongs to it, and takes no part in phi of the steps.
        values = np.where(terminal & seen, clipped(right[sequence], low, 1.0 - low), values)
        before = previous_in_sequence(values, first, offsets)
        iota = information(right[sequence], values, before)
        reliability = self.reliability.value  # of earlier batches: this batch's outcomes do not choose it

        order = np.arange(len(sequence)) - offsets[sequence]
        ordinary = np.bincount(sequence, ~terminal, minlength=len(right))
        later = seen & ~terminal & ~same[sequence] & (2 * (order + 1) > ordinary[sequence])
        at = sequence[later]
        if self.calibrator.both_outcomes():
            self.reliability.update(values[later], first[at], known[at], right[at])
        use = seen & ~terminal
        at = sequence[use]
        # float32 once, as in every run that was published: 1/3 otherwise differs in the eighth digit.
        independent = np.where(same, 1.0 / group_size, 1.0).astype(np.float32) / np.maximum(ordinary, 1).astype(np.float32)
        self.calibrator.fit(known[at], read[use], right[at], independent[at], low)

        acts = evidence.rows if evidence.acts is None else evidence.acts
        phi = values - before
        if evidence.shaping is None:
            score = self.value_gain * phi
            if self.per_std:
                score = score / np.maximum(host(group_std(outcome.double(), group_size)), 0.25)[sequence // group_size]
        else:
            use = host(acts)[sequence] & ~terminal
            score = self.shaping_gain * clipped(standardised(host(evidence.shaping), use, sequence // group_size), -3.0, 3.0)
        changed = torch.ones(len(sequence), dtype=torch.bool, device=device) if evidence.changed is None else evidence.changed
        phi_, iota_, values_, before_, score_ = (torch.from_numpy(x).to(device) for x in (phi, iota, values, before, score))
        return Attribution(phi_, iota_, values_, before_, score_, changed, acts, reliability * acts.double())

    def _unseen(self, evidence: Evidence, values: Tensor, segments: Segments) -> Attribution:
        """Of a batch that the source looked at no rollout of (its gate is shut): nothing is said of it, and nothing learned from it."""
        nothing = torch.zeros_like(values)
        changed = torch.ones_like(nothing, dtype=torch.bool)
        return Attribution(nothing, nothing, values, values, nothing, changed, evidence.rows, values.new_zeros(segments.num_sequences))

    def _unsigned(self, evidence: Evidence, outcome: Tensor, base: Tensor, segments: Segments) -> Attribution:
        """phi = sgn(R - base) (bound_k - its mean over the batch's steps). No values: Vhat stays at base; reliability is 1, or as fixed."""
        sequence, ordinary = segments.segment_sequence_ids(), ~segments.is_terminal()
        use = (evidence.rows[sequence] & ordinary).double()
        centred = (evidence.evidence - (evidence.evidence * use).sum() / use.sum().clamp(min=1.0)) * use
        phi = torch.sign(outcome - base).double()[sequence] * centred
        values = base.double()[sequence]
        reliability = (1.0 if self.reliability.fixed is None else self.reliability.fixed) * evidence.rows.double()
        nothing, changed = torch.zeros_like(phi), torch.ones_like(ordinary)
        return Attribution(phi, nothing, values, values, self.value_gain * phi, changed, evidence.rows, reliability)

    def state(self) -> dict:
        return {"calibrator": self.calibrator.state(), "reliability": self.reliability.state(), "batches": self.batches}

    def load(self, state: dict) -> None:
        self.calibrator.load(state["calibrator"])
        self.reliability.load(state["reliability"])
        self.batches = state.get("batches", 0)  # a state of an earlier release has none


def standardised(shaping: np.ndarray, use: np.ndarray, group: np.ndarray) -> np.ndarray:
    """(c_k - mean of its group) / std of the batch over the segments in use, 0 elsewhere; group [S] numbers the groups from 0."""
    use = use.astype(np.float64)
    mean = np.bincount(group, shaping * use) / np.maximum(np.bincount(group, use), 1.0)
    centred = (shaping - mean[group]) * use
    return centred / (np.sqrt(np.square(centred).sum() / max(use.sum(), 1.0)) + 1e-6)


def pick(found: list[Attribution], segments: Segments) -> Attribution:
    """One attribution from several: for every rollout that of the highest reliability among the sources that looked at it, the first of equals."""
    source = torch.zeros_like(found[0].rows, dtype=torch.int64)
    best = replace(found[0], source=source)
    sequence = segments.segment_sequence_ids()
    for i, other in enumerate(found[1:], 1):
        better = (other.reliability > best.reliability) | (other.rows & ~best.rows)
        names = ("phi", "iota", "values", "previous", "score", "changed")
        chosen = {name: torch.where(better[sequence], getattr(other, name), getattr(best, name)) for name in names}
        reliability = torch.where(better, other.reliability, best.reliability)
        source = torch.where(better, i, source)
        best = Attribution(**chosen, rows=best.rows | other.rows, reliability=reliability, source=source)
    return best


def answer_copies(responses: list[Tensor], spellings: list[list[list[int]]]) -> Tensor:
    """False at tokens of literal copies of the answer: spellings[b] holds the token sequences that spell rollout b's answer."""
    masks = []
    for response, forms in zip(on_host(responses), spellings, strict=True):
        ids = response.numpy()
        data, width, mask = ids.tobytes(), ids.itemsize, np.ones(len(ids), dtype=bool)
        for form in filter(None, forms):
            wanted = np.asarray(form, dtype=ids.dtype).tobytes()
            at = data.find(wanted)
            while at >= 0:
                token, inside = divmod(at, width)
                if not inside:  # else bytes of two tokens that look like one
                    mask[token : token + len(form)] = False
                at = data.find(wanted, (token + 1) * width)
        masks.append(mask)
    return torch.from_numpy(np.concatenate(masks)).to(responses[0].device) if masks else torch.ones(0, dtype=torch.bool)
