"""Ragged hierarchies of a given size for the operations on segments."""

from __future__ import annotations

import torch

from acpo_kernels import Segments

# (N, S, B): 64 rollouts of a thousand tokens in 16-token steps, and what a large asynchronous step holds
SHAPES = {"small": [(2048, 128, 8)], "default": [(65_536, 4096, 64), (2_097_152, 131_072, 2048)], "large": [(2_097_152, 131_072, 2048)]}


def segments_of(n: int, s: int, b: int, device: torch.device) -> Segments:
    """S segments of random lengths in B sequences of equal numbers, one in two of which ends in an answer."""
    cuts = torch.randperm(n - 1)[: s - 1].sort().values + 1
    tokens = torch.cat([torch.zeros(1, dtype=torch.int64), cuts, torch.tensor([n])])
    sequences = torch.arange(b + 1) * s // b
    return Segments(tokens, sequences, terminal=torch.arange(b) % 2 == 0).to(device)
