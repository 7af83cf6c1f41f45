"""`linear_logprob_entropy` beside the bare matrix products, TRL's chunked head, Liger, cut-cross-entropy, verl, eager and torch.compile.

FLOP: forward 2 N H V, backward 6 N H V (the logits again, then dHidden and dW). Shares: with a share u of unmasked rows and a share a
of rows whose gradient is not zero, (2 u + 6 a) N H V are needed; peers take the same rows and gradients and do what they do.
The bare products write N x V tensors in the inputs' dtype: forward one, forward + backward three (6 N H V).
"""

from __future__ import annotations

import pytest
import torch

from acpo_kernels import linear_logprob_entropy, reference

from . import peers
from .common import SIZES, Case, Ceiling, Expected, Provider, V, copy_ceiling, gradients

# (N, H, V)
SHAPES = {
    ("small", "cpu"): [(16, 128, 1000)], ("default", "cpu"): [(256, 896, V)], ("large", "cpu"): [(256, 896, V), (256, 1536, V)],
    ("small", "cuda"): [(64, 128, 5000)], ("default", "cuda"): [(8192, 896, V)],
    ("large", "cuda"): [(8192, h, V) for h in (896, 1536, 2048, 4096)],
}  # fmt: skip
ONE_OUTPUT = {"cut-cross-entropy"}


FALLBACKS = ("Liger", "cut-cross-entropy")  # their kernels need a GPU; what they run here is torch in chunks, at seconds a call


def inputs(n: int, h: int, v: int, dtype: torch.dtype, device: torch.device):
    """Hidden states and a head whose logits have a standard deviation of 2."""
    hidden = torch.randn(n, h, device=device).to(dtype)
    weight = (torch.randn(v, h, device=device) * (2 / h**0.5)).to(dtype)
    return hidden, weight, torch.randint(v, (n,), device=device)


def bare_products(hidden, weight, backward: bool) -> Ceiling:
    n, (v, h) = len(hidden), weight.shape
    logits = torch.empty(n, v, dtype=hidden.dtype, device=hidden.device)
    if not backward:
        return Ceiling(lambda: torch.mm(hidden, weight.T, out=logits), flop=2 * n * h * v)
    logits.copy_(torch.randn(n, v, device=hidden.device))

    def products():
        torch.mm(hidden, weight.T, out=logits)
        torch.mm(logits, weight)
        torch.mm(logits.T, hidden)

    return Ceiling(products, flop=6 * n * h * v)


def case(n, h, v, dtype, mode, device, temperature: float = 1.0, unmasked: float = 1.0, active: float = 1.0, slow_peers: bool = False) -> Case:
    hidden, weight, ids = inputs(n, h, v, dtype, device)
    backward = mode == "forward+backward"
    order = torch.randperm(n, device=device)
    mask = torch.zeros(n, dtype=torch.bool, device=device)
    mask[order[: round(unmasked * n)]] = True
    if unmasked < 1:
        ids = torch.where(mask, ids, reference.IGNORED)
    flows = torch.zeros(n, device=device)
    flows[order[: round(active * n)]] = 1.0
    incoming = {"logp": torch.randn(n, device=device) * flows, "entropy": 0.01 * flows}

    def call(function):
        if backward:
            return lambda: gradients(lambda x, w: function(x, w, ids, temperature), {"hidden": hidden, "weight": weight}, incoming)

        def forward():
            with torch.no_grad():
                return {name: out for name, out in zip(incoming, function(hidden, weight, ids, temperature), strict=True) if out is not None}

        return forward

    def ours(x, w, ids, temperature):
        return linear_logprob_entropy(x, w, ids, temperature=temperature)

    # Peers have no common notion of a masked row: beside ours they stand where every row counts.
    found, absent = peers.find("linear_logprob_entropy", device) if unmasked == 1 else ({}, {})
    if device.type == "cpu" and v == V:
        for name in FALLBACKS if not slow_peers else ():
            if found.pop(name, None):
                absent[name] = "on the CPU torch in chunks, seconds a call: --shapes large"
    providers = {"ours": Provider(call(ours))} | {
        name: Provider(call(f), *(("log-prob alone", "logp") if name in ONE_OUTPUT else ())) for name, f in found.items()
    }
    shape = {"N": n, "H": h, "V": v} | ({} if temperature == 1 else {"T": temperature})
    if unmasked < 1 or active < 1:
        shape |= {"u": unmasked, "a": active}
    return Case(
        "linear_logprob_entropy", mode, shape, dtype, device, providers,
        lambda of: expected(hidden, weight, ids, incoming, temperature, backward, of),
        bytes=(n * h + v * h) * hidden.element_size() * (3 if backward else 1),
        flop=round((2 * unmasked + (6 * active if backward else 0)) * n * h * v),
        ceilings={"matrix products": bare_products(hidden, weight, backward), "copy": copy_ceiling(weight)}, absent=absent,
    )  # fmt: skip


