"""Two processes on the CPU against one and against DDP, on the same stored rollouts; sharded parameters; one vLLM server for all; a process that
dies."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from fake_vllm import serving
from loop import parameters, records, settings, steps, train, trainer_of, without_times, write_config
from torch import multiprocessing
from torch.nn.parallel import DistributedDataParallel

from acpo import update
from acpo.checkpoint import latest, optimizer_tensors
from acpo.config import ConfigError
from acpo.ranks import Ranks, run_of
from acpo.state import resume as state_of

pytestmark = pytest.mark.slow
STEPS, DTYPES = 3, (torch.float64, torch.float32)
# Three groups of four on two ranks: the second group lies across both. Every source, several micro-batches and optimiser steps.
METHOD = (
    "rollout.prompts=3", "attribution.source=hindsight,tree,head", "credit.scope=all", "loss.minibatches=2", "trainer.micro_batch_tokens=30",
    "optimizer.max_grad_norm=1e9", "policy.packing=packed",
)  # fmt: skip
VARIANTS = {
    "acpo": METHOD,
    "stage 2": (*METHOD, "stages.switch_share=0.1", "loss.kl_weight=0.1", "loss.denominator=sequences"),
    "penalty": (*METHOD, "entropy.covariance=always", "entropy.covariance_share=0.1", "curriculum.dynamic_sampling=true"),
}


class Stored:
    """An engine that hands out what was rolled out before; without that, one that keeps what it hands out."""

    def __init__(self, trainer, stored: list):
        self.inner, self.ranks, self.stored, self.kept = trainer.engine, trainer.ranks, list(stored), []

    def sync(self):
        pass

    def close(self):
        pass

    def generate(self, prompts, **arguments):
        if not self.stored:
            self.kept.append(self.inner.generate(prompts, **arguments))
            return self.kept[-1]
        return self.ranks.share(self.stored.pop(0))


class InDDP:
    """The policy inside torch's DDP, as accelerate wraps it: the ranks' gradients are brought together by the last of `passes` backwards."""

    def __init__(self, policy, passes: int):
        self.policy, self.ddp, self.left = policy, DistributedDataParallel(policy), passes

    def __getattr__(self, name):
        return getattr(self.policy, name)

    def __call__(self, *arguments, **settings):
        self.left -= 1
        with self.ddp.no_sync() if self.left else contextlib.nullcontext():
            return self.ddp(*arguments, **settings)


def gradients_by_ddp(batch, rows, policy, config, clip, ranks, plain=update.gradients):
    """`update.gradients` with DDP in the place of our sum, and its mean over ranks made one."""
    own = ranks.sum_gradients
    ranks.sum_gradients = lambda parameters: [p.grad.mul_(ranks.size) for p in parameters]
    passes = len(ranks.parts(batch, rows, config.trainer.micro_batch_tokens, policy.packed))
    plain(batch, rows, InDDP(policy, passes), config, clip, ranks)
    ranks.by_ddp.append((passes, {name: p.grad.clone() for name, p in policy.named_parameters()}))
    policy.zero_grad(set_to_none=True)
    ranks.sum_gradients = own
    return plain(batch, rows, policy, config, clip, ranks)


def steps_on(folder: Path, overrides: tuple[str, ...], weights: dict, stored: list, dtype: torch.dtype) -> dict:
    """Three SGD steps: losses, the gradients of each optimiser step (of several ranks by DDP as well), weights and what the controllers have come
    to."""
    torch.set_num_threads(1)
    trainer = trainer_of(folder, *overrides, weights=weights)
    trainer.policy.to(dtype)
    trainer.optimizer = torch.optim.SGD(trainer.policy.parameters(), lr=0.05)
    trainer.engine = engine = Stored(trainer, stored)
    gradients, summed = [], trainer.ranks.sum_gradients

    def seen(of):
        summed(of)
        gradients.append({name: p.grad.clone() for name, p in trainer.policy.named_parameters()})

    trainer.ranks.sum_gradients, trainer.ranks.by_ddp = seen, []
    metrics = []
    with pytest.MonkeyPatch.context() as patch:
        if trainer.ranks.size > 1 and "entropy.covariance=always" not in overrides:  # whose second forward DDP would have to be told of
            patch.setattr(update, "gradients", gradients_by_ddp)
        for _ in range(STEPS):
            trainer.step_number += 1
            metrics.append(trainer.step())
    controllers = (trainer.curriculum.state(), trainer.entropy.state(), trainer.stages.state(), trainer.attributors.state(), trainer.forks.value)
    out = {
        "metrics": metrics,
        "gradients": gradients,
        "ddp": trainer.ranks.by_ddp,
        "weights": parameters(trainer),
        "stored": engine.kept,
        "controllers": json.dumps(controllers),
    }
    trainer.close()
    trainer.ranks.close()
    return out


def one_of_two(rank: int, port: int, folder: Path, jobs: dict[str, tuple]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group("gloo")
    torch.use_deterministic_algorithms(True)
    torch.save({name: steps_on(folder / name / str(rank), *job) for name, job in jobs.items()}, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def both(request, tmp_path_factory, warmed) -> dict[str, tuple[dict, list[dict]]]:
    """The variants and dtypes that are asked for, on one process and on two."""
    calls = [item.callspec.params for item in request.session.items if "both" in item.fixturenames and hasattr(item, "callspec")]
    asked = {f"{params['variant']} {params['dtype']}" for params in calls} | {f"acpo {torch.float32}"}
    folder, ones, jobs = tmp_path_factory.mktemp("ranks"), {}, {}
    for variant, overrides in VARIANTS.items():
        wanted = {name: dtype for dtype in DTYPES if (name := f"{variant} {dtype}") in asked}
        stored = steps_on(folder / variant / "stored", overrides, warmed, [], torch.float32)["stored"] if wanted else []
        for name, dtype in wanted.items():
            jobs[name] = (overrides, warmed, stored, dtype)
            ones[name] = steps_on(folder / name / "one", *jobs[name])
    multiprocessing.spawn(one_of_two, (free_port(), folder, jobs), nprocs=2)
    ranks = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]
    return {name: (ones[name], [rank[name] for rank in ranks]) for name in jobs}


def compare(one: dict, two: list[dict], tolerance: float) -> None:
    def close(a: torch.Tensor, b: torch.Tensor, name: str) -> None:
        assert (a - b).abs().max() <= tolerance * b.abs().max(), f"{name}: {float((a - b).abs().max())} of {float(b.abs().max())}"

    for rank in two:
        assert len(rank["gradients"]) == len(one["gradients"]) == STEPS * 2
        for own, wanted in zip(rank["gradients"], one["gradients"], strict=True):
            most = max(float(g.abs().max()) for g in wanted.values())
            assert most > 1e-3
            for name, gradient in wanted.items():
                assert (own[name] - gradient).abs().max() <= tolerance * most, name
        for name, weight in one["weights"].items():
            close(rank["weights"][name], weight, name)
        for own, wanted in zip(rank["metrics"], one["metrics"], strict=True):
            for name in (
                "loss",
                "grad_norm",
                "reward",
                "entropy",
                "kl/old",
                "ratio/max",
                "tokens/generated",
                "tokens/forward_extra",
                "verify/errors",
            ):
                assert own[name] == pytest.approx(wanted[name], rel=1e-4 if tolerance > 1e-9 else 1e-5, abs=1e-6), name
    for name, gradient in two[0]["gradients"][-1].items():
        assert torch.equal(gradient, two[1]["gradients"][-1][name]), f"{name} differs between ranks"
        assert torch.equal(two[0]["weights"][name], two[1]["weights"][name])
    assert two[0]["controllers"] == two[1]["controllers"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_two_processes_are_one(both, warmed, variant, dtype):
    one, two = both[f"{variant} {dtype}"]
    assert any(bool((one["weights"][name] != weight.to(dtype)).any()) for name, weight in warmed.items())
    compare(one, two, 1e-10 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", ["acpo", "stage 2"])
def test_gradients_are_those_of_ddp(both, variant, dtype):
    """The head's among them: its weight takes part in the loss inside the module that DDP wraps."""
    most_passes = 0
    for rank in both[f"{variant} {dtype}"][1]:
        assert len(rank["ddp"]) == len(rank["gradients"]) == STEPS * 2
        for ours, (passes, theirs) in zip(rank["gradients"], rank["ddp"], strict=True):
            most_passes = max(most_passes, passes)
            most = max(float(g.abs().max()) for g in theirs.values())
            assert ours.keys() == theirs.keys() and most > 1e-3
            for name, gradient in theirs.items():
                assert (ours[name] - gradient).abs().max() <= (1e-10 if dtype == torch.float64 else 1e-5) * most, name
    assert most_passes > 1


