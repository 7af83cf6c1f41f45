"""What counts as the answer of a rollout, a normal form that never makes two answers one, and the format gate."""

from __future__ import annotations

import time

import pytest

from acpo.verify.answers import extract_answer, last_boxed, last_boxes, last_tag, marked_answer, normalise, same, well_formed


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("1,234", "1234"), ("1234.00", "1234"), ("0.50", "0.5"), (" 7 ", "7"), ("$7$", "7"), ("$1,234.50", "1234.5"), ("7.", "7"), ("-3.0", "-3"),
        ("x + 1", "x + 1"), (r"\frac{1}{2}", r"$\frac{1}{2}$"), (r"\$480", "480"), (r"$\$1,234.50$", "1234.5"),
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


@pytest.mark.parametrize(
    ("text", "boxed"),
    [
        (r"so \boxed{3} and \boxed{\frac{1}{2}} end", r"\frac{1}{2}"), (r"\boxed{}", ""), (r"\boxed{1", None), ("none", None),
        (r"\boxed{4} then \boxed{5", None), (r"\boxed{\{1,2\}}", r"\{1,2\}"),
    ],
)  # fmt: skip
def test_last_boxed(text, boxed):
    assert last_boxed(text) == boxed


@pytest.mark.parametrize(
    ("how", "text", "answer"),
    [
        ("line", "a31\nA42", "42"), ("line", "A1\nb\nA2", "2"), ("line", "A42\n", "42"), ("line", "a\nxA4", None), ("line", "A", ""),
        ("boxed", r"7 is \boxed{8}", "8"), ("boxed", "7", None),
        ("number", r"\boxed{8} or 9", "9"), ("number", "no", None), ("number", "costs $1,234.50.", "1,234.50"), ("number", "x = -3", "-3"),
        ("number", "the first 3, the other 12,", "12"), ("number", "the roots 3,4", "4"), ("number", "12,345,678", "12,345,678"),
        ("auto", r"3 \boxed{8} 9", "8"), ("auto", "3\n#### 1,000\n", "1,000"), ("auto", "#### 5\n#### 6 apples", "6"), ("auto", "3 then 4", "4"),
        ("auto", "", None), ("auto", "7 #### none", None),
    ],
)  # fmt: skip
def test_extract_answer(how, text, answer):
    assert extract_answer(text, how) == answer


@pytest.mark.parametrize(
    ("text", "boxes"),
    [
        (r"$\boxed{2} \text{ and } \boxed{3}$.", r"\boxed{2} \text{ and } \boxed{3}"), (r"\boxed{1}, \boxed{\frac{1}{2}} or \boxed{3}", None),
        (r"\boxed{3}. No wait, \boxed{4}", "4"), (r"\boxed{3}" + " " * 61 + r"\boxed{4}", "4"), ("none", None),
        (r"\(\boxed{1}\) and \(\boxed{-2}\)", r"\boxed{1}\) and \(\boxed{-2}"), (r"\boxed{1 and \boxed{2}", "2"),
    ],
)  # fmt: skip
def test_boxes_of_one_answer(text, boxes):
    assert last_boxes(text) == (boxes or (text if "boxed" in text else None))


def test_tags_and_marks():
    assert last_tag("<answer>1</answer> then <answer> a b\n</answer>.") == "a b"
    assert last_tag("</answer><answer>") is None and last_tag("<answer>") is None
    assert marked_answer(r"\boxed{1} <answer>2</answer>", "auto") == "1" and marked_answer("#### x + 1\nbye", "auto") == "x + 1"
    assert marked_answer("<answer>2</answer>\n#### 3", "auto") == "2" and marked_answer("3", "auto") is None
    assert marked_answer("#### 3", "boxed") is None and marked_answer("3", "number") is None and marked_answer("####", "auto") is None
    assert extract_answer("<answer>two</answer>", "auto") == "two" and extract_answer(" all of it ", "text") == " all of it "
    assert same("1,000.", " $1000$ ") and not same("007", "7")


@pytest.mark.parametrize(
    ("form", "text", "passes"),
    [
        ("none", "", True), ("boxed", r"\boxed{}", True), ("boxed", r"\boxed{1", False), ("boxed", "1", False), ("think", "<think>a</think>b", True),
        ("think", "<think>a\n\n</think>\nb", True), ("think", " <think>a</think>b", False),
        ("think", "<think>a", False), ("think", "a</think>b", False),
        ("think", "<think>a</think><think>b</think>", False),
    ],
)  # fmt: skip
def test_format_gate(form, text, passes):
    assert well_formed(text, form) is passes


@pytest.mark.parametrize(
    "text",
    [
        "\\boxed{" * 150_000, "\\boxed{" + "{" * 1_000_000, "\\boxed{1}, " * 80_000, "1" * 1_000_000, "1,111" * 200_000, "$" * 1_000_000,
        "<answer>" * 120_000, "</answer>" * 110_000, "#### " * 200_000, "\x00" * 1_000_000, "<think>" * 140_000, "A\n" * 500_000, "}{" * 500_000,
    ],
    ids=lambda text: repr(text[:12]),
)  # fmt: skip
def test_a_megabyte_of_anything_takes_linear_time(text):
    """Not a benchmark: a quadratic scan of a megabyte would take minutes."""
    begin = time.process_time()
    for how in ("auto", "line", "boxed", "tag", "number", "text"):
        extract_answer(text, how), marked_answer(text, how)
    last_boxes(text), normalise(text), well_formed(text, "think"), well_formed(text, "boxed")
    assert time.process_time() - begin < 20
