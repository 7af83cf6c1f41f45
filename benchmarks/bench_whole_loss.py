"""From logits, or from hidden states, to the clipped policy loss and its gradients, beside Liger's two GRPO losses, eager and torch.compile.

Liger takes one advantage a rollout, no entropy and its own layout (logits [B,L+1,V], the last row nobody's); ours gets the packed rows. All
rows count. Bytes from logits: 3 N V s; FLOP from hidden states: 6 N H V, (2 + 4) with the gradient formed beside the loss.
"""

from __future__ import annotations

import pytest
import torch

from acpo_kernels import Segments, linear_policy_loss, logprob_entropy, policy_loss, reference

from . import peers
from .common import SIZES, Case, Expected, Provider, V, copy_ceiling, gradients, sampled_rows
from .peers import plain

CLIP = (0.2, 0.28)
# (rollouts, tokens a rollout, V)
LOGITS = {
    ("small", "cpu"): (2, 16, 1000), ("large", "cpu"): (4, 64, V), ("small", "cuda"): (2, 64, 5000), ("default", "cuda"): (8, 1024, V),
    ("large", "cuda"): (8, 1024, V),
}  # fmt: skip
WIDTHS = {("small", "cpu"): (128,), ("large", "cpu"): (896,), ("small", "cuda"): (128,), ("default", "cuda"): (896,), ("large", "cuda"): (896, 4096)}


def clipped(logp, old_logp, advantages):
    ratio = (logp - old_logp).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - CLIP[0], 1 + CLIP[1]) * advantages).mean()


