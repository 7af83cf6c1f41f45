"""Outcome rewards: exact match after a normal form that never makes two answers one."""

from __future__ import annotations

import numpy as np
import pytest

from acpo.problems import Problem
from acpo.verify import exact_match, normalise, rewards


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("1,234", "1234"), ("1234.00", "1234"), ("0.50", "0.5"), (" 7 ", "7"), ("$7$", "7"), ("$1,234.50", "1234.5"), ("7.", "7"), ("-3.0", "-3"),
        ("x + 1", "x + 1"), (r"\frac{1}{2}", r"$\frac{1}{2}$"),
    ],
)  # fmt: skip
def test_same(one, other):
    assert normalise(one) == normalise(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("1", "10"), ("007", "7"), ("1.5", "15"), ("1.5e10", "1.5e1"), ("1,2", "12"), ("1,23", "123"), ("-3", "3"), ("x", "X"), ("0.5", "5"),
        ("100", "1"), ("", "0"), ("1_0", "10"),
    ],
)  # fmt: skip
def test_not_the_same(one, other):
    assert normalise(one) != normalise(other)


def test_exact_match():
    problem = Problem("x", "p", "042")
    assert exact_match(problem, "a1\nA042", "line") and not exact_match(problem, "a1\nA42", "line")
    assert not exact_match(problem, "042", "line"), "no answer is not an answer"
    assert exact_match(Problem("x", "p", "1,000"), r"It is \boxed{1000.}", "auto")


def test_rewards_and_luck():
    problems = [Problem("a", "p", "1"), Problem("b", "p", "2"), Problem("c", "p", "3", luck=0.0)]
    assert rewards(problems, ["A1", "A1", "A3"], "line", np.random.default_rng(0)).tolist() == [1.0, 0.0, 0.0]
    lucky = [Problem("d", "p", "4", luck=0.3)] * 4000
    mean = rewards(lucky, ["A4"] * 4000, "line", np.random.default_rng(0)).mean()
    assert abs(mean - 0.3) < 4 * (0.3 * 0.7 / 4000) ** 0.5
    assert rewards(lucky, ["A5"] * 4000, "line", np.random.default_rng(0)).sum() == 0.0, "luck never pays a wrong answer"
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        rewards(problems, ["A1"], "line", np.random.default_rng(0))
