"""The segmenter on real rollouts and real tokenizers; skipped where ../shared/data is absent."""

import json
from bisect import bisect_left
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from segmenter_cases import BYTES, RULES, expected_cuts, found_cuts, one

from acpo_kernels import Segmenter
from acpo_kernels.segmenter import BOUNDARY_SCORES

DATA = Path(__file__).parents[2] / "shared" / "data"
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="no ../shared/data beside the repository")


def rows(name: str) -> list[dict]:
    with open(DATA / name / "dev.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


@pytest.fixture(scope="module")
def qwen2():
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(DATA / "tokenizer_qwen2" / "tokenizer.json"))


@pytest.fixture(scope="module")
def segmenter(qwen2):
    return Segmenter.from_tokenizer(qwen2, vocab_size=151_936)


def packed(encodings) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.tensor([i for e in encodings for i in e.ids], dtype=torch.int32)
    return ids, torch.tensor([0, *(len(e.ids) for e in encodings)]).cumsum(0)


@pytest.fixture(scope="module")
def traces(qwen2):
    texts = [row["trace"] for row in rows("traces_r1llama8b_reasoning")]
    return texts, *packed(qwen2.encode_batch_fast(texts, add_special_tokens=False))


@pytest.mark.parametrize("name", ["tokenizer_qwen2", "tokenizer_gpt2"])
def test_rule_table_with_a_real_tokenizer(name):
    """Every boundary of the table is after the token in which its delimiter ends (all rows begin markers at a token)."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(DATA / name / "tokenizer.json"))
    segmenter = Segmenter.from_tokenizer(DATA / name)
    for marked in RULES:
        text, cuts = expected_cuts(marked)
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        ends, at = [], 0
        vocabulary = token_lengths(tokenizer, ids)
        for length in vocabulary:
            at += length
            ends.append(at)
        expected: dict[int, float] = {}
        for end, rule in cuts.items():
            token = ends[bisect_left(ends, end)]
            expected[token] = max(expected.get(token, 0), BOUNDARY_SCORES[rule])
        assert found_cuts(segmenter, ids, ends) == expected, marked


def token_lengths(tokenizer, ids: list[int]) -> list[int]:
    return [len(tokenizer.id_to_token(i)) for i in ids]  # byte-level: a character is a byte


def test_tokens_spell_the_text(segmenter, qwen2, traces):
    """The bytes read from the tokenizer, in a row, are the text itself."""
    from acpo_kernels._token_bytes import token_bytes

    table = token_bytes(qwen2)
    texts, ids, cu = traces
    for b in range(0, len(texts), 50):
        assert b"".join(table[i] for i in ids[cu[b] : cu[b + 1]].tolist()) == qwen2.normalizer.normalize_str(texts[b]).encode()


def test_traces_are_cut_without_loss(segmenter, traces):
    texts, ids, cu = traces
    assert len(texts) == 875
    entropy = torch.rand(ids.numel(), generator=torch.Generator().manual_seed(0))
    for arguments in ({}, {"entropy": entropy}):
        segments = segmenter(ids, cu, **arguments)
        assert torch.equal(segments.cu_seqlens, cu)
        lengths, sequences = segments.lengths, segments.sequence_offsets
        assert (lengths > 0).all() and int(lengths.sum()) == ids.numel() and sequences.diff().max() <= 64
        terminal = segments.is_terminal()
        before_terminal = torch.zeros_like(terminal)
        before_terminal[:-1] = terminal[1:]
        # Too short: only the answer span, and what is left before it when that is a whole sequence's reasoning.
        assert (lengths >= 8)[~terminal].all()
        assert (lengths <= 256).all()
        finished = torch.tensor([row["finished"] for row in rows("traces_r1llama8b_reasoning")])
        closed = torch.tensor(["</think>" in text for text in texts])
        assert not segments.terminal[~closed].any() and segments.terminal[closed & finished].float().mean() > 0.99


def test_threads_and_order_do_not_matter(segmenter, qwen2, traces):
    _, ids, cu = traces
    order = torch.randperm(cu.numel() - 1, generator=torch.Generator().manual_seed(0))[:200].tolist()
    shuffled = torch.cat([ids[cu[b] : cu[b + 1]] for b in order])
    offsets = torch.tensor([0, *(int(cu[b + 1] - cu[b]) for b in order)]).cumsum(0)
    base = segmenter(ids, cu)
    for threads in (1, 2, 5):
        other = Segmenter.from_tokenizer(qwen2, vocab_size=151_936, threads=threads)(shuffled, offsets)
        for i, b in enumerate(order):
            first, last = base.sequence_offsets[b : b + 2].tolist()
            begin, end = other.sequence_offsets[i : i + 2].tolist()
            assert torch.equal(base.token_offsets[first : last + 1] - cu[b], other.token_offsets[begin : end + 1] - offsets[i])


def test_paragraph_steps_of_processbench(segmenter, qwen2):
    """Gold boundaries of steps longer than the minimum: recall >= 0.98 at precision >= 0.90, at the default settings."""
    data = rows("steps_processbench")
    encodings = qwen2.encode_batch(["\n\n".join(row["steps"]) for row in data], add_special_tokens=False)
    ids, cu = packed(encodings)
    segments = segmenter(ids, cu)
    wanted = hit = predicted = right = 0
    for b, (row, encoding) in enumerate(zip(data, encodings, strict=True)):
        ends = [end for _, end in encoding.offsets]
        gold, at = [], 0
        for step in row["steps"][:-1]:
            at += len(step) + 2
            gold.append(bisect_left(ends, at) + 1)
        first, last = segments.sequence_offsets[b : b + 2].tolist()
        found = set((segments.token_offsets[first + 1 : last] - cu[b]).tolist())
        long = {end for begin, end in pairwise([0, *gold]) if end - begin > segmenter.min_tokens}
        wanted, hit = wanted + len(long), hit + len(long & found)
        predicted, right = predicted + len(found), right + len(found & set(gold))
    assert hit / wanted >= 0.98 and right / predicted >= 0.90


def test_ids_of_the_model_beyond_the_tokenizer(qwen2, segmenter):
    before, after = (qwen2.encode(text, add_special_tokens=False).ids for text in ("End.\n", "\nNext"))
    ids = [*before, 151_935, *after]
    scores = segmenter.scores(*one(ids)).tolist()
    assert scores[-2:] == [3, 0] and max(scores[:-2]) == 0
    with pytest.raises(ValueError, match="vocab_size = 151936, got 151936 at index 0"):
        segmenter(*one([151_936]))
    with pytest.raises(ValueError, match="vocab_size = 151646, got 151935 at index"):
        Segmenter.from_tokenizer(qwen2)(*one(ids))


def test_the_bytes_of_a_trace_give_the_same_lines(traces, segmenter):
    """Another tokenization (bytes) of the same text finds as many paragraph breaks and think tags."""
    texts, ids, cu = traces
    by_byte = Segmenter(BYTES)
    for b in range(0, len(texts), 97):
        a = segmenter.scores(*one(ids[cu[b] : cu[b + 1]].tolist()))
        c = by_byte.scores(*one(texts[b].encode()))
        for rule in ("paragraph", "think"):
            assert (a == BOUNDARY_SCORES[rule]).sum() == (c == BOUNDARY_SCORES[rule]).sum()
