"""The Triton kernels on rows of logits, in the interpreter (`test_triton_interpreter.py` runs this file): hard pairs of streams, rows far apart."""

from __future__ import annotations

import math
import mmap

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


@pytest.mark.parametrize(("name", "dtype"), [(name, torch.float32) for name in NAMES] + [(name, torch.float16) for name in NAMES[::4]])
def test_hard_streams(name, dtype):
    logits, hindsight, ids, temperature = streams(name, VOCAB if dtype == torch.float32 else 700, rows=2 if name == "temperatures" else 1)
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
    logits = torch.randn(2, VOCAB) * 3
    hindsight, ids = logits + closeness * torch.randn(2, VOCAB), torch.randint(VOCAB, (2,))
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


def test_rows_that_lie_further_apart_than_32_bits_count():
    """Four rows 2^30 elements apart, in memory that nobody else touches: the last begins at element 3 2^30, past 2^31."""
    apart, vocab = 2**30, 40
    stride = (apart, 1)
    far = torch.frombuffer(mmap.mmap(-1, 2 * (3 * apart + vocab)), dtype=torch.bfloat16).as_strided((4, vocab), stride)
    near, ids = torch.randn(4, vocab).bfloat16(), torch.randint(vocab, (4,))
    far.copy_(near)
    wanted, actual = (both(x, near.flip(0), ids) for x in (near, far))
    for name, x, y in zip(HindsightInformation._fields, actual, wanted, strict=True):
        assert torch.equal(x, y), name
    results, grad = [tuple(torch.empty(4) for _ in range(4)) for _ in range(2)], torch.ones(4)
    for x, result in zip((near, far), results, strict=True):
        alone.forward(x, ids, 1.0, None, None, result)
        alone.backward(grad, grad, x, ids, result[1:], 1.0, None, None, x)  # the gradient takes the place of the logits
    assert torch.equal(far, near) and all(torch.equal(x, y) for x, y in zip(*results, strict=True))
