"""The C++ head: every instruction set, sizes around its panels, blocks, units, slices and groups, and what it must not do.

The contract itself is tested in test_linear_logprob_entropy*.py, on whatever implementation the dispatcher chooses.
"""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from linear_logprob_entropy_cases import NAMES, forward_backward, inputs
from ragged import assert_right

from acpo_kernels import HindsightInformation, _cpu, hindsight_information, linear_hindsight_information, linear_logprob_entropy
from acpo_kernels.reference import head_logits

pytestmark = pytest.mark.skipif(not _cpu.available, reason="built without the C++ extension")
LOW = (torch.float32, torch.bfloat16, torch.float16)
# (rows, V, H): one of everything; a lane short of, at and past a panel of 32 rows and a block of 112 entries; past a unit of 896
# and a slice of 4,032; past a piece of 256 of H
SIZES = [(1, 1, 1), (31, 111, 31), (32, 112, 32), (33, 113, 33), (17, 905, 300), (5, 4500, 7)]


def right(names, actual, single, exact, dtype):
    for i, (name, x, y, z) in enumerate(zip(names, actual, single, exact, strict=True)):
        assert_right(name, x, y, z, factor=4.0, gradient_dtype=dtype if name.startswith("gradient") and i >= 2 else None)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("size", SIZES)
def test_against_the_reference(size, dtype, head_isa):
    hidden, weight, ids, bias = inputs(*size, dtype)
    upstream = [torch.randn(size[0]) for _ in range(2)]
    for settings in ({}, dict(softcap=3.0, temperature=torch.rand(size[0]) + 0.5, mask=torch.rand(size[0]) < 0.8)):

        def run(kind, impl, settings=settings):
            leaves = hidden.to(kind), weight.to(kind), ids, bias.to(kind)
            return forward_backward(*leaves, *(g.to(kind) if kind == torch.float64 else g for g in upstream), **settings, impl=impl)

        right(NAMES, run(dtype, None), run(torch.float32, "reference"), run(torch.float64, "reference"), dtype)


def test_rounding_the_gradient_of_the_logits_to_bfloat16_costs_large_elements_nothing(head_isa):
    """Equal rows of weight: each row's gradient of hidden is 0. Equal rows of hidden whose gradients nearly cancel: so does that of weight.
    Rounded elements leave 2e-3 of either summand, a hundred times what remains of the second."""
    bias = torch.tensor([0.0, 0.7, -1.3])
    leaves = [torch.randn(1, 40).bfloat16().expand(n, 40).clone().requires_grad_() for n in (2, 3)]
    logp, _ = linear_logprob_entropy(*leaves, torch.tensor([0, 0]), bias=bias)
    grad_hidden, grad_weight = torch.autograd.grad(logp, leaves, torch.tensor([1.0, -0.99]))
    assert grad_hidden.abs().max() < 2e-6 * leaves[1].abs().max()
    p = torch.softmax((leaves[0].double() @ leaves[1].double().T)[0] + bias.double(), -1)
    exact = (torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64) - p)[:, None] * leaves[0][:1].double() * (1.0 - torch.tensor(0.99)).double()
    assert (grad_weight - exact).abs().max() <= (2**-8 + 1e-4) * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_more_rows_than_a_group(dtype, head_isa):
    hidden, weight, ids, bias = inputs(1061, 150, 33, dtype)  # the last panel of the second group holds 5 rows
    run = lambda kind, impl: forward_backward(hidden.to(kind), weight.to(kind), ids, bias.to(kind), 1.0, 0.3, impl=impl)  # noqa: E731
    whole = run(dtype, None)
    right(NAMES, whole, run(torch.float32, "reference"), run(torch.float64, "reference"), dtype)
    for name, x, y in zip(NAMES, whole, run(dtype, None), strict=True):
        assert torch.equal(x, y), f"{name} of the same call twice"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bitwise_alone_in_any_batch_and_for_any_thread_count(dtype, head_isa):
    hidden, weight, ids, bias = inputs(65, 4100, 40, dtype)
    other, upstream = hidden.flip(0), (torch.randn(65), torch.randn(65))
    whole = forward_backward(hidden, weight, ids, bias, *upstream)
    both = linear_hindsight_information(hidden, other, weight, ids, bias=bias)
    for rows in (slice(0, 1), slice(64, 65), slice(31, 33), slice(7, 14), slice(1, 65)):
        part = forward_backward(hidden[rows], weight, ids[rows], bias, *(g[rows] for g in upstream))
        for name, x, y in zip(NAMES[:3], part, whole, strict=False):
            assert torch.equal(x, y[rows]), f"{name} of {rows}"
        part = linear_hindsight_information(hidden[rows], other[rows], weight, ids[rows], bias=bias)
        for name, x, y in zip(HindsightInformation._fields, part, both, strict=True):
            assert torch.equal(x, y[rows]), f"{name} of {rows}"
    for threads in (1, 3):
        torch.set_num_threads(threads)
        for name, x, y in zip(NAMES, forward_backward(hidden, weight, ids, bias, *upstream), whole, strict=True):
            assert torch.equal(x, y), f"{name} on {threads} threads"
        for x, y in zip(linear_hindsight_information(hidden, other, weight, ids, bias=bias), both, strict=True):
            assert torch.equal(x, y)


