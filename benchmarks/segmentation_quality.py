"""How well the segmenter's boundaries agree with steps that people and models marked: python -m benchmarks.segmentation_quality

Needs ../shared/data. Boundaries are compared as character offsets of the text before which a segment begins, white space skipped; a boundary
matches one within `TOLERANCE` characters, each at most once. Default settings everywhere, Qwen2's tokenizer.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path

import torch

from acpo_kernels import Segmenter

DATA = Path(__file__).parents[2] / "shared" / "data"
TOLERANCE = 3  # a closing quotation mark or bold sign on either side


def rows(name: str) -> list[dict]:
    with open(DATA / name / "dev.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def skip_space(text: str, at: int) -> int:
    while at < len(text) and text[at].isspace():
        at += 1
    return at


def starts(text: str, pattern: str) -> set[int]:
    return {skip_space(text, m.end()) for m in re.finditer(pattern, text)} - {0, len(text)}


BASELINES: dict[str, Callable[[str], set[int]]] = {
    "paragraph breaks": lambda text: starts(text, r"\n\s*\n"),
    "newlines": lambda text: starts(text, r"\n+"),
    "sentence splitter": lambda text: starts(text, r"[.!?][\"')*]*\s+(?=[A-Z0-9])|\n+"),
    "every 256 characters": lambda text: set(range(256, len(text), 256)),
}


def matches(found: set[int], wanted: set[int]) -> int:
    free, count = sorted(wanted), 0
    for at in sorted(found):
        near = [w for w in free if abs(w - at) <= TOLERANCE]
        if near:
            free.remove(min(near, key=lambda w: abs(w - at)))
            count += 1
    return count


def score(pairs: Iterable[tuple[set[int], set[int]]]) -> str:
    pairs = list(pairs)
    hit, found, wanted = (sum(column) for column in zip(*((matches(f, w), len(f), len(w)) for f, w in pairs), strict=True))
    return f"precision {hit / found:.3f}  recall {hit / wanted:.3f}  F1 {2 * hit / (found + wanted):.3f}"


def window_diff(found: set[int], wanted: set[int], length: int) -> float:
    """Share of windows of half a mean segment in which the two numbers of boundaries differ (Pevzner and Hearst, 2002)."""
    size = max(1, length // (2 * (len(wanted) + 1)))
    edges = sorted({0, length - size, *(e for b in found | wanted for e in (b - size, b) if 0 < e < length - size)})

    def inside(bounds: set[int], at: int) -> int:
        return sum(at < b <= at + size for b in bounds)

    return sum(b - a for a, b in pairwise(edges) if inside(found, a) != inside(wanted, a)) / max(1, length - size)


def main() -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(DATA / "tokenizer_qwen2" / "tokenizer.json"))
    segmenter = Segmenter.from_tokenizer(tokenizer, vocab_size=151_936)

    def segment(texts: list[str]) -> tuple[list[set[int]], Counter, torch.Tensor]:
        encodings = tokenizer.encode_batch(texts, add_special_tokens=False)
        ids = torch.tensor([i for e in encodings for i in e.ids])
        cu = torch.tensor([0, *(len(e.ids) for e in encodings)]).cumsum(0)
        segments = segmenter(ids, cu)
        out = []
        for b, encoding in enumerate(encodings):
            first, last = segments.sequence_offsets[b : b + 2].tolist()
            inner = (segments.token_offsets[first + 1 : last] - cu[b]).tolist()
            out.append({skip_space(texts[b], encoding.offsets[t][0]) for t in inner})
        return out, Counter(segmenter.explain(ids, cu)), segments.lengths

    def table(title: str, texts: list[str], wanted: list[set[int]]) -> list[set[int]]:
        found, rules, _ = segment(texts)
        print(f"\n{title}: {len(texts)} texts, {sum(map(len, wanted))} boundaries")
        print(f"  {'segmenter':22s}{score(zip(found, wanted, strict=True))}   {dict(rules.most_common())}")
        for name, baseline in BASELINES.items():
            print(f"  {name:22s}{score((baseline(t), w) for t, w in zip(texts, wanted, strict=True))}")
        return found

    data = rows("steps_processbench")
    table("steps_processbench", ["\n\n".join(r["steps"]) for r in data], [starts("\n\n".join(r["steps"]), r"\n\n") for r in data])
    data = rows("steps_rtseg")
    texts = [r["trace"] for r in data]
    people = [[{skip_space(r["trace"], s["start"]) for s in r["annotations"][k]["segments"]} - {0, len(r["trace"])} for r in data] for k in (0, 1)]
    for k in (0, 1):
        found = table(f"steps_rtseg, annotator {k + 1}", texts, people[k])
        print(f"  {'the other annotator':22s}{score(zip(people[1 - k], people[k], strict=True))}")
        for name, bounds in (("segmenter", found), ("the other annotator", people[1 - k])):
            mean = sum(window_diff(b, w, len(t)) for b, w, t in zip(bounds, people[k], texts, strict=True)) / len(texts)
            print(f"  WindowDiff, {name}: {mean:.3f}")
    data = rows("steps_thought_anchors_web")
    chunks = [{skip_space(r["trace"], c["start"]) for c in r["chunks"] if c["start"]} - {0} for r in data]
    table("steps_thought_anchors_web (sentence chunks)", [r["trace"] for r in data], chunks)

    texts = [r["trace"] for r in rows("traces_r1llama8b_reasoning")]
    _, rules, lengths = segment(texts)
    levels = torch.tensor([0.01, 0.1, 0.5, 0.9, 0.99])
    print(f"\ntraces_r1llama8b_reasoning: {lengths.numel() / len(texts):.1f} segments a trace, tokens at the 1, 10, 50, 90, 99 % points")
    print(f"  {lengths.float().quantile(levels).tolist()}   {dict(rules.most_common())}")


if __name__ == "__main__":
    main()
