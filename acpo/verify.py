"""Outcome rewards: what a rollout is worth, from its text alone."""

from __future__ import annotations

import re

import numpy as np

from .problems import Problem, extract_answer

_NUMBER = re.compile(r"[-+]?(\d+|\d{1,3}(,\d{3})+)(\.\d*)?", re.ASCII)


def normalise(answer: str) -> str:
    """The form in which answers are compared: no surrounding space or $, no thousands commas, no decimal zeros, no full stop."""
    text = answer.strip().strip("$").strip()
    if text.endswith("."):
        text = text[:-1]
    if not _NUMBER.fullmatch(text):
        return text
    digits = text.replace(",", "")
    return digits.rstrip("0").rstrip(".") if "." in digits else digits


def exact_match(problem: Problem, response: str, extract: str) -> bool:
    """Whether the answer in the response equals the problem's, after `normalise`. Digit strings keep their leading zeros."""
    answer = extract_answer(response, extract)
    return answer is not None and normalise(answer) == normalise(problem.answer)


def rewards(problems: list[Problem], responses: list[str], extract: str, rng: np.random.Generator) -> np.ndarray:
    """1.0 for a right answer, else 0.0; a problem with luck < 1 pays a right answer with that probability."""
    right = [exact_match(p, r, extract) for p, r in zip(problems, responses, strict=True)]
    paid = [ok and (p.luck >= 1 or rng.random() < p.luck) for p, ok in zip(problems, right, strict=True)]
    return np.array(paid, dtype=np.float64)
