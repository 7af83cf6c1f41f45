"""CUDA kernels of `linear_logprob_entropy`: hidden states in, log-prob and entropy out, and the gradients. No N x V tensor exists.

Forward, 2 u N V H operations for a share u of unmasked rows. A program multiplies a row tile with SPLIT_TILES tiles of the vocabulary;
each tile's float32 accumulators become the row's (maximum, r, w) of linear_tiles.py and are dropped. What reaches memory is three
numbers a row and split of 1,024 columns, V/85 float32 a row at most, and one kernel makes the row's results of them.

The alternative, logits tiles by cuBLAS in float32 and then the logits kernel, moves 8 N V bytes: 10 GB or 2.3 ms at 8,192 x 151,936
on an H200, beside 3.1 ms for the product at H = 896 (720 TF/s) and 14.2 at H = 4096; tiles small enough for L2 save that traffic and pay
one launch and one tail of the grid a tile.

Backward: see linear_gradients.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .linear_tiles import (
    INF,
    LOWEST,
    Head,
    Rows,
    Tiles,
    _finish_logits,
    _meet,
    _multiply,
    _place,
    _row_scale,
    _tile,
    _tile_statistics,
    counted_rows,
    machine,
    operand,
    tiles,
)
from .logits_rows import _log1p
from .ragged import device

SPLIT = 1024  # columns: 149 splits of V = 151,936 keep a GPU busy with one row tile, and cost 12 bytes a row and split
COMBINE = 4096  # splits x rows of one program that lets the splits meet


@triton.jit(do_not_specialize=["padded", "inverse_temperature", "softcap"])
def _linear_logprob_entropy_fwd_kernel(
    hidden_ref, weight_ref, bias_ptr, ids_ptr, temperatures_ptr, index_ptr, count_ptr, parts_ptr, chosen_ptr, held_ptr,
    V, H, stride_weight, stride_held, padded, inverse_temperature, softcap,
    HAS_BIAS: tl.constexpr, HAS_TEMPERATURES: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HOLD: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    TILES: tl.constexpr = SPLIT // BLOCK_V
    count = tl.load(count_ptr)
    row_tiles, splits = tl.cdiv(count, BLOCK_M), tl.cdiv(V, SPLIT)
    program, programs = tl.program_id(0), tl.num_programs(0)
    mine = tl.maximum(tl.cdiv(row_tiles * splits - program, programs), 0)
    top = tl.full([BLOCK_M], -INF, tl.float32)
    r = tl.zeros([BLOCK_M], tl.float32)
    w = tl.zeros([BLOCK_M], tl.float32)
    for step in range(0, mine * TILES):
        row_tile, split = _place(program + step // TILES * programs, row_tiles, splits)
        within = step % TILES
        m, v = row_tile * BLOCK_M, split * SPLIT + within * BLOCK_V
        acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
        for h in range(0, H, BLOCK_H):
            a = _tile(hidden_ref, m, h, padded, H, H, TMA, BLOCK_M, BLOCK_H)
            b = _tile(weight_ref, v, h, V, H, stride_weight, TMA, BLOCK_V, BLOCK_H)
            acc = _multiply(a, b.T, acc, PRECISION)
        columns, rows = v + tl.arange(0, BLOCK_V), m + tl.arange(0, BLOCK_M)
        valid = rows < count
        source = tl.load(index_ptr + rows, mask=valid, other=0)
        _, k, limit = _row_scale(source, valid, inverse_temperature, temperatures_ptr, HAS_TEMPERATURES)
        x = _finish_logits(acc, columns, bias_ptr, softcap, V, HAS_BIAS, HAS_SOFTCAP)
        if HOLD:
            at = held_ptr + rows.to(tl.int64)[:, None] * stride_held + columns[None, :]
            tl.store(at, x, mask=(columns < stride_held)[None, :])
        part_top, part_r, part_w = _tile_statistics(x, k, limit)
        fresh = within == 0
        top, r, w = tl.where(fresh, -INF, top), tl.where(fresh, 0.0, r), tl.where(fresh, 0.0, w)
        top, r, w = _meet(top, r, w, part_top, part_r, part_w, k, limit)
        out = parts_ptr + split.to(tl.int64) * padded + rows
        apart = splits.to(tl.int64) * padded
        last = within == TILES - 1
        tl.store(out, top, mask=last)
        tl.store(out + apart, r, mask=last)
        tl.store(out + 2 * apart, w, mask=last)
        target = tl.load(ids_ptr + source, mask=valid, other=-1)
        here = (target >= v) & (target < tl.minimum(v + BLOCK_V, V))
        if tl.max(here.to(tl.int32), 0) > 0:  # one tile in five at 128 rows and V = 151,936
            tl.store(chosen_ptr + rows, tl.sum(tl.where(columns[None, :] == target[:, None], x, 0.0), 1), mask=here)


@triton.jit(do_not_specialize=["rows", "padded", "inverse_temperature"])
def _linear_logprob_entropy_combine_kernel(
    parts_ptr, chosen_ptr, ids_ptr, temperatures_ptr, position_ptr, index_ptr, count_ptr, logp_ptr, entropy_ptr, maximum_ptr, logsumexp_ptr,
    V, rows, padded, inverse_temperature,
    COMPACT: tl.constexpr, HAS_TEMPERATURES: tl.constexpr, SPLIT: tl.constexpr, SPLITS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Of every row of the call, zeros where it does not count; or (COMPACT) of the compact rows alone."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at, inside_rows = row, row < rows
    if COMPACT:
        active = row < tl.load(count_ptr)
        row = tl.load(index_ptr + row, mask=active, other=0)
        inside_rows = active
    else:
        at = tl.load(position_ptr + row, mask=inside_rows, other=-1)
        active = at >= 0
    per_t, k, limit = _row_scale(row, active, inverse_temperature, temperatures_ptr, HAS_TEMPERATURES)
    split = tl.arange(0, SPLITS)
    splits = tl.cdiv(V, SPLIT)
    there = active[None, :] & (split < splits)[:, None]  # [SPLITS,ROWS]
    part = parts_ptr + split.to(tl.int64)[:, None] * padded + at[None, :]
    apart = splits.to(tl.int64) * padded
    m = tl.load(part, mask=there, other=-INF)
    r = tl.load(part + apart, mask=there, other=0.0)
    w = tl.load(part + 2 * apart, mask=there, other=0.0)

    top = tl.max(m, 0)
    first = tl.min(tl.where(m == top[None, :], split[:, None], SPLITS), 0)
    base = tl.maximum(top, LOWEST)
    d = tl.maximum(m - base[None, :], limit[None, :])
    e = tl.exp2(d * k[None, :])
    s = tl.where(split[:, None] == first[None, :], r, r + 1.0)  # every split but the first top one gives its own maximum as a term
    rest = tl.sum(s * e, 0)
    weighted = tl.sum((w - s * d) * e, 0)

    target = tl.load(ids_ptr + row, mask=active, other=-1)
    inside = (target >= 0) & (target < V)
    x_t = tl.load(chosen_ptr + at, mask=active & inside, other=0.0)
    bad = (rest != rest) | (weighted != weighted) | (top == INF) | (top <= LOWEST) | (inside == 0)
    nan = float("nan")
    l = _log1p(rest)  # noqa: E741
    tl.store(logp_ptr + row, tl.where(active, tl.where(bad, nan, (x_t - base) * per_t - l), 0.0), mask=inside_rows)
    entropy = l + tl.div_rn(weighted * per_t, 1.0 + rest)
    tl.store(entropy_ptr + row, tl.where(active, tl.where(bad, nan, entropy), 0.0), mask=inside_rows)
    tl.store(maximum_ptr + row, tl.where(active, tl.where(bad, nan, top), 0.0), mask=inside_rows)
    tl.store(logsumexp_ptr + row, tl.where(active, tl.where(bad, nan, l), 0.0), mask=inside_rows)


def logits_tiles(tile: Tiles, softcap: bool) -> Tiles:
    """The hyperbolic tangent wants the registers of half the columns."""
    return tile._replace(n=min(tile.n, 128)) if softcap else tile


def forward(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    bias: Tensor | None,
    temperature: float | None,
    temperatures: Tensor | None,
    softcap: float | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logp, entropy, the maximum of the logits and the centred logsumexp l, all float32 [N]."""
    results = tuple(torch.empty(ids.shape, dtype=torch.float32, device=ids.device) for _ in range(4))
    if ids.shape[0] == 0:
        return results
    with device(hidden):
        head = Head.of(weight, ids, bias, temperature, temperatures, softcap)
        rows = counted_rows(head.ids, mask)
        product(head, rows, rows.gather(hidden), results)
    return results


