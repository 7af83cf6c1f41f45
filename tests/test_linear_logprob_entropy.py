"""linear_logprob_entropy and linear_hindsight_information: the same head, so the same tests."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ragged import assert_right

from acpo_kernels import HindsightInformation, _cpu, _torch, hindsight_information, linear_hindsight_information, linear_logprob_entropy
from acpo_kernels.reference import head_logits, logprob_entropy

IMPLS = (None, "reference")
needs_extension = pytest.mark.skipif(not _cpu.available, reason="built without the C++ extension")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def inputs(rows=19, vocab=37, width=8, dtype=torch.float32, device="cpu", scale=1.0):
    hidden = (torch.randn(rows, width, device=device) * scale).to(dtype)
    weight, bias = torch.randn(vocab, width, device=device).to(dtype), torch.randn(vocab, device=device).to(dtype)
    return hidden, weight, torch.randint(vocab, (rows,), device=device), bias


def forward_backward(hidden, weight, ids, bias=None, grad_logp=1.0, grad_entropy=1.0, **settings):
    """logp, entropy, and the gradients of hidden, weight and bias; a gradient of None leaves that output unused."""
    leaves = [x.detach().clone().requires_grad_() for x in (hidden, weight, bias) if x is not None]
    logp, entropy = linear_logprob_entropy(*leaves[:2], ids, bias=leaves[2] if bias is not None else None, **settings)
    objective = sum((out * g).sum() for out, g in ((logp, grad_logp), (entropy, grad_entropy)) if g is not None)
    return logp.detach(), entropy.detach(), *torch.autograd.grad(objective, leaves)


NAMES = ("logp", "entropy", "gradient of hidden", "gradient of weight", "gradient of bias")


# 1. Oracle


@pytest.mark.parametrize("impl", IMPLS)
def test_by_hand(impl, device):
    # Logits (log 1, log 2, log 5) in row 0 by the weight, uniform in row 1 where the hidden state is 0, and the bias alone below.
    weight = torch.tensor([[1.0], [2.0], [5.0]], dtype=torch.float64, device=device).log()
    hidden, ids = torch.tensor([[1.0], [0.0]], dtype=torch.float64, device=device), torch.tensor([2, 0], device=device)
    p = (1 / 8, 2 / 8, 5 / 8)
    entropy = -sum(x * math.log(x) for x in p)
    logp_, entropy_ = linear_logprob_entropy(hidden, weight, ids, impl=impl)
    assert logp_.tolist() == pytest.approx([math.log(5 / 8), -math.log(3)], rel=1e-14)
    assert entropy_.tolist() == pytest.approx([entropy, math.log(3)], rel=1e-14)
    bias = weight[:, 0]
    with_bias = linear_logprob_entropy(hidden, torch.zeros_like(weight), ids, bias=bias, impl=impl)
    assert with_bias.logp.tolist() == pytest.approx([math.log(5 / 8), math.log(1 / 8)], rel=1e-14)
    halved = linear_logprob_entropy(hidden * 2, weight, ids, temperature=2.0, impl=impl)
    assert halved.logp.tolist() == pytest.approx(logp_.tolist(), rel=1e-14)
    capped = linear_logprob_entropy(hidden, weight, ids, softcap=0.5, impl=impl)
    z = [0.5 * math.tanh(2 * math.log(x)) for x in (1, 2, 5)]
    assert float(capped.logp[0]) == pytest.approx(z[2] - math.log(sum(map(math.exp, z))), rel=1e-14)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradcheck(softcap, impl):
    hidden, weight, ids, bias = (x.requires_grad_() if x.is_floating_point() else x for x in inputs(5, 4, 3, torch.float64))
    ids[1] = -100
    mask = torch.tensor([1, 1, 1, 0, 1], dtype=torch.bool)
    temperature = torch.rand(5, dtype=torch.float64) + 0.5

    def both(hidden, weight, bias):
        return tuple(linear_logprob_entropy(hidden, weight, ids, bias=bias, temperature=temperature, softcap=softcap, mask=mask, impl=impl))

    torch.autograd.gradcheck(both, (hidden, weight, bias))


# 2. Implementation against the oracle


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "vocab", "width"), [(1, 1, 1), (2, 2, 3), (70, 37, 8), (130, 1009, 24)])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_against_the_reference(rows, vocab, width, softcap, dtype, device):
    hidden, weight, ids, bias = inputs(rows, vocab, width, dtype, device)
    mask = torch.rand(rows, device=device) < 0.8
    temperature = torch.rand(rows, device=device) + 0.5
    upstream = [torch.randn(rows, device=device) for _ in range(2)]

    def run(kind, impl):
        return forward_backward(
            hidden.to(kind), weight.to(kind), ids, bias.to(kind), *(g.to(kind) if kind == torch.float64 else g for g in upstream),
            temperature=temperature, softcap=softcap, mask=mask, impl=impl,
        )  # fmt: skip

    actual, exact = run(dtype, None), run(torch.float64, "reference")
    single = exact if dtype == torch.float64 else run(torch.float32, "reference")
    for i, (name, x, y, z) in enumerate(zip(NAMES, actual, single, exact, strict=True)):
        assert x.dtype == (dtype if i >= 2 or dtype == torch.float64 else torch.float32), name
        assert_right(name, x, y, z, factor=4.0, gradient_dtype=dtype if i >= 2 else None)


@pytest.mark.parametrize("dtype", DTYPES)
def test_hindsight_against_the_reference(dtype, device):
    hidden, weight, ids, bias = inputs(70, 37, 8, dtype, device)
    other = (hidden + 0.3 * torch.randn(70, 8, device=device)).to(dtype)
    mask = torch.rand(70, device=device) < 0.8
    temperature = torch.rand(70, device=device) + 0.5

    def run(kind, impl):
        return linear_hindsight_information(
            hidden.to(kind), other.to(kind), weight.to(kind), ids, bias=bias.to(kind), temperature=temperature, softcap=5.0, mask=mask, impl=impl
        )

    actual, exact = run(dtype, None), run(torch.float64, "reference")
    single = exact if dtype == torch.float64 else run(torch.float32, "reference")
    for name, x, y, z in zip(HindsightInformation._fields, actual, single, exact, strict=True):
        assert_right(name, x, y, z, factor=4.0)


def test_logits_that_are_rounded_fail_the_budget():
    hidden, weight, ids, _ = inputs(64, 500, 16, torch.bfloat16)
    exact = linear_logprob_entropy(hidden.double(), weight.double(), ids, impl="reference")
    single = linear_logprob_entropy(hidden.float(), weight.float(), ids, impl="reference")
    rounded = logprob_entropy((hidden @ weight.T), ids)  # what `lm_head` and then a float32 softmax do
    for name, x, y, z in zip(NAMES, rounded, single, exact, strict=False):
        with pytest.raises(AssertionError, match="budget"):
            assert_right(name, x, y, z, factor=4.0)


# 3. Properties


@given(st.integers(1, 20), st.integers(1, 30), st.integers(1, 6), st.integers(0, 2**32 - 1), st.sampled_from([None, 4.0]))
def test_it_is_the_head_and_then_the_operation_on_logits(rows, vocab, width, seed, softcap):
    torch.manual_seed(seed)
    hidden, weight, ids, bias = inputs(rows, vocab, width, torch.float64)
    other, mask = torch.randn_like(hidden), torch.rand(rows) < 0.8
    settings = dict(temperature=0.7, mask=mask)
    logits, hindsight = (head_logits(x, weight, bias, softcap) for x in (hidden, other))
    actual = linear_logprob_entropy(hidden, weight, ids, bias=bias, softcap=softcap, **settings)
    for x, y in zip(actual, logprob_entropy(logits, ids, **settings), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-13)
    actual = linear_hindsight_information(hidden, other, weight, ids, bias=bias, softcap=softcap, **settings)
    for x, y in zip(actual, hindsight_information(logits, hindsight, ids, **settings), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("vocab", "width"), [(17, 5), (1003, 32), (40_001, 4)])
def test_a_row_is_bitwise_the_same_alone_in_any_batch_and_at_any_position(vocab, width, dtype, device, monkeypatch):
    """Contract line 5, with V past the size where torch splits a lone row over its threads; 70 rows are two tiles there. On CUDA float64 is
    torch's own, whose sums are split by how many rows there are: there to its rounding."""

    def same(x, y):
        return torch.allclose(x, y, rtol=1e-13, atol=1e-13) if device.type == "cuda" and dtype == torch.float64 else torch.equal(x, y)

    if vocab > 40_000:
        monkeypatch.setattr(_torch, "TILE_ELEMENTS", {"cpu": 0, "cuda": 0})
    hidden, weight, ids, bias = inputs(70, vocab, width, dtype, device)
    upstream = torch.randn(70, device=device), torch.randn(70, device=device)
    whole = forward_backward(hidden, weight, ids, bias, *upstream)[:3]
    both = linear_hindsight_information(hidden, hidden.flip(0), weight, ids, bias=bias)
    for first, count in ((0, 1), (37, 1), (69, 1), (63, 2), (11, 15), (30, 17)) if vocab < 40_000 else ((37, 1), (69, 1), (63, 2)):
        rows = slice(first, first + count)
        part = forward_backward(hidden[rows], weight, ids[rows], bias, *(g[rows] for g in upstream))[:3]
        for name, x, y in zip(NAMES, part, whole, strict=False):
            assert same(x, y[rows]), f"{name} of {rows}"
        part = linear_hindsight_information(hidden[rows], hidden.flip(0)[rows], weight, ids[rows], bias=bias)
        for name, x, y in zip(HindsightInformation._fields, part, both, strict=True):
            assert same(x, y[rows]), f"{name} of {rows}"
    order = torch.randperm(70, device=device)
    moved = forward_backward(hidden[order], weight, ids[order], bias, *(g[order] for g in upstream))[:3]
    for name, x, y in zip(NAMES, moved, whole, strict=False):
        assert same(x, y[order]), name


