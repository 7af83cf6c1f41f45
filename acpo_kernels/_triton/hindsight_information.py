"""CUDA kernel of `hindsight_information`. The contract is in acpo_kernels/hindsight_information.py. One launch, one program a row, which
reads both streams once: 2 N V s bytes.

The statistics of each stream are those of `logprob_entropy` (logits_rows.py), to the bit. Beside them, with u = (x - max x)/T and
v = (y - max y)/T against a thread's maxima so far, e = exp(u), g = exp(v), A = sum of e, C = sum of g, a thread sums

    F = sum of e phi(t),   B = sum of g phi(-t),   S = sum of e t,   Z = sum of g t,   phi(t) = exp(-t) - 1 + t >= 0
    t = u - v + c,   c about log(C/A)

from which, over the row and with g and C multiplied by exp(-c), so that exp(t) = e/g,

    KL(p || q) = F/A - (s - log1p(s)),   s = C/A - 1 = (F - S)/A        KL(q || p) the same with the streams exchanged

The centre c may be any number: the algebra is exact. Near log(C/A) it makes every sum of the order of what it measures, and s of the
order of rounding. Below |t| = 0.3 the terms go through a series, so that nearly equal streams keep their digits, and equal ones give
exactly 0. A maximum or a centre that moves shifts every t by one number, and the sums follow in closed form (`_move`), once a step
for its 16 pairs. Streams that change places give the same bits: every formula is the mirror image of its twin. A token that one stream
alone forbids lies further than 4e37 from any other: the largest and the least t tell.

Machine instructions on sm_90 for a pair of logits, loads and loop control included: 52 in bf16, 49 in fp32, of which 2.4 are exp2.
An H200 at 4.8 TB/s leaves 26 to a bf16 pair and 52 to an fp32 pair: fp32 is bound by its one reading, bf16 by instructions at some 50 %
of the bandwidth. Two readings, the second against the final normalisers, took 22 + 52. Not measured on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .. import _torch
from .._layout import row_layout
from ..reference import IGNORED
from .logits_rows import (
    INF,
    LN2,
    LOG2E,
    LOWEST,
    NUM_WARPS,
    STEP,
    _empty,
    _exp_parts,
    _log1p,
    _losers,
    _meet,
    _raised,
    _row_active,
    _row_offset,
    _row_scale,
    _row_size,
    _terms,
    _tile,
    _weighted,
    aligned_elements,
)
from .ragged import compact, device

NEAR = tl.constexpr(0.3)  # |t| below which the terms of a pair go through the series
WIDE = tl.constexpr(1.0)  # and what the sums are shifted by: once for 16 pairs, so it may be longer


@triton.jit
def _phi(t, e, g, over_e, over_g, LIMIT: tl.constexpr):
    """e phi(t) and g phi(-t), where e exp(-t) = over_e and g exp(t) = over_g."""
    q = t * t
    if LIMIT == NEAR:  # the last coefficients are fitted: errors of 6e-9 and 1.3e-7 of the term
        even = tl.fma(q, tl.fma(q, 0.0013908, 1.0 / 24), 0.5)
        odd = tl.fma(q, 0.0083489, 1.0 / 6)
    else:  # the terms left out are 4e-9 and 5e-8 of the first
        even = tl.fma(q, tl.fma(q, tl.fma(q, tl.fma(q, 1.0 / 3628800, 1.0 / 40320), 1.0 / 720), 1.0 / 24), 0.5)
        odd = tl.fma(q, tl.fma(q, tl.fma(q, 1.0 / 362880, 1.0 / 5040), 1.0 / 120), 1.0 / 6)
    near = tl.abs(t) < LIMIT
    forward = tl.where(near, e * q * tl.fma(-t, odd, even), tl.fma(e, t, over_e - e))
    backward = tl.where(near, g * q * tl.fma(t, odd, even), tl.fma(-g, t, over_g - g))
    return forward, backward


@triton.jit
def _moved(total, first_order, mass, fall, moved, shift, of_mass):
    """A sum of e phi(t) where every t becomes t + shift and every e is multiplied by fall: moved is fall exp(-shift), of_mass fall phi(shift)."""
    lost = tl.where(tl.abs(shift) < WIDE, tl.fma(fall, shift, -of_mass), fall - moved)
    return tl.fma(moved, total, tl.fma(lost, first_order, of_mass * mass))


@triton.jit
def _move(a, b, c, e_a, e_b, e_c, e_minus_c, mass_p, mass_q, forward, backward, s, z):
    """The sums against maxima that rose by -a and -b and a centre that rose by c: every t becomes t + a - b + c. e_x = exp(x)."""
    shift = a - b + c
    p_moved, q_moved = e_b * e_minus_c, e_a * e_c
    of_p, of_q = _phi(shift, e_a, e_b, p_moved, q_moved, WIDE)
    forward = _moved(forward, s, mass_p, e_a, p_moved, shift, of_p)
    backward = _moved(backward, -z, mass_q, e_b, q_moved, -shift, of_q)
    return forward, backward, tl.fma(e_a, s, e_a * shift * mass_p), tl.fma(e_b, z, e_b * shift * mass_q)


@triton.jit
def _log_ratio(x, y):
    """log(x / y), x and y >= 1, to 0.06 and to two fifths of itself: the bits of a float32 number are its logarithm, linear between powers of two."""
    return (x.to(tl.int32, bitcast=True) - y.to(tl.int32, bitcast=True)).to(tl.float32) * (LN2 * 2.0**-23)


@triton.jit
def _exp(x):
    e, a, b = _exp_parts(x)
    return e * a * b


@triton.jit
def _mass(m, r):
    return tl.where(m == -INF, 0.0, r + 1.0)


@triton.jit
def _pair_step(x, y, m_p, r_p, w, m_q, r_q, forward, backward, s, z, centre, least, most, per_t, k, lowest):
    top_p, base_p, d_p, before_p = _raised(x, m_p, k, lowest)
    top_q, base_q, d_q, before_q = _raised(y, m_q, k, lowest)
    mass_p, mass_q = _mass(m_p, r_p), _mass(m_q, r_q)
    u, e = _terms(x, base_p, k, lowest)
    v, g = _terms(y, base_q, k, lowest)
    r_p, r_q = before_p * r_p, before_q * r_q
    w = _weighted(w, r_p, d_p, before_p, u, e)
    r_p += _losers(e, before_p)
    r_q += _losers(g, before_q)
    to = _log_ratio(1.0 + r_q, 1.0 + r_p)
    c = to - centre
    forward, backward, s, z = _move(
        d_p * per_t, d_q * per_t, c, before_p, before_q, tl.exp2(c * LOG2E), tl.exp2(-c * LOG2E), mass_p, mass_q, forward, backward, s, z
    )  # fmt: skip
    t = tl.fma(u - v, per_t, to[:, None])
    rise = tl.exp2(to * LOG2E)[:, None]
    fall = tl.exp2(to * -LOG2E)[:, None]
    of_p, of_q = _phi(t, e, g, g * fall, e * rise, NEAR)
    forward += tl.sum(of_p, 1)
    backward += tl.sum(of_q, 1)
    s += tl.sum(e * t, 1)
    z += tl.sum(g * t, 1)
    return top_p, r_p, w, top_q, r_q, forward, backward, s, z, to, tl.minimum(least, tl.min(t, 1)), tl.maximum(most, tl.max(t, 1))


@triton.jit
def _divergence(total, first_order, mass):
    """total/mass - (s - log1p(s)), which is first_order/mass + log1p(s); s = (total - first_order)/mass is what rounding left of the centre,
    some 1e-6. A large divergence comes from the sum in which one stream's exponentials alone stand."""
    s = tl.div_rn(total - first_order, mass)
    small = tl.div_rn(total, mass) - 0.5 * s * s
    return tl.maximum(tl.where(small < 0.5, small, tl.div_rn(first_order, mass)), 0.0)


