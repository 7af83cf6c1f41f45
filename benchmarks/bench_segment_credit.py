"""`segment_credit` beside the eager reference chain. Bytes: scores and weights (4 S each), offsets (8 S), mask (N), token advantages (4 N)."""

from __future__ import annotations

import pytest
import torch

from acpo_kernels import reference, segment_credit

from .common import SIZES, Case, Expected, Provider, copy_ceiling
from .hierarchy import SHAPES, segments_of


def case(n: int, s: int, b: int, form: str, device: torch.device) -> Case:
    segments = segments_of(n, s, b, device)
    scores, advantages = torch.randn(s, device=device), torch.randn(b, device=device)
    mask = torch.rand(n, device=device) < 0.9

    def call(impl):
        return lambda: segment_credit(scores, segments, advantages, mask=mask, form=form, impl=impl)._asdict()

    def expected(of: str) -> dict[str, Expected]:
        exact, single = (
            reference.segment_credit(scores.to(d), segments, advantages.to(d), mask=mask, form=form) for d in (torch.float64, torch.float32)
        )
        return {name: Expected(getattr(exact, name), getattr(single, name)) for name in exact._fields}

    moved = 16 * s + 4 * b + 5 * n
    return Case(
        f"segment_credit {form}", "forward", {"N": n, "S": s, "B": b}, torch.float32, device,
        {"ours": Provider(call(None)), "eager": Provider(call("reference"), "the reference's chain of torch calls")}, expected, bytes=moved,
        ceilings={"copy": copy_ceiling(torch.randn(moved // 4, device=device))}, launch_bound=True,
    )  # fmt: skip


@pytest.mark.parametrize("form", ["weights", "additive"])
@pytest.mark.parametrize("size", range(2), ids=SIZES[:2])
def test_segment_credit(run, device, shapes, form, size):
    if size >= len(SHAPES[shapes]):
        pytest.skip(f"--shapes {shapes} has {len(SHAPES[shapes])} size")
    run(case(*SHAPES[shapes][size], form, device))
