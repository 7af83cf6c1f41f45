"""The entropy controller and where its bonus goes."""

from __future__ import annotations

import math

import pytest
import torch
from ragged import segments_of

from acpo.attribution import Attribution, Attributor, binary_entropy, entropy_evidence, leave_one_out
from acpo.config import EntropyConfig, StagesConfig
from acpo.entropy import FIRST_BATCHES, EntropyController, covariant_tokens
from acpo.stages import Stages


def fed(config: EntropyConfig, entropies, progress=0.0, stage=1) -> EntropyController:
    controller = EntropyController(config)
    for value in entropies:
        controller.update(value, progress, stage)
    return controller


def test_start_is_measured_on_the_first_batches():
    controller = fed(EntropyConfig(), [1.0, 2.0, 3.0, 50.0])
    assert controller.first == pytest.approx(2.0) and FIRST_BATCHES == 3
    assert controller.target(0.0, 1) == pytest.approx(1.6) and controller.target(1.0, 1) == pytest.approx(0.6)
    assert controller.target(0.5, 1) == pytest.approx(1.1) and controller.target(2.0, 1) == controller.target(1.0, 1)
    assert controller.target(0.5, 2) == pytest.approx(0.55), "half of it in stage 2"


def test_running_mean():
    controller = fed(EntropyConfig(), [1.0, 2.0, 0.0])
    assert controller.running == pytest.approx(0.9 * (0.9 * 1.0 + 0.1 * 2.0))


def test_one_step_of_the_weight_by_hand():
    controller = fed(EntropyConfig(weight=1e-3, rate=0.05), [1.0] * 3)
    # H = 1, target 0.8: the error is -1/4
    assert controller.weight == pytest.approx(1e-3 * math.exp(0.05 * -0.25))


def test_weight_rises_where_entropy_is_short_and_falls_where_it_is_not():
    start = [1.0] * 3
    low, high = fed(EntropyConfig(), [*start, *[0.05] * 60]), fed(EntropyConfig(), [*start, *[3.0] * 60])
    assert low.weight > 1e-3 > high.weight
    limits = EntropyConfig(min_weight=9e-4, max_weight=1.1e-3)
    assert fed(limits, [*start, *[0.01] * 200]).weight == 1.1e-3
    assert fed(limits, [*start, *[9.0] * 200]).weight == 9e-4


def test_dead_band_holds_still():
    config = EntropyConfig(start=1.0, dead_band=0.05)
    assert fed(config, [1.0] * 3 + [0.97] * 30).weight == config.weight
    assert fed(config, [1.0] * 3 + [0.90] * 30).weight > config.weight


def test_controllers():
    collapse = [1.0] * 3 + [0.01] * 30
    assert fed(EntropyConfig(controller="constant"), collapse).weight == 1e-3
    assert fed(EntropyConfig(controller="none"), collapse).weight == 0.0
    assert fed(EntropyConfig(), [0.0] * 10).weight == 1e-3, "without any entropy at the start there is no target to steer to"


def test_a_batch_that_is_not_finite_is_passed_over():
    one, other = fed(EntropyConfig(), [1.0, 0.5, 0.7, 0.2]), fed(EntropyConfig(), [1.0, math.nan, 0.5, math.inf, 0.7, 0.2])
    assert one.state() == other.state()


def test_state_round_trip():
    one = fed(EntropyConfig(), [1.0, 0.5, 0.2, 0.1])
    other = EntropyController(EntropyConfig())
    other.load(one.state())
    for controller in (one, other):
        controller.update(0.3, 0.4, 2)
    assert one.state() == other.state()


# --- where the bonus goes -----------------------------------------------------------------------------------------------------------

SEGMENTS = segments_of(((2, 3, 1), (1, 4), (2, 2)), (True, True, False))
ANSWER = torch.tensor([False] * 5 + [True] + [False] + [True] * 4 + [False] * 4)


def attribution_of(previous, reliability: float, rows=(True, True, True)) -> Attribution:
    previous = torch.tensor(previous, dtype=torch.float64)
    rows = torch.tensor(rows)
    return Attribution(previous, previous, previous, previous, previous, previous > -1, rows, reliability * rows.double())


