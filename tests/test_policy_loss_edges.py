"""policy_loss: masked and empty calls, clamped and border ratios, views, dtypes, many rows, what is differentiated."""

from __future__ import annotations

import math

import pytest
import torch
from contract import assert_no_second_derivative
from policy_loss_cases import DENOMINATORS, IMPLS, RATIOS, denominator_of, forward_backward, inputs
from ragged import assert_right, segments_of

from acpo_kernels import policy_loss


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("ratio", RATIOS)
def test_masked_tokens_may_hold_anything(ratio, impl, device):
    segments = segments_of([[2, 3], [2]], device=device)
    mask = torch.tensor([1, 0, 0, 1, 1, 0, 0], dtype=torch.bool, device=device)  # rollout 1 masked whole: 0 tokens, denominator 0
    clean = inputs(segments, torch.float32, device)
    denominator = torch.tensor([3.0, 0.0], device=device)
    settings = dict(mask=mask, ratio=ratio, kl_weight=0.1, denominator=denominator)
    wanted = forward_backward(clean, segments, impl, **settings)
    for junk in (math.nan, math.inf, -math.inf):
        dirty = {name: torch.where(mask, x, junk) for name, x in clean.items()}
        loss, grads, metrics = forward_backward(dirty, segments, impl, **settings)
        assert torch.equal(loss, wanted[0])
        for name, grad in grads.items():
            assert torch.equal(grad, wanted[1][name])
            assert (grad[~mask] == 0).all()
        assert metrics == wanted[2]
    assert wanted[0].isfinite()
    over = torch.where(mask, 3.0, 0.0)
    assert torch.equal(forward_backward(clean, segments, impl, **(settings | {"denominator": over}))[1]["logp"], wanted[1]["logp"])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("ratio", RATIOS)
def test_empty_calls_and_masked_calls(ratio, impl, device):
    for lengths in ([], [[]], [[0]], [[0, 0], []]):
        segments = segments_of(lengths, device=device)
        loss, grads, metrics = forward_backward(inputs(segments, torch.float32, device), segments, impl, ratio=ratio, kl_weight=0.1)
        assert loss == 0
        assert grads["logp"].shape == grads["entropy"].shape == (0,)
        assert metrics["tokens"] == 0
        assert (float(metrics["ratio/min"]), float(metrics["ratio/max"])) == (math.inf, -math.inf)
    segments = segments_of([[2, 1]], device=device)
    mask = torch.zeros(3, dtype=torch.bool, device=device)
    loss, grads, metrics = forward_backward(inputs(segments, torch.float32, device), segments, impl, mask=mask, ratio=ratio, kl_weight=0.1)
    assert loss == 0
    assert (grads["logp"] == 0).all()
    assert (grads["entropy"] == 0).all()
    assert all(float(value) == 0 for name, value in metrics.items() if name not in ("ratio/min", "ratio/max"))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("ratio", RATIOS)
def test_log_ratios_are_clamped_before_they_are_averaged(ratio, impl):
    segments = segments_of([[2]])
    logp = torch.tensor([-1.0, -1.0], dtype=torch.float64)
    values = dict(logp=logp, old_logp=torch.tensor([-500.0, -1.0], dtype=torch.float64), advantages=torch.tensor([-1.0, -1.0], dtype=torch.float64))
    loss, grads, metrics = forward_backward(values, segments, impl, ratio=ratio, denominator=1.0)
    wanted = math.exp(20) + 1 if ratio == "token" else 2 * math.exp(10)
    assert float(loss) == pytest.approx(wanted, rel=1e-13)
    assert float(grads["logp"].sum()) == pytest.approx(wanted, rel=1e-13)
    assert float(metrics["ratio/max"]) == pytest.approx(math.exp(20 if ratio == "token" else 10), rel=1e-13)
    impossible = values | {"ref_logp": torch.tensor([-math.inf, -1.0], dtype=torch.float64)}
    loss, grads, _ = forward_backward(impossible | {"old_logp": None}, segments, impl, ratio=ratio, kl_weight=0.5)
    assert loss.isfinite()
    assert grads["logp"].isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_a_ratio_on_the_border_of_the_clip_is_not_clipped(advantage, impl):
    """With clip (0, 0) an on-policy token lies on both borders: its gradient is whole, not a share of it."""
    segments = segments_of([[1]])
    values = dict(logp=torch.tensor([-1.0]), old_logp=None, advantages=torch.tensor([advantage]))
    assert forward_backward(values, segments, impl, clip=(0.0, 0.0))[1]["logp"].tolist() == [-advantage]


