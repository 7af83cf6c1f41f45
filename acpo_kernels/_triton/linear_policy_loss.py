"""`linear_policy_loss` on CUDA. Nothing is read back: which rows count, and which of them have a gradient, is found on the device.

In one sweep, (2u + 4a) N H V operations: the rows that count go by in chunks of ROWS. Of each chunk the forward product leaves the
float32 logits in one workspace of ROWS x V, whatever N is, and the statistics in its epilogue; one program makes the gradients of the
chunk's log-probs and entropies, and the list of its rows whose gradient is not exactly zero; the products of linear_gradients.py take
those rows' logits from the workspace and add to a float32 gradient of the weight. A chunk past the last row launches kernels that find
no work. In two phases, (2u + 6a) N H V: forward, loss, and the backward, which computes the logits of rows with a gradient again.

Two phases where a ratio is a mean over other rows (segment or sequence level with old_logp), and where holding the logits costs more than
the product it saves. A row's logits are written and read, 8 V bytes, and a chunk reads and writes the weight's gradient, 8 V H bytes; the
product takes 2 H V operations a row. With `BALANCE` operations in the time of a byte, the share of that product that holding costs is

    4 BALANCE (1/ROWS + 1/H),   BALANCE = 165 on an H200 (790 TF/s over 4.8 TB/s), 31 for 3xTF32

ROWS fills 2 GiB: 3,456 at V = 151,936. In 16 bits that is a share of 0.35 at H = 4096, 0.51 at 2048, 0.62 at 1536, 0.93 at 896: of the
eight parts of two phases with a gradient in every row, one sweep saves 1.3, 1.0, 0.8 and nothing. It is taken below a share of 0.7, that is
from H = 1,297 on at that V: epilogues are not hidden behind products. Where few rows have a gradient two phases are cheaper than this says,
but how many is not known on the host. Not measured on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._linear_loss import in_one_sweep
from ..reference import active_rows
from . import linear_gradients, linear_logprob_entropy
from .linear_tiles import ROW_BLOCK, Head, Rows, aligned_width, counted_rows
from .policy_loss import _denominator, _difference, _limited, _token_loss
from .ragged import _exp_wide, _reciprocal, _unit_begin, bisections, compact, device

WORKSPACE = 2**31  # bytes
BALANCE = {2: 165, 4: 31}  # operations in the time of a byte, by the size of an element
SHARE = 0.7
BLOCK = 1024  # rows of a chunk whose gradients are made at a time


def chunk_rows(vocab: int) -> int:
    """ROWS: whole row tiles, as many as the workspace holds and at most 4,096, where a weight's gradient that is read and written adds a
    sixth to the share of H = 4096."""
    return max(ROW_BLOCK, min(4096, WORKSPACE // (4 * aligned_width(vocab))) // ROW_BLOCK * ROW_BLOCK)


def holding_pays(vocab: int, width: int, element_size: int) -> bool:
    return 4 * BALANCE[element_size] * (1 / chunk_rows(vocab) + 1 / width) < SHARE


@triton.jit(do_not_specialize=["rows", "chunks"])
def _chunks_kernel(count_ptr, counts_ptr, rows, chunks, BLOCK: tl.constexpr):
    """How many rows each chunk holds, 16 bytes apart."""
    count = tl.load(count_ptr)
    for start in range(0, chunks, BLOCK):
        chunk = start + tl.arange(0, BLOCK)
        tl.store(counts_ptr + 4 * chunk, tl.minimum(tl.maximum(count - chunk * rows, 0), rows), mask=chunk < chunks)


@triton.jit(do_not_specialize=[
    "num_sequences", "bisections", "low", "high", "entropy_weight", "kl_weight", "rollout_cap", "denominator",
])  # fmt: skip
def _row_gradients_kernel(
    index_ptr, count_ptr, total_ptr, logp_ptr, old_logp_ptr, advantages_ptr, token_offsets_ptr, sequence_offsets_ptr, entropy_ptr,
    entropy_weights_ptr, ref_logp_ptr, rollout_logp_ptr, denominators_ptr, grad_logp_ptr, grad_entropy_ptr, some_index_ptr, places_ptr,
    some_count_ptr, num_sequences, bisections, low, high, entropy_weight, kl_weight, rollout_cap, denominator,
    HAS_OLD: tl.constexpr, HAS_WEIGHTS: tl.constexpr, HAS_REF: tl.constexpr, HAS_ROLLOUT: tl.constexpr, DENOMINATOR: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradients of a chunk's log-probs and entropies, and its rows with one that is not exactly zero: row, and place in the chunk."""
    count = tl.load(count_ptr)
    found = 0
    for start in range(0, count, BLOCK):
        place = start + tl.arange(0, BLOCK)
        kept = place < count
        token = tl.load(index_ptr + place, mask=kept, other=0)
        lp = tl.load(logp_ptr + token, mask=kept, other=0.0)
        old = tl.load(old_logp_ptr + token, mask=kept, other=0.0).to(tl.float32) if HAS_OLD else lp
        a = tl.load(advantages_ptr + token, mask=kept, other=0.0).to(tl.float32)
        ratio = _exp_wide(_limited(_difference(lp, old)))
        _, grad, weight, _, _, _, _ = _token_loss(
            token, kept, lp, old, a, ratio, ratio, low, high, ref_logp_ptr, kl_weight, rollout_logp_ptr, rollout_cap, entropy_ptr,
            entropy_weight, entropy_weights_ptr, HAS_REF, HAS_ROLLOUT, True, HAS_WEIGHTS,
        )  # fmt: skip
        if DENOMINATOR == "count":
            over = tl.maximum(tl.load(total_ptr), 1).to(tl.float32)
        elif DENOMINATOR == "number":
            over = denominator
        elif DENOMINATOR == "tensor":
            over = tl.load(denominators_ptr).to(tl.float32)
        elif DENOMINATOR == "sequences":
            first = token * 0
            after = first + num_sequences
            for _ in range(bisections):
                middle = (first + after) // 2
                below = _unit_begin(middle, token_offsets_ptr, sequence_offsets_ptr, True) <= token
                first = tl.where(below, middle, first)
                after = tl.where(below, after, middle)
            over = tl.load(denominators_ptr + first).to(tl.float32)
        else:
            over = tl.load(denominators_ptr + token, mask=kept, other=1.0).to(tl.float32)
        share = _reciprocal(over)
        of_logp, of_entropy = (grad * share).to(tl.float32), (-weight * share).to(tl.float32)
        tl.store(grad_logp_ptr + token, of_logp, mask=kept)
        tl.store(grad_entropy_ptr + token, of_entropy, mask=kept)
        some = kept & ((of_logp != 0.0) | (of_entropy != 0.0))  # a NaN is not 0
        at = found + tl.cumsum(some.to(tl.int32), 0) - 1
        tl.store(some_index_ptr + at, token, mask=some)
        tl.store(places_ptr + at, place, mask=some)
        found += tl.sum(some.to(tl.int32), 0)
    tl.store(some_count_ptr, found)


