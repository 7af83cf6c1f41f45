"""The measures of benchmarks/attribution_quality.py by hand, and the whole of it on a policy of a few thousand weights."""

from __future__ import annotations

import json

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


def test_the_whole_of_it(tmp_path, finished_run, monkeypatch, capsys):
    torch.set_num_threads(1)
    path = tmp_path / "mini.yaml"
    settings = {k: v for k, v in yaml.safe_load(MINI).items() if k != "name"}
    path.write_text(yaml.safe_dump({"settings": settings, "seeds": "0-1", "arms": {"grpo": None}}))
    arguments = ["attribution_quality", str(path), str(finished_run / "policy"), "--out", str(tmp_path / "out"), "--batches", "8"]
    monkeypatch.setattr("sys.argv", arguments)
    quality.main()
    results = json.loads((tmp_path / "out" / "mini.json").read_text())
    assert set(results["table"]) == {*quality.SOURCES, *quality.BASELINES} and results["rollouts"] > 50
    table = results["table"]  # of two lines a rank correlation says little: the information that was captured says more
    assert table["hindsight"]["captured"] > 0.2 and table["tree"]["captured"] > 0.0 and abs(table["random"]["spearman"]) < 0.3
    assert all(0 <= table[name]["calibration"] < 0.3 for name in quality.SOURCES)
    assert all({"leak", "leak masked", "repeat"} <= set(table[name]) for name in quality.SOURCES)
    assert (tmp_path / "out" / "mini.png").stat().st_size > 5000 and "surprisal" in capsys.readouterr().out
