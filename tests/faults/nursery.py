"""Forks `acpo train` processes from one parent that has imported everything: a killed run is a killed process, at a twentieth of the price.

Reads one JSON object a line and answers one: {"train": [arguments], "log": file} -> {"pid": n}, {"wait": pid} -> {"code": exit code or -signal}.
The parent starts no thread and computes nothing, so that what it forks is as good as new. A child writes into the first byte of the file
`phases` which of PHASES it is in, so that whoever kills it knows what was hit.
"""

from __future__ import annotations

import json
import mmap
import os
import resource
import signal
import sys
import traceback

PHASES = (
    "start", "warm-up", "rollout", "score and credit", "update", "rollouts file", "controllers", "metrics line", "between stages", "checkpoint",
    "between steps", "report",
)  # fmt: skip


def main(phases: str) -> None:
    import matplotlib.pyplot  # noqa: F401, what a run imports on its way
    import pyarrow.parquet  # noqa: F401
    import torch

    import acpo.report
    import acpo.trainer  # noqa: F401
    from acpo import config, policy

    torch.set_num_threads(1)
    policy.build(config.from_layers(("nursery", {"problems.task": "chain", "policy.from_config": "tiny"})))  # imports the model's code
    with open(phases, "r+b") as file:
        shared = mmap.mmap(file.fileno(), 1)
    children: set[int] = set()
    for line in sys.stdin:
        asked = json.loads(line)
        if "wait" in asked:
            _, status = os.waitpid(asked["wait"], 0)
            children.discard(asked["wait"])
            answer = {"code": os.waitstatus_to_exitcode(status)}
        else:
            shared[0] = 0
            pid = os.fork()
            if pid == 0:
                train(asked, shared)
            children.add(pid)
            answer = {"pid": pid}
        print(json.dumps(answer), flush=True)
    for pid in children:
        os.kill(pid, signal.SIGKILL)
    os._exit(0)


def train(asked: dict, shared: mmap.mmap) -> None:
    """In the child; never comes back."""
    code = 70
    try:
        log = os.open(asked["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", 1), os.fdopen(2, "w", 1)
        if asked.get("file_bytes"):
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (asked["file_bytes"],) * 2)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what runs in the background deaf to it
        tell(shared)
        from acpo.cli import main

        code = main(["train", *asked["train"]])
        sys.stdout.flush()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def tell(shared: mmap.mmap) -> None:
    """Hooks on what a run calls at the borders of its phases."""
    from acpo import checkpoint, report
    from acpo.policy import Policy
    from acpo.rollout.local import LocalEngine
    from acpo.run import Run
    from acpo.stages import Stages

    switching = PHASES.index("between stages")

    def enter(phase: str, leaves_switch: bool = False) -> None:
        if leaves_switch or shared[0] != switching:
            shared[0] = PHASES.index(phase)

    def hook(owner, name: str, before: str, after: str = "", leaves_switch: bool = False) -> None:
        inner = getattr(owner, name)

        def call(*arguments, **settings):
            enter(before, leaves_switch)
            found = inner(*arguments, **settings)
            if after:
                enter(after)
            if owner is Stages and found:
                shared[0] = switching
            return found

        setattr(owner, name, call)

    hook(Run, "start_phase", "warm-up")
    hook(LocalEngine, "generate", "rollout", "score and credit", leaves_switch=True)
    hook(Policy, "forward", "update")
    hook(Run, "save_rollouts", "rollouts file", "controllers")
    hook(Stages, "update", "controllers")
    hook(Run, "log", "metrics line", "between steps")
    hook(checkpoint, "save", "checkpoint", "between steps")
    hook(report, "write", "report", leaves_switch=True)


if __name__ == "__main__":
    main(sys.argv[1])
