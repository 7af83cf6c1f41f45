"""Credit: outcome advantages, confidence, and the forms that turn attribution into token advantages."""

from __future__ import annotations

import math
import typing

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ragged import hierarchies, segments_of

from acpo.attribution import Attribution, group_std, leave_one_out, one_of_each, zero_variance
from acpo.batch import Batch
from acpo.config import CreditConfig
from acpo.credit import (
    ADVANTAGES,
    answer_confidence,
    assign,
    bounded_ratio,
    confident_rewards,
    difficulty_weights,
    group_weights,
    keep_side,
    outcome_advantages,
    token_advantages,
    token_factor,
)
from acpo.tree import Prefixes, branch_differences, tree_values
from acpo_kernels import segment_reduce

SIZE = 4
LENGTHS = ((2, 3, 1), (1, 1), (4, 2, 2), (3,), (2, 2, 1), (1, 2, 1), (3, 1), (2, 1, 1))
OUTCOME = torch.tensor([1.0, 0, 0, 1, 1, 1, 1, 1])  # the second group has no variance


def attribution_of(segments, reliability: float, rows=None, seed: int = 0) -> Attribution:
    generator = torch.Generator().manual_seed(seed)
    phi, score = 0.3 * torch.randn(2, segments.num_segments, generator=generator).double()
    changed = torch.rand(segments.num_segments, generator=generator) < 0.7
    rows = torch.ones(segments.num_sequences, dtype=torch.bool) if rows is None else rows
    return Attribution(phi, phi, phi, phi, score, changed, rows, reliability * rows.double())


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


@pytest.mark.parametrize(
    ("rewards", "size", "kind", "message"),
    [
        (torch.tensor([1.0, 0]), 2, "gprpo", "kind must be one of grpo, rloo, centred, got 'gprpo'"),
        (torch.tensor([1, 0]), 2, "grpo", r"rewards must be floating .*, got torch\.int64"),
        (torch.tensor([1.0, 0, 1]), 2, "grpo", r"rewards must be \[B\] with whole groups of group_size = 2, got \(3,\)"),
        (torch.tensor([1.0, 0]), 0, "grpo", r"rewards must be \[B\] with whole groups of group_size = 0, got \(2,\)"),
    ],
)
def test_outcome_advantages_that_cannot_be(rewards, size, kind, message):
    assert typing.get_args(typing.get_type_hints(CreditConfig)["advantage"]) == ADVANTAGES
    with pytest.raises(ValueError, match=message):
        outcome_advantages(rewards, size, kind)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_confidence_of_an_answer_is_of_its_log_probs_dtype(dtype):
    found = answer_confidence(torch.tensor([-9.0, math.log(0.5), -3.0], dtype=dtype), segments_of(((1, 1), (1,)), (True, False)))
    torch.testing.assert_close(found, torch.tensor([0.5, 0.0], dtype=dtype))


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

TERMINAL = (True, True, False, True, True, False, True, True)
FORMS = ("additive", "weights", "none")
MASKS = ("none", "unchanged")


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_reliability_zero_is_the_outcome_advantage_bitwise(form, mask, kind):
    segments = segments_of(LENGTHS, TERMINAL)
    advantages = outcome_advantages(OUTCOME, SIZE, kind)
    config = CreditConfig(form=form, mask=mask)
    none = token_advantages(advantages, None, segments, config)
    assert torch.equal(none.token_advantages, advantages[segments.sequence_ids()])
    zero = token_advantages(advantages, attribution_of(segments, 0.0), segments, config)
    assert torch.equal(zero.token_advantages, none.token_advantages) and (zero.weights == 1.0).all()
    full = token_advantages(advantages, attribution_of(segments, 1.0), segments, config)
    assert torch.equal(full.token_advantages, none.token_advantages) == (form == "none" and mask == "none")


def test_additive_by_hand():
    segments = segments_of(LENGTHS, TERMINAL)
    found = attribution_of(segments, 0.8, zero_variance(OUTCOME, SIZE))
    advantages = outcome_advantages(OUTCOME, SIZE, "grpo")
    credit = token_advantages(advantages, found, segments, CreditConfig(form="additive", mask="none"))
    use = (segments.segment_sequence_ids() >= SIZE) & ~segments.is_terminal()
    wanted = torch.where(use, 0.8 * found.score, 0.0).float()
    torch.testing.assert_close(credit.token_advantages, advantages[segments.sequence_ids()] + wanted[segments.segment_ids()])
    assert (credit.weights == 1.0).all()


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("form", FORMS)
def test_credit_stays_on_the_rows_of_the_attribution(form, mask):
    segments = segments_of(LENGTHS)
    rows = torch.tensor([True, False, True, True, False, True, True, True])
    advantages = outcome_advantages(OUTCOME, SIZE, "grpo")
    found = token_advantages(advantages, attribution_of(segments, 1.0, rows), segments, CreditConfig(form=form, mask=mask)).token_advantages
    for b in (1, 4):
        assert (of_rollout(found, segments, b) == advantages[b]).all()


