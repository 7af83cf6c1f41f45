"""Verdicts: what each rollout is worth, and that nothing is called wrong which was not compared."""

from __future__ import annotations

import math

import numpy as np
import pytest

from acpo import config
from acpo.config import ConfigError, VerifyConfig
from acpo.problems import Problem
from acpo.verify import TAIL, Verdict, Verifier, boxed, kind_of, rewards


def verdicts(kind: str, cases: list[tuple[str, str]], **settings) -> list[Verdict]:
    verifier = Verifier(VerifyConfig(**settings), kind)
    try:
        return verifier([Problem("x", "p", gold) for gold, _ in cases], [text for _, text in cases])
    finally:
        verifier.close()


RIGHT, WRONG, UNREAD = Verdict(1.0, "judged"), Verdict(0.0, "judged"), Verdict(0.0, "unparseable")


def test_exact_match():
    assert verdicts("exact", [("042", "a1\nA042"), ("042", "a1\nA42"), ("042", "042")], extract="line") == [RIGHT, WRONG, UNREAD]
    assert verdicts("exact", [("1,000", r"It is \boxed{1000.}"), ("7", "no digits"), ("7", "")]) == [RIGHT, UNREAD, UNREAD]


@pytest.mark.parametrize(
    ("gold", "text", "verdict"),
    [
        ("4", "It is the fraction 3/4.", WRONG), ("3/4", "It is the fraction 3/4.", RIGHT), ("3/4", "It is 3 / 4.", RIGHT), ("1/2", "1 1/2", WRONG),
        ("4", "#### 3/4", WRONG), ("3/4", "#### 3/4", RIGHT), ("3/4", "#### 3/4 of it", RIGHT), ("5", "It is 7 of x/5", UNREAD),
        ("5", "$5/hour", RIGHT), ("5", "10/2 = 5", RIGHT),
        ("5", "x is \u22125", WRONG), ("-5", "x is \u22125", RIGHT), ("-5", r"\boxed{\u22125}", RIGHT),
        ("5", "the answer is .5", WRONG), ("0.5", "the answer is .5", RIGHT), ("-0.5", "-.50", RIGHT), ("5", "so ...5", RIGHT),
        ("Paris", "#### Paris", RIGHT), ("B", "#### (B)", RIGHT), ("(B)", r"\boxed{B}", RIGHT), ("B", "#### (A)", WRONG),
        ("x + 1", "#### x + 1", RIGHT), ("1", "#### x + 1", WRONG), ("(2,3)", "#### (2,3)", RIGHT), ("3", "#### (2,3)", WRONG),
        (r"\frac{3}{4}", r"#### \frac{3}{4}", RIGHT), ("4", r"#### \frac{3}{4}", WRONG), ("10:30", "#### 10:30", RIGHT),
        ("15", "10-15", RIGHT), ("-15", "10-15", WRONG), ("15", "(10)-15", RIGHT), ("-15", "= -15", RIGHT), ("-15", "x=-15", RIGHT),
        ("5", r"\boxed{+5}", RIGHT), ("0.5", r"\boxed{.5}", RIGHT), ("0", r"\boxed{-0}", RIGHT),
        ("0", r"\boxed{-0.0}", RIGHT), ("-5", r"\boxed{+5}", WRONG),
        ("-0.5", r"\boxed{-.5}", RIGHT), ("5", r"\boxed{.5}", WRONG), ("", r"\boxed{.}", RIGHT),
        ("0", r"\boxed{-}", WRONG), ("0", r"\boxed{+}", WRONG),
    ],
)  # fmt: skip
def test_exact_match_takes_the_whole_answer_and_its_sign(gold, text, verdict):
    text = text.replace(r"\u2212", "\u2212")  # in a raw string
    assert verdicts("exact", [(gold, text)]) == [verdict]


@pytest.mark.parametrize(
    "text",
    [
        "72", " 72 ", "$72", r"\$72", "72.", "72.00", "$72.00", "+72", "72 clips", "72%", r"72\%", "**72**", "(72)", "5 + 67 = 72", "x = 72",
        "$72 a day",
        "72 g", "Natalia's clips: 72", "10 + 62 is 72", r"72 \text{ clips}", "72\nand more", "= 72", "72!", "~72", "72 (all of them)", "72/hour",
    ],
)  # fmt: skip
def test_numbers_behind_the_mark_of_gsm8k(text):
    assert verdicts("exact", [("72", f"48/2 = <<48/2=24>>24\n#### {text}")]) == [RIGHT]
    assert verdicts("exact", [("1072", f"#### {text.replace('72', '1,072')}")]) == [RIGHT]


