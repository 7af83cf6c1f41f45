"""linear_logprob_entropy and linear_hindsight_information: rows that are masked, NaN, none or many, hard logits, what costs no product."""

from __future__ import annotations

import math

import pytest
import torch
from linear_logprob_entropy_cases import IMPLS, NAMES, forward_backward, inputs

from acpo_kernels import _checks, _cpu, linear_hindsight_information, linear_logprob_entropy

needs_extension = pytest.mark.skipif(not _cpu.available, reason="built without the C++ extension")


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


@pytest.mark.parametrize(
    "settings",
    [*({"temperature": t} for t in (_checks.COLDEST, _checks.HOTTEST)), *({"softcap": c} for c in _checks.SOFTCAPS)],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_number_that_is_accepted_gives_nan(settings, dtype, cpu_isa):
    hidden, weight, ids, bias = inputs(6, dtype=dtype)
    assert all(x.isfinite().all() for x in forward_backward(hidden, weight, ids, bias, **settings))
    other = hidden.flip(0)
    if "temperature" in settings:
        settings = {"temperature": max(settings["temperature"], _checks.COLDEST_DIVERGENCE)}
    assert all(x.isfinite().all() for x in linear_hindsight_information(hidden, other, weight, ids, bias=bias, **settings))


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
    with torch.autocast("cpu", dtype=dtype):  # what autocast casts nowhere is refused here too, by its name
        for own, message in ({"bias": bias.long()}, "bias must have dtype"), ({"weight": weight.double()}, "weight must have hidden's dtype"):
            with pytest.raises(ValueError, match=message):
                linear_logprob_entropy(**{"hidden": hidden, "weight": weight, "ids": ids} | own)
        with pytest.raises(TypeError, match=r"bias must be a torch\.Tensor, got list"):
            linear_logprob_entropy(hidden, weight, ids, bias=bias.tolist())
    outside = linear_hindsight_information(low[0], (hidden * 2).to(dtype), low[1], ids, bias=low[2])
    assert all(torch.equal(x, y) and torch.equal(x, z) for x, y, z in zip(both, outside, mixed, strict=True))
