"""A run's directory: config.yaml, metrics.jsonl, checkpoints/, rollouts/; and whoever is told of what stands there."""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import platform
import re
from typing import TextIO

import yaml

from . import trackers
from .checkpoint import put, put_text
from .config import Config, to_dict
from .display import Display


class RunTakenError(RuntimeError):
    """Another process works in this run's directory."""


class Stopped(Exception):
    """The run was asked to end early and did, behind a checkpoint of where it was."""


class Run:
    def __init__(self, config: Config, quiet: bool = False):
        self.config = config
        self.directory = config.directory
        self.checkpoints = self.directory / "checkpoints"
        self.metrics = self.directory / "metrics.jsonl"
        self.display = Display(quiet)
        self.tracker: trackers.Tracker | None = None
        self.locked: TextIO | None = None  # the open file that holds the lock
        self.keeps_rollouts = config.trainer.keep_rollouts and importlib.util.find_spec("pyarrow") is not None

    def lock(self) -> None:
        """Makes this process the only one that writes here until `unlock`, or its end, however it comes: the lock is the kernel's. It is a record
        lock, which a child that outlives this process does not keep."""
        self.directory.mkdir(parents=True, exist_ok=True)
        file = open(self.directory / ".lock", "a+", encoding="utf-8")  # noqa: SIM115, held open
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            raise RunTakenError(f"{self.directory} is in use by {holder}: two runs must not share a directory, give another run_dir") from None
        except OSError as error:  # a file system without locks
            file.close()
            self.say(f"{self.directory} cannot be locked ({error.strerror}): start no second run in it")
            return
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}\n")
        file.flush()
        self.locked = file

    def unlock(self) -> None:
        if self.locked is not None:
            self.locked.close()
            self.locked = None

    def begin(self) -> None:
        """Makes the directory this run's own. Nothing is written before: a run that is refused leaves no trace in another's directory."""
        self.directory.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(to_dict(self.config), sort_keys=False)
        put_text(self.directory / "config.yaml", text)

    def records(self) -> list[dict]:
        """The lines of metrics.jsonl that are records: a last line that a kill cut off is left out, and a damaged one."""
        if not self.metrics.exists():
            return []
        return [r for r in map(_record, self.metrics.read_bytes().split(b"\n")) if r is not None]

    def has_step(self, step: int) -> bool:
        return any(r["phase"] != "warmup" and r["step"] == step for r in self.records())

    def cut_back(self, warmup_step: int, step: int) -> None:
        """Drops the records after the checkpoint that the run continues from, so that no step stands there twice."""
        whole = self.metrics.read_bytes().split(b"\n")[:-1] if self.metrics.exists() else []  # behind the last end of line: what a kill cut off
        damaged = [i for i, line in enumerate(whole, 1) if _record(line) is None]
        if damaged:
            self.say(f"{self.metrics}: line {', '.join(map(str, damaged))} cannot be read and is left out")
        kept = [r for r in self.records() if (r["step"] <= warmup_step if r["phase"] == "warmup" else r["step"] <= step)]
        put_text(self.metrics, "".join(json.dumps(r) + "\n" for r in kept))
        for path in (self.directory / "rollouts").glob("step-*.parquet"):
            number = re.fullmatch(r"step-([0-9]+)", path.stem)  # and not somebody's copy of one
            if number and int(number[1]) > step:
                path.unlink()

    def save_rollouts(self, step: int, columns: dict[str, list]) -> None:
        """One parquet file a step (the extra `report`), written beside and renamed."""
        import pyarrow
        from pyarrow import parquet

        folder = self.directory / "rollouts"
        folder.mkdir(parents=True, exist_ok=True)
        put(folder / f"step-{step}.parquet", lambda path: parquet.write_table(pyarrow.table(columns), path))

    def log(self, record: dict) -> None:
        """Adds a line to metrics.jsonl, on the disk before the checkpoint that stands for it."""
        try:
            with open(self.metrics, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:  # a full disk is found while writing, and that error names no file
            raise OSError(error.errno, error.strerror, str(self.metrics)) from None
        if self.tracker is not None:
            self.tracker.log(record)
        self.display.show(record)

    def track(self, step: int, warmup_step: int) -> None:
        """From here on trainer.log is told too; the run continues behind these steps of its training and its warm-up."""
        self.tracker = trackers.build(self.config, self.directory, step, warmup_step)

    def start_phase(self, name: str, total: int, done: int) -> None:
        self.display.start_phase(name, total, done)

    def say(self, text: str) -> None:
        self.display.say(text)

    def facts(self, rows: list[tuple[str, str]]) -> None:
        self.display.facts(rows)

    def warn(self, text: str) -> None:
        self.display.warn(text)

    def finish(self) -> None:
        self.display.finish()

    def close(self) -> None:
        self.finish()
        if self.tracker is not None:
            self.tracker.close()
            self.tracker = None

    def last_evaluation(self) -> dict[str, float]:
        found = [r for r in self.records() if "eval/accuracy" in r]
        return {k: v for k, v in found[-1].items() if k.startswith("eval/") or k == "step"} if found else {}


def _record(line: bytes) -> dict | None:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and isinstance(found.get("step"), int) and isinstance(found.get("phase"), str) else None
