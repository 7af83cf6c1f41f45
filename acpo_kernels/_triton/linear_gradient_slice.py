"""The gradient G of one slice of the logits, as linear_gradients.py multiplies it: G_j = exp(u_j / T) (first + second u_j), u_j the logit less the
maximum of its row; the chosen token's own entry by expm1.

Precision of G. Tensor cores multiply bfloat16 by bfloat16. G rounded to it (all peers do) errs by up to 2^-9 of its largest entries, the
chosen token's above all: as much as the rounding of the result itself, which the contract allows once. G's residue G - bfloat16(G) as a second
operand everywhere would cost 4 N V H more. But only entries near the row's largest have a residue that counts: it is kept for those above
KEEP = 2^-8 of the row's scale |g_logp| + |g_entropy| over T (at most a few hundred, for a language model a handful), whose 64 x 64 blocks
are flagged, and the products run once more over flagged blocks alone. Residues left out are below 2^-17 of the scale each. With
one kept entry a row about 5 % of the blocks are flagged, evenly spread. A block without a kept entry would add exact zeros, so which
blocks run changes no bit of any row. float16 has five bits of exponent: there G is scaled by a power of two for each row, and taken back.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .linear_tiles import INF, LN2, _finish_logits, _multiply, _place, _rounded, _row_scale, _tile
from .logits_rows import _expm1_series

FLAG = tl.constexpr(64)  # rows and columns of a flagged block: the products' own step
KEEP = tl.constexpr(2.0**-8)
PART = 128  # columns whose gradient is computed at a time: the arithmetic on 256 would not fit the registers beside the accumulators
HEADROOM = tl.constexpr(10.0)  # of float16's 15 binades above 1: an entry of the gradient is below 12 times the row's scale


@triton.jit
def _upstream(source, valid, grad_logp_ptr, grad_entropy_ptr, HAS_LOGP: tl.constexpr, HAS_ENTROPY: tl.constexpr):
    zero = tl.where(valid, 0.0, 0.0)
    g_logp = tl.load(grad_logp_ptr + source, mask=valid, other=0.0) if HAS_LOGP else zero
    g_entropy = tl.load(grad_entropy_ptr + source, mask=valid, other=0.0) if HAS_ENTROPY else zero
    return g_logp, g_entropy


@triton.jit(do_not_specialize=["inverse_temperature"])
def _scales_kernel(
    grad_logp_ptr, grad_entropy_ptr, entropy_ptr, temperatures_ptr, index_ptr, count_ptr, scales_ptr, shares_ptr, least_ptr, inverse_temperature,
    HAS_LOGP: tl.constexpr, HAS_ENTROPY: tl.constexpr, HAS_TEMPERATURES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """scales[i]: the power of two that brings row i's gradient into float16's middle; shares[i] = min(scales) / scales[i] <= 1, for the other
    operand of the weight's gradient; least = min(scales)."""
    count = tl.load(count_ptr)
    least = INF
    for start in range(0, count, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        valid = offs < count
        source = tl.load(index_ptr + offs, mask=valid, other=0)
        per_t, _, _ = _row_scale(source, valid, inverse_temperature, temperatures_ptr, HAS_TEMPERATURES)
        g_logp, g_entropy = _upstream(source, valid, grad_logp_ptr, grad_entropy_ptr, HAS_LOGP, HAS_ENTROPY)
        # A slice of the vocabulary without the row's target has the log-prob's gradient in a far entropy (_vocabulary_parallel.py).
        far = tl.maximum(tl.abs(tl.load(entropy_ptr + source, mask=valid, other=0.0)) * 0.0625, 1.0)
        size = per_t * (tl.abs(g_logp) + tl.abs(g_entropy) * far)
        scale = tl.exp2(-tl.ceil(tl.log2(tl.minimum(tl.maximum(size, 1e-30), 1e30))) + HEADROOM)
        tl.store(scales_ptr + offs, scale, mask=valid)
        least = tl.minimum(least, tl.min(tl.where(valid, scale, INF), 0))
    tl.store(least_ptr, least)
    tl.debug_barrier()
    for start in range(0, count, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        valid = offs < count
        tl.store(shares_ptr + offs, least / tl.load(scales_ptr + offs, mask=valid, other=1.0), mask=valid)


@triton.jit
def _gradient_of(
    x, rows, valid, source, m, row_tile, local, column,
    bias_ptr, ids_ptr, temperatures_ptr, entropy_ptr, maximum_ptr, logsumexp_ptr, grad_logp_ptr, grad_entropy_ptr, scales_ptr,
    gradient_ptr, residue_ptr, flags_ptr, column_sums_ptr, V, inverse_temperature, softcap, HAS_BIAS: tl.constexpr, HAS_TEMPERATURES: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_LOGP: tl.constexpr, HAS_ENTROPY: tl.constexpr, NEEDS_BIAS: tl.constexpr, HELD: tl.constexpr,
    RESIDUE: tl.constexpr, SCALED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The gradient of a tile's logits; of products (not HELD), before bias and softcap."""
    v = column + local
    columns = v + tl.arange(0, BLOCK_V)
    if not HELD:
        x = _finish_logits(x, columns, bias_ptr, softcap, V, HAS_BIAS, HAS_SOFTCAP)
    per_t, k, limit = _row_scale(source, valid, inverse_temperature, temperatures_ptr, HAS_TEMPERATURES)
    g_logp, g_entropy = _upstream(source, valid, grad_logp_ptr, grad_entropy_ptr, HAS_LOGP, HAS_ENTROPY)
    entropy = tl.load(entropy_ptr + source, mask=valid, other=0.0)
    l = tl.load(logsumexp_ptr + source, mask=valid, other=0.0)  # noqa: E741
    bad = l != l
    # A row that is not there: every logit lies infinitely far below its maximum, and its factors are 0.
    top = tl.where(valid, tl.where(bad, 0.0, tl.load(maximum_ptr + source, mask=valid, other=0.0)), INF)

    # exp(u / T) (first + second u); below, the chosen token's own entry by expm1
    p_top = tl.exp(-l)
    first = per_t * p_top * (g_entropy * (l - entropy) - g_logp)
    second = -per_t * p_top * g_entropy * LN2  # of u / T in units of log 2: 1/T^2 overflows below 1e-19
    first = tl.where(valid, tl.where(bad, float("nan"), first), 0.0)

    u = tl.maximum(x - top[:, None], limit[:, None], propagate_nan=tl.PropagateNan.ALL)
    z = u * k[:, None]
    g = tl.exp2(z) * (first[:, None] + second[:, None] * z)
    target = tl.load(ids_ptr + source, mask=valid, other=-1)
    if tl.max(((target >= v) & (target < v + BLOCK_V)).to(tl.int32), 0) > 0:
        chosen = columns[None, :] == target[:, None]
        log_p = tl.sum(tl.where(chosen, u, 0.0), 1) * per_t - l
        p = tl.exp(log_p)
        own = per_t * (g_entropy * p * (-log_p - entropy) - g_logp * tl.where(log_p > -0.4, _expm1_series(log_p), p - 1.0))
        own = tl.where(bad, float("nan"), own)
        g = tl.where(chosen & valid[:, None], own[:, None], g)
    if HAS_SOFTCAP:
        t = x / softcap
        # Held logits are -inf in a row that is not there: its gradient of 0 times their slope is none.
        g = tl.where(valid[:, None] & (columns < V)[None, :], g * (1.0 - t) * (1.0 + t), 0.0)
    if NEEDS_BIAS:
        tl.store(column_sums_ptr + row_tile.to(tl.int64) * WIDTH + local + tl.arange(0, BLOCK_V), tl.sum(g, 0))
    scale = per_t
    if SCALED:
        scale = tl.load(scales_ptr + rows, mask=valid, other=0.0)
        g = g * scale[:, None]
        scale = scale * per_t
    high = _rounded(g, gradient_ptr.dtype.element_ty)
    out = rows.to(tl.int64)[:, None] * WIDTH + (local + tl.arange(0, BLOCK_V))[None, :]
    tl.store(gradient_ptr + out, high)
    if RESIDUE:
        far = tl.where(tl.abs(entropy) > 16.0, tl.abs(entropy), 1.0)  # no entropy of a row's own, but as in _scales_kernel
        enough = KEEP * scale * (tl.abs(g_logp) + tl.abs(g_entropy) * far)
        flags = (m // FLAG + tl.arange(0, BLOCK_M // FLAG))[:, None] * (WIDTH // FLAG) + (local // FLAG + tl.arange(0, BLOCK_V // FLAG))[None, :]
        some = tl.max((tl.max(tl.abs(g), 1) > enough).to(tl.int32), 0) > 0
        if some or BLOCK_V < 2 * FLAG:  # the weight's product takes blocks in pairs: a half tile is always written
            kept = tl.abs(g) > enough[:, None]
            low = _rounded(tl.where(kept, g - high.to(tl.float32), 0.0), gradient_ptr.dtype.element_ty)
            tl.store(residue_ptr + out, low)
            blocks = tl.reshape(kept.to(tl.int32), [BLOCK_M // FLAG, FLAG, BLOCK_V // FLAG, FLAG])
            tl.store(flags_ptr + flags, tl.max(tl.max(blocks, 3), 1))
        else:
            tl.store(flags_ptr + flags, tl.zeros([BLOCK_M // FLAG, BLOCK_V // FLAG], tl.int32))


@triton.jit(do_not_specialize=["padded", "column", "inverse_temperature", "softcap"])
def _linear_gradient_kernel(
    hidden_ref, weight_ref, bias_ptr, ids_ptr, temperatures_ptr, index_ptr, count_ptr, entropy_ptr, maximum_ptr, logsumexp_ptr,
    grad_logp_ptr, grad_entropy_ptr, scales_ptr, held_ptr, places_ptr, gradient_ptr, residue_ptr, flags_ptr, column_sums_ptr,
    V, H, stride_weight, stride_held, padded, column, inverse_temperature, softcap,
    HAS_BIAS: tl.constexpr, HAS_TEMPERATURES: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_LOGP: tl.constexpr, HAS_ENTROPY: tl.constexpr,
    NEEDS_BIAS: tl.constexpr, HELD: tl.constexpr, RESIDUE: tl.constexpr, SCALED: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr, PART: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One slice of the gradient with respect to the logits before softcap: columns [column, column + WIDTH). HELD: row i's logits are row
    places[i] of held; else they are computed again. The gradient is taken of PART columns at a time."""
    column = column // 16 * 16  # the compiler learns that the held logits are whole 16-byte words
    count = tl.load(count_ptr)
    row_tiles, column_tiles = tl.cdiv(count, BLOCK_M), tl.cdiv(tl.minimum(V - column, WIDTH), BLOCK_V)
    program, programs = tl.program_id(0), tl.num_programs(0)
    for step in range(0, tl.cdiv(row_tiles * column_tiles - program, programs)):
        item = program + step * programs
        row_tile, column_tile = _place(item, row_tiles, column_tiles)
        m, local = row_tile * BLOCK_M, column_tile * BLOCK_V
        v, rows = column + local, m + tl.arange(0, BLOCK_M)
        valid = rows < count
        if HELD:
            columns = v + tl.arange(0, BLOCK_V)
            place = tl.load(places_ptr + rows, mask=valid, other=0)
            at = held_ptr + place.to(tl.int64)[:, None] * stride_held + columns[None, :]
            x = tl.load(at, mask=valid[:, None] & (columns < stride_held)[None, :], other=-INF)
        else:
            x = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
            for h in range(0, H, BLOCK_H):
                a = _tile(hidden_ref, m, h, padded, H, H, TMA, BLOCK_M, BLOCK_H)
                b = _tile(weight_ref, v, h, V, H, stride_weight, TMA, BLOCK_V, BLOCK_H)
                x = _multiply(a, b.T, x, PRECISION)
        source = tl.load(index_ptr + rows, mask=valid, other=0)
        if BLOCK_V > PART:
            left, right = tl.split(tl.permute(tl.reshape(x, [BLOCK_M, 2, PART]), (0, 2, 1)))
        else:
            left, right = x, x
        for half in tl.static_range(BLOCK_V // PART):
            _gradient_of(
                left if half == 0 else right, rows, valid, source, m, row_tile, local + half * PART, column,
                bias_ptr, ids_ptr, temperatures_ptr, entropy_ptr, maximum_ptr, logsumexp_ptr, grad_logp_ptr, grad_entropy_ptr, scales_ptr,
                gradient_ptr, residue_ptr, flags_ptr, column_sums_ptr, V, inverse_temperature, softcap, HAS_BIAS, HAS_TEMPERATURES, HAS_SOFTCAP,
                HAS_LOGP, HAS_ENTROPY, NEEDS_BIAS, HELD, RESIDUE, SCALED, BLOCK_M, PART, WIDTH,
            )  # fmt: skip
