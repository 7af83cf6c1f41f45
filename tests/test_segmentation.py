"""Steps of one length: every token once, answers whole, nothing longer than asked."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from ragged import hierarchies, segments_of

from acpo.segmentation import fixed_length


def test_by_hand():
    segments = segments_of(((5, 2, 3), (1, 1), (4, 3), ()), (True, True, False, False))
    found = fixed_length(segments, 3)
    assert found.lengths.tolist() == [3, 3, 1, 3, 1, 1, 3, 3, 1]
    assert found.sequence_offsets.tolist() == [0, 4, 6, 9, 9]
    assert found.terminal.tolist() == [True, True, False, False]


@given(hierarchies(), st.integers(1, 9))
def test_properties(hierarchy, tokens):
    segments, _ = hierarchy
    found = fixed_length(segments, tokens)
    assert torch.equal(found.cu_seqlens, segments.cu_seqlens)
    assert (found.lengths[~found.is_terminal()] <= tokens).all()
    answers = [s.lengths[s.is_terminal()].tolist() for s in (segments, found)]
    assert answers[0] == answers[1]
