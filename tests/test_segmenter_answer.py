"""The segmenter's answer span, its cuts by entropy, what it explains, and scores computed before."""

from itertools import pairwise

import pytest
import torch
from segmenter_cases import BYTES, one, pieces, text_ids

from acpo_kernels import Segmenter

# ---- the answer span


ANSWERS = [
    ("We add. That is 5. The answer is $\\boxed{5}$.", " The answer is $\\boxed{5}$."),
    ("We add 2 and 3.\n\nSo it is:\n\\[ \\boxed{5} \\]", "So it is:\n\\[ \\boxed{5} \\]"),
    ("Some \\boxed{4}? No. It is \\boxed{5}. Done", " It is \\boxed{5}. Done"),
    ("First this. Then that. The answer is 5.", " The answer is 5."),
    ("We add.\nAnswer: 5\n", "Answer: 5\n"),
    ("我们计算。答案是5。", "答案是5。"),
    ("<think>\nThe answer is 3. Hm.\n</think>\n\nFive it is.", "\n\nFive it is."),
    ("<think>\nHm.\n</think>\n\nWe add. It is \\boxed{5}.", " It is \\boxed{5}."),
    ("<think>\nThe answer is \\boxed{5}. But wait", None),  # truncated
    ("<think>\nHm.\n</think>\n", None),
    ("We add 2 and 3. That is five.", None),
    ("The answer isn't clear. Really", None),
    ("We add. So it is:\n\n\\[\n\n\\boxed{5}\n\n\\]\n", " So it is:\n\n\\[\n\n\\boxed{5}\n\n\\]\n"),
    ("A code fence\n```\nanswer is 3\n```\nend", None),
]


@pytest.mark.parametrize("text, answer", ANSWERS)
def test_answer_span_is_detected(text, answer):
    segmenter = Segmenter(BYTES, min_tokens=4)
    ids, cu = text_ids(text)
    segments = segmenter(ids, cu)
    assert segments.terminal.tolist() == [answer is not None]
    if answer is not None:
        assert pieces(segments, text.encode())[-1] == answer
        assert segmenter.explain(ids, cu)[-2:] == ["answer", "end"]


@pytest.mark.parametrize("last", ["so.\nAnswer:", "。答案", ". The answer is", "</think>\\boxed{", "so.\n\n\\boxed{"])
def test_an_answer_that_begins_inside_the_last_token(last):
    """The boundary and the statement are one token's: the answer begins inside the sequence all the same, and what was read can be handed over."""
    segmenter = Segmenter([b"hello ", b"world. ", last.encode(), b" 5"], min_tokens=1)
    ids, cu = torch.tensor([0, 1, 2, 0, 1, 2, 3]), torch.tensor([0, 3, 7])
    reading = segmenter.read(ids, cu)
    assert all(-1 <= start < length for start, length in zip(reading.answer_start.tolist(), (3, 4), strict=True))
    assert reading.answer_start[0] in (-1, 2)
    segments = segmenter(ids, cu, scores=reading)
    assert (segments.lengths > 0).all() and torch.equal(segments.token_offsets, segmenter(ids, cu).token_offsets)


@pytest.mark.parametrize("opening", ["。\\|[", "。$|$", "。$|", ".\n\n$|$", ".\n\n$|", "。answer is $|$"])
def test_an_answer_begins_before_its_formula(opening):
    """The boundary before it is gone where its token also opens the formula: the answer begins with the sentence before."""
    tokens = ["So it is", ".", " Hm", *opening.split("|"), "\\boxed{5} =", " x", "$$" if "$|$" in opening else "$" if "$" in opening else "\\]"]
    reading = Segmenter([t.encode() for t in tokens]).read(*one(range(len(tokens))))
    assert reading.answer_start.tolist() == [2] and reading.scores[2:].max() == 0


def test_answer_far_from_the_end_is_not_final():
    ids, cu = text_ids("The answer is 5. But " + "x" * 60)
    assert Segmenter(BYTES, max_tokens=100)(ids, cu).terminal.tolist() == [True]
    assert Segmenter(BYTES, max_tokens=40)(ids, cu).terminal.tolist() == [False]
    # Text after </think> that is longer than a segment: from its best boundary.
    text = "<think> hm </think> " + "y" * 50 + ". Yes\n\n" + "z" * 30
    segments = Segmenter(BYTES, max_tokens=40)(*text_ids(text))
    assert segments.terminal.tolist() == [True] and pieces(segments, text.encode())[-1] == "z" * 30


def test_given_answer_start_wins_and_is_one_segment():
    segmenter = Segmenter([b"x", b"\n"], min_tokens=2, max_tokens=4, max_segments=3)
    ids, cu = one([0] * 20)
    segments = segmenter(ids, cu, answer_start=torch.tensor([9]))
    assert segments.token_offsets.tolist() == [0, 5, 9, 20] and segments.terminal.tolist() == [True]
    assert segmenter(ids, cu, answer_start=torch.tensor([0])).token_offsets.tolist() == [0, 20]
    assert segmenter(ids, cu, answer_start=torch.tensor([1])).token_offsets.tolist() == [0, 1, 20]
    whole = Segmenter([b"x"], min_tokens=2, max_segments=1)(ids, cu, answer_start=torch.tensor([9]))
    assert whole.token_offsets.tolist() == [0, 20] and whole.terminal.tolist() == [False]


