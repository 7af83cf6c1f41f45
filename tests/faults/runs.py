"""The run that the fault tests break, the processes that run it, and what two runs must have in common."""

from __future__ import annotations

import json
import mmap
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from nursery import PHASES

from acpo import checkpoint

ROOT = Path(__file__).resolve().parents[2]
SHORT = """
name: short
problems: {task: chain, steps: 2, modulus: 4, train: 40, held_out: 8, hard: 0.8, wrong_low: 0.5, wrong_high: 0.7}
policy: {from_config: tiny, device: cpu}
warmup: {steps: 40, batch: 8}
rollout: {prompts: 4, group_size: 4, max_new_tokens: 14}
verify: {extract: line}
segmenter: {min_tokens: 2, max_tokens: 32, max_segments: 16, target_tokens: 4, entropy: false}
stages: {switch_share: 0.5}
optimizer: {learning_rate: 3.0e-4}
trainer: {steps: 6, threads: 1, checkpoint_every: 2, eval_every: 3}
eval: {samples: 2}
"""


class Nursery:
    """See nursery.py."""

    def __init__(self, folder: Path):
        self.folder = folder
        phases = folder / "phases"
        phases.write_bytes(b"\0")
        with open(phases, "r+b") as file:
            self.shared = mmap.mmap(file.fileno(), 1)
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, str(Path(__file__).with_name("nursery.py")), str(phases)]
        self.process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.config = folder / "short.yaml"
        self.config.write_text(SHORT, encoding="utf-8")

    def ask(self, **what) -> dict:
        self.process.stdin.write(json.dumps(what) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(self, run: Path, *overrides: str, **limits) -> Job:
        """`acpo train` on the short configuration."""
        run.parent.mkdir(parents=True, exist_ok=True)
        log = run.with_name(f"{run.name}.log")
        pid = self.ask(train=[str(self.config), f"run_dir={run}", *overrides], log=str(log), **limits)["pid"]
        return Job(self, pid, log)

    def train(self, run: Path, *overrides: str, **limits) -> tuple[int, str]:
        """(exit code, what was said)"""
        job = self.start(run, *overrides, **limits)
        return job.wait(), job.said()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=60)
        self.process.stdout.close()


class Job:
    def __init__(self, nursery: Nursery, pid: int, log: Path):
        self.nursery, self.pid, self.log = nursery, pid, log
        self.before = log.stat().st_size if log.exists() else 0

    def phase(self) -> str:
        return PHASES[self.nursery.shared[0]]

    def running(self) -> bool:
        """Not ended: a process that nobody has waited for is a zombie."""
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"

    def until(self, phase: str) -> bool:
        """Waits for a phase; False where the process ended first."""
        polls = 0
        while self.phase() != phase:
            if polls % 64 == 0 and not self.running():
                return False
            polls += 1
            time.sleep(0.0002)
        return True

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> str | None:
        """SIGKILL; the phase that it hit, None where the process had ended by itself."""
        self.send(signal.SIGKILL)
        return self.phase() if self.wait() == -signal.SIGKILL else None

    def wait(self) -> int:
        return self.nursery.ask(wait=self.pid)["code"]

    def said(self) -> str:
        with open(self.log, "rb") as file:
            file.seek(self.before)
            return file.read().decode()


TIMES = ("time/", "seconds", "step_time", "memory_gb", "verify/seconds", "tokens/per_second")


def without_times(record: dict) -> dict:
    return {k: v for k, v in record.items() if not k.startswith(TIMES)}


def records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def same(one: Path, other: Path) -> None:
    """Asserts that two finished runs have the same files, metrics apart from times and memory, rollouts, weights and state, bitwise."""
    listed = [sorted(str(p.relative_to(run)) for p in run.rglob("*")) for run in (one, other)]
    assert listed[0] == listed[1]
    assert [without_times(r) for r in records(one)] == [without_times(r) for r in records(other)]
    for path in (one / "rollouts").iterdir():
        assert path.read_bytes() == (other / "rollouts" / path.name).read_bytes(), path.name
    (tensors, state), (others, state_too) = (checkpoint.latest(run / "checkpoints") for run in (one, other))
    assert tensors.keys() == others.keys()
    for file, values in tensors.items():
        assert values.keys() == others[file].keys()
        assert all(torch.equal(value, others[file][name]) for name, value in values.items()), file
    for kept in (state, state_too):
        kept["counters"].pop("seconds")
        kept["config"].pop("run_dir")
    assert state == state_too
