"""`segment_reduce` of 8 channels beside torch.segment_reduce (its own layout, [N,8] and one axis of segments).

Bytes: the values once (4 C N), the offsets (8 S) and the result (4 C S); forward + backward reads C S and writes C N more.
"""

from __future__ import annotations

import pytest
import torch

from acpo_kernels import reference, segment_reduce

from .common import SIZES, Case, Expected, Provider, copy_ceiling, gradients
from .hierarchy import SHAPES, segments_of

CHANNELS = 8


def case(n: int, s: int, b: int, reduce: str, mode: str, device: torch.device) -> Case:
    segments = segments_of(n, s, b, device)
    values = torch.randn(CHANNELS, n, device=device)
    rows = values.T.contiguous()
    incoming = torch.randn(CHANNELS, s, device=device)
    backward = mode == "forward+backward"
    lengths = segments.lengths

    def ours(x, impl=None):
        return (segment_reduce(x, segments, reduce=reduce, impl=impl),)

    def torch_reduce(x):
        return (torch.segment_reduce(x, reduce, lengths=lengths, axis=0),)

    def call(function, x, upstream, turn):
        def forward():
            with torch.no_grad():
                return {"out": turn(function(x)[0])}

        def both():
            results = gradients(function, {"values": x}, {"out": upstream})
            return {name: turn(value) for name, value in results.items()}

        return both if backward else forward

    def expected(of: str) -> dict[str, Expected]:
        def compute(dtype):
            x = values.to(dtype)
            function = lambda x: (reference.segment_reduce(x, segments, reduce=reduce),)  # noqa: E731
            return gradients(function, {"values": x}, {"out": incoming}) if backward else {"out": function(x)[0]}

        exact, single = compute(torch.float64), compute(torch.float32)
        return {
            name: Expected(e.detach(), single[name].detach(), gradient_dtype=torch.float32 if name != "out" else None) for name, e in exact.items()
        }

    providers = {
        "ours": Provider(call(ours, values, incoming, lambda t: t)),
        "eager": Provider(call(lambda x: ours(x, "reference"), values, incoming, lambda t: t), "index_add over segment ids"),
        "torch.segment_reduce": Provider(call(torch_reduce, rows, incoming.T.contiguous(), lambda t: t.T)),
    }
    moved = 4 * CHANNELS * (n + s) + 8 * (s + 1)
    return Case(
        f"segment_reduce {reduce}", mode, {"C": CHANNELS, "N": n, "S": s, "B": b}, torch.float32, device, providers, expected,
        bytes=2 * moved if backward else moved, ceilings={"copy": copy_ceiling(values)}, launch_bound=True,
    )  # fmt: skip


@pytest.mark.parametrize("mode", ["forward", "forward+backward"])
@pytest.mark.parametrize("reduce", ["sum", "mean", "max"])
@pytest.mark.parametrize("size", range(2), ids=SIZES[:2])
def test_segment_reduce(run, device, shapes, reduce, mode, size):
    if size >= len(SHAPES[shapes]):
        pytest.skip(f"--shapes {shapes} has {len(SHAPES[shapes])} size")
    if size > 0 and mode != "forward":
        pytest.skip("the second size is measured forward alone: the first touch of a gradient of 64 MB is most of its time")
    run(case(*SHAPES[shapes][size], reduce, mode, device))
