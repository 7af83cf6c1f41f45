"""The Triton kernel of `hindsight_information` on hard pairs of streams, in the interpreter (`test_triton_interpreter.py` runs this file)."""

from __future__ import annotations

import math

import pytest
import torch
from contract import assert_within_budget
from streams import NAMES, streams

from acpo_kernels import HindsightInformation, reference
from acpo_kernels._triton import hindsight_information as kernels
from acpo_kernels._triton import logits_rows
from acpo_kernels._triton import logprob_entropy as alone

VOCAB = logits_rows.STEP.value + 200  # one step without a mask, and one with


def both(logits, hindsight, ids, temperature=1.0):
    number, tensor = (None, temperature) if isinstance(temperature, torch.Tensor) else (temperature, None)
    return HindsightInformation(*kernels.hindsight_information(logits, hindsight, ids, number, tensor, None))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_hard_streams(name, dtype):
    logits, hindsight, ids, temperature = streams(name, VOCAB if dtype == torch.float32 else 700)
    logits, hindsight = logits.to(dtype), hindsight.to(dtype)
    actual, turned = both(logits, hindsight, ids, temperature), both(hindsight, logits, ids, temperature)
    for result, a, b in ((actual, logits, hindsight), (turned, hindsight, logits)):
        single, exact = (reference.hindsight_information(a.to(k), b.to(k), ids, temperature=temperature) for k in (torch.float32, torch.float64))
        for field, x, y, z in zip(HindsightInformation._fields, result, single, exact, strict=True):
            assert_within_budget(x, y, z, f"{name}: {field}")
    assert torch.equal(turned.kl, actual.information) and torch.equal(turned.information, actual.kl)
    assert torch.equal(turned.logp, actual.hindsight_logp) and torch.equal(turned.hindsight_logp, actual.logp)
    own = tuple(torch.empty(ids.shape) for _ in range(4))
    number, tensor = (1.0, temperature) if isinstance(temperature, torch.Tensor) else (temperature, None)
    alone.forward(logits, ids, number, tensor, None, own)
    assert torch.equal(actual.logp, own[0]) and torch.equal(actual.entropy, own[1])  # the same bits


@pytest.mark.parametrize(("closeness", "rtol"), [(0.1, 1e-6), (1e-2, 2e-6), (1e-3, 5e-5)])
def test_divergences_of_close_streams_keep_their_digits(closeness, rtol):
    torch.manual_seed(1)
    logits = torch.randn(4, VOCAB) * 3
    hindsight, ids = logits + closeness * torch.randn(4, VOCAB), torch.randint(VOCAB, (4,))
    actual = both(logits, hindsight, ids)
    exact = reference.hindsight_information(logits.double(), hindsight.double(), ids)
    for name in ("kl", "information"):
        torch.testing.assert_close(getattr(actual, name).double(), getattr(exact, name), rtol=rtol, atol=0)
    same = both(logits, logits.clone(), ids)
    assert not same.kl.any() and not same.information.any() and not same.log_ratio.any()


@pytest.mark.parametrize("at", [5, VOCAB - 1])
def test_a_token_that_one_stream_forbids(at):
    """Far from the row's maximum, where its exponential is 0: still infinite on one side, and right on the other."""
    logits, hindsight, ids, _ = streams("close", VOCAB, rows=2)
    logits[0, at], hindsight[0, at] = -1000.0, -math.inf
    for a, b in ((logits, hindsight), (hindsight, logits)):
        result, exact = both(a, b, ids), reference.hindsight_information(a.double(), b.double(), ids)
        for name in ("kl", "information"):
            torch.testing.assert_close(getattr(result, name).double(), getattr(exact, name), rtol=1e-5, atol=0)
    assert both(logits, hindsight, ids).kl.isinf().tolist() == [True, False]