def test_format_gate_and_the_part_that_is_looked_at():
    cases = [("4", "<think>5</think>4"), ("4", "4"), ("4", "<think>4</think>5"), ("4", "<think>4</think>")]
    assert verdicts("exact", cases, format="think") == [RIGHT, Verdict(0.0, "malformed"), WRONG, RIGHT]
    assert verdicts("exact", cases, after="</think>") == [RIGHT, UNREAD, WRONG, UNREAD]


def test_luck():
    problems = [Problem("a", "p", "1"), Problem("b", "p", "2"), Problem("c", "p", "3", luck=0.0)]
    assert rewards(problems, [RIGHT, WRONG, RIGHT], np.random.default_rng(0)) == [1.0, 0.0, 0.0]
    lucky = [Problem("d", "p", "4", luck=0.3)] * 4000
    mean = np.mean(rewards(lucky, [RIGHT] * 4000, np.random.default_rng(0)))
    assert abs(mean - 0.3) < 4 * (0.3 * 0.7 / 4000) ** 0.5
    assert sum(rewards(lucky, [WRONG] * 4000, np.random.default_rng(0))) == 0.0, "luck never pays a wrong answer"
    assert math.isnan(rewards(lucky[:1], [Verdict(None, "skipped")], np.random.default_rng(0))[0])
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        rewards(problems, [RIGHT], np.random.default_rng(0))


def test_metrics_are_those_since_the_last_call():
    verifier = Verifier(VerifyConfig(format="boxed"), "exact")
    verifier([Problem("x", "p", "1")] * 3, [r"\boxed{1}", "1", "2"])
    first = verifier.metrics()
    assert first["verify/malformed"] == 2 and first["verify/unparseable"] == first["verify/skipped"] == first["verify/kills"] == 0
    assert first["verify/seconds"] > 0 and verifier.metrics()["verify/malformed"] == 0 and verifier.describe() == "exact match"
    verifier.close()


def test_kinds():
    kind = lambda *overrides: kind_of(config.load(None, ["policy.from_config=tiny", *overrides]))  # noqa: E731
    assert kind("problems.task=chain") == kind("problems.path=x.jsonl") == "exact"
    assert kind("problems.path=reasoning_gym:leg_counting") == "reasoning_gym"
    assert kind("problems.path=reasoning_gym:leg_counting", "verify.kind=exact") == "exact"
    assert kind("problems.path=x.jsonl", "verify.kind=a.b:c") == "a.b:c" and kind("problems.path=x.jsonl", "verify.kind=a.b") == "a.b"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("verify.kind=maths", "verify.kind must be one of 'auto', 'exact', 'math', 'reasoning_gym' or the dotted path .*did you mean 'math'"),
        ("verify.kind=os;exit", "verify.kind must be one of"),
        ("verify.kind=reasoning_gym", "needs problems.path = 'reasoning_gym:TASK', got 'x.jsonl'"),
        ("verify.timeout=0", "verify.timeout must be greater than 0, got 0"),
        ("verify.workers=-1", "verify.workers must be at least 0"),
        ("verify.extract=box", "verify.extract must be one of .*did you mean 'boxed'"),
        ("verify.on_timeout=wrong", "verify.on_timeout must be one of 'zero', 'skip'"),
        ("problems.system=Be brief.", "problems.system needs problems.chat = true"),
        ("problems.held_out=1.5", "problems.held_out must be a share below 1 or a whole number, got 1.5"),
    ],
)
def test_bad_settings(override, message):
    with pytest.raises(ConfigError, match=message):
        config.load(None, ["policy.from_config=tiny", "problems.path=x.jsonl", override])


def test_math_verify_that_is_not_installed(monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"verify.kind = 'math' needs math-verify: pip install -e '.\[math\]'"):
        Verifier(VerifyConfig(), "math")


@pytest.fixture(scope="module")
def mathematics():
    pytest.importorskip("math_verify", reason="the extra `math` is not installed")
    verifier = Verifier(VerifyConfig(timeout=20.0), "math")
    yield verifier
    verifier.close()


