"""What is taken for a number: whatever Python calls a real one and torch can compute with."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch

import acpo_kernels as kernels
from acpo_kernels import Segments


@pytest.mark.parametrize("impl", [None, "reference"])
@pytest.mark.parametrize("kind", [np.float32, np.float64, np.float16])
def test_numbers_of_any_kind(kind, impl):
    """Those of numpy are the floats that they are; torch knows nothing of fractions."""
    segments = Segments(torch.tensor([0, 2, 3, 5]), torch.tensor([0, 3]))
    logits, hidden, x, ids = torch.randn(5, 7), torch.randn(5, 4), -torch.rand(5), torch.arange(5)
    weight = torch.randn(7, 4)
    calls = [
        lambda n: kernels.logprob_entropy(logits, ids, temperature=n(0.5), impl=impl),
        lambda n: kernels.linear_logprob_entropy(hidden, weight, ids, temperature=n(0.5), softcap=n(2.5), impl=impl),
        lambda n: kernels.hindsight_information(logits, logits.flip(0), ids, temperature=n(0.5), impl=impl),
        lambda n: kernels.linear_hindsight_information(hidden, hidden.flip(0), weight, ids, temperature=n(0.5), softcap=n(2.5), impl=impl),
        lambda n: kernels.segment_credit(torch.arange(3.0), segments, torch.ones(1), bound=n(0.25), gain=n(0.5), reliability=n(0.5),
                                              scale=n(2.5), impl=impl),
        lambda n: kernels.policy_loss(x, x.flip(0), x, segments, clip=(n(0.25), n(0.5)), entropy=-x, entropy_weight=n(0.5), ref_logp=x.flip(0),
                                           kl_weight=n(0.5), rollout_logp=x, rollout_cap=n(1.5), denominator=n(2.5), impl=impl)[:1],
        lambda n: kernels.linear_policy_loss(hidden, weight, ids, x, x, segments, clip=(n(0.25), n(0.5)), entropy_weight=n(0.5), ref_logp=x,
                                                  kl_weight=n(0.5), rollout_logp=x, rollout_cap=n(1.5), denominator=n(2.5), impl=impl)[:1],
    ]  # fmt: skip
    for call in calls:
        for found, wanted in zip(call(kind), call(float), strict=True):
            assert torch.equal(found, wanted)
        with pytest.raises(TypeError, match="must be a number, got Fraction"):
            call(Fraction)
    assert kernels.policy_loss(x, None, x, segments, denominator=np.int64(3)).loss == kernels.policy_loss(x, None, x, segments, denominator=3).loss
