"""The reference of stage 2: the policy as it was at the switch, a second model, or with PEFT a second adapter."""

from __future__ import annotations

import copy

import torch
from accelerate.utils import is_peft_model
from torch import Tensor
from trl.trainer.utils import add_fused_lm_head

from .head import add_head

ADAPTER = "ref"  # the name that GRPOTrainer looks for


def take(trainer) -> None:
    """Makes the trainer's reference the present policy."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    if is_peft_model(model):
        if ADAPTER not in model.peft_config:
            model.add_adapter(ADAPTER, copy.deepcopy(model.peft_config["default"]))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".default." in name:
                    model.get_parameter(name.replace(".default.", f".{ADAPTER}.")).copy_(parameter)
        return
    forward = model.__dict__.pop("forward"), model.__dict__.pop("_original_forward", None)
    try:
        snapshot = copy.deepcopy(model).requires_grad_(False).eval()
    finally:
        model.forward = forward[0]
        if forward[1] is not None:
            model._original_forward = forward[1]
    args = trainer.args
    add_fused_lm_head(snapshot, temperature=trainer.temperature, cast_lm_head_to_fp32=args.cast_lm_head_to_fp32)
    add_head(snapshot, trainer.temperature, args.cast_lm_head_to_fp32, args.use_acpo_kernels)
    trainer.ref_model = trainer.accelerator.prepare_model(snapshot, evaluation_mode=True)


def _parameters(trainer) -> dict[str, Tensor]:
    model = trainer.accelerator.unwrap_model(trainer.model)
    if is_peft_model(model):
        return {name: value for name, value in model.named_parameters() if f".{ADAPTER}." in name}
    return dict(trainer.accelerator.unwrap_model(trainer.ref_model).named_parameters())


def tensors(trainer) -> dict[str, Tensor]:
    """Its weights, to be saved."""
    return {name: value.detach().contiguous() for name, value in _parameters(trainer).items()}


@torch.no_grad()
def load(trainer, saved: dict[str, Tensor]) -> None:
    own = _parameters(trainer)
    if own.keys() != saved.keys():
        differing = sorted(own.keys() ^ saved.keys())
        raise ValueError(f"the checkpoint's reference is of another model: {len(differing)} parameters differ, {', '.join(differing[:3])}")
    for name, value in own.items():
        value.copy_(saved[name])
