"""benchmarks/method.py: bars by hand."""

from __future__ import annotations

import json
import sys

import pytest

from acpo import evidence
from benchmarks import method


def results(name: str, low: float, iqm: float, entropy: float = 0.5, after: float = 0.8, pass8: float = 0.9) -> dict:
    found = {"iqm": iqm, "low": low, "high": iqm + 0.1, "wins": 12, "seeds": 16}
    ends = {"at_budget": 0.7, "pass@8 after": 0.9, "entropy_stage1_end": 0.5, "decisions_stage1_end": None, "seeds": list(range(16))}
    ours = {**ends, "at_budget": after, "entropy_stage1_end": entropy, "pass@8 after": pass8}
    ours |= {f"{kind}_{axis}": found for kind in ("against", "best_baseline") for axis in ("tokens", "seconds")}
    return {"name": name, "against": "grpo", "best_baseline": "grpo", "warm_start": {"pass@8": 0.85}, "arms": {"grpo": ends, "acpo": ours}}


@pytest.mark.parametrize(
    ("found", "met"),
    [
        (results("t2", 0.01, 0.06), [True, True, False, True]),
        (results("t2", 0.01, 0.04), [False, True, False, True]),
        (results("t2", -0.01, 0.06), [False, True, False, True]),
        (results("t2", 0.01, -0.01), [False, False, False, True]),
        (results("multiplication", 0.001, 0.03, entropy=0.76), [True, True, True, True]),
        (results("multiplication", 0.001, 0.03, entropy=0.76, after=0.69), [True, True, False, True]),
        (results("no_attribution", -0.05, -0.01, pass8=0.84), [True, True, False, False]),
    ],
)
def test_bars(found, met):
    """In turn: area in tokens, in seconds, entropy, pass@8."""
    lines = method.bars(found)
    assert [line.startswith("met") for line in lines] == met, lines
    assert all(line.startswith(("met: ", "NOT met: ")) for line in lines)


def test_the_summary_has_a_row_a_task_and_says_nothing_of_what_was_not_run():
    whole, part = results("t2", 0.01, 0.06), results("t3", 0.01, 0.06)
    for found in (whole, part):
        for arm in found["arms"].values():
            arm["area_tokens"] = 0.5
    whole["arms"]["acpo-shuffled"] = whole["arms"]["acpo"]
    part["arms"]["acpo-everywhere"] = part["arms"]["acpo"]
    part["arms"]["acpo"] = part["arms"]["acpo"] | {"best_baseline_seconds": None}
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in method.summary([whole, part]).splitlines()]
    gain = "+0.060 [+0.010, +0.160] 12/16"
    assert rows[2] == ["t2", "0.500", "", "0.500", gain, f"grpo: {gain}", gain, gain, ""]
    assert rows[3] == ["t3", "0.500", "", "0.500", gain, f"grpo: {gain}", "", "", gain]


def test_an_arm_over_another_by_hand():
    """The mean of all seeds, not of the middle ones; paired, in the order of the arms; a comparison without one of the two has an empty cell."""

    def ran(name, **areas):
        return {"name": name, "arms": {arm: {"area_tokens_by_seed": dict(zip("1234", of, strict=False))} for arm, of in areas.items()}}

    found = [ran("one", grpo=[0.1, 0.2, 0.3, 0.4], kl=[0.2, 0.3, 0.4, 0.9], ours=[0.4, 0.3]), ran("two", grpo=[0.5, 0.5], late=[0.7, 0.4])]
    lines = method.over(found, "grpo").splitlines()
    assert lines[0] == "| over grpo | one | two |"
    assert lines[2:] == ["| kl | +0.200 +- 0.100 (4/4) |  |", "| ours | +0.200 +- 0.100 (2/2) |  |", "| late |  | +0.050 +- 0.150 (1/2) |"]


