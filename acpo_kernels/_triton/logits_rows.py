"""One reading of a row of logits, for `logprob_entropy` and `hindsight_information`: each THREAD keeps running statistics of what it
has read, and threads meet once, after the loop: no shuffle or barrier inside it.

A step gives each thread EACH logits of a stream, as a tile [THREADS, EACH] whose second axis lies in registers: halves of a tile, sums
and maxima along it are plain arithmetic. The statistics are the maximum m so far, r = sum of exp(x - m) over all elements but one that
holds m, and w = sum of exp(x - m) (m - x). The maximum is left out of r exactly, ties and all, by a knock-out among the exponentials of
a step and of what m was: whoever loses is a term of the sum, the last winner is exp(0) and is not.

The argument of exp2. One product (x - m) log2(e)/T, rounded, costs exp 2^-24 |x - m| log2(e)/T of itself: 2.6e-6 at 60. Beside the
thread's own maximum, exp(0) = 1, the error is below 2^-24: exp(-a) a < 0.37. It shows in one place, the thread that holds the row's
maximum, which is left out of the sum. A compensated product for every logit takes four instructions more, 16 instead of 12 where an
H200 leaves 13 to a bf16 logit; an exponent split off by integers five. So the loop keeps the one product, and where the row turns out
confident (`CONFIDENT`) the words of that one thread, a 128th of the row, are read once more by all threads and summed with the
exact one of `_exp_parts`: 9 logits a thread at V = 151,936, 3 % of its instructions, 1.6 % of the bytes in whole 32-byte sectors.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

NUM_WARPS = 4
THREADS = tl.constexpr(32 * NUM_WARPS)
EACH = tl.constexpr(16)  # two 16-byte words of 16-bit logits, four of float32: what a step moves to a new maximum costs a sixteenth a logit
STEP = tl.constexpr(THREADS.value * EACH.value)

LOG2E = tl.constexpr(1.4426950408889634)
LOG2E_LOW = tl.constexpr(1.4426950408889634 - 1.44269502162933349609375)  # what float32 leaves of log2(e)
LN2 = tl.constexpr(0.6931471805599453)
LN2_HIGH = tl.constexpr(0.693115234375)  # 13 bits: its product with an integer of up to 11 bits is exact
LN2_LOW = tl.constexpr(0.693147180559945309 - 0.693115234375)
CONFIDENT = tl.constexpr(2.0**-6)  # what the maximum leaves to all others, below which the top thread's share is summed again
LOWEST = tl.constexpr(-3.4028234663852886e38)
INF = tl.constexpr(float("inf"))


@triton.jit
def _log1p(x):
    # Below 0.4 the series of 2 atanh(x / (2 + x)), s <= 1/6: the term left out is 3e-11 of the first.
    s = tl.div_rn(x, 2.0 + x)
    q = s * s
    series = 2.0 * s * (1.0 + q * (1.0 / 3 + q * (1.0 / 5 + q * (1.0 / 7 + q * (1.0 / 9 + q * (1.0 / 11))))))
    return tl.where(tl.abs(x) < 0.4, series, tl.log(1.0 + x))


@triton.jit
def _expm1_series(x):
    # Taylor, for |x| < 0.4: the term left out is 3e-11 of the first.
    series = 1.0 + x * (1.0 / 8) * (1.0 + x * (1.0 / 9))
    series = 1.0 + x * (1.0 / 5) * (1.0 + x * (1.0 / 6) * (1.0 + x * (1.0 / 7) * series))
    return x * (1.0 + x * (1.0 / 2) * (1.0 + x * (1.0 / 3) * (1.0 + x * (1.0 / 4) * series)))


@triton.jit
def _exp_parts(d):
    """(e, a, b) with exp(d) = e a b for d <= 80, e near 1, a and b powers of two: a large sum times exp(-100) then meets the small
    number before it underflows. The integer part of d log2(e) is split off first: a product of 58 rounded to float32 would cost
    exp 1e-6 of itself. The series is half a unit more exact than exp2, and here it is not per logit."""
    d = tl.maximum(d, -170.0)
    n = tl.floor(d * LOG2E + 0.5)
    f = (d - n * LN2_HIGH) - n * LN2_LOW
    half = tl.floor(0.5 * n)
    return 1.0 + _expm1_series(f), tl.exp2(half), tl.exp2(n - half)


@triton.jit
def _probability(log_p, shift):
    """2^shift exp(log_p), log_p <= 0. What the product with log2(e) gains by rounding (58 rounded to float32: 1e-6 of the result) is kept by a
    fused multiply and put back; the exponential of a far smaller number is 0."""
    product = tl.fma(log_p, LOG2E, 0.0)  # a plain product would be fused with the shift, and what it gained would be another number
    gained = tl.fma(log_p, -LOG2E_LOW, tl.fma(log_p, -LOG2E, product))
    p = tl.exp2(product + shift)
    return tl.fma(p * gained, -LN2, p)


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
def _row_size(V, active, ALIGNED: tl.constexpr):
    """The logits to be read: none of a row that does not count. The compiler learns that a mask is whole 16-byte words."""
    size = tl.where(active, V, 0)
    if ALIGNED > 1:
        size = size // ALIGNED * ALIGNED
    return size


@triton.jit
def _row_scale(row, inverse_temperature, temperatures_ptr, HAS_TEMPERATURES: tl.constexpr):
    """1/T, log2(e)/T and the lowest x - maximum that is told apart: times 1/T, and subtracted from another, it stays finite."""
    per_t = inverse_temperature
    if HAS_TEMPERATURES:
        per_t = tl.div_rn(1.0, tl.load(temperatures_ptr + row).to(tl.float32))
    return per_t, per_t * LOG2E, -8e37 / tl.maximum(per_t, 1.0)


@triton.jit
def _load(at, offs, size, MASKED: tl.constexpr):
    if MASKED:
        x = tl.load(at + offs, mask=offs < size, other=-INF)
    else:
        x = tl.load(at + offs)
    return x


@triton.jit
def _join(a, b, WIDTH: tl.constexpr):
    return tl.reshape(tl.join(a, b), [THREADS, 2 * WIDTH])


@triton.jit
def _words(x_ptr, start, size, MASKED: tl.constexpr, APART: tl.constexpr, VEC: tl.constexpr):
    """[THREADS, VEC]: 16 bytes for each thread."""
    return _load(x_ptr, start + (tl.arange(0, THREADS) * APART)[:, None] + tl.arange(0, VEC)[None, :], size, MASKED)


@triton.jit
def _two(x_ptr, offs, size, MASKED: tl.constexpr, GAP: tl.constexpr):
    return tl.join(_load(x_ptr, offs, size, MASKED), _load(x_ptr, offs + GAP, size, MASKED))


@triton.jit
def _words_by_element(x_ptr, start, size, MASKED: tl.constexpr, APART: tl.constexpr, VEC: tl.constexpr):
    """The same elements in the same places, where 16 bytes do not begin at a multiple of 16: one at a time."""
    offs = start + tl.arange(0, THREADS) * APART
    if VEC == 4:
        x = tl.join(_two(x_ptr, offs, size, MASKED, 2), _two(x_ptr, offs + 1, size, MASKED, 2))
    else:
        even = tl.join(_two(x_ptr, offs, size, MASKED, 4), _two(x_ptr, offs + 2, size, MASKED, 4))
        odd = tl.join(_two(x_ptr, offs + 1, size, MASKED, 4), _two(x_ptr, offs + 3, size, MASKED, 4))
        x = tl.join(even, odd)
    return tl.reshape(x, [THREADS, VEC])


@triton.jit
def _word(x_ptr, start, size, MASKED: tl.constexpr, ALIGNED: tl.constexpr, APART: tl.constexpr, VEC: tl.constexpr):
    """A word of each thread, APART elements between those of neighbours."""
    if ALIGNED > 1:
        x = _words(x_ptr, start, size, MASKED, APART, VEC)
    else:
        x = _words_by_element(x_ptr, start, size, MASKED, APART, VEC)
    return x


@triton.jit
def _tile(x_ptr, start, size, MASKED: tl.constexpr, ALIGNED: tl.constexpr):
    """[THREADS, EACH] of a row in float32. Which thread has which element does not depend on where the row lies, so neither do its bits.

    Words become float32 before they are joined: Triton 3.6 moves a later cast below a change of layout, and the exponentials with it, four
    times each."""
    VEC: tl.constexpr = 128 // x_ptr.dtype.element_ty.primitive_bitwidth
    APART: tl.constexpr = THREADS * VEC
    a = _word(x_ptr, start, size, MASKED, ALIGNED, VEC, VEC).to(tl.float32)
    b = _word(x_ptr, start + APART, size, MASKED, ALIGNED, VEC, VEC).to(tl.float32)
    x = _join(a, b, VEC)
    if VEC == 4:
        c = _word(x_ptr, start + 2 * APART, size, MASKED, ALIGNED, VEC, VEC)
        d = _word(x_ptr, start + 3 * APART, size, MASKED, ALIGNED, VEC, VEC)
        x = _join(x, _join(c, d, VEC), 2 * VEC)
    return x


@triton.jit
def _halves(x, WIDTH: tl.constexpr):
    return tl.split(tl.reshape(x, [THREADS, WIDTH // 2, 2]))


@triton.jit
def _greater(a, b):
    """A NaN stays."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _maximum(x):
    """Of each thread's logits; a NaN stays."""
    a, b = _halves(x, 16)
    a, b = _halves(_greater(a, b), 8)
    a, b = _halves(_greater(a, b), 4)
    a, b = tl.split(_greater(a, b))
    return _greater(a, b)