def test_answers_get_no_additive_credit_and_no_mask():
    segments = segments_of(LENGTHS, (True,) * 8)
    advantages = outcome_advantages(OUTCOME, SIZE, "grpo")
    for mask in MASKS:
        found = attribution_of(segments, 1.0)
        found.changed[:] = False
        spread = token_advantages(advantages, found, segments, CreditConfig(mask=mask)).token_advantages - advantages[segments.sequence_ids()]
        last = segments.is_terminal()[segments.segment_ids()]
        assert not spread[last].any()


@pytest.mark.parametrize("reliability", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("form", FORMS)
def test_a_segment_without_change_loses_its_advantage_and_nothing_else_moves(form, reliability):
    segments = segments_of(LENGTHS, TERMINAL)
    advantages = outcome_advantages(OUTCOME, SIZE, "grpo")
    found = attribution_of(segments, reliability)
    plain, masked = (token_advantages(advantages, found, segments, CreditConfig(form=form, mask=m)).token_advantages for m in MASKS)
    silent = (~found.changed & ~segments.is_terminal())[segments.segment_ids()]
    assert silent.any() and not silent.all()
    assert torch.equal(masked[~silent], plain[~silent])
    torch.testing.assert_close(masked[silent], (1 - reliability) * plain[silent])


def test_where_the_policy_was_sure_a_segment_without_change_keeps_its_advantage():
    """By hand: a share min(1, H_t / mean H) of the advantage goes, the mean over what the policy wrote."""
    segments = segments_of(((2, 2, 1), (2, 2)))
    entropy, advantages = torch.tensor([0.0, 0.5, 3.0, 0.0, 1.0, 2.0, 0.25, 1.0, 1.25]), torch.tensor([1.0, -2.0])
    found = attribution_of(segments, 0.5)
    found.changed[:] = torch.tensor([False, False, True, False, True])
    tokens, weights = token_advantages(advantages, found, segments, CreditConfig(form="none"), None, entropy)
    torch.testing.assert_close(tokens, torch.tensor([1.0, 0.75, 0.5, 1.0, 1.0, -1.0, -1.75, -2.0, -2.0]))
    torch.testing.assert_close(weights, torch.tensor([0.875, 0.75, 1.0, 0.6875, 1.0]))
    written = torch.tensor([True, True, False, True, True, True, True, True, True])  # mean 0.75
    tokens, weights = token_advantages(advantages, found, segments, CreditConfig(form="none"), written, entropy)
    torch.testing.assert_close(tokens[[1, 5, 6]], torch.tensor([1 - 0.5 * 2 / 3, -1.0, -2 * (1 - 0.5 / 3)]))
    assert weights[1] == 1.0, "of its two tokens the policy wrote one, and was sure"
    unknown = torch.where(written, entropy, torch.nan)  # what a loop holds where the policy wrote nothing
    assert torch.equal(token_advantages(advantages, found, segments, CreditConfig(form="none"), written, unknown).token_advantages, tokens)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("reliability", [0.3, 1.0])
def test_weights_conserve_and_keep_the_side(seed, reliability):
    segments = segments_of(LENGTHS, TERMINAL)
    advantages = torch.tensor([1.5, -0.5, -0.5, 0.7, 0.2, -1.0, 0.3, 0.4])
    found = token_advantages(advantages, attribution_of(segments, reliability, seed=seed), segments, CreditConfig(form="weights", mask="none"))
    assert found.weights.max() > 1.01 > 0.99 > found.weights.min()
    low, high = (1 - reliability / 2) / (1 + reliability / 2), (1 + reliability / 2) / (1 - reliability / 2)
    assert ((found.weights > low - 1e-6) & (found.weights < high + 1e-6)).all()
    for b, lengths in enumerate(LENGTHS):
        own = of_rollout(found.token_advantages, segments, b)
        assert own.sum().item() == pytest.approx(advantages[b].item() * sum(lengths), rel=1e-5)
        assert (own * advantages[b] > 0).all()


# --- the forms of others ------------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.floats(-2, 2, width=32), st.floats(-30, 30, width=32)), min_size=1, max_size=20), st.floats(0, 0.9))
def test_the_bounded_ratio_keeps_side_and_bounds(pairs, bound):
    advantages, ratio = torch.tensor(pairs).double().T
    found = bounded_ratio(advantages, ratio, bound)
    assert (found * advantages >= 0).all()
    assert (found.abs() <= advantages.abs() * (1 + bound) + 1e-12).all() and (found.abs() >= advantages.abs() * (1 - bound) - 1e-12).all()
    torch.testing.assert_close(bounded_ratio(advantages, torch.zeros_like(ratio), bound), advantages)


def test_the_bounded_ratio_by_hand():
    found = bounded_ratio(torch.tensor([1.0, -1.0, 2.0, -2.0]), torch.tensor([0.1, 0.1, 5.0, float("nan")]), 0.2)
    torch.testing.assert_close(found, torch.tensor([math.exp(0.1), -math.exp(-0.1), 2.4, -2.0]))


def test_assign_gives_the_form_and_masks_what_is_known_to_be_filler():
    ids = [torch.tensor(x) for x in ([5, 9, 6], [5, 9, 7], [4], [5, 8, 9, 9])]
    batch = Batch.from_responses([[1]] * 4, ids)
    outcome = torch.tensor([1.0, 0, 0, 1])
    advantages = outcome_advantages(outcome, 4, "grpo")
    plain = advantages[batch.segments.sequence_ids()]
    packed = batch.token["ids"]
    tokens, weights = assign(advantages, outcome, None, batch.segments, 4, CreditConfig(form="branch", mask="none"), ids=packed)
    differences = branch_differences(ids, outcome, 4)
    torch.testing.assert_close(tokens, plain + differences / 0.5, msg="over the std of the outcomes, as the advantage is")
    assert (weights == 1).all()
    config, centred = CreditConfig(form="branch", mask="none", advantage="rloo"), outcome_advantages(outcome, 4, "rloo")
    tokens, _ = assign(centred, outcome, None, batch.segments, 4, config, ids=packed)
    torch.testing.assert_close(tokens, centred[batch.segments.sequence_ids()] + differences)
    filler = torch.tensor([9])
    config = CreditConfig(form="none", mask="filler")
    tokens, _ = assign(advantages, outcome, None, batch.segments, 4, config, ids=packed, filler=filler)
    torch.testing.assert_close(tokens, torch.where(packed == 9, 0.0, plain))
    tokens, _ = assign(advantages, outcome, None, batch.segments, 4, config, ids=packed)
    assert torch.equal(tokens, plain), "a task that knows of no filler"


@given(hierarchies())
def test_the_token_factor_keeps_a_segments_credit_within_bounds(hierarchy):
    segments, _ = hierarchy
    entropy = torch.rand(segments.num_tokens, dtype=torch.float64) * torch.randint(0, 3, (segments.num_tokens,))
    found = token_factor(entropy, segments)
    assert ((found >= 1 / 3 - 1e-9) & (found <= 3 + 1e-9)).all()
    torch.testing.assert_close(segment_reduce(found, segments), segments.lengths.double())
    assert torch.equal(token_factor(torch.zeros_like(entropy), segments), torch.ones_like(entropy))


def test_the_token_factor_by_hand():
    found = token_factor(torch.tensor([0.1, 0.3, 2.0, 0.0]), segments_of(((2, 2),)))
    torch.testing.assert_close(found, torch.tensor([0.5, 1.5, 1.5, 0.5]))


def test_difficulty_weights_by_hand():
    """p = 1/4, 3/4 and 0: odds against success of 3, 1/3 and none; half as reliable, half the power."""
    outcome = torch.tensor([1.0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0])
    reliability = torch.tensor([1.0] * 4 + [0.5] * 4 + [1.0] * 4)
    raw = torch.tensor([3.0**0.25, 3.0**-0.125], dtype=torch.float64)
    found = difficulty_weights(outcome, reliability, 4, 0.25)
    torch.testing.assert_close(found[::4], torch.tensor([*(raw / raw.mean()).tolist(), 1.0], dtype=torch.float64))
    assert torch.equal(found, found[::4].repeat_interleave(4))


def test_a_power_of_half_is_the_gradient_of_log_p():
    """The std-normalised advantage times w is (R - p) / p, up to one factor for all groups."""
    outcome = torch.tensor([1.0] + [0.0] * 7 + [1.0] * 3 + [0.0] * 5 + [1.0] * 6 + [0.0] * 2, dtype=torch.float64)
    p = outcome.view(-1, 8).mean(1).repeat_interleave(8)
    weighted = outcome_advantages(outcome, 8, "grpo") * difficulty_weights(outcome, torch.ones(24), 8, 0.5)
    ratio = weighted / ((outcome - p) / p)
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-5, atol=0)


