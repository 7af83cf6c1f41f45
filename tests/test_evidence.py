"""What a comparison says: areas, paired differences, intervals and seconds, by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from acpo import evidence


def test_area_by_hand():
    assert evidence.area([0, 10, 20], [0.0, 1.0, 1.0], 20) == pytest.approx(0.75)
    assert evidence.area([0, 10, 20], [0.0, 1.0, 1.0], 5) == pytest.approx(0.25), "cut between two points"
    assert evidence.area([0, 10], [0.0, 1.0], 20) == pytest.approx(0.75), "the last value holds"
    assert evidence.area([10, 20], [0.5, 1.0], 20) == pytest.approx(0.625), "and the first before it"


@given(st.lists(st.floats(0, 1), min_size=4, max_size=24), st.randoms())
def test_interquartile_mean(values, shuffler):
    cut = len(values) // 4
    wanted = np.mean(sorted(values)[cut : len(values) - cut])
    shuffler.shuffle(values)
    assert evidence.interquartile_mean(np.array(values)) == pytest.approx(wanted)


def test_interval_covers_as_it_says():
    """Over 200 samples of 16 normal differences the interval holds the truth about 95 times in 100 (percentile intervals of 16: a little less)."""
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(200):
        low, high = evidence.interval(rng.normal(0.3, 1.0, 16))
        held += low <= 0.3 <= high
    assert 0.85 <= held / 200 <= 0.99


def record(accuracy: list[float], seconds: float = 1.0, tokens: float = 100.0, **more) -> dict:
    steps = range(0, 10 * len(accuracy), 10)
    points = [{"step": s, "tokens": tokens * i, "seconds": seconds * i, "accuracy": a} for i, (s, a) in enumerate(zip(steps, accuracy, strict=True))]
    return {"points": points, "passes": [{"pass@1": 0.5}], "stage2_from": None, **more}


def test_the_accuracy_at_the_budget_is_what_the_reference_s_tokens_buy():
    """Not the one at an end that comes 300 tokens later."""
    runs = {"grpo": {s: record([0.1, 0.2, 0.3]) for s in range(2)}, "dapo": {s: record([0.1, 0.3, 0.5], tokens=250.0) for s in range(2)}}
    arms = evidence.summarise(runs, "grpo", ["grpo"])["arms"]
    assert (arms["grpo"]["at_budget"], arms["grpo"]["after"]) == (0.3, 0.3)
    assert (arms["dapo"]["at_budget"], arms["dapo"]["after"]) == (pytest.approx(0.1 + 0.2 * 200 / 250), 0.5)


def test_differences_are_paired_and_budgets_are_the_references():
    runs = {
        "grpo": {s: record([0.05 * s, 0.05 * s, 0.05 * s]) for s in range(8)},
        "slow": {s: record([0.05 * s, 0.05 * s + 0.2, 0.05 * s + 0.2], seconds=2.0) for s in range(8)},
        "wordy": {s: record([0.05 * s, 0.05 * s + 0.2, 0.05 * s + 0.2], tokens=200.0) for s in range(8)},
        "none": {},
    }
    out = evidence.summarise(runs, "grpo", ["grpo", "none"])
    assert out["best_baseline"] == "grpo" and set(out["arms"]) == {"grpo", "slow", "wordy"}
    slow, wordy = out["arms"]["slow"], out["arms"]["wordy"]
    assert slow["against_tokens"]["iqm"] == pytest.approx(0.15) == slow["against_tokens"]["low"]  # half of the way up, then all of it
    assert slow["against_seconds"]["iqm"] == pytest.approx(0.1) == wordy["against_tokens"]["iqm"]  # half the budget: on the way up alone
    assert wordy["against_seconds"]["iqm"] == pytest.approx(0.15)
    assert slow["against_tokens"]["wins"] == 8 and slow["against_tokens"]["seeds"] == 8
    alone = evidence.summarise({**runs, "slow": {**runs["slow"], 99: record([0.9, 0.9, 0.9])}}, "grpo", ["grpo"])["arms"]["slow"]
    assert all(alone[name] == slow[name] for name in ("seeds", "area_tokens", "before", "after")), "a seed without its pair is in no figure"
    few = evidence.summarise({arm: dict(list(found.items())[:7]) for arm, found in runs.items()}, "grpo", ["grpo"])["arms"]["slow"]["against_tokens"]
    assert few["iqm"] == pytest.approx(0.15) and few["low"] is None and few["high"] is None and few["seeds"] == 7


def test_the_best_baseline_is_the_better_one_on_the_same_seeds():
    """A baseline that was run on the easy seeds alone does not win by them, and one that was run on few seeds is no candidate."""
    runs = {
        "grpo": {s: record([0.1, 0.1 + 0.05 * s, 0.1 + 0.05 * s]) for s in range(8)},
        "easy": {s: record([0.1, 0.08 + 0.05 * s, 0.08 + 0.05 * s]) for s in range(3, 8)},
        "few": {s: record([0.1, 0.5 + 0.05 * s, 0.5 + 0.05 * s]) for s in range(4)},
        "better": {s: record([0.1, 0.12 + 0.05 * s, 0.12 + 0.05 * s]) for s in range(8)},
    }
    assert evidence.summarise(runs, "grpo", ["grpo", "easy", "few"])["best_baseline"] == "grpo"
    assert evidence.summarise(runs, "grpo", ["grpo", "easy", "few", "better"])["best_baseline"] == "better"
    hard = {**runs, "whole": {s: record([0.1, 0.13 + 0.05 * s - 0.5 * (s < 3), 0.13 + 0.05 * s - 0.5 * (s < 3)]) for s in range(8)}}
    hard["easy"] = {s: record([0.1, 0.11 + 0.05 * s, 0.11 + 0.05 * s]) for s in range(3, 8)}
    assert evidence.summarise(hard, "grpo", ["easy", "whole"])["best_baseline"] == "whole", "better on the seeds that both have"


def test_seconds_are_the_medians_over_seeds():
    """One run that was slowed down by other work changes nothing."""
    runs = {"grpo": {s: record([0.0, 0.5, 1.0]) for s in range(5)}, "other": {s: record([0.0, 0.5, 1.0]) for s in range(5)}}
    runs["other"][3] = record([0.0, 0.5, 1.0], seconds=9.0)
    out = evidence.summarise(runs, "grpo", ["grpo"])
    assert out["arms"]["other"]["against_seconds"]["iqm"] == 0.0 and out["arms"]["other"]["seconds"] == 2.0


@pytest.mark.parametrize("budget", [3.0, 7.5, 12.0, 40.0])
def test_areas_in_seconds_are_those_of_the_curve_by_hand(budget):
    rng = np.random.default_rng(0)
    found = {s: record(rng.random(6).tolist(), seconds=rng.uniform(1, 4)) for s in range(5)}
    clock = evidence.Clock(found, found)
    taken = clock.elapsed()
    assert taken[0, -1] == pytest.approx(5 * np.median([found[s]["points"][1]["seconds"] for s in found]))
    wanted = [evidence.area(taken[0].tolist(), [p["accuracy"] for p in found[s]["points"]], budget) for s in found]
    assert clock.areas(taken, np.array([budget]))[0] == pytest.approx(wanted)


def test_an_interval_in_seconds_holds_the_noise_of_the_clocks():
    """Two arms that learn the same, each run of one of them 1 or 3 seconds a step: by medians one is ahead by chance, and the interval says so."""
    rng = np.random.default_rng(3)
    curve = [0.0, 0.5, 1.0]
    runs = {
        "grpo": {s: record(curve, seconds=2.0) for s in range(16)},
        "other": {s: record(curve, seconds=rng.choice([1.0, 3.0])) for s in range(16)},
    }
    found = evidence.summarise(runs, "grpo", ["grpo"])["arms"]["other"]["against_seconds"]
    assert abs(found["iqm"]) > 0.1 and found["low"] < 0 < found["high"] and found["high"] - found["low"] > 0.2
    steady = {**runs, "other": {s: record(curve, seconds=2.0) for s in range(16)}}
    assert evidence.summarise(steady, "grpo", ["grpo"])["arms"]["other"]["against_seconds"]["high"] == 0.0, "without noise as before"


def test_warm_starts_are_what_another_warm_start_is_told_by():
    """Four of them by turns: differences that hold within each and differ between them say little of a fifth."""
    gain = {0: 0.3, 1: 0.1, 2: -0.1, 3: 0.3}
    base = {s: record([0.2, 0.2, 0.2]) for s in range(16)}
    runs = {"grpo": base, "other": {s: record([0.2 + gain[s % 4]] * 3) for s in range(16)}}
    out = evidence.summarise(runs, "grpo", ["grpo"], [10, 11, 12, 13])["arms"]["other"]
    found = out["against_by_start"]
    assert found["means"] == {10: 0.3, 11: 0.1, 12: -0.1, 13: 0.3} and found["mean"] == pytest.approx(0.15)
    assert found["half_width"] == pytest.approx(3.182 * np.std([0.3, 0.1, -0.1, 0.3], ddof=1) / 2, abs=1e-4)
    assert out["against_tokens"]["low"] > 0 > found["mean"] - found["half_width"], "sure of these four, not of a fifth"
    assert "against_by_start" not in evidence.summarise(runs, "grpo", ["grpo"])["arms"]["other"]


def test_runs_that_all_broke_down_have_the_seconds_of_their_steps():
    def broken(at: int) -> dict:
        steps = [*range(0, at, 5), at, 40]
        return {"points": [{"step": s, "tokens": 10.0 * s, "seconds": float(s), "accuracy": 0.0} for s in steps], "failure": "nan", "passes": []}

    runs = {s: {**broken(at), "stage2_from": None} for s, at in enumerate((4, 14, 34))}
    clock = evidence.Clock(runs, runs)
    assert clock.elapsed()[0] == pytest.approx(clock.steps) and clock.steps[-1] == 40


def test_what_a_run_never_had_is_no_number():
    """A run that broke down before its first evaluation has no reliability: the others' mean is no NaN, and none of theirs is trimmed for it."""
    whole = [{**record([0.1, 0.2, 0.3]), "points": [{**p, "reliability": 0.4} for p in record([0.1, 0.2, 0.3])["points"]]} for _ in range(3)]
    runs = {"grpo": dict(enumerate([*whole, record([0.0, 0.0, 0.0], failure="nan")]))}
    assert evidence.summarise(runs, "grpo", ["grpo"])["arms"]["grpo"]["reliability"] == pytest.approx(0.4)


