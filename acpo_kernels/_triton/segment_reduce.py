"""CUDA kernels of `segment_reduce` and its backward. The contract is in acpo_kernels/segment_reduce.py.

Forward: one launch for any number of channels. A program reduces ROWS chunks of one channel. A unit of one chunk is done with that; of a
longer one each chunk leaves a partial result, and whichever arrives last adds them all, in the order of the chunks, whoever that is: the
same bits in every run (`_arrive` in ragged.py).

Backward: one launch for sum, and for mean without a mask. With a mask mean wants the unmasked tokens of a unit before the first
gradient, and max the tokens that attain it. Each chunk counts its unit's again where that reads little (`REDUNDANT`: at most N^2/CHUNK
elements a channel, if one unit holds all tokens), in the one launch; else a forward counts them in a launch before.

Bytes: N C s read (and N of the mask for each channel), once; the offsets and, of long units, a partial result a chunk beside it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _torch
from .ragged import LAUNCH, REDUNDANT, TILES, _arrive, _chunk, _reciprocal, arrivals, bisections, compact, device, slots

INF = tl.constexpr(float("inf"))
ROUNDING = tl.constexpr("rtne")
PARTIALS = 32  # of a unit that are taken at a time

SUM, MEAN, MAX, TIES = (tl.constexpr(k) for k in range(4))
MODES = {"sum": 0, "mean": 1, "max": 2}


@triton.jit
def _maximum(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _reduced(x, MODE: tl.constexpr):
    """Along the last axis; a NaN stays."""
    if MODE == MAX:
        return tl.where(tl.max((x != x).to(tl.int32), axis=1) != 0, float("nan"), tl.max(x, axis=1))
    return tl.sum(x, axis=1)


_UNSPECIALISED = ["stride_channel", "num_tokens", "num_units", "num_slots", "bisections"]


@triton.jit(do_not_specialize=_UNSPECIALISED)
def _segment_reduce_fwd_kernel(
    values_ptr, maxima_ptr, mask_ptr, token_offsets_ptr, sequence_offsets_ptr, out_ptr, partial_ptr, count_ptr, arrivals_ptr,
    stride_channel, num_tokens, num_units, num_slots, bisections,
    MODE: tl.constexpr, HAS_MASK: tl.constexpr, SEVERAL: tl.constexpr, SEQUENCE: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
    PARTIALS: tl.constexpr,
):  # fmt: skip
    """SEVERAL: a unit may have more than one chunk."""
    tiles = tl.cdiv(num_slots, ROWS)  # one dimension of the grid for both: the others end at 65,535
    channel = (tl.program_id(0) // tiles).to(tl.int64)
    slot = (tl.program_id(0) % tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    unit, first, chunks, start, end, _ = _chunk(
        slot, token_offsets_ptr, sequence_offsets_ptr, num_tokens, num_units, bisections, SEQUENCE, CHUNK
    )  # fmt: skip
    own = (slot < num_slots) & (slot - first < chunks)
    token = start[:, None] + tl.arange(0, CHUNK)[None, :]  # [ROWS, CHUNK]
    inside = own[:, None] & (token < end[:, None])
    if HAS_MASK:
        inside = inside & (tl.load(mask_ptr + token, mask=inside, other=0) != 0)
    x = tl.load(values_ptr + channel * stride_channel + token, mask=inside, other=0.0).to(tl.float32)
    if MODE == TIES:
        x = (x == tl.load(maxima_ptr + channel * num_units + unit)[:, None]).to(tl.float32)
    result = _reduced(tl.where(inside, x, -INF if MODE == MAX else 0.0), MODE)
    count = tl.sum(inside.to(tl.int32), axis=1)
    out = out_ptr + channel * num_units + unit
    tl.store(out, _mean(result, count) if MODE == MEAN else result, mask=own & (chunks == 1))
    if SEVERAL:
        several = own & (chunks > 1)
        partial = channel * num_slots
        tl.store(partial_ptr + partial + slot, result, mask=several)
        if MODE == MEAN:
            tl.store(count_ptr + partial + slot, count, mask=several)
        last = _arrive(arrivals_ptr + channel * num_units + unit, chunks, several)
        if tl.max(last.to(tl.int32), axis=0) != 0:
            neutral = -INF if MODE == MAX else 0.0
            total = tl.full([ROWS, PARTIALS], neutral, tl.float32)
            counts = tl.zeros([ROWS, PARTIALS], tl.int32)
            for at in range(0, tl.max(tl.where(last, chunks, 0), axis=0), PARTIALS):
                which = at + tl.arange(0, PARTIALS)[None, :]
                there = last[:, None] & (which < chunks[:, None])
                index = partial + first[:, None] + which
                part = tl.load(partial_ptr + index, mask=there, other=neutral, cache_modifier=".cg")
                total = _maximum(total, part) if MODE == MAX else total + part
                if MODE == MEAN:
                    counts += tl.load(count_ptr + index, mask=there, other=0, cache_modifier=".cg")
            result = _reduced(total, MODE)
            tl.store(out, _mean(result, tl.sum(counts, axis=1)) if MODE == MEAN else result, mask=last)


@triton.jit
def _mean(total, count):
    return (total * _reciprocal(tl.maximum(count, 1))).to(tl.float32)


@triton.jit(do_not_specialize=_UNSPECIALISED)
def _segment_reduce_bwd_kernel(
    grad_ptr, values_ptr, maxima_ptr, count_ptr, mask_ptr, token_offsets_ptr, sequence_offsets_ptr, out_ptr,
    stride_channel, num_tokens, num_units, num_slots, bisections,
    MODE: tl.constexpr, HAS_MASK: tl.constexpr, COUNTED: tl.constexpr, SEQUENCE: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """COUNTED: what the gradient of a unit is divided by was counted in a launch before."""
    tiles = tl.cdiv(num_slots, ROWS)
    channel = (tl.program_id(0) // tiles).to(tl.int64)
    slot = (tl.program_id(0) % tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    unit, first, chunks, start, end, unit_end = _chunk(
        slot, token_offsets_ptr, sequence_offsets_ptr, num_tokens, num_units, bisections, SEQUENCE, CHUNK
    )  # fmt: skip
    own = (slot < num_slots) & (slot - first < chunks)
    begin = start - (slot - first) * CHUNK
    at = tl.arange(0, CHUNK)[None, :]
    row = values_ptr + channel * stride_channel if MODE == MAX else grad_ptr  # values are given to max alone
    grad = tl.load(grad_ptr + channel * num_units + unit)  # [ROWS]
    attained = tl.load(maxima_ptr + channel * num_units + unit)[:, None] if MODE == MAX else 0.0
    if MODE != SUM:
        if COUNTED:
            count = tl.load(count_ptr + (channel * num_units if MODE == MAX else 0) + unit)
        elif MODE == MEAN and not HAS_MASK:
            count = (unit_end - begin).to(tl.float32)
        else:
            found = tl.zeros([ROWS], tl.int32)
            for chunk in range(0, tl.max(tl.where(own, chunks, 0), axis=0)):
                token = begin[:, None] + chunk * CHUNK + at
                there = own[:, None] & (token < unit_end[:, None])
                found += tl.sum(_taken(token, there, row, attained, mask_ptr, MODE, HAS_MASK).to(tl.int32), axis=1)
            count = found.to(tl.float32)
        grad = (grad * _reciprocal(tl.maximum(count, 1.0))).to(tl.float32)
    token = start[:, None] + at
    inside = own[:, None] & (token < end[:, None])
    result = tl.where(_taken(token, inside, row, attained, mask_ptr, MODE, HAS_MASK), grad[:, None], 0.0)
    tl.store(out_ptr + channel * num_tokens + token, result.to(out_ptr.dtype.element_ty, fp_downcast_rounding=ROUNDING), mask=inside)


@triton.jit
def _taken(token, inside, row_ptr, attained, mask_ptr, MODE: tl.constexpr, HAS_MASK: tl.constexpr):
    """Which of these tokens the unit's gradient goes to."""
    if HAS_MASK:
        inside = inside & (tl.load(mask_ptr + token, mask=inside, other=0) != 0)
    if MODE == MAX:
        inside = inside & (tl.load(row_ptr + token, mask=inside, other=0.0).to(tl.float32) == attained)
    return inside