def test_a_head_whose_gradient_stays_at_home_is_seen(both):
    """What the comparison is for: the head's weight goes into the loss beside the model's forward, and must be summed all the same."""
    one, _ = both[f"acpo {torch.float32}"]
    head = "model.model.embed_tokens.weight"
    half = [dict(gradients, **{head: gradients[head] * 0.5}) for gradients in one["gradients"]]
    compare(one, [one, one], 1e-5)
    for two in ([one, dict(one, gradients=half)], [dict(one, gradients=half)] * 2):
        with pytest.raises(AssertionError, match="embed_tokens"):
            compare(one, two, 1e-5)


LAUNCHERS = {  # accelerate's --cpu would start one process
    "torchrun": ("torch.distributed.run", "--nproc-per-node", "2", "--master-port"),
    "accelerate": ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port"),
}


@pytest.fixture
def launched():
    """`acpo train` on two processes, which do not outlive the test."""
    jobs = []

    def start(folder: Path, *overrides: str, launcher: str = "torchrun") -> subprocess.Popen:
        command = [sys.executable, "-m", *LAUNCHERS[launcher], str(free_port()), "-m", "acpo.cli"]
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
from acpo.commands.train import _ends_at_sigterm

how, port, rank = sys.argv[1:]
os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "RANK": rank}
dist.init_process_group("gloo")
dist.barrier()
if rank == "1":  # alive, and never there
    time.sleep(600)
