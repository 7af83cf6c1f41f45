"""`acpo inspect`: its words on the command line, and what they do."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from ..commands import json_option, verb

EXAMPLES = """acpo inspect runs/arithmetic-acpo-0                             the newest step: all problems, and the most surprising one in full
  acpo inspect runs/arithmetic-acpo-0 --step 40 --html step.html  that step as one page that needs no network
  acpo inspect runs/arithmetic-acpo-0 --problem 'a0b1c3=' --figures --no-color | less
  acpo inspect --text traces.jsonl --model FOLDER --html t.html   any traces, any local causal model, no training"""
MORE = """A file of traces has one JSON object a line: response (or trace, completion, solution), problem, and where known answer and outcome (true,
false or a number in [0, 1]). Traces of one problem are a group. Behind --text any setting of docs/configuration.md may stand as key=value, such as
problems.chat=true."""


def add(verbs) -> None:
    """The sub-parser of the verb."""
    parser = verb(verbs, "inspect", "show rollouts side by side, each step with its credit, in the terminal or as one HTML file", EXAMPLES, MORE)
    parser.add_argument("words", nargs="*", metavar="RUN key=value", help="a run directory (or --text and --model, and settings)")
    parser.add_argument(
        "--step", type=int, default=None, metavar="N", help="the training step (default: the newest, or the newest that asked --problem)"
    )
    parser.add_argument("--problem", default=None, metavar="ID", help="only this problem")
    parser.add_argument("--text", default="", metavar="FILE", help="traces as JSON lines instead of a run")
    parser.add_argument("--model", default="", metavar="PATH", help="with --text: a folder with a causal language model and its tokenizer")
    parser.add_argument("--most", type=int, default=0, metavar="N", help="with --text: read the first N traces (default: all)")
    parser.add_argument(
        "--sort", default="surprise", choices=("surprise", "outcome", "length", "sampled"),
        help="surprise: where credit and outcome disagree; outcome: wrong first; length: longest first (default: surprise)",
    )  # fmt: skip
    parser.add_argument(
        "--shade", default="credit", metavar="MEASURE",
        help="in the terminal, the shade: credit (default), own, phi, iota, hindsight, centred, value, weight, entropy or logp",
    )  # fmt: skip
    parser.add_argument("--figures", action="store_true", help="in the terminal, every figure under its step")
    parser.add_argument("--groups", type=int, default=1, metavar="N", help="in the terminal, problems shown in full; 0: all (default 1)")
    parser.add_argument("--rollouts", type=int, default=0, metavar="N", help="in the terminal, rollouts of a problem; 0: all (default)")
    parser.add_argument("--width", type=int, default=0, metavar="N", help="columns of the terminal (default: its own; piped: COLUMNS or 120)")
    parser.add_argument("--no-color", action="store_true", help="no colours; signs, figures and bars stay")
    parser.add_argument("--html", default="", metavar="FILE", help="write one HTML file that needs nothing else")
    json_option(parser)


def run(options) -> int:
    """Exit code 0. InspectError and ConfigError are the caller's to tell."""
    view = _view(options)
    view.sort(options.sort)
    if options.html:
        from .page import page

        Path(options.html).write_text(page(view, options.sort), encoding="utf-8")
        print(f"page: {options.html}", file=sys.stderr if options.json else sys.stdout)
    if options.json:
        from .terminal import output

        with output():
            print(json.dumps(as_dict(view), ensure_ascii=False, allow_nan=False))
    elif not options.html:
        _print(view, options)
    return 0


def _view(options):
    from ..config import ConfigError
    from .data import MEASURES, InspectError, read_run

    names = [name for name, *_ in MEASURES]
    if options.shade not in names:
        raise ConfigError(f"--shade must be one of {', '.join(names)}, got {options.shade!r}")
    for name, least in (("groups", 0), ("rollouts", 0), ("most", 0), ("width", 0)):
        if getattr(options, name) < least:
            raise ConfigError(f"--{name} must be at least {least}, got {getattr(options, name)}")
    if bool(options.text) != bool(options.model):
        raise ConfigError(f"--text and --model go together: {'--model' if options.text else '--text'} is missing")
    if options.text:
        if options.step is not None:
            raise ConfigError("--step is of a run: a file of traces has no steps of training")
        view = _read_traces(options)
    else:
        if len(options.words) != 1:
            raise ConfigError(f"wanted one run directory, or --text FILE and --model PATH, got {' and '.join(options.words) or 'none'}")
        return read_run(Path(options.words[0]), options.step, options.problem)
    if options.problem is not None:
        view.only(options.problem)
    if not view.rollouts:
        raise InspectError(f"{options.text} holds no trace")
    return view


def _read_traces(options):
    from rich.console import Console
    from rich.progress import Progress
    from transformers.utils import logging

    from .. import config
    from ..config import ConfigError
    from .text import READS, inspect_traces
    from .traces import ANSWER, PROBLEM, read_traces

    for word in options.words:
        if "=" not in word:
            raise ConfigError(f"with --text wanted settings as key=value, got {word!r}")
    layer = {"policy.path": options.model, "problems.path": options.text, "problems.question": PROBLEM, "problems.answer": ANSWER}
    settings = config.load(None, options.words, ("--text", layer))
    for key in (word.partition("=")[0].strip() for word in options.words):
        if key == "segmenter.fixed" or not key.startswith(READS):
            raise ConfigError(f"{key} says nothing about --text, which shows the additive credit of hindsight; wanted settings of {', '.join(READS)}")
    traces = read_traces(options.text, options.most, settings.problems.question, settings.problems.answer)
    logging.disable_progress_bar()
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("traces", total=len(traces))
        return inspect_traces(traces, settings, Path(options.text).name, lambda n: progress.update(task, advance=n))


def _print(view, options) -> None:
    from .terminal import printing, show

    with printing(options.width, options.no_color) as console:
        show(view, console, options.shade, options.groups, options.rollouts, options.figures)


def as_dict(view) -> dict:
    """The view for machines, in its order: every rollout with its steps as objects. Figures that were not measured are null."""
    return {
        "title": view.title, "step": view.step, "notes": view.notes,
        "groups": [
            {**vars(g), "pass_rate": g.pass_rate, "surprise": g.surprise, "rollouts": [_rollout(r) for r in g.rollouts]} for g in view.groups
        ],
    }  # fmt: skip


def _rollout(rollout) -> dict:
    more = {"verdict": rollout.verdict, "surprise": rollout.surprise, "tokens": rollout.tokens}
    return {**vars(rollout), **more, "steps": [vars(s) for s in rollout.steps]}
