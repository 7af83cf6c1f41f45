"""CUDA kernels of `policy_loss`. The contract is in acpo_kernels/policy_loss.py.

Loss, metrics and both gradients in one launch: the loss of each token, its gradients, eleven partial sums a program; the program that
arrives last adds those, in the order of the programs, so that the same call gives the same bits (`_arrive` in ragged.py). Nothing
crosses programs before a gradient is written but two things: the number of unmasked tokens, where no denominator is given, and the mean
log-ratio of a unit longer than one chunk. Each program reads those by itself, programs x N and at most 9 N^2/CHUNK bytes (a unit that
holds all tokens). Below `REDUNDANT`, 16 MiB, that takes an H200 less than a launch would: up to N = 43,690 at sequence level, 15,447 at
segment level, and with a mask and no denominator N = 131,072. Above, a launch before leaves a count and a sum for each chunk.

Bytes a token: 4 for each vector that is given, 1 for the mask, and 4 for each gradient; nothing is read twice from HBM but log-probs and
mask of the two-launch forms. Sums are float64: the loss from the first addition on, the metrics past the 1024 tokens of a program, and
the log-ratios of a unit, whose order then shows in no float32 digit: a unit's ratio does not depend on how many launches there were.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .. import _torch
from .._results import METRICS
from .ragged import (
    LAUNCH,
    REDUNDANT,
    TILES,
    _arrive,
    _chunk,
    _exp_minus_1_minus,
    _exp_wide,
    _inverse_root,
    _reciprocal,
    arrivals,
    bisections,
    compact,
    device,
    slots,
)

INF = tl.constexpr(float("inf"))
LIMIT = tl.constexpr(20.0)  # of a log-ratio, as LOG_RATIO_LIMIT of reference.py
TINY = tl.constexpr(1.1754943508222875e-38)
PARTIALS = 32  # of a unit that are added at a time
COUNTED = 1024  # programs whose tokens are added at a time
MASKED = 4096  # bytes of the mask that are counted at a time: 16 a thread
COMBINED = 256  # programs whose eleven partial sums are added at a time, 44 registers of float64 a thread
SUMS = 11  # loss, tokens, clipped low, clipped high, ratio, its square, kl/old, kl/ref, entropy, minimum and maximum of the ratio


@triton.jit
def _limited(x):
    """Clamped to +-20; a NaN stays."""
    x = tl.where(x > LIMIT, LIMIT, x)
    return tl.where(x < -LIMIT, -LIMIT, x)


@triton.jit
def _difference(x, y):
    """0 of two that are -inf; a NaN stays."""
    return tl.where(x == y, 0.0, x - y)


@triton.jit
def _kept(token, inside, mask_ptr, HAS_MASK: tl.constexpr):
    if HAS_MASK:
        inside = inside & (tl.load(mask_ptr + token, mask=inside, other=0) != 0)
    return inside


@triton.jit
def _total(x):
    return tl.sum(tl.sum(x.to(tl.float32), axis=1), axis=0).to(tl.float64)


@triton.jit(do_not_specialize=["num_tokens", "num_units", "num_slots", "bisections"])
def _policy_loss_groups_kernel(
    logp_ptr, old_logp_ptr, mask_ptr, token_offsets_ptr, sequence_offsets_ptr, group_ptr, group_count_ptr, tokens_ptr,
    num_tokens, num_units, num_slots, bisections,
    GROUPS: tl.constexpr, HAS_OLD: tl.constexpr, HAS_MASK: tl.constexpr, SEQUENCE: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The unmasked tokens of each program, and of each chunk with the sum of their log-ratios."""
    slot = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    _, first, chunks, start, end, _ = _chunk(
        slot, token_offsets_ptr, sequence_offsets_ptr, num_tokens, num_units, bisections, SEQUENCE, CHUNK
    )  # fmt: skip
    own = (slot < num_slots) & (slot - first < chunks)
    token = start[:, None] + tl.arange(0, CHUNK)[None, :]
    total, count = _log_ratios(token, own[:, None] & (token < end[:, None]), logp_ptr, old_logp_ptr, mask_ptr, GROUPS, HAS_OLD, HAS_MASK)
    tl.store(tokens_ptr + tl.program_id(0), tl.sum(count, axis=0))
    if GROUPS:
        tl.store(group_ptr + slot, total, mask=own)
        tl.store(group_count_ptr + slot, count, mask=own)


