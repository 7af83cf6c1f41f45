"""The head learns what states tell, says nothing before it has learned, and continues from a checkpoint bit for bit."""

from __future__ import annotations

import pytest
import torch
from loop import rolled_out, steps, trainer_of
from ragged import segments_of

from acpo import state
from acpo.head import Head, boundary_rows


@pytest.fixture(autouse=True)
def one_thread(deterministic):
    torch.set_num_threads(1)


def batch(seed: int, count: int = 256, width: int = 6):
    """A product of two coordinates decides: no linear reader finds it."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(count, width, generator=generator)
    outcome = torch.bernoulli(torch.sigmoid(6 * torch.sign(hidden[:, 0] * hidden[:, 1])), generator=generator)
    return hidden, torch.zeros(count), torch.rand(count, generator=generator), outcome


def test_learns_what_is_not_linear_and_starts_from_nothing():
    head = Head(6, seed=3)
    hidden, base, place, outcome = batch(0)
    assert head.evidence(head.features(hidden, base, place)).abs().max() == 0
    for i in range(12):
        hidden, base, place, outcome = batch(i)
        head.learn(head.features(hidden, base, place), outcome)
    hidden, base, place, outcome = batch(99)
    evidence = head.evidence(head.features(hidden, base, place))
    assert ((evidence > 0) == (outcome > 0)).float().mean() > 0.85


def test_leaves_the_generator_and_the_states_alone():
    before = torch.get_rng_state()
    head = Head(6, seed=3)
    hidden, base, place, outcome = batch(0)
    hidden.requires_grad_()
    head.learn(head.features(hidden, base, place), outcome)
    assert torch.equal(before, torch.get_rng_state()) and hidden.grad is None


@pytest.mark.parametrize("batches", [0, 1, 10])
def test_state_round_trip(batches):
    one, other = Head(6, seed=3), Head(6, seed=4)
    for i in range(batches):
        hidden, base, place, outcome = batch(i)
        one.learn(one.features(hidden, base, place), outcome)
    other.load({k: v.clone() for k, v in one.tensors().items()})
    hidden, base, place, outcome = batch(50)
    for head in (one, other):
        head.learn(head.features(hidden, base, place), outcome)
    assert one.tensors().keys() == other.tensors().keys()
    assert all(torch.equal(v, other.tensors()[k]) for k, v in one.tensors().items())


def test_boundary_rows_have_read_their_segment():
    segments = segments_of(((2, 3, 1), (4,), (1, 1)))
    assert boundary_rows(segments).tolist() == [2, 5, 5, 9, 11, 11]


def test_the_head_in_the_loop_costs_no_forward_and_resumes(tmp_path, warmed):
    settings = "attribution.source=head", "credit.scope=all", "credit.mask=none", "trainer.checkpoint_every=1", "trainer.steps=4"
    trainer = trainer_of(tmp_path, *settings, "loss.kl_weight=0", weights=warmed)
    batch, *_ = rolled_out(trainer)
    assert trainer.counters["tokens/forward_extra"] == 0 and "hidden" not in batch.token and len(trainer.attributors.head.batches) == 1
    whole = trainer_of(tmp_path / "whole", *settings, weights=warmed)
    steps(whole, 2)
    state.save(whole, "step-2")
    again = trainer_of(tmp_path / "whole", *settings)
    state.resume(again)
    one, other = steps(whole, 1)[0], steps(again, 1)[0]
    assert one["loss"] == other["loss"]
    mine, theirs = whole.attributors.head.tensors(), again.attributors.head.tensors()
    assert all(torch.equal(v, theirs[k]) for k, v in mine.items())