def test_plain_bonus_is_even_and_not_on_the_answer():
    weights = EntropyController(EntropyConfig(weight=2e-3)).token_weights(SEGMENTS, None)
    assert weights.dtype == torch.float32
    assert (weights[ANSWER] == 0).all() and weights[~ANSWER].unique().numel() == 1
    assert weights.mean().item() == pytest.approx(2e-3)


def test_bonus_goes_where_the_outcome_is_open():
    controller = EntropyController(EntropyConfig(weight=1e-3))
    found = attribution_of([0.5, 0.9, 0.9, 0.1, 0.5, 0.2, 0.3], 1.0, (True, True, False))
    weights = controller.token_weights(SEGMENTS, found)
    h = lambda p: -(p * math.log(p) + (1 - p) * math.log(1 - p)) / math.log(2)  # noqa: E731
    gate = torch.tensor([1.0, h(0.9), 0.0, h(0.1), 0.0, 1.0, 1.0], dtype=torch.float64)[SEGMENTS.segment_ids()]
    torch.testing.assert_close(weights, (1e-3 * gate / gate.mean()).float())
    half = controller.token_weights(SEGMENTS, attribution_of([0.5, 0.9, 0.9, 0.1, 0.5, 0.2, 0.3], 0.5, (True, True, False)))
    mixed = torch.where(gate > 0, 0.5 + 0.5 * gate, 0.0)  # the third rollout was not looked at: there the bonus is plain
    torch.testing.assert_close(half, (1e-3 * mixed / mixed.mean()).float())


def test_without_reliability_the_gate_is_the_plain_bonus_bitwise():
    controller = EntropyController(EntropyConfig())
    plain = controller.token_weights(SEGMENTS, None)
    assert torch.equal(controller.token_weights(SEGMENTS, attribution_of([0.1] * 7, 0.0)), plain)
    ungated = EntropyController(EntropyConfig(gated=False))
    assert torch.equal(ungated.token_weights(SEGMENTS, attribution_of([0.1] * 7, 1.0)), plain)


def test_no_bonus_is_none_and_nothing_but_answers_is_zero():
    assert EntropyController(EntropyConfig(controller="none")).token_weights(SEGMENTS, None) is None
    answers = segments_of(((2,), (3,)), (True, True))
    assert EntropyController(EntropyConfig()).token_weights(answers, None).tolist() == [0.0] * 5


def test_binary_entropy():
    p = torch.tensor([0.0, 0.5, 1.0, 0.25], dtype=torch.float64)
    wanted = [0.0, math.log(2), 0.0, -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))]
    assert binary_entropy(p).tolist() == pytest.approx(wanted, abs=1e-15)


# --- Skywork's step controller, KL-Cov, the entropy source --------------------------------------------------------------------------


def test_the_step_controller_by_hand():
    controller = EntropyController(EntropyConfig(controller="step", start=0.5, end=0.5))
    assert controller.weight == 0.0
    weights = []
    for entropy in (1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0):
        controller.update(entropy, 0.0, 1)
        weights.append(round(controller.weight, 6))
    # H_0 = 1, target 0.5; the running mean 0.9^n passes below it at the seventh batch of 0
    assert weights == [0.0] * 10 + [1e-4, 2e-4]
    assert controller.below and controller.token_weights(SEGMENTS, None) is not None
    for _ in range(100):
        controller.update(0.0, 0.0, 1)
    assert controller.weight == pytest.approx(5e-3), "and no further"
    controller.update(100.0, 0.0, 1)
    assert controller.token_weights(SEGMENTS, None) is None, "no bonus above the target"


def test_covariance_comes_on_when_the_bonus_has_done_what_it_can():
    config = EntropyConfig(weight=1e-2, max_weight=1e-2)
    controller = fed(config, [1.0] * 3)
    on = []
    for _ in range(60):
        controller.update(0.0, 0.0, 1)
        on.append(controller.covariance)
    low = next(i for i in range(100) if 0.9 ** (i + 1) < 0.4)  # H below half of 0.8 H_0
    assert on.index(True) == low + 19 and controller.weight == 1e-2
    controller.update(50.0, 0.0, 1)
    assert controller.covariance, "for good"
    never = fed(EntropyConfig(weight=1e-2, max_weight=1e-2, covariance="never"), [1.0] * 3 + [0.0] * 60)
    assert not never.covariance and EntropyController(EntropyConfig(covariance="always")).covariance