@pytest.mark.parametrize("left_out", [False, True])
def test_difficulty_without_reliability_is_exactly_one(left_out):
    outcome = torch.tensor([math.nan if left_out else 1.0, 0, 0, 1, 1, 1, 1, 1])
    assert (difficulty_weights(outcome, torch.zeros(8), 4, 0.25) == 1.0).all()
    assert (difficulty_weights(outcome, torch.ones(8), 4, 0.0) == 1.0).all()


def test_assign_tilts_towards_the_harder_group():
    """Every token of a group by its weight, score and outcome alike; nothing without attribution."""
    segments = segments_of(LENGTHS)
    outcome = torch.tensor([1.0, 0, 0, 0, 1, 1, 1, 0])
    attribution, ids = attribution_of(segments, 0.5), torch.zeros(segments.num_tokens, dtype=torch.int64)
    advantages = outcome_advantages(outcome, SIZE, "grpo")
    settings = [CreditConfig(mask="none", difficulty=d) for d in (0.0, 0.25)]
    plain, tilted = (assign(advantages, outcome, attribution, segments, SIZE, own, ids=ids).token_advantages for own in settings)
    weight = group_weights(outcome, attribution, SIZE, CreditConfig(difficulty=0.25)).float()
    assert (group_weights(outcome, None, SIZE, CreditConfig()) == 1).all() and (group_weights(outcome, attribution, SIZE, settings[0]) == 1).all()
    assert weight[0] > 1 > weight[4]
    torch.testing.assert_close(tilted, plain * weight[segments.sequence_ids()])
    none = assign(advantages, outcome, None, segments, SIZE, CreditConfig(form="none", mask="none"), ids=ids).token_advantages
    assert torch.equal(none, advantages[segments.sequence_ids()])


