"""`linear_policy_loss` beside `linear_logprob_entropy` and then `policy_loss`, and beside eager torch, at shares of active rows.

FLOP that are needed: 2 u N H V for the logits of unmasked rows, and 4 a N H V for dHidden and dW of rows whose gradient is not zero
(outside the clip, with an advantage), where the gradient is formed beside the loss. Rows get advantage 0 until their share is a.
"""

from __future__ import annotations

import pytest
import torch

from acpo_kernels import linear_logprob_entropy, linear_policy_loss, policy_loss, reference

from .bench_linear_logprob_entropy import SHAPES as HEADS
from .bench_linear_logprob_entropy import bare_products, inputs
from .common import SIZES, Case, Expected, Provider, V, copy_ceiling, gradients
from .hierarchy import segments_of
from .peers import plain

SHAPES = HEADS | {("default", "cpu"): [(128, 896, V)]}


def case(n, h, v, dtype, device, unmasked: float, active: float) -> Case:
    hidden, weight, ids = inputs(n, h, v, dtype, device)
    segments = segments_of(n, max(2, n // 16), max(1, n // 128), device)
    order = torch.randperm(n, device=device)
    mask, flows = torch.zeros(n, dtype=torch.bool, device=device), torch.zeros(n, dtype=torch.bool, device=device)
    mask[order[: round(unmasked * n)]] = True
    flows[order[: round(active * n)]] = True
    advantages = torch.where(flows, torch.randn(n, device=device), 0.0)
    incoming = {"loss": torch.ones((), device=device)}

    def ours(x, w):
        return (linear_policy_loss(x, w, ids, None, advantages, segments, mask=mask).loss,)

    def two_calls(x, w):
        logp, _ = linear_logprob_entropy(x, w, ids, mask=mask)
        return (policy_loss(logp, None, advantages, segments, mask=mask).loss,)

    def eager(x, w):
        logp, _ = plain.linear_four_lines(x, w, ids)
        return (reference.policy_loss(logp, None, advantages, segments, mask=mask).loss,)

    def call(function):
        return lambda: gradients(function, {"hidden": hidden, "weight": weight}, incoming)

    def expected(of: str) -> dict[str, Expected]:
        """On-policy the gradient of the loss with respect to logp is -A / tokens: one product at a time in float64."""
        tokens = mask.sum().double()
        out = {}
        for kind in (torch.float64, torch.float32):
            w = weight.detach().to(kind).requires_grad_()
            d_hidden, loss = torch.zeros(n, h, dtype=kind, device=device), torch.zeros((), dtype=torch.float64, device=device)
            for rows in (mask & flows).nonzero().squeeze(1).split(64):
                x = hidden[rows].detach().to(kind).requires_grad_()
                logp, _ = reference.linear_logprob_entropy(x, w, ids[rows], mask=mask[rows])
                upstream = torch.where(mask[rows], -advantages[rows].double() / tokens, 0.0)
                logp.backward(upstream.to(kind))
                loss += upstream.sum()
                d_hidden[rows] = x.grad
            out[kind] = {"loss": loss, "d_hidden": d_hidden, "d_weight": w.grad}
        out[torch.float32]["loss"] = reference.policy_loss(
            torch.zeros(n, device=device), None, advantages, segments, mask=mask
        ).loss  # the ratio is 1 whatever logp is
        return {
            name: Expected(e, out[torch.float32][name].detach(), None, 4.0, hidden.dtype if name.startswith("d_") else None)
            for name, e in out[torch.float64].items()
        }

    providers = {
        "ours": Provider(call(ours)), "linear_logprob_entropy + policy_loss": Provider(call(two_calls)), "eager": Provider(call(eager)),
    }  # fmt: skip
    return Case(
        "linear_policy_loss", "forward+backward", {"N": n, "H": h, "V": v, "u": unmasked, "a": active}, dtype, device, providers, expected,
        bytes=3 * (n * h + v * h) * hidden.element_size(), flop=round((2 * unmasked + 4 * active) * n * h * v),
        ceilings={"matrix products": bare_products(hidden, weight, backward=True), "copy": copy_ceiling(weight)},
    )  # fmt: skip


@pytest.mark.parametrize(("unmasked", "active"), [(1.0, 1.0), (1.0, 0.25), (0.25, 0.25)], ids=["u1-a1", "u1-a.25", "u.25-a.25"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", range(4), ids=SIZES[:4])
def test_linear_policy_loss(run, device, shapes, dtype, unmasked, active, size):
    wanted = SHAPES[shapes, device.type]
    if size >= len(wanted):
        pytest.skip(f"--shapes {shapes} has {len(wanted)} sizes on {device.type}")
    if device.type == "cuda" and dtype == torch.float32 and shapes != "small":
        pytest.skip("heads are bfloat16 on a GPU; float32 is tested, not timed")
    if device.type == "cpu" and dtype == torch.bfloat16 and shapes == "default" and active < 1:
        pytest.skip("bfloat16 on the CPU: one share is enough (--shapes large has all)")
    run(case(*wanted[size], dtype, device, unmasked, active))
