"""CUDA kernels of `linear_hindsight_information`: 4 u N V H operations, each weight tile multiplied with both streams' rows, no N x V tensor.

Accuracy for streams that are nearly equal. With u = (x - max x)/T and v = (y - max y)/T of the two streams and t = u - v,

    KL(p || q) = E_p[phi(t)] - (s - log1p(s)),   phi(t) = exp(-t) - 1 + t >= 0,   s = E_p[exp(-t)] - 1 = E_p[phi(t) - t]

and every term is of the second order in t: nothing of the first order cancels, and equal streams give exactly 0. exp(u) exp(-t) = exp(v), so
that phi costs no exponential beside the two of the sums: exp(u) phi(t) = exp(v) - exp(u) + exp(u) t, or a series for small t. The
sums S1 of exp(u) t and S2 of exp(u) phi(t) move to other maxima linearly, and so parts of a row meet (`_move`). KL(q || p) is the same with
the streams exchanged.

The arithmetic on a pair of logits wants 5 registers at once, which leaves 64 x 64 for the tile: (64 + 64 + 64) elements of operands for each
2 x 64 x 64 products, 43 FLOP a byte, so that L2 (some 9 TB/s on an H200) bounds it near 380 TF/s, half of the forward's rate; two
forwards would read the weight twice but could not give a divergence. Not measured on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .linear_logprob_entropy import COMBINE, SPLIT
from .linear_tiles import (
    INF,
    LOG2E,
    LOWEST,
    Tiles,
    _finish_logits,
    _meet,
    _multiply,
    _place,
    _row_scale,
    _tile,
    aligned_weight,
    counted_rows,
    machine,
    operand,
    tiles,
)
from .logits_rows import _log1p
from .ragged import device

PARTS = 9  # numbers a row and split: maximum, r, w, S1, S2 of the policy; maximum, r, S1, S2 of hindsight
FAR = tl.constexpr(-1e30)  # u where x is -inf: finite, and exp of it is 0


@triton.jit
def _phi(t, e_u, e_v):
    """exp(u) phi(t) and exp(v) phi(-t). Below 0.3 by the series: the term left out is 4e-8 of the first."""
    q = t * t
    even = q * (1.0 / 2 + q * (1.0 / 24 + q * (1.0 / 720)))
    odd = q * t * (1.0 / 6 + q * (1.0 / 120 + q * (1.0 / 5040)))
    near = tl.abs(t) < 0.3
    forward = tl.where(near, e_u * (even - odd), (e_v - e_u) + e_u * t)
    backward = tl.where(near, e_v * (even + odd), (e_u - e_v) - e_v * t)
    return forward, backward


@triton.jit
def _move(d_p, d_q, n_p, n_q, s1, s2, z1, z2, per_t):
    """S1 and S2 of both streams against other maxima: d is a part's maximum minus the new one, n its sum of exp(u)."""
    a, b = tl.maximum(d_p * per_t, FAR), tl.maximum(d_q * per_t, FAR)
    e_a, e_b = tl.exp2(a * LOG2E), tl.exp2(b * LOG2E)
    h = a - b  # t becomes t + h
    forward, backward = _phi(h, e_a, e_b)
    moved_s2 = e_b * s2 + (e_a - e_b) * s1 + forward * n_p
    moved_z2 = e_a * z2 + (e_b - e_a) * z1 + backward * n_q
    return e_a * (s1 + h * n_p), moved_s2, e_b * (z1 - h * n_q), moved_z2


@triton.jit
def _mass(top, r):
    return tl.where(top > LOWEST, r + 1.0, 0.0)


