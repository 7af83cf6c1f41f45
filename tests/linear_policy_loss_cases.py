"""Inputs for the tests of `linear_policy_loss`, one call forward and backward, and the rows that its products take."""

from __future__ import annotations

import torch

from acpo_kernels import _cpu, linear_logprob_entropy, linear_policy_loss

IMPLS = (None, "reference")
RATIOS = ("token", "segment", "sequence")
NAMES = ("loss", "logp", "entropy", "gradient of hidden", "gradient of weight", "gradient of bias")


def inputs(segments, vocab=13, width=4, dtype=torch.float64, device="cpu", **head):
    n = segments.num_tokens
    values = dict(
        hidden=torch.randn(n, width, device=device),
        weight=torch.randn(vocab, width, device=device),
        bias=torch.randn(vocab, device=device),
    )
    values = {name: x.to(dtype) for name, x in values.items()}
    ids = torch.randint(vocab, (n,), device=device)
    logp = linear_logprob_entropy(**values, ids=ids, **head).logp
    rest = dict(
        old_logp=logp + 0.3 * torch.randn(n, device=device, dtype=logp.dtype),
        advantages=torch.randn(n, device=device, dtype=logp.dtype),
        ref_logp=logp + torch.randn(n, device=device, dtype=logp.dtype),
        rollout_logp=logp + 0.3 * torch.randn(n, device=device, dtype=logp.dtype),
        entropy_weight=torch.rand(n, device=device, dtype=logp.dtype) * 0.1,
    )
    return values | {name: x.to(dtype) for name, x in rest.items()} | {"ids": ids}


def forward_backward(values, segments, impl, upstream=1.0, **settings):
    """Loss, logp, entropy, gradients of hidden, weight and bias; and the metrics."""
    values = dict(values)
    leaves = [values.pop(name).detach().clone().requires_grad_() for name in ("hidden", "weight", "bias")]
    ids, old_logp, advantages = (values.pop(name) for name in ("ids", "old_logp", "advantages"))
    result = linear_policy_loss(*leaves[:2], ids, old_logp, advantages, segments, bias=leaves[2], **values, **settings, impl=impl)
    grads = torch.autograd.grad(result.loss * upstream, leaves)
    return [result.loss.detach(), result.logp, result.entropy, *grads], result.metrics


def rows_in_products(call):
    """(rows in the forward product, in dHidden, in dWeight) of a call, as the kernels count them."""
    before = _cpu._C.head_work()
    call()
    return tuple(int(now - then) for now, then in zip(_cpu._C.head_work(), before, strict=True))
