"""A run small enough for the tests of the training loop: a chain of two steps, a policy of 86 thousand parameters."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import socket
from pathlib import Path

import torch

from acpo import config
from acpo.cli import main
from acpo.config import VerifyConfig
from acpo.problems import Problem
from acpo.run import Run
from acpo.trainer import Trainer
from acpo.verify import Verifier

MINI = """
name: mini
problems: {task: chain, steps: 2, modulus: 4, train: 40, held_out: 16, hard: 0.8, wrong_low: 0.5, wrong_high: 0.7}
policy: {from_config: tiny, device: cpu}
warmup: {steps: 150, batch: 32}
rollout: {prompts: 4, group_size: 4, max_new_tokens: 14}
verify: {extract: line}
segmenter: {min_tokens: 2, max_tokens: 32, max_segments: 16, target_tokens: 4, entropy: false}
optimizer: {learning_rate: 3.0e-4}
trainer: {steps: 8, threads: 1, checkpoint_every: 2, eval_every: 4, keep_checkpoints: 9}
eval: {samples: 2}
"""

TREE = "attribution.source=tree", "credit.scope=all"
MANY = "rollout.prompts=8", "rollout.group_size=8"  # so many that some groups have both outcomes and rollouts that share their first line


ASKED = itertools.count()


def free_port() -> int:
    """Not one that the system gives to connections: until its job listens, any of them could take it."""
    while True:
        port = 20_000 + (17 * os.getpid() + next(ASKED)) % 12_000
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("127.0.0.1", port))
            return port


def write_config(folder: Path, text: str = MINI) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "mini.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def settings(folder: Path, *overrides: str) -> config.Config:
    return config.load(write_config(folder), [f"run_dir={folder / 'run'}", *overrides])


def trainer_of(folder: Path, *overrides: str, weights: dict | None = None) -> Trainer:
    """A trainer without a warm-up of its own, on the given weights."""
    chosen = settings(folder, "warmup.steps=0", *overrides)
    trainer = Trainer(chosen, Run(chosen))
    if weights is not None:
        trainer.policy.load_state_dict(weights, strict=False)
    return trainer


def steps(trainer: Trainer, count: int) -> list[dict]:
    """So many steps of the loop, without its evaluations and checkpoints."""
    out = []
    for _ in range(count):
        trainer.step_number += 1
        out.append(trainer.step())
    return out


def parameters(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in trainer.policy.named_parameters()}


def train(folder: Path, *overrides: str) -> int:
    """`acpo train` on the small configuration, in this process: the exit code."""
    return main(["train", str(write_config(folder)), f"run_dir={folder / 'run'}", *overrides])


def records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


UNEQUAL = ("seconds", "step_time", "memory_gb", "verify/seconds", "tokens/per_second")


def without_times(record: dict) -> dict:
    return {k: v for k, v in record.items() if not k.startswith("time/") and k not in UNEQUAL}


def rolled_out(trainer: Trainer):
    """The batch of one step, ready for its update, and what came before."""
    trainer.step_number += 1
    indices, batch, outcome = trainer._rollout()
    trainer._score(batch, outcome, indices)
    trainer._segment(batch)
    attribution = trainer._attribute(batch, outcome, indices)
    advantages, weights = trainer._credit(batch, outcome, attribution)
    return batch, outcome, attribution, advantages, weights


def exact_match(problem: Problem, response: str, extract: str) -> bool:
    """What the verifier of kind `exact` says."""
    verdict = Verifier(VerifyConfig(extract=extract), "exact")([problem], [response])[0]
    return verdict.reward == 1.0


def one_line(capsys, arguments: list[str]) -> tuple[int, str]:
    """The exit code and the only line on stderr."""
    code = main(arguments)
    error = capsys.readouterr().err
    assert error.endswith("\n") and error.count("\n") == 1, error
    assert "Traceback" not in error and error.startswith("acpo: ")
    return code, error.strip()