def test_a_batch_of_several_tiles():
    rows = 2 * _torch.tile_rows(50) + 1  # the last tile holds one row
    hidden, weight, ids, bias = inputs(rows, 50, 6)
    whole = forward_backward(hidden, weight, ids, bias)
    exact = forward_backward(hidden.double(), weight.double(), ids, bias.double(), impl="reference")
    single = forward_backward(hidden, weight, ids, bias, impl="reference")
    for i, (name, x, y, z) in enumerate(zip(NAMES, whole, single, exact, strict=True)):
        assert_right(name, x, y, z, factor=4.0, gradient_dtype=torch.float32 if i >= 2 else None)
    last = forward_backward(hidden[-1:], weight, ids[-1:], bias)
    for name, x, y in zip(NAMES[:3], last, whole, strict=False):
        assert torch.equal(x[0], y[-1]), name
    again = forward_backward(hidden, weight, ids, bias)
    for name, x, y in zip(NAMES, whole, again, strict=True):
        assert torch.equal(x, y), f"{name} of the same call twice"


@pytest.mark.parametrize("impl", IMPLS)
def test_a_tied_weight_gets_both_gradients(impl):
    """A tied embedding is one weight with two gradients: through the embedding and through the head."""
    weight = torch.randn(11, 4, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([3, 3, 7])

    def objective(embedding, head):
        logp, entropy = linear_logprob_entropy(embedding[ids].tanh(), head, ids.flip(0), impl=impl)
        return (logp + 0.3 * entropy).sum()

    (tied,) = torch.autograd.grad(objective(weight, weight), weight)
    apart = [weight.detach().clone().requires_grad_() for _ in range(2)]
    torch.testing.assert_close(tied, sum(torch.autograd.grad(objective(*apart), apart)), rtol=1e-14, atol=1e-14)


# 4. Edges


@pytest.mark.parametrize("impl", IMPLS)
def test_masked_rows_that_hold_nan_reach_nothing(impl, device):
    hidden, weight, ids, bias = inputs(6, device=device)
    mask = torch.tensor([1, 0, 1, 1, 1, 0], dtype=torch.bool, device=device)
    ids[3], ids[5] = -100, 10**9  # out of range under the mask
    active = mask & (ids != -100)
    dirty = torch.where(active.unsqueeze(-1), hidden, math.nan)
    temperature = torch.where(active, 0.75, math.nan)  # a number that float32 holds exactly
    by_reciprocal = impl == "reference" and device.type == "cuda"  # torch there, where it divides by one number
    number = torch.full_like(temperature, 0.75) if by_reciprocal else 0.75
    wanted = forward_backward(hidden, weight, ids, bias, mask=mask, temperature=number, impl=impl)
    leaves = [x.clone().requires_grad_() for x in (dirty, weight, bias)]
    outs = linear_logprob_entropy(*leaves[:2], ids, bias=leaves[2], mask=mask, temperature=temperature, impl=impl)
    upstream = torch.where(active, 1.0, math.nan)  # an incoming gradient is not read there either
    grads = torch.autograd.grad(outs, leaves, [upstream, upstream])
    for name, x, y in zip(NAMES, (*outs, *grads), wanted, strict=True):
        assert torch.equal(x.detach(), y), name
    for x in wanted[:3]:
        assert (x[~active] == 0).all()
    both = linear_hindsight_information(dirty, dirty, weight, ids, mask=mask, temperature=temperature, impl=impl)
    assert all((x[~active] == 0).all() and x.isfinite().all() for x in both)


def test_an_active_nan_row_reaches_the_weight_but_no_other_row():
    hidden, weight, ids, bias = inputs(5)
    clean = forward_backward(hidden, weight, ids, bias)
    hidden[2, 1] = math.nan
    broken = forward_backward(hidden, weight, ids, bias)
    others = [0, 1, 3, 4]
    for x, y in zip(broken[:3], clean[:3], strict=True):
        assert x[2].isnan().all()
        assert torch.equal(x[others], y[others])
    assert broken[3].isnan().any()
    # The same row with a zero incoming gradient adds nothing, whatever it holds.
    silent = torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0])
    wanted = forward_backward(hidden.nan_to_num(), weight, ids, bias, silent, silent)[2:]
    leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    logp, entropy = linear_logprob_entropy(leaves[0], leaves[1], ids, bias=leaves[2])
    grads = torch.autograd.grad([logp, entropy], leaves, [silent, silent])
    for name, x, y in zip(NAMES[2:], grads, wanted, strict=True):
        assert torch.equal(x, y), name


