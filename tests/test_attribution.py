"""Attribution: each source against a count by hand, telescoping for any values, calibration, and a reliability that is earned."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ragged import hierarchies, segments_of

from acpo.attribution import (
    MIN_BOUNDARIES,
    Attributor,
    Calibrator,
    Evidence,
    Reliability,
    answer_copies,
    hindsight_evidence,
    host,
    leave_one_out,
    logistic_fit,
    one_of_each,
    pick,
    previous_in_sequence,
    running_sum,
    zero_variance,
)
from acpo.config import AttributionConfig, CreditConfig
from acpo.panel import Panel


@pytest.fixture(autouse=True)
def one_thread(deterministic):
    torch.set_num_threads(1)


def everywhere(count: int) -> torch.Tensor:
    return torch.ones(count, dtype=torch.bool)


# --- groups -------------------------------------------------------------------------------------------------------------------------


def test_groups():
    rewards = torch.tensor([1.0, 0, 0, 1, 1, 1, 0, 0, 0])
    torch.testing.assert_close(leave_one_out(rewards, 3), torch.tensor([0, 0.5, 0.5, 1, 1, 1, 0, 0, 0]))
    assert zero_variance(rewards, 3).tolist() == [False] * 3 + [True] * 6
    assert one_of_each(rewards, 3).tolist() == [True, True, False] + [False] * 6


@given(st.integers(1, 5), st.integers(2, 8), st.integers(0, 2**31))
def test_one_of_each_is_one_right_and_one_wrong_of_every_mixed_group(groups, size, seed):
    outcome = torch.bernoulli(torch.full((groups * size,), 0.4), generator=torch.Generator().manual_seed(seed))
    chosen = one_of_each(outcome, size).view(groups, size)
    for own, rewards in zip(chosen, outcome.view(groups, size), strict=True):
        mixed = rewards.min() != rewards.max()
        assert sorted(rewards[own].tolist()) == ([0.0, 1.0] if mixed else [])


# --- running sums -------------------------------------------------------------------------------------------------------------------


@given(hierarchies())
def test_running_sum_and_previous(hierarchy):
    segments, _ = hierarchy
    values = torch.randint(-9, 9, (segments.num_segments,)).double()
    first = torch.randint(-9, 9, (segments.num_sequences,)).double()
    offsets = segments.sequence_offsets.tolist()
    summed, before = [], []
    for b, (begin, end) in enumerate(itertools.pairwise(offsets)):
        own = values[begin:end].tolist()
        summed += itertools.accumulate(own)
        before += [first[b].item(), *own][: len(own)]
    assert running_sum(values, segments).tolist() == summed
    assert previous_in_sequence(values.numpy(), first.numpy(), segments.sequence_offsets.numpy()).tolist() == before


# --- hindsight ----------------------------------------------------------------------------------------------------------------------


def test_hindsight_evidence_by_hand():
    segments = segments_of(((2, 1), (3,)))
    log_ratio = torch.tensor([1.0, -2.0, 0.5, math.inf, math.nan, 4.0])
    kl = torch.tensor([0.25, 0.25, 0.25, 0.25, 0.25, 8.0])
    mask = torch.tensor([True, True, True, True, True, True])
    found = hindsight_evidence(log_ratio, kl, segments, mask, everywhere(2), clamp=5.0)
    assert found.evidence.tolist() == [-1.0, -0.5, 4.0], "raw sums, running, not finite counts as 0"
    assert found.shaping.tolist() == [-0.5, 0.75, 5.0], "centred by the divergence, clamped"
    mask[5] = False
    found = hindsight_evidence(log_ratio, kl, segments, mask, everywhere(2), clamp=5.0)
    assert found.evidence.tolist() == [-1.0, -0.5, 0.0] and found.shaping.tolist() == [-0.5, 0.75, 0.5]


@given(hierarchies())
def test_hindsight_evidence_telescopes(hierarchy):
    """The last boundary of a rollout holds the sum over all its tokens, however it is cut."""
    segments, mask = hierarchy
    log_ratio = torch.randint(-8, 8, (segments.num_tokens,)).float() / 4
    found = hindsight_evidence(log_ratio, torch.zeros_like(log_ratio), segments, mask, everywhere(segments.num_sequences), clamp=5.0)
    ends = segments.cu_seqlens.tolist()
    for b, (begin, end) in enumerate(itertools.pairwise(segments.sequence_offsets.tolist())):
        if end > begin:
            assert found.evidence[end - 1].item() == log_ratio[ends[b] : ends[b + 1]][mask[ends[b] : ends[b + 1]]].sum().item()


def test_answer_copies():
    responses = [torch.tensor([7, 4, 2, 9, 4, 2]), torch.tensor([4]), torch.tensor([5, 5, 5])]
    mask = answer_copies(responses, [[[4, 2], [9]], [[4, 2]], [[5, 5], []]])
    assert mask.tolist() == [True, False, False, False, False, False, True, False, False, False]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_answer_copies_against_every_place(dtype):
    """Ids whose bytes look like others' where tokens are not told apart: 256 0 holds the bytes of 1."""
    generator = torch.Generator().manual_seed(0)
    forms = [[1], [0, 1], [256, 0], [65536]]
    for _ in range(50):
        ids = torch.tensor([0, 1, 256, 65536])[torch.randint(4, (12,), generator=generator)].tolist()
        expected = [not any(form == ids[a : a + len(form)] for form in forms for a in range(t - len(form) + 1, t + 1) if a >= 0) for t in range(12)]
        assert answer_copies([torch.tensor(ids, dtype=dtype)], [forms]).tolist() == expected
    assert not all(expected)


