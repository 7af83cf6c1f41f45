"""From outcomes and attribution to one advantage a token."""

from __future__ import annotations

import torch
from torch import Tensor

from acpo_kernels import SegmentCredit, Segments, segment_credit, segment_reduce

from .attribution import Attribution, group_std, zero_variance
from .config import CreditConfig
from .tree import branch_differences

ADVANTAGES = "grpo", "rloo", "centred"  # the kinds of credit.advantage


def outcome_advantages(rewards: Tensor, group_size: int, kind: str) -> Tensor:
    """A_i of each rollout within its group, [B]: grpo (R - mean)/std, rloo R - mean of the others, centred R - mean.

    A group whose rewards are all equal gives exactly 0, and so does a rollout that the verifier left out (NaN), which no mean or std counts. Errors:
    ValueError for another kind, rewards that are not floating or no whole groups.
    """
    if kind not in ADVANTAGES:
        raise ValueError(f"kind must be one of {', '.join(ADVANTAGES)}, got {kind!r}")
    if not rewards.is_floating_point():
        raise ValueError(f"rewards must be floating (NaN is a rollout that was left out), got {rewards.dtype}")
    if group_size < 1 or rewards.ndim != 1 or len(rewards) % group_size:
        raise ValueError(f"rewards must be [B] with whole groups of group_size = {group_size}, got {tuple(rewards.shape)}")
    groups = rewards.view(-1, group_size)
    centred = groups - groups.nanmean(1, keepdim=True)
    centred = torch.where(groups.isnan() | zero_variance(rewards, group_size).view_as(groups), 0.0, centred)
    if kind == "grpo":
        centred = centred / (group_std(rewards, group_size).unsqueeze(1) + 1e-6)
    elif kind == "rloo":
        known = (~groups.isnan()).sum(1, keepdim=True)
        centred = centred * known / (known - 1).clamp(min=1)
    return centred.flatten()


def answer_confidence(rollout_logp: Tensor, segments: Segments, mask: Tensor | None = None) -> Tensor:
    """exp(mean log-prob of the answer span under the policy that sampled), 0 for a rollout without an answer of its own, [B]."""
    mean = segment_reduce(rollout_logp, segments, reduce="mean", mask=mask)
    terminal = segments.is_terminal()
    if mask is not None:  # a span without a written token has mean 0, which would be full confidence
        terminal = terminal & (segment_reduce(mask.to(mean.dtype), segments) > 0)
    out = torch.zeros(segments.num_sequences, dtype=mean.dtype, device=mean.device)
    out[segments.segment_sequence_ids()[terminal]] = mean[terminal].exp()
    return out


def confident_rewards(outcome: Tensor, confidence: Tensor, group_size: int, omega: float, form: str = "brier") -> Tensor:
    """r = R - omega (c - R)^2, the Brier score beside the outcome; plain R in groups without both outcomes, where it would train
    nothing but self-certainty. form="product" is the naive R c, an ablation: it pays for certainty and never against it."""
    rewards = outcome * confidence if form == "product" else outcome - omega * (confidence - outcome).square()
    return torch.where(zero_variance(outcome, group_size), outcome, rewards)


def keep_side(advantages: Tensor, plain: Tensor) -> Tensor:
    """Advantages clipped at 0 on the other side of the plain outcome's: a right answer is never punished for being unsure."""
    return torch.where(plain > 0, advantages.clamp(min=0.0), torch.where(plain < 0, advantages.clamp(max=0.0), advantages))


def token_advantages(
    advantages: Tensor,
    attribution: Attribution | None,
    segments: Segments,
    config: CreditConfig,
    mask: Tensor | None = None,
    entropy: Tensor | None = None,
) -> SegmentCredit:
    """The credit form of the configuration, on the rollouts that the attribution looked at. Reliability 0 is the outcome advantage, bitwise. Tokens
    that the policy did not write (mask [N] False) get 0 and count in no length.

    additive: A_i + reliability score_k.  weights: A_i w_k, bounded conserving weights from phi.  Any other form: A_i. With mask="unchanged" a
    token of a segment that left the state as it was keeps 1 - reliability min(1, H_t / mean H) of its advantage (without entropy [N]: 1 -
    reliability), and nothing takes its place. What the policy chose there is noise; where it was sure it chose nothing, the gradient is near 0 for
    what it does and strong against what it never does, and that holds the form.
    """
    if attribution is None:
        zero = torch.zeros(segments.num_segments, device=advantages.device)
        return segment_credit(zero, segments, advantages, mask=mask, form="additive", reliability=0.0, scale=1.0)
    sequence, ordinary = segments.segment_sequence_ids(), ~segments.is_terminal()
    reliability = attribution.reliability.to(advantages.dtype)
    if config.form == "weights":
        use = (attribution.rows[sequence] & ordinary).to(advantages.dtype)
        scores = attribution.phi.to(advantages.dtype)
        scale = (scores.abs() * use).sum() / use.sum().clamp(min=1.0) + 1e-6
        out = segment_credit(
            scores, segments, advantages, mask=mask, form="weights", bound=config.bound, gain=config.gain, reliability=reliability, scale=scale
        )
    else:
        strength = reliability if config.form == "additive" else torch.zeros_like(reliability)
        scores = attribution.score.to(advantages.dtype)
        out = segment_credit(scores, segments, advantages, mask=mask, form="additive", gain=1.0, reliability=strength, scale=1.0)
    if config.mask != "unchanged":
        return out
    gone = (reliability[sequence] * (~attribution.changed & ordinary))[segments.segment_ids()]
    if entropy is not None:
        own = entropy if mask is None else torch.where(mask, entropy, 0.0)
        mean = own.mean() if mask is None else own.sum() / mask.sum().clamp(min=1)
        gone = gone * (own / mean.clamp(min=1e-12)).clamp(max=1.0).to(gone.dtype)
    return SegmentCredit(out.token_advantages * (1.0 - gone), out.weights * (1.0 - segment_reduce(gone, segments, reduce="mean", mask=mask)))