@pytest.mark.parametrize("broken_at", [5, 35, 85, 95])
def test_a_run_that_broke_down_has_its_seconds_by_its_steps(broken_at):
    """Its points are fewer than those of a whole run, and two of them its own: the table is made all the same, on both axes."""
    whole = [0.1 * i for i in range(11)]  # 100 steps
    runs = {arm: {s: record(whole) for s in range(4)} for arm in ("grpo", "other")}
    steps = [{"phase": "stage1", "step": s, "time/cpu": 0.1, "tokens/generated": 10.0 * s, "tokens/forward_extra": 0.0} for s in range(1, broken_at)]
    series = dict.fromkeys(evidence.SERIES.values(), 0.0)
    records = [{"phase": "start", "step": 0, "eval/accuracy": 0.0}]
    records += [{**r, **series} | ({"eval/accuracy": whole[r["step"] // 10]} if r["step"] % 10 == 0 else {}) for r in steps]
    runs["other"][1] = {**evidence.run_record(records, 100, True), "failure": "nan", "passes": [{"pass@1": 0.9}]}
    out = evidence.summarise(runs, "grpo", ["grpo"])["arms"]["other"]
    assert out["area_seconds_by_seed"][1] == pytest.approx(out["area_tokens_by_seed"][1], abs=1e-4)
    assert out["seconds"] == 10.0 and out["area_seconds_by_seed"][0] == pytest.approx(0.5)
    runs["other"] |= dict.fromkeys((2, 3), runs["other"][1])
    assert evidence.summarise(runs, "grpo", ["grpo"])["arms"]["other"]["pass@1 after"] == 0.0, (
        "what broke down passes nothing, whatever it did before"
    )


def test_seconds_are_those_of_one_version_of_the_code():
    """A loop that became faster between seeds changes neither arm's clock, and an arm without runs of that code has none."""
    runs = {
        arm: {s: record([0.0, 0.5, 1.0], seconds=9.0 if s < 3 else 1.0, code="old" if s < 3 else "new") for s in range(8)}
        for arm in ("grpo", "other")
    }
    runs["other"] = {s: r for s, r in runs["other"].items() if s in (0, 5, 6, 7)}
    runs["early"] = {s: runs["grpo"][s] for s in range(3)}
    out = evidence.summarise(runs, "grpo", ["grpo"])["arms"]
    assert out["grpo"]["seconds"] == out["other"]["seconds"] == 2.0 and out["other"]["against_seconds"]["iqm"] == 0.0
    again = {arm: {s: {**r, "code": "old"} if s else r for s, r in found.items()} for arm, found in runs.items() if arm == "grpo"}
    again["other"] = {s: record([0.0, 0.5, 1.0], seconds=2.0, code="new") for s in range(8)}
    again["grpo"][0] = record([0.0, 0.5, 1.0], seconds=1.0, code="new")
    timed = evidence.summarise(again, "grpo", ["grpo"])["arms"]
    assert timed["grpo"]["seconds"] == 2.0 and timed["other"]["seconds"] == 4.0, "one run of the newer code gives the reference its clock"
    assert out["early"]["seconds"] is None and out["early"]["against_seconds"] is None and out["early"]["against_tokens"]["seeds"] == 3


def test_tokens_of_extra_forwards_count_on_an_axis_of_their_own():
    def spent(extra: float) -> dict:
        found = record([0.1, 0.2, 0.3])
        return {**found, "points": [{**p, "extra": extra * p["tokens"]} for p in found["points"]]}

    runs = {
        "grpo": {s: spent(0.0) for s in range(8)},
        "costly": {s: spent(1.0) for s in range(8)},
        "unknown": {s: record([0.1] * 3) for s in range(8)},
    }
    out = evidence.summarise(runs, "grpo", ["grpo"])["arms"]
    assert out["costly"]["against_tokens"]["iqm"] == 0.0
    assert out["costly"]["against_all_tokens"]["iqm"] == pytest.approx(0.15 - 0.2), "half of the way: twice the tokens for every one generated"
    assert out["unknown"]["against_all_tokens"] is None and "area_all_tokens" not in out["unknown"]


def test_a_record_counts_what_was_read_beside_what_was_written():
    step = {"entropy": 1.0, "attribution/reliability": 0.0, "frac_reward_zero_std": 0.0, "reward": 0.0, "time/cpu": 2.0}
    counted = [{**step, "phase": "stage1", "step": s, "tokens/generated": 10 * s, "tokens/forward_extra": 4 * s} for s in (1, 2)]
    records = [{"phase": "warmup", "step": 5}, {"phase": "start", "step": 0, "eval/accuracy": 0.1}, counted[0], {**counted[1], "eval/accuracy": 0.4}]
    points = evidence.run_record(records, 2, cpu=True)["points"]
    assert [(p["tokens"], p["extra"], p["seconds"], p["accuracy"]) for p in points] == [(0, 0, 0.0, 0.1), (20, 8, 4.0, 0.4)]
    broken = evidence.run_record(records, 4, cpu=True)["points"][-1]
    assert (broken["step"], broken["tokens"], broken["extra"], broken["seconds"], broken["accuracy"]) == (4, 40, 16, 8.0, 0.0)


def test_stage_one_ends_where_stage_two_begins():
    found = record([0.1, 0.2, 0.3, 0.4])
    for point, entropy in zip(found["points"][1:], (3.0, 2.0, 1.0), strict=True):
        point["entropy"] = entropy
    assert evidence._stage1_end(found, "entropy") == 3.0, "60 % of 30 steps: the evaluation at step 10 is the last one inside"
    assert evidence._stage1_end({**found, "stage2_from": 21}, "entropy") == 2.0
    assert evidence._stage1_end(found, "decisions") is None