# --- phi and iota -------------------------------------------------------------------------------------------------------------------


def noisy_batch(signal: float, groups: int = 16, size: int = 4, seed: int = 0, noise: float = 1.0):
    """Rollouts of three steps and an answer; the evidence of each boundary points at the outcome with strength `signal`."""
    generator = torch.Generator().manual_seed(seed)
    count = groups * size
    outcome = (torch.rand(count, generator=generator) < 0.5).float()
    segments = segments_of(((2, 2, 2, 1),) * count, (True,) * count)
    sequence = segments.segment_sequence_ids()
    evidence = signal * (2 * outcome[sequence] - 1) + noise * torch.randn(segments.num_segments, generator=generator)
    return outcome, Evidence(evidence, None, everywhere(count)), segments


@pytest.mark.parametrize("terminal", [True, False])
def test_phi_and_iota_telescope_for_any_values(terminal):
    torch.manual_seed(1)
    size = 4
    lengths = tuple((1,) * n for n in (3, 1, 4, 2, 1, 5, 2, 2))
    segments = segments_of(lengths, (terminal,) * 8)
    attributor = Attributor()
    attributor.calibrator.with_evidence, attributor.calibrator.before = [0.3, 0.7, 1.4], [-0.2, 0.5]
    outcome = torch.tensor([1.0, 0, 1, 0, 1, 1, 1, 1])
    base = torch.rand(8)
    evidence = Evidence(4 * torch.randn(segments.num_segments), None, torch.tensor([True, True, False, True, True, True, True, False]))
    found = attributor(evidence, outcome, base, segments, size)
    first = found.previous[segments.sequence_offsets[:-1]]
    low = 0.5 / size
    assert ((found.values >= low) & (found.values <= 1 - low)).all()
    for b, (begin, end) in enumerate(itertools.pairwise(segments.sequence_offsets.tolist())):
        last, r = found.values[end - 1].item(), outcome[b].item()
        assert found.phi[begin:end].sum().item() == pytest.approx(last - first[b].item(), abs=1e-12)
        surprise = math.log(last / first[b]) if r else math.log((1 - last) / (1 - first[b]))
        assert found.iota[begin:end].sum().item() == pytest.approx(surprise, abs=1e-6)
        if not evidence.rows[b]:
            assert not found.phi[begin:end].any(), "a rollout that nobody looked at says nothing"
        elif terminal:
            assert last == pytest.approx(min(max(r, low), 1 - low)), "behind the answer the outcome is known"
    wanted = torch.sigmoid(-0.2 + 0.5 * torch.logit(base.double(), low)).clamp(low, 1 - low)
    torch.testing.assert_close(first, wanted)


# --- calibration --------------------------------------------------------------------------------------------------------------------


def test_calibrator_recovers_known_coefficients():
    generator = torch.Generator().manual_seed(3)
    calibrator = Calibrator()
    a, b, c, n = 0.4, 0.6, 1.7, 4000
    for _ in range(8):
        base = torch.rand(n, generator=generator, dtype=torch.float64) * 0.8 + 0.1
        evidence = torch.randn(n, generator=generator, dtype=torch.float64)
        p = torch.sigmoid(a + b * torch.logit(base) + c * evidence)
        outcome = (torch.rand(n, generator=generator, dtype=torch.float64) < p).double()
        calibrator.fit(base.numpy(), evidence.numpy(), outcome.numpy(), np.ones(n), low=1 / 16)
    # 32,000 outcomes: the coefficients' standard errors are about 0.02
    assert calibrator.with_evidence == pytest.approx([a, b, c], abs=0.08)
    predicted = calibrator.predict(np.array([0.5]), np.array([0.3]), 1 / 16)
    assert predicted.item() == pytest.approx(1 / (1 + math.exp(-(a + c * 0.3))), abs=0.02)