@triton.jit
def _log_ratios(token, inside, logp_ptr, old_logp_ptr, mask_ptr, GROUPS: tl.constexpr, HAS_OLD: tl.constexpr, HAS_MASK: tl.constexpr):
    """Of each row of tokens: the sum of their log-ratios and their number, unmasked ones alone."""
    kept = _kept(token, inside, mask_ptr, HAS_MASK)
    log_ratio = tl.where(kept, 0.0, 0.0)
    if GROUPS:
        lp = tl.load(logp_ptr + token, mask=kept, other=0.0).to(tl.float32)
        old = tl.load(old_logp_ptr + token, mask=kept, other=0.0).to(tl.float32) if HAS_OLD else lp  # a NaN stays
        log_ratio = tl.where(kept, _limited(_difference(lp, old)), 0.0)
    return tl.sum(log_ratio.to(tl.float64), axis=1), tl.sum(kept.to(tl.int32), axis=1)


@triton.jit
def _token_loss(
    token, kept, lp, old, a, wide, wide_token_ratio, low, high, ref_logp_ptr, kl_weight, rollout_logp_ptr, rollout_cap, entropy_ptr,
    entropy_weight, entropy_weights_ptr,
    HAS_REF: tl.constexpr, HAS_ROLLOUT: tl.constexpr, HAS_ENTROPY: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
):  # fmt: skip
    """What a token adds before the denominator: its loss, the gradient of its log-prob, its entropy weight; and what the metrics want.

    The loss is a sum of terms that cancel: its own are kept in float64 (wide: the ratio), what is stored by the token is float32."""
    r = wide.to(tl.float32)
    token_ratio = wide_token_ratio.to(tl.float32)
    lowest = 1.0 - low
    highest = 1.0 + high
    clipped = tl.where(r < lowest, lowest, tl.where(r > highest, highest, r)) * a
    beyond = r * a > clipped
    loss = -tl.where(beyond, clipped.to(tl.float64), wide * a)
    grad = -tl.where(beyond, 0.0, r * a)  # a NaN stays one
    if HAS_ROLLOUT:
        drift = _exp_wide(_limited(_difference(old, tl.load(rollout_logp_ptr + token, mask=kept, other=0.0).to(tl.float32))))
        drift = tl.where(drift > rollout_cap, rollout_cap, drift)
        loss *= drift
        grad *= drift.to(tl.float32)
    kl = tl.zeros_like(lp)
    if HAS_REF:
        delta = _difference(tl.load(ref_logp_ptr + token, mask=kept, other=0.0).to(tl.float32), lp)
        limited = _limited(delta)
        k3 = _exp_minus_1_minus(limited)
        kl = token_ratio * k3
        # d(rho k3) = rho (k3 - (exp(delta) - 1)); nothing flows through a clamped delta
        loss += wide_token_ratio * k3 * kl_weight
        grad += kl_weight * token_ratio * tl.where(tl.abs(delta) > LIMIT, k3, -limited)
    h = tl.zeros_like(lp)
    weight = tl.zeros_like(lp) + entropy_weight
    if HAS_ENTROPY:
        h = tl.load(entropy_ptr + token, mask=kept, other=0.0).to(tl.float32)
        if HAS_WEIGHTS:
            weight = tl.load(entropy_weights_ptr + token, mask=kept, other=0.0).to(tl.float32)
        loss -= weight.to(tl.float64) * h

    return loss, grad, weight, kl, h, lowest, highest


