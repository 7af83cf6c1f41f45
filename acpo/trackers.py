"""`trainer.log`: the numbers of metrics.jsonl in TensorBoard, wandb or trackio as well. Each is an extra, imported where it is asked for."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Protocol

from .config import Config, ConfigError, to_dict


class Tracker(Protocol):
    def log(self, record: dict) -> None: ...

    def close(self) -> None: ...


def check(config: Config) -> None:
    """A ConfigError where the package of trainer.log is not installed: before a run begins."""
    name = config.trainer.log
    if name and importlib.util.find_spec(name) is None:
        raise ConfigError(f"trainer.log = {name!r} needs {name}: pip install -e '.[{name}]'")


def build(config: Config, directory: Path, step: int, warmup_step: int) -> Tracker | None:
    """The tracker of a run that continues behind these steps of its training and of its warm-up (0: none yet). TensorBoard drops what a part that was
    broken off had logged later."""
    check(config)
    if config.trainer.log == "tensorboard":
        return _TensorBoard(directory, step, warmup_step)
    return _Weights(config, directory) if config.trainer.log else None


def numbers(record: dict) -> dict[str, float]:
    return {k: v for k, v in record.items() if isinstance(v, (int, float)) and k != "step"}


class _TensorBoard:
    """Event files in tensorboard/ of the run directory."""

    def __init__(self, directory: Path, step: int, warmup_step: int):
        from torch.utils.tensorboard import SummaryWriter

        # The warm-up counts for itself, and what is dropped is dropped of all that one writer shows.
        self.steps, self.warmup = (
            SummaryWriter(str(folder), purge_step=behind + 1 if behind else 0)
            for folder, behind in ((directory / "tensorboard", step), (directory / "tensorboard" / "warmup", warmup_step))
        )

    def log(self, record: dict) -> None:
        writer = self.warmup if record.get("phase") == "warmup" else self.steps
        for name, value in numbers(record).items():
            writer.add_scalar(name, value, record["step"])
        writer.flush()  # a run that is killed has shown all its steps

    def close(self) -> None:
        self.steps.close()
        self.warmup.close()


class _Weights:
    """wandb and trackio, which speaks its language. The project is the configuration's name, the run its directory, and it is resumed with it."""

    def __init__(self, config: Config, directory: Path):
        self.module = importlib.import_module(config.trainer.log)
        settings = {"project": config.name, "name": directory.name, "config": to_dict(config)}
        if config.trainer.log == "wandb":
            settings |= {"dir": str(directory), "id": hashlib.sha256(str(directory.resolve()).encode()).hexdigest()[:16], "resume": "allow"}
        else:
            settings |= {"resume": "allow", "embed": False}
        with contextlib.redirect_stdout(sys.stderr):  # what they have to say is no result of ours
            self.run = self.module.init(**settings)
        if config.trainer.log == "wandb":  # the warm-up counts for itself
            self.run.define_metric("warmup/*", step_metric="warmup/step")
            self.run.define_metric("*", step_metric="step")

    def log(self, record: dict) -> None:
        if self.module.__name__ == "trackio":
            self.module.log(numbers(record), step=record["step"])
        else:  # wandb's own step never falls, and the one behind the warm-up does
            self.module.log({**numbers(record), "warmup/step" if record["phase"] == "warmup" else "step": record["step"]})

    def close(self) -> None:
        with contextlib.redirect_stdout(sys.stderr):
            self.module.finish()