def _rows(values: Tensor) -> tuple[Tensor, int, int]:
    """(values, channels, stride between them); tokens lie side by side."""
    if values.stride(-1) != 1 and values.shape[-1] > 1:
        values = values.contiguous()
    return (values, 1, 0) if values.ndim == 1 else (values, values.shape[0], values.stride(0))


def _forward(values, maxima, token_offsets, sequence_offsets, mode: int, level: str, mask) -> Tensor:
    values, channels, stride = _rows(values)
    sequence, tile, n = level == "sequence", TILES[level], values.shape[-1]
    units = (sequence_offsets if sequence else token_offsets).shape[0] - 1
    out = torch.empty((*values.shape[:-1], units), dtype=torch.float32, device=values.device)
    if out.numel() == 0:
        return out
    num_slots, several = slots(n, units, level), n > tile["CHUNK"]
    new = lambda dtype: torch.empty(channels * num_slots, dtype=dtype, device=values.device) if several else None  # noqa: E731
    with device(values):
        _segment_reduce_fwd_kernel[(triton.cdiv(num_slots, tile["ROWS"]) * channels,)](
            values, maxima, compact(mask), token_offsets, sequence_offsets, out, new(torch.float32), new(torch.int32) if mode == MEAN.value else None,
            arrivals(channels * units, values) if several else None, stride, n, units, num_slots, bisections(units),
            MODE=mode, HAS_MASK=mask is not None, SEVERAL=several, SEQUENCE=sequence, PARTIALS=PARTIALS, **tile, **LAUNCH,
        )  # fmt: skip
    return out


