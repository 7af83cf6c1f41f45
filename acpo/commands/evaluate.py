"""`acpo eval`: accuracy, pass@k and majority@k of a run's newest checkpoint, or of any model."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from . import json_option, print_json, print_table, verb


def add(verbs) -> None:
    parser = verb(
        verbs, "eval", "evaluate the newest checkpoint of a run, or a model, on its held-out problems or on others",
        "acpo eval runs/arithmetic-acpo-0 --samples 8\n  acpo eval --model FOLDER --preset math500 --path math500.jsonl",
    )  # fmt: skip
    parser.add_argument("words", nargs="*", metavar="RUN key=value", help="a run directory (or --model), and settings over its own")
    parser.add_argument("--model", default="", metavar="FOLDER", help="a folder with a causal language model and its tokenizer, instead of a run")
    parser.add_argument(
        "--preset", default="", metavar="NAME", help="aime, amc, math500 or gsm8k: sets fields, prompt, extraction, verifier and length"
    )
    parser.add_argument("--path", default="", metavar="FILE", help="the problems, as problems.path; all of them are asked")
    parser.add_argument(
        "--samples", type=int, default=8, metavar="N", help="sampled rollouts a problem for pass@k and majority@k; 0: greedy alone (default 8)"
    )
    parser.add_argument("--k", default="", help="the k of pass@k and majority@k, separated by commas (default: 1 and --samples)")
    json_option(parser)


def run(options) -> int:
    from rich.console import Console
    from rich.progress import Progress

    from .. import preflight, state
    from ..display import EVERY, output
    from ..run import Run
    from ..sources import read
    from ..trainer import Trainer

    settings, run, all_of_it = _evaluated(options)
    samples = settings.eval.samples  # --samples, or a word behind it
    ks = _ks(options.k, samples)
    trainer = Trainer(settings, Run(settings), problems=read(settings.problems) if all_of_it else None)
    console = Console(stderr=True)
    try:
        preflight.lengths(trainer)
        step = {"step": state.load_newest(trainer)} if run else {}
        asked = len(trainer.held_out[: settings.eval.max_problems or None])
        with Progress(console=console, transient=True, disable=options.json or not console.is_terminal) as progress:
            total = asked * (1 + samples)
            task, said = progress.add_task("rollouts", total=total), time.monotonic()

            def advance(count: int) -> None:
                nonlocal said
                progress.update(task, advance=count)
                if not (options.json or console.is_terminal) and time.monotonic() - said >= EVERY:
                    said = time.monotonic()
                    print(f"acpo: {progress.tasks[task].completed:.0f} of {total} rollouts", file=sys.stderr, flush=True)

            found = trainer.evaluate(trainer.held_out, 0, samples=samples, ks=ks, intervals=True, advance=advance)
    finally:
        trainer.close()
    about = {**step, "problems": asked, "samples": samples, "verifier": trainer.verifier.describe(), **found.verify}
    if options.json:
        print_json({**about, **found.values, "intervals": found.intervals})
    else:
        with output():
            _print_evaluation(about, found, settings)
    return 0


def _evaluated(options):
    """(settings, run directory or None, whether all of the problems are asked and not only those held out)."""
    from .. import config
    from ..config import ConfigError
    from ..presets import preset

    runs, overrides = [t for t in options.words if "=" not in t or Path(t).is_dir()], [t for t in options.words if "=" in t and not Path(t).is_dir()]
    if len(runs) > 1 or (runs and options.model):
        raise ConfigError(f"one run directory or --model must be given, got {' and '.join([*runs, *([options.model] if options.model else [])])}")
    if options.preset and not (options.path or any(t.startswith("problems.path=") for t in overrides)):
        raise ConfigError(f"--preset {options.preset} needs --path: the file with the problems")
    layers = []
    if runs:
        layers.append(("RUN", {"run_dir": runs[0], **_engine(Path(runs[0]) / "config.yaml", overrides)}))
    if options.model:
        layers.append(("--model", {"policy.path": options.model}))
    if options.preset:
        layers.append(("--preset", preset(options.preset)))
    other = options.preset or options.path or any(t.startswith("problems.path=") for t in overrides)
    if other:  # the problems of the run make room
        path = {"problems.path": options.path} if options.path else {}
        layers.append(("--path", {"problems.task": "", "warmup.steps": 0, "eval.max_problems": 0, **path}))
    if not (runs or options.model or any(t.startswith("policy.") for t in overrides)):
        raise ConfigError("a run directory or --model must be given: what is to be evaluated")
    layers.append(("--samples", {"eval.samples": options.samples}))
    settings = config.load(Path(runs[0]) / "config.yaml" if runs else None, overrides, *layers)
    made = settings.problems.task or settings.problems.path.startswith("reasoning_gym:")
    return settings, runs[0] if runs else None, bool((other or not runs) and not made)


def _engine(path: Path, overrides: list[str]) -> dict[str, str]:
    """A run's server is its training's: our weights in it would be what the training samples from. Who names a server on the command line gets it."""
    from ..layers import flatten, read_yaml

    typed = any(t.partition("=")[0].strip().startswith(("rollout.engine", "rollout.server.")) for t in overrides)
    if typed or flatten(read_yaml(path)).get("rollout.engine") != "vllm_server":
        return {}
    print("acpo: rollouts are the policy itself's, the server is left to the run's training; rollout.engine=vllm_server takes it", file=sys.stderr)
    return {"rollout.engine": "local"}


def _ks(text: str, samples: int) -> list[int]:
    from ..config import ConfigError

    try:
        ks = [int(k) for k in text.split(",")] if text else sorted({1, samples} - {0})
    except ValueError:
        ks = [0]
    if any(not 1 <= k <= max(samples, 1) for k in ks):
        raise ConfigError(f"--k must be numbers from 1 to --samples = {samples}, separated by commas, got {text!r}")
    return ks


def _print_evaluation(about: dict, found, settings) -> None:
    where = settings.problems.path or settings.problems.task
    step = f", step {about['step']}" if "step" in about else ""
    rows = []
    for name, value in found.values.items():
        low, high = found.intervals[name]
        rows.append([name.removeprefix("eval/"), f"{value:.4f}", f"{low:.4f} to {high:.4f}"])
    print_table(["", "share", "95 % interval"], rows, f"{about['problems']} problems of {where}{step}")
    counted = ", ".join(f"{v} {k.removeprefix('verify/')}" for k, v in found.verify.items() if v and k != "verify/seconds")
    print(f"accuracy: greedy; the others: {about['samples']} samples a problem at temperature {settings.eval.temperature:g}")
    print(f"intervals: bootstrap over problems; verifier: {about['verifier']}{'; ' + counted if counted else ''}")
