"""Problems and where they come from. A source yields `Problem`s; what a rollout is worth is verify.py's business."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HINT = "The answer is {answer}.\n{prompt}"  # the prompt of the hindsight stream


class ProblemError(ValueError):
    """A problem file that cannot be used: the message names the file, the line and the field."""


@dataclass(frozen=True)
class Problem:
    """One question with its verifiable answer.

    prompt is the text in front of the rollout, hinted_prompt(a) the same with an answer in it (the hindsight stream). luck is the
    probability with which a right answer is rewarded (1 everywhere but in the task T3).
    """

    id: str
    prompt: str
    answer: str
    cell: str = ""  # difficulty cell: problems of one cell share a curriculum posterior; empty: the problem is its own cell
    luck: float = 1.0
    hint: str = HINT
    data: dict[str, Any] = field(default_factory=dict, compare=False, hash=False)

    def hinted_prompt(self, answer: str) -> str:
        return filled(self.hint, prompt=self.prompt, answer=answer)


def filled(template: str, **values: str) -> str:
    """The template with each {name} replaced by its value, whatever stands in the values."""
    return re.sub("|".join(re.escape(f"{{{name}}}") for name in values), lambda found: values[found[0][1:-1]], template)


def load(
    path: str | Path, *, question: str = "problem", answer: str = "answer", cell: str = "", template: str = "{problem}", hint: str = ""
) -> list[Problem]:
    """Problems from a JSON-lines or parquet file, with the fields named by `question`, `answer` and (if given) `cell`.

    template is the prompt around the question ({problem}); hint the prompt around the prompt for the hindsight stream
    ({answer}, {prompt}). An `id` field is kept, otherwise the line or row number is the id.
    """
    path = Path(path)
    problems = []
    for where, number, row in _parquet_rows(path) if path.suffix == ".parquet" else _json_rows(path):
        for name in (question, answer, *([cell] if cell else [])):
            if not isinstance(row.get(name), (str, int, float)) or isinstance(row[name], bool) or str(row[name]).strip() == "":
                raise ProblemError(f"{where}: wanted a non-empty field {name!r}, got the fields {', '.join(map(repr, row)) or 'none'}")
        extra = {"hint": hint} if hint else {}
        prompt = template.replace("{problem}", str(row[question]))
        problems.append(Problem(str(row.get("id", number)), prompt, str(row[answer]), cell=str(row[cell]) if cell else "", data=row, **extra))
    if not problems:
        raise ProblemError(f"problems.path: {path} holds no problem")
    return problems


def _json_rows(path: Path) -> Iterator[tuple[str, int, dict]]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # not splitlines: U+2028 may stand inside a JSON string
    except FileNotFoundError:
        raise ProblemError(f"problems.path: no such file: {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ProblemError(f"problems.path: cannot read {path}: {error}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ProblemError(f"{where}: not valid JSON: {error.msg} at column {error.colno}") from None
        if not isinstance(row, dict):
            raise ProblemError(f"{where}: wanted a JSON object, got {type(row).__name__}")
        yield where, number, row


def _parquet_rows(path: Path) -> Iterator[tuple[str, int, dict]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise ProblemError(f"problems.path: {path} needs pyarrow: pip install -e '.[data]'") from None
    try:
        rows = parquet.read_table(path).to_pylist()
    except FileNotFoundError:
        raise ProblemError(f"problems.path: no such file: {path}") from None
    except (OSError, pyarrow.ArrowException) as error:
        raise ProblemError(f"problems.path: cannot read {path}: {' '.join(str(error).split())}") from None
    for number, row in enumerate(rows, 1):
        yield f"{path}, row {number}", number, row


_NUMBER = re.compile(r"-?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?")


def last_boxed(text: str) -> str | None:
    r"""The content of the last \boxed{...}, braces balanced; None without one that closes."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    begin = start + len("\\boxed{")
    depth = 1
    for at in range(begin, len(text)):
        depth += (text[at] == "{") - (text[at] == "}")
        if depth == 0:
            return text[begin:at]
    return None


def extract_answer(text: str, how: str) -> str | None:
    """The answer that a rollout gives, None when it gives none.

    "line": the last line that begins with A, without the A (the synthetic tasks). "boxed", "number": the last \\boxed{} or number.
    "auto": boxed, else what follows ####, else the last number.
    """
    if how == "line":
        lines = [line for line in text.split("\n") if line.startswith("A")]
        return lines[-1][1:] if lines else None
    if how in ("boxed", "auto"):
        boxed = last_boxed(text)
        if boxed is not None or how == "boxed":
            return boxed
    if how == "auto" and "####" in text:
        text = text.rsplit("####", 1)[1]
    numbers = _NUMBER.findall(text)
    return numbers[-1] if numbers else None
