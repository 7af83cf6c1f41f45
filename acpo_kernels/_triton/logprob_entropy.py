"""CUDA kernels of `logprob_entropy`. The contract, the equations and the four results are in acpo_kernels/logprob_entropy.py.

Forward: one program a row, which reads N V s bytes once (logits_rows.py tells how).

Machine instructions on sm_90, loads and loop control included: 366 for 32 logits of bf16 in the forward, 11.4 a logit, and 322 of fp32,
10.1 a logit, of which 1.06 are exp2. An H200 leaves 12.9 to a bf16 logit read at 4.8 TB/s, 16.9 at 85 % of a copy of 4.3 TB/s, and
twice that to fp32. The backward, which reads and writes, has twice that again: 808 for 32, 25.3 a logit, the scalars of the row
included, against 25.8 and 33.8 in bf16. On an H100 (3.35 TB/s by datasheet), 8,192 rows of 151,936: the forward reads 3.06 TB/s in bf16 and 3.10
in fp32, the backward moves 2.81 and 2.84.

A row that is not 16-byte aligned (V = 50,257 in bf16 begins anywhere) is read element by element, by the threads that would have read
the words, so that its bits do not depend on where it lies (contract 5). A warp's instruction then takes 64 bytes out of 512, four
lines of L1, of which eight instructions in a row use the same: 16 bytes a cycle and multiprocessor, 3.7 TB/s of an H200 at 1.755 GHz.

Few rows: a row is one program, whatever N. With N below the number of multiprocessors a call takes as long as one row does: 300 KB
at the some 7 GB/s that 8 KB in flight give, 42 us on an H100 (64 with 4 KB).

Backward: one program for each CHUNK of a row: reads N V s bytes and writes as many. dlogits_j = exp(u_j) (a + b u_j), and the
chosen token's own entry by expm1. The gradient may take the place of the logits: each element is read once, by the thread that
then writes it.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .._layout import row_layout
from ..reference import IGNORED
from .logits_rows import (
    INF,
    LOG2E,
    NUM_WARPS,
    _expm1_series,
    _log1p,
    _meet,
    _probability,
    _row_active,
    _row_offset,
    _row_scale,
    _row_size,
    _sweep,
    aligned_elements,
)
from .ragged import compact, device

BLOCK = 1024  # of the backward: 16 bytes of bf16 for each of 128 threads
CHUNK = 4096  # four blocks a program: the scalar work of a row is spread over 32 logits a thread
ROUNDING = tl.constexpr("rtne")
CERTAIN = tl.constexpr(2.0**-60)  # what all others of a row have beside its maximum, below which their probabilities may underflow


@triton.jit(do_not_specialize=["inner", "stride_outer", "stride_inner", "inverse_temperature"])
def _logprob_entropy_fwd_kernel(
    logits_ptr, ids_ptr, mask_ptr, temperatures_ptr, logp_ptr, entropy_ptr, maximum_ptr, logsumexp_ptr,
    V, inner, stride_outer, stride_inner, inverse_temperature,
    ALIGNED: tl.constexpr, HAS_MASK: tl.constexpr, HAS_TEMPERATURES: tl.constexpr, IGNORED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    target, active = _row_active(row, ids_ptr, mask_ptr, HAS_MASK, IGNORED)
    per_t, k, lowest = _row_scale(row, inverse_temperature, temperatures_ptr, HAS_TEMPERATURES)
    x_ptr = logits_ptr + _row_offset(row, inner, stride_outer, stride_inner, ALIGNED)
    size = _row_size(V, active, ALIGNED)
    m, r, w = _sweep(x_ptr, size, k, lowest, ALIGNED)
    bad, top, rest, weighted = _meet(x_ptr, size, m, r, w, per_t, lowest, ALIGNED)

    inside = (target >= 0) & (target < V)
    x_t = tl.load(x_ptr + target, mask=active & inside, other=0.0).to(tl.float32)
    bad = bad | (inside == 0)
    nan = float("nan")
    l = _log1p(rest)  # noqa: E741
    logp = tl.where(bad, nan, (x_t - top) * per_t - l)
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
    per_t, _, _ = _row_scale(row, inverse_temperature, temperatures_ptr, HAS_TEMPERATURES)
    g_logp = tl.load(grad_logp_ptr + row) if HAS_LOGP else 0.0
    g_entropy = tl.load(grad_entropy_ptr + row) if HAS_ENTROPY else 0.0
    active = active & ((g_logp != 0.0) | (g_entropy != 0.0))
    per_t = tl.where(active, per_t, 1.0)  # a row that takes no part may have no temperature
    entropy = tl.load(entropy_ptr + row)
    l = tl.load(logsumexp_ptr + row)  # noqa: E741
    bad = l != l
    top = tl.where(bad, 0.0, tl.load(maximum_ptr + row))

    size = V
    if ALIGNED > 1:
        size = size // ALIGNED * ALIGNED
    readable = _row_size(V, active, ALIGNED)
    x_ptr = logits_ptr + _row_offset(row, inner, stride_outer, stride_inner, ALIGNED)
    out = row.to(tl.int64) * V
    if ALIGNED > 1:
        out = tl.multiple_of(out, ALIGNED)
    out_ptr = x_ptr if INPLACE else gradient_ptr + out

    p_top = tl.exp(-l)
    a = per_t * p_top * (g_entropy * (l - entropy) - g_logp)
    b = -per_t * p_top * g_entropy  # of d = (x - top) / T: 1/T^2 overflows below 1e-19
    a = tl.where(active, tl.where(bad, float("nan"), a), 0.0)
    b = tl.where(active, b, 0.0)
    # A confident row's other entries lie below 2^-60, some where exp2 gives 0 while a + b d, of the size of d, would bring them back: they are taken
    # in units of 2^-24, unless a and b are too small for that.
    shift = tl.where((l < CERTAIN) & (tl.abs(a) + tl.abs(b) > CERTAIN), 24.0, 0.0)
    a, b = a * tl.exp2(-shift), b * tl.exp2(-shift)
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
        d = tl.maximum(x - top, limit) * per_t
        g = _probability(d, shift) * (a + b * d)
        g = tl.where(offs == target, own, g)
        tl.store(out_ptr + offs, g.to(gradient_ptr.dtype.element_ty, fp_downcast_rounding=ROUNDING), mask=offs < size)


def forward(logits: Tensor, ids: Tensor, temperature: float, temperatures: Tensor | None, mask: Tensor | None, results: tuple[Tensor, ...]) -> None:
    logits, inner, stride_outer, stride_inner = row_layout(logits)
    if ids.numel() == 0:
        return
    with device(logits):
        _logprob_entropy_fwd_kernel[(ids.numel(),)](
            logits, ids.contiguous(), compact(mask), compact(temperatures), *results,
            logits.shape[-1], inner, stride_outer, stride_inner, 1.0 / temperature,
            ALIGNED=aligned_elements(logits, stride_outer, stride_inner), HAS_MASK=mask is not None,
            HAS_TEMPERATURES=temperatures is not None, IGNORED=IGNORED, num_warps=NUM_WARPS,
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
    if ids.numel() == 0:  # and every address is 0
        return
    inplace = gradient.data_ptr() == logits.data_ptr()
    if inplace and (gradient.stride() != logits.stride() or row_layout(logits)[0] is not logits):
        raise ValueError("gradient must have the strides of logits that can be read in place, where it takes their place")
    logits, inner, stride_outer, stride_inner = row_layout(logits)
    incoming = [None if g is None else g.contiguous() for g in (grad_logp, grad_entropy)]
    with device(logits):
        _logprob_entropy_bwd_kernel[(ids.numel(), triton.cdiv(logits.shape[-1], CHUNK))](
            *incoming, logits, ids.contiguous(), compact(mask), compact(temperatures),
            *(s.contiguous() for s in statistics), gradient,
            logits.shape[-1], inner, stride_outer, stride_inner, 1.0 / temperature,
            ALIGNED=aligned_elements(logits, stride_outer, stride_inner), HAS_LOGP=grad_logp is not None,
            HAS_ENTROPY=grad_entropy is not None, HAS_MASK=mask is not None, HAS_TEMPERATURES=temperatures is not None,
            INPLACE=inplace, IGNORED=IGNORED, BLOCK=BLOCK, CHUNK=CHUNK, num_warps=NUM_WARPS,
        )  # fmt: skip
