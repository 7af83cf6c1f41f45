"""Pairs of streams on which the divergences of `hindsight_information` are hard, for every implementation of it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from acpo_kernels import HindsightInformation

NAMES = (
    "apart", "close", "closer", "nearly equal", "a heavy token late", "rising", "another offset", "nothing in common",
    "half impossible in the policy", "half impossible in both", "temperatures",
)  # fmt: skip


def streams(name: str, vocab: int, rows: int = 3, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, float | Tensor]:
    """(logits, hindsight_logits, ids, temperature) in float32; vocab >= 4."""
    g = torch.Generator().manual_seed(seed)
    logits, noise = torch.randn(rows, vocab, generator=g) * 3, torch.randn(rows, vocab, generator=g)
    ids = torch.randint(vocab // 2, vocab, (rows,), generator=g)
    hindsight, temperature = logits + 0.3 * noise, 1.0
    match name:
        case "apart":
            hindsight = 3 * noise
        case "closer":
            hindsight = logits + 1e-2 * noise
        case "nearly equal":
            hindsight = logits + 1e-4 * noise
        case "a heavy token late":  # most of the row says that the normalisers differ by 1/2, and the token with the mass that they do not
            hindsight = logits + 0.5
            logits[:, vocab * 3 // 4] = hindsight[:, vocab * 3 // 4] = 30.0
        case "rising":
            logits = logits * 0.1 + torch.linspace(0, 40, vocab)
            hindsight = logits + 1e-2 * noise
        case "another offset":
            logits, hindsight = logits + 1e4, logits
        case "nothing in common":
            logits[:, : vocab // 2] -= 500
            hindsight[:, vocab // 2 :] -= 500
        case "half impossible in the policy":
            logits[:, : vocab // 2] = -math.inf
        case "half impossible in both":
            logits[:, : vocab // 2] = hindsight[:, : vocab // 2] = -math.inf
        case "temperatures":
            temperature = torch.tensor([0.5, 1.0, 2.0]).repeat(rows)[:rows]
    return logits, hindsight, ids, temperature


def assert_bitwise(actual, wanted):
    for name, x, y in zip(HindsightInformation._fields, actual, wanted, strict=True):
        assert torch.equal(x.nan_to_num(nan=7e30), y.nan_to_num(nan=7e30)), name
