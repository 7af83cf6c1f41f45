"""The packed batch: choosing rollouts, writing values back, cutting a batch into micro-batches."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from acpo.batch import Batch, on_host
from acpo_kernels import Segments

LENGTHS = (4, 1, 6, 3)
CUTS = ((2, 4), (1,), (1, 3, 6), (3,))  # ends of the segments of each rollout


@pytest.fixture
def batch() -> Batch:
    responses = [torch.arange(n) + 10 * b for b, n in enumerate(LENGTHS)]
    out = Batch.from_responses([[1], [2, 2], [3], [4] * 5], responses, logp=[-r.double() for r in responses])
    starts = [0, 4, 5, 11]
    ends = [start + end for start, cuts in zip(starts, CUTS, strict=True) for end in cuts]
    terminal = torch.tensor([True, False, True, False])
    out.segments = Segments(torch.tensor([0, *ends]), torch.tensor([0, 2, 3, 6, 7]), terminal=terminal)
    out.sequence["name"] = torch.arange(4)
    out.temperature = 0.7
    return out


def test_from_responses():
    batch = Batch.from_responses([[1], [2]], [torch.tensor([5, 6]), torch.tensor([7])], logp=[torch.tensor([0.1, 0.2]), torch.tensor([0.3])])
    assert len(batch) == 2 and batch.segments.num_segments == 2 and batch.segments.num_tokens == 3
    assert batch.segments.cu_seqlens.tolist() == [0, 2, 3]
    assert batch.token["ids"].tolist() == [5, 6, 7]
    assert [r.tolist() for r in batch.responses()] == [[5, 6], [7]] and [r.tolist() for r in batch.responses([1])] == [[7]]
    torch.testing.assert_close(batch.token["logp"], torch.tensor([0.1, 0.2, 0.3]))


@pytest.mark.parametrize("rows", [[0, 1, 2, 3], [2, 0], [3], [1, 3, 0]])
def test_select_keeps_every_value_with_its_rollout(batch, rows):
    chosen = batch.select(rows)
    assert [r.tolist() for r in chosen.responses()] == [batch.responses()[b].tolist() for b in rows]
    assert chosen.prompts == [batch.prompts[b] for b in rows] and chosen.lengths == [LENGTHS[b] for b in rows]
    assert chosen.token["logp"].tolist() == (-chosen.token["ids"].double()).tolist()
    assert chosen.sequence["name"].tolist() == rows and chosen.temperature == 0.7
    assert chosen.segments.terminal.tolist() == [b in (0, 2) for b in rows]
    ends = chosen.segments.token_offsets.tolist()
    wanted, at = [0], 0
    for b in rows:
        wanted += [at + end for end in CUTS[b]]
        at += LENGTHS[b]
    assert ends == wanted and chosen.segments.num_tokens == at
    assert chosen.segments.sequence_offsets.diff().tolist() == [len(CUTS[b]) for b in rows]


def test_select_of_all_is_the_batch(batch):
    chosen = batch.select([0, 1, 2, 3])
    assert torch.equal(chosen.segments.token_offsets, batch.segments.token_offsets)
    assert all(torch.equal(chosen.token[name], batch.token[name]) for name in batch.token)


def test_select_without_terminal_marks(batch):
    batch.segments = Segments(batch.segments.token_offsets, batch.segments.sequence_offsets)
    assert batch.select([2]).segments.terminal is None


def test_put_writes_these_rollouts_alone(batch):
    batch.put([2, 0], value=torch.arange(1.0, 11.0))
    assert batch.token["value"].tolist() == [7, 8, 9, 10, 0, 1, 2, 3, 4, 5, 6, 0, 0, 0]
    batch.put([1], value=torch.tensor([-1.0]))
    assert batch.token["value"].tolist() == [7, 8, 9, 10, -1, 1, 2, 3, 4, 5, 6, 0, 0, 0], "what stood there stays"
    batch.put([], nothing=torch.zeros(0, 3))
    assert batch.token["nothing"].shape == (14, 3) and not batch.token["nothing"].any()


def test_put_in_micro_batches_is_put_of_all(batch):
    for part in batch.micro_batches([0, 1, 2, 3], 7):
        batch.put(part, again=torch.cat(batch.responses(part)))
    assert torch.equal(batch.token["again"], batch.token["ids"])


def test_tokens_of(batch):
    assert batch.tokens_of([1, 3, 0]).tolist() == [4, 11, 12, 13, 0, 1, 2, 3]
    assert batch.tokens_of([]).tolist() == []


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 30)), min_size=1, max_size=20), st.integers(1, 80), st.data())
def test_micro_batches_hold_the_budget_and_every_rollout_once(sizes, budget, data):
    batch = Batch([[0] * prompt for prompt, _ in sizes], [length for _, length in sizes], None)
    rows = data.draw(st.lists(st.sampled_from(range(len(sizes))), unique=True))
    parts = list(batch.micro_batches(rows, budget))
    assert sorted(b for part in parts for b in part) == sorted(rows)
    size = [prompt + length for prompt, length in sizes]
    for part in parts:
        assert len(part) == 1 or max(size[b] for b in part) * len(part) <= budget
    for one, following in itertools.pairwise(parts):
        assert max(size[b] for b in one) * (len(one) + 1) > budget, "no micro-batch closes while the next rollout fits"
        assert min(size[b] for b in one) >= max(size[b] for b in following)


def test_on_the_host_everybody_has_what_he_had():
    values = [torch.tensor([3, 1]), torch.empty(0, dtype=torch.int64), torch.tensor([4])]
    moved = on_host(values)
    assert [v.tolist() for v in moved] == [[3, 1], [], [4]] and moved[0].dtype == torch.int64 and on_host([]) == []