def test_lines_of_a_synthetic_task():
    tokens = ["0", "1", "2", "3", "+", "=", "\n", "A", "<eos>"]
    segmenter = Segmenter([t.encode() if t != "<eos>" else b"" for t in tokens], min_tokens=2, max_segments=16, target_tokens=5)
    text = "0+1=1\n1+2=3\n3+0=3\nA3\n"
    ids, cu = one([*(tokens.index(c) for c in text), 8])
    segments = segmenter(ids, cu, answer_start=torch.tensor([18]))
    assert segments.token_offsets.tolist() == [0, 6, 12, 18, 22] and segments.terminal.tolist() == [True]
    assert segmenter.explain(ids, cu, answer_start=torch.tensor([18])) == ["line", "line", "answer", "end"]
    # A truncated rollout, and forks that fall on some line starts and not on others.
    entropy = torch.zeros(16)
    entropy[[6, 9]] = 1.0
    segments = segmenter(ids[:16], torch.tensor([0, 16]), entropy=entropy, entropy_threshold=0.5)
    assert segments.token_offsets.tolist() == [0, 6, 12, 16] and segments.terminal.tolist() == [False]


def test_lines_of_the_synthetic_tasks_themselves():
    import numpy as np

    from acpo import synthetic

    tokenizer, task, rng = synthetic.tokenizer(), synthetic.Multiplication(), np.random.default_rng(0)
    texts = [task.trace(task.problem(rng), rng).text for _ in range(20)]
    encoded = [[*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id] for text in texts]
    ids, cu = torch.tensor([i for e in encoded for i in e]), torch.tensor([0, *map(len, encoded)]).cumsum(0)
    start = torch.tensor([text.rfind("\nA") + 1 for text in texts])
    entropy = torch.rand(ids.numel(), generator=torch.Generator().manual_seed(0))
    for target in (7, 64):
        segmenter = Segmenter.from_tokenizer(tokenizer, min_tokens=2, max_tokens=32, max_segments=16, target_tokens=target)
        for arguments in ({}, {"entropy": entropy}):  # forks inside a line do not pay beside line breaks
            segments = segmenter(ids, cu, answer_start=start, **arguments)
            cut = tokenizer.batch_decode([ids[a:b] for a, b in pairwise(segments.token_offsets.tolist())], skip_special_tokens=True)
            assert cut == [line for text in texts for line in text.splitlines(keepends=True)] and segments.terminal.all()


# ---- entropy, explain, precomputed scores


def test_forking_tokens_cut_where_the_text_does_not():
    segmenter = Segmenter([b"x"], min_tokens=3, max_tokens=50, target_tokens=4)
    ids, cu = one([0] * 20)
    entropy = torch.zeros(20)
    entropy[[0, 7, 8, 14]] = torch.tensor([9.0, 1.0, 2.0, 1.0])
    segments = segmenter(ids, cu, entropy=entropy, entropy_threshold=0.5)
    assert segments.token_offsets.tolist() == [0, 8, 14, 20]  # row t predicts ids[t]: the boundary is before the forking token
    assert segmenter.explain(ids, cu, entropy=entropy, entropy_threshold=0.5) == ["entropy", "entropy", "end"]
    assert segmenter(ids, cu, entropy=entropy, entropy_threshold=1.5).token_offsets.tolist() == [0, 8, 20]
    assert segmenter(ids, cu, entropy=torch.zeros(20)).num_segments == 1  # nothing forks where nothing is open
    for level in (0.7, 1.1, 1e-30):  # one that no float32 is: an entropy that equals it forks, of either type
        for dtype in (torch.float32, torch.float64):
            own = torch.zeros(20, dtype=dtype)
            own[8] = level
            assert segmenter(ids, cu, entropy=own, entropy_threshold=level).token_offsets.tolist() == [0, 8, 20]


def test_explain_names_every_rule():
    text = "One two three.\n\nFour five six\nSeven eight\n- nine ten. Eleven twelve, But four</think>yyyyyyyyyyyyyyyyyyyyyy. The answer is 5"
    segmenter = Segmenter(BYTES, min_tokens=4, max_tokens=20, target_tokens=4)
    rules = segmenter.explain(*text_ids(text))
    assert len(rules) == segmenter(*text_ids(text)).num_segments
    assert rules == ["paragraph", "line", "step", "sentence", "marker", "think", "length", "answer", "end"]
    flat = Segmenter([b"x"], min_tokens=1).explain(*one([0] * 4), scores=torch.tensor([0.0, 1, 0, 0]))
    assert flat == ["score", "end"]


def test_a_reading_or_scores_computed_before_give_the_same_segments(monkeypatch):
    segmenter = Segmenter(BYTES, target_tokens=8, max_tokens=40)
    for text in (
        "One step is here. Wait, another.\nA third one comes. The answer is 7.", "Hmm. No answer here. Wait, is it? So.", "<think> a",
        "<think> hm </think> It is five.", "",
    ):  # fmt: skip
        ids, cu = text_ids(text)
        reading, expected = segmenter.read(ids, cu), segmenter(ids, cu)
        for scores in (reading, reading.scores, segmenter.scores(ids, cu)):
            got = segmenter(ids, cu, scores=scores)
            assert torch.equal(got.token_offsets, expected.token_offsets) and torch.equal(got.terminal, expected.terminal)
        assert (reading.answer_start >= 0).tolist() == expected.terminal.tolist()
        if len(text) > 20:  # the caller's own answer comes first
            got, own = (segmenter(ids, cu, scores=s, answer_start=torch.tensor([12])) for s in (reading, None))
            assert torch.equal(got.token_offsets, own.token_offsets) and 12 in own.token_offsets.tolist()
    # The text is not read again: with a reading of another text its scores and answer are what counts.
    other = segmenter.read(*text_ids("y" * 20 + "\n\n" + "x" * 8))
    assert segmenter(*text_ids("x. A " * 6), scores=other).token_offsets.tolist() == [0, 22, 30]
