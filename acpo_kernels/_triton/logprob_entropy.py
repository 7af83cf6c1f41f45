"""CUDA kernels of `logprob_entropy`. The contract, the equations and the four results are in acpo_kernels/logprob_entropy.py.

Forward: one program a row, which reads N V s bytes once. Each LANE (one of BLOCK positions) keeps its own running maximum m, the
sum r of exp(x - m) over its elements but one that holds m, and w = sum of exp(x - m) (m - x). A step reads four elements a lane and
plays a knock-out of minimum and maximum among them and m: whoever loses is a term of the sum, the last winner is the new m. So the
maximum is left out of r exactly, ties and all, without a comparison. Lanes meet once, after the loop: no shuffle or barrier inside
it. Because most terms are taken against the maximum of their own lane, the arguments of exp2 are small, and the plain product with
log2(e) is exact enough; where lanes meet the product is compensated.

Machine instructions on sm_90, loads and loop control included: 380 for 32 logits of bf16 in the forward, 11.9 a logit, of which 1.25
are exp2. An H200 leaves 12.9 to a bf16 logit read at 4.8 TB/s, 16.9 at 85 % of a copy of 4.3 TB/s, and twice that to fp32. The
backward, which reads and writes, has twice that again: 800 for 32, 25 a logit, the scalars of the row included, against 25.8 and
33.8 in bf16. Not measured on a GPU.

A row that is not 16-byte aligned (V = 50,257 in bf16 begins anywhere) is read element by element, 32 neighbours a warp: 64 bytes an
instruction, of which a multiprocessor issues one a cycle, 112 GB/s at 1.755 GHz against its 36 GB/s of an H200's 4.8 TB/s. Wide
loads from the next 16-byte boundary on would give each lane other elements in each row: its sums, and so its bits, would depend on
where the row lies (contract 5), so they are left out on purpose.

Few rows: a row is one program, whatever N. With N below the number of multiprocessors a call takes as long as one row does (300 KB
at the some 10 GB/s that 8 KB in flight give). A split by V alone would cost every large call a second set of lanes meeting, some
60 instructions a lane against 10 a logit: 11 % at two parts of 151,936, where bf16 has no slot to spare.

Backward: one program for each CHUNK of a row: reads N V s bytes and writes as many. dlogits_j = exp(u_j) (a + b u_j), and the
chosen token's own entry by expm1. The gradient may take the place of the logits: each element is read once, by the thread that
then writes it.
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._layout import row_layout
from ..reference import IGNORED

# 128 threads x 16 bytes of bf16 = 1024 logits: each thread reads whole 16-byte words, and the 3 x 8 registers of lane state leave
# room for five programs a multiprocessor, 40 KB of reads in flight (Little's law asks for about 25 KB at 4.8 TB/s on an H200).
BLOCK = 1024
NUM_WARPS = 4
CHUNK = 4096  # of the backward, four blocks: the scalar work of a row is spread over 32 logits a thread

LOG2E = tl.constexpr(1.4426950408889634)
LOG2E_LOW = tl.constexpr(1.4426950408889634 - 1.44269502162933349609375)  # what float32 leaves of log2(e)
LN2 = tl.constexpr(0.6931471805599453)
LN2_HIGH = tl.constexpr(0.693115234375)  # 13 bits: its product with an integer of up to 11 bits is exact
LN2_LOW = tl.constexpr(0.693147180559945309 - 0.693115234375)
ROUNDING = tl.constexpr("rtne")
LOWEST = tl.constexpr(-3.4028234663852886e38)
INF = tl.constexpr(float("inf"))


@triton.jit
def _log1p(x):
    # Below 0.4 the series of 2 atanh(x / (2 + x)), s <= 1/6: the term left out is 3e-11 of the first.
    s = tl.div_rn(x, 2.0 + x)
    q = s * s
    series = 2.0 * s * (1.0 + q * (1.0 / 3 + q * (1.0 / 5 + q * (1.0 / 7 + q * (1.0 / 9 + q * (1.0 / 11))))))
    return tl.where(x < 0.4, series, tl.log(1.0 + x))


@triton.jit
def _expm1_series(x):
    # Taylor, for |x| < 0.4: the term left out is 3e-11 of the first.
    series = 1.0 + x * (1.0 / 8) * (1.0 + x * (1.0 / 9))
    series = 1.0 + x * (1.0 / 5) * (1.0 + x * (1.0 / 6) * (1.0 + x * (1.0 / 7) * series))
    return x * (1.0 + x * (1.0 / 2) * (1.0 + x * (1.0 / 3) * (1.0 + x * (1.0 / 4) * series)))


@triton.jit
def _exp_parts(d):
    """(f, a, b) with exp(d) = exp(f) a b for d <= 0, |f| < 0.35, a and b powers of two: a large sum times exp(-100) then meets
    the small number before it underflows. The integer part of d log2(e) is split off first: a product of 58 rounded to float32
    would cost exp 1e-6 of itself."""
    d = tl.maximum(d, -170.0)
    n = tl.floor(d * LOG2E + 0.5)
    f = (d - n * LN2_HIGH) - n * LN2_LOW
    half = tl.floor(0.5 * n)
    return f, tl.exp2(half), tl.exp2(n - half)


@triton.jit
def _probability(log_p):
    """exp(log_p), log_p <= 0. What the product with log2(e) loses (58 rounded to float32: 1e-6 of the result) is kept by a fused
    multiply and put back; the exponential of a far smaller number is 0."""
    product = log_p * LOG2E
    lost = tl.fma(log_p, LOG2E_LOW, tl.fma(log_p, LOG2E, -product))
    p = tl.exp2(product)
    return tl.fma(p * lost, LN2, p)


@triton.jit
def _row_offset(row, inner, stride_outer, stride_inner, ALIGNED: tl.constexpr):
    offset = (row // inner).to(tl.int64) * stride_outer + (row % inner).to(tl.int64) * stride_inner
    if ALIGNED > 1:
        offset = tl.multiple_of(offset, ALIGNED)
    return offset


@triton.jit
def _row_active(row, ids_ptr, mask_ptr, HAS_MASK: tl.constexpr, IGNORED: tl.constexpr):
    target = tl.load(ids_ptr + row).to(tl.int64)
    active = target != IGNORED
    if HAS_MASK:
        active = active & (tl.load(mask_ptr + row) != 0)
    return target, active


@triton.jit
def _per_temperature(row, inverse_temperature, temperatures_ptr, HAS_TEMPERATURES: tl.constexpr):
    if HAS_TEMPERATURES:
        inverse_temperature = tl.div_rn(1.0, tl.load(temperatures_ptr + row).to(tl.float32))
    return inverse_temperature


@triton.jit
def _pair(a, b):
    """Loser and winner; a NaN wins, and stays."""
    return tl.minimum(a, b), tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _term(x, m, r, w, k, limit):
    u = tl.maximum(x - m, limit)  # finite: 0 x -inf would be NaN
    e = tl.exp2(u * k)
    return r + e, w - e * u


@triton.jit
def _step(x0, x1, x2, x3, m, r, w, k, limit):
    l0, h0 = _pair(x0, x1)
    l1, h1 = _pair(x2, x3)
    l2, h2 = _pair(h0, h1)
    l3, top = _pair(h2, m)
    base = tl.maximum(top, LOWEST)  # a lane that is still empty
    d = tl.maximum(m - base, limit)
    e = tl.exp2(d * k)
    # What m was is in the knock-out; here only the terms that were taken against it move. r (m_new - m) is their share of w.
    w = e * (w - r * d)
    r = e * r
    r, w = _term(l0, base, r, w, k, limit)
    r, w = _term(l1, base, r, w, k, limit)
    r, w = _term(l2, base, r, w, k, limit)
    r, w = _term(l3, base, r, w, k, limit)
    return top, r, w


@triton.jit
def _sweep(x_ptr, size, k, limit, BLOCK: tl.constexpr):
    """One reading of a row: (m, r, w) of each lane."""
    lane = tl.arange(0, BLOCK)  # [BLOCK]
    m = tl.full([BLOCK], -INF, tl.float32)
    r = tl.zeros([BLOCK], tl.float32)
    w = tl.zeros([BLOCK], tl.float32)
    whole = size // (4 * BLOCK) * (4 * BLOCK)
    for start in range(0, whole, 4 * BLOCK):
        at = x_ptr + start + lane
        x0 = tl.load(at).to(tl.float32)
        x1 = tl.load(at + BLOCK).to(tl.float32)
        x2 = tl.load(at + 2 * BLOCK).to(tl.float32)
        x3 = tl.load(at + 3 * BLOCK).to(tl.float32)
        m, r, w = _step(x0, x1, x2, x3, m, r, w, k, limit)
    offs = whole + lane
    x0 = tl.load(x_ptr + offs, mask=offs < size, other=-INF).to(tl.float32)
    x1 = tl.load(x_ptr + offs + BLOCK, mask=offs + BLOCK < size, other=-INF).to(tl.float32)
    x2 = tl.load(x_ptr + offs + 2 * BLOCK, mask=offs + 2 * BLOCK < size, other=-INF).to(tl.float32)
    x3 = tl.load(x_ptr + offs + 3 * BLOCK, mask=offs + 3 * BLOCK < size, other=-INF).to(tl.float32)
    m, r, w = _step(x0, x1, x2, x3, m, r, w, k, limit)
    return m, r, w


@triton.jit
def _meet(m, r, w, per_t, limit, BLOCK: tl.constexpr):
    """Lanes meet: (not a distribution, the maximum, the sum without it, sum of exp(x - max) (max - x)). The top lane gives its r, every
    other lane also its own maximum, moved to the maximum of the row."""
    lane = tl.arange(0, BLOCK)
    bad = tl.max((m != m).to(tl.int32), axis=0) != 0
    top = tl.max(m, axis=0)
    first = tl.min(tl.where(m == top, lane, BLOCK), axis=0)
    base = tl.maximum(top, LOWEST)
    d = tl.maximum(m - base, limit)
    f, scale_a, scale_b = _exp_parts(d * per_t)
    e = 1.0 + _expm1_series(f)  # half a unit more exact than exp2, and here it is not per logit
    s = tl.where(lane == first, r, r + 1.0)
    rest = tl.sum(s * e * scale_a * scale_b, axis=0)
    weighted = tl.sum((w - s * d) * e * scale_a * scale_b, axis=0)
    return bad | (top == INF) | (top == -INF), top, base, rest, weighted


@triton.jit(do_not_specialize=["inner", "stride_outer", "stride_inner", "inverse_temperature"])
def _logprob_entropy_fwd_kernel(
    logits_ptr, ids_ptr, mask_ptr, temperatures_ptr, logp_ptr, entropy_ptr, maximum_ptr, logsumexp_ptr,
    V, inner, stride_outer, stride_inner, inverse_temperature,
    ALIGNED: tl.constexpr, HAS_MASK: tl.constexpr, HAS_TEMPERATURES: tl.constexpr, IGNORED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    target, active = _row_active(row, ids_ptr, mask_ptr, HAS_MASK, IGNORED)
    per_t = _per_temperature(row, inverse_temperature, temperatures_ptr, HAS_TEMPERATURES)
    k = per_t * LOG2E
    limit = -200.0 / k
    size = tl.where(active, V, 0)  # a row that does not count is not read
    if ALIGNED > 1:
        size = size // ALIGNED * ALIGNED  # the same number, and now the compiler knows that a mask is whole 16-byte words
    x_ptr = logits_ptr + _row_offset(row, inner, stride_outer, stride_inner, ALIGNED)

    m, r, w = _sweep(x_ptr, size, k, limit, BLOCK)
    bad, top, base, rest, weighted = _meet(m, r, w, per_t, limit, BLOCK)

    inside = (target >= 0) & (target < V)
    x_t = tl.load(x_ptr + target, mask=active & inside, other=0.0).to(tl.float32)
    bad = bad | (inside == 0)
    nan = float("nan")
    l = _log1p(rest)  # noqa: E741
    logp = tl.where(bad, nan, (x_t - base) * per_t - l)
    entropy = tl.where(bad, nan, l + tl.div_rn(weighted * per_t, 1.0 + rest))
    tl.store(logp_ptr + row, tl.where(active, logp, 0.0))
    tl.store(entropy_ptr + row, tl.where(active, entropy, 0.0))
    tl.store(maximum_ptr + row, tl.where(active, tl.where(bad, nan, top), 0.0))
    tl.store(logsumexp_ptr + row, tl.where(active, tl.where(bad, nan, l), 0.0))


@triton.jit(do_not_specialize=["inner", "stride_outer", "stride_inner", "inverse_temperature"])
def _logprob_entropy_bwd_kernel(
    grad_logp_ptr, grad_entropy_ptr, logits_ptr, ids_ptr, mask_ptr, temperatures_ptr, entropy_ptr, maximum_ptr, logsumexp_ptr, gradient_ptr,
    V, inner, stride_outer, stride_inner, inverse_temperature,
    ALIGNED: tl.constexpr, HAS_LOGP: tl.constexpr, HAS_ENTROPY: tl.constexpr, HAS_MASK: tl.constexpr, HAS_TEMPERATURES: tl.constexpr,
    INPLACE: tl.constexpr, IGNORED: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    target, active = _row_active(row, ids_ptr, mask_ptr, HAS_MASK, IGNORED)
    per_t = _per_temperature(row, inverse_temperature, temperatures_ptr, HAS_TEMPERATURES)
    g_logp = tl.load(grad_logp_ptr + row) if HAS_LOGP else 0.0
    g_entropy = tl.load(grad_entropy_ptr + row) if HAS_ENTROPY else 0.0
    active = active & ((g_logp != 0.0) | (g_entropy != 0.0))
    entropy = tl.load(entropy_ptr + row)
    l = tl.load(logsumexp_ptr + row)  # noqa: E741
    bad = l != l
    top = tl.where(bad, 0.0, tl.load(maximum_ptr + row))

    size = V
    if ALIGNED > 1:
        size = size // ALIGNED * ALIGNED
    readable = tl.where(active, size, 0)
    if ALIGNED > 1:
        readable = readable // ALIGNED * ALIGNED
    x_ptr = logits_ptr + _row_offset(row, inner, stride_outer, stride_inner, ALIGNED)
    out = row.to(tl.int64) * V
    if ALIGNED > 1:
        out = tl.multiple_of(out, ALIGNED)
    out_ptr = x_ptr if INPLACE else gradient_ptr + out

    p_top = tl.exp(-l)
    a = per_t * p_top * (g_entropy * (l - entropy) - g_logp)
    b = -per_t * per_t * p_top * g_entropy
    a = tl.where(active, tl.where(bad, float("nan"), a), 0.0)
    b = tl.where(active, b, 0.0)
    limit = -200.0 / (per_t * LOG2E)
    # The chosen token: g_logp (1 - p) + g_entropy p (l - d - entropy). Only the program of its chunk reads it.
    begin = tl.program_id(1) * CHUNK
    mine = active & (target >= begin) & (target < begin + CHUNK) & (target < V)
    x_t = tl.load(x_ptr + target, mask=mine, other=-INF).to(tl.float32)
    if INPLACE:
        tl.debug_barrier()  # every warp has read x_t before one of them overwrites it; all else a thread reads it overwrites itself
    log_p = tl.maximum(x_t - top, limit) * per_t - l
    own = per_t * (g_entropy * tl.exp(log_p) * (-log_p - entropy) - g_logp * tl.where(log_p > -0.4, _expm1_series(log_p), tl.exp(log_p) - 1.0))
    own = tl.where(active, tl.where(bad, float("nan"), own), 0.0)
    for start in tl.static_range(0, CHUNK, BLOCK):
        offs = begin + start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + offs, mask=offs < readable, other=-INF).to(tl.float32)
        u = tl.maximum(x - top, limit)
        g = _probability(u * per_t) * (a + b * u)
        g = tl.where(offs == target, own, g)
        tl.store(out_ptr + offs, g.to(gradient_ptr.dtype.element_ty, fp_downcast_rounding=ROUNDING), mask=offs < size)


def aligned_elements(logits: Tensor, stride_outer: int, stride_inner: int) -> int:
    """How many elements 16 bytes hold, where every row begins at a multiple of 16 bytes and holds whole ones; else 1."""
    vec = 16 // logits.element_size()
    whole = logits.data_ptr() % 16 == 0 and all(n % vec == 0 for n in (logits.shape[-1], stride_outer, stride_inner))
    return vec if whole else 1


def _device(tensor: Tensor):
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def _bytes(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.contiguous().view(torch.uint8)


def forward(logits: Tensor, ids: Tensor, temperature: float, temperatures: Tensor | None, mask: Tensor | None, results: tuple[Tensor, ...]) -> None:
    logits, inner, stride_outer, stride_inner = row_layout(logits)
    if ids.numel() == 0:
        return
    with _device(logits):
        _logprob_entropy_fwd_kernel[(ids.numel(),)](
            logits, ids.contiguous(), _bytes(mask), None if temperatures is None else temperatures.contiguous(), *results,
            logits.shape[-1], inner, stride_outer, stride_inner, 1.0 / temperature,
            ALIGNED=aligned_elements(logits, stride_outer, stride_inner), HAS_MASK=mask is not None,
            HAS_TEMPERATURES=temperatures is not None, IGNORED=IGNORED, BLOCK=BLOCK, num_warps=NUM_WARPS,
        )  # fmt: skip


def backward(
    grad_logp: Tensor | None,
    grad_entropy: Tensor | None,
    logits: Tensor,
    ids: Tensor,
    statistics: tuple[Tensor, Tensor, Tensor],
    temperature: float,
    temperatures: Tensor | None,
    mask: Tensor | None,
    gradient: Tensor,
) -> None:
    """gradient is contiguous, or the logits themselves (the same address and strides): then it takes their place."""
    inplace = gradient.data_ptr() == logits.data_ptr()
    if inplace and (gradient.stride() != logits.stride() or row_layout(logits)[0] is not logits):
        raise ValueError("gradient must have the strides of logits that can be read in place, where it takes their place")
    logits, inner, stride_outer, stride_inner = row_layout(logits)
    if ids.numel() == 0:
        return
    incoming = [None if g is None else g.contiguous() for g in (grad_logp, grad_entropy)]
    with _device(logits):
        _logprob_entropy_bwd_kernel[(ids.numel(), triton.cdiv(logits.shape[-1], CHUNK))](
            *incoming, logits, ids.contiguous(), _bytes(mask), None if temperatures is None else temperatures.contiguous(),
            *(s.contiguous() for s in statistics), gradient,
            logits.shape[-1], inner, stride_outer, stride_inner, 1.0 / temperature,
            ALIGNED=aligned_elements(logits, stride_outer, stride_inner), HAS_LOGP=grad_logp is not None,
            HAS_ENTROPY=grad_entropy is not None, HAS_MASK=mask is not None, HAS_TEMPERATURES=temperatures is not None,
            INPLACE=inplace, IGNORED=IGNORED, BLOCK=BLOCK, CHUNK=CHUNK, num_warps=NUM_WARPS,
        )  # fmt: skip
