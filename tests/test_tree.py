"""Values from shared prefixes: counts by hand, unbiasedness, what a canonical form forgets, and the differences of TEMPO's form."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ragged import segments_of

from acpo import tree
from acpo.attribution import leave_one_out, tree_evidence, zero_variance
from acpo.tree import Prefixes, branch_differences, canonical_prefixes, exact_prefixes, sharing, tree_values
from acpo_kernels import Segments


def prefixes_of(path: list[list[bytes]]) -> Prefixes:
    return Prefixes(path, path, [[True] * len(p) for p in path])


def test_values_by_hand():
    path = [[b"a", b"ab"], [b"a", b"ac"], [b"a", b"ab", b"abd"], [b"x"]]
    rewards = torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    base = [1 / 3, 2 / 3, 1 / 3, 2 / 3]
    counted = [
        (0 + 1 + 2 * base[0]) / 4, (1 + 2 * base[0]) / 3,
        (1 + 1 + 2 * base[1]) / 4, base[1],
        (1 + 0 + 2 * base[2]) / 4, (1 + 2 * base[2]) / 3, base[2],
        base[3],
    ]  # fmt: skip
    torch.testing.assert_close(tree_values(prefixes_of(path), rewards, 4, 2.0), torch.tensor(counted, dtype=torch.float64))
    segments = segments_of(tuple((1,) * len(p) for p in path))
    found = tree_evidence(prefixes_of(path), rewards, 4, segments, 2.0, False, torch.ones(4, dtype=torch.bool))
    prior = leave_one_out(rewards, 4)[segments.segment_sequence_ids()]
    torch.testing.assert_close(torch.sigmoid(found.evidence + torch.logit(prior)), torch.tensor(counted, dtype=torch.float64))
    assert [found.evidence[i].item() for i in (3, 6, 7)] == [0.0] * 3, "nobody shares it: nothing is said"


def test_groups_do_not_meet():
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0], dtype=torch.float64)
    values = tree_values(prefixes_of([[b"a"], [b"b"], [b"a"], [b"a"]]), rewards, 2, 0.0)
    assert values.tolist() == [0.0, 1.0, 1.0, 0.0]


def test_by_state_stands_between_path_and_mean():
    """Two rollouts came to the state by another way than the first: without a common path the state speaks, and is drawn to the mean."""
    found = Prefixes([[b"p1"], [b"p2"], [b"p3"], [b"p4"]], [[b"s"], [b"s"], [b"s"], [b"t"]], [[True]] * 4)
    rewards = torch.tensor([0.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    assert tree_values(found, rewards, 4, 2.0).tolist() == pytest.approx([2 / 3, 1 / 3, 1 / 3, 2 / 3])
    by_state = (2 + 2 * 2 / 3) / 4
    assert tree_values(found, rewards, 4, 2.0, by_state=True)[0].item() == pytest.approx(by_state)  # then drawn to itself: nobody on the path


def test_a_step_that_nobody_else_took_says_nothing_when_values_are_drawn_to_the_one_before():
    """A line more in the first rollout, behind a prefix that two share: drawn to the mean V jumps there and stays, drawn to the value before it does
    not move; where the prefix is shared, both count the same outcomes."""
    path = [[b"a", b"a+", b"a+b"], [b"a", b"ab"], [b"a", b"ab"], [b"x", b"xy"]]
    rewards = torch.tensor([1.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    base, first = 2 / 3, (2 + 2 * 2 / 3) / 4
    mean, before = (tree_values(prefixes_of(path), rewards, 4, 2.0, before=b)[:5].tolist() for b in (False, True))
    assert mean == pytest.approx([first, base, base, first, (1 + 2 * base) / 3])
    assert before == pytest.approx([first, first, first, first, (1 + 2 * first) / 3])
    segments = segments_of(tuple((1,) * len(p) for p in path))
    found = tree_evidence(prefixes_of(path), rewards, 4, segments, 2.0, False, torch.ones(4, dtype=torch.bool), before=True)
    assert found.evidence[0].item() == found.evidence[1].item() == found.evidence[2].item() > 0


@pytest.mark.parametrize("before", [False, True])
def test_before_the_first_step_that_changes_the_state_all_are_where_they_began(before):
    """Two open with a step without a number: where they stand behind it, everybody has stood."""
    found = canonical_prefixes([["Let me see.", "So", "y=1"], ["Well,", "y=1"], ["y=1"], ["y=2"]])
    rewards = torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    offsets = torch.tensor([0, 3, 5, 6, 7])
    segments = Segments(torch.arange(8), offsets)
    evidence = tree_evidence(found, rewards, 4, segments, 2.0, True, torch.ones(4, dtype=torch.bool), before=before).evidence
    assert evidence[[0, 1, 3]].tolist() == [0.0] * 3 and evidence[2] != 0 != evidence[4]
    assert sharing(found, segments, 4) == 6 / 7, "all but y=2"


def test_unbiased_without_shrinkage():
    """Every group of three rollouts of a two-step process, weighed by its probability: where the prefix is shared, the value is V on average."""
    first, success = {b"a": 0.6, b"b": 0.4}, {b"a": 0.3, b"b": 0.8}
    rollouts = [(p, r, first[p] * (success[p] if r else 1 - success[p])) for p in first for r in (0.0, 1.0)]
    total, weight = dict.fromkeys(first, 0.0), dict.fromkeys(first, 0.0)
    for group in itertools.product(rollouts, repeat=3):
        own, p = group[0][0], math.prod(q for _, _, q in group)
        values = tree_values(prefixes_of([[prefix] for prefix, _, _ in group]), torch.tensor([r for _, r, _ in group], dtype=torch.float64), 3, 0.0)
        if any(other[0] == own for other in group[1:]):
            total[own] += p * values[0].item()
            weight[own] += p
    for prefix in first:
        assert total[prefix] / weight[prefix] == pytest.approx(success[prefix], abs=1e-12)


@given(st.integers(0, 2**31), st.floats(0, 5), st.booleans())
def test_a_rollouts_own_outcome_is_not_in_its_values(seed, kappa, before):
    generator = torch.Generator().manual_seed(seed)
    path = [[bytes([x]) for x in torch.randint(3, (3,), generator=generator).tolist()] for _ in range(8)]
    rewards = torch.bernoulli(torch.full((8,), 0.5), generator=generator).double()
    turned = rewards.clone()
    turned[2] = 1 - turned[2]
    one, other = (tree_values(prefixes_of(path), r, 4, kappa, True, before) for r in (rewards, turned))
    assert torch.equal(one[6:9], other[6:9]) and torch.equal(one[12:], other[12:])


def test_exact_keys_are_the_tokens():
    responses = [torch.tensor(x) for x in ([1, 2, 3, 4], [1, 2, 3, 5], [1, 2], [12, 3])]
    segments = segments_of(((2, 2), (2, 2), (2,), (1, 1)))
    found = exact_prefixes(responses, segments)
    assert found.path[0][0] == found.path[1][0] == found.path[2][0] != found.path[3][1]
    assert found.path[0][1] != found.path[1][1] and all(all(c) for c in found.changed)
    assert sharing(found, segments, 4) == 3 / 7 and sharing(found, segments, 2) == 2 / 7


def test_canonical_keys_forget_words_and_filler():
    found = canonical_prefixes([["a37stuv\n", "uu\n", "b42xx\n"], ["Step 1 of a: 37", "b is 42"], ["a37\n", "b4 and 2\n"], ["a3\n", "7b42"]])
    assert found.changed[0] == [True, False, True]
    assert found.path[0][0] == found.path[0][1] == found.path[2][0]
    assert found.path[0][2] != found.path[2][1], "42 is not 4 and 2"
    assert found.path[0][2] != found.path[3][1], "where a step ends matters"
    assert found.state[0][0] == found.state[0][1] != found.state[0][2], "a step that changes nothing leaves the state"
    both = canonical_prefixes([["1\n", "7\n"], ["2\n", "7\n"], ["7\n"]])
    assert both.state[0][1] == both.state[1][1] != both.state[2][0] and both.path[0][1] != both.path[1][1], "one state, two ways, one place"
    assert found.path[1][0] != found.path[0][0], "the step's own number is a number"


def test_a_sign_is_part_of_its_number_and_a_difference_has_none():
    found = canonical_prefixes([["x = -3\n"], ["x = 3\n"], ["the sum is -3\n"], ["10-3\n"], ["10 - 3\n"], ["(4)-3\n"], ["4 3\n"], ["10 -3\n"]])
    first = [path[0] for path in found.path]
    assert first[0] == first[2] != first[1] and first[3] == first[4] != first[7] and first[5] == first[6]


def test_numbers_are_read_across_tokens_from_their_bytes():
    """A number of two tokens is one, one cut by a boundary is two; a character split between steps, a control token and ids beyond the table are no
    numbers and no error."""
    tokens = [b"", b"1", b"2", b" is ", "\u00e9".encode()[:1], "\u00e9".encode()[1:], "\uff17".encode()]
    lengths = [3, 2, 3, 2], [2, 2]
    ids = torch.tensor([1, 2, 3, 0, 4, 5, 2, 99, 6, 3, 1, 2, 2, 4])
    ends = torch.tensor([0, *lengths[0], *lengths[1]]).cumsum(0)
    segments = Segments(ends, torch.tensor([0, 4, 6]), num_tokens=14)
    found = tree.prefixes_of(ids, segments, "numbers", tokens)
    assert found.changed == [[True, False, True, True], [True, True]]
    assert found.path[0][0] == found.path[1][0] == found.path[0][1], "12, whatever stands around it"
    assert found.path[0][2] == found.path[1][1] and found.state[0][2] == found.state[1][1]
    assert found.path[0][3] not in found.path[1]


def test_branch_differences_by_hand():
    ids = [torch.tensor(x) for x in ([1, 2, 3], [1, 2, 4], [1, 5], [1, 2, 3])]
    found = branch_differences(ids, torch.tensor([1.0, 0, 1, 1], dtype=torch.float64), 4)
    a, b = 2 / 3 - 3 / 4, 1 / 4
    assert found.tolist() == pytest.approx([0, a, 1 / 3, 0, a, -2 / 3, 0, b, 0, a, 1 / 3])


@given(st.integers(0, 2**31), st.integers(2, 6))
def test_branch_differences_telescope(seed, size):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 6, (2 * size,), generator=generator).tolist()
    ids = [torch.cat([torch.randint(3, (n,), generator=generator), torch.tensor([9 + b])]) for b, n in enumerate(lengths)]  # each ends alone
    rewards = torch.rand(2 * size, generator=generator, dtype=torch.float64)
    totals = torch.stack([part.sum() for part in branch_differences(ids, rewards, size).split([n + 1 for n in lengths])])
    mean = rewards.view(2, size).mean(1).repeat_interleave(size)
    torch.testing.assert_close(totals, rewards - mean)
    same = branch_differences(ids, torch.ones_like(rewards), size)
    assert zero_variance(torch.ones_like(rewards), size).all() and same.abs().max() < 1e-15
