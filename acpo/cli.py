"""The console script. Exit codes: 0 done, 1 the data or the run was at fault, 2 the command line or a setting, 130 interrupted. What a user can
mend is one line on stderr that says how; a traceback is a bug of ours."""

from __future__ import annotations

import argparse
import sys

from .commands import compare, completion, doctor, evaluate, report, train

VERBS = (train, evaluate, report, compare, doctor, completion)
EXAMPLES = """examples:
  acpo train configs/arithmetic.yaml                      warm-up, both stages, evaluation, report
  acpo train configs/arithmetic.yaml method=grpo seed=1   the baseline of the same loop
  acpo train configs/arithmetic.yaml --dry-run            check everything, train nothing
  acpo eval runs/arithmetic-acpo-0 --samples 8            accuracy, pass@8 and majority@8 of the newest checkpoint, held-out problems
  acpo report runs/arithmetic-*                           curves, one a method, with intervals over seeds
  acpo compare configs/compare/t2.yaml --jobs 2           arms x paired seeds from one warm start: table, figure, report
  acpo doctor                                             what runs here, on which kernels, and whether it computes what it should

exit codes: 0 done, 1 the data or the run was at fault, 2 the command line or a setting, 130 interrupted
"""


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(
        prog="acpo", description="Step-level credit assignment for RL with verifiable rewards.", epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    verbs = out.add_subparsers(dest="verb", required=True, metavar="VERB")
    for module in VERBS:
        module.add(verbs)
    return out


def main(arguments: list[str] | None = None) -> int:
    options, rest = parser().parse_known_args(arguments)
    if rest:  # argparse takes positional arguments in one place; settings may stand behind options as well
        words = getattr(options, "words", None)
        if words is None or any(word.startswith("-") for word in rest):
            parser().error(f"unrecognized arguments: {' '.join(rest)}")
        words += rest

    from .checkpoint import CheckpointError
    from .compare import RunError
    from .config import ConfigError
    from .problems import ProblemError
    from .report import ReportError
    from .rollout import RolloutError
    from .update import TrainingError
    from .verify import VerifyError

    try:
        return options.run(options)
    except ConfigError as error:
        return _said(error, 2)
    except (ProblemError, TrainingError, CheckpointError, RunError, RolloutError, VerifyError, ReportError) as error:
        return _said(error, 1)
    except ImportError as error:  # something optional is not installed, and says what
        return _said(error, 1)
    except OSError as error:
        return _said(f"{error.strerror or error}: {error.filename or ''}".rstrip(": "), 1)
    except KeyboardInterrupt:
        again = "; the same command continues from the last checkpoint" if options.verb in ("train", "compare") else ""
        return _said(f"interrupted{again}", 130)


def _said(error: object, code: int) -> int:
    print(f"acpo: {error}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
