"""Every operation as plain PyTorch: the oracle. Any device, float64 capable, gradients by autograd.

The arguments are those of the public function of the same name, which documents them; here they are not checked. Memory and
speed do not matter, only that each line can be read beside its equation.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._results import HindsightInformation, LinearPolicyLoss, LogprobEntropy, PolicyLoss, SegmentCredit
from .segments import Segments

IGNORED = -100  # the id of a row to leave out, as in torch.nn.functional.cross_entropy
LOG_RATIO_LIMIT = 20.0  # exp(20) = 5e8: past it a ratio says only that it is clipped
_FAR = 1e30  # no ratio reaches it, and float32 holds it: a larger bound binds nothing


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def active_rows(ids: Tensor, mask: Tensor | None) -> Tensor:
    active = ids != IGNORED
    return active if mask is None else active & mask


def _log_softmax_parts(logits: Tensor, active: Tensor, temperature: float | Tensor) -> tuple[Tensor, Tensor]:
    """Centred logits d = z - max z and the centred logsumexp l = log(1 + sum of exp(d) without the maximum).

    With the maximum left out of the sum, log1p keeps what a confident row has beside it: l is accurate to working precision
    RELATIVE to itself, and so are -softplus(logsumexp_{j != t} z_j - z_t) = d_t - l and the entropy.
    """
    if isinstance(temperature, Tensor):
        temperature = torch.where(active, temperature.detach(), 1.0).to(working_dtype(logits.dtype)).unsqueeze(-1)
    z = torch.where(active.unsqueeze(-1), logits.to(working_dtype(logits.dtype)), 0.0) / temperature
    top = z.argmax(-1, keepdim=True)
    d = z - z.gather(-1, top)
    rest = _row_sums(torch.exp(d).scatter(-1, top, 0.0))
    return d, torch.log1p(rest) + d.gather(-1, top).squeeze(-1)  # d is 0 at the maximum, and NaN where that is NaN or infinite


def _row_sums(x: Tensor) -> Tensor:
    """x.sum(-1) with the same bits for a row alone as in a batch: torch splits a lone long row over its threads, two rows never."""
    if x.numel() != x.shape[-1]:
        return x.sum(-1)
    return x.expand(2, *x.shape).sum(-1)[0]


def logprob_entropy(logits: Tensor, ids: Tensor, *, temperature: float | Tensor = 1.0, mask: Tensor | None = None) -> LogprobEntropy:
    active = active_rows(ids, mask)
    d, l = _log_softmax_parts(logits, active, temperature)  # noqa: E741
    logp = d.gather(-1, torch.where(active, ids, 0).long().unsqueeze(-1)).squeeze(-1) - l
    p = torch.exp(d - l.unsqueeze(-1))
    # H = l - sum p d: both terms are sums of non-negative numbers. An impossible token contributes nothing: 0 x -inf = 0.
    entropy = l - _row_sums(p * torch.where(d == -math.inf, 0.0, d))
    return LogprobEntropy(torch.where(active, logp, 0.0), torch.where(active, entropy, 0.0))


def head_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None) -> Tensor:
    dtype = working_dtype(hidden.dtype)
    with torch.autocast(hidden.device.type, enabled=False):  # which would round this product's operands and the logits
        logits = hidden.to(dtype) @ weight.to(dtype).T
    if bias is not None:
        logits = logits + bias.to(dtype)
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def linear_logprob_entropy(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    mask: Tensor | None = None,
) -> LogprobEntropy:
    active = active_rows(ids, mask)
    hidden = torch.where(active.unsqueeze(-1), hidden, 0.0)  # a masked row that holds NaN stays out of dW
    return logprob_entropy(head_logits(hidden, weight, bias, softcap), ids, temperature=temperature, mask=mask)


@torch.no_grad()
def hindsight_information(
    logits: Tensor, hindsight_logits: Tensor, ids: Tensor, *, temperature: float | Tensor = 1.0, mask: Tensor | None = None
) -> HindsightInformation:
    active = active_rows(ids, mask)
    logp, entropy = logprob_entropy(logits, ids, temperature=temperature, mask=mask)
    hindsight_logp, _ = logprob_entropy(hindsight_logits, ids, temperature=temperature, mask=mask)
    d, l = _log_softmax_parts(logits, active, temperature)  # noqa: E741
    log_p = d - l.unsqueeze(-1)
    d, l = _log_softmax_parts(hindsight_logits, active, temperature)  # noqa: E741
    log_q = d - l.unsqueeze(-1)
    kl, information = kl_divergence(log_p, log_q), kl_divergence(log_q, log_p)
    zero = torch.zeros((), dtype=logp.dtype, device=logp.device)
    return HindsightInformation(
        logp, hindsight_logp, entropy,
        log_ratio=torch.where(active, hindsight_logp - logp, zero),
        kl=torch.where(active, kl, zero),
        information=torch.where(active, information, zero),
    )  # fmt: skip


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) as the sum of p log(p/q) - p + q: each term is non-negative, so nothing cancels between columns."""
    p, q = torch.exp(log_p), torch.exp(log_q)
    terms = torch.where(log_p == -math.inf, q, p * (log_p - log_q) - p + q).clamp(min=0.0)
    return _row_sums(torch.where((log_p > -math.inf) & (log_q == -math.inf), math.inf, terms))  # possible, even where p underflows to 0


