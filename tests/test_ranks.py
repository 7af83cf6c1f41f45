"""Two processes on the CPU against one and against DDP, on the same stored rollouts; what several processes cannot do."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from loop import free_port, parameters, settings, trainer_of, write_config
from torch import multiprocessing
from torch.nn.parallel import DistributedDataParallel

from acpo import ranks, update
from acpo.config import ConfigError
from acpo.ranks import Ranks, run_of

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


@pytest.fixture(scope="module")
def both(request, tmp_path_factory, warmed) -> dict[str, tuple[dict, list[dict]]]:
    """The variants and dtypes that are asked for, on one process and on two."""
    own = [item for item in request.session.items if item.path == request.path and "both" in item.fixturenames]
    calls = [item.callspec.params for item in own if hasattr(item, "callspec")]
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


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rollout.engine=vllm", r"rollout\.engine = 'vllm': .* several share one with 'vllm_server'"),
        ("trainer.sharding=full", r"trainer\.sharding = 'full'.* the reference is a whole copy"),
    ],
)
def test_what_several_processes_cannot_do(tmp_path, monkeypatch, override, message):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=message):
        Ranks(settings(tmp_path, override))


@pytest.mark.parametrize(
    ("controller", "covariance", "refused"),
    [
        ("none", "always", True),
        ("constant", "always", True),
        ("target", "fallback", True),
        ("constant", "fallback", False),
        ("none", "fallback", False),
    ],
)
def test_a_sharded_policy_has_no_penalty_on_covariant_tokens(tmp_path, controller, covariance, refused):
    """Whatever turns it on; a setting under which it never comes is none of its business."""
    overrides = (
        "trainer.sharding=full",
        "loss.kl_weight=0",
        "warmup.steps=0",
        f"entropy.controller={controller}",
        f"entropy.covariance={covariance}",
    )
    config = settings(tmp_path, *overrides)
    if refused:
        with pytest.raises(ConfigError, match=r"needs entropy\.covariance = 'never'"):
            ranks._check(config, 2)
    else:
        ranks._check(config, 2)


def test_a_rollout_for_each_process(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "20")
    with pytest.raises(ConfigError, match=r"rollout\.prompts \* rollout\.group_size must be at least 20, a rollout for each process, got 4 \* 4"):
        Ranks(settings(tmp_path))


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
