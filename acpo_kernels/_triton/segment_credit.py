"""CUDA kernels of `segment_credit`. The contract is in acpo_kernels/segment_credit.py.

One launch. A program writes 1024 token advantages of one rollout and first works out the rollout's conserving factor by itself: over
its segments, and with a mask over its tokens (N/1024 programs of a rollout read its mask from the L2, 32 KB for 32,768 tokens). What a
rollout gives therefore depends on that rollout alone.

The batch's own scale, where it is asked for, is the mean over all scores: every program reads those, programs x 4 S bytes out of L2, up
to `REDUNDANT` (16 MiB, the time of a launch; 128 programs and 32,768 segments); above, a launch before leaves partial sums.

The sums and the weights are float64, exact to 1e-16 whatever their order: a weight is rounded once, to nearest, so that
|sum_t w - T| <= 2^-24 T. The sum is of w~ - 1, of which reliability 0 and scores of 0 leave exactly 0, and the factor exactly 1.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .. import _torch
from .ragged import LAUNCH, REDUNDANT, TILES, TINY, _chunk, _inverse_root, _reciprocal, bisections, compact, device, slots

INF = tl.constexpr(float("inf"))
STAT_ROWS, STAT_COLUMNS = 16, 64  # sequences of a program and segments of one at a time: K_max = 64 segments a rollout


@triton.jit
def _finite(x):
    return tl.where(tl.abs(x) < INF, x, 0.0).to(tl.float64)


@triton.jit
def _last_terminal(sequence, first, end, terminal_ptr, here, HAS_TERMINAL: tl.constexpr):
    """The terminal segment of a sequence, or -1."""
    last = end * 0 - 1
    if HAS_TERMINAL:
        apart = (tl.load(terminal_ptr + sequence, mask=here, other=0) != 0) & (end > first)
        last = tl.where(apart, end - 1, -1)
    return last


@triton.jit(do_not_specialize=["num_sequences"])
def _segment_credit_scale_kernel(
    scores_ptr, sequence_offsets_ptr, terminal_ptr, partial_ptr, num_sequences,
    ADDITIVE: tl.constexpr, HAS_TERMINAL: tl.constexpr, STAT_ROWS: tl.constexpr, STAT_COLUMNS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    total, count = _scores(block, scores_ptr, sequence_offsets_ptr, terminal_ptr, num_sequences, ADDITIVE, HAS_TERMINAL, STAT_ROWS, STAT_COLUMNS)
    tl.store(partial_ptr + 2 * block, tl.sum(tl.sum(total, axis=1), axis=0))
    tl.store(partial_ptr + 2 * block + 1, tl.sum(count, axis=0))


@triton.jit
def _scores(
    block, scores_ptr, sequence_offsets_ptr, terminal_ptr, num_sequences,
    ADDITIVE: tl.constexpr, HAS_TERMINAL: tl.constexpr, STAT_ROWS: tl.constexpr, STAT_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Of STAT_ROWS sequences: sums of |phi| (phi^2) and number of their other segments."""
    sequence = tl.cast(block, tl.int64) * STAT_ROWS + tl.arange(0, STAT_ROWS)
    here = sequence < num_sequences
    first = tl.load(sequence_offsets_ptr + sequence, mask=here, other=0)
    end = tl.load(sequence_offsets_ptr + sequence + 1, mask=here, other=0)
    last = _last_terminal(sequence, first, end, terminal_ptr, here, HAS_TERMINAL)
    total = tl.zeros([STAT_ROWS, STAT_COLUMNS], tl.float64)
    for at in range(0, tl.max(end - first, axis=0), STAT_COLUMNS):
        segment = first[:, None] + at + tl.arange(0, STAT_COLUMNS)[None, :]
        inside = (segment < end[:, None]) & (segment != last[:, None])
        phi = _finite(tl.load(scores_ptr + segment, mask=inside, other=0.0).to(tl.float32))
        total += phi * phi if ADDITIVE else tl.abs(phi)
    return total, (end - first - (last >= 0)).to(tl.float64)


@triton.jit
def _deviation(scores_ptr, segment, inside, slope, bound):
    """w~ - 1 of ordinary segments."""
    phi = _finite(tl.load(scores_ptr + segment, mask=inside, other=0.0).to(tl.float32))
    return tl.where(inside, tl.minimum(tl.maximum(phi * slope, -bound), bound), 0.0)


