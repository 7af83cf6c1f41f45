"""`acpo compare`: arms x paired seeds from shared warm starts, in parallel, resumable after a kill at any instant.

comparison.py tells what stands in its file. Every run is a plain run directory in a process of its own with one thread. A warm start is one too: it
is trained once, and every arm's run of a seed begins with the same weights, bit for bit. What is finished is not repeated; a run that was broken off
goes on by the trainer's own resume, and one that outlives a killed command is waited for by the next.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import config as configuration
from . import state
from .checkpoint import put_text
from .comparison import load
from .config import Config, ConfigError
from .display import output
from .evidence import mean_area, run_record, summarise
from .layers import differences

RECORD = {"config": dict, "code": str, "points": list, "passes": list}  # what is read of finished.json


@dataclass
class Job:
    """One run: its place below the comparison's directory, and what it adds to the common settings."""

    key: str
    settings: dict[str, Any]


class Comparer:
    """The runs of a comparison and where they stand, in `directory`."""

    def __init__(self, path: str | Path, directory: str | Path | None = None):
        self.path = Path(path)
        self.chosen = load(path)
        self.directory = Path(directory or f"runs/compare/{self.chosen.name}")
        self._records: dict[str, dict] = {}

    # --- which runs there are -------------------------------------------------------------------------------------------------------

    def warm(self, seed: int) -> Job:
        """The warm start that the runs of a seed begin with."""
        own, starts = {"method": "grpo", "trainer.steps": 0}, self.chosen.warm_starts
        if not starts:
            return Job("warm", own)
        start = starts[seed % len(starts)]
        return Job(f"warm-{start}", {**own, "seed": start})

    @property
    def warm_starts(self) -> list[Job]:
        return list({job.key: job for job in map(self.warm, self.chosen.tuning_seeds + self.chosen.seeds)}.values())

    def job(self, arm: str, rate: float, seed: int) -> Job:
        policy = str(self.directory / self.warm(seed).key / "policy")
        start = {"policy.path": policy, "policy.from_config": "", "warmup.steps": 0, "eval.start": False}
        return Job(f"{arm}/lr-{rate:g}/seed-{seed}", {**self.chosen.arms[arm], **start, "optimizer.learning_rate": rate, "seed": seed})

    def settings(self, job: Job) -> Config:
        """A run's configuration. The warm-up is the only thing that the warm start and the runs do not share."""
        own = {**job.settings, "trainer.threads": 1, "trainer.keep_rollouts": False, "run_dir": str(self.directory / job.key)}
        return configuration.from_layers((str(self.path), self.chosen.settings), (f"{self.path}, {job.key}", own))

    def finished(self, job: Job) -> dict | None:
        """The record of a finished run, None before."""
        if job.key in self._records:
            return self._records[job.key]
        path = self.directory / job.key / "finished.json"
        if not path.exists():
            return None
        record = _record(path)
        # Read through the present settings: one that is newer than the run stood at its default.
        past = configuration.from_layers((str(path), configuration.flatten(record["config"])))
        changed = differences(state.lasting(configuration.to_dict(past)), state.lasting(configuration.to_dict(self.settings(job))))
        if changed:
            raise ConfigError(f"{path.parent} holds a run with other settings ({'; '.join(changed[:3])}): give another --dir, or remove it")
        self._records[job.key] = record
        return record

    def seeds(self, arm: str) -> list[int]:
        return self.chosen.fewer.get(arm, self.chosen.seeds)

    def tuning(self, arm: str) -> list[Job]:
        """The runs that choose the arm's learning rate; none where it is fixed or another arm's."""
        if arm in self.chosen.rates:
            return []
        return [self.job(arm, r, s) for s in self.chosen.tuning_seeds for r in self.chosen.learning_rates]

    def rate(self, arm: str) -> float | None:
        """The arm's learning rate: the best of the grid by mean area on the tuning seeds, None while those runs are not finished."""
        fixed = self.chosen.rates.get(arm)
        if isinstance(fixed, str):
            return self.rate(fixed)
        if fixed is not None:
            return float(fixed)
        found: dict[float, list[float]] = {}
        for job in self.tuning(arm):
            record = self.finished(job)
            if record is None:
                return None
            found.setdefault(job.settings["optimizer.learning_rate"], []).append(mean_area(record))
        if not found:
            return configuration.from_layers((str(self.path), self.chosen.settings)).optimizer.learning_rate
        return max(found, key=lambda rate: sum(found[rate]) / len(found[rate]))

    def outstanding(self, arms: list[str] | None = None) -> list[Job]:
        """What can be run now, in the order of running."""
        return [job for job in self.known(arms) if self.finished(job) is None]

    def known(self, arms: list[str] | None = None) -> list[Job]:
        """The warm starts, then of the runs that begin with a finished one those of the tuning and, seed by seed, every arm whose rate is known."""
        cold = [job for job in self.warm_starts if self.finished(job) is None]
        names = [a for a in self.chosen.arms if arms is None or a in arms]
        chosen_for = list(dict.fromkeys(r if isinstance(r := self.chosen.rates.get(a), str) else a for a in names))
        jobs = sorted((j for a in chosen_for for j in self.tuning(a)), key=lambda j: j.settings["seed"])
        rates = {a: self.rate(a) for a in names}
        jobs += [self.job(a, rates[a], s) for s in self.chosen.seeds for a in names if rates[a] is not None and s in self.seeds(a)]
        return self.warm_starts + [j for j in jobs if self.warm(j.settings["seed"]) not in cold]

    def results(self) -> tuple[dict[str, Any], dict[str, dict[int, dict]]]:
        """The table of what is finished so far, and the records behind it, by arm and seed."""
        rates = {arm: self.rate(arm) for arm in self.chosen.arms}
        runs = {
            arm: {s: record for s in self.seeds(arm) if (record := self.finished(self.job(arm, rate, s))) is not None}
            for arm, rate in rates.items()
            if rate is not None
        }
        out = summarise(runs, self.chosen.against, self.chosen.baselines, self.chosen.warm_starts)
        for arm, found in out["arms"].items():
            found["rate"] = rates[arm]
            found["settings"] = self.chosen.arms[arm]
            found["tuning"] = {job.key.partition("/")[2]: round(mean_area(r), 5) for job in self.tuning(arm) if (r := self.finished(job)) is not None}
        tried = [r for arm in self.chosen.arms for job in self.tuning(arm) if (r := self.finished(job)) is not None]
        starts = [{**r["points"][0], **(r["passes"] or [{}])[0]} for job in self.warm_starts if (r := self.finished(job)) is not None]
        code = sorted({r["code"] for found in runs.values() for r in found.values()})
        curves = {arm: {s: r["points"] for s, r in found.items()} for arm, found in runs.items()}
        ends = {arm: {s: {k: r[k] for k in ("code", "failure", "stage2_from", "passes")} for s, r in found.items()} for arm, found in runs.items()}
        return {
            "name": self.chosen.name, **out, "code": code, "warm_start": _mean(starts),
            "tuning": {"runs": len(tried), "seconds": round(sum(r["points"][-1]["seconds"] for r in tried), 1)},
            "warm_starts": self.chosen.warm_starts, "settings": self.chosen.settings, "curves": curves, "ends": ends,
        }, runs  # fmt: skip

    # --- running them ---------------------------------------------------------------------------------------------------------------

    def run(self, jobs: int = 1, launch: str = "", arms: list[str] | None = None, most: int | None = None) -> None:
        """Runs what is outstanding, `jobs` at a time, each as a process behind the words of `launch` (such as "nice -n 10")."""
        if unknown := [a for a in arms or [] if a not in self.chosen.arms]:
            raise ConfigError(f"--arms names {unknown[0]!r}, which is none of the arms {', '.join(self.chosen.arms)}")
        try:
            words = shlex.split(launch)
        except ValueError as error:
            raise ConfigError(f"--launch must be words as a shell reads them, got {launch!r}: {error}") from None
        for job in self.known(arms):
            if self.finished(job) is not None:  # killed behind its record
                shutil.rmtree(self.directory / job.key / "checkpoints", ignore_errors=True)
        running: dict[Future, Job] = {}
        started = 0
        with ThreadPoolExecutor(jobs) as pool:
            try:
                while True:
                    waiting = [j for j in self.outstanding(arms) if j not in running.values()]
                    while waiting and len(running) < jobs and (most is None or started < most):
                        job = waiting.pop(0)
                        with output():
                            print(f"run {job.key}  ({len(waiting)} more known)")
                        running[pool.submit(self._launch, job, words)] = job
                        started += 1
                    if not running:
                        return
                    done, _ = wait(running, return_when=FIRST_COMPLETED)
                    for future in done:
                        running.pop(future)
                        future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _launch(self, job: Job, words: list[str]) -> None:
        folder = self.directory / job.key
        folder.mkdir(parents=True, exist_ok=True)
        command = [*words, sys.executable, "-m", "acpo.cli", "compare", str(self.path), "--dir", str(self.directory), "--one", job.key]
        with open(folder / "log.txt", "a", encoding="utf-8") as log:
            code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode
        if code != 0:
            last = (folder / "log.txt").read_text(encoding="utf-8").strip().splitlines()[-1:]
            raise RunError(f"the run {job.key} ended with code {code}: {''.join(last)} (all of it in {folder / 'log.txt'})")

    def one(self, key: str) -> None:
        """One run, in this process: what `run` launches. It outlives a driver that is killed: where another process is at this run, that one is
        waited for, and what it finished is not repeated."""
        job = next((j for j in self.known() if j.key == key), None)
        if job is None:
            raise ConfigError(f"--one {key}: no such run can begin in {self.directory}")
        folder = self.directory / key
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / ".one.lock", "a", encoding="utf-8") as file:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.lockf(file, fcntl.LOCK_EX)  # over the run's own, which ends before the record is written
            if self.finished(job) is None:
                self._train(job)

    def _train(self, job: Job) -> None:
        """A policy that blows up is a result too: the run ends there, with accuracy 0. An engine that fails is none: the run is outstanding as
        before."""
        from .guard import Interrupted
        from .run import Run
        from .trainer import Trainer, TrainingError

        settings = self.settings(job)
        run = Run(settings)
        trainer, failure = Trainer(settings, run), ""
        try:
            trainer.train(export=job in self.warm_starts)
        except TrainingError as error:
            if job in self.warm_starts or isinstance(error, Interrupted):
                raise
            failure = str(error)
        curve = run_record(run.records(), settings.trainer.steps, trainer.policy.device.type == "cpu")
        record = {"key": job.key, "config": configuration.to_dict(settings), "code": code_hash(), "failure": failure, **curve}
        put_text(run.directory / "finished.json", json.dumps(record))
        shutil.rmtree(run.checkpoints, ignore_errors=True)  # a finished run needs none: some megabytes a run, hundreds of runs


def _record(path: Path) -> dict:
    """The record of a finished run."""
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or not all(isinstance(found.get(k), kind) for k, kind in RECORD.items()) or not found["points"]:
        raise RunError(f"{path} is damaged: remove the folder {path.parent}, and the same command repeats the run")
    return found


def _mean(records: list[dict]) -> dict[str, Any]:
    return {k: sum(r[k] for r in records) / len(records) if isinstance(v, float) else v for k, v in (records or [{}])[0].items()}


class RunError(RuntimeError):
    """A run of a comparison that did not end as it should."""


def code_hash() -> str:
    """Twelve digits that name the code of both packages: runs of different code are not to be compared in silence."""
    root = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for package in ("acpo", "acpo_kernels"):
        for path in sorted((root / package).rglob("*.py")):
            digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]
