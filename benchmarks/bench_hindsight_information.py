"""`hindsight_information` beside torch.compile and eager of its formula, and two calls of `logprob_entropy` (which give three of its six
results). Bytes: 2 N V s, both streams once."""

from __future__ import annotations

import pytest
import torch

from acpo_kernels import hindsight_information, logprob_entropy, reference

from . import peers
from .common import SIZES, Case, Expected, Provider, V, amax_ceiling, copy_ceiling, sampled_rows

SHAPES = {
    ("small", "cpu"): [(8, 1000)], ("default", "cpu"): [(64, V), (512, V)], ("large", "cpu"): [(64, V), (512, V)],
    ("small", "cuda"): [(64, 5000)], ("default", "cuda"): [(8192, V)], ("large", "cuda"): [(8192, V)],
}  # fmt: skip
NAMES = ("logp", "hindsight_logp", "entropy", "log_ratio", "kl", "information")


def case(n: int, v: int, dtype: torch.dtype, device: torch.device) -> Case:
    logits = torch.randn(n, v, device=device) * 2
    streams = logits.to(dtype), (logits + 0.5 * torch.randn(n, v, device=device)).to(dtype)
    ids = torch.randint(v, (n,), device=device)

    def call(function):
        def forward():
            with torch.no_grad():
                return dict(zip(NAMES, function(*streams, ids), strict=True))

        return forward

    def two_calls():
        with torch.no_grad():
            (logp, entropy), (hindsight_logp, _) = (logprob_entropy(stream, ids) for stream in streams)
        return {"logp": logp, "hindsight_logp": hindsight_logp, "entropy": entropy, "log_ratio": hindsight_logp - logp}

    def expected(of: str) -> dict[str, Expected]:
        rows = sampled_rows(n, device)
        exact, single = (reference.hindsight_information(*(s[rows].to(d) for s in streams), ids[rows]) for d in (torch.float64, torch.float32))
        return {name: Expected(e, s, rows) for name, e, s in zip(NAMES, exact, single, strict=True)}

    found, absent = peers.find("hindsight_information", device)
    providers = {"ours": Provider(call(hindsight_information))} | {name: Provider(call(f)) for name, f in found.items()}
    providers["2 x logprob_entropy"] = Provider(two_calls, "neither kl nor information")
    both = torch.cat(streams)
    return Case(
        "hindsight_information", "forward", {"N": n, "V": v}, dtype, device, providers, expected, bytes=both.numel() * both.element_size(),
        ceilings={"copy": copy_ceiling(both), "amax": amax_ceiling(both)}, absent=absent,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", range(2), ids=SIZES[:2])
def test_hindsight_information(run, device, shapes, dtype, size):
    wanted = SHAPES[shapes, device.type]
    if size >= len(wanted):
        pytest.skip(f"--shapes {shapes} has {len(wanted)} size on {device.type}")
    run(case(*wanted[size], dtype, device))