def product(head: Head, rows: Rows, gathered: Tensor, results: tuple[Tensor, ...], held: Tensor | None = None) -> None:
    """The four results of these rows; held [rows, at least V]: their logits too."""
    architecture, programs = machine(gathered)
    tile = logits_tiles(tiles(gathered.element_size(), architecture), head.softcap is not None or held is not None)
    vocab, splits = head.weight.shape[0], triton.cdiv(head.weight.shape[0], SPLIT)
    parts, chosen = (torch.empty(n * rows.padded, dtype=torch.float32, device=gathered.device) for n in (3 * splits, 1))
    flags = dict(HAS_TEMPERATURES=head.temperatures is not None, SPLIT=SPLIT)
    _linear_logprob_entropy_fwd_kernel[(min(programs, rows.padded // tile.m * splits),)](
        operand(gathered, tile.m, tile.k, tile.tma), operand(head.weight, tile.n, tile.k, tile.tma), head.bias, head.ids, head.temperatures,
        rows.index, rows.count, parts, chosen, held, vocab, head.weight.shape[1], head.weight.stride(0), 0 if held is None else held.shape[1],
        rows.padded, head.inverse, head.softcap or 1.0, HAS_BIAS=head.bias is not None, HAS_SOFTCAP=head.softcap is not None,
        HOLD=held is not None, TMA=tile.tma, PRECISION=tile.precision, BLOCK_M=tile.m, BLOCK_V=tile.n, BLOCK_H=tile.k, **flags, **tile.options(),
    )  # fmt: skip
    wide, some = triton.next_power_of_2(splits), rows.padded if rows.position is None else rows.position.shape[0]
    each = max(1, COMBINE // wide)
    _linear_logprob_entropy_combine_kernel[(triton.cdiv(some, each),)](
        parts, chosen, head.ids, head.temperatures, rows.position, rows.index, rows.count, *results, vocab, some, rows.padded, head.inverse,
        COMPACT=rows.position is None, SPLITS=wide, ROWS=each, **flags,
    )  # fmt: skip
