"""The console script. Exit codes: 0 done, 1 the data or the run was at fault, 2 the command line or a setting, 130 interrupted. What a user can
mend is one line on stderr that says how; a traceback is a bug of ours."""

from __future__ import annotations

import argparse
import os
import sys

from .commands import compare, completion, doctor, evaluate, report, segment, train
from .inspect import command as inspect

VERBS = {
    "train": train, "eval": evaluate, "report": report, "inspect": inspect, "segment": segment, "compare": compare, "doctor": doctor,
    "completion": completion,
}  # fmt: skip
# argparse takes positional arguments in one place; those of these verbs may stand behind options as well
WORDS = {"train": "words", "eval": "words", "inspect": "words", "segment": "words"}
EXAMPLES = """examples:
  acpo train configs/arithmetic.yaml                      warm-up, both stages, evaluation, report
  acpo train configs/arithmetic.yaml method=grpo seed=1   the baseline of the same loop
  acpo train configs/arithmetic.yaml --dry-run            check everything, train nothing
  acpo eval runs/arithmetic-acpo-0 --samples 8            accuracy, pass@8 and majority@8 of the newest checkpoint, held-out problems
  acpo report runs/arithmetic-*                           curves, one a method, with intervals over seeds
  acpo compare configs/compare/t2.yaml --jobs 2           arms x paired seeds from shared warm starts: table, figure, report
  acpo inspect runs/arithmetic-acpo-0 --html step.html    rollouts side by side, each step with its credit
  acpo segment traces.jsonl --tokenizer FOLDER            reasoning steps, and why each ends where it does
  acpo doctor                                             what runs here, on which kernels, and whether it computes what it should

exit codes: 0 done, 1 the data or the run was at fault, 2 the command line or a setting, 130 interrupted
"""


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(
        prog="acpo", description="Step-level credit assignment for RL with verifiable rewards.", epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    verbs = out.add_subparsers(dest="verb", required=True, metavar="VERB")
    for module in VERBS.values():
        module.add(verbs)
    return out


def main(arguments: list[str] | None = None) -> int:
    options, rest = parser().parse_known_args(arguments)
    if rest:
        if options.verb not in WORDS or any(word.startswith("-") for word in rest):
            dashed = next((word for word in rest if word.startswith("--") and "=" in word and options.verb in WORDS), "")
            parser().error(f"unrecognized arguments: {' '.join(rest)}" + (f" (a setting has no dashes: {dashed.lstrip('-')})" if dashed else ""))
        getattr(options, WORDS[options.verb]).extend(rest)

    try:
        return _run(options)
    except KeyboardInterrupt:
        again = "; the same command continues from the last checkpoint" if options.verb in ("train", "compare") else ""
        return _said(f"interrupted{again}", 130)


def _run(options: argparse.Namespace) -> int:
    from .checkpoint import CheckpointError  # torch comes with these, which takes seconds: an interrupt may fall into them
    from .compare import RunError
    from .config import ConfigError
    from .guard import TrainingError
    from .inspect.data import InspectError
    from .problems import ProblemError
    from .report import ReportError
    from .rollout import RolloutError
    from .run import RunTakenError
    from .verify import VerifyError

    try:
        return VERBS[options.verb].run(options)
    except (ConfigError, RunTakenError) as error:
        return _said(error, 2)
    except (ProblemError, TrainingError, CheckpointError, RunError, RolloutError, VerifyError, ReportError, InspectError) as error:
        return _said(error, 1)
    except ImportError as error:  # something optional is not installed, and says what
        return _said(error, 1)
    except OSError as error:
        return _said(f"{error.strerror or error}: {error.filename or ''}".rstrip(": "), 1)


def _said(error: object, code: int) -> int:
    ranks = sys.modules.get("acpo.ranks")  # not imported here: torch, of which an interrupt may have left half, cannot be imported twice
    if ranks.first_to_tell() if ranks else os.environ.get("RANK", "0") == "0":  # of several processes one says why
        print(f"acpo: {error}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
