"""Runs that are broken off and continued, and numbers that are no numbers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from loop import parameters, records, settings, steps, trainer_of, without_times

from acpo import checkpoint, config, state, update
from acpo import trainer as module
from acpo.config import ConfigError
from acpo.guard import Guard, NotFinite
from acpo.policy import Policy
from acpo.run import Run
from acpo.trainer import Trainer, TrainingError


@pytest.fixture(autouse=True)
def one_thread(deterministic):
    torch.set_num_threads(1)


# --- broken off and continued ---------------------------------------------------------------------------------------------------


def trainer_of_run(run: Path) -> Trainer:
    """A trainer that takes a copied run for its own."""
    chosen = config.load(run / "config.yaml", [f"run_dir={run}"])
    return Trainer(chosen, Run(chosen))


@pytest.mark.parametrize("label", ["warmup-100", "warmup-150", "step-2", "step-4", "step-6"])
def test_continued_from_any_checkpoint_ends_the_same(tmp_path, finished_run, label):
    """As if broken off while the next checkpoint was being written, in the middle of a line of metrics."""
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    labels = ["warmup-100", "warmup-150", "step-2", "step-4", "step-6", "step-8"]
    assert {p.name for p in (run / "checkpoints").iterdir()} == set(labels)
    for later in labels[labels.index(label) + 1 :]:
        shutil.rmtree(run / "checkpoints" / later)
    (run / "checkpoints" / ".writing-step-9").mkdir()
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"phase": "stage2", "st')
    trainer = trainer_of_run(run)
    trainer.train()
    assert [without_times(r) for r in records(run)] == [without_times(r) for r in records(finished_run)]
    whole = checkpoint.latest(finished_run / "checkpoints")[0]["policy"]
    assert all(torch.equal(whole[n], p) for n, p in trainer.policy.named_parameters())


def test_a_finished_run_has_nothing_left_to_do(tmp_path, finished_run):
    shutil.copytree(finished_run, tmp_path / "run")
    trainer = trainer_of_run(tmp_path / "run")
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    last = trainer.train()
    assert trainer.step_number == 8 and (tmp_path / "run" / "metrics.jsonl").read_text() == before
    assert last["step"] == 8 and 0 <= last["eval/accuracy"] <= 1


def test_a_run_that_was_killed_while_it_removed_old_checkpoints_removes_them(tmp_path, finished_run):
    """Behind its last checkpoint: no other comes that would."""
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    (run / "checkpoints" / "step-4" / "state.json").unlink()
    chosen = config.load(run / "config.yaml", [f"run_dir={run}", "trainer.keep_checkpoints=2"])
    Trainer(chosen, Run(chosen)).train()
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step-6", "step-8"]


def test_other_settings_are_refused_and_leave_the_run_as_it_is(tmp_path, finished_run):
    shutil.copytree(finished_run, tmp_path / "run")
    trainer_of_run(tmp_path / "run").train()
    before = {p: p.read_bytes() for p in sorted((tmp_path / "run").rglob("*")) if p.is_file()}
    trainer = trainer_of(tmp_path, "warmup.steps=150", "optimizer.learning_rate=1e-3")
    with pytest.raises(ConfigError, match=r"holds a run with other settings \(optimizer.learning_rate: 0.0003 -> 0.001\): give another run_dir"):
        trainer.train()
    after = {p: p.read_bytes() for p in sorted((tmp_path / "run").rglob("*")) if p.is_file()}
    assert before == after


def test_other_problems_under_the_same_settings_are_refused(tmp_path, finished_run, monkeypatch):
    shutil.copytree(finished_run, tmp_path / "run")
    real = module.load_problems

    def others(config):
        task, train_problems, held_out = real(config)
        return task, train_problems[1:], held_out

    monkeypatch.setattr(module, "load_problems", others)
    with pytest.raises(ConfigError, match="other problems"):
        trainer_of_run(tmp_path / "run").train()


# --- not a number ---------------------------------------------------------------------------------------------------------------


def broken_losses(monkeypatch, *which: int) -> list[int]:
    """Makes the losses of these calls (from 1; a step has two) NaN or infinite in turn; returns a list that grows with the calls."""
    forward, calls = Policy.forward, []

    def broken(self, *a, **k):
        calls.append(len(calls) + 1)
        found = forward(self, *a, **k)
        return found._replace(loss=found.loss * float("nan" if calls[-1] % 2 else "inf")) if calls[-1] in which else found

    monkeypatch.setattr(Policy, "forward", broken)
    return calls


def test_of_several_processes_one_writes_the_diagnosis(tmp_path):
    for writes in (False, True):
        guard = Guard(tmp_path / "diagnosis.json", writes=writes)
        with pytest.raises(TrainingError, match="3 times in a row"):
            for step in range(3):
                guard.leave_out(NotFinite("the loss is nan"), f"step {step}", torch.nn.Linear(1, 1), {})
        assert (tmp_path / "diagnosis.json").exists() == writes


def test_three_losses_in_a_row_that_are_no_numbers_stop_and_say_what_was_at_hand(tmp_path, warmed, monkeypatch):
    trainer = trainer_of(tmp_path, "trainer.steps=6", weights=warmed)
    broken_losses(monkeypatch, 7, 8, 9)
    with pytest.raises(
        TrainingError, match=r"the loss is nan at step 5, 3 times in a row: .*diagnosis.json says .*the last checkpoint stands"
    ) as caught:
        trainer.train()
    assert "\n" not in str(caught.value)
    assert all(p.isfinite().all() for p in trainer.policy.parameters())
    said = json.loads((tmp_path / "run" / "diagnosis.json").read_text())
    assert said["left_out"] == ["step 4: the loss is nan", "step 4: the loss is " + said["left_out"][1].split()[-1], "step 5: the loss is nan"]
    assert said["weights_not_finite"] == [] and 0 < said["largest_weight"] < 100 and said["learning_rate"] == pytest.approx(3e-4)
    assert said["batch"]["advantages"]["not_finite"] == 0 and said["batch"]["old_logp"]["max"] <= 0 and said["rollouts"] == 8
    found = records(tmp_path / "run")
    assert [r["optimizer/left_out"] for r in found[1:]] == [0, 0, 0, 2], "counted in the metrics of the step, which hold numbers alone"
    assert all(np.isfinite(v) for r in found for v in r.values() if isinstance(v, float))
    assert checkpoint.latest(tmp_path / "run" / "checkpoints")[1]["guard"] == {"left_out": 2, "in_a_row": said["left_out"][:2]}
    monkeypatch.undo()
    again = trainer_of(tmp_path, "trainer.steps=6")
    again.train()
    assert [r["step"] for r in records(tmp_path / "run")] == list(range(7))


def test_a_loss_that_is_no_number_costs_its_optimiser_step_alone(tmp_path, warmed, monkeypatch):
    """Two in a row, one good, two in a row: the run goes on; what was left out moved nothing, weights or moments."""
    trainer = trainer_of(tmp_path, weights=warmed)
    broken_losses(monkeypatch, 1, 2, 4, 5)
    moved = []
    for _ in range(3):
        before = parameters(trainer)
        metrics = steps(trainer, 1)[0]
        moved.append((any(not torch.equal(before[n], p) for n, p in trainer.policy.named_parameters()), metrics["optimizer/left_out"]))
        assert (metrics["loss"] != 0) == (metrics["grad_norm"] > 0) == moved[-1][0]
    assert moved == [(False, 2), (True, 1), (True, 1)] and trainer.guard.left_out == 4
    assert all(int(s["step"]) == 2 for s in trainer.optimizer.state.values())


def test_an_optimiser_step_that_is_left_out_counts_in_no_mean(tmp_path, warmed, monkeypatch):
    """Of two minibatches one is left out: loss and gradient norm of the step are the other's, not halves of it."""
    found, step_taken = [], update.optimizer_step
    for name in ("whole", "broken"):
        trainer = trainer_of(tmp_path / name, "loss.kl_weight=0", weights=warmed)
        taken = []
        monkeypatch.setattr(update, "optimizer_step", lambda *a, taken=taken: taken.append(step_taken(*a)) or taken[-1])
        if name == "broken":
            broken_losses(monkeypatch, 2)
        found.append((steps(trainer, 1)[0], taken))
        trainer.close()
    (whole, both), (broken, first) = found
    assert len(both) == 2 and whole["grad_norm"] == pytest.approx(sum(both) / 2)
    assert first == both[:1] and broken["grad_norm"] == pytest.approx(both[0]) and broken["optimizer/left_out"] == 1


