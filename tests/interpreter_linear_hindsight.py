"""The Triton kernel of two streams of hidden states in the interpreter (`test_triton_interpreter.py` runs this file)."""

from __future__ import annotations

import math

import pytest
import torch
from contract import assert_within_budget
from linear_kernels import DTYPES, inputs

from acpo_kernels import HindsightInformation, reference
from acpo_kernels._triton import linear_hindsight_information as hindsight


def both_streams(hidden, other, weight, ids, bias=None, *, temperature=1.0, softcap=None, mask=None):
    number, tensor = (None, temperature) if isinstance(temperature, torch.Tensor) else (temperature, None)
    return hindsight.forward(hidden, other, weight, ids, bias, number, tensor, softcap, mask)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("closeness", [1.0, 1e-2])
@pytest.mark.parametrize(("rows", "vocab", "width", "softcap"), [(2, 2, 3, None), (20, 1100, 24, 5.0)])
def test_hindsight_against_the_reference(rows, vocab, width, softcap, closeness, dtype):
    hidden, weight, ids, bias = inputs(rows, vocab, width, dtype)
    other = (hidden.float() + closeness * torch.randn(rows, width)).to(dtype)
    settings = dict(temperature=torch.rand(rows) + 0.5, softcap=softcap, mask=torch.rand(rows) < 0.8)
    actual = both_streams(hidden, other, weight, ids, bias, **settings)
    single, exact = (
        reference.linear_hindsight_information(hidden.to(k), other.to(k), weight.to(k), ids, bias=bias.to(k), **settings)
        for k in (torch.float32, torch.float64)
    )
    for name, x, y, z in zip(HindsightInformation._fields, actual, single, exact, strict=True):
        assert_within_budget(x, y, z, name, factor=4.0)


@pytest.mark.parametrize("spread", [1e-4, 1.0, 40.0])
def test_divergences_relative_to_themselves(spread):
    """Near streams keep what the sum of non-negative terms in float32 loses; equal streams give exactly 0."""
    hidden, weight, ids, _ = inputs(20, 700, 8)
    hidden, weight = hidden.mul(64).round() / 64, weight.mul(64).round() / 64  # exact logits: their rounding is not what is tested
    step = 2.0 ** round(math.log2(spread / 8))
    other = hidden + step * torch.randn(20, 8).mul(8).round()
    actual = both_streams(hidden, other, weight, ids)
    exact = reference.linear_hindsight_information(hidden.double(), other.double(), weight.double(), ids)
    for name in ("kl", "information"):
        i = HindsightInformation._fields.index(name)
        torch.testing.assert_close(actual[i].double(), exact[i], rtol=2e-3 if spread < 1e-2 else 2e-5, atol=0)
    same = both_streams(hidden, hidden.clone(), weight, ids)
    assert all((same[i] == 0).all() for i in (3, 4, 5)) and torch.equal(same[0], same[1])


def test_hindsight_rows_stay_alone():
    hidden, weight, ids, bias = inputs(70, 1040, 8)
    other, bias[5] = torch.randn_like(hidden), -math.inf
    clean = both_streams(hidden, other, weight, ids, bias)
    assert all(x.isfinite().all() for x in clean[2:3] + clean[4:])
    mask = torch.rand(70) < 0.5
    dirty = torch.where(mask.unsqueeze(-1), hidden, math.nan)
    moved = both_streams(dirty, other, weight, torch.where(mask, ids, -1), bias, mask=mask)
    alone = both_streams(hidden[69:], other[69:], weight, ids[69:], bias)
    hidden, ids = hidden.clone(), ids.clone()
    hidden[3, 0], ids[4] = math.nan, 1040
    broken = both_streams(hidden, other, weight, ids, bias)
    kept = torch.arange(70) != 3
    kept[4] = False
    for name, x, y, z, b in zip(HindsightInformation._fields, clean, moved, alone, broken, strict=True):
        assert torch.equal(x[mask].nan_to_num(), y[mask].nan_to_num()) and (y[~mask] == 0).all(), name
        assert torch.equal(x[69:], z), name
        assert torch.equal(x[kept].nan_to_num(), b[kept].nan_to_num()), name
        assert b[4].isnan() and (name == "hindsight_logp" or b[3].isnan()), name
