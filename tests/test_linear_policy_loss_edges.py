"""linear_policy_loss: masked and empty calls, clipped and strided rows, autocast, gradients that are held rounded."""

from __future__ import annotations

import math

import pytest
import torch
from contract import assert_no_second_derivative
from linear_policy_loss_cases import IMPLS, NAMES, RATIOS, forward_backward, inputs, rows_in_products
from ragged import segments_of

from acpo_kernels import Segments, _cpu, linear_logprob_entropy, linear_policy_loss


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("ratio", RATIOS)
def test_masked_rows_may_hold_anything(ratio, impl, device):
    segments = segments_of([[2, 3], [2]], device=device)
    mask = torch.tensor([1, 0, 1, 1, 1, 0, 0], dtype=torch.bool, device=device)
    clean = inputs(segments, dtype=torch.float32, device=device)
    clean["ids"][3] = -100  # left out by its id, without the mask
    active = mask & (clean["ids"] != -100)
    wanted, metrics = forward_backward(clean, segments, impl, mask=mask, ratio=ratio, kl_weight=0.1)
    dirty = dict(clean)
    for name in ("old_logp", "advantages", "ref_logp", "rollout_logp", "entropy_weight"):
        dirty[name] = torch.where(active, clean[name], math.nan)
    dirty["hidden"] = torch.where(active.unsqueeze(-1), clean["hidden"], math.nan)
    actual, dirty_metrics = forward_backward(dirty, segments, impl, mask=mask, ratio=ratio, kl_weight=0.1)
    for name, x, y in zip(NAMES, actual, wanted, strict=True):
        assert torch.equal(x, y), name
        assert x.isfinite().all(), name
    assert metrics["tokens"] == active.sum()
    assert dirty_metrics == metrics
    for x in wanted[1:4]:
        assert (x[~active] == 0).all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("ratio", RATIOS)
def test_empty_and_masked_calls(ratio, impl, device):
    for lengths in ([], [[]], [[0, 0], []], [[2, 1]]):
        segments = segments_of(lengths, device=device)
        mask = torch.zeros(segments.num_tokens, dtype=torch.bool, device=device)
        results, metrics = forward_backward(inputs(segments, device=device), segments, impl, mask=mask, ratio=ratio, kl_weight=0.1)
        assert metrics["tokens"] == 0
        for name, x in zip(NAMES, results, strict=True):
            assert (x == 0).all(), name


def test_a_clipped_row_adds_nothing_to_the_gradients_but_has_its_log_prob():
    segments = segments_of([[1, 1]])
    values = {name: x for name, x in inputs(segments).items() if name not in ("ref_logp", "rollout_logp", "entropy_weight")}
    logp = linear_logprob_entropy(values["hidden"], values["weight"], values["ids"], bias=values["bias"]).logp
    values["old_logp"], values["advantages"] = logp - torch.tensor([1.0, 0.0]), torch.ones(2, dtype=torch.float64)
    (_, actual_logp, _, grad_hidden, *_), metrics = forward_backward(values, segments, None)
    assert torch.equal(actual_logp, logp)
    assert (grad_hidden[0] == 0).all()
    assert (grad_hidden[1] != 0).any()
    assert metrics["clip_ratio/high_mean"] == 0.5


def test_one_token_to_seventeen_and_strided_rows():
    for n in (1, 2, 15, 16, 17):
        segments = Segments(torch.tensor([0, n]), torch.tensor([0, 1]))
        values = inputs(segments)
        wanted, _ = forward_backward(values, segments, "reference", kl_weight=0.1)
        strided = {name: torch.stack([x, x], 1)[:, 0] for name, x in values.items()}
        for case in (values, strided):
            actual, _ = forward_backward(case, segments, None, kl_weight=0.1)
            for name, x, y in zip(NAMES, actual, wanted, strict=True):
                torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}")


def test_results_are_detached_and_frozen_leaves_are_left_alone():
    segments = segments_of([[3]])
    values = inputs(segments)
    hidden = values["hidden"].requires_grad_()
    result = linear_policy_loss(hidden, values["weight"], values["ids"], None, values["advantages"], segments)
    assert result.loss.requires_grad
    assert not result.logp.requires_grad
    assert not result.entropy.requires_grad
    assert not any(x.requires_grad for x in result.metrics.values())
    result.loss.backward()
    assert values["weight"].grad is None
    with torch.no_grad():
        assert not linear_policy_loss(hidden, values["weight"], values["ids"], None, values["advantages"], segments).loss.requires_grad


