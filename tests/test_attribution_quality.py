"""The measures of benchmarks/attribution_quality.py by hand, and the whole of it on a policy of a few thousand weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from loop import MINI

from acpo.synthetic import Chain, Multiplication
from benchmarks import attribution_quality as quality


def test_rank_correlation_by_hand():
    assert quality.spearman(np.array([1.0, 2, 3, 4]), np.array([10.0, 20, 40, 30])) == pytest.approx(0.8)
    assert quality.spearman(np.array([1.0, 1, 2]), np.array([5.0, 5, 7])) == pytest.approx(1.0), "ties share their rank"
    assert np.isnan(quality.spearman(np.ones(3), np.arange(3.0)))


def row(scores: list[float], errors: list[bool]) -> dict:
    return {"scores": {"x": np.array(scores)}, "errors": errors}


def test_f1_by_hand():
    rows = [
        row([-0.5, 0.1], [True, False]),  # found
        row([0.1, -0.3], [True, False]),  # the wrong line
        row([0.2, 0.3], [False, True]),  # nothing seen
        row([0.2, 0.1], [False, False]),  # flawless and said so
        row([0.2, -0.9], [False, False]),  # flawless and blamed
    ]
    hit, clean = 1 / 3, 1 / 2
    assert quality.f1(rows, "x", 0.0) == pytest.approx(2 * hit * clean / (hit + clean))
    assert quality.f1(rows, "x", -2.0) == 0.0
    assert quality.f1(rows, "x", quality.first_error_threshold(rows, "x")) >= quality.f1(rows, "x", 0.0)


def rollout(first: int | None, half: int, lines: int = 4, kind: str | None = None) -> dict:
    """A rollout whose error stands at `first`, exact V mostly noise; sources that are right (tree), a line late (head) or silent (probe)."""
    errors = [i == first for i in range(lines)]
    right, scores = first is None, dict.fromkeys((*quality.SOURCES, "hindsight phi", "surprisal", "entropy", "first", "random"), np.zeros(lines))
    scores["tree"], scores["head"] = -np.array(errors, dtype=float), -np.roll(errors, 1).astype(float)
    flat = dict.fromkeys(quality.SOURCES, np.full(lines, 0.5))
    return {
        "exact": np.array([0.0, 0.0, 0.0, -1.0 if first is not None else 1.0]), "errors": errors, "right": right, "kind": kind, "half": half,
        "scores": scores, "values": flat, "before": dict.fromkeys(quality.SOURCES, 0.5), "reliability": dict.fromkeys(quality.SOURCES, 1.0),
    }  # fmt: skip


def test_the_place_is_fitted_on_the_other_half_and_ties_share():
    """First errors at 1, 1, 2 in one half and at 2, 2, 1, 0 in the other: the place fitted on either is right once in the other."""
    halves = [1, 1, 2, None], [2, 2, 1, 0]
    rows = [rollout(place, half) for pair in zip(*halves, strict=True) for half, place in enumerate(pair)]
    table = quality.quality(rows, [rollout(1, 0, kind="systematic"), rollout(2, 0, kind="systematic")])
    assert table["position"]["first error"] == pytest.approx(2 / 7)
    assert table["position"]["planted"] == 0.5, "of 1, 1, 1, 2, 2, 2, 0 the first of the two most frequent"
    assert table["tree"]["first error"] == 1.0 and table["head"]["first error"] == 0.0
    assert table["probe"]["first error"] == pytest.approx(1 / 4), "a source that says nothing is at chance, wherever the first error stands"


def test_over_seeds_by_hand():
    """Three seeds: means, standard errors, and differences that are paired, so that what the seeds share cancels."""
    tables = []
    for shared, own in ((0.1, 0.05), (0.4, 0.05), (0.7, 0.08)):
        table = {name: dict.fromkeys(quality.COMPARED, shared) for name in (*quality.JUDGED, *quality.BASELINES)}
        tables.append({**table, "tree": dict.fromkeys(quality.COMPARED, shared + own)})
    found = quality.summary(tables)["random"]["first error"]
    assert found["mean"] == pytest.approx(0.4) and found["se"] == pytest.approx(0.3 / 3**0.5)
    difference = quality.differences(tables)["first error"]["tree"]["surprisal"]
    assert difference["mean"] == pytest.approx(0.06) and difference["se"] == pytest.approx(0.01)
    assert (difference["low"], difference["high"]) == pytest.approx((0.06 - 0.043, 0.06 + 0.043), abs=1e-4), "t of 2 degrees of freedom: 4.30"


@pytest.mark.parametrize("task", [Chain(steps=4, modulus=5, hard=0.9), Multiplication(digits=4, hard=0.6)], ids=["chain", "multiplication"])
def test_planted_traces_hold_what_they_say(task):
    rng = np.random.default_rng(0)
    systematic = cancelling = 0
    for _ in range(20):
        problem = task.problem(rng)
        text = quality.planted_text(task, problem, "systematic", rng)
        if text is not None:
            systematic += 1
            assert sum(task.errors(problem, text)) == 1 and task.exact_values(problem, text)[-1] == 0
        text = quality.planted_text(task, problem, "cancelling", rng)
        if text is not None:
            cancelling += 1
            assert sum(task.errors(problem, text)) == 2 and task.exact_values(problem, text)[-1] == 1
    assert systematic > 10 and (cancelling > 0) == isinstance(task, Chain)


@pytest.mark.parametrize("task", [Chain(steps=4, modulus=5), Multiplication(digits=4)], ids=["chain", "multiplication"])
def test_a_source_that_copies_the_answer_is_caught(task):
    """Two made-up sources on planted leaks: one whose value jumps where the answer can be read, and one that follows the exact V."""
    rng, rows = np.random.default_rng(1), []
    for _ in range(30):
        problem = task.problem(rng)
        trace = task.trace(problem, rng)
        text, at = quality.with_a_line_more(trace.text, problem.answer, "leak", rng)
        lines = text.split("\n")
        assert lines[at] == f"={problem.answer}" and "\n".join(lines[:at] + lines[at + 1 :]) == trace.text
        copied = [0.1] + [0.9 if any(line == f"={problem.answer}" for line in lines[: k + 1]) else 0.1 for k in range(len(lines) - 1)]
        exact = np.insert(np.diff(task.exact_values(problem, trace.text)), at, 0.0)
        rows.append({"at": at, "kind": "leak", "scores": {"copies": np.diff(copied), "exact": exact}})
    assert quality.share_of_planted(rows, "copies") > 10
    assert quality.share_of_planted(rows, "exact") == 0.0
    text, at = quality.with_a_line_more(trace.text, problem.answer, "repeat", rng)
    assert text.split("\n")[at] == text.split("\n")[at - 1]


@pytest.mark.parametrize("given", ["3", "2-2", "1,1"])
def test_one_seed_has_no_error_bar(given, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["attribution_quality", str(tmp_path / "any.yaml"), "--seeds", given])
    with pytest.raises(SystemExit):
        quality.main()
    assert f"--seeds: must name at least two, each once, got {given}" in capsys.readouterr().err


def mini(folder: Path, **own) -> Path:
    """A comparison whose settings are those of the tests' small run."""
    settings = {k: v for k, v in yaml.safe_load(MINI).items() if k != "name"}
    path = folder / "mini.yaml"
    path.write_text(yaml.safe_dump({"settings": {**settings, **own}, "seeds": "0-1", "arms": {"grpo": None}}))
    return path