@triton.jit
def _losers(e, before):
    """The sum of each thread's exponentials, and of what its maximum was before, but the greatest."""
    a, b = _halves(e, 16)
    total = tl.sum(tl.minimum(a, b), 1)
    a, b = _halves(tl.maximum(a, b), 8)
    total += tl.sum(tl.minimum(a, b), 1)
    a, b = _halves(tl.maximum(a, b), 4)
    total += tl.sum(tl.minimum(a, b), 1)
    a, b = tl.split(tl.maximum(a, b))
    return total + tl.minimum(a, b) + tl.minimum(tl.maximum(a, b), before)


@triton.jit
def _empty():
    """m, r and w of a thread that has read nothing."""
    zero = tl.zeros([THREADS], tl.float32)
    return zero - INF, zero, zero


@triton.jit
def _raised(x, m, k, lowest):
    """The maximum with a tile's logits, the same as a finite number (nothing but -inf so far), and what m was against it: d <= 0, exp(d)."""
    top = _greater(_maximum(x), m)
    base = tl.maximum(top, LOWEST)
    d = tl.maximum(m - base, lowest)
    return top, base, d, tl.exp2(d * k)


@triton.jit
def _terms(x, base, k, lowest):
    u = tl.maximum(x - base[:, None], lowest)  # finite: 0 x -inf would be NaN
    return u, tl.exp2(u * k)


