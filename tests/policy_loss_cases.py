"""Inputs for the tests of `policy_loss`, and one call forward and backward."""

from __future__ import annotations

import torch

from acpo_kernels import policy_loss

RATIOS = ("token", "segment", "sequence")
IMPLS = (None, "reference")
PER_TOKEN = ("old_logp", "entropy", "ref_logp", "rollout_logp")
DENOMINATORS = ("none", "float", "0-d", "[B]", "[N]")


def inputs(segments, dtype=torch.float64, device="cpu", drift=0.3):
    n = segments.num_tokens
    logp = -torch.rand(n, device=device) * 3
    values = dict(
        logp=logp,
        old_logp=logp + drift * torch.randn(n, device=device),
        advantages=torch.randn(n, device=device),
        entropy=torch.rand(n, device=device) * 2,
        ref_logp=logp + torch.randn(n, device=device),
        rollout_logp=logp + drift * torch.randn(n, device=device),
        entropy_weight=torch.rand(n, device=device) * 0.1,
    )
    return {name: x.to(dtype) for name, x in values.items()}


def denominator_of(kind, segments):
    sizes = {"0-d": (), "[B]": (segments.num_sequences,), "[N]": (segments.num_tokens,)}
    return {"none": None, "float": 7.5}[kind] if kind in ("none", "float") else torch.rand(sizes[kind], dtype=torch.float64) * 5 + 1


def forward_backward(values, segments, impl, upstream=1.0, **settings):
    """Loss, gradients of logp and of entropy, metrics."""
    values = dict(values)
    leaves = {name: values[name].clone().requires_grad_() for name in ("logp", "entropy") if values.get(name) is not None}
    values |= leaves
    loss, metrics = policy_loss(values.pop("logp"), values.pop("old_logp"), values.pop("advantages"), segments, **values, **settings, impl=impl)
    grads = torch.autograd.grad(loss * upstream, list(leaves.values()), allow_unused=True)
    return loss.detach(), dict(zip(leaves, grads, strict=True)), metrics
