"""Traces that somebody else wrote: one JSON object a line, with the text under one of the names that such files use."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .data import InspectError, clean

RESPONSE = "response|trace|completion|solution"  # the first that a row has
PROBLEM = "problem|question|prompt"
ANSWER = "answer|gold"
OUTCOME = "outcome|is_correct|correct|reward"


@dataclass
class Trace:
    id: str
    problem: str
    response: str
    answer: str = ""
    outcome: float | None = None  # in [0, 1]
    name: str = ""  # of the problem; empty: its text is its name

    @property
    def group(self) -> str:
        return self.name or self.problem


def read_traces(path: str | Path, most: int = 0, problem: str = PROBLEM, answer: str = ANSWER) -> list[Trace]:
    """The traces of a JSON-lines file, the first `most` (0: all). Only the response must be there; numbers and truth values are taken as outcomes."""
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # not splitlines: U+2028 may stand inside a JSON string
    except FileNotFoundError:
        raise InspectError(f"no such file: {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InspectError(f"cannot read {path}: {error}") from None
    out: list[Trace] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if most and len(out) == most:
            break
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
            raise InspectError(f"{where}: not valid JSON: {getattr(error, 'msg', error)}") from None
        if not isinstance(row, dict):
            raise InspectError(f"{where}: wanted a JSON object, got {type(row).__name__}")
        response = _first(row, RESPONSE)
        if not isinstance(response, str):
            fields = ", ".join(map(repr, row)) or "none"
            raise InspectError(f"{where}: wanted a text under {RESPONSE.replace('|', ' or ')}, got the fields {clean(fields)}")
        out.append(
            Trace(
                id=clean(str(row.get("id", number))), problem=_text(row, problem), response=clean(response), answer=_text(row, answer),
                outcome=_outcome(row, where), name=clean(str(row.get("problem_id", ""))),
            )
        )  # fmt: skip
    if not out:
        raise InspectError(f"{path} holds no trace")
    return out


def _first(row: dict, names: str) -> Any:
    return next((row[n] for n in names.split("|") if row.get(n) is not None), None)


def _text(row: dict, names: str) -> str:
    value = _first(row, names)
    return "" if value is None else clean(value if isinstance(value, str) else json.dumps(value))


def _outcome(row: dict, where: str) -> float | None:
    value = _first(row, OUTCOME)
    if value is None:
        return None
    if not isinstance(value, (bool, int, float)) or not 0 <= value <= 1:
        raise InspectError(f"{where}: wanted an outcome in [0, 1], or true or false, got {clean(repr(value)[:80])}")
    return float(value)