@triton.jit(do_not_specialize=["inner_x", "outer_stride_x", "stride_x", "inner_y", "outer_stride_y", "stride_y", "inverse_temperature"])
def _hindsight_information_kernel(
    logits_ptr, hindsight_ptr, ids_ptr, mask_ptr, temperatures_ptr, logp_ptr, hindsight_logp_ptr, entropy_ptr, log_ratio_ptr, kl_ptr,
    information_ptr, V, inner_x, outer_stride_x, stride_x, inner_y, outer_stride_y, stride_y, inverse_temperature,
    ALIGNED: tl.constexpr, HAS_MASK: tl.constexpr, HAS_TEMPERATURES: tl.constexpr, IGNORED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    target, active = _row_active(row, ids_ptr, mask_ptr, HAS_MASK, IGNORED)
    per_t, k, lowest = _row_scale(row, inverse_temperature, temperatures_ptr, HAS_TEMPERATURES)
    size = _row_size(V, active, ALIGNED)
    x_ptr = logits_ptr + _row_offset(row, inner_x, outer_stride_x, stride_x, ALIGNED)
    y_ptr = hindsight_ptr + _row_offset(row, inner_y, outer_stride_y, stride_y, ALIGNED)

    m_p, r_p, w = _empty()
    m_q, r_q, forward = _empty()
    backward, s, z, centre, least, most = forward, forward, forward, forward, forward, forward
    whole = size // STEP * STEP
    for start in range(0, whole, STEP):
        x, y = _tile(x_ptr, start, size, False, ALIGNED), _tile(y_ptr, start, size, False, ALIGNED)
        m_p, r_p, w, m_q, r_q, forward, backward, s, z, centre, least, most = _pair_step(
            x, y, m_p, r_p, w, m_q, r_q, forward, backward, s, z, centre, least, most, per_t, k, lowest
        )
    x, y = _tile(x_ptr, whole, size, True, ALIGNED), _tile(y_ptr, whole, size, True, ALIGNED)
    m_p, r_p, w, m_q, r_q, forward, backward, s, z, centre, least, most = _pair_step(
        x, y, m_p, r_p, w, m_q, r_q, forward, backward, s, z, centre, least, most, per_t, k, lowest
    )

    bad_x, top_x, rest_x, weighted = _meet(x_ptr, size, m_p, r_p, w, per_t, lowest, ALIGNED)
    bad_y, top_y, rest_y, _ = _meet(y_ptr, size, m_q, r_q, w, per_t, lowest, ALIGNED)
    l_x, l_y = _log1p(rest_x), _log1p(rest_y)
    entropy = l_x + tl.div_rn(weighted * per_t, 1.0 + rest_x)
    a = tl.maximum(m_p - tl.maximum(top_x, LOWEST), lowest) * per_t
    b = tl.maximum(m_q - tl.maximum(top_y, LOWEST), lowest) * per_t
    c = l_y - l_x - centre
    forward, backward, s, z = _move(
        a, b, c, _exp(a), _exp(b), _exp(c), _exp(-c), _mass(m_p, r_p), _mass(m_q, r_q), forward, backward, s, z
    )  # fmt: skip
    kl = _divergence(tl.sum(forward, axis=0), tl.sum(s, axis=0), 1.0 + rest_x)
    information = _divergence(tl.sum(backward, axis=0), -tl.sum(z, axis=0), 1.0 + rest_y)
    apart = lowest * per_t * 0.5
    kl = tl.where(tl.max(most, axis=0) > -apart, INF, kl)  # possible in the policy alone, even where its exponential underflows
    information = tl.where(tl.min(least, axis=0) < apart, INF, information)

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
    tl.store(kl_ptr + row, tl.where(active, tl.where(bad_x | bad_y, nan, kl), 0.0))
    tl.store(information_ptr + row, tl.where(active, tl.where(bad_x | bad_y, nan, information), 0.0))


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
            HAS_TEMPERATURES=temperatures is not None, IGNORED=IGNORED, num_warps=NUM_WARPS,
        )  # fmt: skip
    return results
