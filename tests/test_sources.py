"""Which problems are kept apart, and where they come from besides files: folders and names of `datasets`, tasks of reasoning-gym."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from acpo import config
from acpo.config import ConfigError
from acpo.problems import Problem, ProblemError, load
from acpo.sources import load_problems, place, question_key, split

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("task", ["chain", "multiplication"])
def test_what_one_seed_holds_out_another_does_not_train_on(task):
    """`acpo eval RUN problems.seed=1` asks for fresh problems: they are no more often those of the training set than chance has it."""

    def made(seed: int) -> tuple[list[str], list[str]]:
        small = {"steps": 8, "modulus": 10} if task == "chain" else {"digits": 5}
        words = [f"problems.{k}={v}" for k, v in {"task": task, "train": 300, "held_out": 100, "seed": seed, **small}.items()]
        _, train, held_out = load_problems(config.load(None, [*words, "policy.from_config=tiny", "method=grpo"]))
        return [p.prompt for p in train], [p.prompt for p in held_out]

    drawn = [made(seed) for seed in range(4)]
    for (train, _), (_, held_out) in itertools.product(drawn, drawn):
        assert len(set(train) & set(held_out)) < 10
    assert drawn[1][1] != drawn[0][1]


def problems(count: int, start: int = 0) -> list[Problem]:
    return [Problem(f"{i}", f"<{i}?>", "1", question=f"What is {i}?") for i in range(start, start + count)]


def names(found: list[Problem]) -> set[str]:
    return {p.id for p in found}


# --- the held-out set ------------------------------------------------------------------------------------------------------------------


@given(st.integers(5, 60), st.integers(0, 60), st.sampled_from([0.05, 0.2, 0.5, 0.9]), st.integers(0, 3), st.randoms())
def test_a_share_moves_no_problem_when_others_are_added(before, more, share, seed, random):
    old, new = problems(before), problems(before + more)
    random.shuffle(new)
    for one, other in zip(split(old, share, seed), split(new, share, seed), strict=True):
        assert names(one) <= names(other)


@given(st.integers(5, 60), st.integers(0, 60), st.sampled_from([1, 3, 10, 256]), st.integers(0, 3), st.randoms())
def test_a_number_never_takes_a_problem_out_of_training(before, more, number, seed, random):
    old, new = problems(before), problems(before + more)
    random.shuffle(new)
    train, held_out = split(old, number, seed)
    assert 1 <= len(held_out) <= number and len(train) + len(held_out) == before
    assert names(train) <= names(split(new, number, seed)[0])


def test_shares_and_numbers_are_what_they_say():
    many = problems(5000)
    for share in (0.01, 0.2, 0.5):
        held_out = split(many, share, 0)[1]
        assert abs(len(held_out) - 5000 * share) < 4 * (5000 * share * (1 - share)) ** 0.5
    assert len(split(many, 256, 0)[1]) == 256
    assert abs(len(split(many, 4000, 0)[1]) - 1000) < 4 * 800**0.5, "a fifth of the hashes at most"
    assert names(split(many, 256, 0)[1]) < names(split(many, 0.2, 0)[1])
    assert names(split(many, 256, 1)[1]) != names(split(many, 256, 0)[1]), "problems.seed draws another set"


def test_places_are_the_same_for_ever():
    """Frozen: a change here would move problems of people's runs from one side to the other."""
    assert place(Problem("a", "p", "1", question="What is 1?"), 0) == pytest.approx(0.2332765, abs=1e-7)
    assert place(Problem("a", "p", "1", question="What is 1?"), 1) == pytest.approx(0.3631560, abs=1e-7)


def test_the_same_question_is_never_on_both_sides():
    rng = np.random.default_rng(0)
    spelled = ["What is {i}?", "  what IS\n{i}? ", "What is\u00a0{i}?", "WHAT IS {i}?"]
    many = [Problem(str(k), f"{k}", str(k), question=spelled[k % 4].format(i=i)) for k, i in enumerate(rng.integers(300, size=2000).tolist())]
    for held_out in (0.1, 0.5, 20, 256):
        train, kept = split(many, held_out, 0)
        assert train and kept and not {question_key(p) for p in train} & {question_key(p) for p in kept}
    assert question_key(Problem("a", "prompt", "1")) == "prompt"


def test_neither_template_nor_answer_nor_order_moves_a_problem(tmp_path):
    rows = [{"problem": f"What is {i}?", "answer": i} for i in range(50)]
    path, other = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    other.write_text("".join(json.dumps({**r, "answer": "x"}) + "\n" for r in rows[::-1]))
    chosen = [split(load(path), 0.3, 0)[1], split(load(other, template="Q: {problem}"), 0.3, 0)[1]]
    assert {p.question for p in chosen[0]} == {p.question for p in chosen[1]}


