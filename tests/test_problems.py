"""Problem files: every row of a good one, one clear line for a bad one."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path

import pytest

from acpo.problems import Problem, ProblemError, load

FIXTURE = Path(__file__).parent / "fixtures" / "problems.jsonl"


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "problems.jsonl"
    path.write_bytes(text.encode())
    return path


def test_fixture():
    problems = load(FIXTURE, template="Q: {problem}\nA:")
    assert len(problems) == 20 and len({p.id for p in problems}) == 20
    assert problems[0].id == "fixture-0" and problems[0].answer == "57"
    assert problems[0].prompt.startswith("Q: A farmer has 3 fields") and problems[0].prompt.endswith("left?\nA:")


def test_fields_ids_and_blank_lines(tmp_path):
    path = write(tmp_path, '{"q": "a{x}", "r": 7}\n\n  \r\n{"q": "b", "r": "8", "id": 5}\r\n')
    first, second = load(path, question="q", answer="r", template="<{problem}>{x}")
    assert (first.id, first.prompt, first.answer) == ("1", "<a{x}>{x}", "7")
    assert (second.id, second.prompt, second.answer) == ("5", "<b>{x}", "8")
    assert first.data == {"q": "a{x}", "r": 7}


def test_difficulty_cells(tmp_path):
    path = write(tmp_path, '{"problem": "a", "answer": "1", "level": 3}\n{"problem": "b", "answer": "2"}\n')
    assert [p.cell for p in load(path)] == ["", ""]
    with pytest.raises(ProblemError, match="line 2: wanted a non-empty field 'level', got the fields 'problem', 'answer'"):
        load(path, cell="level")
    assert load(write(tmp_path, '{"problem": "a", "answer": "1", "level": 3}'), cell="level")[0].cell == "3"


def test_separators_inside_a_string_do_not_end_a_line(tmp_path):
    question = "one\u2028two\u2029three\x85four\x0bfive"
    path = write(tmp_path, f'{{"problem": "{question}", "answer": "1"}}\n{{"problem": "next", "answer": "2"}}\n'.replace("\x0b", "\\u000b"))
    assert [p.prompt for p in load(path)] == [question, "next"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"problem": "a", "answer": "1"}\n{"problem": "b", "answer": }\n', "problems.jsonl, line 2: not valid JSON: .* at column 28"),
        ('{"problem": "a", "answer": "1"}\n\n{"problem": "b"', "problems.jsonl, line 3: not valid JSON"),
        ('["a", "1"]', "line 1: wanted a JSON object, got list"),
        ('{"question": "a", "answer": "1"}', "line 1: wanted a non-empty field 'problem', got the fields 'question', 'answer'"),
        ('{"problem": "a", "answer": "1"}\n{"problem": "a"}', "line 2: wanted a non-empty field 'answer', got the fields 'problem'"),
        ("{}", "line 1: wanted a non-empty field 'problem', got the fields none"),
        ('{"problem": " ", "answer": "1"}', "line 1: wanted a text or a number in the field 'problem', got str ' '"),
        ('{"problem": "a", "answer": null}', "line 1: wanted a text or a number in the field 'answer', got NoneType None"),
        ('{"problem": "a", "answer": ["1"]}', r"line 1: wanted a text or a number in the field 'answer', got list \['1'\]"),
        ('{"problem": "a", "answer": true}', "line 1: wanted a text or a number in the field 'answer', got bool True"),
        ('{"problem": "a", "answer": NaN}', "line 1: wanted a text or a number in the field 'answer', got float nan"),
        ('{"problem": "a", "answer": -1e999}', "line 1: wanted a text or a number in the field 'answer', got float -inf"),
        ('{"problem": "a \\ud83d b", "answer": "1"}', r"line 1: .* 'problem', got half of a surrogate pair, \\ud83d, at character 2"),
        ("", "problems.path: .*problems.jsonl holds no problem"),
        ("\n \n", "holds no problem"),
    ],
)
def test_bad_file(tmp_path, text, message):
    with pytest.raises(ProblemError, match=message) as caught:
        load(write(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_missing_and_unreadable_file(tmp_path):
    with pytest.raises(ProblemError, match=r"problems\.path: no such file: .*absent\.jsonl"):
        load(tmp_path / "absent.jsonl")
    with pytest.raises(ProblemError, match=r"problems\.path: cannot read"):
        load(tmp_path)
    (tmp_path / "latin.jsonl").write_bytes(b'{"problem": "caf\xe9", "answer": "1"}')
    with pytest.raises(ProblemError, match=r"problems\.path: cannot read"):
        load(tmp_path / "latin.jsonl")


@pytest.mark.parametrize(
    ("value", "answer"), [("0.00001", "0.00001"), ("1e23", "100000000000000000000000"), ("1.50", "1.5"), ("7", "7"), ('"1e5"', "1e5")]
)
def test_numbers_are_written_in_digits(tmp_path, value, answer):
    """As a rollout writes them and a verifier reads them, not as Python prints them."""
    assert load(write(tmp_path, f'{{"problem": "a", "answer": {value}}}'))[0].answer == answer


def test_an_id_that_is_null_is_none(tmp_path):
    path = write(tmp_path, '{"id": null, "problem": "a", "answer": "1"}\n{"id": 0, "problem": "b", "answer": "2"}')
    assert [p.id for p in load(path)] == ["1", "0"]


def test_hinted_prompt(tmp_path):
    path = write(tmp_path, '{"problem": "with {answer} in it", "answer": "{prompt}"}')
    (problem,) = load(path, hint="[{answer}] {prompt}")
    assert problem.hinted_prompt("9") == "[9] with {answer} in it", "braces of the problem are its own"
    assert Problem("x", "p", "a").hinted_prompt("3") == "The answer is 3.\np"
    for answer in (None, 4):
        with pytest.raises(TypeError, match=f"answer must be the text that stands in the prompt, got {answer}"):
            Problem("x", "p", "a").hinted_prompt(answer)
    assert problem.hinted_prompt("{prompt}") == "[{prompt}] with {answer} in it", "and so are the answer's"


def test_parquet_rows_are_problems(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "p.parquet"
    parquet.write_table(pyarrow.table({"id": ["x", "y"], "problem": ["1+1?", "2+2?"], "answer": [2, 4]}), path)
    assert [(p.id, p.prompt, p.answer) for p in load(path)] == [("x", "1+1?", "2"), ("y", "2+2?", "4")]
    parquet.write_table(pyarrow.table({"problem": ["price?"], "answer": [Decimal("1.50")]}), path)
    assert load(path)[0].answer == "1.50"
    parquet.write_table(pyarrow.table({"problem": ["1?", "2?"], "answer": [1.0, float("nan")]}), path)
    with pytest.raises(ProblemError, match=r"p\.parquet, row 2: wanted a text or a number in the field 'answer', got float nan"):
        load(path)
    parquet.write_table(pyarrow.table({"id": ["x", "y"], "problem": ["1+1?", "2+2?"], "answer": [2, 4]}), path)
    with pytest.raises(ProblemError, match=r"p\.parquet, row 1: wanted a non-empty field 'question', got the fields 'id', 'problem', 'answer'"):
        load(path, question="question")
    path.write_bytes(b"not parquet")
    with pytest.raises(ProblemError, match=r"cannot read .*p\.parquet"):
        load(path)
    with pytest.raises(ProblemError, match="no such file"):
        load(tmp_path / "q.parquet")
