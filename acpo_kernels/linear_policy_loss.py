"""From hidden states to the policy loss: the trainer's path."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import _checks as check
from . import _cpu, _linear_loss, reference
from ._library import define, number_or_tensor, once_differentiable, transformed
from ._results import METRICS, LinearPolicyLoss
from .policy_loss import check_arguments
from .segments import Segments, check_segments


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    old_logp: Tensor | None,
    advantages: Tensor,
    segments: Segments,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    mask: Tensor | None = None,
    clip: tuple[float, float] = (0.2, 0.28),
    ratio: str = "token",
    entropy_weight: float | Tensor | None = None,
    ref_logp: Tensor | None = None,
    kl_weight: float = 0.0,
    rollout_logp: Tensor | None = None,
    rollout_cap: float = 2.0,
    denominator: float | Tensor | None = None,
    impl: str | None = None,
) -> LinearPolicyLoss:
    """The policy loss from hidden states: `policy_loss` of the log-probs and entropies that `linear_logprob_entropy` gives.

        loss = sum_t l_t(logp_t, H_t) / denominator_t,   (logp, H) = linear_logprob_entropy(hidden, weight, ids)

    The gradients of hidden, weight and bias are computed with the loss, where grad is enabled and a leaf needs one, for an incoming
    gradient of 1; the backward multiplies them by the one that comes. Masked rows take part in no matrix product; an unmasked row whose gradient
    is exactly zero (clipped; or advantage, KL and entropy weight all 0) takes part in the forward product alone: with shares u of
    unmasked rows and a of rows with a gradient, (2u + 4a) N H V floating-point operations. A ratio that is a mean over other rows
    (segment or sequence level with old_logp) needs a forward of its own before the first gradient, (2u + 6a) N H V; so do 16-bit hidden
    states on CUDA where H is below some 1,300 and holding logits would cost more than the product (_triton/linear_policy_loss.py).
    No N x V tensor exists: the CPU holds the logits of 256 rows in float32, twice that while it closes the gaps that rows without a
    gradient leave; CUDA those of a number of rows that follows from V, 2 GiB.

    Shapes
        hidden [N,H], weight [V,H], ids, old_logp, advantages [N]; the others as in the two operations. logp and entropy [N] come back detached.
    Dtypes
        As `linear_logprob_entropy`. Gradients are held in float32 (float64) until the backward and rounded once. On the CPU those of bfloat16
        and float16 are held rounded, at half the memory; an incoming gradient that would round them once more (any but 1 and, in bfloat16,
        powers of two) makes the backward compute them again.
    Units
        Nats; rows with mask=False or ids == -100 take no part. An unmasked row that holds NaN makes the loss and the gradients of
        weight and bias NaN, and its own gradient of hidden. Second derivatives raise.
    Errors
        Those of the two operations.
    Source
        Those of the two operations; gradients in the forward as in Liger's fused linear losses.
    """
    check.implementation(impl)
    check_segments(segments)
    check.tensor("hidden", hidden, check.FLOAT, ndim=2)
    check.tensor("weight", weight, check.FLOAT, ndim=2)
    hidden, weight, bias = check.autocast(hidden, weight, bias)
    check.head(hidden, weight, ids, bias, temperature, softcap, mask)
    check.tensor("ids", ids, check.INTEGER, shape=(segments.num_tokens,), shape_name="[N] of segments", device=segments.device)
    low, high = check_arguments(
        segments, clip, ratio, kl_weight, rollout_cap, entropy_weight, denominator,
        (("advantages", advantages),), (("old_logp", old_logp), ("ref_logp", ref_logp), ("rollout_logp", rollout_logp)),
    )  # fmt: skip
    if kl_weight > 0 and ref_logp is None:
        raise ValueError("ref_logp must be given with kl_weight > 0, got None")
    if impl == "reference":
        check.ids_in_range(ids, reference.active_rows(ids, mask), weight.shape[0])
        return reference.linear_policy_loss(
            hidden, weight, ids, old_logp, advantages, segments, bias=bias, temperature=temperature, softcap=softcap, mask=mask, clip=clip,
            ratio=ratio, entropy_weight=entropy_weight, ref_logp=ref_logp, kl_weight=kl_weight, rollout_logp=rollout_logp,
            rollout_cap=rollout_cap, denominator=denominator,
        )  # fmt: skip
    grad, unknown = torch.is_grad_enabled(), not torch.compiler.is_compiling() and transformed()
    needs = [grad and x is not None and (unknown or x.requires_grad) for x in (hidden, weight, bias)]
    loss, metrics, logp, entropy, *_ = _op(
        hidden, weight, ids, bias, *number_or_tensor(temperature), softcap, old_logp, advantages, segments.token_offsets,
        segments.sequence_offsets, mask, low, high, ratio, *number_or_tensor(entropy_weight), ref_logp, kl_weight, rollout_logp, rollout_cap,
        *number_or_tensor(denominator), needs,
    )  # fmt: skip
    return LinearPolicyLoss(loss, dict(zip(METRICS, metrics.unbind(), strict=True)), logp, entropy)


# The results of the operation are loss, metrics [10], logp and entropy [N], and the gradients of hidden [N,H], weight [V,H] and
# bias [V] for an incoming gradient of 1, in the working dtype; those of hidden and weight on the CPU in their own. One that `needs` does
# not ask for is empty, of shape [0].


def _forward_cpu(hidden, weight, ids, bias, temperature, temperatures, softcap, old_logp, advantages, token_offsets, sequence_offsets, mask, *rest):
    active = reference.active_rows(ids, mask)
    check.ids_in_range(ids, active, weight.shape[0])
    head = (hidden, weight, ids, bias, temperature, temperatures, softcap)
    if not _cpu.available or hidden.dtype == torch.float64:
        results, _ = _linear_loss.linear_policy_loss_cpu(*head, old_logp, advantages, token_offsets, sequence_offsets, active, *rest)
        return *results[:4], results[4].to(hidden.dtype), results[5].to(weight.dtype), results[6]
    return _cpu.linear_policy_loss(*head, old_logp, advantages, token_offsets, sequence_offsets, active, *rest)


def _forward_cuda(hidden, *rest):
    if hidden.dtype == torch.float64:
        return _linear_loss.linear_policy_loss(hidden, *rest)
    from ._triton import linear_policy_loss as kernels

    return kernels.forward(hidden, *rest)


def _fake(hidden, weight, ids, *rest):
    dtype, needs = reference.working_dtype(hidden.dtype), rest[-1]
    shapes = [(), (len(METRICS),), ids.shape, ids.shape]
    shapes += [shape if need else (0,) for shape, need in zip((hidden.shape, weight.shape, weight.shape[:1]), needs, strict=True)]
    dtypes = [dtype] * 4 + ([hidden.dtype] * 2 if hidden.device.type == "cpu" else [dtype] * 2) + [dtype]
    return tuple(hidden.new_empty(shape, dtype=kind) for shape, kind in zip(shapes, dtypes, strict=True))


def _setup_context(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.dtypes = [None if x is None else x.dtype for x in (inputs[0], inputs[1], inputs[3])]
    ctx.needs = inputs[-1]
    again = output[4].dtype != reference.working_dtype(inputs[0].dtype)  # held rounded
    tensors = [x for x in inputs if isinstance(x, Tensor)] if again else []
    ctx.rest = [None if isinstance(x, Tensor) else (x,) for x in inputs] if again else None
    ctx.save_for_backward(*output[4:], output[0], *tensors)


def _backward(ctx, grad_loss, *_):
    grads = [None] * len(ctx.needs_input_grad)
    if grad_loss is not None:
        *held, bias = ctx.saved_tensors[:3]
        if ctx.rest is not None and not _is_one(grad_loss):
            tensors = iter(ctx.saved_tensors[4:])
            inputs = [next(tensors) if value is None else value[0] for value in ctx.rest]
            *held, bias = _scaled_op(grad_loss, *held, bias, *inputs)
            grad_loss = torch.ones_like(grad_loss)
        for at, grad, dtype, need in zip((0, 1, 3), (*held, bias), ctx.dtypes, ctx.needs, strict=True):
            if need:
                grads[at] = _scaled(grad, grad_loss, dtype)
    return tuple(grads)


def _is_one(grad_loss: Tensor) -> bool:
    return type(grad_loss) is Tensor and grad_loss.device.type == "cpu" and not torch.compiler.is_compiling() and grad_loss.item() == 1.0


def _scaled(grad: Tensor, by: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient of weight is as large as the weight itself: on the host a factor of 1 costs no pass over it."""
    if _is_one(by):
        return grad if dtype == grad.dtype else _cpu.empty(grad.shape, dtype).copy_(grad)
    return (grad * by).to(dtype)


