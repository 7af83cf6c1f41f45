"""CUDA kernel of `hindsight_information`. The contract is in acpo_kernels/hindsight_information.py. One launch, one program a row.

The first reading of each stream is that of `logprob_entropy`, to the bit. The second sums the divergences against the final
normalisers, p_j (exp(t_j) - 1 - t_j) with t_j = log q_j - log p_j and the same with the streams exchanged: no term is negative and
nothing cancels between columns, so that nearly equal streams keep their divergence and equal ones give exactly 0; an error in a
normaliser enters in second order only. t_j takes the difference of the centred logits first, exact where they are near (Sterbenz),
and below 0.5 its exponential remainder goes through the series, even and odd part shared by the two directions.

Bytes: 2 N V s once from HBM, and 2 N V s again from HBM or L2: the second reading runs backwards, so that what was read last, and
may still be in the L2, is read first. (A row pair of 151,936 bf16 logits is 608 KB; 50 MB hold 82 of them.) Machine instructions on
sm_90 for a pair of logits: 22 in the first reading and 52 in the second. An H200 at 4.8 TB/s leaves 26 to a bf16 pair and 52 to an
fp32 pair, so bf16 is bound by instructions, at some 35 % of the bandwidth it would need to be read once, and fp32 by its two
readings. An online form that reads once must move both maxima and four sums for each lane, about 75 instructions a pair as well:
it would gain in fp32 alone. None of this is measured on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .. import _torch
from .._layout import row_layout
from ..reference import IGNORED
from .logprob_entropy import (
    BLOCK,
    INF,
    LOG2E,
    NUM_WARPS,
    _log1p,
    _meet,
    _per_temperature,
    _probability,
    _row_active,
    _row_offset,
    _sweep,
    aligned_elements,
)
from .ragged import compact, device


@triton.jit
def _terms(x, y, top_x, top_y, l_x, l_y, per_t, lowest):
    """(p (exp(t) - 1 - t), q (exp(-t) - 1 + t)), infinite where one stream alone is."""
    u = tl.maximum(x - top_x, lowest)  # finite: 0 x -inf would be NaN
    v = tl.maximum(y - top_y, lowest)
    t = (v - u) * per_t - (l_y - l_x)
    p = _probability(tl.maximum(u * per_t - l_x, -120.0))
    q = _probability(tl.maximum(v * per_t - l_y, -120.0))
    t2 = t * t
    even = t2 * (0.5 + t2 * (1.0 / 24 + t2 * (1.0 / 720 + t2 * (1.0 / 40320))))  # cosh(t) - 1
    odd = t2 * t * (1.0 / 6 + t2 * (1.0 / 120 + t2 * (1.0 / 5040)))  # sinh(t) - t
    near = tl.abs(t) < 0.5
    gap = q - p
    of_p = tl.where(near, p * (even + odd), gap - p * t)
    of_q = tl.where(near, q * (even - odd), q * t - gap)
    dead_x = x == -INF
    dead_y = y == -INF
    of_p = tl.where(dead_y & (dead_x == 0), INF, of_p)  # possible, even where p underflows
    of_q = tl.where(dead_x & (dead_y == 0), INF, of_q)
    return of_p, of_q


@triton.jit(do_not_specialize=["inner_x", "outer_stride_x", "stride_x", "inner_y", "outer_stride_y", "stride_y", "inverse_temperature"])
def _hindsight_information_kernel(
    logits_ptr, hindsight_ptr, ids_ptr, mask_ptr, temperatures_ptr, logp_ptr, hindsight_logp_ptr, entropy_ptr, log_ratio_ptr, kl_ptr,
    information_ptr, V, inner_x, outer_stride_x, stride_x, inner_y, outer_stride_y, stride_y, inverse_temperature,
    ALIGNED: tl.constexpr, HAS_MASK: tl.constexpr, HAS_TEMPERATURES: tl.constexpr, IGNORED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    target, active = _row_active(row, ids_ptr, mask_ptr, HAS_MASK, IGNORED)
    per_t = _per_temperature(row, inverse_temperature, temperatures_ptr, HAS_TEMPERATURES)
    k = per_t * LOG2E
    limit = -200.0 / k
    size = tl.where(active, V, 0)
    if ALIGNED > 1:
        size = size // ALIGNED * ALIGNED
    x_ptr = logits_ptr + _row_offset(row, inner_x, outer_stride_x, stride_x, ALIGNED)
    y_ptr = hindsight_ptr + _row_offset(row, inner_y, outer_stride_y, stride_y, ALIGNED)

    m, r, w = _sweep(x_ptr, size, k, limit, BLOCK)
    bad_x, _, top_x, rest, weighted = _meet(m, r, w, per_t, limit, BLOCK)
    l_x = _log1p(rest)
    entropy = l_x + tl.div_rn(weighted * per_t, 1.0 + rest)
    m, r, w = _sweep(y_ptr, size, k, limit, BLOCK)
    bad_y, _, top_y, rest, weighted = _meet(m, r, w, per_t, limit, BLOCK)
    l_y = _log1p(rest)

    lowest = -8e37 / tl.maximum(per_t, 1.0)  # times 1/T and subtracted still finite: a wider gap counts as this one
    kl = tl.zeros([BLOCK], tl.float32)
    information = tl.zeros([BLOCK], tl.float32)
    steps = tl.cdiv(size, BLOCK)
    for step in range(0, steps):
        offs = (steps - 1 - step) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + offs, mask=offs < size, other=-INF).to(tl.float32)
        y = tl.load(y_ptr + offs, mask=offs < size, other=-INF).to(tl.float32)
        of_p, of_q = _terms(x, y, top_x, top_y, l_x, l_y, per_t, lowest)
        kl += of_p
        information += of_q

    inside = (target >= 0) & (target < V)
    x_t = tl.load(x_ptr + target, mask=active & inside, other=0.0).to(tl.float32)
    y_t = tl.load(y_ptr + target, mask=active & inside, other=0.0).to(tl.float32)
    nan = float("nan")
    bad_x = bad_x | (inside == 0)
    bad_y = bad_y | (inside == 0)
    logp = tl.where(bad_x, nan, (x_t - top_x) * per_t - l_x)
    hindsight_logp = tl.where(bad_y, nan, (y_t - top_y) * per_t - l_y)
    tl.store(logp_ptr + row, tl.where(active, logp, 0.0))
    tl.store(hindsight_logp_ptr + row, tl.where(active, hindsight_logp, 0.0))
    tl.store(entropy_ptr + row, tl.where(active, tl.where(bad_x, nan, entropy), 0.0))
    tl.store(log_ratio_ptr + row, tl.where(active, hindsight_logp - logp, 0.0))
    tl.store(kl_ptr + row, tl.where(active, tl.where(bad_x | bad_y, nan, tl.sum(kl, axis=0)), 0.0))
    tl.store(information_ptr + row, tl.where(active, tl.where(bad_x | bad_y, nan, tl.sum(information, axis=0)), 0.0))


def hindsight_information(logits, hindsight_logits, ids, temperature, temperatures, mask):
    if logits.dtype == torch.float64:
        return _torch.hindsight_information(logits, hindsight_logits, ids, temperature, temperatures, mask)
    results = tuple(torch.empty(ids.shape, dtype=torch.float32, device=ids.device) for _ in range(6))
    if ids.numel() == 0:
        return results
    logits, *layout = row_layout(logits)
    hindsight_logits, *hindsight_layout = row_layout(hindsight_logits)
    aligned = min(aligned_elements(logits, *layout[1:]), aligned_elements(hindsight_logits, *hindsight_layout[1:]))
    with device(logits):
        _hindsight_information_kernel[(ids.numel(),)](
            logits, hindsight_logits, ids.contiguous(), compact(mask), compact(temperatures), *results, logits.shape[-1], *layout, *hindsight_layout,
            1.0 if temperature is None else 1.0 / temperature, ALIGNED=aligned, HAS_MASK=mask is not None,
            HAS_TEMPERATURES=temperatures is not None, IGNORED=IGNORED, BLOCK=BLOCK, num_warps=NUM_WARPS,
        )  # fmt: skip
    return results
