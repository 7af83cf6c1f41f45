"""benchmarks/step_clocks.py: arms step by step beside one another."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from test_compare import TINY, written

from acpo import comparison
from acpo.trainer import Trainer
from benchmarks import step_clocks

RATED = TINY.replace("  rloo:\n", "  rloo: {rate: 3.0e-4}\n").replace("rate: rloo}", "rate: 3.0e-4}").replace("{steps: 60,", "{steps: 2,")


def run(folder, monkeypatch, *arguments: str, text: str = RATED) -> dict:
    out = folder / "clocks.json"
    monkeypatch.setattr(sys, "argv", ["step_clocks", str(written(folder, text)), "--out", str(out), *arguments])
    step_clocks.main()
    return json.loads(out.read_text(encoding="utf-8"))


def test_every_arm_takes_its_steps_in_turn(tmp_path, monkeypatch, capsys):
    torch.set_num_threads(1)
    taken, step = [], Trainer.step
    monkeypatch.setattr(Trainer, "step", lambda self: (taken.append((self.config.credit.advantage, self.step_number)), step(self))[1])
    found = run(tmp_path, monkeypatch, "--arms", "grpo,rloo", "--seeds", "7")
    assert [sorted(taken[i : i + 2]) for i in range(0, 8, 2)] == [[("grpo", k), ("rloo", k)] for k in (1, 2, 3, 4)]
    assert found["name"] == "clocks_tiny" and found["arms"]["grpo"]["ratio"] == 1.0 and 0.2 < found["arms"]["rloo"]["ratio"] < 5.0
    for arm in ("grpo", "rloo"):
        (points,) = found["curves"][arm].values()
        assert [p["step"] for p in points] == [0, 4] and points[0]["seconds"] == 0.0 < points[1]["seconds"]
    assert "of a step of grpo" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arms", "text", "message"),
    [("grpo,none", RATED, "--arms names none, which"), ("grpo,rloo", TINY, "must give each arm a rate, got none for rloo")],
)
def test_what_cannot_be_timed_is_refused(tmp_path, monkeypatch, capsys, arms, text, message):
    with pytest.raises(SystemExit):
        run(tmp_path, monkeypatch, "--arms", arms, text=text)
    assert message in capsys.readouterr().err
    assert not list(tmp_path.rglob("metrics.jsonl"))


def test_points_by_hand():
    assert step_clocks.points(torch.ones(25).numpy() * 0.5)[1:] == [
        {"step": 10, "seconds": 5.0, "accuracy": 0.0}, {"step": 20, "seconds": 10.0, "accuracy": 0.0}, {"step": 25, "seconds": 12.5, "accuracy": 0.0}
    ]  # fmt: skip


def test_the_command_names_arms_that_the_comparisons_have():
    loaded = comparison.load(step_clocks.Path(__file__).parents[1] / "configs" / "compare" / "again" / "t2.yaml")
    assert {"grpo", "grpo-kl", "acpo"} <= set(loaded.arms)