def test_impossible_and_confident_tokens():
    vocab = 3000
    weight = torch.zeros(vocab, 2)
    weight[7, 0] = 40.0
    bias = torch.zeros(vocab)
    bias[9] = -math.inf
    hidden = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    ids = torch.tensor([7, 9, 8])
    logp, entropy, grad_hidden, grad_weight, grad_bias = forward_backward(hidden, weight, ids, bias, torch.tensor([1.0, 0.0, 0.0]), None)
    rest = (vocab - 2) * math.exp(-40.0)
    assert float(logp[0]) == pytest.approx(-rest, rel=1e-5, abs=0)
    assert float(entropy[0]) == pytest.approx(41 * rest, rel=1e-5, abs=0)
    assert float(grad_bias[7]) == pytest.approx(rest, rel=1e-5, abs=0)  # the target's gradient is not rounded to 0
    assert logp[1] == -math.inf
    assert float(logp[2]) == pytest.approx(-math.log(vocab - 1), rel=1e-6)
    assert grad_bias[9] == 0
    for x in (grad_hidden, grad_weight, grad_bias, entropy):
        assert x.isfinite().all()
    grads = forward_backward(hidden, weight, ids, bias, torch.tensor([0.0, 1.0, 0.0]), 1.0)[2:]
    assert all(x.isfinite().all() for x in grads)


