"""Controls keep the shape and the spread of an attribution, and lose what it says."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ragged import segments_of

from acpo.attribution import Attribution
from acpo.config import CreditConfig
from acpo.controls import control
from acpo.credit import group_weights

SEGMENTS = segments_of(((2, 3, 1, 2), (1, 1), (4, 2, 2), (3,), (2, 2, 1), (1, 2, 1)), (True, True, False, True, True, False))
ORDINARY = ~SEGMENTS.is_terminal()
KINDS = ("shuffled", "everywhere", "position", "random")
OUTCOME = torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0, 1.0])  # groups of 2: the middle one without variance


def attribution(rows=(True,) * 6) -> Attribution:
    values = torch.arange(SEGMENTS.num_segments, dtype=torch.float64)
    rows = torch.tensor(rows)
    return Attribution(values, values + 100, values, values, 0.1 * values, torch.arange(SEGMENTS.num_segments) % 3 > 0, rows, 0.5 * rows.double())


def controlled(kind: str, before: Attribution, seed: int = 0) -> Attribution:
    return control(kind, before, SEGMENTS, OUTCOME, 2, torch.Generator().manual_seed(seed))


def by_rollout(values: torch.Tensor) -> list[list]:
    return [part.tolist() for part in values.split(SEGMENTS.sequence_offsets.diff().tolist())]


@pytest.mark.parametrize("kind", KINDS)
@given(st.integers(0, 2**31))
def test_answers_values_rows_and_reliability_stay(kind, seed):
    before = attribution()
    found = controlled(kind, before, seed)
    for name in ("phi", "score", "changed"):
        assert torch.equal(getattr(found, name)[~ORDINARY], getattr(before, name)[~ORDINARY])
    for name in ("iota", "values", "previous", "rows", "reliability"):
        assert torch.equal(getattr(found, name), getattr(before, name))
    again = controlled(kind, before, seed)
    assert torch.equal(found.phi, again.phi), "of the seed alone"
    assert (found.counts_as is None) == (kind != "everywhere")


@given(st.integers(0, 2**31))
def test_shuffled_permutes_inside_each_rollout_and_keeps_its_segments_together(seed):
    before = attribution()
    found = controlled("shuffled", before, seed)
    assert [sorted(x) for x in by_rollout(found.phi)] == by_rollout(before.phi)
    torch.testing.assert_close(found.score, 0.1 * found.phi)
    assert torch.equal(found.changed, found.phi % 3 > 0)


def test_shuffled_gives_every_order():
    orders = {tuple(by_rollout(controlled("shuffled", attribution(), s).phi)[0][:3]) for s in range(60)}
    assert len(orders) == 6


@given(st.integers(0, 2**31))
def test_everywhere_permutes_over_the_rollouts_of_one_source(seed):
    rows, source = (True, True, True, False, True, True), torch.tensor([0, 1, 0, 1, 1, 0])
    before = replace(attribution(rows), source=source)
    found = controlled("everywhere", before, seed)
    of, looked_at = source[SEGMENTS.segment_sequence_ids()], torch.tensor(rows)[SEGMENTS.segment_sequence_ids()]
    for kind in (0, 1):
        there = ORDINARY & looked_at & (of == kind)
        assert sorted(found.phi[there].tolist()) == before.phi[there].tolist()
    torch.testing.assert_close(found.score, 0.1 * found.phi)
    assert torch.equal(found.changed, found.phi % 3 > 0)
    assert torch.equal(found.phi[~looked_at], before.phi[~looked_at])


def test_everywhere_crosses_rollouts_and_moves_the_weights_of_groups_with_both_outcomes():
    found = [controlled("everywhere", attribution(), seed) for seed in range(40)]
    first = {by_rollout(x.phi)[0][0] for x in found}
    assert first - set(by_rollout(attribution().phi)[0]), "a value of another rollout came to the first"
    assert {tuple(x.counts_as.tolist()) for x in found} == {(0, 1, 2, 3, 4, 5), (4, 5, 2, 3, 0, 1)}


def test_a_group_counts_as_the_one_that_it_was_given():
    outcome = torch.tensor([1.0, 0, 0, 0, 1, 1, 1, 0])  # success 1/4 and 3/4
    own = Attribution(*torch.zeros(6, 1), torch.ones(8, dtype=torch.bool), torch.ones(8))
    weights = group_weights(outcome, own, 4, CreditConfig(difficulty=0.25))
    given = group_weights(outcome, replace(own, counts_as=torch.tensor([4, 5, 6, 7, 0, 1, 2, 3])), 4, CreditConfig(difficulty=0.25))
    assert weights[0] > weights[4] and torch.equal(given, weights[[4, 5, 6, 7, 0, 1, 2, 3]])


def test_position_is_the_mean_of_the_place():
    found = controlled("position", attribution((True, True, True, True, True, False)))
    phi = by_rollout(attribution().phi)
    # first place: rollouts 0, 1, 2, 4 (of 3 the only segment is the answer, 5 was not looked at)
    assert by_rollout(found.phi)[0][0] == pytest.approx((phi[0][0] + phi[1][0] + phi[2][0] + phi[4][0]) / 4) == by_rollout(found.phi)[4][0]
    assert by_rollout(found.phi)[0][2] == pytest.approx((phi[0][2] + phi[2][2]) / 2)


def test_random_draws_from_what_was_looked_at():
    rows = (True, False, True, True, False, True)
    found = controlled("random", attribution(rows), 3)
    pool = attribution().phi[torch.tensor(rows)[SEGMENTS.segment_sequence_ids()] & ORDINARY]
    assert torch.isin(found.phi[ORDINARY], pool).all() and found.phi[ORDINARY].unique().numel() > 3
    nothing = attribution((False,) * 6)
    assert torch.equal(controlled("random", nothing).phi, nothing.phi)
