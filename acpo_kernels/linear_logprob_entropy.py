"""Log-prob and entropy of tokens from hidden states: the head is part of the operation, no N x V tensor exists."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _checks as check
from . import _cpu, _torch, reference
from ._library import define, number_or_tensor
from ._results import LogprobEntropy


def linear_logprob_entropy(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    mask: Tensor | None = None,
    group: object = None,
    impl: str | None = None,
) -> LogprobEntropy:
    """log pi(ids_t) and the entropy of pi, where pi = softmax(z / temperature) and z is the head's output.

        z = hidden weight^T + bias,  z <- softcap tanh(z / softcap);   logp_t = z_t/T - logsumexp(z/T),   H = -sum_j p_j log p_j

    Shapes
        hidden [N,H], weight [V,H], ids [N], bias [V], mask [N], temperature a number or [N]; logp and entropy [N].
    Dtypes
        hidden and weight share one of float32, bfloat16, float16 (results float32, logits never rounded) or float64 (results float64);
        under autocast both take the autocast dtype. Gradients of hidden, weight and bias through both outputs, accumulated in float32
        and rounded once; a weight that needs no gradient costs no product for it. Second derivatives raise.
    Units
        Nats. mask=False or ids == -100: both outputs 0, gradient 0. N = 0 gives empty results. A row that holds NaN gives NaN there alone.
    Errors
        TypeError for what is no tensor, number or process group; ValueError for shapes, dtypes or devices that do not fit, ids outside [0, V)
        (CPU), a temperature outside [1e-36, 1e36] (a number; a tensor is the caller's promise), a softcap outside [1e-36, 1e30], and for impl
        with a group.
    Group
        group (a torch.distributed process group): weight [V_r,H] and bias [V_r] are this rank's slice of the vocabulary, the slices in the order
        of the ranks; hidden, ids (of the whole vocabulary) and the gradients that come in are the same on every rank, and so are logp, entropy
        and the gradient of hidden, the sum over the group of shares that are each rounded to its dtype: for 16-bit hidden states up to some 7
        times less exact than one process's, where they cancel. Every rank must make the call, and its backward. A row whose logits are -inf over
        a whole slice is NaN. Not traced by torch.compile.
    Source
        `logprob_entropy`, after the head. Peers: TRL's ChunkedLogProbFunction, Liger, verl, cut-cross-entropy (docs/benchmarks.md).
    """
    check.implementation(impl)
    if group is not None and impl is not None:
        raise ValueError(f"impl = {impl!r} holds the whole vocabulary: it must be None with a group")
    if group is not None and not isinstance(group, torch.distributed.ProcessGroup):
        raise TypeError(f"group must be a torch.distributed process group, got {type(group).__name__}")
    check.tensor("hidden", hidden, check.FLOAT, ndim=2)
    check.tensor("weight", weight, check.FLOAT, ndim=2)
    hidden, weight, bias = check.autocast(hidden, weight, bias)
    check.head(hidden, weight, ids, bias, temperature, softcap, mask)
    if group is not None:
        from ._vocabulary_parallel import VocabularyParallel

        return LogprobEntropy(*VocabularyParallel.apply(hidden, weight, bias, ids, *number_or_tensor(temperature), softcap, mask, group))
    if impl == "reference":
        check.ids_in_range(ids, reference.active_rows(ids, mask), weight.shape[0])
        return reference.linear_logprob_entropy(hidden, weight, ids, bias=bias, temperature=temperature, softcap=softcap, mask=mask)
    return LogprobEntropy(*_op(hidden, weight, ids, bias, *number_or_tensor(temperature), softcap, mask)[:2])


# The four results of the operation are logp, entropy, and for its backward the maximum of the logits (before the temperature)
# and the centred logsumexp, as in `logprob_entropy`.


def _forward_cpu(hidden, weight, ids, bias, temperature, temperatures, softcap, mask):
    active = reference.active_rows(ids, mask)
    check.ids_in_range(ids, active, weight.shape[0])
    if not _cpu.available or hidden.dtype == torch.float64:
        return _torch.linear_logprob_entropy(hidden, weight, ids, bias, temperature, temperatures, softcap, mask)
    results = tuple(ids.new_zeros(ids.shape, dtype=torch.float32) for _ in range(4))
    _cpu.head_forward(hidden, weight, ids, bias, temperature, temperatures, softcap, active.nonzero(), results)
    return results


def _backward_cpu(
    hidden, weight, ids, bias, temperature, temperatures, softcap, mask, grad_logp, grad_entropy, entropy, maximum, logsumexp, needs
):  # fmt: skip
    if not _cpu.available or hidden.dtype == torch.float64:
        return _torch.linear_logprob_entropy_backward(
            hidden, weight, ids, bias, temperature, temperatures, softcap, mask, grad_logp, grad_entropy, entropy, maximum, logsumexp, needs
        )
    need_hidden, need_weight, need_bias = needs
    rows = reference.active_rows(ids, mask) & _torch.has_upstream(grad_logp, grad_entropy)
    gradients = (
        hidden.new_zeros(hidden.shape if need_hidden else 0),
        _cpu.empty(weight.shape if need_weight else (0,), weight.dtype),
        weight.new_empty(weight.shape[0] if need_bias else 0, dtype=torch.float32),
    )
    wanted = [g if need else None for g, need in zip(gradients, needs, strict=True)]
    statistics, upstream = (entropy, maximum, logsumexp), (grad_logp, grad_entropy)
    if any(needs):
        _cpu.head_backward(hidden, weight, ids, bias, temperature, temperatures, softcap, rows.nonzero(), statistics, upstream, wanted)
    return *gradients[:2], gradients[2] if bias is None else gradients[2].to(bias.dtype)


def _forward_cuda(hidden, weight, ids, bias, temperature, temperatures, softcap, mask):
    if hidden.dtype == torch.float64:
        return _torch.linear_logprob_entropy(hidden, weight, ids, bias, temperature, temperatures, softcap, mask)
    from ._triton import linear_logprob_entropy as kernels

    return kernels.forward(hidden, weight, ids, bias, temperature, temperatures, softcap, mask)


def _backward_cuda(hidden, weight, ids, bias, temperature, temperatures, softcap, mask, grad_logp, grad_entropy, *rest):
    arguments = (hidden, weight, ids, bias, temperature, temperatures, softcap, mask, grad_logp, grad_entropy)
    if hidden.dtype == torch.float64:
        return _torch.linear_logprob_entropy_backward(*arguments, *rest)
    from ._triton import linear_gradients as kernels

    *statistics, needs = rest
    return kernels.backward(*arguments, statistics, needs)


def _fake(hidden, weight, ids, *rest):
    return tuple(hidden.new_empty(ids.shape, dtype=reference.working_dtype(hidden.dtype)) for _ in range(4))


def _setup_context(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    hidden, weight, ids, bias, ctx.temperature, temperatures, ctx.softcap, mask = inputs
    ctx.save_for_backward(hidden, weight, ids, bias, temperatures, mask, *output[1:])
    ctx.mark_non_differentiable(*output[2:])


def _backward(ctx, grad_logp, grad_entropy, *_):
    hidden, weight, ids, bias, temperatures, mask, *statistics = ctx.saved_tensors
    needs = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], bias is not None and ctx.needs_input_grad[3]]
    if grad_logp is None and grad_entropy is None:
        return (None,) * 8
    grads = _backward_op(
        hidden, weight, ids, bias, ctx.temperature, temperatures, ctx.softcap, mask, grad_logp, grad_entropy, *statistics, needs
    )  # fmt: skip
    grad_hidden, grad_weight, grad_bias = (grad if need else None for grad, need in zip(grads, needs, strict=True))
    return grad_hidden, grad_weight, None, grad_bias, None, None, None, None


def _backward_fake(hidden, weight, ids, bias, temperature, temperatures, softcap, mask, grad_logp, grad_entropy, entropy, maximum, logsumexp, needs):
    return (
        hidden.new_empty(hidden.shape if needs[0] else (0,)),
        weight.new_empty(weight.shape if needs[1] else (0,)),
        (weight if bias is None else bias).new_empty(
            weight.shape[0] if needs[2] else 0, dtype=reference.working_dtype(weight.dtype) if bias is None else bias.dtype
        ),
    )


_op = define(
    "linear_logprob_entropy(Tensor hidden, Tensor weight, Tensor ids, Tensor? bias, float? temperature, Tensor? temperatures, float? softcap,"
    " Tensor? mask) -> (Tensor, Tensor, Tensor, Tensor)",
    cpu=_forward_cpu,
    cuda=_forward_cuda,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
_backward_op = define(
    "linear_logprob_entropy_backward(Tensor hidden, Tensor weight, Tensor ids, Tensor? bias, float? temperature, Tensor? temperatures,"
    " float? softcap, Tensor? mask, Tensor? grad_logp, Tensor? grad_entropy, Tensor entropy, Tensor maximum, Tensor logsumexp, bool[] needs)"
    " -> (Tensor, Tensor, Tensor)",
    cpu=_backward_cpu,
    cuda=_backward_cuda,
    fake=_backward_fake,
)
