"""Run directories that were moved, thinned out or written by something else: the run goes on, or one clear error says why not; what stands there
stays."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from loop import records, write_config
from safetensors.torch import load_file, save_file

from acpo import checkpoint, config, state
from acpo.checkpoint import CheckpointError
from acpo.run import Run
from acpo.trainer import Trainer


@pytest.fixture
def run(tmp_path, finished_run) -> Path:
    return shutil.copytree(finished_run, tmp_path / "run")


def resumed(run: Path, *overrides: str) -> Trainer:
    chosen = config.load(write_config(run.parent), [f"run_dir={run}", *overrides])
    trainer = Trainer(chosen, Run(chosen))
    try:
        state.resume(trainer)
    finally:
        trainer.close()
    return trainer


def rewrite(run: Path, change) -> None:
    """The newest checkpoint's state as `change` makes it, under checksums that hold."""
    path = run / "checkpoints" / "step-8"
    (path / "state.json").write_text(json.dumps(change(json.loads((path / "state.json").read_text()))))
    checkpoint.seal(path)


def test_moved_to_another_disk_behind_a_link_and_onto_other_processors(run, tmp_path, capsys):
    there = shutil.move(run, tmp_path / "another disk")
    run.symlink_to(there, target_is_directory=True)
    trainer = resumed(run, "trainer.threads=2", "trainer.checkpoint_every=3", "verify.workers=1", "name=other")
    assert "resumed from step 8" in capsys.readouterr().out and trainer.step_number == 8
    whole = checkpoint.latest(there / "checkpoints")[0]["policy"]
    assert all(torch.equal(whole[name], p) for name, p in trainer.policy.named_parameters())
    assert config.load(there / "config.yaml").run_dir == str(run)


def test_what_lies_around_a_runs_files_is_left_alone(run):
    beside = [run / "checkpoints" / "step-²", run / "checkpoints" / "step-9 (copy)", run / "checkpoints" / "step-9", run / "rollouts"]
    for path in beside[:2]:
        path.mkdir()
    beside[2].write_text("a file")
    beside[3].mkdir(exist_ok=True)
    for name in ("step-3 (copy).parquet", "step-.parquet", "step-99.parquet"):
        (run / "rollouts" / name).write_bytes(b"")
    assert resumed(run).step_number == 8
    assert all(path.exists() for path in beside)
    names = {path.name for path in (run / "rollouts").iterdir()}
    assert {"step-3 (copy).parquet", "step-.parquet"} <= names and "step-99.parquet" not in names


def test_steps_without_a_checkpoint_are_not_written_over(run, capsys):
    """As a copy that left out the large files."""
    shutil.rmtree(run / "checkpoints")
    before = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(CheckpointError, match=r"run holds 8 steps and no checkpoint: put its checkpoints/ back, give another run_dir, or"):
        resumed(run)
    assert (run / "metrics.jsonl").read_bytes() == before
    kept = [r for r in records(run) if r["phase"] == "warmup" or r["step"] <= 2]
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in kept))
    assert resumed(run).step_number == 0 and "has no checkpoint yet: it begins anew" in capsys.readouterr().out, "broken off before its first one"
    assert records(run) == []


@pytest.mark.parametrize("how", ["missing", "renamed", "another shape"])
def test_weights_that_do_not_fit_are_not_half_loaded(run, how):
    """As another version of transformers would name them: what is left out would stay what chance made it."""
    path = run / "checkpoints" / "step-8" / "policy.safetensors"
    weights = load_file(path)
    name = next(n for n in weights if "q_proj" in n)
    value = weights.pop(name)
    if how == "renamed":
        weights[f"{name}_"] = value
    elif how == "another shape":
        weights[name] = value[:-1].contiguous()
    save_file(weights, path)
    checkpoint.seal(path.parent)
    with pytest.raises(
        CheckpointError, match=rf"policy.safetensors of the checkpoint does not fit this policy \({name}: .*, here \(.*another version"
    ):
        resumed(run)
    chosen = config.load(run / "config.yaml", [f"run_dir={run}"])
    trainer = Trainer(chosen, Run(chosen))
    with pytest.raises(CheckpointError, match="does not fit this policy"):
        state.load_newest(trainer)
    trainer.close()


@pytest.mark.parametrize(("change", "message"), [
    (lambda s: {"format": s["format"], "files": s["files"]}, "the checkpoint's state holds no settings, got the keys format, files"),
    (lambda s: {k: v for k, v in s.items() if k != "stages"}, "checkpoints is not one of this loop's: KeyError: 'stages'"),
    (lambda s: {**s, "guard": []}, "checkpoints is not one of this loop's: TypeError"),
])  # fmt: skip
def test_a_state_that_no_version_of_ours_wrote(run, change, message):
    rewrite(run, change)
    with pytest.raises(CheckpointError, match=message):
        resumed(run)
