"""Checkpoints: whole or not there, and the newest one that reads back is found again."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch

from acpo import checkpoint
from acpo.checkpoint import CheckpointError, latest, load_optimizer, optimizer_tensors, read, save


def write(directory, label: str, value: float = 1.0, keep: int = 2):
    tensors = {"policy": {"w": torch.full((3,), value)}, "random": {"state": torch.arange(4, dtype=torch.uint8)}}
    return save(directory, label, tensors, {"files": sorted(tensors), "value": value}, keep)


def names(directory) -> list[str]:
    return sorted(p.name for p in directory.iterdir())


def test_round_trip(tmp_path):
    path = write(tmp_path / "checkpoints", "step-3", 0.5)
    tensors, state = read(path)
    assert tensors["policy"]["w"].tolist() == [0.5] * 3 and tensors["random"]["state"].dtype == torch.uint8
    assert state["value"] == 0.5
    assert names(path) == ["policy.safetensors", "random.safetensors", "state.json"], "nothing is pickled"


def test_tensors_that_share_memory_or_are_not_contiguous(tmp_path):
    base = torch.arange(12.0).view(3, 4)
    save(tmp_path, "step-1", {"policy": {"t": base.t(), "none": torch.zeros(0, 3)}}, {"files": ["policy"]}, 1)
    found = latest(tmp_path)[0]["policy"]
    assert torch.equal(found["t"], base.t()) and found["none"].shape == (0, 3)


def test_keeps_the_newest_in_numerical_order(tmp_path):
    for label in ("warmup-100", "warmup-900", "step-2", "step-9", "step-10"):
        write(tmp_path, label, keep=2)
    assert names(tmp_path) == ["step-10", "step-9"]
    assert latest(tmp_path)[1]["value"] == 1.0
    (tmp_path / "step-notes").mkdir()
    (tmp_path / "step-11").write_text("a file")
    assert latest(tmp_path) is not None and (tmp_path / "step-notes").is_dir()


def test_training_is_newer_than_warm_up(tmp_path):
    write(tmp_path, "warmup-900", 1.0)
    write(tmp_path, "step-1", 2.0)
    assert latest(tmp_path)[1]["value"] == 2.0


def test_nothing_there(tmp_path):
    assert latest(tmp_path / "absent") is None and latest(tmp_path) is None


def test_the_same_step_again_replaces_it(tmp_path):
    write(tmp_path, "step-1", 1.0)
    write(tmp_path, "step-1", 2.0)
    assert names(tmp_path) == ["step-1"] and latest(tmp_path)[1]["value"] == 2.0


@pytest.mark.parametrize("where", ["save_file", "_sync", "replace"])
def test_broken_off_while_writing(tmp_path, monkeypatch, where):
    """Whatever the moment, the checkpoint before it stands, the half-written one is not taken for one, and the next write clears it."""
    write(tmp_path, "step-1", 1.0)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os if where == "replace" else checkpoint, where, full)
        with pytest.raises(
            CheckpointError, match=r"cannot write the checkpoint .*step-2: .*No space left on device.*; earlier checkpoints are untouched"
        ):
            write(tmp_path, "step-2", 2.0)
    assert latest(tmp_path)[1]["value"] == 1.0
    assert "step-2" not in names(tmp_path)
    write(tmp_path, "step-3", 3.0)
    assert names(tmp_path) == ["step-1", "step-3"]


def test_files_are_on_the_disk_before_the_name_is(tmp_path, monkeypatch):
    events = []
    real = checkpoint._sync, os.replace
    monkeypatch.setattr(checkpoint, "_sync", lambda path: (events.append(path.name), real[0](path))[1])
    monkeypatch.setattr(checkpoint.os, "replace", lambda a, b: (events.append("rename"), real[1](a, b))[1])
    write(tmp_path, "step-1")
    at = events.index("rename")
    assert {"policy.safetensors", "random.safetensors", "state.json"} <= set(events[:at]) and events[at + 1 :] == [tmp_path.name]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="limits are a Unix matter")
def test_really_full(tmp_path):
    """A file-size limit of the operating system in the middle of a tensor: one line, and the earlier checkpoint stands."""
    program = textwrap.dedent(
        """
        import resource, signal, sys, torch
        from pathlib import Path
        from acpo.checkpoint import CheckpointError, latest, save
        where = Path(sys.argv[1])
        save(where, "step-1", {"policy": {"w": torch.ones(8)}}, {"files": ["policy"]}, 2)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            save(where, "step-2", {"policy": {"w": torch.ones(100_000)}}, {"files": ["policy"]}, 2)
        except CheckpointError as error:
            print(error)
        print(len(latest(where)[0]["policy"]["w"]))
        """
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "c")], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    message, length = done.stdout.splitlines()
    assert message.startswith("cannot write the checkpoint") and "step-2" in message and length == "8"


def test_a_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "checkpoints").write_text("a file stands in the way")
    with pytest.raises(CheckpointError, match=r"cannot write the checkpoint .*step-1"):
        write(tmp_path / "checkpoints", "step-1")
    if os.geteuid() != 0:  # root writes anywhere
        locked = tmp_path / "locked"
        locked.mkdir(mode=0o500)
        with pytest.raises(CheckpointError, match="Permission denied"):
            write(locked / "checkpoints", "step-1")


def damage(path, how: str) -> None:
    if how == "truncated tensors":
        file = path / "policy.safetensors"
        file.write_bytes(file.read_bytes()[:-5])
    elif how == "empty tensors":
        (path / "policy.safetensors").write_bytes(b"")
    elif how == "missing shard":
        (path / "random.safetensors").unlink()
    elif how == "truncated state":
        file = path / "state.json"
        file.write_bytes(file.read_bytes()[:-5])
    elif how == "zeros for a state":
        (path / "state.json").write_bytes(b"\0" * 40)
    elif how == "another state":
        (path / "state.json").write_text("[]")
    elif how == "no list of files":
        (path / "state.json").write_text(json.dumps({"format": checkpoint.FORMAT}))
    elif how == "missing state":
        (path / "state.json").unlink()
    elif how == "other format":
        file = path / "state.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "format": 99}))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("truncated tensors", "cannot read the checkpoint"), ("empty tensors", "cannot read the checkpoint"),
        ("missing shard", "lacks random.safetensors"), ("truncated state", "cannot read the checkpoint"),
        ("zeros for a state", "cannot read the checkpoint"), ("missing state", "cannot read the checkpoint"),
        ("another state", "cannot read the checkpoint"), ("no list of files", "cannot read the checkpoint"),
        ("other format", "has format 99, this version reads 1"),
    ],
)  # fmt: skip
def test_a_damaged_one_is_passed_over_and_said(tmp_path, capsys, how, message):
    write(tmp_path, "step-1", 1.0)
    damage(write(tmp_path, "step-2", 2.0), how)
    assert latest(tmp_path)[1]["value"] == 1.0
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1 and "step-2" in said[0] and message in said[0] and said[0].endswith("trying the one before it")


def test_nothing_that_reads_is_an_error_not_a_fresh_start(tmp_path):
    damage(write(tmp_path, "step-1"), "truncated tensors")
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* can be read; remove the folder to start again"):
        latest(tmp_path)


def test_optimizer_state_round_trip():
    torch.manual_seed(0)
    start = torch.randn(5, 3)
    models = [torch.nn.Parameter(start.clone()) for _ in range(2)]
    optimizers = [torch.optim.AdamW([m], lr=1e-2, betas=(0.9, 0.95)) for m in models]
    gradients = torch.randn(6, 5, 3)

    def advance(i: int, part: torch.Tensor) -> None:
        for gradient in part:
            models[i].grad = gradient.clone()
            optimizers[i].step()

    advance(0, gradients)
    advance(1, gradients[:3])
    middle = models[1].detach().clone()
    saved = {k: v.clone() for k, v in optimizer_tensors(optimizers[1]).items()}
    models[1] = torch.nn.Parameter(middle)
    optimizers[1] = torch.optim.AdamW([models[1]], lr=1e-2, betas=(0.9, 0.95))
    load_optimizer(optimizers[1], saved)
    advance(1, gradients[3:])
    assert torch.equal(models[0], models[1])


def test_optimizer_without_steps_has_no_state():
    fresh = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))])
    assert optimizer_tensors(fresh) == {}
    load_optimizer(fresh, {})
    assert fresh.state_dict()["state"] == {}
