"""Ragged hierarchies for the tests: token -> segment -> sequence, with every shape that breaks a kernel."""

from __future__ import annotations

import itertools

import torch
from contract import assert_within_budget
from hypothesis import strategies as st
from torch import Tensor

from acpo_kernels import Segments

# Segments of each sequence, tokens of each segment: an ordinary rollout, one of one token, one without segments, an empty segment
# first, between and last, a rollout of empty segments alone, a long one.
LENGTHS = ((3, 1, 4, 2), (1,), (), (0, 5, 0, 2, 0), (0, 0), (17, 2, 1))
TERMINAL = (True, True, True, False, True, True)


def segments_of(lengths=LENGTHS, terminal=None, device="cpu") -> Segments:
    tokens = [0, *itertools.accumulate(n for sequence in lengths for n in sequence)]
    sequences = [0, *itertools.accumulate(len(sequence) for sequence in lengths)]
    terminal = None if terminal is None else torch.tensor(terminal, dtype=torch.bool, device=device)
    return Segments(torch.tensor(tokens, device=device), torch.tensor(sequences, device=device), terminal=terminal)


def sequences(segments: Segments):
    """(sequence, its segments) as plain ranges, for oracles written as loops."""
    offsets = segments.sequence_offsets.tolist()
    return [(b, range(offsets[b], offsets[b + 1])) for b in range(segments.num_sequences)]


def tokens(segments: Segments, segment: int) -> range:
    offsets = segments.token_offsets.tolist()
    return range(offsets[segment], offsets[segment + 1])


@st.composite
def hierarchies(draw, max_length: int = 6):
    """(Segments, mask [N]) of up to five rollouts."""
    lengths = draw(st.lists(st.lists(st.integers(0, max_length), max_size=6), max_size=5))
    terminal = draw(st.lists(st.booleans(), min_size=len(lengths), max_size=len(lengths)))
    segments = segments_of(lengths, terminal)
    torch.manual_seed(draw(st.integers(0, 2**32 - 1)))  # what the test draws next is the example's own too
    mask = torch.rand(segments.num_tokens) < draw(st.sampled_from([0.0, 0.5, 0.9, 1.0]))
    return segments, mask


def assert_right(name: str, actual: Tensor, single: Tensor, exact: Tensor, **options):
    """The error budget; float64 results, which float32's budget would hardly hold, are held to their own rounding."""
    assert_within_budget(actual, single, exact, name, **options)
    if actual.dtype == torch.float64 and options.get("gradient_dtype", torch.float64) == torch.float64:
        torch.testing.assert_close(actual, exact, rtol=1e-12, atol=1e-13, equal_nan=True, msg=lambda m: f"{name}: {m}")
