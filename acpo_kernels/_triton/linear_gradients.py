"""The backward of `linear_logprob_entropy`: 6 a N V H operations for a share a of rows whose gradient is not exactly zero (2 less for a
frozen weight, 2 less for frozen hidden states).

The vocabulary goes by in slices of SLICE columns. For each, one kernel recomputes the logits (each summed over H in the same steps as the
forward's, on which the chosen token's expm1 relies) and writes the slice's gradient G [rows, SLICE], one adds G W to the hidden states'
gradient, one writes the slice of G^T hidden to the weight's. A weight row is summed inside one tile's float32 accumulators and rounded once,
without a float32 copy of the weight. The float32 sums of the hidden states' gradient are read and written once a slice: 8 N H bytes for
6 N H SLICE operations, at SLICE = 8,192 3 % of the time on an H200 (4 TB/s, 700 TF/s) were nothing overlapped. G goes through HBM or L2,
2 bytes a logit written and twice read, under products that leave most of that bandwidth idle; linear_gradient_slice.py tells how it is
rounded. The host launches three kernels a slice, 57 in all at V = 151,936.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .linear_gradient_slice import FLAG, PART, _linear_gradient_kernel, _scales_kernel
from .linear_tiles import (
    GATHER_COLUMNS,
    GATHER_ROWS,
    ROW_BLOCK,
    Head,
    Rows,
    Tiles,
    _multiply,
    _place,
    _rounded,
    _tile,
    counted_rows,
    machine,
    operand,
    tiles,
)
from .ragged import device

SLICE = 8192


@triton.jit(do_not_specialize=["padded", "column"])
def _hidden_gradient_kernel(
    gradient_ref, residue_ref, flags_ptr, weight_ref, count_ptr, sums_ptr, V, H, stride_weight, padded, column,
    RESIDUE: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_V: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """sums += G W over one slice, of float16 with each row's scale still in."""
    BLOCKS: tl.constexpr = WIDTH // FLAG
    count = tl.load(count_ptr)
    row_tiles, h_tiles = tl.cdiv(count, BLOCK_M), tl.cdiv(H, BLOCK_H)
    size = tl.minimum(V - column, WIDTH)
    program, programs = tl.program_id(0), tl.num_programs(0)
    for step in range(0, tl.cdiv(row_tiles * h_tiles - program, programs)):
        item = program + step * programs
        row_tile, h_tile = _place(item, row_tiles, h_tiles)
        m, h = row_tile * BLOCK_M, h_tile * BLOCK_H
        rows, columns = m + tl.arange(0, BLOCK_M), h + tl.arange(0, BLOCK_H)
        at = sums_ptr + rows.to(tl.int64)[:, None] * H + columns[None, :]
        inside = (columns < H)[None, :] & (rows < count)[:, None]
        acc = tl.load(at, mask=inside & (column > 0), other=0.0)  # the accumulators begin with the slices before
        for v in range(0, size, BLOCK_V):
            a = _tile(gradient_ref, m, v, padded, WIDTH, WIDTH, TMA, BLOCK_M, BLOCK_V)
            b = _tile(weight_ref, column + v, h, V, H, stride_weight, TMA, BLOCK_V, BLOCK_H)
            acc = _multiply(a, b, acc, PRECISION)
        if RESIDUE:
            block = tl.arange(0, BLOCKS)
            there = block * FLAG < size
            flag = flags_ptr + (m // FLAG) * BLOCKS + block
            flagged = tl.load(flag, mask=there, other=0) | tl.load(flag + BLOCKS, mask=there, other=0)
            order = tl.cumsum(flagged, 0)
            for i in range(0, tl.sum(flagged, 0)):
                v = tl.sum((order <= i).to(tl.int32), 0) * FLAG
                a = _tile(residue_ref, m, v, padded, WIDTH, WIDTH, TMA, BLOCK_M, BLOCK_V)
                b = _tile(weight_ref, column + v, h, V, H, stride_weight, TMA, BLOCK_V, BLOCK_H)
                acc = _multiply(a, b, acc, PRECISION)
        tl.store(at, acc, mask=inside)


@triton.jit
def _weight_place(out_ptr, row, column, V, width, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr):
    rows, columns = row + tl.arange(0, BLOCK_V), column + tl.arange(0, BLOCK_H)
    return out_ptr + rows.to(tl.int64)[:, None] * width + columns[None, :], (rows < V)[:, None] & (columns < width)[None, :]


@triton.jit(do_not_specialize=["padded", "column"])
def _weight_gradient_kernel(
    gradient_ref, residue_ref, flags_ptr, hidden_ref, count_ptr, least_ptr, out_ptr, V, H, width_out, padded, column,
    ADD: tl.constexpr, RESIDUE: tl.constexpr, SCALED: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_M: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One slice of G^T hidden, rounded once; or (ADD) added to a float32 sum. H is the padded width of hidden, width_out that of the weight."""
    BLOCKS: tl.constexpr = WIDTH // FLAG
    count = tl.load(count_ptr)
    size = tl.minimum(V - column, WIDTH)
    v_tiles, h_tiles = tl.cdiv(size, BLOCK_V), tl.cdiv(width_out, BLOCK_H)
    if ADD:
        v_tiles = tl.where(count > 0, v_tiles, 0)
    program, programs = tl.program_id(0), tl.num_programs(0)
    for step in range(0, tl.cdiv(v_tiles * h_tiles - program, programs)):
        item = program + step * programs
        v_tile, h_tile = _place(item, v_tiles, h_tiles)
        v, h = v_tile * BLOCK_V, h_tile * BLOCK_H
        acc = tl.zeros([BLOCK_V, BLOCK_H], tl.float32)
        if ADD and TMA:  # the accumulators begin with the sum so far: no room for both, where it is on sm_80
            at, inside = _weight_place(out_ptr, column + v, h, V, width_out, BLOCK_V, BLOCK_H)
            acc = tl.load(at, mask=inside, other=0.0)
            if SCALED:
                acc = acc * tl.load(least_ptr)  # a power of two
        for m in range(0, count, BLOCK_M):
            a = _tile(gradient_ref, m, v, padded, WIDTH, WIDTH, TMA, BLOCK_M, BLOCK_V)
            b = _tile(hidden_ref, m, h, padded, H, H, TMA, BLOCK_M, BLOCK_H)
            acc = _multiply(a.T, b, acc, PRECISION)
        if RESIDUE:
            row_blocks = tl.cdiv(count, FLAG)
            for chunk in range(0, row_blocks, CHUNK):
                block = chunk + tl.arange(0, CHUNK)
                there = block < row_blocks
                flag = flags_ptr + block * BLOCKS + v // FLAG
                flagged = tl.load(flag, mask=there, other=0)
                for i in tl.static_range(1, BLOCK_V // FLAG):
                    flagged = flagged | tl.load(flag + i, mask=there & (v + i * FLAG < size), other=0)  # a tile past the vocabulary has none
                order = tl.cumsum(flagged, 0)
                for i in range(0, tl.sum(flagged, 0)):
                    m = (chunk + tl.sum((order <= i).to(tl.int32), 0)) * FLAG
                    a = _tile(residue_ref, m, v, padded, WIDTH, WIDTH, TMA, BLOCK_M, BLOCK_V)
                    b = _tile(hidden_ref, m, h, padded, H, H, TMA, BLOCK_M, BLOCK_H)
                    acc = _multiply(a.T, b, acc, PRECISION)
        if SCALED:
            acc = acc / tl.load(least_ptr)
        at, inside = _weight_place(out_ptr, column + v, h, V, width_out, BLOCK_V, BLOCK_H)
        if ADD and not TMA:
            acc += tl.load(at, mask=inside, other=0.0)
        tl.store(at, _rounded(acc, out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["column"])
def _bias_gradient_kernel(
    column_sums_ptr, count_ptr, out_ptr, V, column, ADD: tl.constexpr, TILE_ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    local = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = (local < WIDTH) & (column + local < V)
    total = tl.zeros([BLOCK], tl.float32)
    for row_tile in range(0, tl.cdiv(tl.load(count_ptr), TILE_ROWS)):
        total += tl.load(column_sums_ptr + tl.cast(row_tile, tl.int64) * WIDTH + local, mask=inside, other=0.0)
    if ADD:
        total += tl.load(out_ptr + column + local, mask=inside, other=0.0)
    tl.store(out_ptr + column + local, _rounded(total, out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "H"])
def _scatter_kernel(
    sums_ptr, scales_ptr, position_ptr, index_ptr, count_ptr, out_ptr, rows, H, HS,
    COMPACT: tl.constexpr, SCALED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """To every row of the call, zeros where it does not count; or (COMPACT) to the compact rows alone."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    if COMPACT:
        there = row < tl.load(count_ptr)
        at = tl.where(there, row, -1)
        row = tl.load(index_ptr + row, mask=there, other=0)
    else:
        there = row < rows
        at = tl.load(position_ptr + row, mask=there, other=-1)
    for start in range(0, H, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        x = tl.load(sums_ptr + at.to(tl.int64)[:, None] * HS + offs[None, :], mask=(at >= 0)[:, None] & (offs < H)[None, :], other=0.0)
        if SCALED:
            x = x / tl.load(scales_ptr + at, mask=at >= 0, other=1.0)[:, None]
        out = out_ptr + row.to(tl.int64)[:, None] * H + offs[None, :]
        tl.store(out, _rounded(x, out_ptr.dtype.element_ty), mask=there[:, None] & (offs < H)[None, :])


def slice_width(vocab: int, tile: Tiles) -> int:
    return min(SLICE, max(triton.next_power_of_2(vocab), tile.n))


def gradient_tiles(tile: Tiles, architecture: int, softcap: bool, held: bool) -> Tiles:
    """256 columns of products are taken in halves (32 registers of them spill, once a tile, and three stages are faster than four: 3 % of a
    forward and backward at H = 896, 4 % at 4,096 on an H100). On sm_100 or with a softcap 128 do not fit beside the residue either."""
    n = min(tile.n, 64 if architecture // 10 == 10 or softcap else PART if held else 256)
    return tile._replace(n=n, stages=min(tile.stages, 3) if n > PART else tile.stages)


def product_tiles(tile: Tiles, architecture: int) -> Tiles:
    """The products read and write their sums through shared memory (64 KiB), which takes one stage of the pipeline."""
    return tile._replace(n=min(tile.n, 128 if architecture // 10 == 10 else 256), stages=min(tile.stages, 3))


def weight_tiles(tile: Tiles) -> Tiles:
    """float32: both operands are turned on their way into registers, and of 32 rows Triton 3.6 spills the halves on sm_80 and sm_100."""
    return tile._replace(k=16) if tile.precision == "tf32x3" else tile


def backward(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    bias: Tensor | None,
    temperature: float | None,
    temperatures: Tensor | None,
    softcap: float | None,
    mask: Tensor | None,
    grad_logp: Tensor | None,
    grad_entropy: Tensor | None,
    statistics: tuple[Tensor, Tensor, Tensor],
    needs: tuple[bool, bool, bool],
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of hidden, weight and bias, empty where not needed, in dtype or each in its own. statistics: the forward's results but logp."""
    need_hidden, need_weight, need_bias = needs
    new = dict(device=hidden.device)
    grad_hidden = torch.empty(hidden.shape if need_hidden else (0,), dtype=dtype or hidden.dtype, **new)
    grad_weight = torch.empty(weight.shape if need_weight else (0,), dtype=dtype or weight.dtype, **new)
    grad_bias = torch.empty(weight.shape[0] if need_bias else 0, dtype=dtype or (torch.float32 if bias is None else bias.dtype), **new)
    if ids.shape[0] == 0 or not any(needs):
        return grad_hidden, grad_weight.zero_(), grad_bias.zero_()
    with device(hidden):
        head = Head.of(weight, ids, bias, temperature, temperatures, softcap)
        grad_logp, grad_entropy = (None if g is None else g.contiguous() for g in (grad_logp, grad_entropy))
        rows = counted_rows(head.ids, mask, grad_logp, grad_entropy)
        add(head, rows, hidden, grad_logp, grad_entropy, statistics, (grad_hidden, grad_weight, grad_bias))
    return grad_hidden, grad_weight, grad_bias


class Held(NamedTuple):
    """Logits of more rows than have a gradient: row i's are logits[places[i]]."""

    logits: Tensor
    places: Tensor


def add(
    head: Head,
    rows: Rows,
    hidden: Tensor,
    grad_logp: Tensor | None,
    grad_entropy: Tensor | None,
    statistics: tuple[Tensor, Tensor, Tensor],
    out: tuple[Tensor, Tensor, Tensor],
    held: Held | None = None,
    more: bool = False,
) -> None:
    """What these rows give to the gradients of hidden, weight and bias, empty where not needed. more: to those of weight and bias, float32,
    it is added."""
    grad_hidden, grad_weight, grad_bias = out
    need_hidden, need_weight, need_bias = (g.numel() > 0 for g in out)
    architecture, programs = machine(hidden)
    new = dict(device=hidden.device)
    softcapped = head.softcap is not None
    logits_tile = gradient_tiles(tiles(hidden.element_size(), architecture), architecture, softcapped, held is not None)
    tile = product_tiles(tiles(hidden.element_size(), architecture), architecture)
    weight_tile = weight_tiles(tile)
    weight, temperatures = head.weight, head.temperatures
    given = dict(HAS_LOGP=grad_logp is not None, HAS_ENTROPY=grad_entropy is not None, HAS_TEMPERATURES=temperatures is not None)
    scaled, residue = hidden.dtype == torch.float16, hidden.element_size() == 2
    scales = shares = least = None
    if scaled:
        scales, shares, least = (torch.empty(n, dtype=torch.float32, **new) for n in (rows.padded, rows.padded, 1))
        _scales_kernel[(1,)](
            grad_logp, grad_entropy, statistics[0], temperatures, rows.index, rows.count, scales, shares, least, head.inverse,
            BLOCK=1024, **given,
        )  # fmt: skip
    gathered = rows.gather(hidden)
    other = rows.gather(hidden, shares) if scaled and need_weight else gathered
    vocab, wide = weight.shape
    width = slice_width(vocab, tile)
    gradient = torch.empty(rows.padded, width, dtype=hidden.dtype, **new)
    low = torch.empty_like(gradient) if residue else gradient
    flags = torch.empty(rows.padded // FLAG.value * (width // FLAG.value), dtype=torch.int32, **new)
    column_sums = torch.empty(rows.padded // ROW_BLOCK * width, dtype=torch.float32, **new) if need_bias else None
    sums = torch.empty(rows.padded, wide, dtype=torch.float32, **new) if need_hidden else None
    common = dict(RESIDUE=residue, TMA=tile.tma, PRECISION=tile.precision, WIDTH=width)
    g_rows, low_rows = (operand(g, tile.m, tile.k, tile.tma) for g in (gradient, low))
    g_columns, low_columns = (operand(g, tile.k, tile.m, tile.tma) for g in (gradient, low))
    w_forward, w_backward = operand(weight, logits_tile.n, logits_tile.k, tile.tma), operand(weight, tile.k, tile.n, tile.tma)
    h_forward, h_backward = operand(gathered, tile.m, tile.k, tile.tma), operand(other, tile.k, tile.n, tile.tma)
    logits, places = (None, None) if held is None else held
    row_tiles, h_tiles = rows.padded // tile.m, triton.cdiv(wide, tile.n)
    for column in range(0, vocab, width):
        size = min(width, vocab - column)
        _linear_gradient_kernel[(min(programs, row_tiles * triton.cdiv(size, logits_tile.n)),)](
            h_forward, w_forward, head.bias, head.ids, temperatures, rows.index, rows.count, *statistics, grad_logp, grad_entropy, scales,
            logits, places, gradient, low, flags, column_sums, vocab, wide, weight.stride(0), 0 if held is None else logits.shape[1],
            rows.padded, column, head.inverse, head.softcap or 1.0, HAS_BIAS=head.bias is not None, HAS_SOFTCAP=softcapped,
            NEEDS_BIAS=need_bias, HELD=held is not None, SCALED=scaled, BLOCK_M=tile.m, BLOCK_V=logits_tile.n, BLOCK_H=tile.k,
            PART=min(logits_tile.n, PART), **given, **common, **logits_tile.options(),
        )  # fmt: skip
        if need_hidden:
            _hidden_gradient_kernel[(min(programs, row_tiles * h_tiles),)](
                g_rows, low_rows, flags, w_backward, rows.count, sums, vocab, wide, weight.stride(0), rows.padded, column,
                BLOCK_M=tile.m, BLOCK_H=tile.n, BLOCK_V=tile.k, **common, **tile.options(),
            )  # fmt: skip
        if need_weight:
            _weight_gradient_kernel[(min(programs, triton.cdiv(size, tile.m) * h_tiles),)](
                g_columns, low_columns, flags, h_backward, rows.count, least, grad_weight, vocab, wide, grad_weight.shape[1], rows.padded, column,
                BLOCK_V=tile.m, BLOCK_H=tile.n, BLOCK_M=weight_tile.k, CHUNK=128, ADD=more, SCALED=scaled, **common, **tile.options(),
            )  # fmt: skip
        if need_bias:
            _bias_gradient_kernel[(triton.cdiv(size, 256),)](
                column_sums, rows.count, grad_bias, vocab, column, ADD=more, TILE_ROWS=tile.m, WIDTH=width, BLOCK=256
            )
    if need_hidden:
        some = rows.padded if rows.position is None else rows.position.shape[0]
        _scatter_kernel[(triton.cdiv(some, GATHER_ROWS),)](
            sums, scales, rows.position, rows.index, rows.count, grad_hidden, some, hidden.shape[1], wide, COMPACT=rows.position is None,
            SCALED=scaled, ROWS=GATHER_ROWS, BLOCK=GATHER_COLUMNS,
        )  # fmt: skip
