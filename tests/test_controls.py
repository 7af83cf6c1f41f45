"""Controls keep the shape and the spread of an attribution, and lose what it says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ragged import segments_of

from acpo.attribution import Attribution
from acpo.controls import control

SEGMENTS = segments_of(((2, 3, 1, 2), (1, 1), (4, 2, 2), (3,), (2, 2, 1), (1, 2, 1)), (True, True, False, True, True, False))
ORDINARY = ~SEGMENTS.is_terminal()
KINDS = ("shuffled", "position", "random")


def attribution(rows=(True,) * 6) -> Attribution:
    values = torch.arange(SEGMENTS.num_segments, dtype=torch.float64)
    rows = torch.tensor(rows)
    return Attribution(values, values + 100, values, values, 0.1 * values, torch.arange(SEGMENTS.num_segments) % 3 > 0, rows, 0.5 * rows.double())


def by_rollout(values: torch.Tensor) -> list[list]:
    return [part.tolist() for part in values.split(SEGMENTS.sequence_offsets.diff().tolist())]


@pytest.mark.parametrize("kind", KINDS)
@given(st.integers(0, 2**31))
def test_answers_values_rows_and_reliability_stay(kind, seed):
    before = attribution()
    found = control(kind, before, SEGMENTS, torch.Generator().manual_seed(seed))
    for name in ("phi", "score", "changed"):
        assert torch.equal(getattr(found, name)[~ORDINARY], getattr(before, name)[~ORDINARY])
    for name in ("iota", "values", "previous", "rows", "reliability"):
        assert torch.equal(getattr(found, name), getattr(before, name))
    again = control(kind, before, SEGMENTS, torch.Generator().manual_seed(seed))
    assert torch.equal(found.phi, again.phi), "of the seed alone"


@given(st.integers(0, 2**31))
def test_shuffled_permutes_inside_each_rollout_and_keeps_its_segments_together(seed):
    before = attribution()
    found = control("shuffled", before, SEGMENTS, torch.Generator().manual_seed(seed))
    assert [sorted(x) for x in by_rollout(found.phi)] == by_rollout(before.phi)
    torch.testing.assert_close(found.score, 0.1 * found.phi)
    assert torch.equal(found.changed, found.phi % 3 > 0)


def test_shuffled_gives_every_order():
    orders = {tuple(by_rollout(control("shuffled", attribution(), SEGMENTS, torch.Generator().manual_seed(s)).phi)[0][:3]) for s in range(60)}
    assert len(orders) == 6


def test_position_is_the_mean_of_the_place():
    found = control("position", attribution((True, True, True, True, True, False)), SEGMENTS, torch.Generator())
    phi = by_rollout(attribution().phi)
    # first place: rollouts 0, 1, 2, 4 (of 3 the only segment is the answer, 5 was not looked at)
    assert by_rollout(found.phi)[0][0] == pytest.approx((phi[0][0] + phi[1][0] + phi[2][0] + phi[4][0]) / 4) == by_rollout(found.phi)[4][0]
    assert by_rollout(found.phi)[0][2] == pytest.approx((phi[0][2] + phi[2][2]) / 2)


def test_random_draws_from_what_was_looked_at():
    rows = (True, False, True, True, False, True)
    found = control("random", attribution(rows), SEGMENTS, torch.Generator().manual_seed(3))
    pool = attribution().phi[torch.tensor(rows)[SEGMENTS.segment_sequence_ids()] & ORDINARY]
    assert torch.isin(found.phi[ORDINARY], pool).all() and found.phi[ORDINARY].unique().numel() > 3
    nothing = attribution((False,) * 6)
    assert torch.equal(control("random", nothing, SEGMENTS, torch.Generator()).phi, nothing.phi)
