"""Problems and where they come from. A source yields `Problem`s; what a rollout is worth is verify/'s business."""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

_HALF = re.compile("[\ud800-\udfff]")
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
    question: str = field(default="", compare=False)  # as it stands in the data, without the template; empty: the prompt

    def hinted_prompt(self, answer: str) -> str:
        return filled(self.hint, prompt=self.prompt, answer=answer)


def filled(template: str, **values: str) -> str:
    """The template with each {name} replaced by its value, whatever stands in the values. TypeError for one that is no text: of None the policy would
    read that the answer is nothing."""
    for name, value in values.items():
        if not isinstance(value, str):
            raise TypeError(f"{name} must be the text that stands in the prompt, got {value!r}")
    return re.sub("|".join(re.escape(f"{{{name}}}") for name in values), lambda found: values[found[0][1:-1]], template)


def load(
    path: str | Path,
    *,
    question: str = "problem",
    answer: str = "answer",
    answer_after: str = "",
    cell: str = "",
    template: str = "{problem}",
    hint: str = "",
    subset: str = "",
    split: str = "train",
) -> list[Problem]:
    """Problems from a JSON-lines or parquet file, a folder of `datasets` or hub:NAME, with the fields named by `question`, `answer` and (if given)
    `cell`; a name may be several, separated by |: the first that a row has.

    template is the prompt around the question ({problem}); hint the prompt around the prompt for the hindsight stream ({answer}, {prompt}). The
    answer is what stands behind the last `answer_after` in its field, where it holds one. An `id` field is kept, otherwise the line or row number is
    the id.
    """
    problems = []
    for where, number, row in rows(str(path), subset, split):
        asked, right, kind = (_field(row, name, where) if name else "" for name in (question, answer, cell))
        if answer_after and answer_after in right:
            right = right.rsplit(answer_after, 1)[1].strip()
        if not right:
            raise ProblemError(f"{where}: wanted an answer behind {answer_after!r} in the field {answer!r}, got nothing")
        prompt = template.replace("{problem}", asked)
        name = number if row.get("id") is None else row["id"]
        problems.append(Problem(str(name), prompt, right, cell=kind, data=row, question=asked, hint=hint or HINT))
    if not problems:
        raise ProblemError(f"problems.path: {path} holds no problem")
    return problems


def _field(row: dict, name: str, where: str) -> str:
    """The text of a field; a number in decimal digits, as somebody would write it down."""
    there = next((n for n in name.split("|") if n in row), None)
    if there is None:
        fields = ", ".join(map(reprlib.repr, list(row)[:20])) + (f" and {len(row) - 20} more" if len(row) > 20 else "")
        raise ProblemError(f"{where}: wanted a non-empty field {name!r}, got the fields {fields or 'none'}")
    value = row[there]
    if isinstance(value, (float, Decimal)) and math.isfinite(value):
        value = format(Decimal(repr(value)) if isinstance(value, float) else value, "f")
    if not isinstance(value, (str, int)) or isinstance(value, bool) or str(value).strip() == "":
        raise ProblemError(f"{where}: wanted a text or a number in the field {there!r}, got {type(value).__name__} {reprlib.repr(value)}")
    text = str(value)
    if half := _HALF.search(text):
        raise ProblemError(
            f"{where}: wanted text in the field {there!r}, got half of a surrogate pair, \\u{ord(half[0]):04x}, at character {half.start()}"
        )
    return text


def rows(path: str, subset: str, split: str) -> Iterator[tuple[str, int, dict]]:
    """(where it stands, number, row) of every row."""
    if path.startswith("hub:") or Path(path).is_dir():
        return _dataset_rows(path, subset, split)
    return _parquet_rows(Path(path)) if path.endswith(".parquet") else _json_rows(Path(path))


def _dataset_rows(path: str, subset: str, split: str) -> Iterator[tuple[str, int, dict]]:
    """A name on the hub and a folder of data files go through the same `load_dataset`; what `save_to_disk` left is read by its own reader."""
    try:
        import datasets
    except ImportError:
        raise ProblemError(f"problems.path: {path} needs datasets: pip install -e '.[data]'") from None
    name = path.removeprefix("hub:")
    saved = any(Path(name, mark).is_file() for mark in ("dataset_dict.json", "state.json"))
    datasets.disable_progress_bars()
    try:
        found = datasets.load_from_disk(name) if saved else datasets.load_dataset(name, subset or None, split=split)
        if isinstance(found, datasets.DatasetDict):
            if split not in found:
                raise ValueError(f"it has no split {split!r}, but {', '.join(map(repr, found))} (problems.split)")
            found = found[split]
    except Exception as error:  # of many libraries: files, network, formats
        raise ProblemError(f"problems.path: cannot read {path}: {' '.join(str(error).split())[:300]}") from None
    for number, row in enumerate(found, 1):
        yield f"{path}, row {number}", number, row


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
        except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
            raise ProblemError(f"{where}: not valid JSON: {error}") from None
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
