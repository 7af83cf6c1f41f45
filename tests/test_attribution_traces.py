"""The measures of benchmarks/attribution_traces.py by hand, and the whole of it on a policy of a few thousand weights."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from acpo import config
from acpo.policy import build
from benchmarks import attribution_traces as traces

ROWS = [
    {"id": "a", "subset": "gsm8k", "problem": "1 + 2?", "steps": ["1 + 2 is 4.", "So 4."], "label": 0},
    {"id": "b", "subset": "gsm8k", "problem": "2 + 2? ", "steps": ["2 + 2 is 4.", "Yes.", "So 4."], "label": -1},
    {"id": "c", "subset": "gsm8k", "problem": "2 + 3?", "steps": ["2 + 3 is 5.", "But 5 is 6.", "So 6."], "label": 1},
    {"id": "d", "subset": "math", "problem": "1 + 2?", "steps": ["3.", "So 3."], "label": -1},
    {"id": "e", "subset": "gsm8k", "problem": "unknown?", "steps": ["3.", "So 3."], "label": -1},
    {"id": "f", "subset": "gsm8k", "problem": "1 + 2?", "steps": ["3."], "label": -1},
]
ANSWERS = [{"problem": "1 + 2?", "answer": "3"}, {"problem": "2 + 2?", "answer": "4"}, {"problem": "2 + 3?", "answer": "5"}]


@pytest.fixture
def files(tmp_path):
    for name, rows in (("steps", ROWS), ("answers", ANSWERS)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return tmp_path / "steps.jsonl", tmp_path / "answers.jsonl"


def test_which_solutions(files):
    found = traces.solutions(*files, "gsm8k", 0)
    assert [row["id"] for row in found] == ["a", "b", "c"], "of the subset, with a known answer and more than one step, by turns"
    assert [row["answer"] for row in found] == ["3", "4", "5"]
    assert [row["id"] for row in traces.solutions(*files, "gsm8k", 2)] == ["a", "b"]


def test_answers_of_solutions_that_end_right(files):
    """Of a problem that the answers lack, and of several subsets."""
    rows = [*ROWS, {"id": "g", "subset": "math", "problem": "unknown?", "steps": ["So", "it is 8."], "label": -1, "final_answer_correct": True}]
    files[0].write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert [(row["id"], row["answer"]) for row in traces.solutions(*files, "gsm8k,math", 0)] == [
        ("a", "3"), ("b", "4"), ("c", "5"), ("d", "3"), ("e", "8"), ("g", "8")
    ]  # fmt: skip


def test_marked_steps_are_segments():
    """A token belongs to the step in which it ends, the blank line to the step before it; a token over a border to the step behind."""
    texts, marked = ["ab\n\ncd", "e\n\nf\n\ng"], [["ab", "cd"], ["e", "f", "g"]]
    segments = traces.marked_segments(texts, marked, [[2, 4, 6], [1, 2, 4, 7]])
    assert segments.token_offsets.tolist() == [0, 2, 3, 5, 6, 7] and segments.sequence_offsets.tolist() == [0, 2, 5]


def test_first_errors_by_hand():
    rows = [{"steps": [""] * n, "label": label} for n, label in ((2, 0), (4, 2), (4, 2), (2, 1), (3, -1))]
    signal = {"hindsight": [[-1.0, 0.0], [0.0, -1.0, -1.0, 0.0], [1.0, 1.0, -2.0, 0.0], [0.0, 0.0], [0.0, 0.0, 0.0]]}
    found = [{"hindsight": values} for values in signal["hindsight"]]
    hits = traces.first_errors(rows, found)
    assert hits["hindsight"].tolist() == [1.0, 0.5, 1.0, 0.5]
    assert hits["first"].tolist() == [1.0, 0.0, 0.0, 0.0] and hits["chance"].tolist() == [0.5, 0.25, 0.25, 0.5]
    assert hits["position"].tolist() == [0.0, 0.0, 0.0, 0.0], "fitted on the other half: of two places that tie the first"
    hits = traces.first_errors([*rows, {"steps": [""] * 3, "label": 2}], [*found, {"hindsight": [0.0, 0.0, 0.0]}])
    assert hits["position"].tolist() == [0.0, 1.0, 0.0, 0.0, 0.0], "2 is twice in the half of the even ones"


def test_area_by_hand():
    assert traces.area(np.array([2.0, 1.0]), np.array([1.0, 0.0])) == 0.875
    assert traces.area(np.array([0.0]), np.array([1.0])) == 0.0


@pytest.fixture
def model(files, tmp_path):
    torch.manual_seed(0)
    chosen = config.load(None, ["policy.from_config=tiny", "policy.tokenizer=bytes", f"problems.path={files[1]}"])
    policy, tokenizer = build(chosen)
    policy.model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_what_the_mask_leaves_out_counts_nowhere(files, model, monkeypatch):
    """Copies of the answer; here, for once, every token."""
    spelled = []

    def all_of_it(responses, spellings):
        spelled.extend(spellings)
        return torch.zeros(sum(map(len, responses)), dtype=torch.bool)

    monkeypatch.setattr(traces, "answer_copies", all_of_it)
    chosen = config.load(None, [f"policy.path={model}", f"problems.path={files[1]}", "policy.device=cpu"])
    found = traces.read(chosen, traces.solutions(*files, "gsm8k", 0))
    assert [len(forms[0]) for forms in spelled] == [1, 1, 1, 1, 0, 1], "each right answer is one byte, so is each one that a wrong solution gives"
    assert all(v == 0 for s in found for name in ("phi", "hindsight", "contrast") for v in s[name])
    assert all(v < 0 for s in found for v in s["surprisal"])


@pytest.mark.parametrize("masked", [0, 1], ids=["right", "given"])
def test_copies_of_either_answer_are_left_out_of_the_contrast(files, model, monkeypatch, masked):
    """And of the right one alone out of hindsight."""
    calls = []

    def all_or_nothing(responses, spellings):
        calls.append(spellings)
        return torch.full((sum(map(len, responses)),), len(calls) - 1 != masked)

    monkeypatch.setattr(traces, "answer_copies", all_or_nothing)
    chosen = config.load(None, [f"policy.path={model}", f"problems.path={files[1]}", "policy.device=cpu"])
    found = traces.read(chosen, traces.solutions(*files, "gsm8k", 0))
    assert all(v == 0 for s in found for v in s["contrast"])
    assert any(v != 0 for s in found for v in s["hindsight"]) == (masked == 1)


def test_the_contrast_is_with_the_answer_that_a_wrong_solution_gives(files, model, monkeypatch):
    monkeypatch.setattr(traces, "answer_copies", lambda responses, spellings: torch.ones(sum(map(len, responses)), dtype=torch.bool))
    chosen = config.load(None, [f"policy.path={model}", f"problems.path={files[1]}", "policy.device=cpu"])
    rows = traces.solutions(*files, "gsm8k", 0)
    found = traces.read(chosen, rows)
    given = traces.read(chosen, [{**row, "answer": answer} for row, answer in zip(rows, ("4", "4", "6"), strict=True)])
    for row, mine, other in zip(rows, found, given, strict=True):
        wanted = np.array(mine["hindsight"]) - (np.array(other["hindsight"]) if row["label"] >= 0 else 0)
        np.testing.assert_allclose(mine["contrast"], wanted, atol=1e-6)
        assert (mine["contrast"] == mine["hindsight"]) == (row["label"] < 0)


def test_the_whole_of_it(files, model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(traces, "BOOTSTRAP", 200)
    out = tmp_path / "out.json"
    assert traces.main([model, *map(str, files), "policy.device=cpu", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "2 solutions with a wrong step, 1 without" in said and "| hindsight | " in said
    found = json.loads(out.read_text())
    assert [len(s["phi"]) for s in found["solutions"]] == [2, 3, 3] and all(np.isfinite(s["hindsight"]).all() for s in found["solutions"])
    assert any(v != 0 for s in found["solutions"] for v in s["phi"])
    for s in found["solutions"]:
        assert all(h > p for h, p in zip(s["hindsight"], s["phi"], strict=True)), "the KL is above 0 where the model reads the hint at all"
    assert found["over"]["hindsight"]["chance"][0] == pytest.approx(
        found["first_error"]["hindsight"][0] - found["first_error"]["chance"][0], abs=1e-3
    )
    assert traces.main([model, *map(str, files), "policy.device=cpu", "--wrong", "--out", str(out)]) == 0
    alone = json.loads(out.read_text())
    assert alone["right"] == 0 and alone["outcome"] == {} and alone["first_error"] == found["first_error"]
    assert "hindsight" in found["over"]["contrast"] and "hindsight" not in found["over"]["phi"]
    with pytest.raises(SystemExit):
        traces.main([model, *map(str, files), "--subset", "math"])
    assert "of subset 'math' with and without a wrong step" in capsys.readouterr().err