def test_settings_that_keep_none_or_all_apart(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text("".join(f'{{"problem": "{i}", "answer": "1"}}\n' for i in range(20)))
    read = lambda share: load_problems(config.load(None, ["policy.from_config=tiny", f"problems.path={path}", f"problems.held_out={share}"]))  # noqa: E731
    assert len(read(0.5)[1]) + len(read(0.5)[2]) == 20 and len(read(3)[2]) == 3
    with pytest.raises(ConfigError, match=r"problems\.held_out = 0\.0001 keeps 0 of 20 problems apart"):
        read(0.0001)
    with pytest.raises(ConfigError, match=r"problems\.held_out = 0\.9999 keeps 20 of 20 problems apart"):
        read(0.9999)


# --- fields ----------------------------------------------------------------------------------------------------------------------------


def test_alternative_fields_and_the_answer_behind_a_mark(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"question": "a", "answer": "1 + 1 = 2\\n#### 2"}\n{"problem": "b", "answer": "3"}\n')
    found = load(path, question="problem|question", answer="answer", answer_after="####")
    assert [(p.question, p.answer) for p in found] == [("a", "2"), ("b", "3")]
    path.write_text('{"problem": "a", "answer": "1 ####  "}\n')
    with pytest.raises(ProblemError, match="line 1: wanted an answer behind '####' in the field 'answer', got nothing"):
        load(path, answer_after="####")
    with pytest.raises(ProblemError, match=r"wanted a non-empty field 'q\|question', got the fields 'problem', 'answer'"):
        load(path, question="q|question")


# --- datasets ----------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def datasets(tmp_path, monkeypatch):
    found = pytest.importorskip("datasets", reason="the extra `data` is not installed")
    monkeypatch.setattr(found.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return found


ROWS = {"question": ["1+1?", "2+2?"], "answer": [2, 4], "id": ["x", "y"]}


def test_what_datasets_saved(tmp_path, datasets):
    datasets.Dataset.from_dict(ROWS).save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"test": datasets.Dataset.from_dict(ROWS)}).save_to_disk(tmp_path / "parts")
    expected = [("x", "1+1?", "2"), ("y", "2+2?", "4")]
    assert [(p.id, p.prompt, p.answer) for p in load(tmp_path / "one", question="question")] == expected
    assert [(p.id, p.prompt, p.answer) for p in load(tmp_path / "parts", question="question", split="test")] == expected
    with pytest.raises(ProblemError, match=r"cannot read .*parts: it has no split 'train', but 'test' \(problems\.split\)"):
        load(tmp_path / "parts", question="question")
    with pytest.raises(ProblemError, match=r"one, row 1: wanted a non-empty field 'problem', got the fields 'question', 'answer', 'id'"):
        load(tmp_path / "one")


def test_a_folder_of_data_files(tmp_path, datasets):
    """Through `load_dataset`, as the layout of a data set on the hub."""
    (tmp_path / "set" / "main").mkdir(parents=True)
    datasets.Dataset.from_dict(ROWS).to_parquet(tmp_path / "set" / "main" / "test-00000.parquet")
    (tmp_path / "set" / "README.md").write_text(
        "---\nconfigs:\n- config_name: main\n  data_files:\n  - split: test\n    path: main/test-*.parquet\n---\n"
    )
    found = load(tmp_path / "set", question="question", subset="main", split="test")
    assert [(p.id, p.prompt, p.answer) for p in found] == [("x", "1+1?", "2"), ("y", "2+2?", "4")]
    with pytest.raises(ProblemError, match=r"cannot read .*set: ") as caught:
        load(tmp_path / "set", question="question", subset="socratic", split="test")
    assert "\n" not in str(caught.value)


def test_a_name_on_the_hub_is_the_same_call(tmp_path, datasets, monkeypatch):
    """The hub cannot be reached here: the name, the configuration and the split are handed to `load_dataset` as those of a folder are."""
    calls = []

    def load_dataset(*args, **settings):
        calls.append((args, settings))
        return datasets.Dataset.from_dict(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    (tmp_path / "folder").mkdir()
    for path in ("hub:openai/gsm8k", str(tmp_path / "folder")):
        assert len(load(path, question="question", subset="main", split="test")) == 2
    load("hub:owner/name", question="question")
    assert calls == [
        (("openai/gsm8k", "main"), {"split": "test"}), ((str(tmp_path / "folder"), "main"), {"split": "test"}),
        (("owner/name", None), {"split": "train"}),
    ]  # fmt: skip


def test_a_hub_that_cannot_be_reached_is_one_line(tmp_path):
    pytest.importorskip("datasets", reason="the extra `data` is not installed")
    code = "from acpo.problems import load\ntry: load('hub:nobody/nothing')\nexcept ValueError as error: print(error)"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=120)
    assert done.stdout.startswith("problems.path: cannot read hub:nobody/nothing: ") and done.stdout.count("\n") == 1