@triton.jit(do_not_specialize=["num_tokens", "num_sequences", "num_partials", "bisections", "bound", "gain", "reliability", "scale"])
def _segment_credit_kernel(
    scores_ptr, token_offsets_ptr, sequence_offsets_ptr, advantages_ptr, terminal_ptr, mask_ptr, reliabilities_ptr, scales_ptr, partial_ptr,
    credit_ptr, weights_ptr, num_tokens, num_sequences, num_partials, bisections, bound, gain, reliability, scale,
    ADDITIVE: tl.constexpr, HAS_TERMINAL: tl.constexpr, HAS_MASK: tl.constexpr, RELIABILITIES: tl.constexpr, SCALE: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, STAT_ROWS: tl.constexpr, STAT_COLUMNS: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(0).to(tl.int64)
    sequence, first_slot, chunks, start, end, _ = _chunk(
        slot, token_offsets_ptr, sequence_offsets_ptr, num_tokens, num_sequences, bisections, True, CHUNK
    )  # fmt: skip
    own = slot - first_slot < chunks
    begin = start - (slot - first_slot) * CHUNK
    first = tl.load(sequence_offsets_ptr + sequence)
    after = tl.load(sequence_offsets_ptr + sequence + 1)
    last = _last_terminal(sequence, first, after, terminal_ptr, own, HAS_TERMINAL)
    others = after - first - (last >= 0)
    stop = tl.load(token_offsets_ptr + after)

    advantage = tl.load(advantages_ptr + sequence).to(tl.float32)
    rho = tl.full([], reliability, tl.float64)
    if RELIABILITIES == "tensor":
        rho = tl.load(reliabilities_ptr).to(tl.float64)
    elif RELIABILITIES == "sequences":
        rho = tl.load(reliabilities_ptr + sequence).to(tl.float64)
    per_scale = _reciprocal(scale)
    if SCALE == "tensor":
        scale = tl.load(scales_ptr).to(tl.float64)
        per_scale = _reciprocal(tl.where(scale < TINY, TINY, scale))  # whose inverse is a float32 as well: all but the smallest scores are clipped
    elif SCALE == "partials":
        total = tl.zeros([BLOCK], tl.float64)
        count = tl.zeros([BLOCK], tl.float64)
        for at in range(0, num_partials, BLOCK):
            which = at + tl.arange(0, BLOCK)
            total += tl.load(partial_ptr + 2 * which, mask=which < num_partials, other=0.0)
            count += tl.load(partial_ptr + 2 * which + 1, mask=which < num_partials, other=0.0)
        mean = tl.sum(total, axis=0) * _reciprocal(tl.maximum(tl.sum(count, axis=0), 1.0))
        per_scale = _reciprocal((mean * _inverse_root(mean) if ADDITIVE else mean) + 1e-6)
    elif SCALE == "scores":
        total = tl.zeros([STAT_ROWS, STAT_COLUMNS], tl.float64)
        count = tl.zeros([STAT_ROWS], tl.float64)
        for block in range(0, num_partials):
            more, number = _scores(
                block, scores_ptr, sequence_offsets_ptr, terminal_ptr, num_sequences, ADDITIVE, HAS_TERMINAL, STAT_ROWS, STAT_COLUMNS
            )  # fmt: skip
            total += more
            count += number
        mean = tl.sum(tl.sum(total, axis=1), axis=0) * _reciprocal(tl.maximum(tl.sum(count, axis=0), 1.0))
        per_scale = _reciprocal((mean * _inverse_root(mean) if ADDITIVE else mean) + 1e-6)

    lane = tl.arange(0, BLOCK)
    steps = bisections * 0
    span = after - first
    while span > 0:
        span = span // 2
        steps += 1
    slope = tl.full([], gain, tl.float64) * per_scale
    factor = tl.full([], 1.0, tl.float64)
    mean = tl.full([], 0.0, tl.float64)
    if not ADDITIVE:
        slope = tl.where(advantage > 0, slope, tl.where(advantage < 0, -slope, 0.0))
        bound = tl.full([], bound, tl.float64)
        total = tl.zeros([BLOCK], tl.float64)
        moved = tl.zeros([BLOCK], tl.float64)
        for at in range(first, after, BLOCK):
            segment = at + lane
            deviation = _deviation(scores_ptr, segment, (segment < after) & (segment != last), slope, bound)
            total += deviation
            if not HAS_MASK:
                inside = segment < after
                low = tl.load(token_offsets_ptr + segment, mask=inside, other=0)
                high = tl.load(token_offsets_ptr + segment + 1, mask=inside, other=0)
                moved += (high - low).to(tl.float64) * deviation
        mean = tl.sum(total, axis=0) * _reciprocal(tl.maximum(others, 1))
        if HAS_MASK:
            kept = tl.zeros([BLOCK], tl.int32)
            for at in range(begin, stop, BLOCK):
                token = at + lane
                inside = token < stop
                inside = inside & (tl.load(mask_ptr + token, mask=inside, other=0) != 0)
                segment = _segment_of(token, first, after, steps, token_offsets_ptr)
                deviation = _deviation(scores_ptr, segment, inside & (segment != last), slope, bound)
                moved += tl.where(inside & (segment == last), mean, deviation)
                kept += inside.to(tl.int32)
            tokens = tl.sum(kept, axis=0).to(tl.float64)
            sum_moved = tl.sum(moved, axis=0)
        else:
            tokens = (stop - begin).to(tl.float64)
            sum_moved = tl.sum(moved, axis=0)
            if HAS_TERMINAL:
                terminal_begin = tl.load(token_offsets_ptr + tl.maximum(last, 0), mask=last >= 0, other=0)
                sum_moved += tl.where(last >= 0, (stop - terminal_begin).to(tl.float64) * mean, 0.0)
        factor = tl.where(tokens > 0, tokens * _reciprocal(tl.where(tokens > 0, tokens + rho * sum_moved, 1.0)), 1.0)

    # Every program of a rollout has all its weights; the first writes them.
    for at in range(first, tl.where(own & (slot == first_slot), after, first), BLOCK):
        segment = at + lane
        inside = segment < after
        weight = tl.full([BLOCK], 1.0, tl.float64)
        if not ADDITIVE:
            deviation = _deviation(scores_ptr, segment, inside & (segment != last), slope, bound)
            deviation = tl.where(segment == last, mean, deviation)
            weight = tl.where(others >= 2, (1.0 + rho * deviation) * factor, 1.0)
        tl.store(weights_ptr + segment, weight.to(tl.float32), mask=inside)

    token = start + tl.arange(0, CHUNK)
    inside = own & (token < end)
    segment = _segment_of(token, first, after, steps, token_offsets_ptr)
    ordinary = inside & (segment != last)
    if ADDITIVE:
        phi = _finite(tl.load(scores_ptr + segment, mask=ordinary, other=0.0).to(tl.float32))
        shaping = rho * tl.full([], gain, tl.float64) * tl.minimum(tl.maximum(phi * per_scale, -3.0), 3.0)
        shaped = (advantage.to(tl.float64) + shaping).to(tl.float32)
        credit = tl.where(ordinary & (shaping != 0.0), shaped, advantage)  # -0.0 + 0.0 is not -0.0
    else:
        deviation = _deviation(scores_ptr, segment, ordinary, slope, bound)
        deviation = tl.where(segment == last, mean, deviation)
        weight = tl.where(others >= 2, (1.0 + rho * deviation) * factor, 1.0).to(tl.float32)
        credit = advantage * weight
    if HAS_MASK:
        credit = tl.where(tl.load(mask_ptr + token, mask=inside, other=0) != 0, credit, 0.0)
    tl.store(credit_ptr + token, credit, mask=inside)


@triton.jit
def _segment_of(token, first, after, steps, token_offsets_ptr):
    """The last segment of [first, after) that begins at or before the token: with empty ones the one that holds it."""
    low = token * 0 + first
    high = token * 0 + tl.maximum(after, first + 1)
    for _ in range(steps):
        middle = (low + high) // 2
        below = tl.load(token_offsets_ptr + middle) <= token
        low = tl.where(below, middle, low)
        high = tl.where(below, high, middle)
    return low


def segment_credit(
    scores, token_offsets, sequence_offsets, advantages, num_tokens, terminal_segments, mask, form, bound, gain, reliability, reliabilities,
    exclude_terminal, scale, scales,
):  # fmt: skip
    if scores.dtype == torch.float64:
        return _torch.segment_credit(
            scores, token_offsets, sequence_offsets, advantages, num_tokens, terminal_segments, mask, form, bound, gain, reliability, reliabilities,
            exclude_terminal, scale, scales,
        )  # fmt: skip
    sequences = sequence_offsets.shape[0] - 1
    credit = torch.empty(num_tokens, dtype=torch.float32, device=scores.device)
    weights = torch.empty(scores.shape, dtype=torch.float32, device=scores.device)
    if sequences == 0:
        return credit, weights
    scores, terminal = scores.contiguous(), compact(terminal_segments) if exclude_terminal else None
    common = {
        "ADDITIVE": form == "additive", "HAS_TERMINAL": terminal is not None, "STAT_ROWS": STAT_ROWS, "STAT_COLUMNS": STAT_COLUMNS,
        **LAUNCH,
    }  # fmt: skip
    kinds = "number" if reliabilities is None else "tensor" if reliabilities.ndim == 0 else "sequences"
    partial, num_partials = None, triton.cdiv(sequences, STAT_ROWS)
    programs = slots(num_tokens, sequences, "sequence")
    scaled = "number" if scale is not None else "tensor"
    if scale is None and scales is None:
        scaled = "scores" if 4 * programs * scores.shape[0] <= REDUNDANT else "partials"
    with device(scores):
        if scaled == "partials":
            partial = torch.empty(2 * num_partials, dtype=torch.float64, device=scores.device)
            _segment_credit_scale_kernel[(num_partials,)](scores, sequence_offsets, terminal, partial, sequences, **common)
        chunk = TILES["sequence"]["CHUNK"]
        _segment_credit_kernel[(programs,)](
            scores, token_offsets, sequence_offsets, advantages.contiguous(), terminal, compact(mask), compact(reliabilities), scales, partial,
            credit, weights, num_tokens, sequences, num_partials, bisections(sequences), float(bound), float(gain),
            1.0 if reliability is None else float(reliability), 1.0 if scale is None else float(scale), HAS_MASK=mask is not None,
            RELIABILITIES=kinds, SCALE=scaled, CHUNK=chunk, BLOCK=chunk, **common,
        )  # fmt: skip
    return credit, weights
