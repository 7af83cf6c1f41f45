"""The console script: `acpo train`, `acpo eval`, `acpo report`, `acpo compare`. Errors of the user's making are one line and exit
code 2; a training run that cannot go on is one line and exit code 1."""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import sys
from pathlib import Path

EXAMPLES = """examples:
  acpo train configs/arithmetic.yaml                      warm-up, both stages, evaluation, report
  acpo train configs/arithmetic.yaml method=grpo seed=1   the baseline of the same loop
  acpo eval runs/arithmetic-acpo-0 --samples 8            accuracy, pass@8 and majority@8 of the newest checkpoint, held-out problems
  acpo eval --model FOLDER --preset math500 --path math500.jsonl   the same of any model, on a known data set
  acpo compare configs/compare/t2.yaml --jobs 2           arms x paired seeds from one warm start: table, figure, report
  acpo report runs/arithmetic-acpo-0 runs/arithmetic-grpo-0 --out curves.png
"""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="acpo", description="Step-level credit assignment for RL with verifiable rewards.", epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="{train,eval,report,compare}")
    train = verbs.add_parser("train", help="train a policy; the same command continues a run that was broken off")
    train.add_argument("config", help="a YAML file")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="settings over those of the file, e.g. trainer.steps=50")
    evaluate = verbs.add_parser("eval", help="evaluate the newest checkpoint of a run, or a model, on its held-out problems or on others")
    evaluate.add_argument("run", nargs="*", metavar="RUN key=value", help="a run directory (or --model), and settings over its own")
    evaluate.add_argument("--model", default="", help="a folder with a causal language model and its tokenizer, instead of a run")
    evaluate.add_argument("--preset", default="", help="aime, amc, math500 or gsm8k: sets fields, prompt, extraction, verifier and length")
    evaluate.add_argument("--path", default="", help="the problems, as problems.path; all of them are asked")
    evaluate.add_argument("--samples", type=int, default=8, help="sampled rollouts a problem for pass@k and majority@k; 0: greedy alone (default 8)")
    evaluate.add_argument("--k", default="", help="the k of pass@k and majority@k, separated by commas (default: 1 and --samples)")
    evaluate.add_argument("--json", action="store_true", help="print one JSON object")
    report = verbs.add_parser("report", help="draw the curves of one or more runs")
    report.add_argument("runs", nargs="+", help="run directories; several are overlaid")
    report.add_argument("--out", default="", help="the PNG to write (default: curves.png in the first run)")
    compare = verbs.add_parser("compare", help="run arms x paired seeds from one warm start; the same command continues what was broken off")
    compare.add_argument("config", help="a YAML file such as configs/compare/t2.yaml")
    compare.add_argument("--dir", default=None, help="where the runs live (default: runs/compare/NAME)")
    compare.add_argument("--jobs", type=int, default=1, help="runs at a time, each with one thread (default 1)")
    compare.add_argument("--arms", default="", help="only these, separated by commas")
    compare.add_argument("--most", type=int, default=None, help="start at most so many runs")
    compare.add_argument("--launch", default="", help='words in front of every run\'s command, such as "nice -n 10"')
    compare.add_argument("--report", action="store_true", help="write the table of what is finished, run nothing")
    compare.add_argument("--one", default="", help=argparse.SUPPRESS)
    options, rest = parser.parse_known_args(arguments)
    if rest:  # argparse takes positional arguments in one place; settings of `eval` may stand behind its options as well
        if options.verb != "eval" or any(word.startswith("-") for word in rest):
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        options.run += rest

    from .checkpoint import CheckpointError
    from .compare import RunError
    from .config import ConfigError
    from .problems import ProblemError
    from .ranks import first_to_tell
    from .rollout import RolloutError
    from .run import RunTakenError
    from .trainer import TrainingError
    from .verify import VerifyError

    try:
        return {"train": _train, "eval": _eval, "report": _report, "compare": _compare}[options.verb](options)
    except (ConfigError, ProblemError, RunTakenError, ImportError) as error:  # ImportError: something optional is not installed, and says what
        if first_to_tell():
            print(f"acpo: {error}", file=sys.stderr)
        return 2
    except (TrainingError, CheckpointError, RunError, RolloutError, VerifyError) as error:
        if first_to_tell():
            print(f"acpo: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"acpo: {error.strerror or error}: {error.filename or ''}".rstrip(": "), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("acpo: interrupted; the same command continues from the last checkpoint", file=sys.stderr)
        return 130


def _train(options) -> int:
    from . import config
    from .ranks import run_of
    from .run import Stopped
    from .trainer import Trainer

    settings = config.load(options.config, options.overrides)
    run = run_of(settings)
    run.say(f"run directory: {run.directory}")
    trainer = Trainer(settings, run)
    try:
        with _ends_at_sigterm(trainer):
            return _trained(trainer)
    except Stopped as stopped:
        run.finish()
        run.say(f"ended by SIGTERM at {stopped}, saved: the same command continues from there")
        return 0
    finally:
        trainer.close()


@contextlib.contextmanager
def _ends_at_sigterm(trainer):
    """The first SIGTERM lets the step under way end; a second one ends the process as if there were no handler."""

    def note(*_) -> None:
        trainer.stopping = True
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    before = signal.signal(signal.SIGTERM, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _trained(trainer) -> int:
    from . import report

    settings, run = trainer.config, trainer.run
    parameters = sum(p.numel() for p in trainer.policy.parameters())
    run.say(f"{settings.method}: {parameters:,} parameters, {len(trainer.train_problems)} problems, {len(trainer.held_out)} held out")
    last = trainer.train()
    trainer.export()
    trainer.ranks.close()
    if not trainer.ranks.leads:
        return 0
    report.write(run.directory)
    run.say("  ".join(f"{name} {value:.4g}" for name, value in last.items()))
    run.say(f"curves: {run.directory / 'curves.png'}   report: {run.directory / 'report.html'}   policy: {run.directory / 'policy'}")
    return 0


def _eval(options) -> int:
    from rich.console import Console
    from rich.progress import Progress

    from .run import Run
    from .sources import read
    from .trainer import Trainer

    settings, run, all_of_it = _evaluated(options)
    ks = _ks(options.k, options.samples)
    trainer = Trainer(settings, Run(settings), problems=read(settings.problems) if all_of_it else None)
    console = Console(stderr=True)
    try:
        step = {"step": trainer.load_newest()} if run else {}
        asked = len(trainer.held_out[: settings.eval.max_problems or None])
        with Progress(console=console, transient=True, disable=options.json or not console.is_terminal) as progress:
            task = progress.add_task("rollouts", total=asked * (1 + options.samples))
            found = trainer.evaluate(
                trainer.held_out, 0, samples=options.samples, ks=ks, intervals=True, advance=lambda n: progress.update(task, advance=n)
            )
    finally:
        trainer.close()
    about = {**step, "problems": asked, "samples": options.samples, "verifier": trainer.verifier.describe(), **found.verify}
    if options.json:
        print(json.dumps({**about, **found.values, "intervals": {k: list(v) for k, v in found.intervals.items()}}))
    else:
        _print_evaluation(about, found, settings)
    return 0


def _evaluated(options):
    """(settings, run directory or None, whether all of the problems are asked and not only those held out)."""
    from . import config
    from .config import ConfigError
    from .presets import preset

    runs, overrides = [t for t in options.run if "=" not in t or Path(t).is_dir()], [t for t in options.run if "=" in t and not Path(t).is_dir()]
    if len(runs) > 1 or (runs and options.model):
        raise ConfigError(f"one run directory or --model must be given, got {' and '.join([*runs, *([options.model] if options.model else [])])}")
    if options.preset and not (options.path or any(t.startswith("problems.path=") for t in overrides)):
        raise ConfigError(f"--preset {options.preset} needs --path: the file with the problems")
    layers = []
    if runs:
        layers.append(("RUN", {"run_dir": runs[0]}))
    if options.model:
        layers.append(("--model", {"policy.path": options.model}))
    if options.preset:
        layers.append(("--preset", preset(options.preset)))
    other = options.preset or options.path or any(t.startswith("problems.path=") for t in overrides)
    if other:  # the problems of the run make room
        path = {"problems.path": options.path} if options.path else {}
        layers.append(("--path", {"problems.task": "", "warmup.steps": 0, "eval.max_problems": 0, **path}))
    layers.append(("--samples", {"eval.samples": options.samples}))
    settings = config.load(Path(runs[0]) / "config.yaml" if runs else None, overrides, *layers)
    made = settings.problems.task or settings.problems.path.startswith("reasoning_gym:")
    return settings, runs[0] if runs else None, bool((other or not runs) and not made)


def _ks(text: str, samples: int) -> list[int]:
    from .config import ConfigError

    try:
        ks = [int(k) for k in text.split(",")] if text else sorted({1, samples} - {0})
    except ValueError:
        ks = [0]
    if any(not 1 <= k <= max(samples, 1) for k in ks):
        raise ConfigError(f"--k must be numbers from 1 to --samples = {samples}, separated by commas, got {text!r}")
    return ks


def _print_evaluation(about: dict, found, settings) -> None:
    from rich.console import Console
    from rich.table import Table

    where = settings.problems.path or settings.problems.task
    step = f", step {about['step']}" if "step" in about else ""
    table = Table("", "share", "95 % interval", title=f"{about['problems']} problems of {where}{step}", title_justify="left")
    for name, value in found.values.items():
        low, high = found.intervals[name]
        table.add_row(name.removeprefix("eval/"), f"{value:.4f}", f"{low:.4f} to {high:.4f}")
    console = Console()
    Console(width=None if console.is_terminal else 200).print(table)
    counted = ", ".join(f"{v} {k.removeprefix('verify/')}" for k, v in found.verify.items() if v and k != "verify/seconds")
    print(f"accuracy: greedy; the others: {about['samples']} samples a problem at temperature {settings.eval.temperature:g}")
    print(f"intervals: bootstrap over problems; verifier: {about['verifier']}{'; ' + counted if counted else ''}")


def _report(options) -> int:
    from rich.console import Console
    from rich.table import Table

    from . import report

    runs = [Path(r) for r in options.runs]
    rows = [report.summary(run) for run in runs]
    path = report.draw(runs, Path(options.out) if options.out else None)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = Table(*columns)
    for row in rows:
        table.add_row(*(f"{v:.3f}" if isinstance(v, float) else str(v) for v in (row.get(key, "") for key in columns)))
    console = Console()
    # Piped into a file, a table keeps every column.
    Console(width=None if console.is_terminal else 200).print(table)
    print(f"curves: {path}")
    return 0


def _compare(options) -> int:
    from rich.console import Console
    from rich.table import Table

    from . import evidence
    from .compare import Comparer
    from .config import ConfigError

    if options.jobs < 1:
        raise ConfigError(f"--jobs must be at least 1, got {options.jobs}")
    comparer = Comparer(options.config, options.dir)
    if options.one:
        comparer.one(options.one)
        return 0
    if not options.report:
        comparer.run(options.jobs, options.launch, [a for a in options.arms.split(",") if a] or None, options.most)
    results, runs = comparer.results()
    if not results["arms"]:
        print(f"no finished run of {comparer.chosen.against} and an arm beside it in {comparer.directory} yet")
        return 0
    evidence.write(results, runs, comparer.directory)
    head, body = evidence.rows(results)
    table = Table(*head)
    for row in body:
        table.add_row(*row)
    console = Console()
    Console(width=None if console.is_terminal else 240).print(table)
    print(
        f"table: {comparer.directory / 'results.json'}   figure: {comparer.directory / 'results.png'}   both: {comparer.directory / 'results.html'}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
