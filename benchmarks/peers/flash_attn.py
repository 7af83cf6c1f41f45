"""flash-attn 2.8.3's Triton cross entropy, one file of it (the package compiles CUDA): log-prob alone, no entropy."""

from __future__ import annotations

import contextlib
import types

import torch

from . import FILES, by_path, on_gpu_or_interpreted

NAME = "flash-attn"


class _WithoutDevices(types.ModuleType):
    """torch, but for torch.cuda.device: its launches stand under that, which means nothing in the interpreter."""

    cuda = types.SimpleNamespace(device=lambda _: contextlib.nullcontext())

    def __getattr__(self, name: str):
        return getattr(torch, name)


def logprob_entropy(device):
    on_gpu_or_interpreted(device)
    module = by_path(FILES["flash-attn"])
    if device.type != "cuda":
        module.torch = _WithoutDevices("torch")
    return {"flash-attn": lambda logits, ids, temperature=1.0: (-module.cross_entropy_loss(logits, ids, logit_scale=1.0 / temperature)[0], None)}
