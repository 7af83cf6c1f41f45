"""The segmenter: its partition against brute force, its rules against a table, its answer span, its independence, its memory.

Texts are given to it byte by byte (id = byte); tokenizers and bad input are in test_segmenter_input.py, real data in test_segmenter_data.py.
"""

# ruff: noqa: RUF001 - Chinese texts are what they say

import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from acpo_kernels import Segmenter, Segments
from acpo_kernels.segmenter import BOUNDARY_SCORES

BYTES = [bytes([b]) for b in range(256)]
MARKS = {"d": "lead", "s": "sentence", "m": "marker", "l": "line", "t": "step", "p": "paragraph", "k": "think"}
UNIT = 2**20


def one(ids) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.as_tensor(list(ids), dtype=torch.int64)
    return ids, torch.tensor([0, ids.numel()])


def text_ids(text: str) -> tuple[torch.Tensor, torch.Tensor]:
    return one(text.encode())


def pieces(segments: Segments, text: bytes) -> list[str]:
    return [text[a:b].decode() for a, b in pairwise(segments.token_offsets.tolist())]


# ---- the partition, against brute force over everything the docstring says


def price(levels: list[int], count: int, target: int) -> int:
    if not levels:
        return UNIT
    levels, paragraph = sorted(levels, reverse=True), int(3 * UNIT)
    level = paragraph
    if sum(x >= paragraph for x in levels) < max(1, count // (4 * target)):
        level = min(paragraph, levels[min(max(1, count // (2 * target)), len(levels)) - 1])
    return (level + max((x for x in levels if x < level), default=0)) // 2


def forks(entropy: list[float], threshold: float | None, near: int, reasoning: int) -> list[int]:
    if threshold is None:
        threshold = float(torch.quantile(torch.tensor(entropy, dtype=torch.float64), 0.9))
    hot = [t for t in range(1, reasoning) if entropy[t] > 0 and entropy[t] >= threshold]
    return [t - 1 for t in hot if not any(abs(u - t) < near and u != t and (entropy[u], u) > (entropy[t], t) for u in hot)]


def with_stretches(score: list[int]) -> list[int]:
    """A boundary counts 1/1024 more a token of the stretch that it closes, of at most 112."""
    out, last = list(score), -1
    for t, x in enumerate(score):
        if x > 0:
            out[t], last = x + min(t - last, 112) * UNIT // 1024, t
    return out


def brute_force(scores, limits, *, entropy=None, threshold=None, answer=-1) -> tuple[list[int], bool]:
    """Ends of the best partition among all 2^(T-1), and whether it has a terminal segment."""
    low, high, most, target = limits
    total = len(scores)
    if total == 0:
        return [], False
    score = [int(x * UNIT) for x in scores]
    if answer > 0 and most == 1:
        answer = -1
    count = total if answer < 0 else answer
    if answer >= 0:
        most -= 1
    split = forks(entropy, threshold, low, count) if entropy else []
    levels = [x for x in score[: count - 1] if x > 0] + [int(0.75 * UNIT) for t in split if score[t] == 0]
    lam = price(levels, count, target)
    score = with_stretches(score)
    for t in split:
        score[t] += int(0.75 * UNIT)
    low = min(low, count)
    while True:
        best = None
        for inner in range(1 << max(count - 1, 0)):
            ends = [t + 1 for t in range(count - 1) if inner >> t & 1] + [count]
            lengths = [b - a for a, b in pairwise([0, *ends])]
            if count and len(ends) <= most and all(low <= n <= high for n in lengths):
                key = (sum(score[e - 1] - lam for e in ends[:-1]), ends[-2::-1])  # ties: the later last end, then the one before
                best = max(best or key, key)
        if best is not None or count == 0:
            break
        high += 1
    ends = [*reversed(best[1]), count] if count else []
    return (ends if answer < 0 else [*ends, total]), answer >= 0


values = st.one_of(st.sampled_from([0.0, 0.0, 0.0, 1.0, 1.5, 2.0, 2.25, 3.0, 8.0]), st.integers(0, 5 * UNIT).map(lambda i: i / UNIT))
limits_ = st.tuples(st.integers(1, 5), st.integers(0, 6), st.integers(1, 6), st.sampled_from([1, 2, 3, 64])).map(
    lambda x: (x[0], x[0] + x[1], x[2], x[3])
)


@pytest.mark.parametrize("most", [2, 3, 4])
@pytest.mark.parametrize("scores", [[8.0] * 11, [3.0, 8.0] * 5, [8.0, 0.0, 8.0] * 3], ids=["equal", "alternating", "gaps"])
def test_partition_of_equal_scores_under_the_count(scores, most):
    """Every cut more is worth the same: at the price that leaves `most` segments, ways with fewer are as good, and the count decides."""
    for low in (1, 2, 3):
        for high in range(max(low, -(-len(scores) // most)), len(scores) + 1):
            segmenter = Segmenter(BYTES, min_tokens=low, max_tokens=high, max_segments=most, target_tokens=1)
            cut = segmenter(*one([97] * len(scores)), scores=torch.tensor(scores))
            assert cut.token_offsets.tolist()[1:] == brute_force(scores, (low, high, most, 1))[0], (low, high)


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_partition_equals_brute_force(data):
    count = data.draw(st.integers(0, 11))
    scores = data.draw(st.lists(values, min_size=count, max_size=count))
    limits = data.draw(limits_)
    entropy = data.draw(st.none() | st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0]), min_size=count, max_size=count))
    threshold = data.draw(st.none() | st.sampled_from([0.25, 1.0])) if entropy is not None else None
    answer = data.draw(st.integers(-1, count - 1)) if count else -1
    segmenter = Segmenter(
        [b""], min_tokens=limits[0], max_tokens=limits[1], max_segments=limits[2], target_tokens=limits[3], threads=1
    )  # opaque ids: no answer to detect
    ids, cu = one([0] * count)
    got = segmenter(
        ids, cu, scores=torch.tensor(scores, dtype=torch.float64), entropy=None if entropy is None else torch.tensor(entropy),
        entropy_threshold=threshold, answer_start=torch.tensor([answer]),
    )  # fmt: skip
    ends, terminal = brute_force(scores, limits, entropy=entropy, threshold=threshold, answer=answer)
    assert got.token_offsets.tolist() == [0, *ends] and got.terminal.tolist() == [terminal]


def quadratic(score: list[int], low: int, high: int, most: int, lam: int) -> list[int]:
    """The count-limited optimum by the textbook programme in O(T K n_max): best[k][e] with at most k segments."""
    count = len(score)
    best = [[0] + [None] * count]
    for _ in range(most):
        row = [0] + [None] * count
        for e in range(1, count + 1):
            starts = [best[-1][b] for b in range(max(0, e - high), e - low + 1) if best[-1][b] is not None]
            row[e] = max(starts) + (score[e - 1] - lam if e < count else 0) if starts else None
        best.append(row)
    ends, e = [], count
    for k in range(most, 0, -1):
        ends.append(e)
        gain = score[e - 1] - lam if e < count else 0
        e = max(b for b in range(max(0, e - high), e - low + 1) if best[k - 1][b] is not None and best[k - 1][b] + gain == best[k][e])
        if e == 0:
            return ends[::-1]
    raise AssertionError("no partition")


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.integers(3, 20), st.integers(2, 14), st.sampled_from([0.25, 1 / UNIT]))
def test_count_limited_partition_of_longer_sequences(seed, low, high, most, step):
    generator = torch.Generator().manual_seed(seed)
    count = int(torch.randint(1, most * high + 1, (), generator=generator))
    count = max(count, low)
    steps = torch.randint(0, int(4 / step), (count,), generator=generator) * (torch.rand(count, generator=generator) < 0.6)
    scores = steps.double() * step
    high = max(high, 2 * low - 1)
    segmenter = Segmenter([b""], min_tokens=low, max_tokens=high, max_segments=most, target_tokens=4)
    ids, cu = one([0] * count)
    got = segmenter(ids, cu, scores=scores).token_offsets.tolist()
    fixed = [int(x * UNIT) for x in scores.tolist()]
    high = max(high, -(-count // min(most, count // low)))
    expected = quadratic(with_stretches(fixed), low, high, most, price([x for x in fixed[:-1] if x > 0], count, 4))
    assert got == [0, *expected]


def test_lengths_alone_cut_a_text_without_boundaries():
    segmenter = Segmenter([b"x"], min_tokens=8, max_tokens=256, max_segments=3)
    assert segmenter(*one([0] * 600)).token_offsets.tolist() == [0, 256, 512, 600]
    # T > K_max n_max: n_max becomes ceil(T / K_max).
    assert segmenter(*one([0] * 1000)).token_offsets.tolist() == [0, 334, 668, 1000]
    assert segmenter(*one([0] * 5)).token_offsets.tolist() == [0, 5]


# ---- the rules of text


RULES = [
    "One step.\n\n‹p›Another",
    "A line\n‹l›another",
    "Three breaks\n\n\n‹p›end",
    "Spaces between \n \t\n‹p›end",
    "Windows\r\n\r\n‹p›end",
    "It ends here.‹s› It goes on",
    "Really?!‹s› Yes",
    'He said "no."‹s› She left',
    "So it is **bold.**‹s› Some thing",
    "pi is 3.14 or 3.1415. and v1.2.3 too",
    "see e.g. Euler, cf. Gauss, vs. Dr. Smith and Fig. 3 there",
    "J. S. Bach\n‹l›J. S. Bach wrote it.‹s› He did",
    "we have 5! = 120 and n! (n+1)",
    "file.txt and a.b",
    "1. Foo.‹s› Bar\n‹t›2. Baz\n‹t›10) Qux",
    "List:\n‹t›- one\n‹t›* two\n‹t›• three\n‹l›-4 is a number",
    "Intro\n‹t›Step 1: add\n‹t›**Step 2**: go\n‹t›## Title",
    "two ways.‹m› Wait, one",
    "it is x,‹m› But then",
    "the Now magazine and some Butter. lower",
    "First-order terms",
    "line\n‹l›However, no",
    "a\n\n‹p›Therefore, yes",
    "Inline \\(a. B\\) is fine.‹s› Yes",
    "Inline $a. B$ is fine.‹s› Yes",
    "Display \\[ a. B\n c\\]\n‹l›Yes",
    "Display $$ a. B\nc $$\n‹l›Yes",
    "Formula \\(x = 5.\\)‹s› It",
    "Formula $x = 5.$‹s› It",
    "He pays $5.‹s› She pays $6.‹s› They pay",
    "He pays $5 and $10.‹s› Fine\n‹l›Good",
    "It costs \\$5.‹s› Good",
    "Escaped \\\\(a.‹s› B\\\\)",
    "Unclosed \\[ a. B\n\n‹p›So.‹s› It ends",
    "We get:\n\n‹d›\\[\n\nx = 1.\n\nY = 2\n\n\\]\n\n‹p›So.‹s› It ends",  # a formula with blank lines, and before it no paragraph's end
    "We get\n‹d›$$x. Y$$\n‹l›So",
    "We get\n‹l›$x. Y$\n‹l›\\(x\\)\n‹l›\\x",
    "Unclosed \\[ a.\n\n‹p›So.‹s› It has \\( b. C \\) in\n\n‹p›it",
    "Unclosed \\[ a.\n\n‹p›So.‹s› It\n\n‹d›\\[ b.\n\n c \\]\n\n‹p›End",
    "Text\n‹l›```\nx = 1.\n\nY = 2\n```\n‹l›End",
    "Inside ``` nothing.‹s› Opens",
    "<think>\nOkay.‹s› Yes\n‹l›</think>‹k›\n\nThe end",
    "<think>\n\nWait, no",
    "首先计算。‹m›因此得到三。‹s›它等于五！‹s›对",
    "他说“好。”‹s›她走了，‹m›但是没有",
    "苹果等等都有\n‹t›第一步：加",
    "mixed 3.5。‹s›Then",
]


def expected_cuts(marked: str) -> tuple[str, dict[int, str]]:
    """The text without its marks, and the byte position of each mark. A mark at a line break stands after all of it."""
    text, cuts = "", {}
    for part in marked.split("‹"):
        code, _, rest = part.rpartition("›")
        if code:
            cuts[len(text.encode())] = MARKS[code]
        text += rest
    return text, cuts


def found_cuts(segmenter: Segmenter, ids, ends) -> dict[int, float]:
    scores = segmenter.scores(*one(ids)).tolist()
    return {end: score for end, score in zip(ends, scores, strict=True) if score > 0}


@pytest.mark.parametrize("marked", RULES)
def test_rule_table(marked):
    text, cuts = expected_cuts(marked)
    data = text.encode()
    # A newline run's boundary is after its last newline, a tag's before the white space that follows it.
    assert found_cuts(Segmenter(BYTES), data, range(1, len(data) + 1)) == {at: BOUNDARY_SCORES[rule] for at, rule in cuts.items()}


FRAGMENTS = (
    *("a", "b c", " Bc", " D", ".", ". ", "!", "?", ",", ": ", "\n", "\n\n", " ", "\t", "1", "3.1", '"', ")", "J", "- ", "*", "**", "# ", "<"),
    *("$", "$$", "\\(", "\\)", "\\[", "\\]", "\\", "```", "`", "<think>", "</think>", "e.g.", "Dr.", "Step 1", "answer is", "\\boxed{"),
    *("。", "，", "中", "é", "“", "”", "•", "第一步"),
)
fragments = st.sampled_from(FRAGMENTS)


@settings(max_examples=400, deadline=None)
@given(st.lists(fragments, max_size=30), st.data())
def test_tokens_do_not_change_where_delimiters_are(parts, data):
    """Whatever the tokens are (also inside a character), a boundary is after the token in which its delimiter ends."""
    text = "".join(parts).encode()
    borders = sorted(data.draw(st.sets(st.integers(1, max(1, len(text) - 1)))) | {len(text)}) if text else []
    chunks = [text[a:b] for a, b in pairwise([0, *borders])]
    by_byte = Segmenter(BYTES, markers=()).scores(*one(text)).tolist()
    expected = [max(by_byte[a:b]) for a, b in pairwise([0, *borders])]
    assert Segmenter(chunks or [b""], markers=()).scores(*one(range(len(chunks)))).tolist() == expected


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


# ---- independence and size


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(fragments, max_size=20), min_size=1, max_size=8), st.randoms(use_true_random=False))
def test_a_sequence_is_cut_alone(parts, random):
    texts = ["".join(p).encode() for p in parts]
    random.shuffle(texts)
    ids = torch.tensor([b for t in texts for b in t], dtype=torch.int32)
    cu = torch.tensor([0, *(len(t) for t in texts)]).cumsum(0)
    entropy = torch.rand(ids.numel(), generator=torch.Generator().manual_seed(random.randrange(2**31)))
    arguments = {"min_tokens": 3, "max_tokens": 20, "max_segments": 4, "target_tokens": 8}
    batch = Segmenter(BYTES, threads=1, **arguments)(ids, cu, entropy=entropy)
    threaded = Segmenter(BYTES, threads=3, **arguments)(ids, cu, entropy=entropy)
    for name in ("token_offsets", "sequence_offsets", "terminal"):
        assert torch.equal(getattr(batch, name), getattr(threaded, name))
    alone = Segmenter(BYTES, **arguments)
    for b, (begin, end) in enumerate(pairwise(cu.tolist())):
        single = alone(ids[begin:end].long(), torch.tensor([0, end - begin]), entropy=entropy[begin:end])
        first, last = batch.sequence_offsets[b : b + 2].tolist()
        assert (batch.token_offsets[first : last + 1] - begin).tolist() == (single.token_offsets.tolist() if end > begin else [0])
        assert batch.terminal[b] == single.terminal[0]


def test_a_million_tokens_and_ten_thousand_empty_sequences():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(32, 127, (1_000_000,), generator=generator)
    ids[torch.randint(0, 1_000_000, (30_000,), generator=generator)] = 10
    segmenter = Segmenter(BYTES)
    segments = segmenter(ids, torch.tensor([0, 1_000_000]))
    assert segments.num_segments <= 64 and segments.token_offsets[-1] == 1_000_000
    assert segments.lengths.max() <= -(-1_000_000 // 63) and segments.lengths.min() >= 8
    many = Segmenter(BYTES, max_segments=10**6)(ids, torch.tensor([0, 1_000_000]))
    assert many.num_segments > 10_000 and many.lengths.max() <= 256 and many.lengths[:-1].min() >= 8
    empty = segmenter(ids[:0], torch.zeros(10_001, dtype=torch.int64))
    assert (empty.num_segments, empty.num_sequences, empty.num_tokens) == (0, 10_000, 0) and not empty.terminal.any()
    assert segmenter.scores(ids[:0], torch.zeros(1, dtype=torch.int32)).shape == (0,)
    assert segmenter(ids[:0], torch.zeros(1, dtype=torch.int64)).num_sequences == 0


def test_strided_ids_and_low_precision_entropy():
    ids, cu = text_ids("One two three. Four five six. Seven eight nine. " * 3)
    segmenter = Segmenter(BYTES, target_tokens=8)
    entropy = torch.rand(ids.numel(), generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    expected = segmenter(ids, cu, entropy=entropy.float()).token_offsets
    wide = torch.stack([ids, -ids], 1)[:, 0]
    assert not wide.is_contiguous() and torch.equal(segmenter(wide, cu.int(), entropy=entropy).token_offsets, expected)


# ---- memory

MEMORY = """
import torch
from acpo_kernels import Segmenter

def status(name):
    line = next(line for line in open("/proc/self/status") if line.startswith(name))
    return int(line.split()[1]) * 1024

tokens = [b"word%06d" % i for i in range(150_000)]  # 10 bytes; those of Qwen2 have 6.4 on average
keep = [Segmenter(tokens)]
before = status("VmRSS")
keep += [Segmenter(tokens) for _ in range(8)]
at_rest = (status("VmRSS") - before) / 8 / len(tokens)

segmenter = Segmenter([b" x", b".", b" Then", b" Hmm", b"\\n\\n"], threads=1)
count = 2_000_000
ids = torch.multinomial(torch.tensor([8.0, 2, 2, 0.1, 0.1]), count, replacement=True).int()
entropy, cu = torch.rand(count), torch.tensor([0, count])
segmenter(ids[:1000], torch.tensor([0, 1000]), entropy=entropy[:1000])
open("/proc/self/clear_refs", "w").write("5")  # the peak from here on
before = status("VmRSS")
segments = segmenter(ids, cu, entropy=entropy)
running = (status("VmHWM") - before) / count
assert segments.num_segments == 64
print(at_rest, running)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux counts the pages")
def test_memory():
    """Under 64 bytes a vocabulary entry at rest and 32 a token while running (the worst case: one sequence, entropy, a limited count)."""
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    at_rest, running = map(float, done.stdout.split())
    assert 18 < at_rest < 64 and 20 < running < 32, (at_rest, running)
