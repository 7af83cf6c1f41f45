"""Whole runs whose rollouts come from a stand-in for vLLM on 127.0.0.1: training, a server that dies, importance weights."""

from __future__ import annotations

import json

import pytest
import torch
from fake_vllm import serving
from loop import records, settings, train, trainer_of, without_times

from acpo.cli import main
from acpo.rollout.local import LocalEngine
from acpo.run import Run
from acpo.trainer import Trainer, TrainingError


@pytest.fixture(autouse=True)
def one_thread(deterministic):
    torch.set_num_threads(1)


@pytest.fixture
def served(tmp_path):
    """A run of three steps whose rollouts come from a stand-in server, and that server."""
    with serving(settings(tmp_path / "probe")) as (fake, overrides):
        yield fake, [*overrides, "trainer.steps=3", "warmup.steps=10"]


def test_training_with_a_server(tmp_path, served):
    fake, overrides = served
    assert train(tmp_path, *overrides) == 0
    found = [r for r in records(tmp_path / "run") if r["phase"].startswith("stage")]
    assert [r["step"] for r in found] == [1, 2, 3]
    for record in found:
        assert 0 < record["sampling/logp_difference_max"] < 1e-5 and abs(record["sampling/kl"]) < 1e-9 and record["sampling/ess"] > 1 - 1e-9
        assert record["time/sync"] > 0
    versions = [p["weight_version"].rpartition("-")[2] for p in fake.asked("/finish_weight_update")]
    assert versions == sorted(set(versions), key=int) and len(versions) == 5, "at the start, behind the warm-up and behind each step"
    assert not list((tmp_path / "run" / "rollouts").glob("pending*"))


def test_a_run_that_a_dead_server_stopped_goes_on_with_its_finished_rollouts(tmp_path, served, capsys):
    fake, overrides = served
    overrides = [*overrides, "trainer.checkpoint_every=1"]
    assert train(tmp_path / "whole", *overrides) == 0
    count = len(fake.asked("/v1/completions"))
    fake.calls.clear()
    last = count - 16 - 4  # rollouts before those of step 3 and the last evaluation

    def die(path, payload, asked):
        return "drop" if path == "/v1/completions" and asked > last + 5 else None

    fake.misbehave = die
    assert train(tmp_path / "broken", *overrides, "rollout.server.concurrency=1") == 1
    said = capsys.readouterr().err
    assert "5 of 16 rollouts are finished and kept; checkpoint step-2 stands: the same command continues from it" in said
    assert len((tmp_path / "broken" / "run" / "rollouts" / "pending-3-0.jsonl").read_text().splitlines()) == 1 + 5
    fake.calls.clear()
    fake.misbehave = lambda *_: None
    assert train(tmp_path / "broken", *overrides, "rollout.server.concurrency=1") == 0
    assert len(fake.asked("/v1/completions")) == 11 + 4, "the five are not asked for again"
    one, two = (records(tmp_path / name / "run") for name in ("whole", "broken"))
    for a, b in zip(one, two, strict=True):
        assert without_times(a) == without_times(b)
    assert not list((tmp_path / "broken" / "run" / "rollouts").glob("pending*"))


def test_finished_rollouts_of_other_settings_are_not_taken(tmp_path, served):
    """A run killed before its first checkpoint, begun anew with another rate: the policy may be another too."""
    fake, overrides = served

    def first_step(*more):
        fake.calls.clear()
        chosen = settings(tmp_path, *overrides, "warmup.steps=0", *more)
        trainer = Trainer(chosen, Run(chosen))
        trainer.step_number = 1
        trainer._rollout()  # and no more: its file stays
        trainer.close()
        return len(fake.asked("/v1/completions"))

    assert first_step() == 16 and first_step() == 0, "the same run asks for nothing again"
    assert first_step("name=other", "verify.workers=3") == 0, "nor where only what it runs on has changed"
    assert first_step("optimizer.learning_rate=1e-5") == 16


def test_truncated_importance_sampling_is_on_for_a_server_alone(tmp_path, served, monkeypatch):
    _, overrides = served
    for name, more, corrected in (
        ("server", overrides, True), ("off", [*overrides, "loss.rollout_cap=0"], False), ("local", ["trainer.steps=3"], False),
    ):  # fmt: skip
        chosen = settings(tmp_path / name, *more, "warmup.steps=0", "loss.minibatches=1")
        trainer = Trainer(chosen, Run(chosen))
        trainer.step_number = 1
        real, seen = trainer.policy.forward, []
        monkeypatch.setattr(trainer.policy, "forward", lambda *a, real=real, seen=seen, **k: (seen.append(k), real(*a, **k))[1])
        trainer.step()
        assert seen and all((k["rollout_logp"] is not None) == corrected for k in seen)
        if corrected:
            assert all(k["rollout_cap"] == 2.0 for k in seen)
        trainer.close()


def test_importance_weights_change_the_gradient(tmp_path, served):
    """An engine whose log-probs are off by a constant: the loss is weighted by the capped ratio."""
    _, overrides = served
    grads = {}
    for cap in (2.0, 0.0):
        chosen = settings(tmp_path / str(cap), *overrides, "warmup.steps=0", "loss.minibatches=1", f"loss.rollout_cap={cap}", "method=grpo")
        trainer = Trainer(chosen, Run(chosen))
        trainer.step_number = 1
        indices, batch, outcome = trainer._rollout()
        batch.token["rollout_logp"] -= 5.0  # ratio e^5, capped at 2
        trainer._score(batch, outcome, indices)
        trainer._segment(batch)
        trainer._credit(batch, outcome, None)
        batch.token["advantages"] = torch.ones_like(batch.token["advantages"])
        trainer.config.optimizer.max_grad_norm = 1e9
        trainer._update(batch)
        grads[cap] = {n: p.grad.clone() for n, p in trainer.policy.named_parameters()}
        trainer.close()
    for name, grad in grads[2.0].items():
        torch.testing.assert_close(grad, 2 * grads[0.0][name], rtol=1e-4, atol=1e-7)


def test_a_failure_during_evaluation_is_told_too(tmp_path, served):
    fake, overrides = served
    chosen = settings(tmp_path, *overrides, "warmup.steps=0")
    trainer = Trainer(chosen, Run(chosen))
    fake.misbehave = lambda path, *_: "drop" if path == "/v1/completions" else None
    with pytest.raises(TrainingError, match="rollouts are finished and kept; checkpoint none stands"):
        trainer.train()
    trainer.close()


def test_eval_of_a_run_leaves_its_server_to_the_training(tmp_path, served, capsys):
    """A sync would abort the trainer's requests and put the checkpoint's weights in the place of its own."""
    fake, overrides = served
    assert train(tmp_path, *overrides) == 0
    arguments, last = ["eval", str(tmp_path / "run"), "--samples", "0", "--json"], records(tmp_path / "run")[-1]["eval/accuracy"]
    fake.calls.clear()
    capsys.readouterr()
    assert main(arguments) == 0
    found = capsys.readouterr()
    assert not fake.calls and json.loads(found.out)["eval/accuracy"] == last
    assert "the policy itself's" in found.err and "rollout.engine=vllm_server" in found.err
    for typed in ("rollout.engine=vllm_server", "rollout.server.concurrency=3", f"rollout.server.url={fake.url}"):
        fake.calls.clear()
        assert main([*arguments, typed]) == 0 and not capsys.readouterr().err
        assert len(fake.asked("/v1/completions")) == 4, f"{typed}: who names the server gets it"


def test_the_local_engine_needs_no_server(tmp_path):
    assert isinstance(trainer_of(tmp_path).engine, LocalEngine)