ranks.WORD_AFTER = 0.5
trainer = types.SimpleNamespace(ranks=types.SimpleNamespace(size=2), run=types.SimpleNamespace(checkpoints=Path("none")), stopping=False)
print("ready", flush=True)
try:
    with _ends_at_sigterm(trainer):
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


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rollout.engine=vllm", r"rollout\.engine = 'vllm': .* several share one with 'vllm_server'"),
        ("trainer.sharding=full", r"trainer\.sharding = 'full'.* stage 2 keeps a copy"),
    ],
)
def test_what_several_processes_cannot_do(tmp_path, monkeypatch, override, message):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=message):
        Ranks(settings(tmp_path, override))


def test_a_server_of_our_own_serves_one_machine(tmp_path, monkeypatch):
    for name, value in {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"'vllm_server' on several machines needs rollout\.server\.url"):
        Ranks(settings(tmp_path, "rollout.engine=vllm_server"))


def test_accelerates_one_process_of_several_is_told(tmp_path):
    """What the real launcher hands on."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "-m", "acpo.cli", "train"]
    found = subprocess.run([*command, str(write_config(tmp_path)), f"run_dir={tmp_path / 'run'}"], capture_output=True, text=True, timeout=600)
    assert found.returncode != 0 and "acpo: accelerate launch --cpu starts one process whatever --num_processes says" in found.stderr
    assert not (tmp_path / "run").exists()


def test_one_process_shares_nothing_out(tmp_path):
    with pytest.raises(ConfigError, match=r"trainer\.sharding = 'full' needs several processes"):
        run_of(settings(tmp_path, "trainer.sharding=full"))


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
