"""Speed of the segmenter beside what one would write in Python: python -m benchmarks.bench_segmenter [rounds]

Needs ../shared/data: every dev trace, Qwen2's tokenizer. The Python ways get the same ids and the same markers and need not map their
boundaries back to tokens nor choose among them, which the segmenter does. Interleaved rounds, lower quartile.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from acpo_kernels import Segmenter
from acpo_kernels._token_bytes import token_bytes
from acpo_kernels.segmenter import ALOUD, MARKERS

DATA = Path(__file__).parents[2] / "shared" / "data"
TRACES = ("traces_r1_math", "traces_r1llama8b_reasoning", "steps_rtseg", "steps_thought_anchors_web")
VOCAB = 151_936


def traces() -> list[str]:
    texts = []
    for name in TRACES:
        with open(DATA / name / "dev.jsonl", encoding="utf-8") as file:
            texts += [json.loads(line)["trace"] for line in file]
    return texts


def packed(tokenizer, texts: list[str]) -> tuple[Tensor, Tensor]:
    encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return torch.tensor([i for e in encodings for i in e.ids]), torch.tensor([0, *(len(e.ids) for e in encodings)]).cumsum(0)


def python_ways(tokenizer, ids: list[list[int]]) -> dict[str, Callable[[], object]]:
    """What the segmenter replaces, over the same sequences."""
    import regex

    words = "|".join(regex.escape(w) for w in sorted({*MARKERS, *ALOUD}, key=len, reverse=True))
    pattern = regex.compile(
        rf"\n\s*\n|\n|[.!?][\"')*]*\s+(?=[A-Z0-9\"'(\[\\$*_#`])|[\u3002\uff01\uff1f]|(?:{words})\b|</think>|\\boxed\{{|[Aa]nswer(?: is|:)"
    )
    text = [t.decode("utf-8", "replace") for t in token_bytes(tokenizer)]
    table = [1.0 if pattern.search(t) else 0.0 for t in text] + [0.0] * (VOCAB - len(text))

    def decode_and_regex():
        return [[m.end() for m in pattern.finditer(t)] for t in tokenizer.decode_batch(ids, skip_special_tokens=False)]

    def token_table():
        return [[table[i] for i in sequence] for sequence in ids]

    def decode_and_split():
        return [t.split("\n\n") for t in tokenizer.decode_batch(ids, skip_special_tokens=False)]

    return {"decode + regex": decode_and_regex, "a table a token, in Python": token_table, "decode + str.split": decode_and_split}


def lower_quartiles(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Seconds of each call, all of them in turn, round after round; a slow call takes part in three rounds."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):  # the first one warms up
        for name, call in calls.items():
            if turn > 3 and times[name][0] > 0.5:
                continue
            begin = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - begin)
    return {name: sorted(t[1:])[(len(t) - 1) // 4] for name, t in times.items()}


def main() -> None:
    from tokenizers import Tokenizer

    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 30
    path = DATA / "tokenizer_qwen2" / "tokenizer.json"
    begin = time.perf_counter()
    tokenizer = Tokenizer.from_file(str(path))
    reading = time.perf_counter() - begin
    begin = time.perf_counter()
    one = Segmenter.from_tokenizer(tokenizer, vocab_size=VOCAB, threads=1)
    building = time.perf_counter() - begin
    two = Segmenter.from_tokenizer(tokenizer, vocab_size=VOCAB, threads=2)
    ids, cu = packed(tokenizer, traces())
    sequences = [ids[a:b].tolist() for a, b in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True)]
    entropy = torch.rand(ids.numel(), generator=torch.Generator().manual_seed(0))
    found = one.read(ids, cu)
    batch, batch_cu = torch.cat([ids] * (1 + 512 * 2048 // ids.numel()))[: 512 * 2048], torch.arange(513) * 2048
    batch_entropy = torch.rand(batch.numel(), generator=torch.Generator().manual_seed(0))
    calls: dict[str, Callable[[], object]] = {
        "scores, 1 thread": lambda: one.scores(ids, cu),
        "scores, 2 threads": lambda: two.scores(ids, cu),
        "scores + partition, 1 thread": lambda: one(ids, cu),
        "scores + partition, 2 threads": lambda: two(ids, cu),
        "partition with entropy after reading, 1 thread": lambda: one(ids, cu, scores=found, entropy=entropy),
        **python_ways(tokenizer, sequences),
        "batch of 512 x 2048: all, with entropy, 2 threads": lambda: two(batch, batch_cu, entropy=batch_entropy),
    }
    print(f"{cu.numel() - 1} traces, {ids.numel()} tokens; tokenizer.json read in {reading:.2f} s, segmenter built from it in {building:.2f} s")
    print(f"load {os.getloadavg()[0]:.2f}")
    seconds = lower_quartiles(calls, rounds)
    regex = seconds["decode + regex"]
    for name, s in seconds.items():
        tokens = batch.numel() if name.startswith("batch") else ids.numel()
        ratio = "" if name.startswith("batch") else f"   {regex / s:7.1f} x decode + regex"
        print(f"  {name:52s}{s * 1e3:10.2f} ms {tokens / s / 1e6:8.2f} M tokens/s{ratio}")
    print(f"load {os.getloadavg()[0]:.2f}")


if __name__ == "__main__":
    main()
