"""The ragged hierarchy token -> segment -> sequence as two integer arrays, and the border between padded and packed tensors."""

from __future__ import annotations

import math
import operator
from numbers import Number, Real
from typing import Any

import torch
from torch import Tensor

from . import _checks as check


class Segments:
    """Reasoning steps over packed tokens: segment s holds the tokens [token_offsets[s], token_offsets[s+1]) and sequence b
    (one rollout) the segments [sequence_offsets[b], sequence_offsets[b+1]).

    Shapes
        token_offsets [S+1], sequence_offsets [B+1], terminal [B] or None.
    Dtypes
        Offsets are int32 or int64 and kept as int64; terminal is bool.
    Units
        Offsets count packed tokens and segments. terminal[b] says that the last segment of sequence b is its final-answer
        span; None says that no sequence has one.
    Errors
        ValueError for offsets that do not start at 0, decrease, or do not end at num_tokens and S, for a negative num_tokens, and for none with
        meta tensors; TypeError for one that is no integer. On a CUDA device the values are not read back: they are the caller's promise,
        and num_tokens is read once, here, unless it is given.
    Source
        The variable-length convention of flash-attention (`cu_seqlens`), one level deeper.
    """

    __slots__ = ("num_segments", "num_sequences", "num_tokens", "sequence_offsets", "terminal", "token_offsets")

    def __init__(self, token_offsets: Tensor, sequence_offsets: Tensor, *, terminal: Tensor | None = None, num_tokens: int | None = None):
        check.tensor("token_offsets", token_offsets, check.INTEGER, ndim=1)
        check.tensor("sequence_offsets", sequence_offsets, check.INTEGER, ndim=1, device=token_offsets.device)
        for name, offsets in (("token_offsets", token_offsets), ("sequence_offsets", sequence_offsets)):
            if offsets.numel() == 0:
                raise ValueError(f"{name} must hold at least the leading 0, got an empty tensor")
        self.token_offsets = token_offsets.to(torch.int64).contiguous()
        self.sequence_offsets = sequence_offsets.to(torch.int64).contiguous()
        self.num_segments = token_offsets.numel() - 1
        self.num_sequences = sequence_offsets.numel() - 1
        if terminal is not None:
            check.tensor("terminal", terminal, check.BOOL, shape=(self.num_sequences,), device=token_offsets.device)
        self.terminal = terminal
        if num_tokens is None and token_offsets.is_meta:
            raise ValueError("num_tokens must be given with token_offsets that hold no values, got a meta tensor and None")
        self.num_tokens = int(self.token_offsets[-1]) if num_tokens is None else _count(num_tokens)
        if token_offsets.device.type == "cpu":
            _check_offsets("token_offsets", self.token_offsets, self.num_tokens, "num_tokens")
            _check_offsets("sequence_offsets", self.sequence_offsets, self.num_segments, "the number of segments")

    @classmethod
    def _trusted(cls, token_offsets: Tensor, sequence_offsets: Tensor, terminal: Tensor | None, num_tokens: int) -> Segments:
        """The same object from int64 tensors that were checked before: no value is read."""
        self = object.__new__(cls)
        self.token_offsets, self.sequence_offsets, self.terminal = token_offsets, sequence_offsets, terminal
        self.num_tokens, self.num_segments, self.num_sequences = num_tokens, token_offsets.shape[0] - 1, sequence_offsets.shape[0] - 1
        return self

    @classmethod
    def from_padded(cls, mask: Tensor, boundaries: Tensor | None = None, *, terminal: Tensor | None = None) -> Segments:
        """The segments of a padded batch: packed tokens are the True positions of mask [B,T], row by row (as in `pack`).

        boundaries [B,T] is True at the LAST token of a segment; the last token of a sequence always ends one. None makes
        each sequence one segment. A boundary at a padded position is ignored. Waits for the device twice: for the numbers of segments and of
        tokens.
        """
        check.tensor("mask", mask, check.BOOL, ndim=2)
        if mask.is_meta:
            raise ValueError("mask must hold values, for the number of tokens is read from it, got a meta tensor")
        if boundaries is not None:
            check.tensor("boundaries", boundaries, check.BOOL, shape=tuple(mask.shape), device=mask.device)
        ends = mask & (mask.flip(1).cumsum(1).flip(1) == 1)  # the last token of each sequence
        if boundaries is not None:
            ends = ends | (boundaries & mask)
        tokens = mask.flatten().cumsum(0)  # up to and with each position
        token_offsets = torch.nn.functional.pad(tokens[ends.flatten()], (1, 0))
        sequence_offsets = torch.nn.functional.pad(ends.sum(1).cumsum(0), (1, 0))
        return cls(token_offsets, sequence_offsets, terminal=terminal, num_tokens=int(token_offsets[-1]))

    @property
    def cu_seqlens(self) -> Tensor:
        """Token offsets of the sequences, [B+1]."""
        return self.token_offsets[self.sequence_offsets]

    @property
    def lengths(self) -> Tensor:
        """Tokens of each segment, [S]."""
        return self.token_offsets.diff()

    @property
    def device(self) -> torch.device:
        return self.token_offsets.device

    def segment_ids(self) -> Tensor:
        """The segment of each token, [N]."""
        return _ids(self.lengths, self.num_tokens)

    def sequence_ids(self) -> Tensor:
        """The sequence of each token, [N]."""
        return _ids(self.cu_seqlens.diff(), self.num_tokens)

    def segment_sequence_ids(self) -> Tensor:
        """The sequence of each segment, [S]."""
        return _ids(self.sequence_offsets.diff(), self.num_segments)

    def is_terminal(self) -> Tensor:
        """Which segments are the final-answer span of their sequence, bool [S]."""
        out = torch.zeros(self.num_segments + 1, dtype=torch.bool, device=self.device)
        if self.terminal is not None:
            # A sequence without segments has no last one: its mark goes to the extra slot that is cut off.
            has = self.terminal & (self.sequence_offsets.diff() > 0)
            last = torch.where(has, self.sequence_offsets[1:] - 1, self.num_segments)
            out.scatter_(0, last, True)
        return out[:-1]

    def to(self, device: torch.device | str) -> Segments:
        terminal = None if self.terminal is None else self.terminal.to(device)
        return Segments._trusted(self.token_offsets.to(device), self.sequence_offsets.to(device), terminal, self.num_tokens)

    def __repr__(self) -> str:
        return f"Segments({self.num_tokens} tokens, {self.num_segments} segments, {self.num_sequences} sequences, {self.device})"