@triton.jit(do_not_specialize=[
    "num_tokens", "num_units", "num_slots", "num_sequences", "bisections", "sequence_bisections", "num_programs", "low", "high",
    "entropy_weight", "kl_weight", "rollout_cap", "denominator",
])  # fmt: skip
def _policy_loss_kernel(
    logp_ptr, old_logp_ptr, advantages_ptr, mask_ptr, token_offsets_ptr, sequence_offsets_ptr, entropy_ptr, entropy_weights_ptr, ref_logp_ptr,
    rollout_logp_ptr, denominators_ptr, group_ptr, group_count_ptr, tokens_ptr, grad_logp_ptr, grad_entropy_ptr, sums_ptr, arrivals_ptr, loss_ptr,
    metrics_ptr, num_tokens, num_units, num_slots, num_sequences, bisections, sequence_bisections, num_programs, low, high, entropy_weight, kl_weight,
    rollout_cap, denominator,
    GROUPS: tl.constexpr, ALONE: tl.constexpr, SQRT: tl.constexpr, HAS_OLD: tl.constexpr, HAS_MASK: tl.constexpr, HAS_ENTROPY: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr, HAS_REF: tl.constexpr, HAS_ROLLOUT: tl.constexpr, DENOMINATOR: tl.constexpr, SEQUENCE: tl.constexpr,
    ROWS: tl.constexpr, CHUNK: tl.constexpr, PARTIALS: tl.constexpr, COUNTED: tl.constexpr, MASKED: tl.constexpr, COMBINED: tl.constexpr,
):  # fmt: skip
    """ALONE: no launch before this one has left the sums of each chunk."""
    program = tl.program_id(0)
    slot = program.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    unit, first, chunks, start, end, unit_end = _chunk(
        slot, token_offsets_ptr, sequence_offsets_ptr, num_tokens, num_units, bisections, SEQUENCE, CHUNK
    )  # fmt: skip
    own = (slot < num_slots) & (slot - first < chunks)
    token = start[:, None] + tl.arange(0, CHUNK)[None, :]
    inside = own[:, None] & (token < end[:, None])
    kept = _kept(token, inside, mask_ptr, HAS_MASK)

    lp = tl.load(logp_ptr + token, mask=kept, other=0.0).to(tl.float32)
    old = tl.load(old_logp_ptr + token, mask=kept, other=0.0).to(tl.float32) if HAS_OLD else lp
    a = tl.load(advantages_ptr + token, mask=kept, other=0.0).to(tl.float32)
    log_ratio = _limited(_difference(lp, old))
    wide_token_ratio = _exp_wide(log_ratio)
    wide = wide_token_ratio
    if GROUPS:
        sums = tl.zeros([ROWS, PARTIALS], tl.float64)
        counts = tl.zeros([ROWS, PARTIALS], tl.int32)
        most = tl.max(tl.where(own, chunks, 0), axis=0)
        if ALONE:
            begin = start - (slot - first) * CHUNK
            for chunk in range(0, most):
                tokens = begin[:, None] + chunk * CHUNK + tl.arange(0, CHUNK)[None, :]
                total, number = _log_ratios(
                    tokens, own[:, None] & (tokens < unit_end[:, None]), logp_ptr, old_logp_ptr, mask_ptr, True, HAS_OLD, HAS_MASK
                )  # fmt: skip
                here = tl.arange(0, PARTIALS)[None, :] == chunk % PARTIALS
                sums += tl.where(here, total[:, None], 0.0)
                counts += tl.where(here, number[:, None], 0)
        else:
            for at in range(0, most, PARTIALS):
                which = at + tl.arange(0, PARTIALS)
                there = own[:, None] & (which[None, :] < chunks[:, None])
                sums += tl.load(group_ptr + first[:, None] + which[None, :], mask=there, other=0.0)
                counts += tl.load(group_count_ptr + first[:, None] + which[None, :], mask=there, other=0)
        count = tl.maximum(tl.sum(counts, axis=1), 1).to(tl.float32)  # [ROWS]
        wide = tl.zeros_like(wide) + _exp_wide((tl.sum(sums, axis=1) * _reciprocal(count)).to(tl.float32))[:, None]
        if SQRT:
            narrower = _inverse_root(count)[:, None]
            low, high = (narrower * low).to(tl.float32), (narrower * high).to(tl.float32)
    r = wide.to(tl.float32)
    loss, grad, weight, kl, h, lowest, highest = _token_loss(
        token, kept, lp, old, a, wide, wide_token_ratio, low, high, ref_logp_ptr, kl_weight, rollout_logp_ptr, rollout_cap, entropy_ptr,
        entropy_weight, entropy_weights_ptr, HAS_REF, HAS_ROLLOUT, HAS_ENTROPY, HAS_WEIGHTS,
    )  # fmt: skip

    if DENOMINATOR == "count":
        if ALONE:
            found = tl.zeros([MASKED], tl.int32)
            byte = tl.arange(0, MASKED)
            whole = num_tokens // MASKED * MASKED
            for at in range(0, whole, MASKED):
                found += tl.load(mask_ptr + at + byte) != 0
            found += tl.load(mask_ptr + whole + byte, mask=whole + byte < num_tokens, other=0) != 0
        else:
            found = tl.zeros([COUNTED], tl.int32)
            for at in range(0, num_programs, COUNTED):
                which = at + tl.arange(0, COUNTED)
                found += tl.load(tokens_ptr + which, mask=which < num_programs, other=0)
        over = tl.maximum(tl.sum(found, axis=0), 1).to(tl.float32)
    elif DENOMINATOR == "number":
        over = denominator
    elif DENOMINATOR == "tensor":
        over = tl.load(denominators_ptr).to(tl.float32)
    elif DENOMINATOR == "sequences":
        sequence = unit
        if not SEQUENCE:
            sequence = _sequence_of(unit, num_sequences, sequence_bisections, sequence_offsets_ptr)
        over = tl.load(denominators_ptr + sequence).to(tl.float32)[:, None]
    else:
        over = tl.load(denominators_ptr + token, mask=kept, other=1.0).to(tl.float32)
    share = _reciprocal(over)
    tl.store(grad_logp_ptr + token, tl.where(kept, (grad * share).to(tl.float32), 0.0), mask=inside)
    if HAS_ENTROPY:
        tl.store(grad_entropy_ptr + token, tl.where(kept, (-weight * share).to(tl.float32), 0.0), mask=inside)

    zero = 0.0
    out = sums_ptr + program
    tl.store(out, tl.sum(tl.sum(tl.where(kept, loss * share, 0.0), axis=1), axis=0))
    tl.store(out + num_programs, _total(kept))
    tl.store(out + 2 * num_programs, _total(kept & (r < lowest) & (a < 0)))
    tl.store(out + 3 * num_programs, _total(kept & (r > highest) & (a > 0)))
    tl.store(out + 4 * num_programs, _total(tl.where(kept, r, zero)))
    tl.store(out + 5 * num_programs, _total(tl.where(kept, r * r, zero)))
    tl.store(out + 6 * num_programs, _total(tl.where(kept, _exp_minus_1_minus(-log_ratio), zero)))
    tl.store(out + 7 * num_programs, _total(tl.where(kept, kl, zero)))
    tl.store(out + 8 * num_programs, _total(tl.where(kept, h, zero)))
    tl.store(out + 9 * num_programs, tl.min(tl.min(tl.where(kept, r, INF), axis=1), axis=0).to(tl.float64))
    tl.store(out + 10 * num_programs, tl.max(tl.max(tl.where(kept, r, -INF), axis=1), axis=0).to(tl.float64))
    if _arrive(arrivals_ptr, num_programs, program >= 0):
        _combine(sums_ptr, loss_ptr, metrics_ptr, num_programs, COMBINED)