def forward(
    hidden: Tensor, weight: Tensor, ids: Tensor, bias: Tensor | None, temperature, temperatures, softcap, old_logp, advantages, token_offsets,
    sequence_offsets, mask, clip_low, clip_high, ratio, entropy_weight, entropy_weights, ref_logp, kl_weight, rollout_logp, rollout_cap,
    denominator, denominators, needs,
) -> tuple[Tensor, ...]:  # fmt: skip
    """loss, metrics, logp, entropy, and the float32 gradients of hidden, weight and bias (empty where not needed) for a loss gradient of 1."""
    head = (hidden, weight, ids, bias, temperature, temperatures, softcap, mask)
    active = active_rows(ids, mask)

    def loss_of(logp, entropy):
        return torch.ops.acpo_kernels.policy_loss(
            logp, old_logp, advantages, token_offsets, sequence_offsets, active, clip_low, clip_high, ratio, entropy, entropy_weight,
            entropy_weights, ref_logp, kl_weight, rollout_logp, rollout_cap, denominator, denominators,
        )  # fmt: skip

    if any(needs) and ids.shape[0] and in_one_sweep(ratio, old_logp) and holding_pays(*weight.shape, hidden.element_size()):
        of_loss = (
            old_logp, advantages, token_offsets, sequence_offsets, clip_low, clip_high, entropy_weight, entropy_weights, ref_logp, kl_weight,
            rollout_logp, rollout_cap, denominator, denominators,
        )  # fmt: skip
        logp, entropy, *grads = _sweep(*head, *of_loss, needs)
        loss, metrics, _, _ = loss_of(logp, entropy)
    else:
        logp, *statistics = linear_logprob_entropy.forward(*head)
        entropy = statistics[0]
        loss, metrics, *upstream = loss_of(logp, entropy)
        grads = linear_gradients.backward(*head, *upstream, statistics, needs, dtype=torch.float32)
    return loss, metrics, logp, entropy, *grads