def test_few_seeds_decide_nothing_and_a_control_that_gains_is_seen():
    found = results("t2", 0.1, 0.2)
    found["arms"]["acpo-shuffled"] = {**found["arms"]["acpo"]}
    gains, beside = (
        "over grpo is shown: +0.200 [+0.100, +0.300], 12 of 16 seeds",
        "beside it: over grpo-kl: +0.200 [+0.100, +0.300], 12 of 16 seeds",
    )
    inside = f"NOT met: no gain of the shuffled control {gains}"
    assert inside in method.bars(found) and beside not in method.bars(found)
    assert {inside, beside} < set(method.bars({**found, "best_baseline": "grpo-kl"}))
    found["arms"]["acpo-everywhere"] = {**found["arms"]["acpo"], "against_tokens": found["arms"]["acpo"]["against_tokens"] | {"low": -0.1}}
    everywhere = "no gain of the control shuffled over rollouts and groups as well over grpo is shown: +0.200 [-0.100, +0.300], 12 of 16 seeds"
    assert f"met: {everywhere}" in method.bars(found)
    found["arms"]["acpo"] = {**found["arms"]["acpo"], "best_baseline_tokens": {"iqm": 0.2, "low": None, "high": None, "wins": 3, "seeds": 3}}
    assert method.bars(found)[0].startswith("not known")
    found["arms"]["acpo"]["best_baseline_seconds"] = None  # of an arm that was run apart from the others
    assert method.bars(found)[1].endswith("not run side by side")


def test_entropy_behind_the_switch_is_that_of_the_first_interval_in_stage_2():
    found = results("t2", 0.01, 0.06)
    assert method.entropy_behind_the_switch(found, "acpo") is None, "no second stage"
    found["arms"]["acpo"]["stage2_from"] = 17
    points = [{"step": 0}, *({"step": step, "entropy": value} for step, value in ((10, 9.0), (20, 8.0), (30, 0.3), (40, 7.0)))]
    others = [{"step": 0}, *({"step": step, "entropy": value} for step, value in ((10, 1.0), (20, 1.0), (30, 0.4), (40, 1.0)))]
    found["curves"] = {"acpo": {0: points}, "grpo": {0: others, 1: others}}
    assert method.entropy_behind_the_switch(found, "acpo") == pytest.approx(0.75)
    assert "beside it: entropy at the start of stage 2, at the configured temperature: 0.75 times" in method.bars(found)
    found["curves"]["acpo"][1] = [{"step": 0}, {"step": 13, "accuracy": 0.0}, {"step": 30, "accuracy": 0.0}, {"step": 40, "accuracy": 0.0}]
    assert method.entropy_behind_the_switch(found, "acpo") == pytest.approx(0.75), "what broke down before has none"
    found["arms"]["acpo"]["stage2_from"] = 41
    assert method.entropy_behind_the_switch(found, "acpo") is None, "no evaluation behind it"


def test_what_credit_adds_is_over_the_loop_without_it():
    """GRPO with the KL stands beside the bars where another baseline is the best, from the areas by seed; in seconds where both have them."""
    found = results("t2", 0.01, 0.06) | {"best_baseline": "dapo-kl"}
    for arm, gain in (("grpo-kl", 0.0), ("acpo", 0.1), ("acpo-shuffled", -0.2)):
        areas = {str(s): 0.5 + gain + 0.001 * s for s in range(8)}
        found["arms"].setdefault(arm, {**found["arms"]["grpo"]}).update(area_tokens_by_seed=areas)
    lines = method.bars(found)
    assert "beside it: over grpo-kl in equal tokens: +0.100 [+0.100, +0.100], 8 of 8 seeds" in lines
    assert "beside it: over grpo-kl: -0.200 [-0.200, -0.200], 0 of 8 seeds" in lines and not [x for x in lines if "grpo-kl in equal seconds" in x]


TABLES = sorted(path for folder in (".", "again", "starts", "larger", "short") for path in (method.RESULTS / folder).glob("*.json"))


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_the_tables_come_out_of_the_curves_again(path):
    found = json.loads(path.read_text(encoding="utf-8"))
    runs, budgets = method.runs_of(found), found["curves"][found["against"]]
    areas: dict[str, dict[str, float]] = {}
    for arm, by_seed in runs.items():
        for seed, run in by_seed.items():
            x, y = ([point[key] for point in run["points"]] for key in ("tokens", "accuracy"))
            areas.setdefault(arm, {})[str(seed)] = evidence.area(x, y, budgets[str(seed)][-1]["tokens"])
    for arm, of in found["arms"].items():
        assert {seed: round(area, 5) for seed, area in areas[arm].items()} == of["area_tokens_by_seed"], arm
        if arm != found["against"]:
            assert evidence.difference(areas[arm], areas[found["against"]]) == of["against_tokens"], arm
            if found.get("warm_starts"):
                by = {k: {int(s): a for s, a in areas[k].items()} for k in (arm, found["against"])}
                wanted = evidence.by_start(by[arm], by[found["against"]], found["warm_starts"])
                assert json.loads(json.dumps(wanted)) == of["against_by_start"], arm
    clocks = evidence.clocks(runs, found["against"])
    assert evidence.seconds_difference(clocks, "acpo", found["against"], found["against"]) == found["arms"]["acpo"]["against_seconds"]


