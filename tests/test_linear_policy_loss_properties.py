"""linear_policy_loss: it is the two operations, rollouts stay apart, micro-batches change nothing."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from linear_policy_loss_cases import IMPLS, NAMES, RATIOS, forward_backward, inputs
from ragged import hierarchies, segments_of

from acpo_kernels import policy_loss
from acpo_kernels.reference import head_logits, logprob_entropy


@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_rollout_alone_is_bitwise_the_same(dtype, ratio, cpu_isa):
    """logp, entropy and the gradient of hidden, whatever else is in the call."""
    lengths = [[130, 20], [1], [200], [7, 9]]
    segments = segments_of(lengths)
    values = inputs(segments, 50, 24, dtype)
    mask = torch.rand(segments.num_tokens) < 0.8
    together, _ = forward_backward(values, segments, None, mask=mask, ratio=ratio, kl_weight=0.1, denominator=9.0)
    begin = 0
    for some in lengths:
        here = slice(begin, begin + sum(some))
        begin = here.stop
        rows = {name: x if name in ("weight", "bias") else x[here] for name, x in values.items()}
        alone, _ = forward_backward(rows, segments_of([some]), None, mask=mask[here], ratio=ratio, kl_weight=0.1, denominator=9.0)
        for i in (1, 2, 3):
            assert torch.equal(alone[i], together[i][here]), NAMES[i]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("on_policy", [True, False])
def test_an_active_nan_row_is_nan_in_its_own_rows_and_in_the_sums(on_policy, impl, cpu_isa):
    segments = segments_of([[2, 3], [4]])
    values = inputs(segments, dtype=torch.float32)
    if on_policy:
        values["old_logp"] = None
    values["hidden"][4, 1] = math.nan
    (loss, logp, entropy, hidden, weight, bias), _ = forward_backward(values, segments, impl, kl_weight=0.1)
    assert logp.isnan().nonzero().tolist() == entropy.isnan().nonzero().tolist() == [[4]]
    assert hidden.isnan().any(1).nonzero().tolist() == [[4]]
    for x in (loss, weight, bias):
        assert x.isnan().all()


@given(hierarchies(), st.sampled_from(RATIOS), st.booleans(), st.sampled_from([None, 3.0]))
def test_it_is_head_softmax_and_policy_loss(case, ratio, on_policy, softcap):
    segments, mask = case
    values = inputs(segments)
    if on_policy:
        values["old_logp"] = None
    settings = dict(mask=mask, ratio=ratio, kl_weight=0.2, denominator=3.0)
    actual, metrics = forward_backward(values, segments, None, temperature=0.8, softcap=softcap, **settings)
    leaves = [values.pop(name).requires_grad_() for name in ("hidden", "weight", "bias")]
    logp, entropy = logprob_entropy(head_logits(*leaves, softcap), values["ids"], temperature=0.8, mask=mask)
    ids, old_logp, advantages = (values.pop(name) for name in ("ids", "old_logp", "advantages"))
    assert ids.shape == logp.shape
    loss, wanted = policy_loss(logp, old_logp, advantages, segments, entropy=entropy, **values, **settings)
    results = [loss, logp, entropy, *torch.autograd.grad(loss, leaves)]
    for name, x, y in zip(NAMES, actual, results, strict=True):
        torch.testing.assert_close(x, y.detach(), rtol=1e-10, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}")
    for name, value in wanted.items():
        torch.testing.assert_close(metrics[name], value, rtol=1e-10, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("ratio", RATIOS)
def test_micro_batches_change_nothing(ratio):
    lengths = [[3, 2], [4], [1, 1, 5], [2]]
    segments = segments_of(lengths)
    values = inputs(segments)
    settings = dict(ratio=ratio, kl_weight=0.1, denominator=11.0)
    whole, _ = forward_backward(values, segments, None, **settings)
    parts, begin = [], 0
    for some in (lengths[:1], lengths[1:3], lengths[3:]):
        end = begin + sum(map(sum, some))
        rows = {name: x if name in ("weight", "bias") else x[begin:end] for name, x in values.items()}
        parts.append(forward_backward(rows, segments_of(some), None, **settings)[0])
        begin = end
    for i, name in enumerate(NAMES):
        pieces = [part[i] for part in parts]
        total = torch.cat(pieces) if i in (1, 2, 3) else sum(pieces)
        torch.testing.assert_close(total, whole[i], rtol=1e-12, atol=1e-13, msg=lambda m, name=name: f"{name}: {m}")


def test_the_same_call_twice_is_bitwise_the_same():
    segments = segments_of([[40, 30], [1], [60]])
    values = inputs(segments, 300, 16, torch.float32)
    for name, x, y in zip(NAMES, *(forward_backward(values, segments, None, kl_weight=0.1)[0] for _ in range(2)), strict=True):
        assert torch.equal(x, y), name
