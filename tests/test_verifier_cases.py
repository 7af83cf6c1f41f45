"""Other projects' graders on their own cases: ours agrees on all of them but those listed here by id, each with its reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from acpo.config import VerifyConfig
from acpo.problems import Problem
from acpo.verify import Verifier
from acpo.verify.answers import last_boxed, well_formed

COMMA = "a decimal comma; the case allows bare expressions alone, by default an answer is LaTeX, where 1,22 is a pair"
LINES = "inline LaTeX over several lines; the case allows LaTeX alone, by default the bare number is found"
ROUGH = "the case compares two digits, the default is six"

# The settings of the cases themselves: nothing to list.
WITH_OWN_OPTIONS: dict[str, str] = {}
# By default, the whole text given to math-verify.
AS_TEXT = {
    "mathverify-test_all-71": COMMA, "mathverify-test_all-132": LINES, "mathverify-test_all-133": LINES,
    "mathverify-test_all-586": ROUGH, "mathverify-test_all-605": ROUGH,
    "mathverify-test_all-901": "a relation for a set: the case allows the comparison in both directions, by default the other one alone",
    "mathverify-test_strict-8 strict=false": "f(x) and f(y): the case lets variables be renamed",
}  # fmt: skip
# By default: the last box is the answer, alone or with those that it is joined to.
BY_DEFAULT = AS_TEXT | {
    "mathverify-test_all-810": "a box in the middle and the final answer in words behind it: the box counts (verify.extract=text follows the words)",
    "mathverify-test_open_thoughts-134": "two boxed formulas with y_2 = between them are not joined into one answer",
}
GRADERS: dict[str, str] = {}
NORMAL_FORMS = {
    "miles-test_math_utils-70": "HELLO and hello: letter case counts in an answer of several letters",
    "miles-test_math_dapo_utils-58": "the special token is removed when the rollout is decoded; an empty answer cannot be a gold answer",
    "slime-test_rm_math_dapo-95": "an answer: articles count in words",
}
LATEX = {
    "all_bad_test-40": "floor of two numbers is read as a function of a pair",
    "all_bad_test-58": "a limit in pi is read",
    "all_bad_test-60": "a set whose elements are separated by , and ; is read",
}


@pytest.fixture(scope="module")
def cases(shared_data):
    folder = shared_data / "verifier_cases"

    def read(name: str) -> list[dict]:
        rows = [json.loads(line) for line in Path(folder, f"{name}.dev.jsonl").read_text(encoding="utf-8").split("\n") if line]
        for row in rows:
            if row.get("options", {}).get("strict") is False:
                row["id"] += " strict=false"
        assert rows
        return rows

    return read


@pytest.fixture(scope="module")
def verifier():
    pytest.importorskip("math_verify", reason="the extra `math` is not installed")
    verifier = Verifier(VerifyConfig(timeout=60.0), "math")
    yield verifier
    verifier.close()


def right(verifier: Verifier, pairs: list[tuple[str, str]], **settings) -> list[bool]:
    verifier.config = VerifyConfig(timeout=60.0, **settings)
    verifier.metrics()
    found = verifier([Problem("x", "p", gold) for gold, _ in pairs], [text for _, text in pairs])
    assert verifier.metrics()["verify/kills"] == 0
    return [v.reward == 1.0 for v in found]


def disagreements(rows: list[dict], found: list) -> set[str]:
    return {row["id"] for row, answer in zip(rows, found, strict=True) if answer != row["expected"]}


def test_math_verify_with_the_options_of_its_cases(cases, verifier):
    rows = cases("math_verify")
    names = {"precision": "float_rounding"}
    jobs = [(r["gold"], r["pred"], tuple(r["match_types"]), {names.get(k, k): v for k, v in r["options"].items()}) for r in rows]
    found = [future.result() for future in verifier.pool.submit(jobs)]
    assert disagreements(rows, [f.get("reward") == 1.0 for f in found]) == set(WITH_OWN_OPTIONS)


@pytest.mark.parametrize(("extract", "listed"), [("text", AS_TEXT), ("auto", BY_DEFAULT)])
def test_math_verify_by_default(cases, verifier, extract, listed):
    rows = cases("math_verify")
    assert disagreements(rows, right(verifier, [(r["gold"], r["pred"]) for r in rows], extract=extract)) == set(listed)


def test_graders(cases, verifier):
    """Answers of the graders that compare answers stand in a box for ours; a rollout with a box or words of its own stays as it is."""
    rows = cases("miles_graders")
    whole = [" " in r["pred"].strip() or "\\boxed" in r["pred"] for r in rows]
    found = right(verifier, [(r["gold"], r["pred"] if w else f"\\boxed{{{r['pred']}}}") for r, w in zip(rows, whole, strict=True)])
    assert disagreements(rows, found) == set(GRADERS)


def test_qwen_pairs(cases, verifier):
    """These come without a verdict: what mathematics says, and six digits."""
    rows = cases("qwen_grader_pairs")
    expected = {f"qwen-{i}": True for i in (0, 2, 3, 5, 7)} | {f"qwen-{i}": False for i in (9, 11, 12, 15)}  # 9, 15: rounded to three digits
    assert {r["id"] for r in rows} == set(expected)
    found = right(verifier, [(r["gold"], f"\\boxed{{{r['pred']}}}") for r in rows])
    assert dict(zip((r["id"] for r in rows), found, strict=True)) == expected


def test_extraction(cases):
    rows = [r for r in cases("answer_extraction") if "boxed" in r["test"] or "extract" in r["test"]]
    boxes = [last_boxed(r["input"]) for r in rows]
    found = [f"\\boxed{{{b}}}" if b is not None and "last_boxed" in r["test"] else b for r, b in zip(rows, boxes, strict=True)]
    assert len(rows) > 10 and disagreements(rows, found) == set()


def test_normal_forms(cases, verifier):
    """What others make equal by rewriting is equal for us as well."""
    rows = [r for r in cases("answer_extraction") if "boxed" not in r["test"] and "extract" not in r["test"]]
    found = right(verifier, [(r["expected"], f"\\boxed{{{r['input']}}}") for r in rows])
    assert len(rows) > 15 and {r["id"] for r, ok in zip(rows, found, strict=True) if not ok} == set(NORMAL_FORMS)


def test_formats_and_accuracy_of_trl(cases, verifier):
    rows = cases("trl_rewards")
    for row in rows:
        if row["kind"] == "think_format":
            assert well_formed(row["text"], "think") == bool(row["expected"]), row["id"]
            continue
        tag = "</REASONING_END>" if "REASONING_END" in row["text"] else "</think>"
        after = tag if row["kind"] == "reasoning_accuracy" else ""
        assert right(verifier, [(row["gold"], row["text"])], after=after) == [bool(row["expected"])], row["id"]


def test_latex_that_must_and_must_not_be_read(cases, verifier):
    """What must be read equals itself and is judged against a number; what must not is called unparseable, never wrong."""
    rows, wrong = cases("latex2sympy"), set()
    for row in rows:
        itself, number = (
            f.result() for f in verifier.pool.submit([(f"\\boxed{{{row['latex']}}}",) * 2, (r"\boxed{7}", f"\\boxed{{{row['latex']}}}")])
        )
        read = itself.get("reward") == 1.0 and number["status"] == "judged"
        if read if row["must"] == "fail" else not read:
            wrong.add(row["id"])
        if not read:
            assert number["status"] == "unparseable", row["id"]
    assert wrong == set(LATEX)


def test_reference_verdicts(cases, shared_data, verifier):
    """Every eighth row of what math-verify 0.9.0 says of whole data sets: the same, given its own extraction on one side and ours on the other."""
    reference = {(r["set"], r["id"]): r["math_verify"] for r in cases("reference_math_verify_0.9.0")}
    for name in ("scored_gsm8k_models", "scored_qwen_cot100", "traces_r1_math"):
        rows = [json.loads(line) for line in Path(shared_data, name, "dev.jsonl").read_text(encoding="utf-8").split("\n") if line][::8]
        pairs = [(r["gold"].rsplit("A:", 1)[-1].strip(), r.get("solution") or r["trace"]) for r in rows]
        expected = [reference[name, r["id"]] for r in rows]
        agree = sum(a == b for a, b in zip(right(verifier, pairs), expected, strict=True))
        assert agree >= 0.99 * len(rows), (name, agree, len(rows))
