"""Every implementation of `logprob_entropy` behind one call, so that one set of tests holds them all.

Under TRITON_INTERPRET=1 the implementation is the Triton kernel in the interpreter; otherwise the CPU kernels, one for each
instruction set, and CUDA where there is one. `test_triton_interpreter.py` runs the first beside the others.
"""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from acpo_kernels import _cpu, logprob_entropy, reference

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
NAMES = ("interpreter",) if INTERPRETED else ("avx512", "avx2", "baseline", "cuda")


class Implementation:
    """(logits, ids, ...) -> (logp, entropy, gradient of logits for the given incoming gradients), on the CPU."""

    def __init__(self, name: str):
        self.name, self.device = name, "cuda" if name == "cuda" else "cpu"

    def __call__(self, logits: Tensor, ids: Tensor, *, temperature=1.0, mask=None, grad_logp=None, grad_entropy=None):
        grad_logp = torch.ones(ids.shape) if grad_logp is None else grad_logp
        grad_entropy = torch.ones(ids.shape) if grad_entropy is None else grad_entropy
        if self.name == "interpreter":
            return self._interpreted(logits, ids, temperature, mask, grad_logp, grad_entropy)
        move = lambda t: t.to(self.device) if isinstance(t, Tensor) else t  # noqa: E731
        if self.device == "cuda" and logits.numel() and 0 not in logits.stride():  # with the strides of the original
            logits = torch.empty_strided(logits.shape, logits.stride(), dtype=logits.dtype, device="cuda").copy_(logits)
        leaf = move(logits).detach().requires_grad_()
        logp, entropy = logprob_entropy(leaf, move(ids), temperature=move(temperature), mask=move(mask))
        (gradient,) = torch.autograd.grad([logp, entropy], leaf, [move(grad_logp).to(logp.dtype), move(grad_entropy).to(logp.dtype)])
        assert gradient.dtype == logits.dtype
        return logp.detach().cpu(), entropy.detach().cpu(), gradient.cpu()

    def _interpreted(self, logits, ids, temperature, mask, grad_logp, grad_entropy):
        from acpo_kernels._triton import logprob_entropy as kernels

        number, tensor = (1.0, temperature) if isinstance(temperature, Tensor) else (float(temperature), None)
        results = tuple(torch.full(ids.shape, torch.nan) for _ in range(4))
        kernels.forward(logits, ids, number, tensor, mask, results)
        gradient = torch.full(logits.shape, torch.nan, dtype=logits.dtype)
        kernels.backward(grad_logp, grad_entropy, logits, ids, results[1:], number, tensor, mask, gradient)
        return results[0], results[1], gradient


@pytest.fixture(params=NAMES, name="run")
def implementation(request):
    """One implementation after the other."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if request.param in ("avx512", "avx2", "baseline"):
        if not _cpu.available:
            pytest.skip("built without the C++ extension")
        try:
            _cpu._C.restrict_cpu_isa(request.param)
        except ValueError as missing:
            pytest.skip(str(missing))
    yield Implementation(request.param)
    if _cpu.available:
        _cpu._C.restrict_cpu_isa("")


def single(logits, ids, *, temperature=1.0, mask=None, grad_logp=None, grad_entropy=None):
    """The reference computing in float32, gradients by autograd."""
    leaf = logits.detach().float().requires_grad_()
    logp, entropy = reference.logprob_entropy(leaf, ids, temperature=temperature, mask=mask)
    ones = torch.ones(ids.shape)
    incoming = [ones if g is None else g for g in (grad_logp, grad_entropy)]
    (gradient,) = torch.autograd.grad([logp, entropy], leaf, incoming)
    return logp.detach(), entropy.detach(), gradient


def exact(logits, ids, *, temperature=1.0, mask=None, grad_logp=None, grad_entropy=None):
    """The reference in float64, and its gradient in closed form: autograd would form 1 - p, which loses a confident token."""
    active = reference.active_rows(ids, mask)
    t = temperature if isinstance(temperature, Tensor) else torch.full(ids.shape, temperature, dtype=torch.float64)
    t = torch.where(active, t, 1.0).double()
    logp, entropy = reference.logprob_entropy(logits.double(), ids, temperature=t, mask=mask)
    d, l = reference._log_softmax_parts(logits.double(), active, t)  # noqa: E741
    log_p = d - l.unsqueeze(-1)
    p = log_p.exp()
    g_logp, g_entropy = (torch.ones(ids.shape).double() if g is None else g.double() for g in (grad_logp, grad_entropy))
    chosen = torch.arange(logits.shape[-1]) == ids.unsqueeze(-1)
    gradient = g_logp.unsqueeze(-1) * torch.where(chosen, -torch.expm1(log_p), -p)
    gradient = gradient + torch.where(p == 0, 0.0, g_entropy.unsqueeze(-1) * p * (-log_p - entropy.unsqueeze(-1)))
    wanted = active & ((g_logp != 0) | (g_entropy != 0))
    return logp, entropy, torch.where(wanted.unsqueeze(-1), gradient / t.unsqueeze(-1), 0.0)
