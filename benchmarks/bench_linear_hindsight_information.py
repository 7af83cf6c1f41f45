"""`linear_hindsight_information` beside torch.compile and eager of its formula. FLOP: 4 N H V, one product a stream."""

from __future__ import annotations

import pytest
import torch

from acpo_kernels import linear_hindsight_information, reference

from . import peers
from .bench_hindsight_information import NAMES
from .bench_linear_logprob_entropy import bare_products, inputs, products_as_they_are
from .common import Case, Expected, Provider, V, copy_ceiling, sampled_rows

SHAPES = {
    ("small", "cpu"): (16, 128, 1000), ("default", "cpu"): (64, 896, V), ("large", "cpu"): (256, 896, V),
    ("small", "cuda"): (64, 128, 5000), ("default", "cuda"): (8192, 896, V), ("large", "cuda"): (8192, 896, V),
}  # fmt: skip


def case(n: int, h: int, v: int, dtype: torch.dtype, device: torch.device) -> Case:
    hidden, weight, ids = inputs(n, h, v, dtype, device)
    hinted = (hidden.float() + 0.3 * torch.randn(n, h, device=device)).to(dtype)

    def call(function):
        def forward():
            with torch.no_grad():
                return dict(zip(NAMES, function(hidden, hinted, weight, ids), strict=True))

        return forward

    def expected(of: str) -> dict[str, Expected]:
        rows = sampled_rows(n, device, 32)
        exact, single = (
            reference.linear_hindsight_information(hidden[rows].to(d), hinted[rows].to(d), weight.to(d), ids[rows])
            for d in (torch.float64, torch.float32)
        )
        return {name: Expected(e, s, rows, factor=4.0) for name, e, s in zip(NAMES, exact, single, strict=True)}

    found, absent = peers.find("linear_hindsight_information", device)
    providers = {"ours": Provider(call(linear_hindsight_information))} | {name: Provider(call(f)) for name, f in found.items()}
    both = torch.cat([hidden, hinted])
    ceilings = {"matrix products": bare_products(both, weight, backward=False), "copy": copy_ceiling(weight)}
    if device.type == "cpu" and dtype == torch.bfloat16:
        ceilings["matrix products, bfloat16"] = products_as_they_are(both, weight, backward=False)
    return Case(
        "linear_hindsight_information", "forward", {"N": n, "H": h, "V": v}, dtype, device, providers, expected,
        bytes=(both.numel() + weight.numel()) * weight.element_size(), flop=4 * n * h * v,
        ceilings=ceilings, absent=absent,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_linear_hindsight_information(run, device, shapes, dtype):
    if device.type == "cuda" and dtype == torch.float32 and shapes != "small":
        pytest.skip("heads are bfloat16 on a GPU; float32 is tested, not timed")
    if device.type == "cpu" and dtype == torch.float32 and shapes == "default":
        pytest.skip("on the CPU float32 is measured with --shapes large")
    run(case(*SHAPES[shapes, device.type], dtype, device))
