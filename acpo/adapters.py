"""LoRA through peft: adapters in the body's linear layers, the rest frozen; and the weights as if they had never been apart."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .config import ConfigError, PolicyConfig


def add(model: Any, settings: PolicyConfig) -> None:
    """Puts adapters of policy.lora_rank into the layers of policy.lora_targets and freezes everything else. B starts at 0: nothing changes yet."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise ConfigError(f"policy.lora_rank = {settings.lora_rank} needs peft: pip install -e '.[peft]'") from None
    targets = settings.lora_targets if settings.lora_targets == "all-linear" else settings.lora_targets.split(",")
    _leave_the_head(model, () if targets == "all-linear" else targets)  # peft itself leaves the head out of all linear layers
    alpha: Any = settings.lora_alpha or 2 * settings.lora_rank
    try:
        inject_adapter_in_model(LoraConfig(r=settings.lora_rank, lora_alpha=alpha, target_modules=targets, task_type="CAUSAL_LM"), model)
    except ValueError as error:
        raise ConfigError(f"policy.lora_targets: {' '.join(str(error).split())}") from None


def _leave_the_head(model: Any, targets: Collection[str]) -> None:
    """ConfigError for targets that peft would find in the head, or in the embedding that a tied head shares its weight with."""
    head = model.get_output_embeddings()
    for name, module in model.named_modules(remove_duplicate=False):
        if getattr(module, "weight", None) is head.weight and any(f".{name}".endswith(f".{target}") for target in targets):
            which = f"the head {name!r} out:" if module is head else f"{name!r} out: it is tied to the head, and"
            raise ConfigError(f"policy.lora_targets must leave {which} its weight goes into the loss as it is")


def layers(model: nn.Module) -> dict[str, Any]:
    """The layers with an adapter, by name."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "base_layer") and hasattr(module, "get_delta_weight")}


@torch.no_grad()
def merged(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and parameters of the model as it would be without adapters: W + (alpha / rank) B A under the name of W; one at a time."""
    adapted = layers(model)
    for name, value in model.named_parameters():
        owner, inside, leaf = name.partition(".base_layer.")
        if inside and owner in adapted:
            yield f"{owner}.{leaf}", sum((adapted[owner].get_delta_weight(a) for a in adapted[owner].active_adapters if leaf == "weight"), value)
        elif name.partition(".lora_")[0] not in adapted:
            yield name, value.detach()
