"""Statistics go up: reductions of token values over segments or sequences."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _checks as check
from . import _cpu, _torch, reference
from ._library import define, triton
from .segments import Segments, check_segments


def segment_reduce(
    values: Tensor, segments: Segments, *, reduce: str = "sum", level: str = "segment", mask: Tensor | None = None, impl: str | None = None
) -> Tensor:
    """Sum, mean or maximum of the unmasked tokens of each segment (or sequence), for any number of channels at once.

        sum_s = sum_{t in s, mask_t} x_t        mean_s = sum_s / #{t in s, mask_t}        max_s = max_{t in s, mask_t} x_t

    Shapes
        values [N] or [C,N]; mask [N]; result [S] or [C,S] (level="segment"), [B] or [C,B] (level="sequence").
    Dtypes
        values float32, bfloat16, float16 (result float32) or float64 (result float64); mask bool. Differentiable in values:
        the gradient of a maximum is shared equally by the tokens that attain it, as in torch.amax.
    Units
        Those of values. A segment without unmasked tokens gives 0 (sum, mean) or -inf (max, gradient 0). Masked tokens get gradient 0.
    Errors
        TypeError for values or a mask that are no tensors, segments that are no Segments; ValueError for values whose last
        dimension is not N = segments.num_tokens, an unknown reduce or level, a mask of another shape.
    Source
        `torch.segment_reduce`, with offsets on two levels and a mask.
    """
    check_segments(segments)
    device, n = segments.device, segments.num_tokens
    if not (
        impl is None
        and isinstance(values, Tensor)
        and values.dtype in check.FLOAT
        and values.device == device
        and values.ndim in (1, 2)
        and values.shape[-1] == n
        and values.layout is torch.strided
        and type(reduce) is type(level) is str
        and reduce in _REDUCE
        and level in _LEVEL
        and (mask is None or check.is_vector(mask, n, device, check.BOOL))
    ):
        _check(values, segments, reduce, level, mask, impl)
    if impl == "reference":
        return reference.segment_reduce(values, segments, reduce=reduce, level=level, mask=mask)
    return _op(values, segments.token_offsets, segments.sequence_offsets, reduce, level, mask)


_REDUCE, _LEVEL = ("sum", "mean", "max"), ("segment", "sequence")


def _check(values, segments: Segments, reduce, level, mask, impl) -> None:
    check.implementation(impl)
    check.tensor("values", values, check.FLOAT, device=segments.device)
    if values.ndim not in (1, 2) or values.shape[-1] != segments.num_tokens:
        raise ValueError(f"values must have shape [N] or [C,N] with N = {segments.num_tokens}, got {tuple(values.shape)}")
    check.choice("reduce", reduce, _REDUCE)
    check.choice("level", level, _LEVEL)
    if mask is not None:
        check.tensor("mask", mask, check.BOOL, shape=(segments.num_tokens,), device=segments.device)


def _fake(values, token_offsets, sequence_offsets, reduce, level, mask):
    offsets = token_offsets if level == "segment" else sequence_offsets
    return values.new_empty((*values.shape[:-1], offsets.shape[0] - 1), dtype=reference.working_dtype(values.dtype))


def _setup_context(ctx, inputs, output):
    values, token_offsets, sequence_offsets, ctx.reduce, ctx.level, mask = inputs
    ctx.dtype, ctx.num_tokens = values.dtype, values.shape[-1]
    kept = (values, output) if ctx.reduce == "max" else (None, None)
    ctx.save_for_backward(token_offsets, sequence_offsets, mask, *kept)


def _backward(ctx, grad):
    token_offsets, sequence_offsets, mask, values, output = ctx.saved_tensors
    out = _backward_op(grad, token_offsets, sequence_offsets, ctx.reduce, ctx.level, mask, ctx.num_tokens, ctx.dtype, values, output)
    return out, None, None, None, None, None


def _backward_fake(grad, token_offsets, sequence_offsets, reduce, level, mask, num_tokens, dtype, values, output):
    return grad.new_empty((*grad.shape[:-1], num_tokens), dtype=dtype)


_op = define(
    "segment_reduce(Tensor values, Tensor token_offsets, Tensor sequence_offsets, str reduce, str level, Tensor? mask) -> Tensor",
    cpu=_cpu.segment_reduce if _cpu.available else _torch.segment_reduce,
    cuda=triton("segment_reduce"),
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
# values and output are wanted for reduce="max" alone; the result is contiguous and of dtype, the values' own.
_backward_op = define(
    "segment_reduce_backward(Tensor grad, Tensor token_offsets, Tensor sequence_offsets, str reduce, str level, Tensor? mask, SymInt num_tokens,"
    " ScalarType dtype, Tensor? values, Tensor? output) -> Tensor",
    cpu=_cpu.segment_reduce_backward if _cpu.available else _torch.segment_reduce_backward,
    cuda=triton("segment_reduce", "segment_reduce_backward"),
    fake=_backward_fake,
)