def linear_hindsight_information(
    hidden: Tensor,
    hindsight_hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    mask: Tensor | None = None,
) -> HindsightInformation:
    logits, hindsight_logits = (head_logits(h, weight, bias, softcap) for h in (hidden, hindsight_hidden))
    return hindsight_information(logits, hindsight_logits, ids, temperature=temperature, mask=mask)


def segment_reduce(values: Tensor, segments: Segments, *, reduce: str = "sum", level: str = "segment", mask: Tensor | None = None) -> Tensor:
    index = segments.segment_ids() if level == "segment" else segments.sequence_ids()
    size = segments.num_segments if level == "segment" else segments.num_sequences
    channels = (values if values.ndim == 2 else values.unsqueeze(0)).to(working_dtype(values.dtype))
    if mask is not None:
        channels = torch.where(mask, channels, 0.0)
    if reduce == "max":
        if mask is not None:
            index = torch.where(mask, index, size)  # one more place, for what does not count
        # Not begun at -inf, which would share the gradient of a maximum of -inf.
        out = channels.new_full((channels.shape[0], size + 1), math.nan)
        out = out.scatter_reduce(1, index.expand_as(channels), channels, "amax", include_self=False)
        some = torch.zeros(size + 1, dtype=torch.bool, device=out.device).index_fill(0, index, True)
        return torch.where(some, out, -math.inf)[:, :size].reshape(*values.shape[:-1], size)
    out = channels.new_zeros(channels.shape[0], size).index_add(1, index, channels)
    if reduce == "mean":
        ones = torch.ones(segments.num_tokens, dtype=out.dtype, device=out.device) if mask is None else mask.to(out.dtype)
        out = out / out.new_zeros(size).index_add(0, index, ones).clamp(min=1.0)
    return out.reshape(*values.shape[:-1], size)


