"""How well the segmenter's boundaries agree with steps that people and models marked: python -m benchmarks.segmentation_quality

Needs ../shared/data. Boundaries are compared as character offsets of the text before which a segment begins, white space skipped; a boundary
matches one within `TOLERANCE` characters, each at most once. Default settings and Qwen2's tokenizer where nothing else is said.

Protocol: the rules and their constants were chosen on the first, third, fifth ... row of each set with marked steps (tuning half); the others
(held-out half) were only ever measured. The two halves are printed apart.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from acpo_kernels import Segmenter, Segments

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
    "every 100 characters": lambda text: set(range(100, len(text), 100)),
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


def agreement(found: Iterable[set[int]], wanted: Iterable[set[int]]) -> tuple[float, float, float]:
    """Precision, recall and F1 over all boundaries of all texts."""
    counts = [(matches(f, w), len(f), len(w)) for f, w in zip(found, wanted, strict=True)]
    hit, found_, wanted_ = (sum(column) for column in zip(*counts, strict=True))
    return hit / max(found_, 1), hit / max(wanted_, 1), 2 * hit / max(found_ + wanted_, 1)


def window_diff(found: set[int], wanted: set[int], length: int) -> float:
    """Share of windows of half a mean segment in which the two numbers of boundaries differ (Pevzner and Hearst, 2002)."""
    size = max(1, length // (2 * (len(wanted) + 1)))
    edges = sorted({0, length - size, *(e for b in found | wanted for e in (b - size, b) if 0 < e < length - size)})

    def inside(bounds: set[int], at: int) -> int:
        return sum(at < b <= at + size for b in bounds)

    return sum(b - a for a, b in pairwise(edges) if inside(found, a) != inside(wanted, a)) / max(1, length - size)


class Cutter:
    """A segmenter with its tokenizer, from texts to boundaries in characters."""

    def __init__(self, tokenizer, **settings):
        self.tokenizer = tokenizer
        self.segmenter = Segmenter.from_tokenizer(tokenizer, **settings)

    def encode(self, texts: list[str]) -> tuple[list, Tensor, Tensor]:
        encodings = self.tokenizer.encode_batch(texts, add_special_tokens=False)
        return encodings, torch.tensor([i for e in encodings for i in e.ids]), torch.tensor([0, *(len(e.ids) for e in encodings)]).cumsum(0)

    def __call__(self, texts: list[str]) -> list[set[int]]:
        encodings, ids, cu = self.encode(texts)
        segments = self.segmenter(ids, cu)
        out = []
        for b, (text, encoding) in enumerate(zip(texts, encodings, strict=True)):
            first, last = segments.sequence_offsets[b : b + 2].tolist()
            inner = (segments.token_offsets[first + 1 : last] - cu[b]).tolist()
            out.append({skip_space(text, encoding.offsets[t][0]) for t in inner})
        return out


def bigram_entropy(ids: Tensor, cu: Tensor) -> Tensor:
    """Entropy of the next token given the one before it, from the counts of the same texts, [N]: a stand-in for a policy's."""
    inside = torch.ones(ids.numel(), dtype=torch.bool)
    inside[cu[:-1][cu.diff() > 0]] = False  # a sequence's first token follows nothing
    before, after = ids[:-1][inside[1:]], ids[1:][inside[1:]]
    pairs, count = torch.stack([before, after]).unique(dim=1, return_counts=True)
    size = int(ids.max()) + 1
    total = torch.zeros(size, dtype=torch.float64).index_add(0, pairs[0], count.double())
    weighted = torch.zeros(size, dtype=torch.float64).index_add(0, pairs[0], count * count.double().log())
    entropy = torch.where(total > 0, total.log() - weighted / total, 0.0)
    return torch.where(inside, entropy[ids.roll(1)], 0.0).float()


def table(title: str, rows_: dict[str, list[set[int]]], wanted: dict[str, list[set[int]]], texts: list[str], windows: bool = False) -> None:
    print(f"\n{title}: {len(texts)} texts, " + ", ".join(f"{sum(map(len, w))} boundaries{' of ' + n if n else ''}" for n, w in wanted.items()))
    for name, found in rows_.items():
        line = f"  {name:34s}"
        for who, gold in wanted.items():
            if name == who:
                line += " " * 46
                continue
            precision, recall, f1 = agreement(found, gold)
            line += f"precision {precision:.3f} recall {recall:.3f} F1 {f1:.3f}"
            if windows:
                line += f" WindowDiff {sum(window_diff(f, w, len(t)) for f, w, t in zip(found, gold, texts, strict=True)) / len(texts):.3f}"
            line += "   "
        print(line)


