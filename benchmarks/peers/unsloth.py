"""Unsloth-zoo 2026.10.9's `fused_linear_logprobs`: Triton over tiles of logits on CUDA, torch with the same formulas elsewhere. AGPL: measured
from its own file where it lies, nothing of it is in this repository."""

from __future__ import annotations

from . import FILES, by_path

NAME = "Unsloth"


def linear_logprob_entropy(device):
    module = by_path(FILES["unsloth_zoo"])
    return {"Unsloth": lambda hidden, weight, ids, temperature=1.0: module.fused_linear_logprobs(
        hidden, weight, ids, temperature=temperature, return_entropy=True
    )}  # fmt: skip