def expected(hidden, weight, ids, incoming, temperature, backward, gradients_of, step: int = 64) -> dict[str, Expected]:
    """Rows in pieces, dW summed over them: the float64 logits of a whole batch would not fit. Masked rows hold zeros, and rows without
    a gradient need no backward: rows that have one come first."""
    names = [name for name in incoming if gradients_of in ("all", name)]
    flows = torch.stack([incoming[name] != 0 for name in names]).any(0)
    order = torch.cat([part.nonzero().squeeze(1) for part in (flows, ~flows & (ids != reference.IGNORED))])
    out = {}
    for dtype in (torch.float64, torch.float32):
        w = weight.detach().to(dtype).requires_grad_(backward)
        one = {name: torch.zeros(len(ids), dtype=dtype, device=ids.device) for name in names}
        if backward:
            one["d_hidden"] = torch.zeros(hidden.shape, dtype=dtype, device=ids.device)
        for rows in order.split(step):
            needed = backward and bool(flows[rows].any())
            x = hidden[rows].detach().to(dtype).requires_grad_(needed)
            with torch.set_grad_enabled(needed):
                results = reference.linear_logprob_entropy(x, w, ids[rows], temperature=temperature)._asdict()
            for name in names:
                one[name][rows] = results[name].detach()
            if needed:
                torch.autograd.backward([results[name] for name in names], [incoming[name][rows].to(dtype) for name in names])
                one["d_hidden"][rows] = x.grad
        if backward:
            one["d_weight"] = w.grad
        out[dtype] = one
    # Products on matrix units may sum in another order than the reference: the contract's factor of 4
    return {
        name: Expected(exact, out[torch.float32][name], None, 4.0, hidden.dtype if name.startswith("d_") else None)
        for name, exact in out[torch.float64].items()
    }


@pytest.mark.parametrize("mode", ["forward", "forward+backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", range(4), ids=SIZES[:4])
def test_linear_logprob_entropy(run, device, shapes, dtype, mode, size):
    wanted = SHAPES[shapes, device.type]
    if size >= len(wanted):
        pytest.skip(f"--shapes {shapes} has {len(wanted)} sizes on {device.type}")
    if device.type == "cuda" and dtype == torch.float32 and shapes != "small":
        pytest.skip("heads are bfloat16 on a GPU; float32 is tested, not timed")
    run(case(*wanted[size], dtype, mode, device, slow_peers=shapes == "large"))


@pytest.mark.parametrize("size", range(4), ids=SIZES[:4])
def test_linear_logprob_entropy_temperature(run, device, shapes, size):
    wanted = SHAPES[shapes, device.type]
    if size >= len(wanted):
        pytest.skip(f"--shapes {shapes} has {len(wanted)} sizes on {device.type}")
    if device.type == "cpu" and shapes != "small":
        pytest.skip("a temperature is free beside a matrix product on the CPU")
    run(case(*wanted[size], torch.bfloat16, "forward+backward", device, temperature=0.7))


@pytest.mark.parametrize(("unmasked", "active"), [(1.0, 0.25), (0.25, 0.25)], ids=["u1-a.25", "u.25-a.25"])
def test_linear_logprob_entropy_shares(run, device, shapes, unmasked, active):
    """Rows whose gradient is zero (clipped, no advantage), and rows that are masked."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    run(case(*SHAPES[shapes, device.type][0], dtype, "forward+backward", device, unmasked=unmasked, active=active))