@triton.jit
def _weighted(w, r, d, before, u, e):
    """w against the new maximum; r is moved already."""
    return tl.fma(before, w, -r * d) - tl.fma(before, d, tl.sum(e * u, 1))


@triton.jit
def _step(x, m, r, w, k, lowest):
    top, base, d, before = _raised(x, m, k, lowest)
    u, e = _terms(x, base, k, lowest)
    r = before * r
    return top, r + _losers(e, before), _weighted(w, r, d, before, u, e)


@triton.jit
def _sweep(x_ptr, size, k, lowest, ALIGNED: tl.constexpr):
    """One reading of a row: (m, r, w) of each thread. Two tiles a turn: the second is on its way while the first is summed."""
    m, r, w = _empty()
    whole = size // (2 * STEP) * (2 * STEP)
    for start in range(0, whole, 2 * STEP):
        x = _tile(x_ptr, start, size, False, ALIGNED)
        y = _tile(x_ptr, start + STEP, size, False, ALIGNED)
        m, r, w = _step(x, m, r, w, k, lowest)
        m, r, w = _step(y, m, r, w, k, lowest)
    for start in range(whole, size, STEP):
        m, r, w = _step(_tile(x_ptr, start, size, True, ALIGNED), m, r, w, k, lowest)
    return m, r, w


