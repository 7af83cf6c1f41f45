"""Rows of logits for the tests of `logprob_entropy`, and one call under the error budget."""

from __future__ import annotations

import math

import pytest
import torch
from contract import assert_within_budget
from hypothesis import HealthCheck, settings
from implementations import INTERPRETED, exact, single

INF, NAN = math.inf, math.nan
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
torch_only = pytest.mark.skipif(INTERPRETED, reason="the interpreter lane tests kernels, not the dispatcher")
quick = settings(deadline=None, max_examples=4 if INTERPRETED else 15, suppress_health_check=[HealthCheck.function_scoped_fixture])


def case(n: int, v: int, dtype=torch.float32, seed: int = 0, scale: float = 3.0):
    g = torch.Generator().manual_seed(seed)
    logits = (torch.randn(n, v, generator=g) * scale).to(dtype)
    ids = torch.randint(0, v, (n,), generator=g)
    if n > 1:
        ids[1] = logits[1].argmax()
    grads = {"grad_logp": torch.randn(n, generator=g), "grad_entropy": torch.randn(n, generator=g)}
    return logits, ids, grads


def check(run, logits, ids, **arguments):
    actual, wanted, plain = (f(logits, ids, **arguments) for f in (run, exact, single))
    for name, a, s, e in zip(("logp", "entropy"), actual, plain, wanted, strict=False):
        assert_within_budget(a, s, e, name)
    assert_within_budget(actual[2], plain[2], wanted[2], "gradient", gradient_dtype=logits.dtype)
    return actual
