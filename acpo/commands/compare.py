"""`acpo compare`: arms x paired seeds from shared warm starts."""

from __future__ import annotations

import argparse
import contextlib
import sys

from . import json_option, print_json, print_table, verb


def add(verbs) -> None:
    parser = verb(
        verbs, "compare", "run arms x paired seeds from shared warm starts; the same command continues what was broken off",
        "acpo compare configs/compare/t2.yaml --jobs 2 --arms acpo,grpo",
    )  # fmt: skip
    parser.add_argument("config", metavar="CONFIG", help="a YAML file such as configs/compare/t2.yaml")
    parser.add_argument("--dir", default=None, metavar="FOLDER", help="where the runs live (default: runs/compare/NAME)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time, each with one thread (default 1)")
    parser.add_argument("--arms", default="", metavar="NAMES", help="only these, separated by commas")
    parser.add_argument("--most", type=int, default=None, metavar="N", help="start at most so many runs")
    parser.add_argument("--launch", default="", metavar="WORDS", help='words in front of every run\'s command, such as "nice -n 10"')
    parser.add_argument("--report", action="store_true", help="write the table of what is finished, run nothing")
    parser.add_argument("--one", default="", help=argparse.SUPPRESS)
    json_option(parser)


def run(options) -> int:
    from .. import exhibit
    from ..compare import Comparer
    from ..config import ConfigError
    from ..display import output

    if options.jobs < 1:
        raise ConfigError(f"--jobs must be at least 1, got {options.jobs}")
    comparer = Comparer(options.config, options.dir)
    if options.one:
        comparer.one(options.one)
        return 0
    if not options.report:
        with contextlib.redirect_stdout(sys.stderr) if options.json else contextlib.nullcontext():  # which run is under way is no result
            comparer.run(options.jobs, options.launch, [a for a in options.arms.split(",") if a] or None, options.most)
    results, runs = comparer.results()
    if results["arms"]:
        exhibit.write(results, runs, comparer.directory)
    if options.json:
        print_json(results)
    elif not results["arms"]:
        with output():
            print(f"no finished run of {comparer.chosen.against} and an arm beside it in {comparer.directory} yet")
    else:
        with output():
            print_table(*exhibit.rows(results))
            print("\n".join(str(comparer.directory / f"results.{kind}") for kind in ("json", "png", "html")))
    return 0
