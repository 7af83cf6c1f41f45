"""Log-prob of the chosen token and entropy of the whole distribution, from logits, in one pass over them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from . import _checks as check
from . import _cpu, reference
from ._layout import writable_in_place
from ._library import define
from ._results import LogprobEntropy


def logprob_entropy(
    logits: Tensor,
    ids: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    inplace_backward: bool = False,
    impl: str | None = None,
) -> LogprobEntropy:
    """Log-probability of ids and entropy under softmax(logits / temperature), with gradients through both.

        z = logits / temperature,   m = max_j z_j,   l = log sum_j exp(z_j - m)
        logp    = (z_ids - m) - l
        entropy = l + sum_j p_j (m - z_j),   p_j = exp(z_j - m - l)

    with one maximum left out of the sum, l = log1p(rest): a token of probability 1 - 1e-13 keeps its log-prob of -1e-13.

    Shapes
        logits [..., V], ids [...], mask [...] or None, temperature a number or [...]; results [...]. Rows of logits are read
        in place at up to two leading strides and a contiguous last dimension (so `logits[:, :-1]` of a (B,T,V) tensor is);
        any other layout is first copied. N = 0 rows give empty results.
    Dtypes
        logits float32, bfloat16, float16 or float64; ids int64 or int32; mask bool. Logits enter as float32, unrounded:
        results are float32 (float64 for float64 logits), the gradient has the logits' dtype.
    Units
        Nats. Row t holds the logits that PREDICT ids[t]. mask=False or ids == -100: both results and the gradient are 0, and
        the row is not read. -inf logits contribute nothing; if ids names one, logp is -inf with finite gradients. A row that is
        all -inf, or holds NaN or +inf, gives NaN in that row alone. temperature gets no gradient; its values are positive.
        A row's results are bitwise the same alone and in any batch. Second derivatives raise.
    Memory
        Four numbers a row beside the gradient. inplace_backward=True saves the gradient as well: after the backward the STORAGE OF
        LOGITS HOLDS IT, at the strides of logits. Nothing else may need the logits by then: autograd raises for another operation that
        saved them, and for a second backward through this one. torch.compile plans its own buffers: there, and with
        impl="reference", the values are the same and the logits are left alone.
    Errors
        TypeError for what is not a tensor or a number; ValueError for another dtype, shape or device, for V = 0, for a
        temperature outside [1e-36, 1e36] (a number; a tensor is the caller's promise), and on CPU for an active id outside [0, V). On CUDA
        nothing is read back: such a row is NaN. With inplace_backward, ValueError for logits that are a leaf or a view of one (its grad would
        be the logits themselves), whose rows overlap, or whose layout would be copied; RuntimeError for a second backward or a backward with
        create_graph.
    Source
        logp = -softplus(logsumexp_{j != ids} z_j - z_ids) and its gradient (1 - p by expm1) are the log-sum-exp of
        Blanchard, Higham, Higham (2021), "Accurately computing the log-sum-exp and softmax functions", eq. 3.5; dentropy/dz_j
        = -p_j (log p_j + entropy).
    """
    check.implementation(impl)
    check.rows(logits, ids, temperature, mask)
    if not isinstance(inplace_backward, bool):
        raise TypeError(f"inplace_backward must be a bool, got {type(inplace_backward).__name__}")
    if inplace_backward:
        _check_inplace(logits)
    if impl == "reference":
        check.ids_in_range(ids, reference.active_rows(ids, mask), logits.shape[-1])
        return reference.logprob_entropy(logits, ids, temperature=temperature, mask=mask)
    number, tensor = (1.0, temperature.detach()) if isinstance(temperature, Tensor) else (float(temperature), None)
    logp, entropy, _, _ = _op(logits, ids, number, tensor, mask, inplace_backward)
    return LogprobEntropy(logp, entropy)


def _check_inplace(logits: Tensor) -> None:
    if not writable_in_place(logits):
        raise ValueError(
            "inplace_backward needs logits whose rows do not overlap, at up to two leading strides and a contiguous last dimension, got shape"
            f" {tuple(logits.shape)} with strides {logits.stride()}"
        )
    if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and logits.requires_grad):
        return  # a compiled graph leaves the logits alone
    base = logits._base if logits._is_view() else logits
    if base is not None and base.is_leaf and base.requires_grad:
        what = "a leaf" if base is logits else "a view of a leaf"
        raise ValueError(f"inplace_backward needs logits that an operation computed, got {what}: its grad would be the logits themselves")


# The four results of the operation are logp, entropy, and for its backward the maximum of the logits (before the temperature)
# and the centred logsumexp l. Every implementation gives and takes the same four.


def _forward_cpu(logits: Tensor, ids: Tensor, temperature: float, temperatures: Tensor | None, mask: Tensor | None, inplace_backward=False):
    if not _cpu.available:
        check.ids_in_range(ids, reference.active_rows(ids, mask), logits.shape[-1])
        return _forward_torch(logits, ids, temperature, temperatures, mask)
    results = _fake(logits, ids, temperature, temperatures, mask)
    if not _cpu.logprob_entropy_forward(logits, ids, temperature, temperatures, mask, results):
        check.ids_in_range(ids, reference.active_rows(ids, mask), logits.shape[-1])
    return results


def _backward_cpu(grad_logp, grad_entropy, logits, ids, entropy, maximum, logsumexp, temperature, temperatures, mask):
    statistics = (entropy, maximum, logsumexp)
    if not _cpu.available:
        return _backward_torch(grad_logp, grad_entropy, logits, ids, *statistics, temperature, temperatures, mask)
    gradient = logits.new_empty(logits.shape)
    _cpu.logprob_entropy_backward(grad_logp, grad_entropy, logits, ids, statistics, temperature, temperatures, mask, gradient)
    return gradient


def _forward_cuda(logits: Tensor, ids: Tensor, temperature: float, temperatures: Tensor | None, mask: Tensor | None, inplace_backward=False):
    if logits.dtype == torch.float64:
        inside = (ids >= 0) & (ids < logits.shape[-1])
        results = _forward_torch(logits, torch.where(inside | (ids == reference.IGNORED), ids, 0), temperature, temperatures, mask)
        return tuple(torch.where(inside | ~reference.active_rows(ids, mask), r, torch.nan) for r in results)
    from ._triton import logprob_entropy as kernels

    results = _fake(logits, ids, temperature, temperatures, mask)
    kernels.forward(logits, ids, temperature, temperatures, mask, results)
    return results


def _backward_cuda(grad_logp, grad_entropy, logits, ids, entropy, maximum, logsumexp, temperature, temperatures, mask):
    statistics = (entropy, maximum, logsumexp)
    if logits.dtype == torch.float64:
        return _backward_torch(grad_logp, grad_entropy, logits, ids, *statistics, temperature, temperatures, mask)
    from ._triton import logprob_entropy as kernels

    gradient = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    kernels.backward(grad_logp, grad_entropy, logits, ids, statistics, temperature, temperatures, mask, gradient)
    return gradient


def _backward_inplace_cpu(grad_logp, grad_entropy, logits, ids, entropy, maximum, logsumexp, temperature, temperatures, mask):
    _written(logits)
    if not _cpu.available:
        logits.copy_(_backward_torch(grad_logp, grad_entropy, logits, ids, entropy, maximum, logsumexp, temperature, temperatures, mask))
    else:
        statistics = (entropy, maximum, logsumexp)
        _cpu.logprob_entropy_backward(grad_logp, grad_entropy, logits, ids, statistics, temperature, temperatures, mask, None)


def _backward_inplace_cuda(grad_logp, grad_entropy, logits, ids, entropy, maximum, logsumexp, temperature, temperatures, mask):
    _written(logits)
    statistics = (entropy, maximum, logsumexp)
    if logits.dtype == torch.float64:
        logits.copy_(_backward_torch(grad_logp, grad_entropy, logits, ids, *statistics, temperature, temperatures, mask))
    else:
        from ._triton import logprob_entropy as kernels

        kernels.backward(grad_logp, grad_entropy, logits, ids, statistics, temperature, temperatures, mask, logits)


def _written(logits: Tensor) -> None:
    if not writable_in_place(logits):
        raise ValueError(f"logits of shape {tuple(logits.shape)} with strides {logits.stride()} cannot hold their own gradient")
    torch.autograd.graph.increment_version(logits)  # what else has saved them raises


def _forward_torch(logits: Tensor, ids: Tensor, temperature: float, temperatures: Tensor | None, mask: Tensor | None):
    """For float64 on CUDA, and for the CPU without the extension."""
    t = temperature if temperatures is None else temperatures
    logp, entropy = reference.logprob_entropy(logits, ids, temperature=t, mask=mask)
    active = reference.active_rows(ids, mask)
    _, l = reference._log_softmax_parts(logits, active, t)  # noqa: E741
    maximum = torch.where(active, logits.amax(-1).to(logp.dtype), 0.0)
    return logp.contiguous(), entropy.contiguous(), maximum.contiguous(), torch.where(active, l, 0.0).contiguous()


def _backward_torch(grad_logp, grad_entropy, logits, ids, entropy, maximum, logsumexp, temperature, temperatures, mask):
    t = temperature if temperatures is None else temperatures.to(entropy.dtype).unsqueeze(-1)
    g_logp, g_entropy = (torch.zeros_like(entropy) if g is None else g.to(entropy.dtype) for g in (grad_logp, grad_entropy))
    active = reference.active_rows(ids, mask) & ((g_logp != 0) | (g_entropy != 0))
    z = torch.where(active.unsqueeze(-1), logits.to(entropy.dtype), 0.0)
    log_p = (z - maximum.unsqueeze(-1)) / t - logsumexp.unsqueeze(-1)
    p = torch.exp(log_p)
    chosen = torch.arange(logits.shape[-1], device=ids.device) == ids.unsqueeze(-1)
    through_logp = g_logp.unsqueeze(-1) * torch.where(chosen, -torch.expm1(log_p), -p)
    through_entropy = torch.where(p == 0, 0.0, g_entropy.unsqueeze(-1) * p * (-log_p - entropy.unsqueeze(-1)))
    gradient = torch.where(active.unsqueeze(-1), (through_logp + through_entropy) / t, 0.0)
    return gradient.to(logits.dtype).contiguous()


def _fake(logits: Tensor, ids: Tensor, temperature: float, temperatures: Tensor | None, mask: Tensor | None, inplace_backward=False):
    dtype = reference.working_dtype(logits.dtype)
    return tuple(torch.empty(logits.shape[:-1], dtype=dtype, device=logits.device) for _ in range(4))


def _backward_fake(grad_logp, grad_entropy, logits, ids, entropy, maximum, logsumexp, temperature, temperatures, mask):
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _setup_context(ctx, inputs, output) -> None:
    logits, ids, ctx.temperature, temperatures, mask, *last = inputs
    ctx.inplace, ctx.number_of_inputs = last == [True], len(inputs)
    _, entropy, maximum, logsumexp = output
    ctx.save_for_backward(logits, ids, entropy, maximum, logsumexp, temperatures, mask)
    ctx.mark_non_differentiable(maximum, logsumexp)
    ctx.set_materialize_grads(False)  # an output that was not used comes as None, not as zeros to be read


def _backward(ctx, grad_logp, grad_entropy, _grad_maximum, _grad_logsumexp):
    logits, ids, entropy, maximum, logsumexp, temperatures, mask = ctx.saved_tensors
    gradient = None
    if ctx.needs_input_grad[0] and not (grad_logp is None and grad_entropy is None):
        arguments = (grad_logp, grad_entropy, logits, ids, entropy, maximum, logsumexp, ctx.temperature, temperatures, mask)
        if not ctx.inplace or is_fake(logits):  # a trace: the compiled graph's buffers are the compiler's to plan
            gradient = _backward_op(*arguments)
        elif torch.is_grad_enabled():
            raise RuntimeError("logprob_entropy with inplace_backward has no second derivative: create_graph needs the logits that it overwrites")
        else:
            _backward_inplace_op(*arguments)
            gradient = logits.detach()
    return gradient, *(None,) * (ctx.number_of_inputs - 1)


_op = define(
    "logprob_entropy(Tensor logits, Tensor ids, float temperature, Tensor? temperatures, Tensor? mask,"
    " bool inplace_backward=False) -> (Tensor, Tensor, Tensor, Tensor)",
    cpu=_forward_cpu,
    cuda=_forward_cuda,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
_backward_op = define(
    "logprob_entropy_backward(Tensor? grad_logp, Tensor? grad_entropy, Tensor logits, Tensor ids, Tensor entropy, Tensor maximum,"
    " Tensor logsumexp, float temperature, Tensor? temperatures, Tensor? mask) -> Tensor",
    cpu=_backward_cpu,
    cuda=_backward_cuda,
    fake=_backward_fake,
)
_backward_inplace_op = define(
    "logprob_entropy_backward_(Tensor? grad_logp, Tensor? grad_entropy, Tensor(a!) logits, Tensor ids, Tensor entropy, Tensor maximum,"
    " Tensor logsumexp, float temperature, Tensor? temperatures, Tensor? mask) -> ()",
    cpu=_backward_inplace_cpu,
    cuda=_backward_inplace_cuda,
    fake=lambda *arguments: None,
)
