"""Checkpoints: written beside, synced, renamed into place, and the newest complete one found again.

A checkpoint is a folder with safetensors files (weights, optimizer state, random states) and state.json (counters and controllers).
Nothing is pickled, so nothing is executed on load.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

FORMAT = 1


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used, or could not be written."""


def save(directory: Path, label: str, tensors: dict[str, dict[str, Tensor]], state: dict, keep: int) -> Path:
    """Writes directory/label atomically and keeps the newest `keep` checkpoints. tensors maps file names to their tensors."""
    target, temporary = directory / label, directory / f".writing-{label}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for stale in directory.glob(".writing-*"):
            shutil.rmtree(stale)
        temporary.mkdir()
        for name, values in tensors.items():
            save_file({k: v.detach().contiguous() for k, v in values.items()}, temporary / f"{name}.safetensors")
        (temporary / "state.json").write_text(json.dumps({"format": FORMAT, **state}), encoding="utf-8")
        for file in temporary.iterdir():
            _sync(file)
        _sync(temporary)
        if target.exists():  # an older run of the same step: the new one replaces it
            shutil.rmtree(target)
        os.replace(temporary, target)
        _sync(directory)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write the checkpoint {target}: {error}; earlier checkpoints are untouched") from None
    for old in _labels(directory)[:-keep]:
        shutil.rmtree(directory / old)
    return target


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _labels(directory: Path) -> list[str]:
    """Complete checkpoints, oldest first: warm-up ones before training ones, each by step."""
    found = []
    for path in directory.glob("*-*") if directory.is_dir() else ():
        phase, _, step = path.name.partition("-")
        if phase in ("warmup", "step") and step.isdigit() and path.is_dir():
            found.append((phase == "step", int(step), path.name))
    return [name for _, _, name in sorted(found)]


def newest(directory: Path) -> str | None:
    """The name of the newest checkpoint, unread."""
    return next(reversed(_labels(directory)), None)


def latest(directory: Path) -> tuple[dict[str, dict[str, Tensor]], dict] | None:
    """Tensors and state of the newest checkpoint that reads back; damaged ones are passed over, saying so. None without any."""
    problems = []
    for label in reversed(_labels(directory)):
        try:
            return read(directory / label)
        except CheckpointError as error:
            problems.append(str(error))
            print(f"acpo: {error}; trying the one before it", flush=True)
    if problems:
        raise CheckpointError(f"no checkpoint in {directory} can be read; remove the folder to start again")
    return None


def read(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict]:
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        tensors = {file.stem: load_file(file) for file in sorted(path.glob("*.safetensors"))}
        if not isinstance(state, dict):
            raise ValueError("state.json does not hold an object")
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"cannot read the checkpoint {path}: {error}") from None
    if state.get("format") != FORMAT:
        raise CheckpointError(f"the checkpoint {path} has format {state.get('format')!r}, this version reads {FORMAT}")
    if "files" not in state:
        raise CheckpointError(f"cannot read the checkpoint {path}: its state.json lists no files")
    missing = [name for name in state["files"] if name not in tensors]
    if missing:
        raise CheckpointError(f"the checkpoint {path} lacks {', '.join(missing)}.safetensors")
    return tensors, state


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as a flat dictionary of tensors."""
    return {f"{i}.{key}": value for i, entry in optimizer.state_dict()["state"].items() for key, value in entry.items()}


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
