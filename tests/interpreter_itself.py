"""What `interpreter.py` changes of Triton's interpreter (`test_triton_interpreter.py` runs this file)."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl


@triton.jit
def _twice(source, target, count: tl.constexpr):
    at = tl.arange(0, count)
    value = tl.load(source + at)
    tl.store(target + at, value + value)


@triton.jit
def _rounded(source, target, count: tl.constexpr):
    at = tl.arange(0, count)
    tl.store(target + at, tl.load(source + at).to(tl.bfloat16))


@pytest.mark.parametrize(("kind", "most"), [(torch.int32, 2**30), (torch.int16, 2**14)])
def test_an_overflow_is_seen(kind, most):
    out = torch.zeros(2, dtype=kind)
    _twice[(1,)](torch.tensor([most - 1, -most], dtype=kind), out, 2)
    assert out.tolist() == [2 * most - 2, -2 * most]
    for beyond in (most, -most - 1):
        with pytest.raises(Exception, match=r"int\d\d of add"):
            _twice[(1,)](torch.tensor([0, beyond], dtype=kind), out, 2)


def test_bfloat16_is_rounded_to_the_nearest_even():
    values, out = torch.randn(64), torch.empty(64, dtype=torch.bfloat16)
    _rounded[(1,)](values, out, 64)
    assert torch.equal(out, values.bfloat16())