def test_calibrator_without_data_trusts_its_inputs():
    calibrator = Calibrator()
    base, low = np.array([0.3]), 1 / 16
    assert calibrator.predict_before(base, low).item() == pytest.approx(0.3, abs=1e-6)
    assert calibrator.predict(base, np.array([1.0]), low).item() == pytest.approx(1 / (1 + math.exp(-(math.log(3 / 7) + 1))), abs=1e-6)
    nothing = np.zeros(0)
    calibrator.fit(nothing, nothing, nothing, nothing, low)
    assert calibrator.with_evidence == [0.0, 1.0, 1.0]


def test_calibrator_clips_to_chance():
    calibrator = Calibrator()
    assert calibrator.predict(np.array([0.0, 1.0]), np.array([-50.0, 50.0]), 0.0625).tolist() == [0.0625, 0.9375]


def test_evidence_that_points_the_wrong_way_is_not_turned_round():
    outcome, evidence, segments = noisy_batch(-2.0, groups=64)
    calibrator = Calibrator()
    r = host(outcome[segments.segment_sequence_ids()])
    calibrator.fit(np.full_like(r, 0.5), host(evidence.evidence), r, np.ones_like(r), 0.125)
    assert calibrator.with_evidence[2] == 0.0


def test_without_evidence_to_go_by_the_value_is_that_of_before():
    """Evidence that drifts far down and points the wrong way a little: its coefficient is cut, and the intercept that was fitted beside it goes."""
    torch.manual_seed(0)
    outcome = (torch.rand(400) < 0.5).double()
    evidence, base = host(-4.0 - 0.3 * outcome + 0.5 * torch.randn(400)), np.full(400, 0.5)
    calibrator = Calibrator()
    calibrator.fit(base, evidence, outcome.numpy(), np.ones(400), 0.0625)
    assert calibrator.with_evidence == [*calibrator.before, 0.0]
    assert np.array_equal(calibrator.predict(base, evidence, 0.0625), calibrator.predict_before(base, 0.0625))


def test_logistic_fit_is_the_penalised_optimum():
    torch.manual_seed(0)
    features = torch.randn(50, 3, dtype=torch.float64)
    y, weight = (torch.rand(50) < 0.4).double(), torch.rand(50, dtype=torch.float64)
    prior = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    fitted = logistic_fit(features.T.numpy(), y.numpy(), weight.numpy(), prior.numpy(), [0.5, -1.0, 2.0])
    w = torch.tensor(fitted, dtype=torch.float64, requires_grad=True)
    loss = torch.nn.functional.binary_cross_entropy_with_logits(features @ w, y, weight, reduction="sum") + (w - prior).square().sum() / 2
    (gradient,) = torch.autograd.grad(loss, w)
    assert gradient.abs().max() < 1e-8
    assert logistic_fit(features.T.numpy(), y.numpy(), np.zeros(50), prior.numpy(), prior.tolist()) == prior.tolist()
    elsewhere = logistic_fit(features.T.numpy(), y.numpy(), weight.numpy(), prior.numpy(), [-3.0, 4.0, 0.0])
    assert elsewhere == pytest.approx(fitted, abs=1e-9), "one optimum, wherever it starts"


# --- reliability --------------------------------------------------------------------------------------------------------------------


def learn(attributor: Attributor, signal: float, batches: int, seed: int = 0, noise: float = 1.0, size: int = 4) -> list[float]:
    out = []
    for i in range(batches):
        outcome, evidence, segments = noisy_batch(signal, size=size, seed=1000 * seed + i, noise=noise)
        found = attributor(evidence, outcome, leave_one_out(outcome, size), segments, size).reliability
        assert (found == found[0]).all()
        out.append(found[0].item())
    return out


@pytest.mark.parametrize("seed", range(4))
def test_pure_noise_earns_no_reliability(seed):
    found = learn(Attributor(), 0.0, 30, seed)
    assert found[0] == 0.0
    assert sum(found) / len(found) < 0.02 and found[-1] == 0.0


