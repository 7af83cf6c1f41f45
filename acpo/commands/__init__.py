"""The verbs of the console script, a module each: `add` declares its arguments, `run` does it and returns the exit code.

Heavy imports stand inside `run`: `acpo --help` and the shell's completion read the parsers alone.
"""

from __future__ import annotations

import argparse
import json
import math
from typing import Any


def verb(verbs, name: str, what: str, examples: str, more: str = "") -> argparse.ArgumentParser:
    """A sub-parser with examples in its help, and what else is to be said behind them."""
    return verbs.add_parser(
        name, help=what, description=what[0].upper() + what[1:] + ".", epilog=f"examples:\n  {examples}" + (f"\n\n{more}" if more else ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip


def json_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")


def print_json(value: Any) -> None:
    from ..display import output

    with output():
        print(json.dumps(_plain(value)))


def _plain(value: Any) -> Any:
    """JSON knows no NaN: null."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_table(head: list[str], rows: list[list[str]], title: str | None = None) -> None:
    """A table that keeps every column where it is piped into a file. On a terminal that is too narrow for its words it is turned: a row is a column
    then, and of those as many stand side by side as there is room for. Within `output`. Text: what stands in brackets is no markup."""
    from rich.table import Table
    from rich.text import Text

    from ..display import Paper

    if not rows:
        return
    console = Paper()
    if not console.is_terminal:
        console.width = 240
    parts = [[head, *rows]]
    if not _fits(parts[0], console.width):
        parts = []
        for column in rows:
            if parts and _fits(_turned([*parts[-1], column]), console.width):
                parts[-1].append(column)
            else:
                parts.append([head, column])
        parts = [_turned(part) for part in parts]
    for number, (names, *body) in enumerate(parts):
        table = Table(title=None if title is None or number else Text(title), title_justify="left")
        for name in names:
            table.add_column(Text(name), overflow="fold")
        for row in body:
            table.add_row(*map(Text, row))
        console.print(table)


def _turned(table: list[list[str]]) -> list[list[str]]:
    return [list(column) for column in zip(*table, strict=True)]


def _fits(table: list[list[str]], width: int) -> bool:
    """Whether no word is broken."""
    from rich.cells import cell_len

    words = (max(cell_len(word) for cell in column for word in cell.split() or [""]) for column in _turned(table))
    return sum(word + 3 for word in words) + 1 <= width
