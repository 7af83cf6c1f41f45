"""`acpo report`: curves of runs, as a picture, a page and a table of numbers."""

from __future__ import annotations

import sys
from pathlib import Path

from . import json_option, print_json, print_table, verb


def add(verbs) -> None:
    parser = verb(
        verbs, "report", "curves of one or more runs as a picture, a page and a table of numbers",
        "acpo report runs/arithmetic-* --out compared\n  acpo report runs/arithmetic-* --panels accuracy,reliability --out figure.png",
    )  # fmt: skip
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="run directories; several are overlaid, those that differ in the seed alone as one curve"
    )
    parser.add_argument(
        "--out", default="", metavar="PATH",
        help="a folder, or one file: .png, .svg, .pdf, .html, .csv (default: the run's directory; of several runs, the folder that holds them all, "
        "where no one folder does, the current one)",
    )  # fmt: skip
    parser.add_argument(
        "--panels", default="", metavar="WORDS", help="only the panels whose titles hold one of these words, separated by commas (default: all)"
    )
    json_option(parser)


def run(options) -> int:
    from .. import report
    from ..display import output

    sections = report.chosen([name for name in options.panels.split(",") if name])
    runs = [Path(r) for r in options.runs]
    groups = report.load(runs, passed=_told)
    rows = [report.summary(run) for group in groups for run in group.runs]
    means = [report.group_summary(group) for group in groups if len(group.runs) > 1]
    paths = report.write(runs, Path(options.out) if options.out else None, groups, sections)
    left_out = [run.left_out for group in groups for run in group.runs if run.left_out]
    for text in left_out:
        _told(text)
    code = 1 if left_out else 0  # all is written, of what could be read
    if options.json:
        print_json({"runs": rows, "groups": means, "files": [str(p) for p in paths]})
        return code
    with output():
        for found in (rows, means):
            print_table(report.columns(found), [[report.cell(row.get(name, "")) for name in report.columns(found)] for row in found])
        print("\n".join(map(str, paths)))
    return code


def _told(text: str) -> None:
    print(f"acpo: {text}", file=sys.stderr)