@pytest.mark.parametrize("seed", range(2))
def test_perfect_evidence_earns_full_reliability(seed):
    found = learn(Attributor(), 6.0, 30, seed, noise=0.0)
    assert found[0] == 0.0, "nothing is trusted before it was measured"
    assert found[-1] > 0.95


def test_reliability_grows_with_the_signal():
    ends = [learn(Attributor(), signal, 30)[-1] for signal in (0.0, 0.2, 0.5, 1.0)]
    assert ends[0] == 0.0 and ends == sorted(ends) and ends[1] < ends[3]


def test_a_batch_does_not_choose_its_own_reliability_or_values():
    """Prequential: with the outcomes of the newest batch turned round, its own reliability and calibrated values are the same, and only
    what comes after differs."""
    one, other = Attributor(), Attributor()
    learn(one, 1.0, 6), learn(other, 1.0, 6)
    outcome, evidence, segments = noisy_batch(1.0, seed=77)
    base = torch.full_like(outcome, 0.5)
    a, b = one(evidence, outcome, base, segments, 4), other(evidence, 1 - outcome, base, segments, 4)
    assert torch.equal(a.reliability, b.reliability) and (a.reliability > 0).all()
    ordinary = ~segments.is_terminal()
    assert torch.equal(a.values[ordinary], b.values[ordinary]) and torch.equal(a.phi[ordinary], b.phi[ordinary])
    assert not torch.equal(a.values[~ordinary], b.values[~ordinary])
    outcome, evidence, segments = noisy_batch(1.0, seed=78)
    c, d = one(evidence, outcome, base, segments, 4), other(evidence, outcome, base, segments, 4)
    assert (c.reliability != d.reliability).all() and not torch.equal(c.values[ordinary], d.values[ordinary])


def test_a_batch_that_was_not_looked_at_says_nothing_and_teaches_nothing():
    attributor = Attributor()
    learn(attributor, 1.0, 12)
    before = attributor.state()
    outcome, evidence, segments = noisy_batch(1.0, seed=79)
    base = torch.linspace(0.1, 0.9, len(outcome))
    found = attributor(replace(evidence, rows=torch.zeros_like(outcome, dtype=torch.bool)), outcome, base, segments, 4)
    assert attributor.state() == {**before, "batches": before["batches"] + 1} and attributor.reliability.value > 0
    first = torch.from_numpy(attributor.calibrator.predict_before(host(base), 0.125))[segments.segment_sequence_ids()]
    assert torch.equal(found.values, first) and torch.equal(found.previous, first) and found.changed.all()
    assert not any(x.any() for x in (found.phi, found.iota, found.score, found.rows, found.reliability))


def test_one_sided_outcomes_measure_nothing():
    attributor = Attributor()
    for i in range(10):
        _, evidence, segments = noisy_batch(3.0, seed=i)
        ones = torch.ones(segments.num_sequences)
        assert attributor(evidence, ones, torch.full_like(ones, 0.5), segments, 4).reliability.max() == 0.0
    assert attributor.reliability.boundaries == 0


def test_reliability_by_hand():
    measured = Reliability()
    outcome = torch.tensor([1.0, 0.0]).repeat(100)
    outcome = host(outcome)
    measured.update(np.where(outcome > 0, 0.9, 0.1), np.full(200, 0.5), np.full(200, 0.6), outcome)
    assert measured.boundaries == 200 >= MIN_BOUNDARIES
    assert measured.m1 == pytest.approx(0.1 * 0.01) and measured.m0 == pytest.approx(0.1 * 0.25), "the better of the two baselines"
    assert measured.value == 1.0
    weak = Reliability(m1=0.99, m0=1.0, boundaries=10_000)
    assert weak.value == 0.0, "3 (1 - 0.99) is below the threshold"
    assert Reliability(m1=0.9, m0=1.0, boundaries=10_000).value == pytest.approx(0.3)
    assert Reliability(m1=0.9, m0=1.0, boundaries=MIN_BOUNDARIES - 1).value == 0.0
    assert Reliability(m1=1.2, m0=1.0, boundaries=10_000).value == 0.0
    assert Reliability(fixed=0.7).value == 0.7


def test_a_fixed_reliability_is_not_measured():
    assert learn(Attributor(0.25), 6.0, 5) == [0.25] * 5
    assert learn(Attributor(0.0), 6.0, 30)[-1] == 0.0


@pytest.mark.parametrize("batches", [0, 1, 12])
def test_state_through_json(batches):
    one, other = Attributor(), Attributor()
    learn(one, 0.8, batches)
    other.load(json.loads(json.dumps(one.state())))
    assert other.state() == one.state()
    assert learn(one, 0.8, 6, seed=5) == learn(other, 0.8, 6, seed=5)
    assert one.state() == other.state()