def test_covariant_tokens_by_hand():
    advantages, logp = torch.tensor([1.0, 1.0, -1.0, -1.0, 0.0]), torch.tensor([-0.1, -3.0, -0.1, -3.0, -1.0])
    assert covariant_tokens(advantages, logp, 0.4).tolist() == [True, False, False, True, False]
    assert covariant_tokens(advantages, logp, 1e-9).sum() == 1 and len(covariant_tokens(advantages[:0], logp[:0], 0.5)) == 0


def test_the_entropy_source_has_the_sign_of_the_outcome_and_no_values():
    segments = segments_of(((1, 1, 1), (1, 1, 1), (2, 2), (1,)), (True, True, False, True))
    entropy = torch.tensor([2.0, 0.1, 0.0, 0.3, 1.0, 0.0, 3.0, 1.0, 0.5, 0.5, 0.2])
    outcome = torch.tensor([1.0, 0.0, 0.0, 0.0])
    rows = torch.ones(4, dtype=torch.bool)
    found = Attributor()(entropy_evidence(entropy, outcome, 4, segments, rows), outcome, leave_one_out(outcome, 4), segments, 4)
    assert (found.reliability == 1).all() and not found.iota.any()
    assert found.phi[0] > found.phi[1], "the right rollout: more credit where it was open"
    assert found.phi[3] > found.phi[4] and found.phi[6] < 0, "a wrong one: more blame where it was open"
    mean = entropy.double().mean()
    bound = torch.minimum(entropy[:2].double() / mean, binary_entropy(torch.tensor(0.125, dtype=torch.float64)) / math.log(2))
    assert (found.phi[0] - found.phi[1]).item() == pytest.approx((bound[0] - bound[1]).item())


def test_tokens_of_a_tool_take_no_bonus_and_count_in_no_mean():
    segments = segments_of(((2, 2),))
    mask = torch.tensor([True, False, True, True])
    controller = EntropyController(EntropyConfig(weight=2e-3))
    weights = controller.token_weights(segments, None, mask)
    torch.testing.assert_close(weights, torch.tensor([2e-3, 0.0, 2e-3, 2e-3]))
    assert torch.equal(controller.token_weights(segments, None, torch.ones(4, dtype=torch.bool)), controller.token_weights(segments, None))
    rows = torch.ones(2, dtype=torch.bool)
    outcome = torch.tensor([1.0, 0.0])
    entropy = torch.tensor([1.0, 50.0, 0.5, 0.5, 0.3])
    found = entropy_evidence(entropy, outcome, 2, segments_of(((2, 2), (1,))), rows, torch.tensor([True, False, True, True, True]))
    without = entropy_evidence(entropy[[0, 2, 3, 4]], outcome, 2, segments_of(((1, 2), (1,))), rows)
    torch.testing.assert_close(found.evidence, without.evidence)


# --- the temperature of stage 1 -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("success", "entropy", "heat"),
    [
        (0.0, 0.05, 0.0), (0.25, 0.05, 0.0), (0.3, 0.05, 0.5), (0.35, 0.05, 1.0), (1.0, 0.0, 1.0),
        (0.9, 0.15, 1.0), (0.9, 0.225, 0.5), (0.9, 0.3, 0.0), (0.9, 2.0, 0.0), (0.3, 0.225, 0.25),
    ],
)  # fmt: skip
def test_heat_where_success_can_afford_it_and_the_policy_has_closed_up(success, entropy, heat):
    assert heated(success, entropy) == pytest.approx(1.0 + 0.3 * heat)


def heated(success: float | None, entropy: float, batches: int = 1, stage: int = 1, **settings) -> float:
    stages = Stages(StagesConfig(**settings), 10, stage=stage, success=success)
    return EntropyController(EntropyConfig(), running=entropy, batches=batches).exploration(1.3, stages)


def test_no_heat_outside_of_the_first_of_two_stages_nor_before_anything_is_known():
    assert heated(0.9, 0.05) == 1.3
    assert heated(0.9, 0.05, stage=2) == heated(0.9, 0.05, two=False) == heated(None, 0.05) == heated(0.9, 0.0, batches=0) == 1.0
