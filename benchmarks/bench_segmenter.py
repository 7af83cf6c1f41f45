"""Speed of the segmenter beside what one would write in Python, on every dev trace of ../shared/data with Qwen2's tokenizer (at small shapes, and
where those are not: this repository's documents, a byte a token).

The Python ways get the same ids and the same markers and need not map their boundaries back to tokens nor choose among them, which the
segmenter does; so they are no other implementations of it: baselines, which the table sets in italics. Ours must give the same segments on one thread
and on two, and no segment or sequence outside its limits.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from acpo.policy import byte_tokenizer
from acpo_kernels import Segmenter, Segments
from acpo_kernels._token_bytes import token_bytes
from acpo_kernels.segmenter import ALOUD, MARKERS

from . import common

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data"
TRACES = ("traces_r1_math", "traces_r1llama8b_reasoning", "steps_rtseg", "steps_thought_anchors_web")
VOCAB, LONGEST = 151_936, 256
CPU = torch.device("cpu")


class Texts:
    """ids, packed, with their tokenizer."""

    def __init__(self, shapes: str):
        self.real = shapes != "small" and (DATA / "tokenizer_qwen2").is_dir()
        self.tokenizer = self.read() if self.real else byte_tokenizer().backend_tokenizer
        self.vocab = VOCAB if self.real else self.tokenizer.get_vocab_size()
        texts = []
        if self.real:
            for name in TRACES:
                with open(DATA / name / "dev.jsonl", encoding="utf-8") as file:
                    texts += [json.loads(line)["trace"] for line in file]
        else:
            texts = [path.read_text(encoding="utf-8")[:4000] for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))]
        encodings = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        self.ids = torch.tensor([i for e in encodings for i in e.ids])
        self.cu = torch.tensor([0, *(len(e.ids) for e in encodings)]).cumsum(0)

    @staticmethod
    def read():
        from tokenizers import Tokenizer

        return Tokenizer.from_file(str(DATA / "tokenizer_qwen2" / "tokenizer.json"))

    def segmenter(self, threads: int) -> Segmenter:
        return Segmenter.from_tokenizer(self.tokenizer, vocab_size=self.vocab, max_tokens=LONGEST, threads=threads)


def python_ways(texts: Texts) -> dict[str, Callable[[], object]]:
    """What the segmenter replaces, over the same sequences."""
    import regex

    words = "|".join(regex.escape(w) for w in sorted({*MARKERS, *ALOUD}, key=len, reverse=True))
    pattern = regex.compile(
        rf"\n\s*\n|\n|[.!?][\"')*]*\s+(?=[A-Z0-9\"'(\[\\$*_#`])|[\u3002\uff01\uff1f]|(?:{words})\b|</think>|\\boxed\{{|[Aa]nswer(?: is|:)"
    )
    text = [t.decode("utf-8", "replace") for t in token_bytes(texts.tokenizer)]
    table = [1.0 if pattern.search(t) else 0.0 for t in text] + [0.0] * (texts.vocab - len(text))
    sequences = [texts.ids[a:b].tolist() for a, b in zip(texts.cu[:-1].tolist(), texts.cu[1:].tolist(), strict=True)]
    decode = texts.tokenizer.decode_batch
    return {
        "decode + regex": lambda: [[m.end() for m in pattern.finditer(t)] for t in decode(sequences, skip_special_tokens=False)],
        "a table a token, in Python": lambda: [[table[i] for i in sequence] for sequence in sequences],
        "decode + str.split": lambda: [t.split("\n\n") for t in decode(sequences, skip_special_tokens=False)],
    }


def why_wrong(found: Segments, again: Segments, cu: Tensor) -> str:
    if not torch.equal(found.token_offsets, again.token_offsets) or not torch.equal(found.sequence_offsets, again.sequence_offsets):
        return "one thread cuts elsewhere than two"
    if not torch.equal(found.token_offsets[found.sequence_offsets], cu):
        return "segments do not fill their sequences"
    longest = int(found.lengths.max())
    return f"a segment of {longest} tokens, at most {LONGEST} allowed" if longest > LONGEST else ""


def measured(mode: str, shape: dict, calls: dict[str, Callable[[], object]], wrong: str, baselines: dict[str, str]) -> tuple[list[dict], list[float]]:
    assert not wrong, f"segmenter {mode}: ours is wrong, nothing was timed: {wrong}"
    timed = common.interleave(calls, CPU)
    rows = common.timed_rows({"op": "segmenter", "mode": mode, "shape": shape, "dtype": "int64", "device": "cpu", "threads": 2}, timed, baselines)
    return rows, timed[next(iter(calls))][0]


@pytest.fixture
def texts(device, shapes) -> Texts:
    if device.type != "cpu":
        pytest.skip("runs on the host")
    return Texts(shapes)


def test_segmenter(run, texts):
    one, two = texts.segmenter(1), texts.segmenter(2)
    ids, cu = texts.ids, texts.cu
    calls = {
        "ours, 2 threads": lambda: two(ids, cu), "ours, 1 thread": lambda: one(ids, cu), "ours, scores alone, 2 threads": lambda: two.scores(ids, cu),
        "ours, scores alone, 1 thread": lambda: one.scores(ids, cu), **python_ways(texts),
    }  # fmt: skip
    baselines = dict.fromkeys(list(calls)[4:], "finds candidates, chooses nothing")
    shape = {"B": len(cu) - 1, "N": len(ids)}
    run.record(*measured("scores and partition", shape, calls, why_wrong(two(ids, cu), one(ids, cu), cu), baselines))


def test_segmenter_batch(run, texts, shapes):
    """A step's rollouts with their entropy."""
    b, length = (512, 2048) if shapes != "small" else (4, 256)
    ids, cu = texts.ids.repeat(1 + b * length // len(texts.ids))[: b * length], torch.arange(b + 1) * length
    entropy = torch.rand(len(ids))
    one, two = texts.segmenter(1), texts.segmenter(2)
    calls = {"ours, 2 threads": lambda: two(ids, cu, entropy=entropy), "ours, 1 thread": lambda: one(ids, cu, entropy=entropy)}
    wrong = why_wrong(*(call() for call in calls.values()), cu)
    run.record(*measured("with entropy", {"B": b, "N": b * length}, calls, wrong, {}))


def test_segmenter_build(run, texts):
    """From a tokenizer in memory, beside reading that tokenizer from its file."""
    calls = {"ours": lambda: texts.segmenter(2)} | ({"reading tokenizer.json": texts.read} if texts.real else {})
    run.record(*measured("built from a tokenizer", {"V": texts.vocab}, calls, "", {"reading tokenizer.json": "by the tokenizers library"}))