@pytest.mark.parametrize("impl", IMPLS)
def test_shifted_logits(impl):
    """Entropy and log-probs do not move with an offset of 1e4 or a row maximum below -104."""
    weight = torch.randn(50, 3).mul(32).round() / 32  # exact in float32 beside the offset
    hidden, ids = torch.tensor([[1.0, 0.0, 1.0]]).expand(3, 3), torch.tensor([4, 4, 4])
    plain = linear_logprob_entropy(hidden, weight, ids, impl=impl)
    for offset in (1e4, -200.0):
        shifted = linear_logprob_entropy(hidden, weight, ids, bias=torch.full((50,), offset), impl=impl)
        for x, y in zip(shifted, plain, strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize("impl", IMPLS)
def test_nothing_and_strided_rows(impl, device):
    hidden, weight, ids, bias = inputs(0, device=device)
    results = forward_backward(hidden, weight, ids, bias, impl=impl)
    assert [tuple(x.shape) for x in results] == [(0,), (0,), (0, 8), (37, 8), (37,)]
    assert (results[3] == 0).all()
    assert all(x.shape == (0,) for x in linear_hindsight_information(hidden, hidden, weight, ids, impl=impl))
    hidden, weight, ids, bias = inputs(12, device=device)
    wide = torch.randn(12, 2, 8, device=device)
    wide[:, 1] = hidden
    wanted = forward_backward(hidden, weight, ids, bias, impl=impl)
    leaf, tall = wide.requires_grad_(), weight.T.contiguous().requires_grad_()
    logp, entropy = linear_logprob_entropy(leaf[:, 1], tall.T, ids.int(), bias=bias, impl=impl)
    grads = torch.autograd.grad((logp + entropy).sum(), (leaf, tall))
    for x, y in zip((logp, entropy, grads[0][:, 1], grads[1].T), wanted, strict=False):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
    assert (grads[0][:, 0] == 0).all()


def test_more_rows_than_a_grid_dimension(device):
    hidden, weight, ids, _ = inputs(66_000, 5, 2, device=device)
    logp, entropy, grad_hidden, _ = forward_backward(hidden, weight, ids)
    tail = forward_backward(hidden[65_980:], weight, ids[65_980:])
    assert torch.equal(logp[65_980:], tail[0])
    assert torch.equal(entropy[65_980:], tail[1])
    assert torch.equal(grad_hidden[65_980:], tail[2])


def work(hidden, weight, ids, upstream=None, mask=None):
    """Rows multiplied in (logits, gradient of hidden, gradient of weight): by the forward pass, and by the backward pass."""
    from acpo_kernels._cpu import _C

    begin = _C.head_work()
    logp, _ = linear_logprob_entropy(hidden, weight, ids, mask=mask)
    middle = _C.head_work()
    logp.backward(torch.ones_like(logp) if upstream is None else upstream)
    return [[y - x for x, y in zip(*pair, strict=True)] for pair in ((begin, middle), (middle, _C.head_work()))]


@needs_extension
def test_a_frozen_operand_costs_no_product():
    hidden, weight, ids, _ = inputs(10)
    trained, fixed = (hidden.clone().requires_grad_(), weight.clone().requires_grad_()), (hidden, weight)
    assert work(trained[0], trained[1], ids) == [[10, 0, 0], [10, 10, 10]]
    assert work(trained[0], fixed[1], ids) == [[10, 0, 0], [10, 10, 0]]
    assert work(fixed[0], trained[1], ids) == [[10, 0, 0], [10, 0, 10]]


@needs_extension
def test_masked_and_zero_gradient_rows_cost_nothing():
    hidden, weight, ids, _ = inputs(100)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    mask, upstream = torch.rand(100) < 0.6, (torch.rand(100) < 0.5).float()
    ids[7] = -100
    unmasked = mask & (ids != -100)
    u, a = int(unmasked.sum()), int((unmasked & (upstream != 0)).sum())
    assert 0 < a < u < 100
    assert work(*leaves, ids, upstream, mask) == [[u, 0, 0], [a, a, a]]
    assert work(*leaves, ids, torch.zeros(100), mask) == [[u, 0, 0], [0, 0, 0]]


def test_unused_outputs_and_frozen_leaves(device):
    hidden, weight, ids, bias = inputs(device=device)
    together = forward_backward(hidden, weight, ids, bias, 1.0, 0.7)
    alone = [forward_backward(hidden, weight, ids, bias, 1.0, None), forward_backward(hidden, weight, ids, bias, None, 0.7)]
    for i, name in enumerate(NAMES[2:], 2):
        torch.testing.assert_close(alone[0][i] + alone[1][i], together[i], rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
    leaf = hidden.clone().requires_grad_()
    logp, entropy = linear_logprob_entropy(leaf, weight, ids, bias=bias)
    (logp + 0.7 * entropy).sum().backward()
    assert torch.equal(leaf.grad, together[2])  # the frozen weight changes no bit of the rest
    assert weight.grad is None
    with torch.no_grad():
        assert not linear_logprob_entropy(leaf, weight, ids).logp.requires_grad
    assert not any(x.requires_grad for x in linear_hindsight_information(leaf, leaf, weight, ids))


def test_second_derivatives_raise():
    hidden, weight, ids, _ = inputs(3)
    hidden.requires_grad_()
    (grad,) = torch.autograd.grad(linear_logprob_entropy(hidden, weight, ids).logp.sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="linear_logprob_entropy_backward has no derivative: second derivatives"):
        grad.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_both_operands(dtype):
    hidden, weight, ids, bias = inputs()
    low = [x.to(dtype) for x in (hidden, weight, bias)]
    wanted = forward_backward(*low[:2], ids, low[2])
    with torch.autocast("cpu", dtype=dtype):
        actual = forward_backward(hidden, weight.to(dtype), ids, bias)  # mixed dtypes are made one
        double = linear_logprob_entropy(hidden.double(), weight.double(), ids)
        both = linear_hindsight_information(hidden, hidden * 2, weight, ids, bias=bias)
        mixed = linear_hindsight_information(hidden, (hidden * 2).to(dtype), weight.to(dtype), ids, bias=bias)  # the two streams too
    for name, x, y in zip(NAMES, actual, wanted, strict=True):
        assert torch.equal(x, y.to(x.dtype)), name
    assert [x.dtype for x in actual] == [torch.float32, torch.float32, torch.float32, dtype, torch.float32]
    assert double.logp.dtype == torch.float64
    outside = linear_hindsight_information(low[0], (hidden * 2).to(dtype), low[1], ids, bias=low[2])
    assert all(torch.equal(x, y) and torch.equal(x, z) for x, y, z in zip(both, outside, mixed, strict=True))


# 5. Registration


def test_opcheck(device):
    hidden, weight, ids, bias = inputs(6, 9, 4, device=device)
    temperatures, mask = torch.rand(6, device=device) + 0.5, torch.rand(6, device=device) < 0.7
    other = torch.randn_like(hidden)
    ops = torch.ops.acpo_kernels
    for h, w in ((hidden, weight), (hidden.T.contiguous().T, weight.T.contiguous().T), (hidden.bfloat16(), weight.bfloat16())):
        b = bias.to(h.dtype).requires_grad_()
        torch.library.opcheck(ops.linear_hindsight_information.default, (h, other.to(h.dtype), w, ids, b.detach(), None, temperatures, 3.0, mask))
        h, w = h.detach().requires_grad_(), w.detach().requires_grad_()
        torch.library.opcheck(ops.linear_logprob_entropy.default, (h, w, ids, b, None, temperatures, 3.0, mask))
        torch.library.opcheck(ops.linear_logprob_entropy.default, (h, w.detach(), ids, None, 0.9, None, None, None))
        grad = torch.randn(6, device=device)
        for needs in ([True, True, True], [True, False, False], [False, True, False]):
            saved = ops.linear_logprob_entropy(h.detach(), w.detach(), ids, b.detach(), 1.0, None, None, mask)[1:]
            arguments = (h.detach(), w.detach(), ids, b.detach(), 1.0, None, None, mask, grad, None, *saved, needs)
            torch.library.opcheck(ops.linear_logprob_entropy_backward.default, arguments)


def test_compiles_in_one_graph():
    def objective(hidden, weight, ids):
        logp, entropy = linear_logprob_entropy(hidden.tanh(), weight, ids, softcap=3.0)
        return logp.sum() + 0.1 * entropy.sum() + linear_hindsight_information(hidden, hidden * 2, weight, ids).kl.sum()

    compiled = torch.compile(objective, fullgraph=True, backend="aot_eager")
    for rows in (1, 2, 15, 16, 17):
        hidden, weight, ids, _ = inputs(rows)
        leaves = hidden.requires_grad_(), weight.requires_grad_()
        eager, actual = objective(*leaves, ids), compiled(*leaves, ids)
        assert torch.equal(actual, eager)
        for x, y in zip(torch.autograd.grad(actual, leaves), torch.autograd.grad(eager, leaves), strict=True):
            assert torch.equal(x, y)


# 6. Bad input


BAD = [
    ({"hidden": torch.ones(3)}, "hidden must have 2 dimensions"),
    ({"hidden": torch.ones(3, 4, dtype=torch.int64)}, "hidden must have dtype float32"),
    ({"weight": torch.ones(5, 3)}, r"weight must be \[V,H\] with hidden's H = 4, got \(5, 3\)"),
    ({"weight": torch.ones(0, 4)}, r"weight must be \[V,H\] with V >= 1, got \(0, 4\)"),
    ({"weight": torch.ones(5, 4, dtype=torch.bfloat16)}, r"weight must have hidden's dtype float32 \(outside autocast\), got bfloat16"),
    ({"weight": torch.ones(5, 4).to(torch.float8_e4m3fn)}, r"weight must have dtype .*, got float8_e4m3fn \(fp8 is not supported\)"),
    ({"hidden": torch.ones(3, 4).to(torch.float8_e5m2)}, r"hidden must have dtype .*, got float8_e5m2 \(fp8 is not supported\)"),
    ({"weight": torch.ones(5, 4, device="meta")}, "weight must be on cpu, got meta"),
    ({"bias": torch.ones(4)}, r"bias must have shape \[V\] = \(5,\), got \(4,\)"),
    ({"ids": torch.zeros(2, dtype=torch.int64)}, "ids must have shape the leading dimensions"),
    ({"ids": torch.zeros(3)}, "ids must have dtype int64, int32, got float32"),
    ({"ids": torch.tensor([0, 1, 5])}, r"ids must lie in \[0, V\) with V = 5, or be -100, got 5 at index 2"),
    ({"ids": torch.tensor([-7, 1, 2])}, r"ids must lie in \[0, V\) with V = 5, or be -100, got -7 at index 0"),
    ({"mask": torch.ones(3)}, "mask must have dtype bool"),
    ({"mask": torch.ones(2, dtype=torch.bool)}, "mask must have shape the shape of ids"),
    ({"temperature": 0}, "temperature must be greater than 0"),
    ({"temperature": -1.0}, "temperature must be greater than 0"),
    ({"temperature": torch.ones(2)}, "temperature must have shape the shape of ids"),
    ({"softcap": 0.0}, "softcap must be greater than 0"),
    ({"softcap": -30.0}, "softcap must be greater than 0"),
    ({"impl": "triton"}, "impl must be one of None, 'reference'"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_input(change, message):
    arguments = dict(hidden=torch.ones(3, 4), weight=torch.ones(5, 4), ids=torch.zeros(3, dtype=torch.int64)) | change
    hidden, weight, ids = (arguments.pop(name) for name in ("hidden", "weight", "ids"))
    with pytest.raises(ValueError, match=message):
        linear_logprob_entropy(hidden, weight, ids, **arguments)
    with pytest.raises(ValueError, match=message):
        linear_hindsight_information(hidden, hidden, weight, ids, **arguments)


def test_bad_hindsight_stream():
    hidden, weight, ids = torch.ones(3, 4), torch.ones(5, 4), torch.zeros(3, dtype=torch.int64)
    for bad, message in (
        (torch.ones(2, 4), "hindsight_hidden must have shape that of hidden"),
        (torch.ones(3, 4, dtype=torch.float64), "hindsight_hidden must have dtype float32, got float64"),
        (torch.ones(3, 4, device="meta"), "hindsight_hidden must be on cpu, got meta"),
    ):
        with pytest.raises(ValueError, match=message):
            linear_hindsight_information(hidden, bad, weight, ids)


def test_what_is_refused_by_name():
    hidden, weight, ids = torch.ones(3, 4), torch.ones(5, 4), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match="impl = 'reference' holds the whole vocabulary: it must be None with a group"):
        linear_logprob_entropy(hidden, weight, ids, group=object(), impl="reference")
    with pytest.raises(TypeError, match="softcap must be a number, got str"):
        linear_logprob_entropy(hidden, weight, ids, softcap="30")
    with pytest.raises(TypeError, match=r"weight must be a torch\.Tensor"):
        linear_logprob_entropy(hidden, [1.0], ids)
