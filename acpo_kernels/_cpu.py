"""Thin calls into the compiled extension: tensors go in as address, sizes, strides and dtype.

`available` is False where the package was installed with ACPO_NO_EXT=1; the operations then use PyTorch formulas.
"""

from __future__ import annotations

import importlib.util
import math

import torch
from torch import Tensor

from ._layout import row_layout
from ._results import METRICS

available: bool = importlib.util.find_spec(f"{__package__}._C") is not None
if available:  # one that is there and does not load is an error, not a reason to be slow
    from . import _C  # type: ignore[attr-defined]


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _logit_rows(logits: Tensor, ids: Tensor, temperature: float, temperatures: Tensor | None, mask: Tensor | None):
    """The C++ view of the rows, and the tensors it points into."""
    logits, inner, stride_outer, stride_inner = row_layout(logits)
    ids = ids.to(torch.int64).contiguous()
    temperatures = None if temperatures is None else temperatures.to(torch.float64).contiguous()
    mask = None if mask is None else mask.contiguous()
    rows = _C.LogitRows(
        logits.data_ptr(), str(logits.dtype).removeprefix("torch."), ids.numel(), logits.shape[-1], inner, stride_outer, stride_inner,
        ids.data_ptr(), _address(mask), temperature, _address(temperatures),
    )  # fmt: skip
    return rows, (logits, ids, temperatures, mask)


def logprob_entropy_forward(
    logits: Tensor, ids: Tensor, temperature: float, temperatures: Tensor | None, mask: Tensor | None, results: tuple[Tensor, ...]
) -> bool:
    """Fills the four results; False, and nothing filled, where an active id lies outside the vocabulary."""
    rows, _keep = _logit_rows(logits, ids, temperature, temperatures, mask)
    return _C.logprob_entropy_forward(rows, _C.RowStatistics(*map(_address, results)), torch.get_num_threads()) < 0


def hindsight_information(
    logits: Tensor,
    hindsight_logits: Tensor,
    ids: Tensor,
    temperature: float,
    temperatures: Tensor | None,
    mask: Tensor | None,
    results: tuple[Tensor, ...],
) -> bool:
    """Fills the six results; False, and nothing filled, where an active id lies outside the vocabulary."""
    rows, _keep = _logit_rows(logits, ids, temperature, temperatures, mask)
    hindsight, _keep_too = _logit_rows(hindsight_logits, ids, temperature, temperatures, mask)
    return _C.hindsight_information(rows, hindsight, list(map(_address, results)), torch.get_num_threads()) < 0


def logprob_entropy_backward(
    grad_logp: Tensor | None,
    grad_entropy: Tensor | None,
    logits: Tensor,
    ids: Tensor,
    statistics: tuple[Tensor, Tensor, Tensor],
    temperature: float,
    temperatures: Tensor | None,
    mask: Tensor | None,
    gradient: Tensor | None,
) -> None:
    """Fills the contiguous gradient; with None the gradient takes the place of the logits."""
    rows, _keep = _logit_rows(logits, ids, temperature, temperatures, mask)
    saved = [s.contiguous() for s in statistics]
    incoming = [None if g is None else g.to(saved[0].dtype).contiguous() for g in (grad_logp, grad_entropy)]
    _C.logprob_entropy_backward(
        rows, _C.RowStatistics(0, *map(_address, saved)), *map(_address, incoming), _address(gradient), torch.get_num_threads()
    )


_REDUCE = {"sum": 0, "mean": 1, "max": 2}
_RATIO = {"token": 0, "segment": 1, "sequence": 2}
_WORKING = (torch.float32, torch.float64)

# The packed operations hand their tensors over as they are: offsets contiguous and int64, which those of a Segments object are, masks
# contiguous, every other tensor of at most one dimension read where it lies.


def _empty(like: Tensor, *shape) -> Tensor:  # one number by another: as a tuple they take torch half a microsecond more
    """Of the results' dtype, in host memory whatever the default device and dtype are."""
    return like.new_empty(*shape) if like.dtype in _WORKING else like.new_empty(*shape, dtype=torch.float32)


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return tensor if tensor is None or tensor.is_contiguous() else tensor.contiguous()


def _channels(values: Tensor) -> tuple[Tensor, int, int]:
    """(values with contiguous channels, their number, their distance)"""
    if not values.is_contiguous() and values.stride(-1) != 1:
        values = values.contiguous()
    return (values, 1, 0) if values.ndim == 1 else (values, values.shape[0], values.stride(0))


