"""Attributions that carry no information, of the same shape and spread: a method that gains as much from them gains nothing from attribution."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from acpo_kernels import Segments

from .attribution import Attribution


def control(kind: str, attribution: Attribution, segments: Segments, generator: torch.Generator) -> Attribution:
    """phi, score and `changed` of the non-terminal segments replaced; values, reliability and rows stay.

    shuffled: permuted inside each rollout.  position: the batch's mean at the same place in the rollout.  random: drawn with replacement from the
    batch's own, over all rollouts that were looked at.
    """
    sequence, ordinary = segments.segment_sequence_ids(), ~segments.is_terminal()
    if kind == "position":
        order = torch.arange(segments.num_segments, device=sequence.device) - segments.sequence_offsets[:-1][sequence]
        use = (ordinary & attribution.rows[sequence]).double()
        return replace(
            attribution,
            phi=torch.where(ordinary, _mean_at(attribution.phi, order, use), attribution.phi),
            score=torch.where(ordinary, _mean_at(attribution.score, order, use), attribution.score),
            changed=torch.where(ordinary, _mean_at(attribution.changed.double(), order, use) >= 0.5, attribution.changed),
        )
    source = _permutation(sequence, ordinary, generator) if kind == "shuffled" else _draws(ordinary & attribution.rows[sequence], ordinary, generator)
    return replace(attribution, phi=attribution.phi[source], score=attribution.score[source], changed=attribution.changed[source])


def _mean_at(values: Tensor, order: Tensor, use: Tensor) -> Tensor:
    sums = torch.zeros(int(order.max()) + 1 if len(order) else 0, dtype=torch.float64, device=values.device)
    return (sums.index_add(0, order, values.double() * use) / sums.index_add(0, order, use).clamp(min=1.0))[order]


def _permutation(sequence: Tensor, ordinary: Tensor, generator: torch.Generator) -> Tensor:
    """Indices [S] that permute the ordinary segments of each rollout and leave the others in place."""
    out = torch.arange(len(sequence), device=sequence.device)
    noise = torch.rand(len(sequence), generator=generator, device=sequence.device, dtype=torch.float64)
    at = ordinary.nonzero().flatten()
    shuffled = at[torch.argsort(sequence[at].double() + 0.999 * noise[at])]  # rollout by rollout, in random order inside
    out[at] = shuffled
    return out


def _draws(pool: Tensor, ordinary: Tensor, generator: torch.Generator) -> Tensor:
    out = torch.arange(len(ordinary), device=ordinary.device)
    pool = pool.nonzero().flatten()
    if len(pool):
        at = ordinary.nonzero().flatten()
        out[at] = pool[torch.randint(len(pool), (len(at),), generator=generator, device=ordinary.device)]
    return out
