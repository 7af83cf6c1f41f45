"""`logprob_entropy` beside torch.compile, eager torch, TRL, flash-attn and quack; ceilings: a copy of the logits, one read of them (amax).

Bytes: forward N V s, forward + backward 3 N V s (two phases: read, then read and write).
"""

from __future__ import annotations

import pytest
import torch

from acpo_kernels import logprob_entropy, reference

from . import peers
from .common import SIZES, Case, Expected, Provider, V, amax_ceiling, copy_ceiling, gradients, sampled_rows

# (rows, V): 64 and 512 rows on the CPU, eight rollouts of a thousand tokens on a GPU
SHAPES = {
    ("small", "cpu"): [(8, 1000)], ("default", "cpu"): [(64, V), (512, V)], ("large", "cpu"): [(64, V), (512, V)],
    ("small", "cuda"): [(64, 5000)], ("default", "cuda"): [(8192, V)], ("large", "cuda"): [(8192, V)],
}  # fmt: skip

SLOW = ("eager", "TRL")


def case(n: int, v: int, dtype: torch.dtype, mode: str, device: torch.device, temperature: float = 1.0, slow_peers: bool = True) -> Case:
    logits = (torch.randn(n, v, device=device) * 2).to(dtype)
    ids = torch.randint(v, (n,), device=device)
    incoming = {"logp": torch.randn(n, device=device), "entropy": torch.full((n,), 0.01, device=device)}
    backward = mode == "forward+backward"

    def call(function):
        if backward:
            return lambda: gradients(lambda z: function(z, ids, temperature), {"logits": logits}, incoming)

        def forward():
            with torch.no_grad():
                return {name: out for name, out in zip(incoming, function(logits, ids, temperature), strict=True) if out is not None}

        return forward

    def ours(z, ids, temperature):
        return logprob_entropy(z, ids, temperature=temperature)

    found, absent = peers.find("logprob_entropy", device)
    found.pop("Liger GRPO", None)  # timed as a whole loss (bench_whole_loss.py): here it would have to copy the logits
    for name in () if slow_peers else SLOW:
        if found.pop(name, None):
            absent[name] = f"up to seconds a call of {n} rows on the CPU: --shapes large"
    one_output = {"quack", "flash-attn"}
    providers = {"ours": Provider(call(ours))} | {
        name: Provider(call(f), *(("log-prob alone", "logp") if name in one_output else ())) for name, f in found.items()
    }
    size = logits.numel() * logits.element_size()
    return Case(
        "logprob_entropy", mode, {"N": n, "V": v} | ({} if temperature == 1.0 else {"T": temperature}), dtype, device, providers,
        lambda of: expected(logits, ids, incoming, temperature, backward, of), bytes=3 * size if backward else size,
        ceilings={"copy": copy_ceiling(logits), "amax": amax_ceiling(logits)}, absent=absent,
    )  # fmt: skip


def expected(logits, ids, incoming, temperature, backward, gradients_of) -> dict[str, Expected]:
    rows = sampled_rows(len(ids), logits.device)
    upstream = {name: g[rows] for name, g in incoming.items() if gradients_of == "all" or name == gradients_of}
    out = {}
    for dtype in (torch.float64, torch.float32):
        z, function = logits[rows].to(dtype), lambda z: reference.logprob_entropy(z, ids[rows], temperature=temperature)
        out[dtype] = gradients(function, {"logits": z}, upstream) if backward else function(z)._asdict()
    return {
        name: Expected(exact.detach(), out[torch.float32][name].detach(), rows, gradient_dtype=logits.dtype if name.startswith("d_") else None)
        for name, exact in out[torch.float64].items()
    }


@pytest.mark.parametrize("mode", ["forward", "forward+backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", range(2), ids=SIZES[:2])
def test_logprob_entropy(run, device, shapes, dtype, mode, size):
    wanted = SHAPES[shapes, device.type]
    if size >= len(wanted):
        pytest.skip(f"--shapes {shapes} has {len(wanted)} size on {device.type}")
    run(case(*wanted[size], dtype, mode, device, slow_peers=device.type == "cuda" or shapes == "large" or size == 0))


@pytest.mark.parametrize("mode", ["forward", "forward+backward"])
def test_logprob_entropy_temperature(run, device, shapes, mode):
    """A temperature: some implementations divide each logit by it."""
    if device.type == "cpu" and mode == "forward" and shapes == "default":
        pytest.skip("forward + backward shows it; forward alone: --shapes large")
    run(case(*SHAPES[shapes, device.type][0], torch.bfloat16, mode, device, temperature=0.7))