def test_nan_and_infinite_rows(head_isa):
    hidden, weight, ids, bias = inputs(40, 1000, 9)
    clean = forward_backward(hidden, weight, ids, bias)
    broken = hidden.clone()
    broken[3, 2], broken[35, 0] = math.nan, math.inf
    others = [i for i in range(40) if i not in (3, 35)]
    dirty = forward_backward(broken, weight, ids, bias)
    for name, x, y in zip(NAMES[:3], dirty, clean, strict=False):
        assert torch.equal(x[others], y[others]), name
        assert x[[3, 35]].isnan().all(), name
    assert dirty[3].isnan().all()
    assert dirty[4].isnan().all()
    all_impossible = linear_logprob_entropy(hidden, weight, ids, bias=torch.full_like(bias, -math.inf))
    assert all(x.isnan().all() for x in all_impossible)
    streams = linear_hindsight_information(hidden, broken, weight, ids, bias=bias)
    assert not streams.logp.isnan().any()
    assert all(x[[3, 35]].isnan().all() and not x[others].isnan().any() for x in (streams.log_ratio, streams.kl, streams.information))


def test_confident_rows_and_maxima_that_rise(head_isa):
    """The maximum rises from block to block and from unit to unit; the last entry has a margin of 40 over the others."""
    vocab = 2500
    weight = torch.zeros(vocab, 2)
    weight[:, 0] = torch.linspace(-30.0, 0.0, vocab)
    weight[-1, 1] = 40.0
    hidden = torch.tensor([[1.0, 1.0], [0.0, 1.0], [1.0, 0.0]])
    ids = torch.tensor([vocab - 1, vocab - 1, 5])
    run = lambda kind, impl: forward_backward(hidden.to(kind), weight.to(kind), ids, impl=impl)  # noqa: E731
    actual, exact = run(torch.float32, None), run(torch.float64, "reference")
    for name, x, y in zip(NAMES[:2], actual, exact, strict=False):  # a log-prob of -1e-15 and its entropy, to working accuracy
        torch.testing.assert_close(x.double(), y, rtol=3e-6, atol=0.0, msg=lambda m, n=name: f"{n}: {m}")
    right(NAMES[:4], actual, run(torch.float32, "reference"), exact, torch.float32)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("size", SIZES)
def test_hindsight_against_the_reference(size, dtype, head_isa):
    hidden, weight, ids, bias = inputs(*size, dtype)
    for distance, settings in ((1.0, {}), (0.03, dict(softcap=5.0, temperature=torch.rand(size[0]) + 0.5, mask=torch.rand(size[0]) < 0.8))):
        other = (hidden + distance * torch.randn(size[0], size[2])).to(dtype)

        def run(kind, impl, other=other, settings=settings):
            streams = hidden.to(kind), other.to(kind)
            return linear_hindsight_information(*streams, weight.to(kind), ids, bias=bias.to(kind), **settings, impl=impl)

        right(HindsightInformation._fields, run(dtype, None), run(torch.float32, "reference"), run(torch.float64, "reference"), dtype)


