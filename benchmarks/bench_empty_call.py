"""What a call costs before it computes anything: every operation on one row (V = 8), forward, in microseconds; eager beside it."""

from __future__ import annotations

import pytest
import torch

import acpo_kernels as ops
from acpo_kernels import Segments, reference

from .common import Case, Expected, Provider

V, H = 8, 8


def calls(device: torch.device) -> dict:
    """{operation: (arguments, keywords)}"""
    logits, other, hidden, hinted, weight = (torch.randn(*shape, device=device) for shape in ((1, V), (1, V), (1, H), (1, H), (V, H)))
    ids, one = torch.tensor([3], device=device), torch.ones(1, device=device)
    segments = Segments(torch.tensor([0, 1], device=device), torch.tensor([0, 1], device=device), num_tokens=1)
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


@pytest.mark.parametrize("operation", list(calls(torch.device("cpu"))))
def test_empty_call(run, device, operation):
    arguments, keywords = calls(device)[operation]

    def in_dtype(x, dtype):
        return x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x

    def ours():
        with torch.no_grad():
            return tensors(getattr(ops, operation)(*arguments, **keywords))

    def eager():
        with torch.no_grad():
            return tensors(getattr(reference, operation)(*arguments, **keywords))

    def expected(of: str) -> dict[str, Expected]:
        exact, single = (tensors(getattr(reference, operation)(*(in_dtype(x, d) for x in arguments))) for d in (torch.float64, torch.float32))
        return {name: Expected(e, single[name]) for name, e in exact.items()}

    shape = {"N": 1, "V": V, "H": H}
    providers = {"ours": Provider(ours), "eager": Provider(eager, "the reference")}
    run(Case(f"{operation}, empty call", "forward", shape, torch.float32, device, providers, expected, budgeted=False))