def segment_reduce(values, token_offsets, sequence_offsets, reduce, level, mask):
    if values.dtype == torch.float64:
        return _torch.segment_reduce(values, token_offsets, sequence_offsets, reduce, level, mask)
    return _forward(values, None, token_offsets, sequence_offsets, MODES[reduce], level, mask)


def segment_reduce_backward(grad, token_offsets, sequence_offsets, reduce, level, mask, num_tokens, dtype, values, output):
    if grad.dtype == torch.float64:
        return _torch.segment_reduce_backward(grad, token_offsets, sequence_offsets, reduce, level, mask, num_tokens, dtype, values, output)
    out = torch.empty((*grad.shape[:-1], num_tokens), dtype=dtype, device=grad.device)
    if out.numel() == 0:
        return out
    grad, count, stride = grad.contiguous(), None, 0
    sequence, tile, units, channels = level == "sequence", TILES[level], grad.shape[-1], out.numel() // num_tokens
    again = channels * num_tokens**2 // tile["CHUNK"]  # elements read again, if each chunk counts its unit's and one unit holds all tokens
    counted = False
    if reduce == "max":
        values, _, stride = _rows(values)
        counted = again * values.element_size() > REDUNDANT
        count = _forward(values, output, token_offsets, sequence_offsets, TIES.value, level, mask) if counted else None
    elif reduce == "mean" and mask is not None:
        counted = again > REDUNDANT
        count = _forward(compact(mask), None, token_offsets, sequence_offsets, SUM.value, level, None) if counted else None
    num_slots = slots(num_tokens, units, level)
    with device(grad):
        _segment_reduce_bwd_kernel[(triton.cdiv(num_slots, tile["ROWS"]) * channels,)](
            grad, values, output, count, compact(mask), token_offsets, sequence_offsets, out, stride, num_tokens, units, num_slots,
            bisections(units), MODE=MODES[reduce], HAS_MASK=mask is not None, COUNTED=counted, SEQUENCE=sequence, **tile, **LAUNCH,
        )  # fmt: skip
    return out