@triton.jit
def _meet(x_ptr, size, m, r, w, per_t, lowest, ALIGNED: tl.constexpr):
    """Threads meet: (not a distribution, the maximum, the sum without it, sum of exp(x - max) (max - x)). The top thread gives its r,
    every other one also its own maximum, moved to the maximum of the row."""
    thread = tl.arange(0, THREADS)
    bad = tl.max((m != m).to(tl.int32), axis=0) != 0
    top = tl.max(m, axis=0)
    bad = bad | (top == INF) | (top == -INF)
    first = tl.min(tl.where(m == top, thread, THREADS), axis=0)
    d = tl.maximum(m - tl.maximum(top, LOWEST), -140.0 / per_t)
    e, scale_a, scale_b = _exp_parts(d * per_t)
    others = thread != first
    s = r + 1.0
    rest = tl.sum(tl.where(others, s * e * scale_a * scale_b, 0.0), axis=0)
    weighted = tl.sum(tl.where(others, (w - s * d) * e * scale_a * scale_b, 0.0), axis=0)
    own, own_weighted = tl.sum(tl.where(others, 0.0, r), axis=0), tl.sum(tl.where(others, 0.0, w), axis=0)
    if rest + own < CONFIDENT:
        own, own_weighted = _again(x_ptr, size, first, top, per_t, lowest, ALIGNED)
    return bad, top, rest + own, weighted + own_weighted


@triton.jit
def _again(x_ptr, size, first, top, per_t, lowest, ALIGNED: tl.constexpr):
    """r and w of the thread that holds the row's maximum, its elements read once more by all threads. exp(x - max) by one product with
    log2(e) errs by 2^-24 of |x - max|/T. A thread whose own maximum is a term beside the others never feels it; but in a confident row
    what this one has left may lie 60 below: here its integer part is split off."""
    VEC: tl.constexpr = 128 // x_ptr.dtype.element_ty.primitive_bitwidth
    APART: tl.constexpr = THREADS * VEC  # between two words of a thread, as _tile reads them
    r = tl.zeros([THREADS], tl.float32)
    w = tl.zeros([THREADS], tl.float32)
    ties = tl.zeros([THREADS], tl.int32)
    for start in range(first * VEC, size, THREADS * APART):
        x = _word(x_ptr, start, size, True, ALIGNED, APART, VEC).to(tl.float32)
        u = tl.maximum(x - top, lowest)
        e, scale_a, scale_b = _exp_parts(u * per_t)
        e = tl.where(x == top, 0.0, e * scale_a * scale_b)
        r += tl.sum(e, 1)
        w -= tl.sum(e * u, 1)
        ties += tl.sum((x == top).to(tl.int32), 1)
    return tl.sum(r, axis=0) + (tl.sum(ties, axis=0) - 1).to(tl.float32), tl.sum(w, axis=0)


def aligned_elements(logits: Tensor, stride_outer: int, stride_inner: int) -> int:
    """How many elements 16 bytes hold, where every row begins at a multiple of 16 bytes and holds whole ones; else 1."""
    vec = 16 // logits.element_size()
    whole = logits.data_ptr() % 16 == 0 and all(n % vec == 0 for n in (logits.shape[-1], stride_outer, stride_inner))
    return vec if whole else 1
