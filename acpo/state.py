"""What a checkpoint of the training loop holds, written and read back, and the folder that a trained policy leaves."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from . import checkpoint
from .config import Config, ConfigError, to_dict
from .guard import STANDS, TrainingError
from .layers import differences, flatten
from .ranks import full, placed

if TYPE_CHECKING:
    from .trainer import Trainer


def save(trainer: Trainer, label: str) -> None:
    """A checkpoint: all that the next step depends on."""
    parameters = {name: full(value.detach()) for name, value in trainer.policy.trained().items()}
    if not all(p.isfinite().all() for p in parameters.values()):
        raise TrainingError(f"the policy's weights are not finite behind step {trainer.step_number}: {STANDS}")
    tensors: dict[str, dict[str, torch.Tensor]] = {
        "policy": parameters,
        "optimizer": {name: full(value) for name, value in checkpoint.optimizer_tensors(trainer.optimizer).items()},
        "random": {"torch": torch.get_rng_state()},
    }
    if not trainer.ranks.leads:
        return
    if trainer.attributors.head is not None:
        tensors["head"] = trainer.attributors.head.tensors()
    if trainer.reference is not None:
        tensors["reference"] = {name: value for name, value in trainer.reference.named_parameters() if name in parameters}
    state = {
        "files": sorted(tensors), "warmup_step": trainer.warmup_step, "step": trainer.step_number, "numpy": trainer.rng.bit_generator.state,
        "counters": trainer.counters, "fork_threshold": trainer.forks.value, "attributors": trainer.attributors.state(),
        "entropy": trainer.entropy.state(), "curriculum": trainer.curriculum.state(), "stages": trainer.stages.state(),
        "guard": trainer.guard.state(), "config": to_dict(trainer.config),
    }  # fmt: skip
    checkpoint.save(trainer.run.checkpoints, label, tensors, state, trainer.config.trainer.keep_checkpoints)


# Where a run lies and what it runs on: these may change from one part of a run to the next. Threads and sharding move sums by a rounding.
MAY_CHANGE = (
    "name", "run_dir", "trainer.log", "trainer.threads", "trainer.sharding", "trainer.checkpoint_every", "trainer.keep_checkpoints",
    "trainer.rank_timeout", "verify.workers",
)  # fmt: skip


def lasting(config: dict) -> dict:
    """The settings, dotted, without MAY_CHANGE: those that the run's numbers follow from. A folder or file is the same however it is named."""
    out = {key: value for key, value in flatten(config).items() if key not in MAY_CHANGE}
    return out | {key: str(Path(out[key]).resolve()) for key in ("policy.path", "problems.path") if out.get(key) and Path(out[key]).exists()}


def settings_changed(state: dict, config: Config) -> list[str]:
    """How the settings of a checkpoint differ from these, but for MAY_CHANGE."""
    if not isinstance(state.get("config"), dict):
        raise checkpoint.CheckpointError(f"the checkpoint's state holds no settings, got the keys {', '.join(list(state)[:8])}")
    return differences(lasting(state["config"]), lasting(to_dict(config)))


def other_settings(directory: Path, changed: list[str]) -> ConfigError:
    policy = directory / "policy"
    on = f"; another run goes on from its policy with policy.path={policy} policy.from_config= warmup.steps=0" if policy.is_dir() else ""
    return ConfigError(f"{directory} holds a run with other settings ({'; '.join(changed[:3])}): give another run_dir, or remove it{on}")


def resume(trainer: Trainer) -> None:
    """The newest checkpoint of the run, with its records cut back to it; without one the run begins."""
    trainer.run.lock()
    found = checkpoint.latest(trainer.run.checkpoints)
    if found is None:
        _begin(trainer)
        return
    try:
        _restore(trainer, *found)
    except (LookupError, TypeError) as error:  # its checksums hold, and yet no version of ours wrote it
        raise checkpoint.CheckpointError(
            f"the newest checkpoint in {trainer.run.checkpoints} is not one of this loop's: {type(error).__name__}: {error}"
        ) from error


