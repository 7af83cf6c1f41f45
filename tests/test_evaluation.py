"""pass@k, majority@k and their intervals against counting by hand, and `acpo eval` on models, files and known data sets."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from acpo import presets
from acpo.cli import main
from acpo.config import ConfigError, VerifyConfig
from acpo.evaluation import CHUNK, bootstrap, evaluate, majority_at_k, pass_at_k
from acpo.problems import Problem
from acpo.rollout import Sample
from acpo.verify import Verifier, VerifyError

FIXTURE = Path(__file__).parent / "fixtures" / "problems.jsonl"
NAN = math.nan


@pytest.fixture(autouse=True)
def one_thread(deterministic):
    torch.set_num_threads(1)


@pytest.mark.parametrize("n", [1, 3, 6])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(n):
    for k in range(1, n + 1):
        for c in range(n + 1):
            subsets = list(itertools.combinations([1] * c + [0] * (n - c), k))
            assert pass_at_k(np.array([c]), n, k)[0] == pytest.approx(np.mean([any(s) for s in subsets]))
    assert pass_at_k(np.array([1, 1, 0]), np.array([2, 4, 1]), 2).tolist() == pytest.approx([1.0, 0.5, NAN], nan_ok=True)


def test_majority_at_k():
    right = np.array([[1.0, 0.0, 0.0, 1.0], [1.0, 0.0, 0.0, 1.0], [NAN, 1.0, NAN, 1.0], [0.0, 0.0, 0.0, 0.0]])
    answers = [["7", "8", "8", "7"], ["7", "8", "9", "7"], ["5", "7", "5", "7"], [None, None, None, None]]
    assert majority_at_k(right, answers, 4).tolist() == pytest.approx([1.0, 1.0, NAN, 0.0], nan_ok=True)  # of equals the first; left out: no vote
    assert majority_at_k(right, answers, 2).tolist() == [0.5, 0.5, 1.0, 0.0]  # blocks (7, 8), (8, 7) and (7, 8), (9, 7)
    assert majority_at_k(right, answers, 3).tolist() == pytest.approx([0.0, 1.0, NAN, 0.0], nan_ok=True)
    assert majority_at_k(right, [[None, "8", "8", None]] * 4, 4)[0] == 0.0
    assert majority_at_k(np.array([[0.0, 1.0]]), [[None, "3"]], 2)[0] == 1.0, "a rollout without an answer has no vote"


def test_bootstrap():
    values = np.array([0.0, 1.0] * 100)
    low, high = bootstrap(values)
    assert abs(low - (0.5 - 1.96 * 0.5 / 200**0.5)) < 0.01 and abs(high - (0.5 + 1.96 * 0.5 / 200**0.5)) < 0.01, "the normal one, for so many"
    assert bootstrap(values) == bootstrap(values)
    assert bootstrap(np.array([1.0, NAN, 1.0])) == (1.0, 1.0) and all(map(math.isnan, bootstrap(np.array([NAN]))))


def test_bootstrap_covers():
    """The 95 % interval of 60 problems holds the truth in 90 to 99 of a hundred samples."""
    rng = np.random.default_rng(0)
    held = sum(low <= 0.3 <= high for low, high in (bootstrap((rng.random(60) < 0.3).astype(float), resamples=1000) for _ in range(400)))
    assert 0.90 <= held / 400 <= 0.99


class Scripted:
    """An engine that writes texts: one greedy, and one after the other when it samples."""

    def __init__(self, greedy: dict[int, str], sampled: dict[int, list[str]]):
        self.greedy, self.sampled = greedy, {k: iter(v) for k, v in sampled.items()}
        self.calls: list[int] = []

    def generate(self, prompts, *, max_new_tokens, temperature, generator):
        self.calls.append(len(prompts))
        texts = [self.greedy[p[0]] if temperature == 0 else next(self.sampled[p[0]]) for p in prompts]
        return [Sample(torch.tensor(list(t.encode())), torch.zeros(len(t)), True) for t in texts]


class Bytes:
    @staticmethod
    def batch_decode(ids, skip_special_tokens):
        return [bytes(i.tolist()).decode() for i in ids]


def scripted(greedy, sampled, samples, verifier=None, **settings):
    problems = [Problem(str(i), "p", "7") for i in greedy]
    engine = Scripted(greedy, sampled)
    verifier = verifier or Verifier(VerifyConfig(), "exact")
    told = []
    found = evaluate(
        engine, Bytes, problems, [[i] for i in greedy], verifier, max_new_tokens=8, samples=samples, generator=torch.Generator(),
        advance=told.append, **settings,
    )  # fmt: skip
    return found, engine, told


def test_the_figures_of_an_evaluation():
    sampled = {0: ["7", "8", "7.0", "9"], 1: ["8", "8", "7", "x"], 2: ["1", "2", "3", "4"]}
    found, engine, told = scripted({0: "7", 1: "so 7", 2: "8"}, sampled, 4, ks=[1, 2, 4], intervals=True)
    assert found.values == pytest.approx({
        "eval/accuracy": 2 / 3, "eval/pass@1": (2 / 4 + 1 / 4) / 3, "eval/pass@2": (5 / 6 + 3 / 6) / 3, "eval/pass@4": 2 / 3,
        "eval/majority@2": (1 + 0.5) / 3, "eval/majority@4": 1 / 3,
    })  # fmt: skip
    assert set(found.intervals) == set(found.values) and found.verify["verify/unparseable"] == 1
    assert sum(engine.calls) == sum(told) == 3 + 12


def test_what_is_left_out_is_not_counted():
    verifier = Verifier(VerifyConfig(workers=1), "verifiers:moody")
    try:
        found, *_ = scripted({0: "7", 1: "skip", 2: "8"}, {0: ["7", "skip"], 1: ["skip", "skip"], 2: ["8", "7"]}, 2, verifier)
    finally:
        verifier.close()
    assert found.values == pytest.approx({"eval/accuracy": 0.5, "eval/pass@1": (1.0 + 0.5) / 2, "eval/pass@2": 1.0, "eval/majority@2": 0.0})
    assert found.verify["verify/skipped"] == 4


def test_one_problem_that_raises_ends_no_evaluation():
    """Alone in the last chunk, or in all of its samples: it is left out. That all raise is judged over the whole."""
    verifier, count = Verifier(VerifyConfig(workers=1), "verifiers:moody"), CHUNK + 1
    greedy = {i: "raise" if i == CHUNK else "7" for i in range(count)}
    try:
        found, *_ = scripted(greedy, {}, 0, verifier)
        assert found.values == {"eval/accuracy": 1.0} and found.verify["verify/errors"] == found.verify["verify/skipped"] == 1
        with pytest.raises(VerifyError, match="raised for every rollout: RuntimeError: no reason"):
            scripted(dict.fromkeys(range(count), "raise"), {}, 0, verifier)
    finally:
        verifier.close()


def test_the_vote_is_on_what_is_judged():
    """A callable judges the whole response: without a mark or a number the vote is on all of it."""
    verifier = Verifier(VerifyConfig(workers=1), "verifiers:moody")
    try:
        assert [verifier.answer(text) for text in ("yes", " yes.", "so \\boxed{yes}", "it is 7.0")] == ["yes", "yes", "yes", "7"]
        sampled = {0: ["yes", "no", "yes", "yes"], 1: ["no", "no", "yes", "no"]}
        problems, engine = [Problem(str(i), "p", "yes") for i in sampled], Scripted({0: "yes", 1: "yes"}, sampled)
        found = evaluate(engine, Bytes, problems, [[0], [1]], verifier, max_new_tokens=8, samples=4, generator=torch.Generator())
        assert found.values == {"eval/accuracy": 1.0, "eval/pass@1": 0.5, "eval/pass@4": 1.0, "eval/majority@4": 0.5}
    finally:
        verifier.close()


def test_rollouts_are_asked_for_in_chunks():
    count = CHUNK + 10
    _, engine, told = scripted(dict.fromkeys(range(count), "7"), {i: ["7", "8"] for i in range(count)}, 2)
    assert engine.calls == told == [CHUNK, 10, CHUNK, CHUNK, 20]


# --- the command --------------------------------------------------------------------------------------------------------------------------

TINY = "policy.from_config=tiny", "policy.device=cpu", "trainer.threads=1"


def evaluated(capsys, *arguments: str) -> dict:
    assert main(["eval", "--json", *arguments]) == 0
    out = capsys.readouterr()
    assert out.err == ""
    return json.loads(out.out)


def test_a_model_folder_on_all_problems_of_a_file(tmp_path, capsys, finished_run):
    path = tmp_path / "p.jsonl"
    path.write_text('{"problem": "1a2b2=", "answer": "1"}\n{"problem": "0a1b1=", "answer": "2"}\n')
    arguments = "--model", str(finished_run / "policy"), f"problems.path={path}", "--samples", "3", "--k", "2,3", "verify.extract=line"
    found = evaluated(capsys, *arguments, "policy.device=cpu", "rollout.max_new_tokens=14")
    assert found["problems"] == 2 and "step" not in found and {"eval/pass@2", "eval/majority@3"} <= set(found) and "eval/pass@1" not in found
    assert main(["eval", *arguments, "policy.device=cpu", "rollout.max_new_tokens=14"]) == 0
    shown = capsys.readouterr().out
    assert "2 problems of" in shown
    assert "majority@3" in shown and "3 samples a problem at temperature 1" in shown
    word = evaluated(capsys, *arguments[:3], "eval.samples=2", "verify.extract=line", "policy.device=cpu", "rollout.max_new_tokens=14")
    assert word["samples"] == 2 and {"eval/pass@1", "eval/pass@2"} <= set(word), "the setting as well as the option"


def test_a_run_on_other_problems(tmp_path, capsys, finished_run):
    path = tmp_path / "p.jsonl"
    path.write_text('{"problem": "1a2b2=", "answer": "1"}\n' * 3)
    found = evaluated(capsys, str(finished_run), "--path", str(path), f"policy.tokenizer={finished_run / 'policy'}", "--samples", "0")
    assert found["step"] == 8 and found["problems"] == 3 and set(found["intervals"]) == {"eval/accuracy"}


def test_presets_name_what_they_set():
    for name in presets.PRESETS:
        assert {"problems.question", "problems.answer", "problems.template", "verify.extract", "verify.kind", "rollout.max_new_tokens"} <= set(
            presets.preset(name)
        )
    with pytest.raises(ConfigError, match="--preset must be one of aime, amc, math500, gsm8k, got 'mmlu'"):
        presets.preset("mmlu")


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("gsm8k", '{"question": "1+1?", "answer": "1+1=<<1+1=2>>2\\n#### 2"}\n{"problem": "2+2?", "answer": "4"}\n'),
        ("aime", '{"problem": "2+2?", "answer": 4}\n{"question": "1+1?", "answer": "002"}\n'),
        ("amc", '{"problem": "1+1?", "answer": 2.0}\n'),
        ("math500", '{"problem": "half?", "answer": "\\\\frac{1}{2}", "unique_id": "test/1", "level": 3}\n'),
    ],
)
def test_presets_on_small_files(tmp_path, capsys, name, rows):
    if presets.PRESETS[name]["verify.kind"] == "math":
        pytest.importorskip("math_verify", reason="the extra `math` is not installed")
    path = tmp_path / "p.jsonl"
    path.write_text(rows)
    arguments = "--preset", name, "--path", str(path), "--samples", "0", "policy.tokenizer=bytes", "rollout.max_new_tokens=4", "verify.workers=1"
    found = evaluated(capsys, *TINY, *arguments)
    assert found["problems"] == rows.count("\n") and ("math-verify" in found["verifier"]) == (name != "gsm8k")


@pytest.mark.parametrize("name", ["gsm8k", "math500"])
def test_presets_on_the_real_files(capsys, shared_data, name):
    """A random policy with the real vocabulary: the path, not the score."""
    if name == "math500":
        pytest.importorskip("math_verify", reason="the extra `math` is not installed")
    path = shared_data / name / "dev.jsonl"
    arguments = "--preset", name, "--path", str(path), "--samples", "2", "rollout.max_new_tokens=8", "eval.max_problems=6"
    found = evaluated(capsys, *TINY, *arguments, f"policy.tokenizer={shared_data / 'tokenizer_qwen2'}")
    assert found["problems"] == 6 and found["eval/accuracy"] == 0.0 and found["eval/pass@2"] == 0.0


@pytest.mark.parametrize("name", ["gsm8k", "math500"])
def test_right_answers_to_the_real_files_are_right(shared_data, name):
    """The data's own solutions, judged as the preset judges: all right, and the same against the next problem's answer as good as never."""
    from acpo import config
    from acpo.sources import read
    from acpo.verify import kind_of

    if name == "math500":
        pytest.importorskip("math_verify", reason="the extra `math` is not installed")
    path = shared_data / name / "dev.jsonl"
    chosen = config.load(None, [*TINY, f"problems.path={path}", "verify.timeout=60"], ("--preset", presets.preset(name)))
    problems = read(chosen.problems)[:295]
    assert problems[0].prompt.startswith(problems[0].question + "\nReason step by step")
    texts = [f"{p.data['solution']}\n" for p in problems]
    verifier = Verifier(chosen.verify, kind_of(chosen))
    try:
        own, other = verifier(problems, texts), verifier(problems, texts[1:] + texts[:1])
    finally:
        verifier.close()
    wrong = [(p.id, p.answer, v) for p, v in zip(problems, own, strict=True) if v.reward != 1.0]
    assert not wrong
    by_chance = sum(v.reward == 1.0 for v in other)
    assert by_chance < 0.06 * len(problems), by_chance
