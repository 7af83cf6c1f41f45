"""Checkpoints: whole or not there, and the newest one that reads back is found again."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from acpo import checkpoint
from acpo.checkpoint import CheckpointError, latest, load_optimizer, optimizer_tensors, put, put_folder, read, save, seal


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
    assert names(path) == ["SHA256SUMS", "policy.safetensors", "random.safetensors", "state.json"], "nothing is pickled"
    assert subprocess.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=path, check=False).returncode == 0


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


def test_an_old_one_that_cannot_be_removed_ends_nothing(tmp_path, monkeypatch, capsys):
    """Somebody keeps it: read-only, or as a link to where it really lies."""
    write(tmp_path / "elsewhere", "step-2")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "step-2").symlink_to(tmp_path / "elsewhere" / "step-2")
    write(tmp_path / "c", "step-4", keep=1)
    assert names(tmp_path / "c") == ["step-4"] and read(tmp_path / "elsewhere" / "step-2")[1]["value"] == 1.0

    def denied(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(checkpoint.shutil, "rmtree", denied)
    write(tmp_path / "c", "step-6", 6.0, keep=1)
    assert f"the old checkpoint {tmp_path / 'c' / 'step-4'} cannot be removed: Permission denied" in capsys.readouterr().out
    assert latest(tmp_path / "c")[1]["value"] == 6.0 and names(tmp_path / "c") == ["step-4", "step-6"]


def test_one_written_behind_a_damaged_one_stays(tmp_path):
    """A run that passed over step-4 stands before it: what it writes is what there is."""
    for step in (1, 2, 4):
        write(tmp_path, f"step-{step}", float(step), keep=9)
    flip = tmp_path / "step-4" / "policy.safetensors"
    flip.write_bytes(flip.read_bytes()[:-1] + b"?")
    write(tmp_path, "step-3", 3.0, keep=1)
    assert names(tmp_path) == ["step-3", "step-4"] and latest(tmp_path)[1]["value"] == 3.0


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
    assert {"SHA256SUMS", "policy.safetensors", "random.safetensors", "state.json"} <= set(events[:at]) and events[at + 1 :] == [tmp_path.name]


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


FILES = ("SHA256SUMS", "policy.safetensors", "random.safetensors", "state.json")


def rewritten(path, change) -> None:
    """The state as `change` makes it, under checksums that hold."""
    file = path / "state.json"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    seal(path)


def damage(path, how: str) -> None:
    kind, _, name = how.partition(": ")
    file = path / name
    if kind == "truncated":
        file.write_bytes(file.read_bytes()[:-5])
    elif kind == "empty":
        file.write_bytes(b"")
    elif kind == "zeros":
        file.write_bytes(b"\0" * file.stat().st_size)
    elif kind == "missing":
        file.unlink()
    elif kind == "another state":
        rewritten(path, lambda state: [])
    elif kind == "no list of files":
        rewritten(path, lambda state: {"format": checkpoint.FORMAT})
    elif kind == "a shard more than the list":
        rewritten(path, lambda state: {**state, "files": ["policy"]})
    elif kind == "a shard fewer than the list":
        rewritten(path, lambda state: {**state, "files": [*state["files"], "reference"]})
    elif kind == "no format":
        rewritten(path, lambda state: {"files": state["files"]})
    elif kind == "newer format":
        rewritten(path, lambda state: {**state, "format": 99})
    elif kind == "older format":
        rewritten(path, lambda state: {**state, "format": 1})
        (path / "SHA256SUMS").unlink()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        *((f"{kind}: {name}", "SHA256SUMS is damaged") for kind in ("truncated", "empty", "zeros") for name in FILES[:1]),
        *((f"{kind}: {name}", f"{name} is damaged: its checksum differs") for kind in ("truncated", "empty", "zeros") for name in FILES[1:]),
        *((f"missing: {name}", f"it lacks {name}") for name in FILES),
        ("another state", "does not hold an object"), ("no list of files", "not those that state.json lists"),
        ("a shard more than the list", "not those that state.json lists"), ("a shard fewer than the list", "not those that state.json lists"),
        ("no format", "has format None, written by another version; this one reads format 2"),
        ("newer format", "has format 99, written by a newer version; this one reads format 2"),
        ("older format", "has format 1, written by an older version; this one reads format 2"),
    ],
)  # fmt: skip
def test_a_damaged_one_is_passed_over_and_said(tmp_path, capsys, how, message):
    write(tmp_path, "step-1", 1.0)
    damage(write(tmp_path, "step-2", 2.0), how)
    assert latest(tmp_path)[1]["value"] == 1.0
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1 and "step-2" in said[0] and message in said[0] and said[0].endswith("trying the one before it")


def test_every_flipped_bit_is_found(tmp_path):
    """A bit of every byte of every file: SHA256SUMS, tensors, state."""
    path = write(tmp_path, "step-1")
    count = 0
    for name in FILES:
        whole = (path / name).read_bytes()
        for at in range(len(whole)):
            flipped = bytearray(whole)
            flipped[at] ^= 1 << (5 * at + 3) % 8
            (path / name).write_bytes(flipped)
            with pytest.raises(CheckpointError, match=r"cannot read the checkpoint .*step-1: .*(is damaged|it lacks|codec)"):
                read(path)
            count += 1
        (path / name).write_bytes(whole)
    assert read(path)[1]["value"] == 1.0 and count > 400


def test_put_leaves_the_old_or_the_new_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "config.yaml"
    put(path, lambda p: p.write_text("old"))

    def full(p):
        p.write_text("ne")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match=r"No space left on device: '.*config.yaml'"):
        put(path, full)
    assert names(tmp_path) == ["config.yaml"] and path.read_text() == "old"
    put(path, lambda p: p.write_text("new"))
    assert names(tmp_path) == ["config.yaml"] and path.read_text() == "new"


def test_a_folder_is_the_old_one_or_the_new_one(tmp_path, monkeypatch):
    """Broken off while it is written, between the two renames, or behind them: what stands there is whole, or comes back with the next write."""

    def write(text):
        return lambda folder: [(folder / name).write_text(text) for name in ("a", "b")]

    def broken(folder):
        (folder / "a").write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "policy"
    put_folder(path, write("one"))
    with pytest.raises(OSError, match=r"No space left on device: '.*policy'"):
        put_folder(path, broken)
    assert {f.name: f.read_text() for f in path.iterdir()} == {"a": "one", "b": "one"} and names(tmp_path) == ["policy"]
    replace = os.replace

    def killed(source, target):
        if Path(source).name.startswith(".writing"):
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            put_folder(path, write("two"))
    with pytest.raises(OSError):
        put_folder(path, broken)
    assert (path / "b").read_text() == "one"
    put_folder(path, write("three"))
    assert {f.name: f.read_text() for f in path.iterdir()} == {"a": "three", "b": "three"} and names(tmp_path) == ["policy"]


def test_nothing_that_reads_is_an_error_not_a_fresh_start(tmp_path):
    damage(write(tmp_path, "step-1"), "truncated: policy.safetensors")
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
