"""From when on a token forks, where the answer of a synthetic task begins, where segments end in the text, and the ablation that cuts rollouts into
pieces of one length."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from acpo_kernels import Segmenter, Segments

from .batch import on_host
from .config import SegmenterConfig

DECAY = 0.9
MOST = 1 << 24  # torch.quantile takes no more


def segmenter_of(tokenizer, settings: SegmenterConfig, vocab_size: int | None = None) -> Segmenter:
    """The segmenter of a configuration. ValueError for a tokenizer whose tokens have no bytes."""
    return Segmenter.from_tokenizer(
        tokenizer, vocab_size=vocab_size, min_tokens=settings.min_tokens, max_tokens=settings.max_tokens, max_segments=settings.max_segments,
        target_tokens=settings.target_tokens,
    )  # fmt: skip


@dataclass
class ForkThreshold:
    """The entropy at or above which a token forks: the running mean of the batches' quantile 1 - share, so that where one rollout is cut does not
    depend on the others of its batch."""

    share: float
    value: float | None = None

    def update(self, entropy: Tensor) -> float | None:
        """Takes the token entropies of a batch, [N]; an empty one changes nothing."""
        if entropy.numel():
            quantile = float(torch.quantile(entropy[:MOST], 1 - self.share))
            self.value = quantile if self.value is None else DECAY * self.value + (1 - DECAY) * quantile
        return self.value


def pieces_of(ids: list[int], tokens: Sequence[bytes]) -> list[bytes]:
    """The bytes of each token; tokens are those of each id (`Segmenter.tokens`), ids beyond them no text."""
    return [tokens[i] if i < len(tokens) else b"" for i in ids]


def answer_starts(responses: list[Tensor], tokens: Sequence[bytes]) -> Tensor:
    """The token at which the last line that opens with A begins, -1 without one, [B]; tokens as in `pieces_of`."""
    starts = []
    for ids in on_host(responses):
        pieces = pieces_of(ids.tolist(), tokens)
        at = (b"\n" + b"".join(pieces)).rfind(b"\nA")
        starts.append(bisect.bisect_right(list(itertools.accumulate(map(len, pieces))), at) if at >= 0 else -1)
    return torch.tensor(starts, device=responses[0].device)


def answered(segments: Segments) -> list[bool]:
    """Whether the last segment of each rollout is its answer, [B]."""
    terminal, offsets = segments.is_terminal().tolist(), segments.sequence_offsets.tolist()
    return [first < last and terminal[last - 1] for first, last in itertools.pairwise(offsets)]


def character_ends(responses: list[Tensor], segments: Segments, texts: list[str], tokenizer) -> list[list[int]]:
    """Where each segment ends in the decoded text of its rollout, in characters, [b][k]. Special tokens have no text; a character whose bytes lie
    on both sides of a cut belongs to the segment that completes it."""
    offsets = segments.sequence_offsets.tolist()
    steps = [step.tolist() for step in torch.cat(responses).cpu().split(segments.lengths.tolist())]
    pieces = tokenizer.batch_decode(steps, skip_special_tokens=True)
    out = []
    for text, (first, last) in zip(texts, itertools.pairwise(offsets), strict=True):
        own, parts = steps[first:last], pieces[first:last]
        if "".join(parts) != text:  # SentencePiece drops a space at the start of what it decodes: decode each with the one before
            both = tokenizer.batch_decode([a + b for a, b in itertools.pairwise(own)], skip_special_tokens=True)
            parts = parts[:1] + [pair[len(before) :] for pair, before in zip(both, parts[:-1], strict=True)]
        ends = list(itertools.accumulate(map(len, parts)))
        if "".join(parts) != text:  # a cut inside a character: decode the whole way to each boundary
            ways = tokenizer.batch_decode(list(itertools.accumulate(own)), skip_special_tokens=True)
            ends = [len(way if text.startswith(way) else way.rstrip("\ufffd")) for way in ways]
        out.append([*ends[:-1], len(text)] if ends else [])
    return out


def fixed_length(segments: Segments, tokens: int) -> Segments:
    """The same rollouts and answers, every other step cut anew into pieces of `tokens` tokens (the last one before the answer may be shorter)."""
    ends, offsets = segments.token_offsets.tolist(), segments.sequence_offsets.tolist()
    terminal = segments.is_terminal().tolist()
    cuts, count = [0], [0]
    for first, last in itertools.pairwise(offsets):
        if first < last:
            answer = ends[last - 1] if terminal[last - 1] else ends[last]
            pieces = list(range(ends[first] + tokens, answer, tokens))
            cuts += pieces + ([answer] if ends[first] < answer else []) + ([ends[last]] if terminal[last - 1] else [])
        count.append(len(cuts) - 1)
    return Segments(
        torch.tensor(cuts, device=segments.device),
        torch.tensor(count, device=segments.device),
        terminal=segments.terminal,
        num_tokens=segments.num_tokens,
    )
