"""What a checkpoint holds besides TRL's: controllers, calibrators, curriculum, and the rest of a generation batch.

TRL itself saves no generation batch: a run resumed inside one generates anew there and parts from the unbroken run.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from accelerate.logging import get_logger
from accelerate.utils import gather_object
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...checkpoint import put_text

logger = get_logger(__name__)
STATE, BUFFER = "acpo_state.json", "acpo_buffer_{}.safetensors"


def save(trainer, folder: Path) -> None:
    """On every process."""
    window = trainer.args.steps_per_generation * trainer.num_iterations
    inside = trainer._buffered_inputs is not None and trainer._step % window != 0
    others: list[dict[str, Any]] = []
    if inside:
        tensors, others = _flat(trainer._buffered_inputs)
        save_file(tensors, folder / BUFFER.format(trainer.accelerator.process_index))
    others = gather_object([others])
    if not trainer.args.should_save:
        return
    # TRL's copy of a given adapter, which it makes anew: of a checkpoint with adapters in folders transformers reads those alone, and the policy's
    # own, beside them, would be lost.
    shutil.rmtree(folder / "ref", ignore_errors=True)
    curriculum, sampler = trainer._acpo_curriculum, trainer._acpo_sampler
    state = {
        "credit": trainer._acpo.state(), "stage_2": trainer._acpo_in_stage_2, "step": trainer._step, "buffer": others if inside else None,
        "curriculum": None if curriculum is None else curriculum.state(),
        "sampler": None if sampler is None else sampler.state(epoch_is_over=float(trainer.state.epoch or 0.0).is_integer()),
    }  # fmt: skip
    put_text(folder / STATE, json.dumps(state))


def load(trainer, folder: Path) -> None:
    path = folder / STATE
    if not path.exists():
        logger.warning(f"acpo: {folder} has no {STATE}: the calibrators and controllers start anew")
        return
    state = json.loads(path.read_text(encoding="utf-8"))
    trainer._acpo.load(state["credit"])
    trainer._step = state["step"]
    if (trainer._acpo_curriculum is None) != (state["curriculum"] is None):
        raise ValueError(f"acpo_curriculum must be {state['curriculum'] is not None} to go on from {folder}, got {trainer.args.acpo_curriculum}")
    if trainer._acpo_curriculum is not None:
        trainer._acpo_curriculum.load(state["curriculum"])
        trainer._acpo_sampler.load(state["sampler"])
    if state["stage_2"]:
        trainer._acpo_enter_stage_2()
    if state["buffer"] is not None:
        before, now = len(state["buffer"]), trainer.accelerator.num_processes
        if before != now:
            raise ValueError(f"{folder} lies inside a generation batch of {before} processes and cannot go on with {now}")
        rank = trainer.accelerator.process_index
        tensors = load_file(folder / BUFFER.format(rank), device=str(trainer.accelerator.device))
        trainer._buffered_inputs = _nested(tensors, state["buffer"][rank])


def _flat(buffer: list[dict[str, Any]]) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """A generation batch in its parts as named tensors, and what in it is no tensor."""
    tensors = {f"{i}.{name}": value.clone() for i, part in enumerate(buffer) for name, value in part.items() if isinstance(value, Tensor)}
    return tensors, [{name: value for name, value in part.items() if not isinstance(value, Tensor)} for part in buffer]


def _nested(tensors: dict[str, Tensor], others: list[dict[str, Any]]) -> list[dict[str, Any]]:
    buffer = [dict(part) for part in others]
    for name, value in tensors.items():
        index, _, key = name.partition(".")
        buffer[int(index)][key] = value
    return buffer