def ask(verifier: Verifier, gold: str, text: str, **settings) -> Verdict:
    before, verifier.config = verifier.config, VerifyConfig(**settings)
    try:
        return verifier([Problem("x", "p", gold)], [text])[0]
    finally:
        verifier.config = before


@pytest.mark.parametrize(
    ("gold", "text", "verdict"),
    [
        (r"\frac{1}{2}", r"so \boxed{0.5}.", RIGHT), ("0.5", r"\boxed{\frac12}", RIGHT), ("58,500", r"\boxed{58500}", RIGHT),
        (r"\$30", r"\boxed{30}", RIGHT),
        ("30", r"\boxed{\$30}", RIGHT), ("33", r"\boxed{033}", RIGHT), ("36.0", r"\boxed{36}", RIGHT), ("x=5", r"\boxed{5}", RIGHT),
        ("2, 3", r"$\boxed{2} \text{ and } \boxed{3}$", RIGHT), ("3", r"$\boxed{2}$ or $\boxed{3}$ or $\boxed{4}$", WRONG),
        ("1", r"\boxed{1}. Wait, no: \boxed{2}", WRONG), ("2", r"\boxed{1}. Wait, no: \boxed{2}", RIGHT), ("$x^2$", r"\boxed{x \cdot x}", RIGHT),
        ("7", "The answer is 7.", RIGHT), ("7", "We get 7 and then 8.", WRONG), ("2", r"It is $\frac{1+\sqrt{5}}{2}$", WRONG),
        ("18", "16 - 3 = 13\n#### 18", RIGHT), ("18", "<answer>18</answer>", RIGHT), ("7", "no answer at all", UNREAD), ("7", "", UNREAD),
        ("7", r"\boxed{}", UNREAD), ("7", r"\boxed{\frac{}", UNREAD), ("7", r"\boxed{\frac{}}", UNREAD), ("Evelyn", r"\boxed{\text{Evelyn}}", RIGHT),
        ("", r"\boxed{1}", Verdict(None, "gold")),
    ],
)  # fmt: skip
def test_math(mathematics, gold, text, verdict):
    assert ask(mathematics, gold, text) == verdict


@pytest.mark.parametrize("gold", ["3", r"\frac{6}{2}", "2", r"\frac{4}{2}", "2,3", "3, 2"])
def test_the_spelling_of_the_gold_answer_does_not_choose_among_joined_boxes(mathematics, gold):
    """`same(last box, gold)` stood before the joining: 3 was right, 6/2 and 2 were wrong."""
    assert ask(mathematics, gold, r"the roots are \boxed{2} and \boxed{3}") == (RIGHT if "," in gold else WRONG)
    assert ask(mathematics, "3", r"$\boxed{3}$, $\boxed{3}$") == RIGHT, "one answer twice is one answer"


def test_where_math_looks(mathematics):
    assert ask(mathematics, "7", "The answer is 7.", extract="boxed") == UNREAD
    assert ask(mathematics, "7", "8 then 7", extract="number") == RIGHT and ask(mathematics, "7", "none", extract="number") == UNREAD
    assert ask(mathematics, "7", "the answer is 7." + " " * TAIL) == UNREAD, "an answer without a mark is looked for at the end"
    assert ask(mathematics, "7", "the answer is 7." + " " * TAIL, extract="text") == RIGHT
    assert ask(mathematics, "7", r"\boxed{7}" + " " * TAIL) == RIGHT


def test_equal_questions_are_asked_once_and_equal_answers_not_at_all(mathematics, monkeypatch):
    asked = []
    real = mathematics.pool.submit
    monkeypatch.setattr(mathematics.pool, "submit", lambda jobs: asked.append(jobs) or real(jobs))
    same = [Problem("x", "p", "0.5")] * 4
    assert mathematics(same, [r"\boxed{1/2}", r"\boxed{.50}", r"\boxed{1/2}", r"\boxed{0.50}"]) == [RIGHT] * 4
    assert asked == [[(r"\boxed{0.5}", r"\boxed{1/2}"), (r"\boxed{0.5}", r"\boxed{.50}")]]


def test_how_an_answer_is_written_for_math_verify():
    assert boxed("1") == r"\boxed{1}" and boxed("$1$") == "$1$" and boxed(r"\$30") == r"\boxed{\$30}" and boxed(r"\(1\)") == r"\(1\)"


def test_the_versions_are_said(mathematics):
    assert mathematics.describe().startswith("math-verify 0.9.") and "20 s a rollout" in mathematics.describe()
