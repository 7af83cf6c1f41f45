"""What runs did, to look at: one picture, one page that needs nothing beside it, and the numbers under the figures."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable
from pathlib import Path

from ..layers import ConfigError
from . import figure, page
from .panels import SECTIONS, Sections, chosen, lines
from .records import Group, ReportError, cell, columns, distinct, group_summary, grouped, read, summary

__all__ = ["ReportError", "cell", "chosen", "columns", "group_summary", "load", "read", "summary", "write"]
NUMBERS = (".csv",)
PAGES = (".html", ".htm")


def load(directories: list[Path], passed: Callable[[str], object] | None = None) -> list[Group]:
    """The runs, each once, as groups over seeds. passed: is told what is no run, and the others are read; without it, or where nothing else is
    left, that is a ReportError."""
    runs, wrong = [], []
    for directory in {directory.resolve(): directory for directory in directories}.values():
        try:
            runs.append(read(directory))
        except ReportError as error:
            if passed is None:
                raise
            wrong.append(str(error))
    if not runs and wrong:
        raise ReportError("; ".join(wrong[:3]) + (f"; and {len(wrong) - 3} more" if wrong[3:] else ""))
    for text in wrong:
        passed(f"{text}; passed over")
    return grouped(distinct(runs))


def write(directories: list[Path], out: Path | None = None, groups: list[Group] | None = None, sections: Sections = SECTIONS) -> list[Path]:
    """The picture, the page and the numbers of the runs, of those panels; returns what was written.

    out is a folder for all three, or one file: .html the page, .csv the numbers, else the picture. Without it they go into the run's directory as
    curves.png, report.html and report.csv; those of several runs into the folder that holds them all, as report.png, report.html and report.csv;
    where no one folder does, into the current one.
    """
    groups = load(directories) if groups is None else groups
    directories = [run.path for group in groups for run in group.runs]  # without what is there twice, or was passed over
    if out is not None and out.suffix and not out.is_dir():
        paths = [out]
    else:
        one = len(directories) == 1
        parents = {Path(os.path.abspath(d)).parent for d in directories}
        folder = out or (directories[0] if one else parents.pop() if len(parents) == 1 else Path())
        folder.mkdir(parents=True, exist_ok=True)
        paths = [_short(folder / name) for name in ("curves.png" if one else "report.png", "report.html", "report.csv")]
    for path in paths:
        if path.suffix in NUMBERS:
            _replace(path, numbers(groups, sections))
        elif path.suffix in PAGES:
            _replace(path, page.html(groups, sections))
        else:
            figure.picture(groups, path, sections)
    return paths


def _short(path: Path) -> Path:
    """Below the current folder a path is said from there."""
    return path.relative_to(Path.cwd()) if path.is_absolute() and path.is_relative_to(Path.cwd()) else path


def _replace(path: Path, text: str) -> None:
    """Whoever has the page open reads the old one or the new one, never half."""
    if not path.parent.is_dir():
        raise ConfigError(f"--out: No such file or directory: {path.parent}")
    temporary = path.with_name(f".{path.name}.writing")
    temporary.write_text(text, encoding="utf-8", newline="")
    os.replace(temporary, path)


def numbers(groups: list[Group], sections: Sections = SECTIONS) -> str:
    """What the figures draw, as CSV: one row a point. low and high are empty where fewer than three runs have it."""
    out = io.StringIO()
    table = csv.writer(out, lineterminator="\n")
    table.writerow(("panel", "unit", "series", "group", "runs", "x", "mean", "low", "high"))
    for _, panels in sections:
        for panel in panels:
            for line in lines(panel, groups):
                low, high = line.low or [""] * len(line.x), line.high or [""] * len(line.x)
                for x, mean, below, above in zip(line.x, line.mean, low, high, strict=True):
                    table.writerow((panel.title, panel.unit, line.name, groups[line.group].label, line.runs, x, mean, below, above))
    return out.getvalue()
