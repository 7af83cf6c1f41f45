"""The rollouts of a step as the one picture: values a token, a segment, a sequence, over one packed layout."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from acpo_kernels import Segments


@dataclass
class Batch:
    """B rollouts, packed. Rollouts of one problem stand side by side: rollout b belongs to group b // group_size.

    prompts holds the token ids in front of each response; token and sequence hold named tensors of length N and B; lengths
    are the response lengths on the host. temperature is that of the distribution that sampled them, and so of every log-prob, entropy and ratio here.
    """

    prompts: list[list[int]]
    lengths: list[int]
    segments: Segments
    token: dict[str, Tensor] = field(default_factory=dict)
    sequence: dict[str, Tensor] = field(default_factory=dict)
    temperature: float = 1.0

    @classmethod
    def from_responses(cls, prompts: list[list[int]], responses: list[Tensor], temperature: float = 1.0, **token: list[Tensor]) -> Batch:
        """Packed from one tensor of ids (and of each further token value) a rollout; each rollout is one segment for now."""
        lengths = [len(r) for r in responses]
        device = responses[0].device
        offsets = torch.tensor([0, *itertools.accumulate(lengths)], device=device)
        segments = Segments(offsets, torch.arange(len(lengths) + 1, device=device), num_tokens=sum(lengths))
        values = {"ids": torch.cat(responses), **{name: torch.cat(v) for name, v in token.items()}}
        return cls(prompts, lengths, segments, values, temperature=temperature)

    def __len__(self) -> int:
        return len(self.lengths)

    def responses(self, rows: list[int] | None = None) -> list[Tensor]:
        """The response ids of the given rollouts (None: of all)."""
        all_ = self.token["ids"].split(self.lengths)
        return list(all_) if rows is None else [all_[b] for b in rows]

    def put(self, rows: list[int], **values: Tensor) -> None:
        """Writes values [tokens of rows, ...] of the given rollouts into the token tensors of that name, zero elsewhere at first."""
        index = self.tokens_of(rows)
        for name, value in values.items():
            if name not in self.token:
                self.token[name] = value.new_zeros(self.segments.num_tokens, *value.shape[1:])
            self.token[name][index] = value

    def tokens_of(self, rows: list[int]) -> Tensor:
        """Positions of the given rollouts' tokens in the packed layout."""
        starts = [0, *itertools.accumulate(self.lengths)]
        return _ranges([(starts[b], starts[b + 1]) for b in rows], self.segments.device)

    def select(self, rows: list[int]) -> Batch:
        """The given rollouts, in the given order, with all their values."""
        device = self.segments.device
        sequence_offsets = self.segments.sequence_offsets.tolist()
        tokens = self.tokens_of(rows)
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
            {name: value[index] for name, value in self.sequence.items()},
            self.temperature,
        )

    def micro_batches(self, rows: list[int], budget: int, packed: bool = False) -> Iterator[list[int]]:
        """Splits rows so that none has more than `budget` tokens, counted as padded or as packed ones (a longer rollout stands alone), long
        ones together."""
        size = {b: len(self.prompts[b]) + self.lengths[b] for b in rows}
        part: list[int] = []
        tokens = 0  # of part, packed
        for b in sorted(rows, key=lambda b: (-size[b], b)):
            if part and (tokens + size[b] if packed else size[part[0]] * (len(part) + 1)) > budget:
                yield part
                part, tokens = [], 0
            part.append(b)
            tokens += size[b]
        if part:
            yield part


def _ranges(ranges: list[tuple[int, int]], device) -> Tensor:
    parts = [np.arange(begin, end) for begin, end in ranges]
    return torch.from_numpy(np.concatenate(parts) if parts else np.zeros(0, np.int64)).to(device)


def on_host(values: list[Tensor]) -> list[Tensor]:
    """The same on the host, in one transfer: a loop over rollouts that lie on a GPU would wait for it once each."""
    return list(torch.cat(values).cpu().split([len(value) for value in values])) if values else []
