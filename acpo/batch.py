"""The rollouts of a step as the one picture: values a token, a segment, a sequence, over one packed layout."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from acpo_kernels import Segments


@dataclass
class Batch:
    """B rollouts, packed. Rollouts of one problem stand side by side: rollout b belongs to group b // group_size.

    prompts and hinted hold the token ids in front of each response (hinted: with the answer in it; None where not asked for).
    token, segment and sequence hold named tensors of length N, S and B; lengths are the response lengths on the host.
    """

    prompts: list[list[int]]
    lengths: list[int]
    segments: Segments
    token: dict[str, Tensor] = field(default_factory=dict)
    segment: dict[str, Tensor] = field(default_factory=dict)
    sequence: dict[str, Tensor] = field(default_factory=dict)
    hinted: list[list[int]] | None = None

    @classmethod
    def from_responses(cls, prompts: list[list[int]], responses: list[Tensor], **token: list[Tensor]) -> Batch:
        """Packed from one tensor of ids (and of each further token value) a rollout; each rollout is one segment for now."""
        lengths = [len(r) for r in responses]
        device = responses[0].device
        offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], device=device)
        segments = Segments(offsets, torch.arange(len(lengths) + 1, device=device), num_tokens=sum(lengths))
        values = {"ids": torch.cat(responses), **{name: torch.cat(v) for name, v in token.items()}}
        return cls(prompts, lengths, segments, values)

    def __len__(self) -> int:
        return len(self.lengths)

    def responses(self) -> tuple[Tensor, ...]:
        return self.token["ids"].split(self.lengths)

    def select(self, rows: list[int]) -> Batch:
        """The given rollouts, in the given order, with all their values."""
        device = self.segments.device
        token_starts = torch.tensor([0, *self.lengths]).cumsum(0).tolist()
        sequence_offsets = self.segments.sequence_offsets.tolist()
        tokens = _ranges([(token_starts[b], token_starts[b + 1]) for b in rows], device)
        segments = _ranges([(sequence_offsets[b], sequence_offsets[b + 1]) for b in rows], device)
        index = torch.tensor(rows, dtype=torch.int64, device=device)
        lengths = self.segments.lengths[segments]
        terminal = None if self.segments.terminal is None else self.segments.terminal[index]
        chosen = Segments(
            torch.nn.functional.pad(lengths.cumsum(0), (1, 0)),
            torch.nn.functional.pad(self.segments.sequence_offsets.diff()[index].cumsum(0), (1, 0)),
            terminal=terminal,
            num_tokens=sum(self.lengths[b] for b in rows),
        )
        return Batch(
            [self.prompts[b] for b in rows],
            [self.lengths[b] for b in rows],
            chosen,
            {name: value[tokens] for name, value in self.token.items()},
            {name: value[segments] for name, value in self.segment.items()},
            {name: value[index] for name, value in self.sequence.items()},
            None if self.hinted is None else [self.hinted[b] for b in rows],
        )

    def micro_batches(self, rows: list[int], budget: int) -> Iterator[list[int]]:
        """Splits rows so that none has more than `budget` padded tokens (a longer rollout stands alone), long ones together."""
        extra = 0 if self.hinted is None else max((len(self.hinted[b]) - len(self.prompts[b]) for b in rows), default=0)
        size = {b: len(self.prompts[b]) + self.lengths[b] + extra for b in rows}
        part: list[int] = []
        for b in sorted(rows, key=lambda b: (-size[b], b)):
            if part and size[part[0]] * (len(part) + 1) > budget:
                yield part
                part = []
            part.append(b)
        if part:
            yield part


def _ranges(ranges: list[tuple[int, int]], device) -> Tensor:
    parts = [torch.arange(begin, end, device=device) for begin, end in ranges]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64, device=device)
