"""The segmenter's rules of text against a table, whatever the tokens are."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from segmenter_cases import BYTES, RULES, expected_cuts, found_cuts, fragments, one, text_ids

from acpo_kernels import Segmenter
from acpo_kernels.segmenter import BOUNDARY_SCORES


@pytest.mark.parametrize("marked", RULES)
def test_rule_table(marked):
    text, cuts = expected_cuts(marked)
    data = text.encode()
    # A newline run's boundary is after its last newline, a tag's before the white space that follows it.
    assert found_cuts(Segmenter(BYTES), data, range(1, len(data) + 1)) == {at: BOUNDARY_SCORES[rule] for at, rule in cuts.items()}


@settings(max_examples=400, deadline=None)
@given(st.lists(fragments, max_size=30), st.data())
def test_tokens_do_not_change_where_delimiters_are(parts, data):
    """Whatever the tokens are (also inside a character), a boundary is after the token in which its delimiter ends; where a byte behind it in that
    token may open a formula or a fence, those before that byte may be missing."""
    text = "".join(parts).encode()
    spans, found, by_byte = in_tokens(text, data)
    for (a, b), score in zip(spans, found, strict=True):
        assert score in {max(by_byte[q:b]) for q in range(a, b) if q == a or text[q] in b"\\$`"}


def in_tokens(text: bytes, data) -> tuple[list[tuple[int, int]], list[float], list[float]]:
    """Tokens of any length as spans of the text, the scores behind them, and those behind each byte."""
    borders = sorted(data.draw(st.sets(st.integers(1, max(1, len(text) - 1)))) | {len(text)}) if text else []
    spans = list(pairwise([0, *borders]))
    segmenter = Segmenter([text[a:b] for a, b in spans] or [b""], markers=())
    return spans, segmenter.scores(*one(range(len(spans)))).tolist(), Segmenter(BYTES, markers=()).scores(*one(text)).tolist()


plain = st.sampled_from(["One is. ", "二。", "3.1 x, so", "\n", "a\n\n", "Hm? ", "Of J. ", "\n1. One. ", "Well:\n\n"]).map(lambda t: (t, False))
formulas = st.sampled_from(["\\(a. B\\)", "\\[ a. B\n\n c. \\]", "$a. B$", "$$\na. B$$", "\n```py\nA. B\n\n```\n", "\n- ```\na\n```\n"]).map(
    lambda t: (t, True)
)


@settings(max_examples=400, deadline=None)
@given(st.lists(st.tuples(plain, formulas), max_size=8), st.data())
def test_no_boundary_lies_inside_a_formula_whatever_the_tokens_are(parts, data):
    """Exactly those are missing behind which their token opens a formula."""
    text, openings = b"", []
    for part, hidden in [p for pair in parts for p in (*pair, (" x", False))]:
        if hidden:
            openings.append(len(text) + part.find("`" if "`" in part else part[0]))
        text += part.encode()
    spans, found, by_byte = in_tokens(text, data)
    assert found == [max(by_byte[max((o for o in openings if a <= o < b), default=a) : b]) for a, b in spans]


@pytest.mark.parametrize(
    "tokens, scores",
    [
        (["五", "。\\", "[", "x+1=6", "\\]", "是", "。", "好"], [0, 0, 0, 0, 0, 0, 1, 0]),
        (["五", "。\\", "(", "x", "\\)", "好"], [0] * 6),
        (["五", "。\\", "pi", "好"], [0, 1, 0, 0]),  # no formula
        (["五", "。$", "x+1=6", "$", "好"], [0] * 5),
        (["他有", "。$", "5", "。", "好"], [0, 1, 0, 1, 0]),  # a price
        (["So", ".\n\n$$", "x", "$$", "\n\n", "So"], [0, 0, 0, 0, 3, 0]),
        (["So", ".\n\n$", "x", "$", "\n\n", "So"], [0, 0, 0, 0, 3, 0]),
        (["So", ".\n\n$", "5", "\n\n", "So"], [0, 3, 0, 3, 0]),
        (["So", ":\n`", "``", "x\n\ny\n", "```\n", "So"], [0, 0, 0, 0, 2, 0]),
        (["So", ":\n`", "x`", "\n", "So"], [0, 2, 0, 2, 0]),  # no fence
        (["So", ". \\[x\\]. So \\(", "y\\)"], [0, 0, 0]),
        (["So", ". \\(x\\)。 So", " it"], [0, 1, 0]),
    ],
)
def test_a_token_that_opens_a_formula_behind_a_boundary(tokens, scores):
    assert Segmenter([t.encode() for t in tokens], markers=()).scores(*one(range(len(tokens)))).tolist() == scores


def test_marker_inside_a_token_needs_white_space_before_it():
    segmenter = Segmenter([b"yes", b".", b" Wait", b".Wait", b" ", b"Wa", b"it", b" then", b"\n\n Wait"])

    def scores(*ids):
        return segmenter.scores(*one(ids)).tolist()

    assert scores(0, 1, 2, 7) == [0, 1.5, 0, 0]
    assert scores(0, 3, 7) == [0, 0, 0]
    assert scores(0, 1, 4, 5, 6, 7) == [0, 1.5, 0, 0, 0, 0]  # over three tokens, before the space
    assert scores(0, 8, 7) == [0, 3, 0]  # its token begins with the paragraph break, which ends after it


def test_markers_and_scores_are_configurable():
    text = b"a. Voila, b. So c"
    default, own = Segmenter(BYTES), Segmenter(BYTES, markers=("Voila",), boundary_scores={"marker": 5, "sentence": 0})
    assert found_cuts(default, text, range(1, len(text) + 1)) == {2: 1, 12: 1.5}
    assert found_cuts(own, text, range(1, len(text) + 1)) == {2: 5}


def test_invalid_utf8_inside_a_character():
    for text in (b"x.\xe4\xb8 Then. Yes", b"\xff\xfe. Yes\n\nEnd", "首".encode()[:2] + b"\n\nEnd", b"\x80\x80. A", b"\xe3\x80. So it"):
        ids, cu = one(text)
        segments = Segmenter(BYTES, min_tokens=1)(ids, cu)
        assert segments.token_offsets[-1] == len(text) and (segments.lengths > 0).all()
    assert found_cuts(Segmenter(BYTES), b"\xe4\xb8. Yes\n\nEnd", range(1, 13)) == {3: 1, 9: 3}


def test_opaque_ids_keep_the_state():
    segmenter = Segmenter([b"end.", b"\n", b" Next", b"<"], vocab_size=9)
    assert segmenter.scores(*one([0, 7, 1, 8, 1, 2])).tolist() == [0, 0, 0, 0, 3, 0]  # one paragraph break around an opaque token
    assert segmenter.scores(*one([0, 4, 2])).tolist() == [1, 0, 0]


def test_a_text_that_thinks_aloud_takes_its_steps_with_sentences():
    """Its scores rise by 2 from the sentence on, and a sentence that runs over a line break goes on."""
    text = b"Hmm, so it is. Wait, no. Let me see:\n\nx = 1, and\n\nso on. Yes\n\nEnd"
    lift = {"sentence": 3, "marker": 3.5, "paragraph": 5}
    assert found_cuts(Segmenter(BYTES), text, range(1, len(text) + 1)) == {
        14: lift["marker"], 24: lift["marker"], 38: 0.5, 50: 0.5, 56: lift["sentence"], 62: lift["paragraph"],
    }  # fmt: skip
    quiet = found_cuts(Segmenter(BYTES, aloud=()), text, range(1, len(text) + 1))
    assert quiet == {14: 1.5, 24: 1.5, 38: 3, 50: 3, 56: 1, 62: 3}
    # Not by a single word, nor by two in many sentences; words in formulas and code do not count, nor do parts of words.
    solution = "First this is done. " * 9
    assert Segmenter(BYTES).scores(*text_ids(solution + "Wait, no")).max() == 1.5
    assert Segmenter(BYTES).scores(*text_ids(solution * 10 + "Wait, no. Hmm.")).max() == 1.5
    assert Segmenter(BYTES).scores(*text_ids(solution * 3 + "Wait, no. Hmm.")).max() == 3.5
    assert Segmenter(BYTES).scores(*text_ids(solution + "$Wait, Hmm$ Waiter \\(let me\\)\n```\nOkay Okay\n")).max() == 2
    raised = Segmenter(BYTES, boundary_scores={"paragraph": 60, "think": 64, "marker": 0})
    assert found_cuts(raised, text, range(1, len(text) + 1)) == {14: 60, 24: 60, 38: 0.5, 50: 0.5, 56: 60, 62: 64}  # never above 64


def test_paragraphs_of_a_solution_and_sentences_of_a_monologue():
    sentence = "So we add two and three here. "
    solution, monologue = ("\n\n".join([sentence * 3 + word] * 4) for word in ("Then we go on.", "Hmm, let me see."))
    segmenter = Segmenter(BYTES)
    assert segmenter(*text_ids(solution)).num_segments == 4
    assert segmenter(*text_ids(monologue)).num_segments == 16


def test_where_not_all_can_be_taken_the_cuts_spread():
    """One stretch in four is longer: those boundaries are taken, not the last ones."""
    lengths = [10, 10, 30, 10] * 16
    scores = torch.zeros(sum(lengths))
    ends = torch.tensor(lengths).cumsum(0)
    scores[ends - 1] = 3.0
    segments = Segmenter([b"x"], min_tokens=8, max_tokens=256, max_segments=17)(*one([0] * sum(lengths)), scores=scores)
    assert segments.token_offsets.tolist() == [0, *ends[2::4].tolist(), sum(lengths)]