def test_warm_starts_are_trained_once(tmp_path):
    """Each by its seed, and not again where they lie."""
    path = mini(tmp_path, warmup={"steps": 2, "batch": 8}, eval={"max_problems": 4, "samples": 0})
    found = quality.warm_starts(path, [5, 3], tmp_path / "warm")
    weights = {seed: (policy / "model.safetensors").read_bytes() for seed, policy in found.items()}
    assert [policy.parent.name for policy in found.values()] == ["warm-5", "warm-3"] and weights[5] != weights[3]
    written = (found[3] / "model.safetensors").stat().st_mtime_ns
    assert quality.warm_starts(path, [3, 5], tmp_path / "warm") == found and (found[3] / "model.safetensors").stat().st_mtime_ns == written


def test_a_source_whose_gate_is_shut_is_asked(tmp_path, finished_run):
    trainer = quality.trainer_of(mini(tmp_path), finished_run / "policy", 0, {})
    hindsight = trainer.attributors.by_name["hindsight"]
    hindsight.reliability.boundaries, hindsight.reliability.m0, hindsight.reliability.m1, hindsight.batches = 1000, 0.1, 0.1, 1
    collector = quality.Collector(trainer)
    collector.step()
    assert hindsight.reliability.value == 0.0 and len(collector.rollouts) > 20
    assert all(np.abs(row["scores"]["hindsight"]).max() > 0 for row in collector.rollouts)


def test_planted_rollouts_teach_no_calibrator(tmp_path, finished_run):
    trainer = quality.trainer_of(mini(tmp_path), finished_run / "policy", 0, {})
    collector = quality.Collector(trainer)
    collector.step()
    before = trainer.attributors.state()
    collector.step(quality.plant)
    assert trainer.attributors.state() == before and {"leak", "leak unmasked"} <= {r["kind"] for r in collector.rollouts}


def test_the_whole_of_it(tmp_path, finished_run, monkeypatch, capsys):
    torch.set_num_threads(1)
    path = mini(tmp_path)
    monkeypatch.setattr(quality, "warm_starts", lambda path, seeds, directory: dict.fromkeys(seeds, finished_run / "policy"))
    monkeypatch.setattr("sys.argv", ["attribution_quality", str(path), "--out", str(tmp_path / "out"), "--batches", "8", "--seeds", "0-1"])
    quality.main()
    results = json.loads((tmp_path / "out" / "mini.json").read_text())
    assert list(results["seeds"]) == ["0", "1"] and results["seeds"]["0"] != results["seeds"]["1"]
    for seed in results["seeds"].values():
        table = seed["table"]
        assert set(table) == {*quality.JUDGED, *quality.BASELINES} and seed["rollouts"] > 50
        # of two lines a rank correlation says little: the information that was captured says more
        assert table["hindsight"]["captured"] > 0.2 and table["tree"]["captured"] > 0.0 and abs(table["random"]["spearman"]) < 0.3
        assert all(0 <= table[name]["calibration"] < 0.3 for name in quality.SOURCES)
        assert all({"leak", "leak unmasked", "repeat"} <= set(table[name]) for name in quality.JUDGED)
        assert table["hindsight"]["repeat"] != table["hindsight phi"]["repeat"], "the score that training uses is not phi"
    assert results["command"].startswith("python -m benchmarks.attribution_quality ") and str(path) in results["command"]
    printed = capsys.readouterr().out
    assert (tmp_path / "out" / "mini.png").stat().st_size > 5000 and "surprisal" in printed and "+-" in printed
