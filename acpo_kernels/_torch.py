"""The operations in PyTorch, for float64 and for an installation without the extension: the reference's forward, its gradient in closed form.

They take what the dispatcher passes (tensors and numbers, never a Segments object) and run on any device. A matrix product is
done in row tiles of a fixed size, the last one padded, so that a row's result does not depend on the rows beside it and no
N x V tensor exists.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from . import reference
from ._results import METRICS
from .segments import Segments, _ids

TILE_ELEMENTS = {"cpu": 1 << 24, "cuda": 1 << 27}  # 64 MiB of float32 logits at a time stay near the caches, 512 MiB fill a GPU
CACHED_ELEMENTS = 1 << 20


def tile_rows(vocab_size: int, device: str = "cpu") -> int:
    """Rows of a tile, from V and the device alone: between 64 (the price of a matrix product is shared) and 1024 (a short call pads little)."""
    return max(64, min(1024, TILE_ELEMENTS.get(device, 1 << 24) // max(vocab_size, 1) // 64 * 64))


class _Head:
    """Logits of one row tile at a time. A product always sees a whole tile, the last one padded with zero rows, so that what a row
    gives does not depend on N; on the CPU H is padded too: with an odd H, BLAS on AMD sums a row as its place in memory has it."""

    def __init__(self, weight: Tensor, bias: Tensor | None, softcap: float | None, active: Tensor):
        self.weight, self.bias, self.softcap, self.active = weight, bias, softcap, active
        self.dtype = reference.working_dtype(weight.dtype)
        self.width = weight.shape[1]
        self.working_weight = self._widened(weight.to(self.dtype))
        self.rows = tile_rows(weight.shape[0], weight.device.type)

    def tiles(self) -> Iterator[slice]:
        for begin in range(0, self.active.shape[0], self.rows):
            yield slice(begin, min(self.active.shape[0], begin + self.rows))

    def hidden(self, hidden: Tensor, rows: slice) -> Tensor:
        return torch.where(self.active[rows].unsqueeze(-1), hidden[rows], 0.0).to(self.dtype)

    def logits(self, hidden: Tensor, rows: slice) -> Tensor:
        tile = self._widened(self._padded(self.hidden(hidden, rows)))
        tile = reference.head_logits(tile, self.working_weight, self.bias, self.softcap)
        return tile[: rows.stop - rows.start]

    def logits_of(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """Those of some active rows, at most a tile of them."""
        tile = self._widened(self._padded(hidden[rows].to(self.dtype)))
        return reference.head_logits(tile, self.working_weight, self.bias, self.softcap)[: rows.shape[0]]

    def grad_hidden(self, grad_logits: Tensor) -> Tensor:
        return (self._padded(grad_logits) @ self.working_weight)[: grad_logits.shape[0], : self.width]

    def before_softcap(self, logits: Tensor, grad: Tensor) -> Tensor:
        return grad if self.softcap is None else grad * (1.0 - (logits / self.softcap).square())

    def _widened(self, rows: Tensor) -> Tensor:
        missing = -self.width % 8 if rows.device.type == "cpu" else 0
        return torch.nn.functional.pad(rows, (0, missing)) if missing else rows

    def _padded(self, tile: Tensor) -> Tensor:
        missing = self.rows - tile.shape[0]
        return tile if missing == 0 else torch.cat([tile, tile.new_zeros(missing, tile.shape[1])])


def _temperature(temperature: float | None, temperatures: Tensor | None, rows: slice) -> tuple[float | None, Tensor | None]:
    return (temperature, None) if temperatures is None else (1.0, temperatures[rows])


def linear_logprob_entropy(hidden, weight, ids, bias, temperature, temperatures, softcap, mask):
    head = _Head(weight, bias, softcap, reference.active_rows(ids, mask))
    results = tuple(torch.zeros(ids.shape, dtype=head.dtype, device=ids.device) for _ in range(4))
    for rows in head.tiles():
        tile = (head.logits(hidden, rows), ids[rows], *_temperature(temperature, temperatures, rows), head.active[rows])
        for result, value in zip(results, torch.ops.acpo_kernels.logprob_entropy(*tile), strict=True):
            result[rows] = value
    return results


def has_upstream(grad_logp: Tensor | None, grad_entropy: Tensor | None) -> Tensor:
    """The rows that a gradient reaches; NaN is one."""
    nonzero = [grad != 0 for grad in (grad_logp, grad_entropy) if grad is not None]
    return nonzero[0] if len(nonzero) == 1 else nonzero[0] | nonzero[1]


def linear_logprob_entropy_backward(hidden, weight, ids, bias, *rest):
    """The gradients, each rounded once to its own dtype."""
    grads = linear_logprob_entropy_gradients(hidden, weight, ids, bias, *rest)
    return tuple(grad.to(x.dtype) for grad, x in zip(grads, (hidden, weight, grads[2] if bias is None else bias), strict=True))


def linear_logprob_entropy_gradients(
    hidden, weight, ids, bias, temperature, temperatures, softcap, mask, grad_logp, grad_entropy, entropy, maximum, logsumexp, needs
):  # fmt: skip
    """The gradients in the working dtype."""
    need_hidden, need_weight, need_bias = needs
    # A row with a zero gradient adds nothing, whatever its hidden state holds.
    head = _Head(weight, bias, softcap, reference.active_rows(ids, mask) & has_upstream(grad_logp, grad_entropy))
    out_hidden = torch.zeros(hidden.shape if need_hidden else (0,), dtype=head.dtype, device=hidden.device)
    out_weight = torch.zeros(weight.shape if need_weight else (0,), dtype=head.dtype, device=weight.device)
    out_bias = torch.zeros(weight.shape[0] if need_bias else 0, dtype=head.dtype, device=weight.device)
    for rows in head.tiles():
        logits = head.logits(hidden, rows)
        tile = (logits, ids[rows], *_temperature(temperature, temperatures, rows), head.active[rows])
        statistics = (s[rows] for s in (entropy, maximum, logsumexp))
        grads = [None if g is None else g[rows] for g in (grad_logp, grad_entropy)]
        grad = torch.ops.acpo_kernels.logprob_entropy_backward(*grads, *tile[:2], *statistics, *tile[2:])
        grad = head.before_softcap(logits, grad)
        if need_hidden:
            out_hidden[rows] = head.grad_hidden(grad)
        if need_weight:
            out_weight.addmm_(grad.T, head.hidden(hidden, rows))
        if need_bias:
            out_bias += grad.sum(0)
    return out_hidden, out_weight, out_bias


def hindsight_information(logits, hindsight_logits, ids, temperature, temperatures, mask):
    """The log-prob kernel gives each stream's statistics, the reference's sum the two divergences."""
    active = reference.active_rows(ids, mask)
    number, t = (temperature, temperature) if temperatures is None else (1.0, torch.where(active, temperatures, 1.0).unsqueeze(-1))
    streams = []
    for stream in (logits, hindsight_logits):
        logp, entropy, maximum, logsumexp = torch.ops.acpo_kernels.logprob_entropy(stream, ids, number, temperatures, mask)
        z = torch.where(active.unsqueeze(-1), stream, 0.0).to(logp.dtype)
        streams.append((logp, entropy, (z - maximum.unsqueeze(-1)) / t - logsumexp.unsqueeze(-1)))
    (logp, entropy, log_p), (hindsight_logp, _, log_q) = streams
    kl, information = (torch.where(active, reference.kl_divergence(*pair), 0.0) for pair in ((log_p, log_q), (log_q, log_p)))
    return logp, hindsight_logp, entropy, hindsight_logp - logp, kl, information


def linear_hindsight_information(hidden, hindsight_hidden, weight, ids, bias, temperature, temperatures, softcap, mask):
    head = _Head(weight, bias, softcap, reference.active_rows(ids, mask))
    outs = [torch.zeros(ids.shape, dtype=head.dtype, device=ids.device) for _ in range(6)]
    # Some thirty intermediate tensors: on CPU in pieces that stay in the cache (7 times faster at V = 151,936 than a whole tile).
    step = head.rows if hidden.is_cuda else max(1, CACHED_ELEMENTS // weight.shape[0])
    for rows in head.tiles():
        streams = [head.logits(h, rows) for h in (hidden, hindsight_hidden)]
        for begin in range(rows.start, rows.stop, step):
            part = slice(begin, min(rows.stop, begin + step))
            logits = (z[part.start - rows.start : part.stop - rows.start] for z in streams)
            values = hindsight_information(*logits, ids[part], *_temperature(temperature, temperatures, part), head.active[part])
            for out, value in zip(outs, values, strict=True):
                out[part] = value
    return tuple(outs)


def _segments(token_offsets, sequence_offsets, num_tokens, terminal=None) -> Segments:
    return Segments._trusted(token_offsets, sequence_offsets, terminal, num_tokens)


def segment_reduce(values, token_offsets, sequence_offsets, reduce, level, mask):
    segments = _segments(token_offsets, sequence_offsets, values.shape[-1])
    return reference.segment_reduce(values, segments, reduce=reduce, level=level, mask=mask)


def segment_reduce_backward(grad, token_offsets, sequence_offsets, reduce, level, mask, num_tokens, dtype, values, output):
    lengths = (token_offsets if level == "segment" else token_offsets[sequence_offsets]).diff()
    index = _ids(lengths, num_tokens)
    if reduce == "max":
        attains = values == output[..., index]
        if mask is not None:
            attains = attains & mask
        ties = output.new_zeros(output.shape).index_add(-1, index, attains.to(output.dtype))
        out = attains * (grad / ties.clamp(min=1.0))[..., index]
    elif reduce == "mean":
        counts = lengths if mask is None else torch.zeros_like(lengths).index_add(0, index, mask.to(lengths.dtype))
        out = (grad / counts.clamp(min=1))[..., index]
    else:
        out = grad[..., index]
    if mask is not None:
        out = torch.where(mask, out, 0.0)
    return out.to(dtype).contiguous()


def segment_credit(
    scores, token_offsets, sequence_offsets, advantages, num_tokens, terminal_segments, mask, form, bound, gain, reliability, reliabilities,
    exclude_terminal, scale, scales,
):  # fmt: skip
    result = reference.segment_credit(
        scores, _segments(token_offsets, sequence_offsets, num_tokens, terminal_segments), advantages, mask=mask, form=form, bound=bound,
        gain=gain, reliability=reliability if reliabilities is None else reliabilities, terminal="exclude" if exclude_terminal else "include",
        scale=scale if scales is None else scales,
    )  # fmt: skip
    return tuple(result)


def policy_loss(
    logp, old_logp, advantages, token_offsets, sequence_offsets, mask, clip_low, clip_high, ratio, entropy, entropy_weight, entropy_weights,
    ref_logp, kl_weight, rollout_logp, rollout_cap, denominator, denominators,
):  # fmt: skip
    segments = _segments(token_offsets, sequence_offsets, logp.shape[0])
    denominator = denominator if denominators is None else denominators
    loss, metrics = reference.policy_loss(
        logp, old_logp, advantages, segments, mask=mask, clip=(clip_low, clip_high), ratio=ratio, entropy=entropy,
        entropy_weight=entropy_weight if entropy_weights is None else entropy_weights, ref_logp=ref_logp, kl_weight=kl_weight,
        rollout_logp=rollout_logp, rollout_cap=rollout_cap, denominator=denominator,
    )  # fmt: skip
    metrics = torch.stack([metrics[name] for name in METRICS])

    # The gradient: -A r where the unclipped surrogate is the smaller one, times the truncated importance weight, and
    # kl_weight d(r k3) = kl_weight r (k3 - (exp(delta) - 1)); nothing flows through a clamped log-ratio.
    dtype, limit = metrics.dtype, reference.LOG_RATIO_LIMIT
    keep = torch.ones_like(logp, dtype=torch.bool) if mask is None else mask
    lp, old, a = (torch.where(keep, x.to(dtype), 0.0) for x in (logp, logp if old_logp is None else old_logp, advantages))
    log_ratio = reference.difference(lp, old).clamp(-limit, limit)
    token_ratio = r = torch.exp(log_ratio)
    low, high = clip_low, clip_high
    if ratio != "token":
        index = segments.segment_ids() if ratio == "segment" else segments.sequence_ids()
        r = torch.exp(reference.segment_reduce(log_ratio, segments, reduce="mean", level=ratio, mask=keep))[index]
        if ratio == "segment":
            root = reference.segment_reduce(keep.to(dtype), segments)[index].clamp(min=1.0).sqrt()
            low, high = low / root, high / root
    # Clipped only where the clipped surrogate IS the smaller: a NaN stays one.
    grad = torch.where(reference._clamp(r, 1.0 - low, 1.0 + high) * a < r * a, 0.0, -r * a)
    if rollout_logp is not None:
        drift = reference.difference(old, torch.where(keep, rollout_logp.to(dtype), 0.0)).clamp(-limit, limit)
        grad = grad * torch.exp(drift).clamp(max=min(rollout_cap, reference._FAR))
    if ref_logp is not None:
        delta = reference.difference(torch.where(keep, ref_logp.to(dtype), 0.0), lp)
        clamped = delta.clamp(-limit, limit)
        step = torch.where(delta.abs() <= limit, torch.expm1(clamped), 0.0)
        grad = grad + kl_weight * token_ratio * (torch.expm1(clamped) - clamped - step)
    if denominator is None:
        denominator = keep.sum().clamp(min=1).to(dtype)
    elif isinstance(denominator, Tensor):
        denominator = denominator.to(dtype)
        if denominator.ndim == 1 and denominator.shape[0] != logp.shape[0]:
            denominator = denominator[segments.sequence_ids()]
    grad_logp = torch.where(keep, grad / denominator, 0.0)  # in the working dtype: the incoming gradient comes before the one rounding
    grad_entropy = grad_logp.new_zeros(0)
    if entropy is not None:
        weight = (entropy_weight or 0.0) if entropy_weights is None else entropy_weights.to(dtype)
        grad_entropy = torch.where(keep, torch.zeros_like(grad) - weight / denominator, 0.0)
    return loss, metrics, grad_logp, grad_entropy
