"""Speed of the segmenter beside what one would write in Python, on every dev trace of ../shared/data with Qwen2's tokenizer (at small shapes, and
where those are not: this repository's documents, a byte a token).

The Python ways get the same ids and the same markers and need not map their boundaries back to tokens nor choose among them, which the
segmenter does; so they are no other implementations of it: baselines, which the table sets in italics. Ours must give the same segments on one thread
and on two, no segment or sequence outside its limits, and in a sample of sequences the boundaries of the textbook programme (`Judge`).
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from acpo.policy import byte_tokenizer
from acpo_kernels import Segmenter, Segments
from acpo_kernels._token_bytes import token_bytes
from acpo_kernels.segmenter import ALOUD, BOUNDARY_SCORES, MARKERS

from . import common
from .common import Provider, from_tests

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data"
TRACES = ("traces_r1_math", "traces_r1llama8b_reasoning", "steps_rtseg", "steps_thought_anchors_web")
VOCAB, LONGEST, SEQUENCES = 151_936, 256, 8
LIMITS = {name: inspect.signature(Segmenter.from_tokenizer).parameters[name].default for name in ("min_tokens", "max_segments", "target_tokens")}
NONE = -(1 << 60)
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


def textbook_cuts(scores: list[float], answer: int, entropy: list[float] | None) -> list[int]:
    """Ends of one sequence's best partition by the textbook programme: of every end and every number of segments, every start. The levels and
    the price are those of the tests, which hold them against all partitions there are."""
    rules = from_tests("segmenter_cases")
    low, high, most = LIMITS["min_tokens"], LONGEST, LIMITS["max_segments"] - (answer >= 0)
    count = len(scores) if answer < 0 else answer
    score = [int(x * rules.UNIT) for x in scores]
    split = rules.forks(entropy, None, low, count) if entropy else []
    fork = int(BOUNDARY_SCORES["entropy"] * rules.UNIT)
    price = rules.price([x for x in score[: count - 1] if x > 0] + [fork for t in split if score[t] == 0], count, LIMITS["target_tokens"])
    score = rules.with_stretches(score)
    for t in split:
        score[t] += fork
    low = min(low, count)
    if count:
        high = max(high, -(-count // min(most, count // low)))
    gain = torch.tensor([0, *(x - price for x in score[: count - 1]), 0][: count + 1])
    best = [torch.full((count + 1,), NONE)]
    best[0][0] = 0
    for _ in range(most if count else 0):
        starts = torch.cat([torch.full((high,), NONE), best[-1]]).unfold(0, high - low + 1, 1).amax(-1)[: count + 1]
        best.append(torch.where(starts > NONE // 2, starts + gain, NONE))
        best[-1][0] = 0
    ends, end = [], count
    for k in range(most, 0, -1):
        if end == 0:
            break
        ends.append(end)
        first, last = max(0, end - high), end - low + 1
        end = first + int((best[k - 1][first:last] + gain[end] == best[k][end]).nonzero()[-1])  # of equal ones the later
    return ends[::-1] + ([len(scores)] if answer >= 0 else [])


class Judge:
    """Whether segments may be timed: they are those of one thread, fill their sequences and keep to their limits; and their error: the boundaries
    that the textbook programme does not have, and its that are missing, over its number, in the first SEQUENCES sequences, from our scores."""

    def __init__(self, segmenter: Segmenter, ids: Tensor, cu: Tensor, entropy: Tensor | None = None):
        self.again, self.cu = segmenter(ids, cu, entropy=entropy), cu
        some = cu[: SEQUENCES + 1]
        reading = segmenter.read(ids[: some[-1]], some)
        self.cuts: set[int] = set()
        for b, (begin, end) in enumerate(pairwise(some.tolist())):
            own = None if entropy is None else entropy[begin:end].double().tolist()
            self.cuts |= {begin + x for x in textbook_cuts(reading.scores[begin:end].tolist(), int(reading.answer_start[b]), own)}
        self.last = int(some[-1])

    def __call__(self, results: common.Results) -> dict:
        found = Segments(results["token_offsets"], results["sequence_offsets"])
        why = why_wrong(found, self.again, self.cu)
        cuts = {x for x in found.token_offsets.tolist() if 0 < x <= self.last}
        error = len(cuts ^ self.cuts) / len(self.cuts)
        if error and not why:
            why = f"{len(cuts ^ self.cuts)} boundaries differ from the textbook programme's {len(self.cuts)}"
        return {"error": error, "errors": {"cuts": error}, "correct": not why, "why": why}


def why_wrong(found: Segments, again: Segments, cu: Tensor) -> str:
    if not torch.equal(found.token_offsets, again.token_offsets) or not torch.equal(found.sequence_offsets, again.sequence_offsets):
        return "one thread cuts elsewhere than two"
    if not torch.equal(found.token_offsets[found.sequence_offsets], cu):
        return "segments do not fill their sequences"
    longest = int(found.lengths.max())
    return f"a segment of {longest} tokens, at most {LONGEST} allowed" if longest > LONGEST else ""


def cuts(segmenter: Segmenter, ids: Tensor, cu: Tensor, entropy: Tensor | None = None) -> Provider:
    def run():
        found = segmenter(ids, cu, entropy=entropy)
        return {"token_offsets": found.token_offsets, "sequence_offsets": found.sequence_offsets}

    return Provider(run)


def case(mode: str, shape: dict, providers: dict[str, Provider], judge, *, bytes: int = 0, copied: Tensor | None = None, **options) -> common.Case:
    ceilings = {} if copied is None else {"copy": common.copy_ceiling(copied)}
    return common.Case("segmenter", mode, shape, torch.int64, CPU, providers, None, bytes=bytes, ceilings=ceilings, judge=judge, **options)


texts_of = cache(Texts)


@pytest.fixture
def texts(device, shapes) -> Texts:
    if device.type != "cpu":
        pytest.skip("runs on the host")
    return texts_of(shapes)


def test_segmenter(run, texts):
    one, two = texts.segmenter(1), texts.segmenter(2)
    ids, cu = texts.ids, texts.cu
    ways = {name: Provider(way, "finds candidates, chooses nothing") for name, way in python_ways(texts).items()}
    providers = {"ours, 2 threads": cuts(two, ids, cu), "ours, 1 thread": cuts(one, ids, cu), **ways}
    shape = {"B": len(cu) - 1, "N": len(ids)}
    segments = two(ids, cu).token_offsets.numel()
    run(case("scores and partition", shape, providers, Judge(one, ids, cu), bytes=8 * (len(ids) + segments), copied=ids, baselines=frozenset(ways)))


def test_segmenter_scores(run, texts):
    """The rules of the text alone: they are their own definition, and their error is none but a thread's."""
    one, two = texts.segmenter(1), texts.segmenter(2)
    ids, cu = texts.ids, texts.cu
    again = one.scores(ids, cu)

    def judge(results):
        same = torch.equal(results["scores"], again)
        return {"error": None, "errors": {}, "correct": same, "why": "" if same else "one thread scores otherwise than two"}

    providers = {
        f"ours, {name}": Provider(lambda s=s: {"scores": s.scores(ids, cu)}) for name, s in (("2 threads", two), ("1 thread", one))
    }  # fmt: skip
    run(case("scores", {"B": len(cu) - 1, "N": len(ids)}, providers, judge, bytes=len(ids) * (8 + again.element_size()), copied=ids))