def long_steps(cutter: Cutter, texts: list[str], found: list[set[int]], wanted: list[set[int]]) -> float:
    """Recall among the ends of steps longer than min_tokens tokens."""
    hit = total = 0
    for text, f, w in zip(texts, found, wanted, strict=True):
        edges = sorted({0, *w})
        sizes = [len(e.ids) for e in cutter.tokenizer.encode_batch([text[a:b] for a, b in pairwise(edges)], add_special_tokens=False)]
        long = {b for (_, b), n in zip(pairwise(edges), sizes, strict=True) if n > cutter.segmenter.min_tokens}
        total, hit = total + len(long), hit + matches(f, long)
    return hit / total


def main() -> None:
    from tokenizers import Tokenizer

    qwen2 = Tokenizer.from_file(str(DATA / "tokenizer_qwen2" / "tokenizer.json"))
    cut, unlimited = Cutter(qwen2, vocab_size=151_936), Cutter(qwen2, vocab_size=151_936, max_segments=4096)

    def ways(texts: list[str]) -> dict[str, list[set[int]]]:
        ours = {"segmenter": cut(texts), "segmenter, max_segments=4096": unlimited(texts)}
        return ours | {name: [baseline(t) for t in texts] for name, baseline in BASELINES.items()}

    for half, part in (("tuning half", slice(0, None, 2)), ("held-out half", slice(1, None, 2))):
        data = rows("steps_processbench")[part]
        texts = ["\n\n".join(r["steps"]) for r in data]
        wanted = [starts(t, r"\n\n") for t in texts]
        found = ways(texts)
        table(f"steps_processbench, {half}", found, {"": wanted}, texts)
        print(f"  recall of the segmenter among ends of steps longer than min_tokens: {long_steps(cut, texts, found['segmenter'], wanted):.3f}")
        data = rows("steps_rtseg")[part]
        texts = [r["trace"] for r in data]
        people = {
            f"annotator {k}": [
                {skip_space(r["trace"], s["start"]) for a in r["annotations"] if a["annotator"] == k for s in a["segments"]} - {0, len(r["trace"])}
                for r in data
            ]
            for k in (1, 8)
        }
        table(f"steps_rtseg, {half}", ways(texts) | people, people, texts, windows=True)
        data = rows("steps_thought_anchors_web")[part]
        texts = [r["trace"] for r in data]
        chunks = [{skip_space(r["trace"], c["start"]) for c in r["chunks"] if c["start"]} - {0} for r in data]
        table(f"steps_thought_anchors_web (sentence chunks), {half}", ways(texts), {"": chunks}, texts)

    levels = torch.tensor([0.01, 0.1, 0.5, 0.9, 0.99])
    print("\nSegments at the default settings; entropy is that of a bigram model of the same texts, for want of a policy")
    for name, field in (
        ("steps_processbench", None),
        ("scored_qwen_cot100", "solution"),
        ("traces_r1_math", "trace"),
        ("traces_r1llama8b_reasoning", "trace"),
    ):
        texts = [r[field] if field else "\n\n".join(r["steps"]) for r in rows(name)]
        _, ids, cu = cut.encode(texts)
        for what, arguments in (("text alone", {}), ("with entropy", {"entropy": bigram_entropy(ids, cu)})):
            segments: Segments = cut.segmenter(ids, cu, **arguments)
            rules = Counter(cut.segmenter.explain(ids, cu, **arguments))
            inner = segments.num_segments - rules["end"]
            quantiles = [int(x) for x in segments.lengths[:1_000_000].float().quantile(levels)]
            print(f"  {name}, {what}: {segments.num_segments / len(texts):.1f} segments a text; tokens at 1, 10, 50, 90, 99 %: {quantiles}")
            print("    cut by " + ", ".join(f"{rule} {n / inner:.3f}" for rule, n in rules.most_common() if rule != "end"))

    texts = [r["trace"] for r in rows("traces_r1llama8b_reasoning")[::4]]
    gpt2 = Cutter(Tokenizer.from_file(str(DATA / "tokenizer_gpt2" / "tokenizer.json")))
    print(f"\nThe same {len(texts)} traces tokenized by Qwen2 and by GPT-2: F1 {agreement(cut(texts), gpt2(texts))[2]:.3f} between their boundaries")
    texts = ["\n\n".join(r["steps"]) for r in rows("steps_processbench")[::4]]
    print(f"{len(texts)} solutions of ProcessBench likewise: F1 {agreement(cut(texts), gpt2(texts))[2]:.3f}")


if __name__ == "__main__":
    main()
