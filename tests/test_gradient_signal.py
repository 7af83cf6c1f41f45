"""benchmarks/gradient_signal.py: its two measures by hand, and exact differences on rollouts of a chain."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from acpo.batch import Batch
from acpo.problems import Problem
from acpo.synthetic import Chain, tokenizer
from benchmarks import gradient_signal
from benchmarks.gradient_signal import exact_differences, table


def test_the_measures_by_hand():
    """Second moments of 1 and 16: the metric divides products by 1 and 4."""
    plain = torch.tensor([[1.0, 4.0], [-1.0, 4.0], [1.0, -4.0], [-1.0, -4.0]], dtype=torch.float64)
    truth = torch.tensor([[3.0, 8.0]], dtype=torch.float64).repeat(4, 1)
    same = torch.tensor([[3.0, 8.0]], dtype=torch.float64).repeat(4, 1)
    found = table({"true direction": truth, "GRPO": plain, "right": same, "silent": torch.zeros(4, 2, dtype=torch.float64)})
    assert found["right"]["cosine"] == pytest.approx(1.0) and found["right"]["share"] == pytest.approx(1.0)
    assert found["GRPO"]["cosine"] == pytest.approx(0.0) and found["GRPO"]["share"] == pytest.approx(-1 / 3), "noise that adds up to nothing"
    other = table({"true direction": truth, "GRPO": plain, "first": torch.tensor([[1.0, 0.0]], dtype=torch.float64).repeat(4, 1)})
    assert other["first"]["cosine"] == pytest.approx(3 / (3**2 + 8**2 / 4) ** 0.5)
    assert found["silent"]["batches"] == 0 and found["right"]["batches"] == 4
    own = torch.eye(2, dtype=torch.float64)
    assert table({"true direction": own, "GRPO": own, "own": own})["own"]["cosine"] == 0.0, "a batch is no witness of its own direction"


def test_exact_differences_of_a_chain_go_to_its_lines_and_not_to_filler():
    task = Chain(steps=2, modulus=10, distractors=1, hard=1.0, q=(0.5, 0.5))
    characters = tokenizer()
    problem = Problem("p", "3a4b5=", "2", data={"start": 3, "operands": [4, 5]})
    texts = ["a47s\nb52t\nA2", "a47s\nc52t\nA2"]  # the second leaves the form in its second line
    batch = Batch.from_responses([[0], [0]], [torch.tensor([*characters(t)["input_ids"], characters.eos_token_id]) for t in texts])
    trainer = SimpleNamespace(
        config=SimpleNamespace(rollout=SimpleNamespace(group_size=2)), tokenizer=characters, train_problems=[problem], task=task,
        filler=torch.tensor(characters("st")["input_ids"]),
    )  # fmt: skip
    v0, v1, v2 = task.exact_values(problem, texts[0])
    one = [v1 - v0] * 3 + [0.0, v1 - v0]
    two = [v2 - v1] * 3 + [0.0, v2 - v1]
    assert v1 < v2 == 1.0
    found = exact_differences(trainer, batch, [0])
    torch.testing.assert_close(found, torch.tensor([*one, *two, 0, 0, 0, *one, *[0.0] * 5, 0, 0, 0], dtype=torch.float64))


def call(monkeypatch, tmp_path, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["gradient_signal", *words, "--out", str(tmp_path)])
    gradient_signal.main()


def test_settings_may_be_those_of_another_comparison(monkeypatch, tmp_path):
    class Asked(Exception):
        pass

    def trainer_of(path, policy, seed, more):
        raise Asked(more)

    monkeypatch.setattr(gradient_signal, "trainer_of", trainer_of)
    file = Path(gradient_signal.__file__).parents[1] / "configs" / "compare" / "again" / "t2.yaml"
    with pytest.raises(Asked) as asked:
        call(monkeypatch, tmp_path, str(file), "policy", "loss.kl_weight=0.5")
    (more,) = asked.value.args
    assert more["rollout.prompts"] == 4 and more["segmenter.target_tokens"] == 4 and more["segmenter.entropy"] is True
    assert more["loss.kl_weight"] == 0.5 and more["credit.scope"] == "own" and "rollout.group_size" not in more


@pytest.mark.parametrize(
    ("text", "words", "message"),
    [
        ("seeds: 0-1\narms: {grpo: }\nsettings: {}\n", ["rollout.prompts"], "rollout.prompts is no KEY=VALUE"),
        ("seeds: 0-1\narms: {grpo: }\n", [], "settings must be given"),
    ],
)
def test_what_is_wrong_with_the_words_or_the_file_is_said(monkeypatch, tmp_path, capsys, text, words, message):
    (tmp_path / "own.yaml").write_text(text)
    with pytest.raises(SystemExit):
        call(monkeypatch, tmp_path, str(tmp_path / "own.yaml"), "policy", *words)
    assert message in capsys.readouterr().err