def test_the_naive_confidence_pays_certainty_alone():
    outcome, confidence = torch.tensor([1.0, 1.0, 0.0, 0.0, 1.0, 1.0]), torch.tensor([0.9, 0.2, 0.9, 0.2, 0.9, 0.2])
    found = confident_rewards(outcome, confidence, 2, 0.3, "product")
    assert found.tolist() == [1.0, 1.0, 0.0, 0.0, 1.0, 1.0], "no group with both outcomes"
    torch.testing.assert_close(confident_rewards(outcome, confidence, 6, 0.3, "product"), torch.tensor([0.9, 0.2, 0.0, 0.0, 0.9, 0.2]))


# --- tokens that the policy did not write ---------------------------------------------------------------------------------------------


def test_tokens_of_a_tool_carry_no_advantage_and_no_mass():
    segments = segments_of(((2, 3), (2, 2)))
    mask = torch.tensor([True, True, False, False, True, True, True, True, True])
    attribution = attribution_of(segments, 1.0)
    advantages, outcome = torch.tensor([1.0, -1.0]), torch.tensor([1.0, 0.0])
    config = CreditConfig(form="weights", mask="none", token="entropy")
    entropy = torch.tensor([0.1, 0.3, 9.0, 9.0, 0.2, 0.2, 0.2, 0.2, 0.2])
    tokens, _ = assign(advantages, outcome, attribution, segments, 2, config, ids=torch.arange(9), entropy=entropy, mask=mask)
    assert (tokens[~mask] == 0).all() and (tokens[mask] != 0).all()
    torch.testing.assert_close(tokens[:5].sum(), torch.tensor(3.0)), "its three tokens share the credit of three"
    torch.testing.assert_close(tokens[1] / tokens[0], torch.tensor(3.0)), "the mean entropy of the step is that of its own two tokens"
    none, _ = assign(advantages, outcome, None, segments, 2, config, ids=torch.arange(9), entropy=torch.ones(9), mask=mask)
    assert torch.equal(none, advantages[segments.sequence_ids()] * mask)