def test_streams_that_agree(head_isa):
    hidden, weight, ids, bias = inputs(33, 3000, 20)
    same = linear_hindsight_information(hidden, hidden, weight, ids, bias=bias)
    assert all((x == 0).all() for x in (same.log_ratio, same.kl, same.information))
    # The divergences keep their relative accuracy: against float64 on the same logits, 1e-4 at 1e-9 nats. A common shift costs the
    # rounding of the difference of two logits, half a unit of 3, beside the distance.
    identity, logits = torch.eye(64), torch.randn(33, 64)  # products with the identity are exact
    for distance, shift in ((1e-1, 0.0), (1e-2, 0.0), (1e-4, 0.0), (1e-1, 3.0), (1e-2, 3.0), (1e-4, 3.0)):
        other = logits + distance * torch.randn(33, 64) + shift
        actual = linear_hindsight_information(logits, other, identity, ids % 64)
        exact = hindsight_information(logits.double(), other.double(), ids % 64, impl="reference")
        for name in ("kl", "information"):
            x, y = getattr(actual, name), getattr(exact, name)
            assert y.max() < 10 * distance**2
            rounding = 0.0 if shift == 0.0 else 2.0**-23 / distance
            torch.testing.assert_close(x.double(), y, rtol=1e-4 + 2 * rounding, atol=0.0, msg=lambda m, n=name: f"{n}: {m}")


def test_entries_that_one_stream_alone_can_choose(head_isa):
    weight, ids = torch.randn(300, 3), torch.zeros(4, dtype=torch.int64)
    weight[250, 2] = -3e38
    hidden = torch.cat([torch.randn(4, 2), torch.tensor([[10.0], [0.0], [10.0], [0.0]])], 1)  # -inf or 0 at entry 250
    other = torch.cat([torch.randn(4, 2), torch.tensor([[0.0], [10.0], [10.0], [0.0]])], 1)
    actual = linear_hindsight_information(hidden, other, weight, ids)
    exact = hindsight_information(*(head_logits(x, weight, None, None).double() for x in (hidden, other)), ids, impl="reference")
    assert actual.kl.isinf().tolist() == [False, True, False, False]
    assert actual.information.isinf().tolist() == [True, False, False, False]
    for name, x, y in zip(HindsightInformation._fields, actual, exact, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=2e-5, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_strided_operands(head_isa):
    hidden, weight, ids, bias = inputs(20, 150, 64)
    wide, tall = torch.randn(20, 70), torch.randn(300, 70)
    wide[:, 3:67], tall[::2, 5:69] = hidden, weight
    wanted = forward_backward(hidden, weight, ids, bias)
    leaves = [x.requires_grad_() for x in (wide[:, 3:67].detach(), tall[::2, 5:69].detach(), bias)]
    outs = linear_logprob_entropy(leaves[0], leaves[1], ids, bias=leaves[2])
    for name, x, y in zip(NAMES, (*outs, *torch.autograd.grad(sum(x.sum() for x in outs), leaves)), wanted, strict=True):
        assert torch.equal(x.detach(), y), name


MEMORY = """
import resource, sys, torch
from acpo_kernels import linear_logprob_entropy
N, H, V = map(int, sys.argv[1:])
torch.set_num_threads(2)
hidden, weight, ids = torch.randn(N, H), torch.randn(V, H), torch.randint(V, (N,))
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
linear_logprob_entropy(hidden[:1].requires_grad_(), weight[:200].clone().requires_grad_(), ids[:1] % 200).logp.sum().backward()
before = peak()
hidden.requires_grad_(), weight.requires_grad_()
logp, entropy = linear_logprob_entropy(hidden, weight, ids)
(logp.sum() + entropy.sum()).backward()
print(peak() - before - (hidden.numel() + weight.numel()) * 4 / 2**20)
"""


def test_memory():
    """MB beyond inputs and gradients, in a process of its own: at N = 2048, V = 40,000 the logits alone would be 312 MB."""
    out = subprocess.run([sys.executable, "-c", MEMORY, "2048", "64", "40000"], check=True, capture_output=True, text=True).stdout
    assert float(out) < 60


def test_without_the_extension(monkeypatch):
    """What ACPO_NO_EXT=1 leaves: PyTorch row tiles, the same numbers within the budget."""
    hidden, weight, ids, bias = inputs(70, 37, 8, torch.bfloat16)
    settings = dict(softcap=3.0, mask=torch.rand(70) < 0.8)
    with monkeypatch.context() as patch:
        patch.setattr(_cpu, "available", False)
        actual = forward_backward(hidden, weight, ids, bias, 1.0, 0.3, **settings)
        streams = linear_hindsight_information(hidden, hidden.flip(0), weight, ids, bias=bias)
    run = lambda kind: forward_backward(hidden.to(kind), weight.to(kind), ids, bias.to(kind), 1.0, 0.3, **settings, impl="reference")  # noqa: E731
    right(NAMES, actual, run(torch.float32), run(torch.float64), torch.bfloat16)
    for x, y in zip(streams, linear_hindsight_information(hidden, hidden.flip(0), weight, ids, bias=bias), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