@given(st.integers(0, 2**31))
def test_evidence_of_unseen_rollouts_does_not_matter(seed):
    torch.manual_seed(seed)
    segments = segments_of(((1, 1), (2, 1), (1,), (3, 1)), (True,) * 4)
    outcome, base = torch.tensor([1.0, 0, 0, 1]), torch.rand(4)
    rows = torch.tensor([True, False, True, False])
    evidence = torch.randn(segments.num_segments)
    other = torch.where(rows[segments.segment_sequence_ids()], evidence, torch.randn(segments.num_segments))
    one, two = (Attributor()(Evidence(e, None, rows), outcome, base, segments, 2) for e in (evidence, other))
    assert torch.equal(one.phi, two.phi) and torch.equal(one.values, two.values)


# --- scores and the pick ------------------------------------------------------------------------------------------------------------

GROUPS = torch.tensor([1.0, 0, 0, 1, 1, 1, 1, 1])  # the second group has no variance
STEPS = ((2, 3, 1), (1, 1), (4, 2, 2), (3,), (2, 2, 1), (1, 2, 1), (3, 1), (2, 1, 1))
ANSWERS = (True, True, False, True, True, False, True, True)


def test_scores_of_shaping_by_hand():
    segments, base = segments_of(STEPS, ANSWERS), torch.full((8,), 0.5)
    shaping = torch.randn(segments.num_segments)
    acts = zero_variance(GROUPS, 4)
    found = Attributor(0.8, shaping_gain=0.5)(Evidence(shaping, shaping, everywhere(8), acts=acts), GROUPS, base, segments, 4)
    use = acts[segments.segment_sequence_ids()] & ~segments.is_terminal()
    c = shaping[use].double()
    wanted = torch.zeros(segments.num_segments, dtype=torch.float64)
    wanted[use] = 0.5 * ((c - c.mean()) / ((c - c.mean()).square().mean().sqrt() + 1e-6)).clamp(-3, 3)
    torch.testing.assert_close(found.score, wanted)
    assert found.reliability.tolist() == [0.0] * 4 + [0.8] * 4 and torch.equal(found.rows, acts) and found.changed.all()


def test_scores_of_values_are_measured_in_the_groups_own_spread():
    segments, base = segments_of(STEPS, ANSWERS), torch.full((8,), 0.5)
    found = Attributor(1.0, value_gain=2.0)(Evidence(torch.randn(segments.num_segments), None, everywhere(8)), GROUPS, base, segments, 4)
    spread = torch.tensor([0.5] * 4 + [0.25] * 4, dtype=torch.float64)[segments.segment_sequence_ids()]
    torch.testing.assert_close(found.score, 2.0 * found.phi / spread)
    plain = Attributor(1.0, value_gain=2.0, per_std=False)(
        Evidence(torch.randn(segments.num_segments), None, everywhere(8)), GROUPS, base, segments, 4
    )
    torch.testing.assert_close(plain.score, 2.0 * plain.phi)


@pytest.mark.parametrize(("advantage", "per_std"), [("grpo", True), ("rloo", False), ("centred", False)])
def test_scores_are_in_the_unit_of_the_advantage(advantage, per_std):
    panel = Panel(AttributionConfig(source="tree"), CreditConfig(advantage=advantage), 4)
    assert panel.by_name["tree"].per_std is per_std


def test_pick_takes_the_most_reliable_of_those_that_looked():
    segments, base = segments_of(STEPS, ANSWERS), torch.full((8,), 0.5)

    def source(reliability: float, rows) -> object:
        return Attributor(reliability)(Evidence(torch.randn(segments.num_segments), None, torch.tensor(rows)), GROUPS, base, segments, 4)

    first, second, third = source(0.3, [True] * 6 + [False] * 2), source(0.5, [False] * 4 + [True] * 3 + [False]), source(0.3, [True] * 7 + [False])
    found = pick([first, second, third], segments)
    assert found.rows.tolist() == [True] * 7 + [False]
    assert found.reliability.tolist() == [0.3] * 4 + [0.5] * 3 + [0.0]
    assert found.source[found.rows].tolist() == [0] * 4 + [1] * 3, "who spoke"
    sequence = segments.segment_sequence_ids()
    assert torch.equal(found.phi, torch.where((sequence >= 4) & (sequence < 7), second.phi, first.phi)), "of equals the first"
    assert torch.equal(pick([first], segments).phi, first.phi)