def segment_reduce(values: Tensor, token_offsets: Tensor, sequence_offsets: Tensor, reduce: str, level: str, mask: Tensor | None) -> Tensor:
    values, channels, stride = _channels(values)
    sequences = level == "sequence"
    groups = (sequence_offsets if sequences else token_offsets).shape[0] - 1
    out = _empty(values, groups) if values.ndim == 1 else _empty(values, channels, groups)
    _C.segment_reduce(
        token_offsets, sequence_offsets, values.shape[-1], sequences, _REDUCE[reduce], _contiguous(mask), channels, stride, values, out,
        torch.get_num_threads(),
    )  # fmt: skip
    return out


def segment_reduce_backward(
    grad: Tensor, token_offsets: Tensor, sequence_offsets: Tensor, reduce: str, level: str, mask: Tensor | None, num_tokens: int,
    dtype: torch.dtype, values: Tensor | None, output: Tensor | None,
) -> Tensor:  # fmt: skip
    gradient = grad.new_empty((*grad.shape[:-1], num_tokens), dtype=dtype)
    stride = 0
    if values is not None:
        values, _, stride = _channels(values)
    _C.segment_reduce_backward(
        token_offsets, sequence_offsets, num_tokens, level == "sequence", _REDUCE[reduce], _contiguous(mask), 1 if grad.ndim == 1 else grad.shape[0],
        stride, grad.contiguous(), values, _contiguous(output), gradient, torch.get_num_threads(),
    )  # fmt: skip
    return gradient


