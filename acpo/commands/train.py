"""`acpo train`: a run from its configuration, or what is left of it."""

from __future__ import annotations

import contextlib
import os
import signal

from . import json_option, print_json, verb


def add(verbs) -> None:
    parser = verb(
        verbs, "train", "train a policy; the same command continues a run that was broken off",
        "acpo train configs/arithmetic.yaml trainer.steps=50 seed=1",
    )  # fmt: skip
    parser.add_argument("config", metavar="CONFIG", help="a YAML file; docs/configuration.md lists every setting")
    parser.add_argument("words", nargs="*", metavar="key=value", help="settings over those of the file, e.g. trainer.steps=50")
    parser.add_argument("--dry-run", action="store_true", help="check settings, data, policy, verifier, engine, memory and directory; train nothing")
    parser.add_argument("--quiet", action="store_true", help="print warnings and errors alone")
    json_option(parser)


def run(options) -> int:
    from .. import config, preflight, report
    from ..ranks import run_of
    from ..run import Stopped
    from ..trainer import Trainer

    settings = config.load(options.config, options.words)
    run_ = run_of(settings, quiet=options.quiet or options.json)
    trainer = Trainer(settings, run_)
    try:
        if options.dry_run:
            return _dry(preflight.checks(trainer), run_, options.json)
        preflight.lengths(trainer)
        run_.facts(preflight.summary(trainer))
        with _ends_at_signals(trainer):
            last = trainer.train(export=True)
        trainer.ranks.close()
    except Stopped as stopped:
        by = trainer.stopping or "SIGTERM"  # another process of the job may have got it
        run_.say(f"ended by {by} at {stopped}, saved: the same command continues from there")
        if options.json and trainer.ranks.leads:
            print_json({"stopped": str(stopped), "run": str(run_.directory)})
        return 130 if by == "SIGINT" else 0
    finally:
        trainer.close()
    if not trainer.ranks.leads:
        return 0
    files = report.write([run_.directory])
    run_.say("  ".join(f"{name} {value:.4g}" for name, value in last.items()))
    run_.say(
        "\n".join(
            f"{what:8} {path}" for what, path in zip(("curves", "report", "numbers", "policy"), (*files, run_.directory / "policy"), strict=True)
        )
    )
    if options.json:
        print_json({**last, "run": str(run_.directory), "files": [str(p) for p in files], "policy": str(run_.directory / "policy")})
    return 0


@contextlib.contextmanager
def _ends_at_signals(trainer):
    """The first SIGTERM, or Ctrl-C, lets the step under way end; what comes behind it ends the process as if there were no handler.

    Several processes get their SIGTERM from the launcher when one of them has died. Who notices the death says so behind this block: there the
    handler stays, or the signal would be faster. Who does not notice has a last word (`ranks.last_word`). A Ctrl-C reaches them twice, from the
    terminal and from the launcher: they are left to it.
    """
    from .. import checkpoint
    from ..ranks import last_word
    from ..run import Stopped

    def note(number: int, _) -> None:
        trainer.stopping = signal.Signals(number).name
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if signal.SIGINT in before:
            signal.signal(signal.SIGINT, before[signal.SIGINT])
        if number == signal.SIGINT:  # not by print: the signal may have come in the middle of one
            os.write(2, b"acpo: interrupted: the step under way is the last one and is saved; once more ends at once\n")

    def word() -> str:
        stands = checkpoint.newest(trainer.run.checkpoints)
        return (
            f"ended by SIGTERM, as the launcher does it when one of the {trainer.ranks.size} processes has died, in the middle of a step; "
            f"checkpoint {stands or 'none'} stands: the same command continues from it"
        )

    alone = trainer.ranks.size == 1
    # a shell's background jobs are deaf to Ctrl-C, and stay so
    interrupts = alone and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, *([signal.SIGINT] if interrupts else []))}
    unneeded = None if alone else last_word(word)
    stays = False
    try:
        yield
    except Stopped:
        raise
    except BaseException:
        stays = not alone
        raise
    finally:
        if not stays:
            for number, handler in before.items():
                signal.signal(number, handler)
            if unneeded is not None:
                unneeded()


def _dry(checks, run_, as_json: bool) -> int:
    found = []
    for check in checks:
        found.append(check)
        run_.say(f"{'ok  ' if check.ok else 'FAIL'} {check.name:10} {check.text}")
    good = all(check.ok for check in found)
    if as_json:
        print_json({"ok": good, "checks": [check._asdict() for check in found]})
    return 0 if good else 1