class Problem:
    """Rollouts whose ratios lie on both sides of the clip, with an advantage each."""

    def __init__(self, b: int, length: int, v: int, device: torch.device):
        self.b, self.length, n = b, length, b * length
        self.ids = torch.randint(v, (n,), device=device)
        self.advantages = torch.randn(b, device=device)
        self.of_tokens = self.advantages.repeat_interleave(length)
        self.segments = Segments(torch.arange(b + 1, device=device) * length, torch.arange(b + 1, device=device), num_tokens=n)
        self.off = 0.3 * torch.randn(n, device=device)

    def set_old(self, logits_of, rows: int = 64) -> None:
        """old_logp beside the log-probs of logits_of(rows), the logits in float64; and the exact loss with the gradient that each log-prob gets."""
        n = len(self.ids)
        exact = torch.cat([reference.logprob_entropy(logits_of(r), self.ids[r]).logp for r in torch.arange(n, device=self.ids.device).split(rows)])
        self.old = (exact + self.off).float()
        # Away from the edges of the clip, where one rounding decides on a gradient
        near = torch.stack([(exact - self.old).exp() - edge for edge in (1 - CLIP[0], 1 + CLIP[1])]).abs().amin(0) < 1e-3
        self.old = torch.where(near, exact.float(), self.old)
        leaf = exact.requires_grad_()
        loss = clipped(leaf, self.old.double(), self.of_tokens.double())
        (self.upstream,) = torch.autograd.grad(loss, leaf)
        self.loss = loss.detach()

    def padded(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(self.b, self.length, *x.shape[1:])


def from_logits(b: int, length: int, v: int, dtype: torch.dtype, device: torch.device) -> Case:
    problem, n = Problem(b, length, v, device), b * length
    theirs = (torch.randn(b, length + 1, v, device=device) * 2).to(dtype)
    rows_of = theirs[:, :-1].reshape(n, v)
    problem.set_old(lambda r: rows_of[r].double())

    def call(function, leaf):
        def run():
            out = gradients(function, {"logits": leaf}, {"loss": torch.ones((), device=device)})
            d = out["d_logits"]
            return {"loss": out["loss"], "d_logits": d[:, :-1] if d.ndim == 3 else problem.padded(d)}

        return run

    def ours(z):
        logp = logprob_entropy(z, problem.ids).logp
        return (policy_loss(logp, problem.old, problem.of_tokens, problem.segments, clip=CLIP).loss,)

    def formula(z):
        return (clipped(plain.four_lines(z, problem.ids)[0], problem.old, problem.of_tokens),)

    def expected(of: str) -> dict[str, Expected]:
        rows = sampled_rows(n, device)
        out = {}
        for kind in (torch.float64, torch.float32):
            z = rows_of[rows].to(kind).requires_grad_()
            logp = reference.logprob_entropy(z, problem.ids[rows]).logp
            (out[kind],) = torch.autograd.grad(logp, z, problem.upstream[rows].to(kind))
        single = torch.cat([reference.logprob_entropy(rows_of[r].float(), problem.ids[r]).logp for r in torch.arange(n, device=device).split(64)])
        loss = Expected(problem.loss, clipped(single, problem.old, problem.of_tokens))
        at = (rows // length, rows % length)
        return {"loss": loss, "d_logits": Expected(out[torch.float64], out[torch.float32], at, gradient_dtype=dtype)}

    found, absent = peers.find("policy_loss_from_logits", device)
    rest = problem.padded(problem.ids), problem.padded(problem.old), problem.advantages
    providers = {
        "ours": Provider(call(ours, rows_of)), "eager": Provider(call(formula, rows_of)),
        "torch.compile": Provider(call(torch.compile(formula, dynamic=False), rows_of)),
    } | {name: Provider(call(lambda z, f=f: (f(z, *rest),), theirs)) for name, f in found.items()}  # fmt: skip
    return Case(
        "policy_loss from logits", "forward+backward", {"B": b, "L": length, "V": v}, dtype, device, providers, expected,
        bytes=3 * n * v * dtype.itemsize, ceilings={"copy": copy_ceiling(rows_of)}, absent=absent,
    )  # fmt: skip


def from_hidden(b: int, length: int, h: int, v: int, dtype: torch.dtype, device: torch.device) -> Case:
    problem, n = Problem(b, length, v, device), b * length
    hidden, weight = torch.randn(n, h, device=device).to(dtype), (torch.randn(v, h, device=device) * (2 / h**0.5)).to(dtype)
    problem.set_old(lambda r: hidden[r].double() @ weight.double().T)

    def call(function, shape):
        return lambda: gradients(function, {"hidden": hidden.view(shape), "weight": weight}, {"loss": torch.ones((), device=device)})

    def ours(x, w):
        return (linear_policy_loss(x, w, problem.ids, problem.old, problem.of_tokens, problem.segments, clip=CLIP).loss,)

    def formula(x, w):
        return (clipped(plain.linear_four_lines(x, w, problem.ids)[0], problem.old, problem.of_tokens),)

    def expected(of: str) -> dict[str, Expected]:
        out = {}
        for kind in (torch.float64, torch.float32):
            w = weight.to(kind).requires_grad_()
            d_hidden, logp = torch.zeros(n, h, dtype=kind, device=device), torch.zeros(n, dtype=kind, device=device)
            for rows in torch.arange(n, device=device).split(64):
                x = hidden[rows].to(kind).requires_grad_()
                logp_rows = reference.linear_logprob_entropy(x, w, problem.ids[rows]).logp
                logp_rows.backward(problem.upstream[rows].to(kind))
                logp[rows], d_hidden[rows] = logp_rows.detach(), x.grad
            loss = clipped(logp, problem.old.to(kind), problem.of_tokens.to(kind))
            out[kind] = {"loss": loss, "d_hidden": d_hidden, "d_weight": w.grad}
        exact, single = out[torch.float64], out[torch.float32]
        return {name: Expected(e, single[name], None, 4.0, dtype if name.startswith("d_") else None) for name, e in exact.items()}

    found, absent = peers.find("linear_policy_loss", device)
    rest = problem.padded(problem.ids), problem.padded(problem.old), problem.advantages

    def theirs(function):
        run = call(lambda x, w: (function(x, w, *rest),), (b, length, h))

        def flat():
            out = run()
            return out | {"d_hidden": out["d_hidden"].view(n, h)}

        return flat

    providers = {
        "ours": Provider(call(ours, (n, h))), "eager": Provider(call(formula, (n, h))),
        "torch.compile": Provider(call(torch.compile(formula, dynamic=False), (n, h))),
    } | {name: Provider(theirs(f)) for name, f in found.items()}  # fmt: skip
    return Case(
        "policy_loss from hidden states", "forward+backward", {"B": b, "L": length, "H": h, "V": v}, dtype, device, providers, expected,
        bytes=3 * (hidden.numel() + weight.numel()) * dtype.itemsize, flop=6 * n * h * v, ceilings={"copy": copy_ceiling(weight)}, absent=absent,
    )  # fmt: skip


def wanted(sizes: dict, shapes: str, device: torch.device):
    if (shapes, device.type) not in sizes:
        pytest.skip("Liger's Triton loss needs a GPU, and the others are measured part by part: --shapes large")
    return sizes[shapes, device.type]


def test_policy_loss_from_logits(run, device, shapes):
    run(from_logits(*wanted(LOGITS, shapes, device), torch.bfloat16, device))


@pytest.mark.parametrize("size", range(2), ids=SIZES[:2])
def test_policy_loss_from_hidden(run, device, shapes, size):
    widths = wanted(WIDTHS, shapes, device)
    if size >= len(widths):
        pytest.skip(f"--shapes {shapes} has {len(widths)} width on {device.type}")
    b, length, v = LOGITS[shapes, device.type]
    run(from_hidden(b, length, widths[size], v, torch.bfloat16 if device.type == "cuda" else torch.float32, device))