def segment_credit(
    scores, token_offsets, sequence_offsets, advantages, num_tokens, terminal_segments, mask, form, bound, gain, reliability, reliabilities,
    exclude_terminal, scale, scales,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    token_advantages, weights = _empty(scores, num_tokens), _empty(scores, scores.shape[0])
    _C.segment_credit(
        token_offsets, sequence_offsets, num_tokens, scores, advantages, _contiguous(terminal_segments), _contiguous(mask), form == "additive",
        exclude_terminal, bound, gain, reliability or 0.0, reliabilities, scale or 0.0, scales, token_advantages, weights, torch.get_num_threads(),
    )  # fmt: skip
    return token_advantages, weights


def _policy_loss(
    logp, old_logp, advantages, token_offsets, sequence_offsets, mask, clip_low, clip_high, ratio, entropy, entropy_weight, entropy_weights,
    ref_logp, kl_weight, rollout_logp, rollout_cap, denominator, denominators,
):  # fmt: skip
    """The C++ view of the arguments, all of which it points into; mask is contiguous."""
    n = advantages.shape[0]
    of = 0 if denominators is None or denominators.ndim == 0 else 2 if denominators.shape[0] == n else 1
    return _C.PolicyLoss(
        token_offsets, sequence_offsets, n, mask, logp, old_logp, advantages, entropy, ref_logp, rollout_logp, clip_low, clip_high, _RATIO[ratio],
        entropy_weight, entropy_weights, kl_weight, rollout_cap, denominator or 0.0, denominators, of,
    )  # fmt: skip


def policy_loss(
    logp, old_logp, advantages, token_offsets, sequence_offsets, mask, clip_low, clip_high, ratio, entropy, entropy_weight, entropy_weights,
    ref_logp, kl_weight, rollout_logp, rollout_cap, denominator, denominators,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    n = logp.shape[0]
    loss, metrics, grad_logp, grad_entropy = _empty(logp, ()), _empty(logp, len(METRICS)), _empty(logp, n), _empty(logp, 0 if entropy is None else n)
    mask = _contiguous(mask)
    settings = _policy_loss(
        logp, old_logp, advantages, token_offsets, sequence_offsets, mask, clip_low, clip_high, ratio, entropy, entropy_weight, entropy_weights,
        ref_logp, kl_weight, rollout_logp, rollout_cap, denominator, denominators,
    )  # fmt: skip
    _C.policy_loss(settings, loss.data_ptr(), metrics.data_ptr(), grad_logp.data_ptr(), grad_entropy.data_ptr(), torch.get_num_threads())
    return loss, metrics, grad_logp, grad_entropy


def empty(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """torch.empty for a gradient of weight: a large one takes the memory of the last one that was freed, which spares its page faults."""
    size = math.prod(shape) * dtype.itemsize
    if not available or size < _C.RECYCLED or torch.are_deterministic_algorithms_enabled():  # torch.empty writes NaN into it then
        return torch.empty(shape, dtype=dtype, device="cpu")
    return torch.frombuffer(_C.Recycled(size), dtype=dtype).view(shape)


def _rows(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(-1) == 1 or matrix.shape[-1] <= 1 else matrix.contiguous()


def _head(hidden, weight, ids, bias, temperature, temperatures, softcap, rows: Tensor):
    """The C++ view of the head at the rows `rows`, and the tensors it points into."""
    hidden, weight = _rows(hidden), _rows(weight)
    bias = None if bias is None else bias.to(torch.float32).contiguous()
    temperatures = None if temperatures is None else temperatures.to(torch.float64).contiguous()
    ids = ids.to(torch.int64).contiguous()
    head = _C.Head(
        hidden.data_ptr(), hidden.stride(0), weight.data_ptr(), weight.stride(0), str(hidden.dtype).removeprefix("torch."), *weight.shape,
        _address(bias), softcap or 0.0, 1.0 if temperature is None else temperature, _address(temperatures), ids.data_ptr(), rows.data_ptr(),
        rows.numel(),
    )  # fmt: skip
    return head, (hidden, weight, bias, temperatures, ids, rows)


def head_forward(hidden, weight, ids, bias, temperature, temperatures, softcap, rows: Tensor, results: tuple[Tensor, ...]) -> None:
    """Fills logp, entropy, maximum and centred logsumexp [N] at `rows`; the others are left alone."""
    head, _keep = _head(hidden, weight, ids, bias, temperature, temperatures, softcap, rows)
    _C.head_forward(head, *map(_address, results), torch.get_num_threads())


def head_backward(
    hidden, weight, ids, bias, temperature, temperatures, softcap, rows: Tensor, statistics: tuple[Tensor, Tensor, Tensor],
    upstream: tuple[Tensor | None, Tensor | None], gradients: tuple[Tensor | None, Tensor | None, Tensor | None],
) -> None:  # fmt: skip
    """Writes the gradients of hidden (at `rows`), weight and bias (float32) that are not None."""
    head, _keep = _head(hidden, weight, ids, bias, temperature, temperatures, softcap, rows)
    saved = [s.contiguous() for s in statistics]
    incoming = [None if g is None else g.to(torch.float32).contiguous() for g in upstream]
    _C.head_backward(head, *map(_address, (*saved, *incoming, *gradients)), torch.get_num_threads())


def linear_policy_loss(
    hidden, weight, ids, bias, temperature, temperatures, softcap, old_logp, advantages, token_offsets, sequence_offsets, active, clip_low,
    clip_high, ratio, entropy_weight, entropy_weights, ref_logp, kl_weight, rollout_logp, rollout_cap, denominator, denominators, needs,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Not for float64. active: the rows that take part, whose ids lie inside the vocabulary."""
    head, _keep = _head(hidden, weight, ids, bias, temperature, temperatures, softcap, ids.new_empty(0))
    settings = _policy_loss(
        None, old_logp, advantages, token_offsets, sequence_offsets, active, clip_low, clip_high, ratio, None, entropy_weight, entropy_weights,
        ref_logp, kl_weight, rollout_logp, rollout_cap, denominator, denominators,
    )  # fmt: skip
    n = ids.shape[0]
    results = [hidden.new_zeros(shape, dtype=torch.float32) for shape in ((), len(METRICS), n, n)]
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    makers = (hidden.new_zeros, empty, hidden.new_empty)
    dtypes = (hidden.dtype, weight.dtype, torch.float32)
    gradients = [make(shape if need else (0,), dtype=kind) for make, shape, kind, need in zip(makers, shapes, dtypes, needs, strict=True)]
    wanted = [gradient if need else None for gradient, need in zip(gradients, needs, strict=True)]
    _C.linear_policy_loss(head, settings, *map(_address, (*results, *wanted)), torch.get_num_threads())
    return *results, *gradients


def head_hindsight(
    hidden, hindsight_hidden, weight, ids, bias, temperature, temperatures, softcap, rows: Tensor, results: tuple[Tensor, ...]
) -> None:  # fmt: skip
    """Fills the six results [N] at `rows`; the others are left alone."""
    head, _keep = _head(hidden, weight, ids, bias, temperature, temperatures, softcap, rows)
    other = _rows(hindsight_hidden)
    _C.head_hindsight(head, other.data_ptr(), other.stride(0), *map(_address, results), torch.get_num_threads())