def test_a_gradient_that_is_not_a_number_is_not_taken(tmp_path, warmed):
    trainer = trainer_of(tmp_path, weights=warmed)
    trainer.policy.model.model.norm.weight.register_hook(lambda g: g * float("inf"))
    before = parameters(trainer)
    assert steps(trainer, 1)[0]["optimizer/left_out"] == 2
    with pytest.raises(TrainingError, match=r"the gradient norm is (inf|nan) at step 2, 3 times in a row"):
        steps(trainer, 1)
    assert all(torch.equal(before[n], p) for n, p in trainer.policy.named_parameters())
    said = json.loads((tmp_path / "run" / "diagnosis.json").read_text())
    assert said["gradients_not_finite"] == ["model.model.norm.weight"]


@pytest.mark.parametrize("minibatches", [1, 2])
def test_a_policy_that_blows_up_is_one_clear_error(tmp_path, warmed, minibatches):
    """Not a complaint of the sampler's from deep inside."""
    trainer = trainer_of(
        tmp_path, "optimizer.learning_rate=1e30", "optimizer.warmup_steps=0", f"loss.minibatches={minibatches}", "trainer.checkpoint_every=1",
        "trainer.eval_every=1", weights=warmed,
    )  # fmt: skip
    with pytest.raises(TrainingError, match=r"at step [12]"):
        trainer.train()


def test_weights_that_are_not_numbers_are_not_saved(tmp_path, warmed):
    trainer = trainer_of(tmp_path, weights=warmed)
    state.save(trainer, "step-1")
    with torch.no_grad():
        trainer.policy.model.model.norm.weight[3] = float("inf")
    with pytest.raises(TrainingError, match=r"the policy's weights are not finite .* the last checkpoint stands"):
        state.save(trainer, "step-2")
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-1"]


def test_a_warm_up_that_blows_up_is_one_clear_error(tmp_path):
    chosen = settings(tmp_path, "warmup.learning_rate=1e38")
    with pytest.raises(TrainingError, match=r"the warm-up loss is nan at warm-up step \d+, 3 times in a row"):
        Trainer(chosen, Run(chosen)).train()
