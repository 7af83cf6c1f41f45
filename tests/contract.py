"""The error budget that every implementation of every operation is held to."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor


def error(actual: Tensor, exact: Tensor) -> float:
    """max |actual - exact| where exact is finite; NaN and infinities must stand in the same places, with the same sign."""
    actual, exact = actual.double(), exact.double()
    assert actual.shape == exact.shape, f"shape {tuple(actual.shape)}, wanted {tuple(exact.shape)}"
    finite = exact.isfinite()
    assert torch.equal(actual.isnan(), exact.isnan()), f"NaN at {actual.isnan().nonzero().tolist()}, wanted {exact.isnan().nonzero().tolist()}"
    infinite = exact.isinf()
    assert torch.equal(actual[infinite], exact[infinite]), "infinities differ"
    return (actual[finite] - exact[finite]).abs().max().item() if finite.any() else 0.0


def budget(single: Tensor, exact: Tensor, *, factor: float = 2.0, gradient_dtype: torch.dtype | None = None) -> float:
    """factor (error of the reference computing in float32 from the same inputs + eps(float32) max |exact|), and for a gradient
    half a unit of its own dtype, to which it is rounded once. What underflows float32 may be 0."""
    finite = exact[exact.isfinite()].double()
    largest = finite.abs().max().item() if finite.numel() else 0.0
    agree = exact.isfinite() & single.isfinite()
    of_single = (single.double()[agree] - exact.double()[agree]).abs().max().item() if agree.any() else 0.0
    allowed = factor * (of_single + torch.finfo(torch.float32).eps * largest) + torch.finfo(torch.float32).tiny
    if gradient_dtype is not None:
        # Half a unit in the last place, or half the smallest subnormal number
        info = torch.finfo(gradient_dtype)
        allowed += 0.5 * max(info.eps * largest, info.smallest_normal * info.eps)
    return allowed


def assert_no_second_derivative(grads, leaf: Tensor) -> None:
    """Whoever differentiates one of these gradients hears of it, also where something else of the sum does depend on the leaf."""
    for grad in grads:
        for total in (grad.sum(), leaf.sum() + grad.square().sum()):
            with pytest.raises(RuntimeError, match="no derivative: second derivatives"):
                total.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="no derivative: second derivatives"):  # and not None without a word
            torch.autograd.grad(grad.sum(), leaf, allow_unused=True, retain_graph=True)


def assert_within_budget(actual: Tensor, single: Tensor, exact: Tensor, name: str = "result", **options) -> None:
    measured, allowed = error(actual, exact), budget(single, exact, **options)
    assert measured <= allowed, f"{name}: error {measured:.3e} against float64, budget {allowed:.3e}"
