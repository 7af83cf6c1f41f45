"""Inputs for the tests of `linear_logprob_entropy` and of the C++ head, and one call forward and backward."""

from __future__ import annotations

import torch

from acpo_kernels import linear_logprob_entropy

IMPLS = (None, "reference")
NAMES = ("logp", "entropy", "gradient of hidden", "gradient of weight", "gradient of bias")


def inputs(rows=19, vocab=37, width=8, dtype=torch.float32, device="cpu", scale=1.0):
    hidden = (torch.randn(rows, width, device=device) * scale).to(dtype)
    weight, bias = torch.randn(vocab, width, device=device).to(dtype), torch.randn(vocab, device=device).to(dtype)
    return hidden, weight, torch.randint(vocab, (rows,), device=device), bias


def forward_backward(hidden, weight, ids, bias=None, grad_logp=1.0, grad_entropy=1.0, **settings):
    """logp, entropy, and the gradients of hidden, weight and bias; a gradient of None leaves that output unused."""
    leaves = [x.detach().clone().requires_grad_() for x in (hidden, weight, bias) if x is not None]
    logp, entropy = linear_logprob_entropy(*leaves[:2], ids, bias=leaves[2] if bias is not None else None, **settings)
    objective = sum((out * g).sum() for out, g in ((logp, grad_logp), (entropy, grad_entropy)) if g is not None)
    return logp.detach(), entropy.detach(), *torch.autograd.grad(objective, leaves)
