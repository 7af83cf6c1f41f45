"""Credit: outcome advantages, confidence, and the forms that turn attribution into token advantages."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ragged import segments_of

from acpo.attribution import Attribution
from acpo.config import CreditConfig
from acpo.credit import confident_rewards, keep_side, outcome_advantages, token_advantages

SIZE = 4
LENGTHS = ((2, 3, 1), (1, 1), (4, 2, 2), (3,), (2, 2, 1), (1, 2, 1), (3, 1), (2, 1, 1))
OUTCOME = torch.tensor([1.0, 0, 0, 1, 1, 1, 1, 1])  # the second group has no variance


def attribution_of(segments, reliability: float, shaping: bool, rows=None, seed: int = 0) -> Attribution:
    generator = torch.Generator().manual_seed(seed)
    phi = torch.randn(segments.num_segments, generator=generator).double() * 0.3
    rows = torch.ones(segments.num_sequences, dtype=torch.bool) if rows is None else rows
    own = torch.randn(segments.num_segments, generator=generator) if shaping else None
    return Attribution(phi, phi, phi, phi, own, rows, reliability)


def of_rollout(values: torch.Tensor, segments, b: int) -> torch.Tensor:
    ends = segments.cu_seqlens.tolist()
    return values[ends[b] : ends[b + 1]]


# --- outcome advantages -------------------------------------------------------------------------------------------------------------


def test_outcome_advantages_by_hand():
    rewards = torch.tensor([1.0, 0, 0, 0], dtype=torch.float64)
    std = (3 / 16) ** 0.5
    torch.testing.assert_close(outcome_advantages(rewards, 4, "centred"), torch.tensor([0.75, -0.25, -0.25, -0.25]).double())
    torch.testing.assert_close(outcome_advantages(rewards, 4, "grpo"), torch.tensor([0.75, -0.25, -0.25, -0.25]).double() / (std + 1e-6))
    torch.testing.assert_close(outcome_advantages(rewards, 4, "rloo"), torch.tensor([1, -1 / 3, -1 / 3, -1 / 3]).double())


@pytest.mark.parametrize("kind", ["grpo", "rloo", "centred"])
@given(st.floats(-3, 3, width=32), st.integers(2, 16))
def test_groups_without_variance_are_exactly_zero(kind, value, size):
    rewards = torch.cat([torch.full((size,), value), torch.arange(size).float()])
    found = outcome_advantages(rewards, size, kind)
    assert (found[:size] == 0.0).all()
    assert found[size:].count_nonzero() >= size - 1 and abs(found[size:].sum().item()) < 1e-4


def test_groups_do_not_meet():
    one, two = torch.tensor([1.0, 0, 0]), torch.tensor([5.0, 1, 1])
    both = outcome_advantages(torch.cat([one, two]), 3, "rloo")
    assert torch.equal(both, torch.cat([outcome_advantages(one, 3, "rloo"), outcome_advantages(two, 3, "rloo")]))


# --- confidence ---------------------------------------------------------------------------------------------------------------------


@given(st.sampled_from([0.0, 0.2, 0.5, 0.99]), st.lists(st.floats(0, 1, width=32), min_size=8, max_size=8))
def test_a_right_answer_outranks_a_wrong_one(omega, confidence):
    outcome = torch.tensor([1.0, 0, 0, 1, 1, 0, 1, 0])
    rewards = confident_rewards(outcome, torch.tensor(confidence), 8, omega)
    assert rewards[outcome == 1].min() > rewards[outcome == 0].max()


def test_confident_rewards_by_hand():
    outcome, confidence = torch.tensor([1.0, 1, 0, 0]), torch.tensor([0.9, 0.2, 0.1, 0.8])
    torch.testing.assert_close(confident_rewards(outcome, confidence, 4, 0.5), torch.tensor([0.995, 0.68, -0.005, -0.32]))
    assert torch.equal(confident_rewards(outcome, confidence, 4, 0.0), outcome)
    assert torch.equal(confident_rewards(outcome, confidence, 2, 0.5), outcome), "groups without both outcomes keep the plain one"


def test_keep_side():
    plain = torch.tensor([0.5, 0.5, -0.5, -0.5, 0.0])
    assert keep_side(torch.tensor([0.3, -0.2, 0.4, -0.1, 0.0]), plain).tolist() == pytest.approx([0.3, 0.0, 0.0, -0.1, 0.0])


def test_an_unsure_right_answer_is_not_punished():
    outcome, confidence = torch.tensor([1.0, 1, 1, 0]), torch.tensor([0.95, 0.95, 0.05, 0.05])
    plain = outcome_advantages(outcome, 4, "grpo")
    shaped = outcome_advantages(confident_rewards(outcome, confidence, 4, 0.9), 4, "grpo")
    assert plain[2] > 0 > shaped[2], "which is why the side is kept"
    assert keep_side(shaped, plain)[2] == 0.0


# --- token advantages ---------------------------------------------------------------------------------------------------------------

FORMS = [("additive", True), ("additive", False), ("weights", False), ("weights", True)]


@pytest.mark.parametrize("scope", ["zero_variance", "all"])
@pytest.mark.parametrize(("form", "shaping"), FORMS)
@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_reliability_zero_is_the_outcome_advantage_bitwise(form, shaping, scope, kind):
    segments = segments_of(LENGTHS, (True, True, False, True, True, False, True, True))
    advantages = outcome_advantages(OUTCOME, SIZE, kind)
    config = CreditConfig(form=form, scope=scope)
    none = token_advantages(advantages, None, OUTCOME, segments, SIZE, config)
    assert torch.equal(none.token_advantages, advantages[segments.sequence_ids()])
    zero = token_advantages(advantages, attribution_of(segments, 0.0, shaping), OUTCOME, segments, SIZE, config)
    assert torch.equal(zero.token_advantages, none.token_advantages) and (zero.weights == 1.0).all()
    full = token_advantages(advantages, attribution_of(segments, 1.0, shaping), OUTCOME, segments, SIZE, config)
    changes = scope == "all" or form == "additive"  # weights times an advantage of 0 are 0
    assert torch.equal(full.token_advantages, none.token_advantages) != changes
    off = token_advantages(advantages, attribution_of(segments, 1.0, shaping), OUTCOME, segments, SIZE, CreditConfig(form="none"))
    assert torch.equal(off.token_advantages, none.token_advantages)


def test_additive_shaping_by_hand():
    terminal = (True, True, False, True, True, False, True, True)
    segments = segments_of(LENGTHS, terminal)
    found = attribution_of(segments, 0.8, True)
    advantages = outcome_advantages(OUTCOME, SIZE, "grpo")
    config = CreditConfig(form="additive", scope="zero_variance", gain=0.5)
    credit = token_advantages(advantages, found, OUTCOME, segments, SIZE, config)
    # The second group, rollouts 4-7, without its answer segments.
    sequence, ordinary = segments.segment_sequence_ids(), ~segments.is_terminal()
    use = (sequence >= SIZE) & ordinary
    c = found.shaping[use]
    z = (c - c.mean()) / ((c - c.mean()).square().mean().sqrt() + 1e-6)
    wanted = torch.zeros(segments.num_segments)
    wanted[use] = 0.8 * 0.5 * z.clamp(-3, 3)
    torch.testing.assert_close(credit.token_advantages, advantages[segments.sequence_ids()] + wanted[segments.segment_ids()])
    assert (credit.weights == 1.0).all()


def test_zero_variance_scope_leaves_the_other_groups_bitwise():
    segments = segments_of(LENGTHS)
    advantages = outcome_advantages(OUTCOME, SIZE, "grpo")
    found = token_advantages(advantages, attribution_of(segments, 1.0, True), OUTCOME, segments, SIZE, CreditConfig(scope="zero_variance"))
    changed = found.token_advantages != advantages[segments.sequence_ids()]
    for b in range(SIZE):
        assert not of_rollout(changed, segments, b).any()
    assert all(of_rollout(changed, segments, b).any() for b in range(SIZE, 2 * SIZE))


def test_credit_stays_on_the_rows_that_were_looked_at():
    segments = segments_of(LENGTHS)
    rows = torch.tensor([True, False, True, True, False, True, True, True])
    advantages = outcome_advantages(OUTCOME, SIZE, "grpo")
    for form, shaping in FORMS:
        config = CreditConfig(form=form, scope="all")
        found = token_advantages(advantages, attribution_of(segments, 1.0, shaping, rows), OUTCOME, segments, SIZE, config).token_advantages
        for b in (1, 4):
            assert (of_rollout(found, segments, b) == advantages[b]).all()


def test_answers_get_no_additive_credit():
    segments = segments_of(LENGTHS, (True,) * 8)
    advantages = outcome_advantages(OUTCOME, SIZE, "grpo")
    for shaping in (True, False):
        config = CreditConfig(form="additive", scope="all")
        found = token_advantages(advantages, attribution_of(segments, 1.0, shaping), OUTCOME, segments, SIZE, config).token_advantages
        spread = found - advantages[segments.sequence_ids()]
        last = segments.is_terminal()[segments.segment_ids()]
        assert not spread[last].any() and spread[~last].count_nonzero() == (~last).sum()


def test_tree_credit_is_measured_in_the_groups_own_spread():
    segments = segments_of(((1, 1),) * 8)
    outcome = torch.tensor([1.0, 0, 0, 1, 1, 1, 1, 1])
    found = attribution_of(segments, 1.0, False)
    found.phi = torch.full((16,), 0.1, dtype=torch.float64)
    config = CreditConfig(form="additive", scope="all", gain=1.0)
    spread = token_advantages(torch.zeros(8), found, outcome, segments, SIZE, config).token_advantages
    torch.testing.assert_close(spread[:8], torch.full((8,), 0.1 / 0.5))
    torch.testing.assert_close(spread[8:], torch.full((8,), 0.1 / 0.25))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("reliability", [0.3, 1.0])
def test_weights_conserve_and_keep_the_side(seed, reliability):
    segments = segments_of(LENGTHS, (True, True, False, True, True, False, True, True))
    advantages = torch.tensor([1.5, -0.5, -0.5, 0.7, 0.2, -1.0, 0.3, 0.4])
    config = CreditConfig(form="weights", scope="all")
    found = token_advantages(advantages, attribution_of(segments, reliability, False, seed=seed), OUTCOME, segments, SIZE, config)
    assert found.weights.max() > 1.01 > 0.99 > found.weights.min()
    low, high = (1 - reliability / 2) / (1 + reliability / 2), (1 + reliability / 2) / (1 - reliability / 2)
    assert ((found.weights > low - 1e-6) & (found.weights < high + 1e-6)).all()
    for b, lengths in enumerate(LENGTHS):
        own = of_rollout(found.token_advantages, segments, b)
        assert own.sum().item() == pytest.approx(advantages[b].item() * sum(lengths), rel=1e-5)
        assert (own * advantages[b] > 0).all()
