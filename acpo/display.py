"""What a run shows while it goes: one progress bar a phase on a terminal, plain lines elsewhere, warnings alone when it is to be quiet."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

WATCHED = (
    ("reward", "reward", ".2f"), ("eval/accuracy", "acc", ".3f"), ("entropy", "H", ".3f"), ("attribution/reliability", "rel", ".2f"),
    ("tokens/per_second", "tok/s", ".0f"), ("warmup/loss", "loss", ".3f"),
)  # fmt: skip
EVERY = 15.0  # seconds between plain lines, besides those of evaluations


@contextlib.contextmanager
def output() -> Iterator[None]:
    """Where something is printed: a reader that stops reading, as a pager does, is no error."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        no_reader()


def no_reader() -> None:
    """What is printed from here on, and what the interpreter flushes at exit, goes nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


class Paper(Console):
    """Within `output`."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


class Ongoing(Console):
    """For what goes on without a reader; rich's own ends the process."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        no_reader()


class Display:
    def __init__(self, quiet: bool = False):
        self.quiet = quiet
        self.console = Ongoing(file=sys.stdout)
        self.progress: Progress | None = None
        self.shown: dict[str, float] = {}
        self.said = time.monotonic()

    def start_phase(self, name: str, total: int, done: int) -> None:
        self.finish()
        self.shown.pop("loss", None)
        self.total, self.done, self.begun = total, done, time.monotonic()
        whole = Column(no_wrap=True)  # where the terminal is narrow the bar gives way
        self.progress = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=None), MofNCompleteColumn(table_column=whole),
            TimeRemainingColumn(compact=True, table_column=whole),
            TextColumn("{task.fields[numbers]}"),
            console=self.console, disable=self.quiet or not self.console.is_terminal, expand=True, speed_estimate_period=600.0,
        )  # fmt: skip
        self.task = self.progress.add_task(name, total=total, completed=done, numbers="")
        self.progress.start()

    def show(self, record: dict) -> None:
        """The numbers of a record: on the bar, or as a line where an evaluation or the warm-up has something to say and every now and then."""
        self.shown.update({name: record[key] for key, name, _ in WATCHED if key in record})
        text = " ".join(f"{name} {self.shown[name]:{form}}" for _, name, form in WATCHED if name in self.shown)
        if self.progress is not None:
            step = None if record["phase"] == "start" else record["step"]  # the evaluation before the first step is behind the warm-up
            self.progress.update(self.task, completed=step, numbers=text)
        telling = "eval/accuracy" in record or record["phase"] == "warmup" or time.monotonic() - self.said >= EVERY
        if not self.console.is_terminal and telling:
            self.said = time.monotonic()
            self.say(f"{record['phase']} step {record['step']}{self._of(record['step'])}: {text}")

    def _of(self, step: int) -> str:
        """Of how many, and how long it may still take."""
        if self.progress is None or step <= self.done:
            return ""
        left = (time.monotonic() - self.begun) / (step - self.done) * (self.total - step)
        return f" of {self.total}" + (f", {int(left // 60)}:{int(left % 60):02d} left" if step < self.total else "")

    def say(self, text: str) -> None:
        if not self.quiet:
            self.console.print(text, highlight=False, soft_wrap=True, markup=False)

    def facts(self, rows: list[tuple[str, str]]) -> None:
        """(of what, what): two columns on a terminal, where long ones wrap inside theirs; elsewhere a line each."""
        if self.quiet or not self.console.is_terminal:
            for name, text in rows:
                self.say(f"{name:9} {text}")
            return
        grid = Table.grid(Column(style="bold", no_wrap=True), Column(overflow="fold"), padding=(0, 2, 0, 0))
        for name, text in rows:
            grid.add_row(Text(name), Text(text))
        self.console.print(grid)

    def warn(self, text: str) -> None:
        """Said even where all else is not, on stderr then: what is on stdout is for a program."""
        if self.quiet:
            with contextlib.suppress(BrokenPipeError):
                print(f"acpo: warning: {text}", file=sys.stderr)
        else:
            self.say(f"warning: {text}")

    def finish(self) -> None:
        if self.progress is not None:
            self.progress.stop()
            self.progress = None