@triton.jit
def _sequence_of(segment, num_sequences, bisections, sequence_offsets_ptr):
    low = segment * 0
    high = low + num_sequences
    for _ in range(bisections):
        middle = (low + high) // 2
        below = tl.load(sequence_offsets_ptr + middle) <= segment
        low = tl.where(below, middle, low)
        high = tl.where(below, high, middle)
    return low


@triton.jit
def _column(sums_ptr, column, at, num_programs, other, COMBINED: tl.constexpr):
    which = at + tl.arange(0, COMBINED)
    return tl.load(sums_ptr + column * num_programs + which, mask=which < num_programs, other=other, cache_modifier=".cg")


@triton.jit
def _combine(sums_ptr, loss_ptr, metrics_ptr, num_programs, COMBINED: tl.constexpr):
    loss = tl.zeros([COMBINED], tl.float64)
    tokens, low, high, ratio, square, old, ref, entropy = loss, loss, loss, loss, loss, loss, loss, loss
    least = loss + INF
    most = loss - INF
    for at in range(0, num_programs, COMBINED):
        loss += _column(sums_ptr, 0, at, num_programs, 0.0, COMBINED)
        tokens += _column(sums_ptr, 1, at, num_programs, 0.0, COMBINED)
        low += _column(sums_ptr, 2, at, num_programs, 0.0, COMBINED)
        high += _column(sums_ptr, 3, at, num_programs, 0.0, COMBINED)
        ratio += _column(sums_ptr, 4, at, num_programs, 0.0, COMBINED)
        square += _column(sums_ptr, 5, at, num_programs, 0.0, COMBINED)
        old += _column(sums_ptr, 6, at, num_programs, 0.0, COMBINED)
        ref += _column(sums_ptr, 7, at, num_programs, 0.0, COMBINED)
        entropy += _column(sums_ptr, 8, at, num_programs, 0.0, COMBINED)
        least = tl.minimum(least, _column(sums_ptr, 9, at, num_programs, INF, COMBINED))
        most = tl.maximum(most, _column(sums_ptr, 10, at, num_programs, -INF, COMBINED))
    n = tl.sum(tokens, axis=0)
    safe = tl.maximum(n, 1.0)
    share = _reciprocal(safe)
    total = tl.sum(ratio, axis=0)
    bad = total != total
    nan = float("nan")
    tl.store(loss_ptr, tl.sum(loss, axis=0).to(tl.float32))
    tl.store(metrics_ptr, n.to(tl.float32))
    tl.store(metrics_ptr + 1, (tl.sum(low, axis=0) * share).to(tl.float32))
    tl.store(metrics_ptr + 2, (tl.sum(high, axis=0) * share).to(tl.float32))
    tl.store(metrics_ptr + 3, (total * share).to(tl.float32))
    tl.store(metrics_ptr + 4, tl.where(bad, nan, tl.min(least, axis=0).to(tl.float32)))
    tl.store(metrics_ptr + 5, tl.where(bad, nan, tl.max(most, axis=0).to(tl.float32)))
    squares = safe * tl.sum(square, axis=0)
    tl.store(metrics_ptr + 6, (total * total * _reciprocal(tl.where(squares < TINY, TINY, squares))).to(tl.float32))
    tl.store(metrics_ptr + 7, (tl.sum(old, axis=0) * share).to(tl.float32))
    tl.store(metrics_ptr + 8, (tl.sum(ref, axis=0) * share).to(tl.float32))
    tl.store(metrics_ptr + 9, (tl.sum(entropy, axis=0) * share).to(tl.float32))