@pytest.mark.parametrize(
    ("text", "message"), [("[]", "must be a results.json"), ('{"name": "x"}', "must be a results.json"), ("{", "cannot be read")]
)
def test_a_file_that_is_no_table_is_named(tmp_path, text, message):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(SystemExit, match=message):
        method.load(path)


def test_a_figure_is_of_one_file(tmp_path, monkeypatch, capsys):
    files = [str(path) for path in sorted(method.RESULTS.glob("larger/*.json"))]
    monkeypatch.setattr(sys, "argv", ["method", "--figure", str(tmp_path / "out.png"), files[0]])
    method.main()
    assert (tmp_path / "out.png").stat().st_size > 50_000
    monkeypatch.setattr(sys, "argv", ["method", "--figure", str(tmp_path / "out.png"), *files])
    with pytest.raises(SystemExit):
        method.main()
    assert "--figure draws one file, got 2" in capsys.readouterr().err


def timed(name: str, seconds: dict[str, float], accuracy: dict[str, list[float]], seeds=range(8)) -> dict:
    """Three points a run; what a run of each arm takes, whatever its seed."""
    curves = {
        arm: {
            str(s): [{"step": 10 * k, "tokens": 100 * k, "seconds": k * taken / 2, "accuracy": a + 0.001 * s} for k, a in enumerate(accuracy[arm])]
            for s in seeds
        }
        for arm, taken in seconds.items()
    }
    ends = {arm: {str(s): {"code": "x", "failure": ""} for s in seeds} for arm in seconds}
    arms = {arm: {"seconds": taken, "failures": []} for arm, taken in seconds.items()}
    return {"name": name, "against": "grpo", "best_baseline": "grpo", "code": ["x"], "arms": arms, "curves": curves, "ends": ends}


def test_other_clocks_on_the_same_curves(tmp_path, monkeypatch, capsys):
    """Twice as long a step: the method has come half as far when GRPO's time is up. The clocks' own accuracies are nothing."""
    curves = {"grpo": [0.0, 0.5, 1.0], "acpo": [0.0, 0.5, 1.0]}
    frozen = timed("again_t2", {"grpo": 2.0, "acpo": 4.0}, curves)
    same, slow = (timed("clocks_t2", {"grpo": 6.0, "acpo": 6.0 * k}, {arm: [0.9, 0.1, 0.3] for arm in curves}, range(50, 53)) for k in (1, 2))
    for name, found in (("frozen", frozen), ("same", same), ("slow", slow)):
        (tmp_path / f"{name}.json").write_text(json.dumps(found), encoding="utf-8")
    differences = []
    for clocks in ("same", "slow"):
        monkeypatch.setattr(sys, "argv", ["method", "--clocks", str(tmp_path / f"{clocks}.json"), "--", str(tmp_path / "frozen.json")])
        method.main()
        task, other, before, now, ours, theirs, runs = (cell.strip() for cell in capsys.readouterr().out.splitlines()[2].split("|")[1:-1])
        assert (task, other, theirs, runs) == ("again_t2", "grpo", "6.0", "3") and float(ours) == {"same": 6.0, "slow": 12.0}[clocks]
        assert before.startswith("-0.250"), "as it was timed then, twice as long"
        differences.append(float(now.split()[0]))
    assert differences == [0.0, -0.25]
    (tmp_path / "other.json").write_text(json.dumps({**same, "name": "clocks_t1"}), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["method", "--clocks", str(tmp_path / "other.json"), "--", str(tmp_path / "frozen.json")])
    with pytest.raises(SystemExit):
        method.main()
    assert "none of the tasks again_t2" in capsys.readouterr().err
