"""The model's forward with our head: log-probs and entropies of the labels, and the hindsight stream beside the plain one.

TRL patches the model's forward so that `model(..., labels=labels, fused_lm_head=True)` gives per-token values instead of logits; this wraps that
forward once more. Everything happens inside the model's own call, so DDP and FSDP see their parameters gathered. ZeRO-3 has the head's weight whole
in the forward alone: enough where there is no gradient (the hindsight stream), and the kernels, whose backward reads it again, are refused.
"""

from __future__ import annotations

import functools
import types
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.utils import ModelOutput
from trl.trainer.utils import FusedCausalLMOutput, maybe_gather_lm_head_ctx

from acpo.policy import logits_changed
from acpo_kernels import linear_hindsight_information, linear_logprob_entropy, unpack


@dataclass
class Scored(ModelOutput):
    """Of the plain rows, [rows,T-1], 0 where the label is -100 (log_ratio and kl also where a row has no hinted twin)."""

    logp: Tensor | None = None
    entropy: Tensor | None = None
    log_ratio: Tensor | None = None
    kl: Tensor | None = None


def refuse_unsupported(model: nn.Module, why: str) -> None:
    """ValueError for heads that the kernels do not compute."""
    head = model.get_output_embeddings()
    if changed := logits_changed(model):
        raise ValueError(f"{why} cannot be used with this model: {changed}")
    if hasattr(head, "base_layer") or not isinstance(head, nn.Linear):
        raise ValueError(f"{why} needs a plain linear head, got {type(head).__name__} (an adapter on lm_head is not supported)")
    if not head.weight.is_floating_point() or "float8" in str(head.weight.dtype):
        raise ValueError(f"{why} needs a floating-point head, got {head.weight.dtype}")


def refuse_zero3() -> None:
    """ValueError for the kernels under ZeRO-3: their backward would find the head's weight empty again."""
    if is_deepspeed_zero3_enabled():
        raise ValueError(
            "use_acpo_kernels=True cannot be used with DeepSpeed ZeRO-3, which partitions the head's weight again before the backward that reads it; "
            "set use_acpo_kernels=False"
        )


def add_head(model: nn.Module, temperature: float, cast_to_fp32: bool, kernels: bool) -> None:
    """Wraps the forward that TRL's `add_fused_lm_head` patched.

    With kernels, `fused_lm_head=True` is answered by acpo_kernels. In any case `acpo_pairs=[i, ...]` (under no_grad) says that the last len(pairs)
    rows are plain rows i, ... once more with the answer in the prompt, and the result is `Scored`.
    """
    previous = model.forward.__func__  # unbound: a copy of the model must not run the original's
    softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)

    @functools.wraps(type(model).forward)  # `generate` validates its keywords against the signature
    def forward(self, *args, fused_lm_head=False, acpo_pairs=None, **kwargs):
        own = acpo_pairs is not None or (kernels and fused_lm_head)
        if not own:
            return previous(self, *args, fused_lm_head=fused_lm_head, **kwargs)
        labels = kwargs.pop("labels")[:, 1:]
        kwargs["use_cache"] = False
        hidden = self.base_model(*args, **kwargs).last_hidden_state[:, :-1]
        head = self.get_output_embeddings()
        weight, bias = (_whole(parameter) for parameter in (head.weight, head.bias))
        # With the model split across devices the backbone can end on another device than the head.
        hidden, labels = hidden.to(weight.device), labels.to(weight.device)
        context = torch.autocast(hidden.device.type, enabled=False) if cast_to_fp32 else nullcontext()
        hidden = hidden.float() if cast_to_fp32 else hidden
        of_head = {"bias": bias, "temperature": temperature, "softcap": softcap}
        with context, maybe_gather_lm_head_ctx(weight, bias):
            if acpo_pairs is not None:
                return _scored(hidden, labels, weight, list(acpo_pairs), of_head)
            mask = labels != -100
            logp, entropy = linear_logprob_entropy(hidden[mask], weight, labels[mask], **of_head)
        return FusedCausalLMOutput(log_probs=unpack(logp, mask), entropy=unpack(entropy, mask), label_mask=mask)

    model.forward = types.MethodType(forward, model)


def _scored(hidden: Tensor, labels: Tensor, weight: Tensor, pairs: list[int], of_head: dict) -> Scored:
    """Rows with a hinted twin are scored together with it; the others alone."""
    count = len(labels) - len(pairs)
    mask = labels != -100
    rows = torch.zeros(count, dtype=torch.bool, device=labels.device)
    rows[pairs] = True
    values = hidden.new_zeros((4, count, labels.shape[1]), dtype=torch.float32)
    alone = mask[:count] & ~rows.unsqueeze(1)
    if len(pairs) < count:
        logp, entropy = linear_logprob_entropy(hidden[:count][alone], weight, labels[:count][alone], **of_head)
        values[0][alone], values[1][alone] = logp.float(), entropy.float()
    if pairs:
        paired, hinted = mask[:count] & rows.unsqueeze(1), mask[count:]
        found = linear_hindsight_information(hidden[:count][paired], hidden[count:][hinted], weight, labels[:count][paired], **of_head)
        for value, own in zip(values, (found.logp, found.entropy, found.log_ratio, found.kl), strict=True):
            value[paired] = own.float()
    return Scored(*values)


def _whole(parameter: Tensor | None) -> Tensor | None:
    """A sharded parameter of FSDP2 gathered."""
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
