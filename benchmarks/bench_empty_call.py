"""What a call costs before it computes anything: every operation on no row and on one (V = 8), forward, in microseconds; eager beside it.

"no_grad": inside torch.no_grad(); "grad": where grad mode is on and no argument asks for a gradient.
"""

from __future__ import annotations

import pytest
import torch

import acpo_kernels as ops
from acpo_kernels import Segments, reference

from .common import Case, Expected, Provider

V, H = 8, 8


def calls(device: torch.device, n: int) -> dict:
    """{operation: (arguments, keywords)}"""
    logits, other, hidden, hinted, weight = (torch.randn(*shape, device=device) for shape in ((n, V), (n, V), (n, H), (n, H), (V, H)))
    ids, one = torch.full((n,), 3, device=device), torch.ones(n, device=device)
    offsets = torch.arange(n + 1, device=device)
    segments = Segments(offsets, offsets, num_tokens=n)
    return {
        "logprob_entropy": ((logits, ids), {}),
        "linear_logprob_entropy": ((hidden, weight, ids), {}),
        "hindsight_information": ((logits, other, ids), {}),
        "linear_hindsight_information": ((hidden, hinted, weight, ids), {}),
        "segment_reduce": ((one, segments), {}),
        "segment_credit": ((one, segments, one), {}),
        "policy_loss": ((-one, -one, one, segments), {}),
        "linear_policy_loss": ((hidden, weight, ids, None, one, segments), {}),
    }


def tensors(result) -> dict[str, torch.Tensor]:
    result = result if isinstance(result, tuple) else (result,)
    return {str(i): x for i, x in enumerate(result) if isinstance(x, torch.Tensor)}


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("n", [0, 1], ids=["N0", "N1"])
@pytest.mark.parametrize("operation", list(calls(torch.device("cpu"), 1)))
def test_empty_call(run, device, operation, n, grad):
    arguments, keywords = calls(device, n)[operation]

    def in_dtype(x, dtype):
        return x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x

    def provider(of):
        function = getattr(of, operation)
        return lambda: tensors(function(*arguments, **keywords))

    def expected(of: str) -> dict[str, Expected]:
        exact, single = (tensors(getattr(reference, operation)(*(in_dtype(x, d) for x in arguments))) for d in (torch.float64, torch.float32))
        return {name: Expected(e, single[name]) for name, e in exact.items()}

    shape = {"N": n, "V": V, "H": H}
    providers = {"ours": Provider(provider(ops)), "eager": Provider(provider(reference), "the reference")}
    with torch.set_grad_enabled(grad):
        mode = "grad mode" if grad else "no grad"
        run(Case(f"{operation}, empty call", mode, shape, torch.float32, device, providers, expected, budgeted=False, cold=False))
