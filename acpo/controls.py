"""Attributions that carry no information, of the same shape and spread: a method that gains as much from them gains nothing from attribution."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from acpo_kernels import Segments

from .attribution import Attribution, place_in_sequence, zero_variance


def control(kind: str, attribution: Attribution, segments: Segments, outcome: Tensor, group_size: int, generator: torch.Generator) -> Attribution:
    """phi, score and `changed` of the non-terminal segments replaced; values, reliability and rows stay.

    shuffled: permuted inside each rollout.  everywhere: permuted over all rollouts that the same source speaks for, and how much a group counts over
    the groups with both outcomes [B].  position: the batch's mean at the same place in the rollout.  random: drawn with replacement from the batch's
    own, over all rollouts that were looked at.
    """
    sequence, ordinary = segments.segment_sequence_ids(), ~segments.is_terminal()
    if kind == "position":
        order = place_in_sequence(segments)
        use = (ordinary & attribution.rows[sequence]).double()
        return replace(
            attribution,
            phi=torch.where(ordinary, _mean_at(attribution.phi, order, use), attribution.phi),
            score=torch.where(ordinary, _mean_at(attribution.score, order, use), attribution.score),
            changed=torch.where(ordinary, _mean_at(attribution.changed.double(), order, use) >= 0.5, attribution.changed),
        )
    counts_as = attribution.counts_as
    if kind == "shuffled":
        source = _permutation(sequence, ordinary, generator)
    elif kind == "everywhere":
        speaks = torch.zeros_like(attribution.rows, dtype=torch.int64) if attribution.source is None else attribution.source
        source = _permutation(speaks[sequence], ordinary & attribution.rows[sequence], generator)
        mixed = ~zero_variance(outcome, group_size).view(-1, group_size)[:, 0]
        groups = _permutation(torch.zeros_like(mixed, dtype=torch.int64), mixed, generator)
        counts_as = (groups.unsqueeze(1) * group_size + torch.arange(group_size, device=groups.device)).flatten()
    else:
        source = _draws(ordinary & attribution.rows[sequence], ordinary, generator)
    return replace(
        attribution, phi=attribution.phi[source], score=attribution.score[source], changed=attribution.changed[source], counts_as=counts_as
    )


def _mean_at(values: Tensor, order: Tensor, use: Tensor) -> Tensor:
    sums = torch.zeros(int(order.max()) + 1 if len(order) else 0, dtype=torch.float64, device=values.device)
    return (sums.index_add(0, order, values.double() * use) / sums.index_add(0, order, use).clamp(min=1.0))[order]


def _permutation(kind: Tensor, chosen: Tensor, generator: torch.Generator) -> Tensor:
    """Indices [S] that permute the chosen ones among those of the same kind and leave the others in place."""
    out = torch.arange(len(kind), device=kind.device)
    noise = torch.rand(len(kind), generator=generator, device=kind.device, dtype=torch.float64)
    at = chosen.nonzero().flatten()
    at = at[torch.argsort(kind[at], stable=True)]
    out[at] = at[torch.argsort(kind[at].double() + 0.999 * noise[at])]  # kind by kind, in random order inside
    return out


def _draws(pool: Tensor, ordinary: Tensor, generator: torch.Generator) -> Tensor:
    out = torch.arange(len(ordinary), device=ordinary.device)
    pool = pool.nonzero().flatten()
    if len(pool):
        at = ordinary.nonzero().flatten()
        out[at] = pool[torch.randint(len(pool), (len(at),), generator=generator, device=ordinary.device)]
    return out