def _denominator(denominator, denominators, n: int, mask) -> tuple[str, float]:
    if denominators is not None:
        return ("tensor" if denominators.ndim == 0 else "tokens" if denominators.shape[0] == n else "sequences"), 1.0
    if denominator is None:
        return ("number", float(max(n, 1))) if mask is None else ("count", 1.0)
    return "number", float(denominator)


def policy_loss(
    logp, old_logp, advantages, token_offsets, sequence_offsets, mask, clip_low, clip_high, ratio, entropy, entropy_weight, entropy_weights,
    ref_logp, kl_weight, rollout_logp, rollout_cap, denominator, denominators,
):  # fmt: skip
    if logp.dtype == torch.float64 or logp.shape[0] == 0:
        return _torch.policy_loss(
            logp, old_logp, advantages, token_offsets, sequence_offsets, mask, clip_low, clip_high, ratio, entropy, entropy_weight, entropy_weights,
            ref_logp, kl_weight, rollout_logp, rollout_cap, denominator, denominators,
        )  # fmt: skip
    n, where = logp.shape[0], logp.device
    new = lambda *shape, dtype=torch.float32: torch.empty(shape, dtype=dtype, device=where)  # noqa: E731
    loss, metrics, grad_logp, grad_entropy = new(), new(len(METRICS)), new(n), new(0 if entropy is None else n)
    level, groups = "segment" if ratio == "segment" else "sequence", ratio != "token"
    tile, sequences = TILES[level], sequence_offsets.shape[0] - 1
    units = token_offsets.shape[0] - 1 if level == "segment" else sequences
    num_slots = slots(n, units, level)
    programs = triton.cdiv(num_slots, tile["ROWS"])
    kind, number = _denominator(denominator, denominators, n, mask)
    again = (9 * n * n // tile["CHUNK"] if groups else 0) + (programs * n if kind == "count" else 0)
    alone = again <= REDUNDANT
    group, group_count, tokens = None, None, None
    logp, old_logp, mask = compact(logp), compact(old_logp), compact(mask)
    common = {
        "GROUPS": groups, "HAS_OLD": old_logp is not None, "HAS_MASK": mask is not None, "SEQUENCE": level == "sequence", **tile, **LAUNCH,
    }  # fmt: skip
    with device(logp):
        if not alone:
            tokens = new(programs, dtype=torch.int32)
            if groups:
                group, group_count = new(num_slots, dtype=torch.float64), new(num_slots, dtype=torch.int32)
            _policy_loss_groups_kernel[(programs,)](
                logp, old_logp, mask, token_offsets, sequence_offsets, group, group_count, tokens, n, units, num_slots, bisections(units), **common
            )
        _policy_loss_kernel[(programs,)](
            logp, old_logp, compact(advantages), mask, token_offsets, sequence_offsets, compact(entropy), compact(entropy_weights),
            compact(ref_logp), compact(rollout_logp), compact(denominators), group, group_count, tokens, grad_logp, grad_entropy,
            new(SUMS * programs, dtype=torch.float64), arrivals(1, logp), loss, metrics,
            n, units, num_slots, sequences, bisections(units), bisections(sequences), programs, float(clip_low), float(clip_high),
            float(entropy_weight or 0.0), float(kl_weight), float(rollout_cap), number,
            ALONE=alone, SQRT=ratio == "segment", HAS_ENTROPY=entropy is not None, HAS_WEIGHTS=entropy_weights is not None,
            HAS_REF=ref_logp is not None, HAS_ROLLOUT=rollout_logp is not None, DENOMINATOR=kind, PARTIALS=PARTIALS, COUNTED=COUNTED,
            MASKED=MASKED, COMBINED=COMBINED, **common,
        )  # fmt: skip
    return loss, metrics, grad_logp, grad_entropy
