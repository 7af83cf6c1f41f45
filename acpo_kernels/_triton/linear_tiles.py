"""What the kernels on hidden states share: tile shapes, the rows that count, tiles of logits, and statistics of a row that meet.

Rows. `counted_rows` lists the rows that count (not masked; in a backward also: with a gradient that is not exactly zero) one behind the
other: an index, a position, and their NUMBER ON THE DEVICE, so that the host never waits. Every product runs on that copy: masked and
zero-gradient rows cost nothing and are not read, and rows of tensor cores' tiles that hold no row are zero. The copy moves 2 N H
elements where a product does 2 N V H operations.

Tiles. A tile's shape depends on the dtype and the architecture alone, and a row of a product depends on no other row: its bits are
those of the row alone. 128 x 256 x 64 needs (128 + 256) 64 x 2 bytes = 48 KiB of operands for 4.2 MFLOP, 85 FLOP a byte: at 720 TF/s
8.4 TB/s out of L2, about what an H200 has (some 9 by 5,120 bytes a clock); 128 x 128 would need 11.3 and stop near 600. Two warp groups
then hold 128 accumulators a thread, so there is one program a multiprocessor, and the arithmetic on a tile's logits is not hidden behind
the next product: about 11 instructions a logit, 3,500 clocks beside 14,300 for the product at H = 896 and 65,500 at H = 4096, and a pipeline
to fill, some 1,500. That leaves an estimated 75 % of the product's rate at H = 896 and 93 % at H = 4096. Three ways to hide it did not
compile in Triton 3.7.1: warp specialisation (sm_100: no end), tl.range(flatten=True) (its pass fails), both loops as one by hand (spills).
Two 128 x 128 programs a multiprocessor overlap by themselves, at the L2 rate above, and lose on an H100: 12 to 16 % at H = 896, 4 to 20 %
at 4,096. As built, 591 TF/s at H = 896 and 657 at 4,096 there, which as a line in H is 680 for the product and 0.5 ms for the rest. GROUP
from 4 to 64, three or four stages and SPLIT up to 2,048 are within 3 %.

Order. Programs stay, one a multiprocessor, and take tile after tile: GROUP row tiles (2,048 rows, 16 MiB at H = 4096: they stay in L2)
against all of the vocabulary, rows fastest, so that a weight tile is fetched from HBM once a group.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..reference import IGNORED
from .ragged import compact

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
INF = tl.constexpr(float("inf"))
LOWEST = tl.constexpr(-3.4028234663852886e38)
GROUP = tl.constexpr(16)
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
ROW_BLOCK = 128  # compacted rows come in whole row tiles
SCAN = 1024  # rows of one step of the prefix sum
GATHER_ROWS, GATHER_COLUMNS = 32, 128  # of one program and step: 16 threads read 256 bytes of a bfloat16 row, each thread four times 16


class Tiles(NamedTuple):
    """Of a product [M,K] x [K,N] and its pipeline; tma: operands by TMA (sm_90 and later), else by 16-byte cp.async."""

    m: int
    n: int
    k: int
    warps: int
    stages: int
    tma: bool
    precision: str  # of float32 operands; bfloat16 and float16 are exact in any

    def options(self) -> dict:
        return {"num_warps": self.warps, "num_stages": self.stages}


def tiles(element_size: int, architecture: int) -> Tiles:
    if element_size == 4:
        # 3 x TF32: high and low halves of both operands need registers beside the accumulators
        return Tiles(128, 64, 32, 8, 2, False, "tf32x3")
    if architecture // 10 in (9, 10):
        return Tiles(128, 256, 64, 8, 4, True, "ieee")
    # sm_80 has 255 registers a thread for accumulators, fragments and logits together, and sm_86, 89 and 120 have 99 KiB of shared memory:
    # 128 x 128 suits both. There Triton 3.7.1 makes one buffer (32 KiB) of two stages; three would be two (64 KiB). Not measured on such a GPU.
    return Tiles(128, 128, 64, 8, 3 if architecture == 80 else 2, False, "ieee")


def machine(tensor: Tensor) -> tuple[int, int]:
    """(architecture, multiprocessors); in the interpreter an sm_90 of three, so that programs take several tiles."""
    if not tensor.is_cuda:
        return 90, 3
    properties = torch.cuda.get_device_properties(tensor.device)
    return properties.major * 10 + properties.minor, properties.multi_processor_count


def operand(matrix: Tensor, rows: int, columns: int, tma: bool) -> Tensor | TensorDescriptor:
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [rows, columns]) if tma else matrix


def aligned_width(width: int) -> int:
    return triton.cdiv(width, 16) * 16


def aligned_weight(weight: Tensor) -> Tensor:
    """The weight itself where its rows lie as TMA and 16-byte loads want them: contiguous, whole 16 elements, 16-byte aligned. Otherwise
    (H = 1,001, a transposed view) a zero-padded copy, made once a call."""
    wide = aligned_width(weight.shape[1])
    if wide == weight.shape[1] and weight.stride(1) == 1 and weight.stride(0) % 16 == 0 and weight.stride(0) >= wide and weight.data_ptr() % 16 == 0:
        return weight
    copy = weight.new_zeros(weight.shape[0], wide)
    copy[:, : weight.shape[1]] = weight
    return copy


class Head(NamedTuple):
    """What turns hidden states into log-probs, as the kernels take it."""

    weight: Tensor
    ids: Tensor
    bias: Tensor | None
    inverse: float
    temperatures: Tensor | None
    softcap: float | None

    @classmethod
    def of(cls, weight, ids, bias, temperature, temperatures, softcap) -> Head:
        bias, temperatures = (None if t is None else t.contiguous() for t in (bias, temperatures))
        return cls(aligned_weight(weight), ids.contiguous(), bias, 1.0 if temperature is None else 1.0 / temperature, temperatures, softcap)


class Rows(NamedTuple):
    """The rows that count: index[i] is the row that compact row i < count holds, position[row] the other way round or -1; None for a
    part of them."""

    count: Tensor
    index: Tensor
    position: Tensor | None
    padded: int

    def gather(self, hidden: Tensor, scale: Tensor | None = None) -> Tensor:
        """hidden's compact rows [padded, aligned H], zero past the last row and column, times scale[padded] where given."""
        hidden = hidden if hidden.stride(1) == 1 else hidden.contiguous()
        out = hidden.new_empty(self.padded, aligned_width(hidden.shape[1]))
        vec = 16 // hidden.element_size()
        aligned = hidden.data_ptr() % 16 == 0 and hidden.stride(0) % vec == 0 and hidden.shape[1] % vec == 0
        _gather_kernel[(self.padded // GATHER_ROWS,)](
            hidden, self.index, self.count, scale, out, hidden.stride(0), hidden.shape[1], out.shape[1],
            ALIGNED=vec if aligned else 1, SCALED=scale is not None, ROWS=GATHER_ROWS, TILE_ROWS=ROW_BLOCK, BLOCK=GATHER_COLUMNS,
        )  # fmt: skip
        return out


def counted_rows(ids: Tensor, mask: Tensor | None, grad_logp: Tensor | None = None, grad_entropy: Tensor | None = None) -> Rows:
    rows = ids.shape[0]
    padded = max(triton.cdiv(rows, ROW_BLOCK), 1) * ROW_BLOCK
    count, index, position = (torch.empty(n, dtype=torch.int32, device=ids.device) for n in (1, padded, rows))
    _index_kernel[(1,)](
        ids, compact(mask), grad_logp, grad_entropy, index, position, count, rows, HAS_MASK=mask is not None, HAS_LOGP=grad_logp is not None,
        HAS_ENTROPY=grad_entropy is not None, IGNORED=IGNORED, BLOCK=SCAN, num_warps=8,
    )  # fmt: skip
    return Rows(count, index, position, padded)


@triton.jit(do_not_specialize=["rows"])
def _index_kernel(
    ids_ptr, mask_ptr, grad_logp_ptr, grad_entropy_ptr, index_ptr, position_ptr, count_ptr, rows,
    HAS_MASK: tl.constexpr, HAS_LOGP: tl.constexpr, HAS_ENTROPY: tl.constexpr, IGNORED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    count = 0
    for start in range(0, rows, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        inside = offs < rows
        active = inside & (tl.load(ids_ptr + offs, mask=inside, other=IGNORED) != IGNORED)
        if HAS_MASK:
            active = active & (tl.load(mask_ptr + offs, mask=inside, other=0) != 0)
        if HAS_LOGP or HAS_ENTROPY:
            some = offs < 0
            if HAS_LOGP:
                some = some | (tl.load(grad_logp_ptr + offs, mask=active, other=0.0) != 0.0)
            if HAS_ENTROPY:
                some = some | (tl.load(grad_entropy_ptr + offs, mask=active, other=0.0) != 0.0)
            active = active & some
        ones = active.to(tl.int32)
        at = count + tl.cumsum(ones, 0) - 1
        tl.store(index_ptr + at, offs, mask=active)
        tl.store(position_ptr + offs, tl.where(active, at, -1), mask=inside)
        count += tl.sum(ones, 0)
    tl.store(count_ptr, count)


@triton.jit(do_not_specialize=["stride", "H", "HS"])
def _gather_kernel(
    hidden_ptr, index_ptr, count_ptr, scale_ptr, out_ptr, stride, H, HS,
    ALIGNED: tl.constexpr, SCALED: tl.constexpr, ROWS: tl.constexpr, TILE_ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    count = tl.load(count_ptr)
    first = tl.program_id(0) * ROWS
    if first < tl.cdiv(count, TILE_ROWS) * TILE_ROWS:
        width, wide, step = H, HS // 16 * 16, stride  # the compiler learns that these are whole 16-byte words
        if ALIGNED > 1:
            width, step = width // ALIGNED * ALIGNED, step // ALIGNED * ALIGNED
        row = first + tl.arange(0, ROWS)
        valid = row < count
        source = tl.load(index_ptr + row, mask=valid, other=0).to(tl.int64) * step
        for start in range(0, wide, BLOCK):
            offs = start + tl.arange(0, BLOCK)
            x = tl.load(hidden_ptr + source[:, None] + offs[None, :], mask=valid[:, None] & (offs < width)[None, :], other=0.0)
            if SCALED:
                x = (x.to(tl.float32) * tl.load(scale_ptr + row, mask=valid, other=0.0)[:, None]).to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + row.to(tl.int64)[:, None] * wide + offs[None, :], x, mask=(offs < wide)[None, :])


@triton.jit
def _tile(ref, row, column, rows, columns, stride, TMA: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    """[R,C] of a matrix, zero past its last row and column. columns and stride are multiples of 16."""
    if TMA:
        tile = ref.load([row, column])
    else:
        r, c = row + tl.arange(0, R), column + tl.arange(0, C)
        at = ref + r.to(tl.int64)[:, None] * stride + c[None, :]
        tile = tl.load(at, mask=(r < rows)[:, None] & (c < columns)[None, :], other=0.0)
    return tile


@triton.jit
def _multiply(a, b, acc, PRECISION: tl.constexpr):
    if INTERPRETED:  # which takes bfloat16's bits for integers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _rounded(x, dtype: tl.constexpr):
    """float32 to nearest, ties to even."""
    if INTERPRETED and dtype == tl.bfloat16:  # which truncates
        bits = x.to(tl.int32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        x = tl.where(x == x, nearest.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def _place(item, row_tiles, column_tiles):
    """Row tile and column tile of a work item: GROUP row tiles against all columns, rows fastest."""
    group = item // (GROUP * column_tiles)
    within = item % (GROUP * column_tiles)
    rows = tl.minimum(row_tiles - group * GROUP, GROUP)
    return group * GROUP + within % rows, within // rows


@triton.jit
def _tanh(y):
    # (1 - t) / (1 + t) with t = exp(-2 |y|); below 0.25 the odd series, where 1 - t would cancel: the term left out is 4e-9 of the first.
    t = tl.exp2(tl.abs(y) * (-2.0 * LOG2E))
    q = y * y
    series = q * (-1.0 / 3 + q * (2.0 / 15 + q * (-17.0 / 315 + q * (62.0 / 2835 + q * (-1382.0 / 155925)))))
    far = (1.0 - t) / (1.0 + t)
    return tl.where(tl.abs(y) < 0.25, y + y * series, tl.where(y < 0, -far, far))


@triton.jit
def _finish_logits(acc, columns, bias_ptr, softcap, V, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr):
    """Bias and softcap; -inf past the vocabulary."""
    inside = columns < V
    if HAS_BIAS:
        acc = acc + tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    if HAS_SOFTCAP:
        acc = softcap * _tanh(acc / softcap)
    return tl.where(inside[None, :], acc, -INF)


@triton.jit
def _tile_statistics(x, k, limit):
    """Of each row of a tile of logits: maximum, r = sum of exp(x - maximum) without one maximum, w = sum of exp(x - maximum) (maximum - x).

    A term that equals the maximum is exactly 1, so that the sums with and without such terms differ by their number; NaN stays in r."""
    top = tl.maximum(tl.max(x, 1), LOWEST)
    u = tl.maximum(x - top[:, None], limit[:, None], propagate_nan=tl.PropagateNan.ALL)  # finite: 0 x -inf would be NaN
    e = tl.exp2(u * k[:, None])
    below = tl.sum(tl.where(u == 0.0, 0.0, e), 1)
    ties = tl.floor(tl.sum(e, 1) - below + 0.5)
    return top, below + tl.maximum(ties - 1.0, 0.0), -tl.sum(e * u, 1)


@triton.jit
def _meet(top_a, r_a, w_a, top_b, r_b, w_b, k, limit):
    """The statistics of two parts of a row as those of one: the smaller maximum becomes a term of r."""
    top = tl.maximum(top_a, top_b)
    base = tl.maximum(top, LOWEST)
    d_a, d_b = tl.maximum(top_a - base, limit), tl.maximum(top_b - base, limit)
    e_a, e_b = tl.exp2(d_a * k), tl.exp2(d_b * k)
    r = r_a * e_a + r_b * e_b + tl.where(top_a < top_b, e_a, e_b)
    w = e_a * (w_a - (r_a + 1.0) * d_a) + e_b * (w_b - (r_b + 1.0) * d_b)
    return top, r, w


@triton.jit
def _row_scale(source, valid, inverse_temperature, temperatures_ptr, HAS_TEMPERATURES: tl.constexpr):
    """1/T, log2(e)/T and the lowest x - maximum that is told apart, of the rows of a tile."""
    if HAS_TEMPERATURES:
        per_t = tl.div_rn(1.0, tl.load(temperatures_ptr + source, mask=valid, other=1.0).to(tl.float32))
    else:
        per_t = tl.where(valid, inverse_temperature, 1.0)
    k = per_t * LOG2E
    return per_t, k, -200.0 / k