def check_segments(value: object) -> None:
    if not isinstance(value, Segments):
        raise TypeError(f"segments must be a Segments object, got {type(value).__name__}")


def _ids(lengths: Tensor, total: int) -> Tensor:
    index = torch.arange(lengths.shape[0], device=lengths.device)
    return torch.repeat_interleave(index, lengths, output_size=total)  # output_size: no read-back of the sum


def _count(num_tokens: object) -> int:
    """A host integer; those of numpy and of torch serve as well."""
    if isinstance(num_tokens, bool) or (isinstance(num_tokens, Tensor) and num_tokens.dtype == torch.bool):
        raise TypeError(f"num_tokens must be an integer, got {num_tokens!r}")
    try:
        count = num_tokens if isinstance(num_tokens, int) else operator.index(num_tokens)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"num_tokens must be an integer, got {num_tokens!r}") from None
    if count < 0:
        raise ValueError(f"num_tokens must be at least 0, got {count}")
    return count


def _check_offsets(name: str, offsets: Tensor, last: int, what: str) -> None:
    if offsets[0] != 0:
        raise ValueError(f"{name} must start at 0, got {int(offsets[0])}")
    steps = offsets.diff()
    if (steps < 0).any():
        at = int((steps < 0).nonzero()[0])
        raise ValueError(f"{name} must not decrease, got {int(offsets[at])} then {int(offsets[at + 1])} at index {at}")
    if offsets[-1] != last:
        raise ValueError(f"{name} must end at {what} = {last}, got {int(offsets[-1])}")


def pack(values: Tensor, mask: Tensor) -> Tensor:
    """The unmasked positions of a padded batch, row by row: values[B,T,...], mask[B,T] -> [N,...].

    Shapes
        N is the number of True in mask; any padding side, holes included.
    Dtypes
        values of any dtype, kept; mask bool. Differentiable in values.
    Units
        Row t of the operations holds the logits or the hidden state that PREDICT ids[t]. With hidden states of a whole
        sequence [B,T,H] that shift is part of the call: `pack(hidden[:, :-1], mask[:, 1:])` beside `pack(ids[:, 1:], mask[:, 1:])`.
    Errors
        TypeError for what is no tensor; ValueError when mask is not bool [B,T] on the device of values.
    Source
        `unpad_input` of flash-attention.
    """
    check.tensor("mask", mask, check.BOOL, ndim=2)
    check.tensor("values", values, None, device=mask.device)
    if values.ndim < 2 or values.shape[:2] != mask.shape:
        raise ValueError(f"values must be [B,T,...] with the mask's (B,T) = {tuple(mask.shape)}, got {tuple(values.shape)}")
    return values[mask]


def _check_fill(fill: Any, dtype: torch.dtype) -> None:
    number, real = isinstance(fill, Number), isinstance(fill, Real)
    if not number:
        raise TypeError(f"fill must be a number, got {type(fill).__name__}")
    if dtype.is_complex or not real:
        held = dtype.is_complex
    elif dtype.is_floating_point:
        held = fill != fill or abs(fill) == math.inf or abs(fill) <= torch.finfo(dtype).max
    else:
        low, high = (0, 1) if dtype == torch.bool else (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
        held = low <= fill <= high and fill == int(fill)
    if not held:
        raise ValueError(f"fill must be a number that the dtype of values holds, {str(dtype).removeprefix('torch.')}, got {fill}")


def unpack(values: Tensor, mask: Tensor, fill: float = 0) -> Tensor:
    """The inverse of `pack`: values[N,...], mask[B,T] -> [B,T,...] with `fill` where mask is False.

    Shapes, Dtypes, Units, Source
        As in `pack`. Differentiable in values.
    Errors
        TypeError for what is no tensor, and for a fill that is no number; ValueError for one that the dtype of values does not hold (a floating one
        may round it), and when mask is not bool [B,T] or, on the CPU outside of torch.compile, does not hold N times True (elsewhere that
        is the caller's promise).
    """
    check.tensor("mask", mask, check.BOOL, ndim=2)
    check.tensor("values", values, None, device=mask.device)
    if values.ndim < 1:
        raise ValueError("values must be [N,...], got a 0-d tensor")
    _check_fill(fill, values.dtype)
    readable = mask.device.type == "cpu" and not torch.compiler.is_compiling()  # the sum of a traced mask is not known
    if readable and int(mask.sum()) != values.shape[0]:
        raise ValueError(f"mask must hold N = {values.shape[0]} times True, got {int(mask.sum())}")
    out = values.new_full((*mask.shape, *values.shape[1:]), fill)
    placed = mask.reshape(*mask.shape, *[1] * (values.ndim - 1)).expand_as(out)
    if values.dtype.itemsize == 1 and values.is_floating_point():  # torch scatters no float8, but its bytes
        return out.view(torch.uint8).masked_scatter(placed, values.view(torch.uint8)).view(values.dtype)
    return out.masked_scatter(placed, values)
