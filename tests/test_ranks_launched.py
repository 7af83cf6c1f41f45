"""Two processes under a launcher: sharded parameters; one vLLM server for all; a process that dies."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from fake_vllm import serving
from loop import free_port, records, settings, steps, train, trainer_of, without_times, write_config

from acpo.checkpoint import latest, optimizer_tensors
from acpo.state import resume as state_of

pytestmark = pytest.mark.slow

LAUNCHERS = {  # accelerate's --cpu would start one process
    "torchrun": ("torch.distributed.run", "--nproc-per-node", "{}", "--master-port"),
    "accelerate": ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "{}", "--main_process_port"),
}


@pytest.fixture
def launched():
    """`acpo train` on two processes or more, which do not outlive the test."""
    jobs = []

    def start(folder: Path, *overrides: str, launcher: str = "torchrun", processes: int = 2) -> subprocess.Popen:
        command = [sys.executable, "-m", *(word.format(processes) for word in LAUNCHERS[launcher]), str(free_port()), "-m", "acpo.cli"]
        arguments = ["train", str(write_config(folder)), f"run_dir={folder / 'run'}", *overrides]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        jobs.append(subprocess.Popen([*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment))
        return jobs[-1]

    yield start
    for job in jobs:
        job.terminate()


FULL = ("trainer.sharding=full", "warmup.steps=0", "loss.kl_weight=0", "entropy.covariance=never")


def test_sharded_parameters_train_and_their_checkpoint_goes_on_alone(tmp_path, finished_run, launched):
    start = (f"policy.path={finished_run / 'policy'}", "policy.from_config=", *FULL, "optimizer.learning_rate=0.001")
    job = launched(tmp_path, *start, "trainer.steps=4")
    out, err = job.communicate(timeout=1500)
    assert job.returncode == 0, err[-3000:]
    run = tmp_path / "run"
    assert [r["step"] for r in records(run)] == [0, 1, 2, 3, 4] and sum(line.startswith("curves ") for line in out.splitlines()) == 1
    tensors, state = latest(run / "checkpoints")
    before = latest(finished_run / "checkpoints")[0]["policy"]
    assert state["step"] == 4 and all(v.shape == before[n].shape for n, v in tensors["policy"].items())
    assert any(not torch.equal(v, before[n]) for n, v in tensors["policy"].items())
    alone = [o for o in start if not o.startswith("trainer.sharding")]
    own = trainer_of(tmp_path, *alone, "trainer.steps=4")
    state_of(own)
    for name, value in own.policy.named_parameters():
        assert torch.equal(value, tensors["policy"][name]), name
    moments = optimizer_tensors(own.optimizer)
    assert moments and all(torch.equal(v, tensors["optimizer"][n]) for n, v in moments.items())
    steps(own, 1)
    own.close()


def test_sharded_parameters_are_the_whole_ones_shared_out(tmp_path, finished_run, launched):
    """The same two processes with and without: losses, norms and weights are those of whole parameters, no parameter stays behind, and a sharded
    run that goes on from its checkpoint comes to the same bits."""
    start = (f"policy.path={finished_run / 'policy'}", "policy.from_config=", *FULL, "optimizer.learning_rate=0.001", "optimizer.warmup_steps=0")
    start = (*start, "trainer.steps=4", "eval.samples=0")
    found = {}
    for name, more in {"none": ("trainer.sharding=none",), "full": (), "again": ()}.items():
        if name == "again":
            shutil.copytree(tmp_path / "full", tmp_path / name)
            shutil.rmtree(tmp_path / name / "run" / "checkpoints" / "step-4")
        job = launched(tmp_path / name, *start, *more)
        _, err = job.communicate(timeout=1500)
        assert job.returncode == 0, err[-3000:]
        found[name] = list(map(without_times, records(tmp_path / name / "run"))), latest(tmp_path / name / "run" / "checkpoints")[0]["policy"]
    (whole, weights), (sharded, shared_out) = found["none"], found["full"]
    for a, b in zip(whole[1:], sharded[1:], strict=True):
        assert (a["loss"], a["grad_norm"]) == pytest.approx((b["loss"], b["grad_norm"]), rel=1e-5, abs=1e-7)
    before = latest(finished_run / "checkpoints")[0]["policy"]
    for name, value in shared_out.items():
        moved = (weights[name] - before[name]).abs().max()
        assert moved > 1e-3 and (value - weights[name]).abs().max() < 1e-3 * moved, name
    assert found["again"][0] == sharded and all(torch.equal(value, shared_out[name]) for name, value in found["again"][1].items())


def test_a_process_without_a_rollout_to_sample_again(tmp_path, finished_run, launched):
    """Dynamic sampling asks for one group of two more, of three processes."""
    start = (f"policy.path={finished_run / 'policy'}", "policy.from_config=", "warmup.steps=0", "trainer.steps=3", "eval.samples=0")
    few = ("rollout.prompts=3", "rollout.group_size=2", "loss.minibatches=1", "curriculum.dynamic_sampling=true")
    job = launched(tmp_path, *start, *few, processes=3)
    _, err = job.communicate(timeout=1500)
    assert job.returncode == 0, err[-3000:]
    assert any(r["rollout/sampled"] % 6 for r in records(tmp_path / "run")[1:]), "some round asked for fewer"


def test_accelerate_launch_is_torchrun(tmp_path, launched):
    """The same two processes, to the bit; and not one process twice, which would sample other rollouts."""
    found = {}
    for launcher in LAUNCHERS:
        job = launched(tmp_path / launcher, "warmup.steps=5", "trainer.steps=2", "eval.samples=0", launcher=launcher)
        out, err = job.communicate(timeout=1500)
        assert job.returncode == 0, err[-3000:]
        assert sum(line.startswith("curves ") for line in out.splitlines()) == 1
        found[launcher] = list(map(without_times, records(tmp_path / launcher / "run")))
    assert found["accelerate"] == found["torchrun"] and found["torchrun"][-1]["step"] == 2
    assert train(tmp_path / "alone", "warmup.steps=5", "trainer.steps=2", "eval.samples=0") == 0
    alone = records(tmp_path / "alone" / "run")
    assert alone[0]["warmup/loss"] == found["torchrun"][0]["warmup/loss"] and alone[-1]["loss"] != found["torchrun"][-1]["loss"]


@pytest.mark.parametrize(("launcher", "rank"), [("torchrun", 1), ("accelerate", 0)])
def test_a_process_that_dies_ends_the_job_with_one_message(tmp_path, launched, launcher, rank):
    job = launched(
        tmp_path,
        "trainer.steps=400",
        "warmup.steps=20",
        "trainer.checkpoint_every=1",
        "trainer.eval_every=1000",
        "eval.start=false",
        launcher=launcher,
    )
    metrics, begin = tmp_path / "run" / "metrics.jsonl", time.monotonic()
    while not (metrics.exists() and '"phase": "stage1", "step": 2' in metrics.read_text()):
        assert job.poll() is None and time.monotonic() - begin < 1500
        time.sleep(0.2)
    for child in Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split():
        if f"\0RANK={rank}\0".encode() in Path(f"/proc/{child}/environ").read_bytes():
            os.kill(int(child), signal.SIGKILL)
    _, err = job.communicate(timeout=600)
    told = [line for line in err.splitlines() if line.startswith("acpo: ")]
    assert job.returncode != 0 and len(told) == 1, err[-3000:]
    assert re.search(r"another of the 2 processes ended .*; checkpoint step-\d+ stands: the same command continues from it", told[0])


TOLD = """
import os, signal, sys, time, types
import torch.distributed as dist
from pathlib import Path
from acpo import ranks
from acpo.cli import _said
from acpo.commands.train import _ends_at_signals