@torch.no_grad()
def segment_credit(
    scores: Tensor,
    segments: Segments,
    advantages: Tensor,
    *,
    mask: Tensor | None = None,
    form: str = "weights",
    bound: float = 0.5,
    gain: float = 0.5,
    reliability: float | Tensor = 1.0,
    terminal: str = "exclude",
    scale: float | Tensor | None = None,
) -> SegmentCredit:
    dtype = working_dtype(scores.dtype)
    sequence = segments.segment_sequence_ids()  # [S]
    per_sequence = scores.new_zeros(segments.num_sequences, dtype=dtype)
    apart = segments.is_terminal() if terminal == "exclude" else torch.zeros_like(segments.is_terminal())
    ordinary = (~apart).to(dtype)
    phi = torch.nan_to_num(scores.to(dtype), nan=0.0, posinf=0.0, neginf=0.0)
    advantages = advantages.to(dtype)
    rho = reliability.to(dtype) if isinstance(reliability, Tensor) else scores.new_full((), reliability, dtype=dtype)
    rho = rho.expand(segments.num_sequences)[sequence]
    if scale is None:
        # The additive form's scores come centred, so its scale is a standard deviation about 0.
        spread = phi.abs() if form == "weights" else phi.square()
        mean = (spread * ordinary).sum() / ordinary.sum().clamp(min=1.0)
        scale = (mean if form == "weights" else mean.sqrt()) + 1e-6
    tokens = torch.ones(segments.num_tokens, dtype=dtype, device=scores.device) if mask is None else mask.to(dtype)
    of_token = segments.segment_ids()

    if form == "additive":
        shaping = rho * gain * (phi / scale).clamp(-3.0, 3.0) * ordinary
        per_segment = torch.where(shaping == 0, advantages[sequence], advantages[sequence] + shaping)  # -0.0 + 0.0 is not -0.0
        weights = torch.ones_like(phi)
    else:
        count = torch.zeros_like(phi).index_add(0, of_token, tokens)  # n_k
        raw = (1.0 + gain * advantages[sequence].sign() * phi / scale).clamp(1.0 - bound, 1.0 + bound)
        others = per_sequence.index_add(0, sequence, ordinary)
        mean = per_sequence.index_add(0, sequence, raw * ordinary) / others.clamp(min=1.0)
        raw = torch.where(apart, mean[sequence], raw)
        weights = 1.0 + rho * (raw - 1.0)
        total, weighted = per_sequence.index_add(0, sequence, count), per_sequence.index_add(0, sequence, count * weights)
        conserve = torch.where(weighted > 0, total / weighted, 1.0)
        weights = torch.where((others >= 2)[sequence], weights * conserve[sequence], 1.0)
        per_segment = advantages[sequence] * weights
    token_advantages = per_segment[of_token]
    return SegmentCredit(torch.where(tokens > 0, token_advantages, 0.0), weights)


