"""policy_loss: what its levels, denominators and micro-batches have in common."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from policy_loss_cases import DENOMINATORS, RATIOS, denominator_of, forward_backward, inputs
from ragged import hierarchies, segments_of

from acpo_kernels import Segments, policy_loss, segment_credit, segment_reduce


@given(hierarchies(), st.sampled_from(RATIOS), st.sampled_from(DENOMINATORS[1:]), st.integers(0, 5))
def test_micro_batches_change_nothing(case, ratio, kind, cut):
    segments, mask = case
    values = inputs(segments)
    denominator = denominator_of(kind, segments)
    settings = dict(ratio=ratio, kl_weight=0.2)
    whole, grads, _ = forward_backward(values, segments, None, mask=mask, denominator=denominator, **settings)
    cut = min(cut, segments.num_sequences)
    total, parts = 0.0, {"logp": [], "entropy": []}
    cu_seqlens = segments.cu_seqlens.tolist()
    for first, last in ((0, cut), (cut, segments.num_sequences)):
        here = slice(cu_seqlens[first], cu_seqlens[last])
        borders = segments.sequence_offsets[first : last + 1]
        part = Segments(segments.token_offsets[borders[0] : borders[-1] + 1] - here.start, borders - borders[0])
        over = {"[B]": slice(first, last), "[N]": here}.get(kind)
        over = denominator if over is None else denominator[over]
        if kind == "[B]" and part.num_sequences == part.num_tokens:
            over = over[part.sequence_ids()]  # [B] and [N] have one shape here, which is read as [N]
        rows = {name: x[here] for name, x in values.items()}
        loss, part_grads, _ = forward_backward(rows, part, None, mask=mask[here], denominator=over, **settings)
        total += float(loss)
        for name, grad in part_grads.items():
            parts[name].append(grad)
    if kind == "[B]" and segments.num_sequences == segments.num_tokens:
        return
    assert total == pytest.approx(float(whole), rel=1e-12, abs=1e-12)
    for name, grad in grads.items():
        torch.testing.assert_close(torch.cat(parts[name]), grad, rtol=1e-12, atol=0)


def test_weights_act_in_the_token_form_and_cancel_in_the_plain_form():
    """GSPO-token: with the plain form sum_t s A w_t, conserving weights cancel exactly whatever the attribution (section 8)."""
    segments = segments_of([[2, 3, 1]], terminal=[True])
    values = inputs(segments, drift=0.01)
    weighted, weights = segment_credit(torch.tensor([1.0, -1.0, 0.0], dtype=torch.float64), segments, torch.ones(1, dtype=torch.float64))
    assert (weights != 1).any()

    def token_form(advantages):
        return forward_backward(dict(logp=values["logp"], old_logp=values["old_logp"], advantages=advantages), segments, None, ratio="sequence")[1]

    def plain_form(advantages):
        logp = values["logp"].clone().requires_grad_()
        s = torch.exp(segment_reduce(logp - values["old_logp"], segments, reduce="mean", level="sequence"))[segments.sequence_ids()]
        return torch.autograd.grad(-(s * advantages).sum() / segments.num_tokens, logp)[0]

    uniform = torch.ones_like(weighted)
    torch.testing.assert_close(plain_form(weighted), plain_form(uniform), rtol=1e-14, atol=0)  # the attribution is lost
    torch.testing.assert_close(token_form(weighted)["logp"], token_form(uniform)["logp"] * weighted, rtol=1e-14, atol=0)  # and here it is not
    torch.testing.assert_close(token_form(uniform)["logp"], plain_form(uniform), rtol=1e-14, atol=0)  # GSPO's own gradient without weights


@given(st.integers(1, 40), st.booleans())
def test_the_clip_of_a_segment_narrows_with_its_length(length, masked):
    """Half of twice as many tokens masked clips as the unmasked ones alone: n_k counts unmasked tokens."""
    segments = segments_of([[2 * length if masked else length]])
    mask = torch.arange(segments.num_tokens) % 2 == 0 if masked else None
    border = 0.3 / math.sqrt(length)
    old = torch.zeros(segments.num_tokens, dtype=torch.float64)
    for log_ratio, clipped in ((math.log1p(border) - 1e-9, 0), (math.log1p(border) + 1e-9, 1)):
        loss, grads, metrics = forward_backward(
            dict(logp=old + log_ratio, old_logp=old, advantages=old + 1), segments, None, mask=mask, ratio="segment", clip=(0.3, 0.3)
        )
        assert float(metrics["clip_ratio/high_mean"]) == clipped
        assert (grads["logp"] == 0).all() == bool(clipped)
        assert float(loss) == pytest.approx(-1 - border, abs=1e-8)


@given(hierarchies())
def test_levels_agree_on_segments_of_one_token_and_sequences_of_one_segment(case):
    segments, mask = case
    n = segments.num_tokens
    values = inputs(segments)
    singles = Segments(torch.arange(n + 1), torch.arange(n + 1))
    token = forward_backward(values, singles, None, mask=mask, kl_weight=0.1)
    for ratio in ("segment", "sequence"):
        other = forward_backward(values, singles, None, mask=mask, kl_weight=0.1, ratio=ratio)
        torch.testing.assert_close(other[0], token[0], rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(other[1]["logp"], token[1]["logp"], rtol=1e-13, atol=1e-13)


@given(hierarchies(), st.sampled_from(RATIOS))
def test_on_policy_is_the_policy_gradient(case, ratio):
    """old_logp=None and old_logp=logp are one thing: the gradient is -A over the denominator at every level, nothing is clipped."""
    segments, mask = case
    values = inputs(segments)
    values = dict(logp=values["logp"], old_logp=None, advantages=values["advantages"])
    loss, grads, metrics = forward_backward(values, segments, None, mask=mask, ratio=ratio)
    given_, given_grads, _ = forward_backward(values | {"old_logp": values["logp"]}, segments, None, mask=mask, ratio=ratio)
    assert torch.equal(loss, given_)
    assert torch.equal(grads["logp"], given_grads["logp"])
    wanted = torch.where(mask, -values["advantages"] / mask.sum().clamp(min=1), 0.0)
    torch.testing.assert_close(grads["logp"], wanted, rtol=1e-15, atol=0)
    assert metrics["clip_ratio/low_mean"] == metrics["clip_ratio/high_mean"] == metrics["kl/old"] == 0


def test_denominators_express_grpo_dr_grpo_and_gspo():
    segments = segments_of([[2, 1], [1], [4]])
    logp, advantages = -torch.rand(8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    per_sequence = segment_reduce(-advantages, segments, reduce="mean", level="sequence")
    lengths = segments.cu_seqlens.diff()
    sequence_mean = policy_loss(logp, None, advantages, segments, denominator=lengths.double() * 3).loss
    torch.testing.assert_close(sequence_mean, per_sequence.mean(), rtol=1e-14, atol=0)
    per_token = policy_loss(logp, None, advantages, segments, denominator=lengths.double()[segments.sequence_ids()] * 3).loss
    torch.testing.assert_close(per_token, sequence_mean, rtol=1e-15, atol=0)
    constant = policy_loss(logp, None, advantages, segments, denominator=3 * 1024.0).loss
    torch.testing.assert_close(constant, -advantages.sum() / 3072, rtol=1e-14, atol=0)
    integral = policy_loss(logp, None, advantages, segments, denominator=3072).loss
    tensor = policy_loss(logp, None, advantages, segments, denominator=torch.tensor(3072.0)).loss
    assert integral == constant == tensor
