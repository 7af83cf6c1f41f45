"""What a checkpoint of the training loop holds, written and read back."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch

from . import checkpoint
from .config import ConfigError, to_dict
from .guard import STANDS, TrainingError
from .layers import differences

if TYPE_CHECKING:
    from .trainer import Trainer


def save(trainer: Trainer, label: str) -> None:
    """A checkpoint: all that the next step depends on."""
    parameters: dict[str, torch.Tensor] = dict(trainer.policy.named_parameters())
    if not all(p.isfinite().all() for p in parameters.values()):
        raise TrainingError(f"the policy's weights are not finite behind step {trainer.step_number}: {STANDS}")
    tensors: dict[str, dict[str, torch.Tensor]] = {
        "policy": parameters,
        "optimizer": checkpoint.optimizer_tensors(trainer.optimizer),
        "random": {"torch": torch.get_rng_state()},
    }
    if trainer.attributors.head is not None:
        tensors["head"] = trainer.attributors.head.tensors()
    if trainer.reference is not None:
        tensors["reference"] = dict[str, torch.Tensor](trainer.reference.named_parameters())
    state = {
        "files": sorted(tensors), "warmup_step": trainer.warmup_step, "step": trainer.step_number, "numpy": trainer.rng.bit_generator.state,
        "counters": trainer.counters, "fork_threshold": trainer.forks.value, "attributors": trainer.attributors.state(),
        "entropy": trainer.entropy.state(), "curriculum": trainer.curriculum.state(), "stages": trainer.stages.state(),
        "guard": trainer.guard.state(), "config": to_dict(trainer.config),
    }  # fmt: skip
    checkpoint.save(trainer.run.checkpoints, label, tensors, state, trainer.config.trainer.keep_checkpoints)


def resume(trainer: Trainer) -> None:
    """The newest checkpoint of the run, with its records cut back to it; without one the run begins."""
    trainer.run.lock()
    found = checkpoint.latest(trainer.run.checkpoints)
    if found is None:
        trainer.run.begin()
        trainer.run.cut_back(-1, -1)
        return
    tensors, state = found
    changed = differences(state["config"], to_dict(trainer.config))
    if changed:
        raise ConfigError(f"{trainer.run.directory} holds a run with other settings ({'; '.join(changed[:3])}): give another run_dir, or remove it")
    trainer.curriculum.load(state["curriculum"])
    trainer.run.begin()
    trainer.policy.load_state_dict(tensors["policy"], strict=False)
    trainer.warmup_step, trainer.step_number = state["warmup_step"], state["step"]
    checkpoint.load_optimizer(trainer.optimizer, tensors["optimizer"])
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
        trainer.reference = copy.deepcopy(trainer.policy).requires_grad_(False)
        trainer.reference.load_state_dict(tensors["reference"], strict=False)
    trainer.run.cut_back(trainer.warmup_step, trainer.step_number if trainer.step_number else -1)
    trainer.run.say(f"resumed from {'step ' + str(trainer.step_number) if trainer.step_number else 'warm-up step ' + str(trainer.warmup_step)}")