INF = math.inf
IMPOSSIBLE = {  # the first of two tokens: logp, old_logp, ref_logp, rollout_logp
    "old is finite": (-INF, -1.0, -2.0, -1.0), "old too": (-INF, -INF, -2.0, -1.0), "on-policy": (-INF, None, -2.0, -1.0),
    "reference and rollout too": (-INF, -INF, -INF, -INF), "old alone": (-1.0, -INF, -2.0, -INF),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", IMPOSSIBLE)
@pytest.mark.parametrize("ratio", RATIOS)
def test_impossible_tokens(ratio, name, dtype, device):
    """Loss and gradient are finite, and the oracle's, the gradient of an impossible token that of a ratio like any other."""
    segments = segments_of([[2]], device=device)
    names = ("logp", "old_logp", "ref_logp", "rollout_logp")
    values = {n: None if x is None else torch.tensor([x, -0.5], dtype=dtype, device=device) for n, x in zip(names, IMPOSSIBLE[name], strict=True)}
    values["advantages"] = torch.tensor([-1.0, 2.0], dtype=dtype, device=device)
    found, wanted = (forward_backward(values, segments, impl, ratio=ratio, kl_weight=0.1, denominator=4.0) for impl in (None, "reference"))
    assert wanted[0].isfinite() and wanted[1]["logp"].isfinite().all()
    torch.testing.assert_close(found[0], wanted[0])
    torch.testing.assert_close(found[1]["logp"], wanted[1]["logp"])
    torch.testing.assert_close(found[2], wanted[2])
    if name == "on-policy":
        _, grads, _ = forward_backward(values | {"ref_logp": None, "rollout_logp": None}, segments, None, ratio=ratio, denominator=4.0)
        assert grads["logp"].tolist() == pytest.approx([1.0 / 4.0, -2.0 / 4.0])  # its ratio is 1


@pytest.mark.parametrize("impl", IMPLS)
def test_what_is_no_log_prob_of_the_policy_is_a_constant(impl):
    """Also where the caller's own tensor needs a gradient: the log-prob itself as its old one, its reference's, its rollout's."""
    segments = segments_of([[2, 1]])
    logp, weight = (-torch.rand(3, dtype=torch.float64)).requires_grad_(), torch.rand(3, dtype=torch.float64).requires_grad_()
    arguments = dict(entropy=weight.detach(), kl_weight=0.3, ref_logp=logp, rollout_logp=logp, entropy_weight=weight, denominator=weight)
    given = (logp, logp, weight, segments)
    loss = policy_loss(*given, **arguments, impl=impl).loss
    constants = {n: x.detach() if isinstance(x, torch.Tensor) else x for n, x in arguments.items()}
    wanted = policy_loss(logp, logp.detach(), weight.detach(), segments, **constants).loss
    found = torch.autograd.grad(loss, (logp, weight), allow_unused=True)
    assert found[1] is None
    torch.testing.assert_close(found[0], torch.autograd.grad(wanted, logp)[0])
    assert found[0].abs().min() > 0


def test_mixed_dtypes_give_the_working_dtype_of_logp():
    segments = segments_of([[2], [1]])
    values = inputs(segments, torch.float64) | {"logp": -torch.rand(3)}
    for kind in DENOMINATORS:
        loss, grads, metrics = forward_backward(values, segments, None, kl_weight=0.1, denominator=denominator_of(kind, segments))
        assert loss.dtype == metrics["kl/ref"].dtype == grads["logp"].dtype == torch.float32
        assert grads["entropy"].dtype == torch.float64


def test_views_are_read_in_place():
    segments = segments_of([[2, 3], [4]])
    values = {name: torch.stack([x, x], 1)[:, 0] for name, x in inputs(segments).items()}
    compact = {name: x.clone() for name, x in values.items()}
    assert torch.equal(forward_backward(values, segments, None)[0], forward_backward(compact, segments, None)[0])
    expanded = policy_loss(values["logp"], None, torch.ones(()).double().expand(9), segments).loss
    assert float(expanded) == pytest.approx(-1.0)


@pytest.mark.parametrize("ratio", ["token", "segment"])
def test_many_rows(ratio, device):
    segments = segments_of([[64] * 8] * 150, device=device)  # 76,800 tokens
    values = inputs(segments, torch.float32, device)
    settings = dict(ratio=ratio, kl_weight=0.1)
    loss, grads, _ = forward_backward(values, segments, None, **settings)
    again, again_grads, _ = forward_backward(values, segments, None, **settings)
    assert torch.equal(loss, again)  # the same call twice is bitwise the same
    assert torch.equal(grads["logp"], again_grads["logp"])
    exact, _, _ = forward_backward({name: x.double() for name, x in values.items()}, segments, "reference", **settings)
    working, _, _ = forward_backward(values, segments, "reference", **settings)
    assert_right("loss", loss, working, exact)


def test_second_derivatives_raise():
    """A second derivative that is silently 0 would be a wrong one."""
    segments = segments_of([[3]])
    values = inputs(segments)
    logp = values["logp"].requires_grad_()
    entropy = values["entropy"].requires_grad_()
    loss = policy_loss(logp, values["old_logp"], values["advantages"], segments, entropy=entropy, entropy_weight=0.3).loss
    for objective in (loss.square(), loss):
        grads = torch.autograd.grad(objective, (logp, entropy), create_graph=True)
        assert_no_second_derivative(grads, logp)
        for grad in grads:
            with pytest.raises(RuntimeError, match="no derivative: second derivatives"):
                torch.autograd.grad(logp.sum() + grad.square().sum(), logp, retain_graph=True)
    assert torch.equal(*(torch.autograd.grad(loss, logp, retain_graph=True, create_graph=graph)[0] for graph in (False, True)))


def test_only_the_gradients_that_are_wanted():
    segments = segments_of([[3]])
    values = inputs(segments)
    entropy = values["entropy"].requires_grad_()
    loss, metrics = policy_loss(values["logp"], None, values["advantages"], segments, entropy=entropy, entropy_weight=0.3)
    assert not any(value.requires_grad for value in metrics.values())
    assert torch.autograd.grad(loss, entropy)[0].tolist() == pytest.approx([-0.1] * 3)
    without_weight = policy_loss(values["logp"].requires_grad_(), None, values["advantages"], segments, entropy=entropy)
    assert torch.autograd.grad(without_weight.loss, entropy)[0].tolist() == [0.0] * 3  # reported, not rewarded
    assert float(without_weight.metrics["entropy"]) == pytest.approx(float(entropy.detach().mean()))