def bounded_ratio(advantages: Tensor, log_ratio: Tensor, bound: float) -> Tensor:
    """The RLSD form (arXiv 2604.03128), token by token: A clip(exp(sgn(A) l_t), 1 - bound, 1 + bound), l_t the answer-conditioned log-ratio."""
    weight = (torch.sign(advantages) * torch.nan_to_num(log_ratio, nan=0.0)).exp()
    return advantages * weight.clamp(1.0 - bound, 1.0 + bound)


def token_factor(entropy: Tensor, segments: Segments, mask: Tensor | None = None) -> Tensor:
    """u_t = clip(H_t / mean H of the segment, 1/2, 3/2) over its mean in the segment, [N]: inside a step more credit where the policy had a choice.
    Within [1/3, 3], and the segment keeps its credit."""
    mean = segment_reduce(entropy, segments, reduce="mean", mask=mask)[segments.segment_ids()]
    raw = torch.where(mean > 0, (entropy / mean.clamp(min=1e-12)).clamp(0.5, 1.5), 1.0)
    whole = segment_reduce(raw, segments, reduce="mean", mask=mask)[segments.segment_ids()]
    return raw / whole if mask is None else torch.where(mask, raw / whole, 0.0)


def difficulty_weights(outcome: Tensor, reliability: Tensor, group_size: int, power: float) -> Tensor:
    """How much each rollout's group counts, [B] in float64: w = ((1 - p) / p)^(power r) over the mean w of the groups with both outcomes, exactly 1
    in the others; p is the group's mean outcome, r its mean reliability.

    GRPO's division by the std weighs the gradient of a group's success by (p (1 - p))^(-1/2). With r = 1 a power of 1/2 makes that 1/p, the
    gradient of log p (MaxRL, arXiv 2602.02710), 0 leaves it, 1/4 lies half way. A rare success is worth more where one knows which steps made it.
    """
    p = outcome.double().view(-1, group_size).nanmean(1).nan_to_num(0.5).clamp(0.5 / group_size, 1.0 - 0.5 / group_size)
    mixed = ~zero_variance(outcome, group_size).view(-1, group_size)[:, 0]
    weight = ((1.0 - p) / p) ** (power * reliability.double().view(-1, group_size).mean(1))
    mean = (weight * mixed).sum() / mixed.sum().clamp(min=1)
    return torch.where(mixed, weight / mean, 1.0).repeat_interleave(group_size)


def group_weights(outcome: Tensor, attribution: Attribution | None, group_size: int, config: CreditConfig) -> Tensor:
    """The difficulty weights of the configuration, [B] in float64: what `assign` multiplies every token of a rollout by."""
    if attribution is None:
        return torch.ones(len(outcome), dtype=torch.float64, device=outcome.device)
    weights = difficulty_weights(outcome, attribution.reliability, group_size, config.difficulty)
    return weights if attribution.counts_as is None else weights[attribution.counts_as]


def assign(
    advantages: Tensor,
    outcome: Tensor,
    attribution: Attribution | None,
    segments: Segments,
    group_size: int,
    config: CreditConfig,
    *,
    ids: Tensor,
    log_ratio: Tensor | None = None,
    entropy: Tensor | None = None,
    filler: Tensor | None = None,
    mask: Tensor | None = None,
    counts: Tensor | None = None,
) -> SegmentCredit:
    """Token advantages [N] and segment weights [S] from the rollouts' advantages and outcomes [B], the whole credit form of the configuration.

    ids [N] are the packed tokens, log_ratio [N] those of the hindsight stream (form "ratio"), entropy [N] the policy's (the mask, the token
    factor), filler the ids of tokens that are known to mean nothing (synthetic tasks, the oracle mask), mask [N] the tokens that the policy wrote
    (None: all), counts [B] what `group_weights` gives (None: it is asked).
    """
    tokens, weights = token_advantages(advantages, attribution, segments, config, mask, entropy)
    if config.form == "branch":  # TEMPO: in the unit of the outcome's advantage
        differences = branch_differences(list(ids.split(segments.cu_seqlens.diff().tolist())), outcome, group_size)
        if config.advantage == "grpo":
            differences = differences / (group_std(outcome, group_size) + 1e-6).repeat_interleave(group_size)[segments.sequence_ids()]
        tokens = tokens + differences
    elif config.form == "ratio":
        tokens = bounded_ratio(advantages[segments.sequence_ids()], log_ratio, config.bound)
    if config.token == "entropy":
        tokens = tokens * token_factor(entropy, segments, mask)
    counts = group_weights(outcome, attribution, group_size, config) if counts is None else counts
    tokens = tokens * counts.to(tokens.dtype)[segments.sequence_ids()]
    if config.mask == "filler" and filler is not None:
        tokens = torch.where(torch.isin(ids, filler), 0.0, tokens)
    return SegmentCredit(tokens if mask is None else torch.where(mask, tokens, 0.0), weights)
