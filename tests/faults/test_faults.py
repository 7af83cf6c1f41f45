"""What else happens to a run: SIGTERM, a second process, a full disk, a disk that cannot be written, a damaged checkpoint. Each is one clear line or
a fall back that is said, and the same command ends bitwise as if nothing had been."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time

import pytest
from runs import Job, same

from acpo import checkpoint


@pytest.fixture
def mount(tmp_path):
    """mount(*arguments): a file system of the test's own, at tmp_path/disk."""
    disk = tmp_path / "disk"
    disk.mkdir()
    done = []

    def call(*arguments: str):
        found = subprocess.run(["mount", *arguments, str(disk)], capture_output=True, text=True)
        if found.returncode != 0:
            pytest.skip(f"mounting needs root: {found.stderr.strip()}")
        done.append(arguments)
        return disk

    yield call
    if done:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def one_line(said: str) -> str:
    """The error: the last line, and no traceback before it."""
    assert "Traceback" not in said
    return said.splitlines()[-1]


def test_sigterm_saves_and_a_second_process_is_refused(nursery, undisturbed, tmp_path):
    run = tmp_path / "run"
    job = nursery.start(run)
    assert job.until("warm-up")
    job.send(signal.SIGTERM)
    assert job.wait() == 0
    assert "ended by SIGTERM at warm-up step" in job.said() and checkpoint.newest(run / "checkpoints").startswith("warmup-")
    first = nursery.start(run)
    assert first.until("update")
    code, said = nursery.train(run)
    assert code == 2 and f"{run} is in use by process {first.pid} on" in one_line(said) and "give another run_dir" in said
    first.send(signal.SIGTERM)
    assert first.wait() == 0
    said = first.said()
    assert "resumed from warm-up step" in said and "ended by SIGTERM at step" in said
    step = checkpoint.latest(run / "checkpoints")[1]["step"]
    assert step >= 1 and f"at step {step}, saved" in said, "the step under way is the last one, and it is in the checkpoint"
    code, said = nursery.train(run)
    assert code == 0 and f"resumed from step {step}" in said
    same(undisturbed, run)


def test_two_at_the_same_instant_then_ctrl_c_then_another_place(nursery, undisturbed, tmp_path):
    run = tmp_path / "run"
    jobs = [nursery.start(run), nursery.start(run)]
    while all(job.running() for job in jobs):
        time.sleep(0.01)
    jobs.sort(key=Job.running)
    assert jobs[0].wait() == 2 and f"{run} is in use by process {jobs[1].pid} on" in jobs[0].said()
    assert jobs[1].until("update")
    jobs[1].send(signal.SIGINT)
    time.sleep(0.01)
    jobs[1].send(signal.SIGINT)  # the first one alone lets the step end and saves
    assert jobs[1].wait() == 130
    assert one_line(jobs[1].said()) == "acpo: interrupted; the same command continues from the last checkpoint"
    there = run.rename(tmp_path / "there")
    code, said = nursery.train(there)
    assert code == 0, said
    same(undisturbed, there)


@pytest.mark.parametrize("size", ["600k", pytest.param("8k", marks=pytest.mark.slow), pytest.param("2500k", marks=pytest.mark.slow)])
def test_a_full_disk(nursery, undisturbed, mount, size):
    disk = mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs")
    code, said = nursery.train(disk / "run")
    assert code == 1 and "No space left on device" in one_line(said) and str(disk) in one_line(said), said
    mount("-o", "remount,size=64m")
    code, said = nursery.train(disk / "run")
    assert code == 0, said
    (disk / "run.log").unlink()
    same(undisturbed, disk / "run")


@pytest.mark.slow
def test_files_that_may_not_grow(nursery, undisturbed, tmp_path):
    """The operating system's limit of a file's size, where nothing can be mounted. What the run says goes into a file as well and must fit."""
    for limit, name in ((2_500, "config.yaml"), (100_000, "warmup-40"), (500_000, "step-2")):
        code, said = nursery.train(tmp_path / "run", file_bytes=limit)
        assert code == 1 and "File too large" in one_line(said) and name in one_line(said), (limit, said)
        (tmp_path / "run.log").unlink()
    assert nursery.train(tmp_path / "run")[0] == 0
    same(undisturbed, tmp_path / "run")


def test_a_disk_that_cannot_be_written(nursery, mount, tmp_path):
    disk = mount("-t", "tmpfs", "tmpfs")
    (disk / "old").mkdir()
    mount("-o", "remount,ro")
    for run in (disk / "old", disk / "new"):
        log = tmp_path / "log"
        pid = nursery.ask(train=[str(nursery.config), f"run_dir={run}"], log=str(log))["pid"]
        assert nursery.ask(wait=pid)["code"] == 1
        assert one_line(log.read_text()).startswith(f"acpo: Read-only file system: {run}")


def flip(path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def format_of(path, version: int) -> None:
    file = path / "state.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "format": version}))
    checkpoint.seal(path)


DAMAGES = {
    "a flipped bit": (lambda path: flip(path / "optimizer.safetensors"), "optimizer.safetensors is damaged: its checksum differs"),
    "a missing shard": (lambda path: (path / "policy.safetensors").unlink(), "it lacks policy.safetensors"),
    "a truncated file": (lambda path: os.truncate(path / "random.safetensors", 100), "random.safetensors is damaged"),
    "an older format": (lambda path: format_of(path, 1), "it has format 1, written by an older version"),
    "a newer format": (lambda path: format_of(path, 3), "it has format 3, written by a newer version"),
}


@pytest.mark.slow
def test_a_damaged_checkpoint_is_passed_over_and_said(nursery, undisturbed, tmp_path):
    run = tmp_path / "run"
    assert nursery.train(run)[0] == 0
    for name, (damage, message) in DAMAGES.items():
        damage(run / "checkpoints" / "step-6")
        code, said = nursery.train(run)
        assert code == 0, (name, said)
        assert f"step-6: {message}" in said and "trying the one before it" in said and "resumed from step 4" in said, (name, said)
        same(undisturbed, run)
    for label in ("step-4", "step-6"):
        flip(run / "checkpoints" / label / "state.json")
    code, said = nursery.train(run)
    assert code == 1 and "no checkpoint in" in one_line(said) and "can be read; remove the folder to start again" in said