def test_a_mask_that_leaves_nothing_out_changes_nothing():
    segments = segments_of(LENGTHS)
    everything = torch.ones(segments.num_tokens, dtype=torch.bool)
    advantages = outcome_advantages(OUTCOME, SIZE, "grpo")
    logp = -torch.rand(segments.num_tokens)
    for form in ("additive", "weights"):
        both = [
            assign(
                advantages,
                OUTCOME,
                attribution_of(segments, 0.6),
                segments,
                SIZE,
                CreditConfig(form=form),
                ids=torch.zeros(segments.num_tokens),
                mask=m,
            )
            for m in (None, everything)
        ]
        assert all(torch.equal(a, b) for a, b in zip(*both, strict=True))
    terminal = segments_of(LENGTHS, (True,) * 8)
    assert torch.equal(answer_confidence(logp, terminal), answer_confidence(logp, terminal, everything))


def test_an_answer_that_the_policy_did_not_write_is_none_to_be_confident_of():
    """Tool output at the end: the mean over no token is 0, and exp(0) would be full confidence."""
    segments = segments_of(((2, 2), (2, 2), (2, 2)), (True, True, False))
    logp, mask = torch.full((12,), -3.0), torch.ones(12, dtype=torch.bool)
    mask[2:4] = mask[7] = False
    got = answer_confidence(logp, segments, mask)
    assert got[0] == got[2] == 0 and torch.equal(got[1], torch.tensor(-3.0).exp())


# --- outcomes that the verifier left out (NaN) ------------------------------------------------------------------------------------------

NAN = float("nan")


@pytest.mark.parametrize("kind", ["grpo", "rloo", "centred"])
@pytest.mark.parametrize("kept", [[1.0, 0.0, 1.0], [0.25, 0.5], [1.0, 1.0, 1.0], [0.0], []])
def test_what_is_left_out_takes_no_part_in_its_groups_baseline(kind, kept):
    """A group of five with some left out has, for the others, the advantages of the smaller group; the left out have none."""
    left = torch.tensor([NAN] * (5 - len(kept)) + kept)[torch.tensor([3, 0, 4, 1, 2])]
    beside = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0])
    found = outcome_advantages(torch.cat([left, beside]), 5, kind)
    inside = left[~left.isnan()]
    expected = outcome_advantages(inside, len(kept), kind) if len(kept) > 1 else torch.zeros(len(kept))
    assert torch.allclose(found[:5][~left.isnan()], expected, atol=1e-6) and (found[:5][left.isnan()] == 0).all()
    assert torch.equal(found[5:], outcome_advantages(beside, 5, kind))


def test_group_statistics_without_what_is_left_out():
    outcome = torch.tensor([1.0, NAN, 0.0, 1.0, 1.0, NAN, NAN, 1.0, NAN, NAN, NAN, NAN])
    assert torch.allclose(leave_one_out(outcome, 4), torch.tensor([0.5, 2 / 3, 1.0, 0.5, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]))
    assert zero_variance(outcome, 4).tolist() == [False] * 4 + [True] * 8
    assert one_of_each(outcome, 4).tolist() == [True, False, True, False] + [False] * 8
    assert torch.allclose(group_std(outcome, 4), torch.tensor([(2 / 9) ** 0.5, 0.0, 0.0]))


def test_values_of_the_tree_without_what_is_left_out():
    """The values of the others are those of the tree without it; its own are those of one that looks on."""
    keys = [[b"a", b"ab"], [b"a", b"ac"], [b"a", b"ab"], [b"d", b"de"]]
    prefixes = Prefixes(keys, keys, [[True, True]] * 4)
    rewards = torch.tensor([1.0, 0.0, NAN, 1.0])
    found = tree_values(prefixes, rewards, 4, kappa=2.0).view(4, 2)
    fewer = [0, 1, 3]
    smaller = tree_values(Prefixes([keys[b] for b in fewer], [keys[b] for b in fewer], [[True, True]] * 3), rewards[fewer], 3, kappa=2.0).view(3, 2)
    assert torch.allclose(found[fewer], smaller)
    assert torch.allclose(found[2], torch.tensor([(1 + 0 + 2 * 2 / 3) / 4, (1 + 2 * 2 / 3) / 3]).double())
    ids = [torch.tensor(x) for x in ([1, 2], [1, 3], [1, 2], [4, 5])]
    branch = branch_differences(ids, rewards, 4)
    assert torch.allclose(branch[[0, 1, 2, 3, 6, 7]], branch_differences([ids[b] for b in fewer], rewards[fewer], 3)) and branch.isfinite().all()
