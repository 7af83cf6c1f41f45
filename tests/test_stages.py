"""The two stages: the switch happens once, for a reason that is told."""

from __future__ import annotations

import json

import pytest

from acpo.config import StagesConfig
from acpo.stages import Stages


def run(stages: Stages, successes, start: int = 1) -> list[int]:
    return [step for step, value in enumerate(successes, start) if stages.update(step, value)]


def test_switches_once_at_the_share_of_the_budget():
    stages = Stages(StagesConfig(switch_share=0.6), 10)
    assert run(stages, [0.0] * 10) == [6]
    assert stages.stage == 2 and stages.switched_at == 6 and stages.reason == "60% of the steps are done"


def test_switches_when_success_is_high_and_flat():
    stages = Stages(StagesConfig(switch_success=0.6, switch_slope=0.01, switch_window=5), 1000)
    assert run(stages, [0.7] * 20) == [6], "a window of five gains needs six values"
    assert stages.reason.startswith("success 0.70 >= 0.6 and its gain 0.000 over 5 steps")


def test_high_but_rising_or_flat_but_low_waits():
    rising = Stages(StagesConfig(switch_success=0.1, switch_window=5), 1000)
    assert run(rising, [0.02 * i for i in range(40)]) == []
    low = Stages(StagesConfig(switch_success=0.6, switch_window=5), 1000)
    assert run(low, [0.5] * 100) == [] and low.stage == 1


def test_success_is_a_running_mean():
    stages = Stages(StagesConfig(), 1000)
    run(stages, [1.0, 0.0, 1.0])
    assert stages.success == pytest.approx(0.9 * 0.9 + 0.1) and stages.history == pytest.approx([1.0, 0.9, 0.91])
    run(stages, [0.5] * 100, 4)
    assert len(stages.history) == 51


def test_one_stage_stays_one():
    stages = Stages(StagesConfig(two=False, switch_window=2), 10)
    assert run(stages, [1.0] * 10) == [] and stages.stage == 1


def test_a_share_of_one_switches_behind_the_last_step_and_zero_behind_the_first():
    assert run(Stages(StagesConfig(switch_share=1.0), 10), [0.0] * 10) == [10]
    assert run(Stages(StagesConfig(switch_share=0.0), 10), [0.0] * 10) == [1]


@pytest.mark.parametrize("broken_off", [1, 5, 6, 7])
def test_state_round_trip(broken_off):
    successes = [0.1 * i for i in range(10)]
    whole = Stages(StagesConfig(), 10)
    switches = run(whole, successes)
    first, second = Stages(StagesConfig(), 10), Stages(StagesConfig(), 10)
    before = run(first, successes[:broken_off])
    second.load(json.loads(json.dumps(first.state())))
    assert before + run(second, successes[broken_off:], broken_off + 1) == switches == [6]
    assert second.state() == whole.state()
