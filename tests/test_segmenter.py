"""The segmenter: its partition against brute force, its independence, its size and memory; test_segmenter_*.py hold the rest."""

import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from segmenter_cases import BYTES, UNIT, forks, fragments, one, price, text_ids, with_stretches

from acpo_kernels import Segmenter

# ---- the partition, against brute force over everything the docstring says


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