def test_datasets_that_are_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ProblemError, match=r"problems\.path: hub:a/b needs datasets: pip install -e '\.\[data\]'"):
        load("hub:a/b")


# --- reasoning-gym -----------------------------------------------------------------------------------------------------------------------


def gym_settings(*more: str) -> config.Config:
    base = "policy.from_config=tiny", "problems.path=reasoning_gym:leg_counting,chain_sum", "problems.train=30", "problems.held_out=10"
    return config.load(None, [*base, *more])


@pytest.fixture
def gym():
    return pytest.importorskip("reasoning_gym", reason="the extra `reasoning-gym` is not installed")


def test_gym_problems(gym):
    task, train, held_out = load_problems(gym_settings("problems.template=Q: {problem}"))
    assert task is None and len(train) == 30 and len(held_out) == 10
    assert [p.cell for p in train[:4]] == ["leg_counting", "chain_sum"] * 2
    assert all(p.prompt == f"Q: {p.question}" and p.answer == p.data["entry"]["answer"] for p in train)
    keys = [question_key(p) for p in train + held_out]
    assert len(set(keys)) == 40
    again, more = load_problems(gym_settings("problems.template=Q: {problem}"))[1:], load_problems(gym_settings("problems.train=60"))[1:]
    assert again == (train, held_out), "the same for the same seed"
    assert [p.question for p in more[0][:30]] == [p.question for p in train] and [p.id for p in more[1]] == [p.id for p in held_out]
    assert names(load_problems(gym_settings("problems.seed=1"))[1]) == names(train)
    assert {p.question for p in load_problems(gym_settings("problems.seed=1"))[1]}.isdisjoint({p.question for p in train + held_out})


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["problems.path=reasoning_gym:leg_count"], "reasoning-gym has no task 'leg_count'; the nearest is 'leg_counting'"),
        (["problems.path=reasoning_gym:leg_counting", "problems.options={legs: 3}"], "the task 'leg_counting' refuses '{legs: 3}': .*'legs'"),
        (["problems.path=reasoning_gym:leg_counting", "problems.options={min_animals: 0}"], "the task 'leg_counting' refuses"),
        (["problems.options=3"], "problems.options must be a YAML mapping such as {min_digits: 2}, got '3'"),
        (["problems.held_out=0.1"], "problems.held_out must be a whole number for problems that are made"),
    ],
)
def test_bad_gym_settings(gym, overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_problems(gym_settings(*overrides))


def test_the_tasks_own_scorer_judges(gym):
    from acpo.verify import Verifier, kind_of

    chosen = gym_settings("problems.path=reasoning_gym:leg_counting,countdown", "verify.workers=1", "verify.timeout=60")
    train = load_problems(chosen)[1]
    verifier = Verifier(chosen.verify, kind_of(chosen))
    try:
        assert verifier.describe().startswith("reasoning-gym 0.1.")
        legs, countdown = train[0], next(p for p in train if p.cell == "countdown")
        expression = countdown.data["entry"]["metadata"]["expression"]
        texts = [f"<answer>{legs.answer}</answer>", rf"\boxed{{{legs.answer}}}", legs.answer, "<answer>-1</answer>"]
        found = verifier([legs] * 4 + [countdown] * 2, [*texts, f"<answer>{expression}</answer>", "<answer>1 + 1</answer>"])
        assert [v.status for v in found] == ["judged"] * 6
        rewards = [v.reward for v in found]
        assert rewards[:3] == [1.0] * 3 and rewards[3] < 1 and rewards[4] == 1.0 and rewards[5] < 1, "any right expression is right"
        assert 0 < rewards[5] < 0.2, "the scorer's own partial credit"
    finally:
        verifier.close()


def test_a_run_on_gym_problems(tmp_path, gym):
    from loop import records

    from acpo.cli import main

    (tmp_path / "gym.yaml").write_text(
        "problems: {path: 'reasoning_gym:leg_counting', train: 8, held_out: 4}\npolicy: {from_config: tiny, tokenizer: bytes, device: cpu}\n"
        "rollout: {prompts: 2, group_size: 2, max_new_tokens: 8}\nverify: {workers: 1}\ntrainer: {steps: 1}\neval: {samples: 0}\n"
    )
    assert main(["train", str(tmp_path / "gym.yaml"), f"run_dir={tmp_path / 'run'}"]) == 0
    assert [r["step"] for r in records(tmp_path / "run")] == [0, 1]