def _scaled_cpu(by, grad_hidden, grad_weight, grad_bias, *inputs):
    """Gradients that are held rounded, times `by`, rounded once."""
    grads, factor = (grad_hidden, grad_weight, grad_bias), by.item()
    exact = math.frexp(factor)[0] in (0.5, -0.5) and (grad_hidden.dtype == torch.bfloat16 or factor == 1.0)
    if exact or factor == 0.0 or not math.isfinite(factor):
        return tuple(grad * factor for grad in grads)
    # The loss is over the denominator, which divides it by the factor once more.
    *inputs, denominator, denominators, needs = inputs
    if denominators is not None:
        denominators = denominators.double() / factor
    else:
        active = reference.active_rows(inputs[2], inputs[11])
        denominator = (max(1, int(active.sum())) if denominator is None else denominator) / factor
    return _forward_cpu(*inputs, denominator, denominators, needs)[4:]


def _scaled_cuda(by, grad_hidden, grad_weight, grad_bias, hidden, weight, *_):
    return (grad_hidden * by).to(hidden.dtype), (grad_weight * by).to(weight.dtype), grad_bias * by


def _scaled_fake(by, grad_hidden, grad_weight, grad_bias, *_):
    return tuple(torch.empty_like(grad) for grad in (grad_hidden, grad_weight, grad_bias))


_INPUTS = (
    "Tensor hidden, Tensor weight, Tensor ids, Tensor? bias, float? temperature, Tensor? temperatures, float? softcap, Tensor? old_logp,"
    " Tensor advantages, Tensor token_offsets, Tensor sequence_offsets, Tensor? mask, float clip_low, float clip_high, str ratio,"
    " float? entropy_weight, Tensor? entropy_weights, Tensor? ref_logp, float kl_weight, Tensor? rollout_logp, float rollout_cap,"
    " float? denominator, Tensor? denominators, bool[] needs"
)
_op = define(
    f"linear_policy_loss({_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    cpu=_forward_cpu,
    cuda=_forward_cuda,
    fake=_fake,
    setup_context=_setup_context,
    backward=once_differentiable(_backward, lambda ctx: ctx.saved_tensors[3]),
)
_scaled_op = define(
    f"linear_policy_loss_scaled(Tensor by, Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias, {_INPUTS}) -> (Tensor, Tensor, Tensor)",
    cpu=_scaled_cpu,
    cuda=_scaled_cuda,
    fake=_scaled_fake,
)
