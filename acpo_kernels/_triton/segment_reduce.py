"""CUDA kernels of `segment_reduce` and its backward. The contract is in acpo_kernels/segment_reduce.py.

Bytes: N C s read (and N of the mask), once; the offsets and one partial result a chunk beside it. Launches: forward one where
N <= CHUNK and else two, the second of which adds the chunks of a unit in their order; backward one (sum, mean), with a mask two or
three (mean: the unmasked tokens are counted first), two or three (max: the tokens that attain it are counted first).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _torch
from .ragged import NUM_WARPS, TILES, _chunk, bisections, compact, device, slots

INF = tl.constexpr(float("inf"))
ROUNDING = tl.constexpr("rtne")
PARTIALS = 32  # of a unit that the second launch takes at a time, for 32 units a program: again a tile of 1024

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
    values_ptr, maxima_ptr, mask_ptr, token_offsets_ptr, sequence_offsets_ptr, out_ptr, partial_ptr, count_ptr,
    stride_channel, num_tokens, num_units, num_slots, bisections,
    MODE: tl.constexpr, HAS_MASK: tl.constexpr, DIRECT: tl.constexpr, SEQUENCE: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(num_slots, ROWS)  # one dimension of the grid for both: the others end at 65,535
    channel = (tl.program_id(0) // tiles).to(tl.int64)
    slot = (tl.program_id(0) % tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    unit, first, chunks, start, end = _chunk(
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
    if MODE == MEAN:
        count = tl.sum(inside.to(tl.int32), axis=1)
        if DIRECT:
            result = tl.div_rn(result, tl.maximum(count, 1).to(tl.float32))
        elif channel == 0:
            tl.store(count_ptr + slot, count, mask=own)
    if DIRECT:
        tl.store(out_ptr + channel * num_units + unit, result, mask=own)
    else:
        tl.store(partial_ptr + channel * num_slots + slot, result, mask=own)


@triton.jit(do_not_specialize=_UNSPECIALISED)
def _segment_reduce_combine_kernel(
    token_offsets_ptr, sequence_offsets_ptr, partial_ptr, count_ptr, out_ptr, num_tokens, num_units, num_slots,
    MODE: tl.constexpr, SEQUENCE: tl.constexpr, CHUNK: tl.constexpr, PARTIALS: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(num_units, PARTIALS)
    channel = (tl.program_id(0) // tiles).to(tl.int64)
    unit = (tl.program_id(0) % tiles).to(tl.int64) * PARTIALS + tl.arange(0, PARTIALS)  # [32]
    here = unit < num_units
    low, high = unit, unit + 1
    if SEQUENCE:
        low = tl.load(sequence_offsets_ptr + low, mask=here, other=0)
        high = tl.load(sequence_offsets_ptr + high, mask=here, other=0)
    begin = tl.load(token_offsets_ptr + low, mask=here, other=0)
    end = tl.load(token_offsets_ptr + high, mask=here, other=0)
    first = unit + begin // CHUNK
    chunks = tl.where(here, tl.minimum(tl.maximum((end - begin + CHUNK - 1) // CHUNK, 1), num_slots - first), 0)
    neutral = -INF if MODE == MAX else 0.0
    total = tl.full([PARTIALS, PARTIALS], neutral, tl.float32)
    count = tl.zeros([PARTIALS, PARTIALS], tl.int32)
    for at in range(0, tl.max(chunks, axis=0), PARTIALS):
        which = at + tl.arange(0, PARTIALS)
        inside = which[None, :] < chunks[:, None]
        index = first[:, None] + which[None, :]
        x = tl.load(partial_ptr + channel * num_slots + index, mask=inside, other=neutral)
        total = _maximum(total, x) if MODE == MAX else total + x
        if MODE == MEAN:
            count += tl.load(count_ptr + index, mask=inside, other=0)
    result = _reduced(total, MODE)
    if MODE == MEAN:
        result = tl.div_rn(result, tl.maximum(tl.sum(count, axis=1), 1).to(tl.float32))
    tl.store(out_ptr + channel * num_units + unit, result, mask=here)


@triton.jit(do_not_specialize=_UNSPECIALISED)
def _segment_reduce_bwd_kernel(
    grad_ptr, values_ptr, maxima_ptr, count_ptr, mask_ptr, token_offsets_ptr, sequence_offsets_ptr, out_ptr,
    stride_channel, num_tokens, num_units, num_slots, bisections,
    MODE: tl.constexpr, HAS_MASK: tl.constexpr, SEQUENCE: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(num_slots, ROWS)
    channel = (tl.program_id(0) // tiles).to(tl.int64)
    slot = (tl.program_id(0) % tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    unit, first, chunks, start, end = _chunk(
        slot, token_offsets_ptr, sequence_offsets_ptr, num_tokens, num_units, bisections, SEQUENCE, CHUNK
    )  # fmt: skip
    own = (slot < num_slots) & (slot - first < chunks)
    token = start[:, None] + tl.arange(0, CHUNK)[None, :]
    inside = own[:, None] & (token < end[:, None])
    kept = inside
    if HAS_MASK:
        kept = kept & (tl.load(mask_ptr + token, mask=inside, other=0) != 0)
    grad = tl.load(grad_ptr + channel * num_units + unit)  # [ROWS]
    if MODE == MEAN:
        if HAS_MASK:
            count = tl.load(count_ptr + unit)
        else:
            begin = start - (slot - first) * CHUNK
            last = tl.load(sequence_offsets_ptr + unit + 1) if SEQUENCE else unit + 1
            count = (tl.load(token_offsets_ptr + last) - begin).to(tl.float32)
        grad = tl.div_rn(grad, tl.maximum(count, 1.0))
    if MODE == MAX:
        grad = tl.div_rn(grad, tl.maximum(tl.load(count_ptr + channel * num_units + unit), 1.0))
        x = tl.load(values_ptr + channel * stride_channel + token, mask=kept, other=0.0).to(tl.float32)
        kept = kept & (x == tl.load(maxima_ptr + channel * num_units + unit)[:, None])
    result = tl.where(kept, grad[:, None], 0.0)
    tl.store(out_ptr + channel * num_tokens + token, result.to(out_ptr.dtype.element_ty, fp_downcast_rounding=ROUNDING), mask=inside)


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
    num_slots, direct = slots(n, units, level), n <= tile["CHUNK"]
    partial = None if direct else torch.empty(channels * num_slots, dtype=torch.float32, device=values.device)
    count = None if direct or mode != MEAN.value else torch.empty(num_slots, dtype=torch.int32, device=values.device)
    with device(values):
        _segment_reduce_fwd_kernel[(triton.cdiv(num_slots, tile["ROWS"]) * channels,)](
            values, maxima, compact(mask), token_offsets, sequence_offsets, out, partial, count, stride, n, units, num_slots, bisections(units),
            MODE=mode, HAS_MASK=mask is not None, DIRECT=direct, SEQUENCE=sequence, **tile, num_warps=NUM_WARPS,
        )  # fmt: skip
        if not direct:
            _segment_reduce_combine_kernel[(triton.cdiv(units, PARTIALS) * channels,)](
                token_offsets, sequence_offsets, partial, count, out, n, units, num_slots,
                MODE=mode, SEQUENCE=sequence, CHUNK=tile["CHUNK"], PARTIALS=PARTIALS, num_warps=NUM_WARPS,
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
    sequence, tile, units = level == "sequence", TILES[level], grad.shape[-1]
    if reduce == "max":
        values, _, stride = _rows(values)
        count = _forward(values, output, token_offsets, sequence_offsets, TIES.value, level, mask)
    elif reduce == "mean" and mask is not None:
        count = _forward(compact(mask), None, token_offsets, sequence_offsets, SUM.value, level, None)
    num_slots = slots(num_tokens, units, level)
    with device(grad):
        _segment_reduce_bwd_kernel[(triton.cdiv(num_slots, tile["ROWS"]) * (out.numel() // num_tokens),)](
            grad, values, output, count, compact(mask), token_offsets, sequence_offsets, out, stride, num_tokens, units, num_slots,
            bisections(units), MODE=MODES[reduce], HAS_MASK=mask is not None, SEQUENCE=sequence, **tile, num_warps=NUM_WARPS,
        )  # fmt: skip
    return out