how, port, rank = sys.argv[1:]
os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "RANK": rank}
dist.init_process_group("gloo")
dist.barrier()
if rank == "1":  # alive, and never there
    time.sleep(600)
ranks.WORD_AFTER = 0.5
trainer = types.SimpleNamespace(ranks=types.SimpleNamespace(size=2), run=types.SimpleNamespace(checkpoints=Path("none")), stopping="")
print("ready", flush=True)
try:
    with _ends_at_signals(trainer):
        if how == "waits":
            dist.barrier()
        raise ranks.RankLost("another of the 2 processes ended")
except ranks.RankLost as error:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.1)
    os._exit(_said(error, 1))
"""


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("noticed", r"acpo: another of the 2 processes ended\n"),
        ("waits", r"acpo: ended by SIGTERM, .* one of the 2 processes has died, in the middle of a step; checkpoint none stands: .*\n"),
    ],
)
def test_the_launchers_signal_takes_nobody_the_word(how, told):
    """One that has noticed and is about to say so; and one that waits for the dead inside the library, as with nccl, whose handlers do not run."""
    environment, port = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}, str(free_port())
    first, second = (
        subprocess.Popen(
            [sys.executable, "-c", TOLD, how, port, str(rank)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        for rank in (0, 1)
    )
    late = threading.Timer(120, first.kill)
    late.start()
    try:
        assert first.stdout.readline() == "ready\n"
        if how == "waits":
            time.sleep(1.0)  # until it does
            first.terminate()
        assert re.fullmatch(told, next((line for line in first.stderr if line.startswith("acpo:")), "nothing"))
    finally:
        late.cancel()
        first.kill()
        second.kill()
        left = [line for line in first.communicate()[1].splitlines() if line.startswith("acpo:")]
        second.communicate()
    assert not left, "one message"


# --- one server for all -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def served(tmp_path):
    with serving(settings(tmp_path / "probe")) as found:
        yield found


@pytest.mark.parametrize("sharding", ["none", "full"])
def test_every_process_asks_one_server_and_the_first_sends_the_weights(tmp_path, served, launched, sharding):
    fake, overrides = served
    more = FULL if sharding == "full" else ("warmup.steps=10",)
    job = launched(tmp_path, *overrides, *more, "trainer.steps=3", "trainer.eval_every=2", "rollout.prompts=3")
    _, err = job.communicate(timeout=1500)
    assert job.returncode == 0, err[-3000:]
    found = [r for r in records(tmp_path / "run") if r["phase"].startswith("stage")]
    assert [r["step"] for r in found] == [1, 2, 3]
    for record in found:  # a rank with other weights than the server's would be seen here
        assert 0 < record["sampling/logp_difference_max"] < 1e-5 and record["sampling/ess"] > 1 - 1e-9
    versions = [p["weight_version"].rpartition("-") for p in fake.asked("/finish_weight_update")]
    assert len({run for run, _, _ in versions}) == 1, "one process sends"
    assert len({v for _, _, v in versions}) == len(versions) == 5 - (sharding == "full"), "at the start, behind the warm-up and behind each step"
    assert len(fake.asked("/v1/completions")) == 3 * 3 * 4 + 3 * 4, "each rollout is asked for once: three steps, three evaluations of four"
    seeds = [p["seed"] for p in fake.asked("/v1/completions") if p["temperature"] > 0]
    assert len(set(seeds)) == len(seeds) == 36
    assert not list((tmp_path / "run" / "rollouts").glob("pending*"))


def test_a_server_that_dies_ends_the_job_with_one_message_and_keeps_what_is_finished(tmp_path, served, launched):
    fake, overrides = served
    overrides = (*overrides, "warmup.steps=10", "trainer.steps=3", "trainer.checkpoint_every=1", "eval.start=false", "rollout.server.concurrency=1")
    fake.misbehave = lambda path, payload, asked: "drop" if path == "/v1/completions" and asked > 4 + 32 + 9 else None
    job = launched(tmp_path, *overrides)
    _, err = job.communicate(timeout=1500)
    told = [line for line in err.splitlines() if line.startswith("acpo: ")]
    assert job.returncode != 0 and len(told) == 1, err[-3000:]
    assert re.search(r"the vLLM server at .*rollouts are finished and kept; checkpoint step-2 stands: the same command continues from it", told[0])
    kept = {path.name: len(path.read_text().splitlines()) - 1 for path in (tmp_path / "run" / "rollouts").glob("pending-3-0-*.jsonl")}
    assert set(kept) == {"pending-3-0-0.jsonl", "pending-3-0-1.jsonl"} and sum(kept.values()) == 9
    fake.calls.clear()
    fake.misbehave = lambda *_: None
    job = launched(tmp_path, *overrides)
    _, err = job.communicate(timeout=1500)
    assert job.returncode == 0, err[-3000:]
    assert len([p for p in fake.asked("/v1/completions") if p["temperature"] > 0]) == 16 - 9, "those are not asked for again"
