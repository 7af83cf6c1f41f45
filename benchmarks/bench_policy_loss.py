"""`policy_loss` with its metrics and gradients beside eager and torch.compile of the reference.

Bytes: log-prob, old log-prob, advantage, entropy and both gradients (24 N), the mask (N).
"""

from __future__ import annotations

import pytest
import torch

from acpo_kernels import Segments, policy_loss, reference

from .common import Case, Expected, Provider, copy_ceiling, gradients
from .hierarchy import SHAPES, segments_of


def case(n: int, s: int, b: int, ratio: str, device: torch.device) -> Case:
    segments = segments_of(n, s, b, device)
    old = -torch.rand(n, device=device) * 3
    logp, entropy = old + 0.2 * torch.randn(n, device=device), torch.rand(n, device=device)
    advantages, mask = torch.randn(n, device=device), torch.rand(n, device=device) < 0.9
    incoming = {"loss": torch.ones((), device=device)}

    def plain(logp, entropy, dtype=torch.float32):
        loss, metrics = reference.policy_loss(
            logp, old.to(dtype), advantages.to(dtype), segments, mask=mask, ratio=ratio, entropy=entropy, entropy_weight=1e-3
        )
        return loss, *metrics.values()

    def ours(logp, entropy):
        loss, metrics = policy_loss(logp, old, advantages, segments, mask=mask, ratio=ratio, entropy=entropy, entropy_weight=1e-3)
        return loss, *metrics.values()

    def call(function):
        return lambda: gradients(function, {"logp": logp, "entropy": entropy}, incoming)

    def expected(of: str) -> dict[str, Expected]:
        exact, single = (
            gradients(lambda x, y, d=d: plain(x, y, d), {"logp": logp.to(d), "entropy": entropy.to(d)}, incoming)
            for d in (torch.float64, torch.float32)
        )
        # The gradient of the entropy is one constant: its rounding is the float32 of what came in.
        return {
            name: Expected(e.detach(), single[name].detach(), gradient_dtype=torch.float32 if name != "loss" else None) for name, e in exact.items()
        }

    def traced(logp, entropy, token_offsets, sequence_offsets, old, advantages, mask):
        segments = Segments._trusted(token_offsets, sequence_offsets, None, n)
        loss, metrics = reference.policy_loss(logp, old, advantages, segments, mask=mask, ratio=ratio, entropy=entropy, entropy_weight=1e-3)
        return loss, *metrics.values()

    graph = torch.compile(traced, dynamic=False)
    fixed = (segments.token_offsets, segments.sequence_offsets, old, advantages, mask)
    providers = {
        "ours": Provider(call(ours)), "eager": Provider(call(plain)), "torch.compile": Provider(call(lambda x, y: graph(x, y, *fixed))),
    }  # fmt: skip
    moved = 25 * n + 8 * (s + b)
    return Case(
        f"policy_loss {ratio}", "forward+backward", {"N": n, "S": s, "B": b}, torch.float32, device, providers, expected, bytes=moved,
        ceilings={"copy": copy_ceiling(torch.randn(moved // 4, device=device))}, launch_bound=True,
    )  # fmt: skip


@pytest.mark.parametrize("ratio", ["token", "segment", "sequence"])
def test_policy_loss(run, device, shapes, ratio):
    run(case(*SHAPES[shapes][0], ratio, device))
