"""Checkpoints: written beside, synced, renamed into place, and the newest complete one found again.

A checkpoint is a folder with safetensors files (weights, optimizer state, random states), state.json (counters and controllers) and SHA256SUMS,
which `sha256sum -c` reads as well: a flipped bit in any file is found before anything is used. Nothing is pickled, so nothing is executed on load.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

FORMAT = 2  # 1 had no SHA256SUMS
SUMS = "SHA256SUMS"


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
        seal(temporary)
        for file in temporary.iterdir():
            shutil.copymode(temporary / "state.json", file)  # safetensors makes its own for the owner's eyes alone, whatever the umask
            _sync(file)
        _sync(temporary)
        if target.exists():  # an older run of the same step: the new one replaces it
            _remove(target)
        os.replace(temporary, target)
        _sync(directory)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write the checkpoint {target}: {error}; earlier checkpoints are untouched") from None
    prune(directory, label, keep)
    return target


def prune(directory: Path, label: str, keep: int) -> None:
    """Removes the checkpoints before the `keep` that end with this one, and what is left of one whose removal was broken off."""
    labels = _labels(directory)
    # Later ones could not be read, or the run would stand behind them: they count for nothing.
    labels = labels[: labels.index(label) + 1] if label in labels else []
    for old in labels[:-keep]:
        try:
            _remove(directory / old)
        except OSError as error:  # whoever made it read-only wants to keep it: no reason to end the run
            print(f"acpo: the old checkpoint {directory / old} cannot be removed: {error.strerror or error}", flush=True)


def _remove(path: Path) -> None:
    """A checkpoint; of one that lies elsewhere the link."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path)


def put(path: Path, write: Callable[[Path], object]) -> None:
    """The file as `write` leaves it, whole and on the disk, or as it was: written beside, synced and renamed. OSErrors name the file."""
    temporary = path.with_name(f".{path.stem}.writing")
    try:
        write(temporary)
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None


def put_folder(path: Path, write: Callable[[Path], object]) -> None:
    """The folder as `write` fills it, whole and on the disk, or as it was: written beside, synced and renamed. OSErrors name the folder."""
    temporary, before = path.with_name(f".writing-{path.name}"), path.with_name(f".before-{path.name}")
    try:
        if before.exists() and not path.exists():  # killed between the two renames
            os.replace(before, path)
        for stale in (temporary, before):
            shutil.rmtree(stale, ignore_errors=True)
        temporary.mkdir()
        write(temporary)
        for file in (*temporary.rglob("*"), temporary):
            _sync(file)
        if path.exists():  # a folder cannot be renamed over another: the one of before stands aside meanwhile
            os.replace(path, before)
        os.replace(temporary, path)
        _sync(path.parent)
        shutil.rmtree(before, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(getattr(error, "errno", None), getattr(error, "strerror", None) or str(error), str(path)) from None


def put_text(path: Path, text: str) -> None:
    put(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def seal(path: Path) -> None:
    """Writes the checksums of a checkpoint's files."""
    names = sorted(file.name for file in path.iterdir() if file.name != SUMS)
    (path / SUMS).write_text("".join(f"{_digest(path / name)}  {name}\n" for name in names), encoding="ascii")


def _digest(path: Path) -> str:
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            found.update(piece)
    return found.hexdigest()


def _verify(path: Path) -> set[str]:
    """The names of the files under the checksums, all of which hold; ValueError that names the file which does not."""
    text = (path / SUMS).read_text(encoding="ascii")
    if not re.fullmatch(r"(?:[0-9a-f]{64}  [\w-]+\.(?:safetensors|json)\n)+", text):
        raise ValueError(f"{SUMS} is damaged")
    sums = {name: digest for digest, name in (line.split("  ") for line in text.splitlines())}
    for name, digest in sums.items():
        if not (path / name).is_file():
            raise ValueError(f"it lacks {name}")
        if _digest(path / name) != digest:
            raise ValueError(f"{name} is damaged: its checksum differs")
    return set(sums)


def _labels(directory: Path) -> list[str]:
    """Complete checkpoints, oldest first: warm-up ones before training ones, each by step."""
    found = []
    for path in directory.iterdir() if directory.is_dir() else ():
        label = re.fullmatch(r"(warmup|step)-([0-9]{1,18})", path.name)
        if label and path.is_dir():
            found.append((label[1] == "step", int(label[2]), path.name))
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
    """Tensors by file name, and state. CheckpointError for what is damaged, incomplete or of another format, naming the file."""
    try:
        sealed = _verify(path) if (path / SUMS).exists() else set()
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        if not isinstance(state, dict):
            raise ValueError("state.json does not hold an object")
        found = state.get("format")
        if found != FORMAT:
            age = "an older" if isinstance(found, int) and found < FORMAT else "a newer" if isinstance(found, int) else "another"
            raise ValueError(f"it has format {found!r}, written by {age} version; this one reads format {FORMAT}")
        names = {f"{name}.safetensors" for name in state.get("files") or ()}
        if not sealed:
            raise ValueError(f"it lacks {SUMS}")
        if not names or sealed != names | {"state.json"}:
            raise ValueError("its files are not those that state.json lists")
        return {name.removesuffix(".safetensors"): load_file(path / name) for name in sorted(names)}, state
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise CheckpointError(f"cannot read the checkpoint {path}: {error}") from None


def check(file: str, values: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """CheckpointError unless a checkpoint's tensors have the names and shapes that this program has room for: a weight that is left out would stay
    what chance made it, without a word."""
    found, own = ({name: tuple(value.shape) for name, value in part.items()} for part in (values, wanted))
    if found == own:
        return
    wrong = [
        f"{name}: {found.get(name, 'not there')}, here {own.get(name, 'not known')}"
        for name in sorted({*found, *own})
        if found.get(name) != own.get(name)
    ]
    raise CheckpointError(
        f"{file}.safetensors of the checkpoint does not fit this policy ({'; '.join(wrong[:3])}; {len(wrong)} in all): it was written with "
        "another model or another version of transformers"
    )


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as a flat dictionary of tensors."""
    return {f"{i}.{key}": value for i, entry in optimizer.state_dict()["state"].items() for key, value in entry.items()}


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
