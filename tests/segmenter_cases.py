"""Texts for the tests of the segmenter, byte by byte (id = byte), the cuts marked in them, and the levels and the price of its rules."""

# ruff: noqa: RUF001 - Chinese texts are what they say

from itertools import pairwise

import torch
from hypothesis import strategies as st

from acpo_kernels import Segmenter, Segments

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


# ---- the partition: what brute force and the textbook's programme are given


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
    "J. R. R. Tolkien\n‹l›J. R. R. Tolkien wrote it.‹s› He did",  # R begins no pattern: a token that is only skipped
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
    "Text\n‹l›```x = 1```\n‹l›One.‹s› Two\n\n‹p›Three",  # a backtick behind the opening: no fence
    "Text\n‹l›```py x``` is `x`.‹s› Two\n\n‹p›Three",
    "Text\n‹l›````py\nx = 1.\n\nY = 2\n````\n‹l›One.‹s› Two\n‹l›End",
    "Text\n‹l›````md\nOne.\n```\nx. Y\n```\nTwo. Three\n`````\n‹l›One.‹s› Two\n‹l›End",  # a shorter run closes nothing, a longer one does
    "Text\n‹l›```\nOne.\n`` \nTwo. Three\n````\n‹l›One.‹s› Two\n‹l›```\nx. Y\n```\n‹l›End",  # and the next fence has its own
    "Text\n‹t›1. ```py\nx = 1.\n\nY = 2\n```\n‹l›One.‹s› Two",
    "Text\n‹t›-   ```py\n    x = 1.\n\n    Y = 2\n    ```\n‹t›* ```\na.\n\nB\n```\n‹l›One.‹s› Two",
    "Text\n‹t›- `x`.‹s› One\n‹t›2) ```x.```.‹s› Two\n‹t›- x ```\n\n‹p›Three",
    "Text\n‹l›> ```py\n> x = 1.\n>\n> Y = 2\n> ```\n‹l›One.‹s› Two",
    "Text\n‹l›> ```py\n> x = 1.\n> Y = 2\n\n‹p›One.‹s› Two\n‹l›End",  # the quote ends, and with it the fence
    "> ```\n> a.\n‹l›One.‹s› Two\n‹l›```\nx. Y\n\nZ\n```\n‹l›> One.‹s› Two\n‹l›```\nx.\n> Y. Z\n```\n‹l›End",
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


FRAGMENTS = (
    *("a", "b c", " Bc", " D", ".", ". ", "!", "?", ",", ": ", "\n", "\n\n", " ", "\t", "1", "3.1", '"', ")", "J", "- ", "*", "**", "# ", "<"),
    *("$", "$$", "\\(", "\\)", "\\[", "\\]", "\\", "```", "`", "<think>", "</think>", "e.g.", "Dr.", "Step 1", "answer is", "\\boxed{"),
    *("。", "，", "中", "é", "“", "”", "•", "第一步", "J. R. R.", "1. ```"),
)
fragments = st.sampled_from(FRAGMENTS)