@triton.jit
def _tile_sums(x, y, per_t, k):
    """Of each row of a pair of tiles of logits: the numbers of PARTS."""
    m_p, m_q = tl.maximum(tl.max(x, 1), LOWEST), tl.maximum(tl.max(y, 1), LOWEST)
    no_x, no_y = x == -INF, y == -INF
    # One stream after the other, so that what is wanted of both at once is only the logits and the exponentials.
    u = tl.where(no_x, FAR, x - m_p[:, None])
    e_p = tl.exp2(u * k[:, None])
    r_p, w = _sum_below(e_p, u), -tl.sum(e_p * u, 1)
    v = tl.where(no_y, FAR, y - m_q[:, None])
    e_q = tl.exp2(v * k[:, None])
    r_q = _sum_below(e_q, v)
    # x - y of near streams is exact; u - v would carry the rounding of both
    t = (x - y) - (m_p - m_q)[:, None]
    t = tl.where(no_x, tl.where(no_y, 0.0, FAR), tl.where(no_y, -FAR, t)) * per_t[:, None]
    forward, backward = _phi(t, e_p, e_q)
    s1, s2, z1, z2 = tl.sum(e_p * t, 1), tl.sum(forward, 1), -tl.sum(e_q * t, 1), tl.sum(backward, 1)
    return m_p, r_p, w, s1, s2, m_q, r_q, z1, z2


@triton.jit
def _sum_below(e, u):
    """Sum of e without one of its terms that equal the maximum, u = 0."""
    below = tl.sum(tl.where(u == 0.0, 0.0, e), 1)
    return below + tl.maximum(tl.floor(tl.sum(e, 1) - below + 0.5) - 1.0, 0.0)


