"""Steps of one length: every token once, answers whole, nothing longer than asked; and from when on a token forks."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from ragged import hierarchies, segments_of

from acpo.policy import byte_tokenizer
from acpo.segmentation import ForkThreshold, answer_starts, answered, character_ends, fixed_length
from acpo.synthetic import tokenizer
from acpo_kernels import Segmenter


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


def test_the_fork_threshold_is_the_running_mean_of_the_quantile():
    forks = ForkThreshold(0.25)
    assert forks.update(torch.zeros(0)) is None
    assert forks.update(torch.arange(5.0)) == 3.0
    assert abs(forks.update(torch.arange(5.0) + 10) - (0.9 * 3.0 + 0.1 * 13.0)) < 1e-6
    assert forks.update(torch.zeros(0)) == forks.value, "an empty batch changes nothing"


def test_where_segments_end_in_the_text():
    tokenizer, text = byte_tokenizer(), "aé😀b"  # 1 + 2 + 4 + 1 bytes, a token each
    ids = torch.tensor(tokenizer(text)["input_ids"])
    segments = segments_of(((1, 3, 2, 2), (), (8,)), (False, False, True))  # the second cut lies inside the face
    assert character_ends([ids, ids[:0], ids], segments, [text, "", text], tokenizer) == [[1, 2, 2, 4], [], [4]]
    assert answered(segments) == [False, False, True]


def test_where_segments_end_with_a_tokenizer_that_drops_the_space_in_front():
    class Words:
        def batch_decode(self, rows, skip_special_tokens):
            return ["".join(f" {'abc'[i]}" for i in row)[1:] for row in rows]

    segments = segments_of(((1, 2, 1),), (False,))
    assert character_ends([torch.tensor([0, 1, 2, 0])], segments, ["a b c a"], Words()) == [[1, 5, 7]]


def test_where_the_answer_line_begins_whatever_a_character_takes():
    """In bytes as in characters: a place in the text is none among the tokens, and neither has the padding a text."""
    for spelled, texts in (
        (byte_tokenizer(), ["\u00e9\nA5", "\u20ac\u20ac\u20ac\nA5", "A12\nA3", "a3", ""]),
        (tokenizer(), ["a3\nA5", "A1", "a", ""]),
    ):
        ids = [torch.tensor(spelled(text)["input_ids"], dtype=torch.int64) for text in texts]
        found = answer_starts(ids, Segmenter.from_tokenizer(spelled).tokens).tolist()
        read = ["" if at < 0 else spelled.decode(one[at:]) for one, at in zip(ids, found, strict=True)]
        assert read == ["A" + text.rpartition("A")[2] if "A" in text else "" for text in texts], texts
    padded = torch.tensor([tokenizer().pad_token_id, *tokenizer()("a3\nA5")["input_ids"]])
    assert answer_starts([padded], Segmenter.from_tokenizer(tokenizer()).tokens).tolist() == [4]