def test_autocast():
    segments = segments_of([[3, 4]])
    values = {name: x.float() if x.is_floating_point() else x for name, x in inputs(segments).items()}
    low = values | {name: values[name].bfloat16() for name in ("hidden", "weight", "bias")}
    wanted, _ = forward_backward(low, segments, None, kl_weight=0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual, _ = forward_backward(values, segments, None, kl_weight=0.1)
    for name, x, y in zip(NAMES, actual, wanted, strict=True):
        assert x.dtype == torch.float32
        assert torch.equal(x, y.float()), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("old", [None, -1.0, -math.inf])
@pytest.mark.parametrize("impl", [None, "reference"])
def test_a_target_of_minus_infinity(impl, old, dtype):
    segments = segments_of([[3]])
    values = inputs(segments, dtype=dtype)
    ids, bias = torch.tensor([0, 1, 2]), torch.zeros_like(values["bias"])
    bias[1] = -math.inf
    hidden, weight = values["hidden"].requires_grad_(), values["weight"].requires_grad_()
    old_logp = None if old is None else torch.tensor([-1.0, old, -1.0])
    loss, _, logp, _ = linear_policy_loss(hidden, weight, ids, old_logp, torch.ones(3), segments, bias=bias, impl=impl)
    grads = torch.autograd.grad(loss, (hidden, weight))
    assert logp.tolist()[1] == -math.inf and loss.isfinite() and all(g.isfinite().all() for g in grads)
    if old != -1.0:  # its ratio is 1, not exp(-20)
        assert grads[0][1].any()


def test_second_derivatives_raise_and_a_graph_may_be_walked_twice():
    segments = segments_of([[3]])
    values = inputs(segments, dtype=torch.float32)
    hidden, weight = values["hidden"].requires_grad_(), values["weight"].requires_grad_()
    loss = linear_policy_loss(hidden, weight, values["ids"], values["old_logp"], values["advantages"], segments).loss
    once, twice, scaled = (torch.autograd.grad(loss, (hidden, weight), g, retain_graph=True) for g in (None, None, torch.tensor(2.0)))
    for x, y, z in zip(once, twice, scaled, strict=True):
        assert torch.equal(x, y)
        assert torch.equal(2 * x, z)
    for objective in (loss.square(), loss):
        grads = torch.autograd.grad(objective, (hidden, weight), create_graph=True)
        for leaf in (hidden, weight):
            assert_no_second_derivative(grads, leaf)
    with pytest.raises(RuntimeError, match="no derivative: second derivatives"):
        torch.autograd.grad(weight.sum() + grads[0].square().sum(), weight)
    frozen = linear_policy_loss(hidden, weight.detach(), values["ids"], values["old_logp"], values["advantages"], segments).loss
    (grad,) = torch.autograd.grad(frozen, hidden, create_graph=True)
    assert_no_second_derivative([grad], hidden)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_that_are_held_rounded_are_rounded_once(dtype):
    """For any incoming gradient those of a loss over so much smaller a denominator; powers of two cost bfloat16 no second product."""
    segments = segments_of([[30, 10], [20]])
    values = inputs(segments, 50, 24, dtype)
    leaves = [values.pop(name).requires_grad_() for name in ("hidden", "weight", "bias")]
    head = [values.pop(name) for name in ("ids", "old_logp", "advantages")]

    def loss(**settings):
        return linear_policy_loss(*leaves[:2], *head, segments, bias=leaves[2], kl_weight=0.1, **values, **settings).loss

    per_sequence = torch.tensor([3.0, 7.0])
    for denominator, over in ((12.0, 4.0), (None, torch.tensor(20.0)), (per_sequence, per_sequence / 3)):
        three = torch.autograd.grad(loss(denominator=denominator), leaves, torch.tensor(3.0))
        for name, x, y in zip(NAMES[3:], three, torch.autograd.grad(loss(denominator=over), leaves), strict=True):
            torch.testing.assert_close(x, y, rtol=torch.finfo(dtype).eps, atol=1e-7, msg=name)
    once, half, none = (torch.autograd.grad(loss(), leaves, torch.tensor(by)) for by in (1.0, 0.5, 0.0))
    for x, y, z in zip(once, half, none, strict=True):
        assert torch.equal(y, 0.5 * x) if dtype == torch.bfloat16 else torch.allclose(y, 0.5 * x, rtol=2e-3, atol=1e-7)
        assert (z == 0).all()
    if _cpu.available:
        waiting = loss()
        assert rows_in_products(lambda: torch.autograd.grad(waiting, leaves, torch.tensor(0.5), retain_graph=True)) == (
            (0, 0, 0) if dtype == torch.bfloat16 else (60, 60, 60)
        )
        assert rows_in_products(lambda: torch.autograd.grad(waiting, leaves, torch.tensor(3.0))) == (60, 60, 60)


def test_gradients_that_are_held_rounded_compile():
    segments = segments_of([[9], [4]])
    values = inputs(segments, dtype=torch.bfloat16)
    leaves = [values[name].requires_grad_() for name in ("hidden", "weight")]
    head = (values["ids"], values["old_logp"], values["advantages"], segments)
    compiled = torch.compile(lambda *x: linear_policy_loss(*x, *head).loss * 3, fullgraph=True, backend="aot_eager")
    for x, y in zip(
        torch.autograd.grad(compiled(*leaves), leaves), torch.autograd.grad(linear_policy_loss(*leaves, *head).loss * 3, leaves), strict=True
    ):
        assert torch.equal(x, y)
