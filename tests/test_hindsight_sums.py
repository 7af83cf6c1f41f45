"""hindsight_information in C++: the divergences are summed in a form that cancels where that is right, and only there."""

from __future__ import annotations

import math

import pytest
import torch
from contract import assert_within_budget
from streams import assert_bitwise

from acpo_kernels import HindsightInformation, hindsight_information


def rows_that_cancel(name: str, vocab: int, rows: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Divergences of about a tenth of the mass, where sums that cancel are nearly good enough, and what makes their errors add up."""
    noise, shift = torch.randn(rows, vocab), 0.07 * torch.arange(rows).unsqueeze(-1)
    generic, few = torch.randn(rows, vocab) * 2, torch.where(torch.rand(rows, vocab) < 0.5, -1.7, -2.9) + shift
    match name:
        case "generic":
            return generic, generic + 0.5 * noise
        case "two values":
            few[:, 0] = 1.0
            return few, few + 0.5 * noise
        case "two values, two shifts":
            return few, few + torch.where(torch.rand(rows, vocab) < 0.5, 0.4, -0.4)
        case "one value beneath a late maximum":
            flat = shift.expand(-1, vocab) - 3.3
            flat[:, vocab // 3] = 2.0
            return flat, flat + 0.5 * noise
        case "narrow":
            narrow = torch.randn(rows, vocab) * 0.03
            return narrow, narrow + 0.5 * noise
        case "a heavy token late":
            hindsight = generic + 0.5 * noise
            generic[:, 5] = hindsight[:, 5] = 14.0
            generic[:, -vocab // 8] = 13.9
            hindsight[:, -vocab // 8] = 14.1
            return generic, hindsight
        case "agreement after half":
            return generic, generic + 0.5 * noise * (torch.arange(vocab) < vocab // 2) + 1e-3 * noise
        case "one impossible column":
            hindsight = generic + 0.5 * noise
            generic[:, 1000] = hindsight[:, 1000] = -math.inf
            return generic, hindsight
    raise ValueError(name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "name",
    [
        "generic", "two values", "two values, two shifts", "one value beneath a late maximum", "narrow", "a heavy token late",
        "agreement after half", "one impossible column",
    ],
)  # fmt: skip
def test_sums_that_cancel_are_used_only_where_they_may_be(cpu_isa, name, dtype):
    logits, hindsight = (x.to(dtype) for x in rows_that_cancel(name, 20_000))
    ids = torch.full((4,), 7)
    exact = hindsight_information(logits.double(), hindsight.double(), ids, impl="reference")
    working = hindsight_information(logits.float(), hindsight.float(), ids, impl="reference")
    result = hindsight_information(logits, hindsight, ids)
    for field, x, y, z in zip(HindsightInformation._fields, result, working, exact, strict=True):
        assert_within_budget(x, y, z, field)
    turned = hindsight_information(hindsight, logits, ids)
    assert torch.equal(turned.kl, result.information) and torch.equal(turned.information, result.kl)
    assert_bitwise(hindsight_information(logits[2:3], hindsight[2:3], ids[2:3]), [x[2:3] for x in result])


def rows_of_few_values(values: int, spread: str, late: bool, seed: int, rows: int = 8, vocab: int = 151_936) -> tuple[torch.Tensor, torch.Tensor]:
    """Thousands of equal exponents, which have the same error: sums do not average it out. The order keeps equal ones from being neighbours. A
    late maximum changes the exponents, and so the error, of all that follow."""
    g = torch.Generator().manual_seed(seed)
    place = torch.arange(vocab) // 8
    policy = (torch.rand(rows, values, generator=g) * 3 - 2)[:, place % values]
    apart = torch.rand(rows, 1, generator=g) * 0.5 + 0.03
    if spread == "two shifts":
        hindsight = policy + torch.where((place // values) % 2 == 1, apart, -apart)
    else:
        hindsight = policy + apart * torch.randn(rows, vocab, generator=g)
    if late:
        policy[:, vocab // 3] = policy.amax(1) + 0.1 + 2 * torch.rand(rows, generator=g)
        hindsight[:, vocab // 3] = policy[:, vocab // 3] + 0.2
    return policy, hindsight


@pytest.mark.parametrize(
    ("values", "spread", "late", "seed"), [(3, "two shifts", False, 0), (3, "noise", False, 0), (4, "noise", False, 1), (4, "noise", True, 0)]
)
def test_errors_of_equal_exponents_do_not_average_out(cpu_isa, values, spread, late, seed):
    policy, hindsight = rows_of_few_values(values, spread, late, seed)
    ids = torch.full((len(policy),), 7)
    exact = hindsight_information(policy.double(), hindsight.double(), ids, impl="reference")
    single, result = hindsight_information(policy, hindsight, ids, impl="reference"), hindsight_information(policy, hindsight, ids)
    for name in ("kl", "information"):
        assert_within_budget(getattr(result, name), getattr(single, name), getattr(exact, name), name)


@pytest.mark.parametrize(("closeness", "rtol"), [(0.1, 3e-6), (1e-2, 1e-5), (1e-3, 2e-4)])
@pytest.mark.parametrize("vocab", [300, 20_000])
def test_divergences_of_close_streams_keep_their_digits(cpu_isa, closeness, rtol, vocab):
    """Relative to the divergence itself, which is about closeness^2 / 2: where the float32 reference has 1e-7 absolute."""
    torch.manual_seed(1)
    logits = torch.randn(4, vocab) * 3
    hindsight, ids = logits + closeness * torch.randn(4, vocab), torch.randint(vocab, (4,))
    actual = hindsight_information(logits, hindsight, ids)
    exact = hindsight_information(logits.double(), hindsight.double(), ids, impl="reference")
    for name in ("kl", "information"):
        torch.testing.assert_close(getattr(actual, name).double(), getattr(exact, name), rtol=rtol, atol=0)
    same = hindsight_information(logits, logits.clone(), ids)
    assert not same.kl.any() and not same.information.any() and not same.log_ratio.any()