def _sweep(
    hidden, weight, ids, bias, temperature, temperatures, softcap, mask, old_logp, advantages, token_offsets, sequence_offsets, clip_low, clip_high,
    entropy_weight, entropy_weights, ref_logp, kl_weight, rollout_logp, rollout_cap, denominator, denominators, needs,
):  # fmt: skip
    """logp, entropy and the gradients."""
    n, vocab = ids.shape[0], weight.shape[0]
    floats, integers = (dict(dtype=dtype, device=hidden.device) for dtype in (torch.float32, torch.int32))
    need_hidden, need_weight, need_bias = needs
    out = (
        torch.zeros(hidden.shape if need_hidden else (0,), **floats), torch.empty(weight.shape if need_weight else (0,), **floats),
        torch.empty(vocab if need_bias else 0, **floats),
    )  # fmt: skip
    results = tuple(torch.zeros(n, **floats) for _ in range(4))
    upstream = tuple(torch.empty(n, **floats) for _ in range(2))
    kind, number = _denominator(denominator, denominators, n, mask)
    kind = "count" if denominator is None and denominators is None else kind  # ids == -100 leave rows out too
    rows, sequences = chunk_rows(vocab), sequence_offsets.shape[0] - 1
    vectors = [compact(x) for x in (old_logp, advantages, entropy_weights, ref_logp, rollout_logp, denominators)]
    old_logp, advantages, entropy_weights, ref_logp, rollout_logp, denominators = vectors
    with device(hidden):
        head = Head.of(weight, ids, bias, temperature, temperatures, softcap)
        every = counted_rows(head.ids, mask)
        chunks = triton.cdiv(n, rows)
        counts, some_count = torch.empty(chunks, 4, **integers), torch.empty(1, **integers)
        some_index, places = (torch.empty(rows, **integers) for _ in range(2))
        logits = torch.empty(rows, aligned_width(vocab), **floats)
        _chunks_kernel[(1,)](every.count, counts, rows, chunks, BLOCK=256)
        for chunk in range(chunks):
            index = every.index[chunk * rows :]
            here = Rows(counts[chunk, :1], index, None, min(rows, index.shape[0]))
            linear_logprob_entropy.product(head, here, here.gather(hidden), results, logits)
            _row_gradients_kernel[(1,)](
                index, here.count, every.count, results[0], old_logp, advantages, token_offsets, sequence_offsets, results[1], entropy_weights,
                ref_logp, rollout_logp, denominators, *upstream, some_index, places, some_count, sequences, bisections(sequences),
                float(clip_low), float(clip_high), float(entropy_weight or 0.0), float(kl_weight), float(rollout_cap), number,
                HAS_OLD=old_logp is not None, HAS_WEIGHTS=entropy_weights is not None, HAS_REF=ref_logp is not None,
                HAS_ROLLOUT=rollout_logp is not None, DENOMINATOR=kind, BLOCK=BLOCK, num_warps=8,
            )  # fmt: skip
            some = Rows(some_count, some_index, None, here.padded)
            held = linear_gradients.Held(logits, places)
            linear_gradients.add(head, some, hidden, *upstream, results[1:], out, held, more=chunk > 0)
    return results[0], results[1], *out