@triton.jit(do_not_specialize=["padded", "inverse_temperature", "softcap"])
def _linear_hindsight_kernel(
    hidden_ref, hindsight_ref, weight_ref, bias_ptr, ids_ptr, temperatures_ptr, index_ptr, count_ptr, parts_ptr, chosen_ptr, infinite_ptr,
    V, H, stride_weight, padded, inverse_temperature, softcap,
    HAS_BIAS: tl.constexpr, HAS_TEMPERATURES: tl.constexpr, HAS_SOFTCAP: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    TILES: tl.constexpr = SPLIT // BLOCK_V
    count = tl.load(count_ptr)
    row_tiles, splits = tl.cdiv(count, BLOCK_M), tl.cdiv(V, SPLIT)
    program, programs = tl.program_id(0), tl.num_programs(0)
    apart = splits.to(tl.int64) * padded
    zero = tl.zeros([BLOCK_M], tl.float32)
    m_p, r_p, w, s1, s2, m_q, r_q, z1, z2 = zero, zero, zero, zero, zero, zero, zero, zero, zero
    for step in range(0, tl.cdiv(row_tiles * splits - program, programs) * TILES):
        row_tile, split = _place(program + step // TILES * programs, row_tiles, splits)
        within = step % TILES
        m, first = row_tile * BLOCK_M, split * SPLIT + within * BLOCK_V
        x = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
        y = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
        for h in range(0, H, BLOCK_H):
            head = _tile(weight_ref, first, h, V, H, stride_weight, TMA, BLOCK_V, BLOCK_H)
            x = _multiply(_tile(hidden_ref, m, h, padded, H, H, TMA, BLOCK_M, BLOCK_H), head.T, x, PRECISION)
            y = _multiply(_tile(hindsight_ref, m, h, padded, H, H, TMA, BLOCK_M, BLOCK_H), head.T, y, PRECISION)
        columns, rows = first + tl.arange(0, BLOCK_V), m + tl.arange(0, BLOCK_M)
        valid = rows < count
        source = tl.load(index_ptr + rows, mask=valid, other=0)
        per_t, k, limit = _row_scale(source, valid, inverse_temperature, temperatures_ptr, HAS_TEMPERATURES)
        x = _finish_logits(x, columns, bias_ptr, softcap, V, HAS_BIAS, HAS_SOFTCAP)
        y = _finish_logits(y, columns, bias_ptr, softcap, V, HAS_BIAS, HAS_SOFTCAP)
        target = tl.load(ids_ptr + source, mask=valid, other=-1)
        here = (target >= first) & (target < tl.minimum(first + BLOCK_V, V))
        if tl.max(here.to(tl.int32), 0) > 0:
            own = columns[None, :] == target[:, None]
            tl.store(chosen_ptr + rows, tl.sum(tl.where(own, x, 0.0), 1), mask=here)
            tl.store(chosen_ptr + padded + rows, tl.sum(tl.where(own, y, 0.0), 1), mask=here)

        # Possible in one stream, impossible in the other: rare, and whoever finds it writes the same 1.
        no_kl = tl.max(((y == -INF) & (x > -INF)).to(tl.int32), 1) > 0
        no_information = tl.max(((x == -INF) & (y > -INF)).to(tl.int32), 1) > 0
        tl.store(infinite_ptr + rows, 1, mask=no_kl)
        tl.store(infinite_ptr + padded + rows, 1, mask=no_information)

        t_p, t_r, t_w, t_s1, t_s2, t_q, t_rq, t_z1, t_z2 = _tile_sums(x, y, per_t, k)
        fresh = within == 0
        m_p, m_q = tl.where(fresh, -INF, m_p), tl.where(fresh, -INF, m_q)
        r_p, r_q, w = tl.where(fresh, 0.0, r_p), tl.where(fresh, 0.0, r_q), tl.where(fresh, 0.0, w)
        s1, s2, z1, z2 = tl.where(fresh, 0.0, s1), tl.where(fresh, 0.0, s2), tl.where(fresh, 0.0, z1), tl.where(fresh, 0.0, z2)
        n_p, n_q = tl.maximum(m_p, t_p), tl.maximum(m_q, t_q)
        s1, s2, z1, z2 = _move(m_p - n_p, m_q - n_q, _mass(m_p, r_p), _mass(m_q, r_q), s1, s2, z1, z2, per_t)
        t_s1, t_s2, t_z1, t_z2 = _move(t_p - n_p, t_q - n_q, _mass(t_p, t_r), _mass(t_q, t_rq), t_s1, t_s2, t_z1, t_z2, per_t)
        s1, s2, z1, z2 = s1 + t_s1, s2 + t_s2, z1 + t_z1, z2 + t_z2
        m_p, r_p, w = _meet(m_p, r_p, w, t_p, t_r, t_w, k, limit)
        m_q, r_q, _ = _meet(m_q, r_q, zero, t_q, t_rq, zero, k, limit)

        out = parts_ptr + split.to(tl.int64) * padded + rows
        last = within == TILES - 1
        tl.store(out, m_p, mask=last)
        tl.store(out + apart, r_p, mask=last)
        tl.store(out + 2 * apart, w, mask=last)
        tl.store(out + 3 * apart, s1, mask=last)
        tl.store(out + 4 * apart, s2, mask=last)
        tl.store(out + 5 * apart, m_q, mask=last)
        tl.store(out + 6 * apart, r_q, mask=last)
        tl.store(out + 7 * apart, z1, mask=last)
        tl.store(out + 8 * apart, z2, mask=last)


@triton.jit
def _meet_all(m, r, w, split, k, limit, SPLITS: tl.constexpr):
    """Maximum, r and w of a row from those of its splits, [SPLITS,ROWS]."""
    top = tl.max(m, 0)
    first = tl.min(tl.where(m == top[None, :], split[:, None], SPLITS), 0)
    d = tl.maximum(m - tl.maximum(top, LOWEST)[None, :], limit[None, :])
    e = tl.exp2(d * k[None, :])
    s = tl.where(split[:, None] == first[None, :], r, r + 1.0)  # every split but the first top one gives its own maximum as a term
    return top, tl.sum(s * e, 0), tl.sum((w - s * d) * e, 0)


@triton.jit
def _divergence(s1, s2, mass):
    """E[phi] - (s - log1p(s)) with s = E[phi - t], the difference by a series where it would cancel."""
    mean, s = tl.div_rn(s2, mass), tl.div_rn(s2 - s1, mass)
    series = s * s * (1.0 / 2 - s * (1.0 / 3 - s * (1.0 / 4 - s * (1.0 / 5 - s * (1.0 / 6 - s * (1.0 / 7))))))
    return tl.maximum(mean - tl.where(tl.abs(s) < 0.05, series, s - tl.log(1.0 + s)), 0.0)


@triton.jit(do_not_specialize=["rows", "padded", "inverse_temperature"])
def _linear_hindsight_combine_kernel(
    parts_ptr, chosen_ptr, infinite_ptr, ids_ptr, temperatures_ptr, position_ptr, logp_ptr, hindsight_logp_ptr, entropy_ptr, log_ratio_ptr, kl_ptr,
    information_ptr, V, rows, padded, inverse_temperature,
    HAS_TEMPERATURES: tl.constexpr, SPLIT: tl.constexpr, SPLITS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = tl.load(position_ptr + row, mask=row < rows, other=-1)
    active = at >= 0
    per_t, k, limit = _row_scale(row, active, inverse_temperature, temperatures_ptr, HAS_TEMPERATURES)
    split = tl.arange(0, SPLITS)
    splits = tl.cdiv(V, SPLIT)
    there = active[None, :] & (split < splits)[:, None]  # [SPLITS,ROWS]
    part = parts_ptr + split.to(tl.int64)[:, None] * padded + at[None, :]
    apart = splits.to(tl.int64) * padded
    m_p = tl.load(part, mask=there, other=-INF)
    r_p = tl.load(part + apart, mask=there, other=0.0)
    w = tl.load(part + 2 * apart, mask=there, other=0.0)
    s1 = tl.load(part + 3 * apart, mask=there, other=0.0)
    s2 = tl.load(part + 4 * apart, mask=there, other=0.0)
    m_q = tl.load(part + 5 * apart, mask=there, other=-INF)
    r_q = tl.load(part + 6 * apart, mask=there, other=0.0)
    z1 = tl.load(part + 7 * apart, mask=there, other=0.0)
    z2 = tl.load(part + 8 * apart, mask=there, other=0.0)
    no_kl = tl.load(infinite_ptr + at, mask=active, other=0) != 0
    no_information = tl.load(infinite_ptr + padded + at, mask=active, other=0) != 0

    top_p, rest_p, weighted = _meet_all(m_p, r_p, w, split, k, limit, SPLITS)
    top_q, rest_q, _ = _meet_all(m_q, r_q, tl.zeros([SPLITS, ROWS], tl.float32), split, k, limit, SPLITS)
    base_p, base_q = tl.maximum(top_p, LOWEST), tl.maximum(top_q, LOWEST)
    s1, s2, z1, z2 = _move(
        m_p - base_p[None, :], m_q - base_q[None, :], _mass(m_p, r_p), _mass(m_q, r_q), s1, s2, z1, z2, per_t[None, :]
    )  # fmt: skip

    target = tl.load(ids_ptr + row, mask=active, other=-1)
    inside = (target >= 0) & (target < V)
    x_t = tl.load(chosen_ptr + at, mask=active & inside, other=0.0)
    y_t = tl.load(chosen_ptr + padded + at, mask=active & inside, other=0.0)
    outside = inside == 0
    bad_p = (rest_p != rest_p) | (weighted != weighted) | (top_p == INF) | (top_p <= LOWEST) | outside
    bad_q = (rest_q != rest_q) | (top_q == INF) | (top_q <= LOWEST) | outside
    bad = bad_p | bad_q
    nan = float("nan")
    l_p, l_q = _log1p(rest_p), _log1p(rest_q)
    logp = tl.where(bad_p, nan, (x_t - base_p) * per_t - l_p)
    hindsight_logp = tl.where(bad_q, nan, (y_t - base_q) * per_t - l_q)
    entropy = tl.where(bad_p, nan, l_p + tl.div_rn(weighted * per_t, 1.0 + rest_p))
    kl = tl.where(no_kl, INF, _divergence(tl.sum(s1, 0), tl.sum(s2, 0), 1.0 + rest_p))
    information = tl.where(no_information, INF, _divergence(tl.sum(z1, 0), tl.sum(z2, 0), 1.0 + rest_q))
    here = row < rows
    tl.store(logp_ptr + row, tl.where(active, logp, 0.0), mask=here)
    tl.store(hindsight_logp_ptr + row, tl.where(active, hindsight_logp, 0.0), mask=here)
    tl.store(entropy_ptr + row, tl.where(active, entropy, 0.0), mask=here)
    tl.store(log_ratio_ptr + row, tl.where(active, hindsight_logp - logp, 0.0), mask=here)
    tl.store(kl_ptr + row, tl.where(active, tl.where(bad, nan, kl), 0.0), mask=here)
    tl.store(information_ptr + row, tl.where(active, tl.where(bad, nan, information), 0.0), mask=here)


def pair_tiles(tile: Tiles) -> Tiles:
    """64 x 64: both streams' logits, their exponentials and t at once, beside the sums of a row, are what 255 registers hold."""
    return tile._replace(n=32) if tile.precision != "ieee" else tile._replace(m=64, n=64)


def forward(
    hidden: Tensor,
    hindsight_hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    bias: Tensor | None,
    temperature: float | None,
    temperatures: Tensor | None,
    softcap: float | None,
    mask: Tensor | None,
) -> tuple[Tensor, ...]:
    """logp, hindsight_logp, entropy, log_ratio, kl, information, all float32 [N]."""
    rows = ids.shape[0]
    results = tuple(torch.empty(rows, dtype=torch.float32, device=ids.device) for _ in range(6))
    if rows == 0:
        return results
    with device(hidden):
        architecture, programs = machine(hidden)
        tile = pair_tiles(tiles(hidden.element_size(), architecture))
        ids, weight = ids.contiguous(), aligned_weight(weight)
        temperatures = None if temperatures is None else temperatures.contiguous()
        vocab = weight.shape[0]
        active = counted_rows(ids, mask)
        streams = [operand(active.gather(h), tile.m, tile.k, tile.tma) for h in (hidden, hindsight_hidden)]
        splits = triton.cdiv(vocab, SPLIT)
        parts, chosen = (torch.empty(n * active.padded, dtype=torch.float32, device=ids.device) for n in (PARTS * splits, 2))
        infinite = torch.zeros(2 * active.padded, dtype=torch.int32, device=ids.device)
        inverse = 1.0 if temperature is None else 1.0 / temperature
        flags = dict(HAS_TEMPERATURES=temperatures is not None, SPLIT=SPLIT)
        _linear_hindsight_kernel[(min(programs, active.padded // tile.m * splits),)](
            *streams, operand(weight, tile.n, tile.k, tile.tma), None if bias is None else bias.contiguous(),
            ids, temperatures, active.index, active.count, parts, chosen, infinite,
            vocab, weight.shape[1], weight.stride(0), active.padded, inverse, 1.0 if softcap is None else softcap,
            HAS_BIAS=bias is not None, HAS_SOFTCAP=softcap is not None, TMA=tile.tma, PRECISION=tile.precision,
            BLOCK_M=tile.m, BLOCK_V=tile.n, BLOCK_H=tile.k, **flags, **tile.options(),
        )  # fmt: skip
        wide = triton.next_power_of_2(splits)
        each = max(1, COMBINE // 4 // wide)
        _linear_hindsight_combine_kernel[(triton.cdiv(rows, each),)](
            parts, chosen, infinite, ids, temperatures, active.position, *results, vocab, rows, active.padded, inverse,
            SPLITS=wide, ROWS=each, **flags,
        )  # fmt: skip
    return results