def policy_loss(
    logp: Tensor,
    old_logp: Tensor | None,
    advantages: Tensor,
    segments: Segments,
    *,
    mask: Tensor | None = None,
    clip: tuple[float, float] = (0.2, 0.28),
    ratio: str = "token",
    entropy: Tensor | None = None,
    entropy_weight: float | Tensor | None = None,
    ref_logp: Tensor | None = None,
    kl_weight: float = 0.0,
    rollout_logp: Tensor | None = None,
    rollout_cap: float = 2.0,
    denominator: float | Tensor | None = None,
) -> PolicyLoss:
    dtype, device = working_dtype(logp.dtype), logp.device
    mask = torch.ones(logp.shape, dtype=torch.bool, device=device) if mask is None else mask

    def unmasked(values: Tensor) -> Tensor:
        return torch.where(mask, values.to(dtype), 0.0)

    # All but logp and entropy are constants, also where the caller's own need a gradient.
    logp, advantages = unmasked(logp), unmasked(advantages).detach()
    old = logp.detach() if old_logp is None else unmasked(old_logp).detach()
    count = mask.to(dtype)
    low: float | Tensor
    high: float | Tensor
    low, high = clip

    # Ratio: r_t = sg[s] exp(logp_t - sg[logp_t]), s = exp(mean of the clamped log-ratio over the token, segment or sequence)
    log_ratio = difference(logp.detach(), old).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    finite = logp.clone()
    with torch.no_grad():  # -inf changes the value alone, which is subtracted again: the gradient is that of any other
        finite.masked_fill_(finite == -math.inf, 0.0)
    through = torch.exp(finite - finite.detach())
    s = torch.exp(log_ratio)
    token_ratio = s * through
    if ratio != "token":
        index = segments.segment_ids() if ratio == "segment" else segments.sequence_ids()
        s = torch.exp(segment_reduce(log_ratio, segments, reduce="mean", level=ratio, mask=mask))[index]
        if ratio == "segment":  # the mean of n_k log-ratios is sqrt(n_k) times less noisy than one
            root = segment_reduce(count, segments)[index].clamp(min=1.0).sqrt()
            low, high = low / root, high / root
    r = s * through
    clipped = _clamp(r.detach(), 1.0 - low, 1.0 + high) * advantages
    surrogate = torch.where(r * advantages <= clipped, r * advantages, clipped)  # the minimum; its gradient is whole on a border of the clip
    if rollout_logp is not None:  # truncated importance sampling against the engine that sampled
        drift = difference(old, unmasked(rollout_logp).detach()).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
        surrogate = surrogate * torch.exp(drift).clamp(max=min(rollout_cap, _FAR))
    per_token = -surrogate
    k3 = None
    if ref_logp is not None:
        # k3 times the ratio: an unbiased estimate of KL(policy || reference), and its gradient one of the KL's gradient
        delta = difference(unmasked(ref_logp).detach(), logp).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
        k3 = torch.expm1(delta) - delta
        per_token = per_token + kl_weight * token_ratio * k3
    if entropy is not None and entropy_weight is not None:
        weight = unmasked(entropy_weight).detach() if isinstance(entropy_weight, Tensor) else entropy_weight
        per_token = per_token - weight * unmasked(entropy)

    tokens = count.sum()
    if denominator is None:
        denominator = tokens.clamp(min=1.0)
    elif isinstance(denominator, Tensor):
        denominator = denominator.detach().to(dtype)
        if denominator.ndim == 1 and denominator.shape[0] != logp.shape[0]:
            denominator = denominator[segments.sequence_ids()]
    loss = torch.where(mask, per_token / denominator, 0.0).sum()

    with torch.no_grad():
        safe = tokens.clamp(min=1.0)
        r = torch.where(mask, s, 0.0)
        minus = torch.expm1(-log_ratio) + log_ratio
        metrics = {
            "tokens": tokens,
            "clip_ratio/low_mean": (mask & (r < 1.0 - low) & (advantages < 0)).sum().to(dtype) / safe,
            "clip_ratio/high_mean": (mask & (r > 1.0 + high) & (advantages > 0)).sum().to(dtype) / safe,
            "ratio/mean": r.sum() / safe,
            "ratio/min": torch.where(mask, s, math.inf).amin() if s.numel() else tokens + math.inf,
            "ratio/max": torch.where(mask, s, -math.inf).amax() if s.numel() else tokens - math.inf,
            "ratio/ess": r.sum().square() / (safe * r.square().sum()).clamp(min=torch.finfo(dtype).tiny),
            "kl/old": torch.where(mask, minus, 0.0).sum() / safe,
            "kl/ref": torch.zeros_like(tokens) if k3 is None else torch.where(mask, token_ratio * k3, 0.0).sum() / safe,
            "entropy": torch.zeros_like(tokens) if entropy is None else unmasked(entropy).sum() / safe,
        }
    return PolicyLoss(loss, metrics)


def difference(a: Tensor, b: Tensor) -> Tensor:
    """a - b of log-probs; two impossible tokens, of -inf both, are as likely as each other."""
    return torch.where(a.isinf() & (a == b), 0.0, a - b)


def _clamp(r: Tensor, low: float | Tensor, high: float | Tensor) -> Tensor:
    low, high = (x if isinstance(x, Tensor) else r.new_full((), x) for x in (low, high))  # on a GPU nothing waits for the host
    return torch.minimum(torch.maximum(r, low), high)


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    old_logp: Tensor | None,
    advantages: Tensor,
    segments: Segments,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    mask: Tensor | None = None,
    **loss_arguments,
) -> LinearPolicyLoss:
    logp, entropy = linear_logprob_entropy(hidden, weight, ids, bias=bias, temperature=temperature, softcap=softcap, mask=mask)
    loss, metrics = policy_loss(logp, old_logp, advantages, segments, mask=active_rows(ids, mask), entropy=entropy, **loss_arguments)
    return LinearPolicyLoss(loss, metrics, logp.detach(), entropy.detach())
