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
    """A table that keeps every column where it is piped into a file. Text: what stands in brackets is no markup."""
    from rich.table import Table
    from rich.text import Text

    from ..display import Paper, output

    if not rows:
        return
    table = Table(title=None if title is None else Text(title), title_justify="left")
    for name in head:
        table.add_column(Text(name))
    for row in rows:
        table.add_row(*map(Text, row))
    console = Paper()
    with output():
        Paper(width=None if console.is_terminal else 240).print(table)