def test_segmenter_batch(run, texts, shapes):
    """A step's rollouts with their entropy."""
    b, length = (512, 2048) if shapes != "small" else (4, 256)
    ids, cu = texts.ids.repeat(1 + b * length // len(texts.ids))[: b * length], torch.arange(b + 1) * length
    entropy = torch.rand(len(ids))
    one, two = texts.segmenter(1), texts.segmenter(2)
    providers = {"ours, 2 threads": cuts(two, ids, cu, entropy), "ours, 1 thread": cuts(one, ids, cu, entropy)}
    segments = two(ids, cu, entropy=entropy).token_offsets.numel()
    run(case("with entropy", {"B": b, "N": b * length}, providers, Judge(one, ids, cu, entropy), bytes=12 * len(ids) + 8 * segments, copied=ids))


def test_segmenter_build(run, texts):
    """From a tokenizer in memory, beside reading that tokenizer from its file."""
    providers = {"ours": Provider(lambda: {"built": texts.segmenter(2)})}
    if texts.real:
        providers["reading tokenizer.json"] = Provider(lambda: {"read": texts.read()}, "by the tokenizers library")
    run(case(
        "built from a tokenizer", {"V": texts.vocab}, providers, lambda _: {"error": None, "errors": {}, "correct": True, "why": ""},
        baselines=frozenset({"reading tokenizer.json"}),
    ))  # fmt: skip