def _begin(trainer: Trainer) -> None:
    """A run from its start. What stands there already may only be what a run leaves that was broken off before its first checkpoint."""
    steps = [r["step"] for r in trainer.run.records() if r["phase"] != "warmup"]
    if max(steps, default=0) > trainer.config.trainer.checkpoint_every:
        raise checkpoint.CheckpointError(
            f"{trainer.run.directory} holds {max(steps)} steps and no checkpoint: put its checkpoints/ back, give another run_dir, or remove it"
        )
    if steps:
        trainer.run.say(f"{trainer.run.directory} has no checkpoint yet: it begins anew")
    trainer.run.begin()
    trainer.run.cut_back(-1, -1)


def _restore(trainer: Trainer, tensors: dict[str, dict[str, torch.Tensor]], state: dict) -> None:
    changed = settings_changed(state, trainer.config)
    if changed:
        raise other_settings(trainer.run.directory, changed)
    trainer.curriculum.load(state["curriculum"])
    own = trainer.policy.trained()
    checkpoint.check("policy", tensors["policy"], own)
    trainer.run.begin()
    trainer.policy.load_state_dict({name: placed(value, own[name]) for name, value in tensors["policy"].items()}, strict=False)
    trainer.warmup_step, trainer.step_number = state["warmup_step"], state["step"]
    order = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    moments = {name: placed(value, order[int(name.partition(".")[0])]) for name, value in tensors["optimizer"].items()}
    checkpoint.load_optimizer(trainer.optimizer, moments)
    torch.set_rng_state(tensors["random"]["torch"])
    trainer.rng.bit_generator.state = state["numpy"]
    trainer.counters, trainer.forks.value = state["counters"], state["fork_threshold"]
    trainer.attributors.load(state["attributors"])
    if trainer.attributors.head is not None:
        trainer.attributors.head.load(tensors["head"])
    trainer.entropy.load(state["entropy"])
    trainer.stages.load(state["stages"])
    trainer.guard.load(state["guard"])
    if "reference" in tensors:
        checkpoint.check("reference", tensors["reference"], own)
        trainer.reference = trainer.policy.frozen_copy()
        trainer.reference.load_state_dict(tensors["reference"], strict=False)
    trainer.run.cut_back(trainer.warmup_step, trainer.step_number if trainer.step_number else -1)
    kind, step = ("step", trainer.step_number) if trainer.step_number else ("warmup", trainer.warmup_step)
    if trainer.ranks.leads:  # a run that was killed behind its last checkpoint removes no other
        checkpoint.prune(trainer.run.checkpoints, f"{kind}-{step}", trainer.config.trainer.keep_checkpoints)
    trainer.run.say(f"resumed from {'step' if kind == 'step' else 'warm-up step'} {step}")


def load_newest(trainer: Trainer) -> int:
    """The weights of the newest checkpoint; returns its step."""
    found = checkpoint.latest(trainer.run.checkpoints)
    if found is None:
        raise checkpoint.CheckpointError(f"{trainer.run.checkpoints} holds no checkpoint")
    tensors, state = found
    checkpoint.check("policy", tensors["policy"], trainer.policy.trained())
    trainer.policy.load_state_dict(tensors["policy"], strict=False)
    return state["step"]


def export(trainer: Trainer) -> None:
    """The policy and its tokenizer as a folder that policy.path reads, and transformers (the characters of a synthetic task need
    PreTrainedTokenizerFast: AutoTokenizer would take the tokenizer class of the model type). It is written beside and renamed: a kill leaves the one
    of before."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    shared_out = {name: full(value.detach()) for name, value in trainer.policy.model.named_parameters()} if trainer.ranks.sharded else None

    def write(folder: Path) -> None:
        trainer.policy.save(folder, shared_out)
        trainer.tokenizer.save_pretrained(folder)

    if trainer.ranks.leads:
        checkpoint.put_folder(trainer.run.directory / "policy", write)
