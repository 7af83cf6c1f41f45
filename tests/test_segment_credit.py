"""segment_credit: bounded conserving weights and additive shaping."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from ragged import LENGTHS, TERMINAL, assert_right, hierarchies, segments_of, sequences, tokens

from acpo_kernels import _cpu, segment_credit

FORMS = ("weights", "additive")
IMPLS = (None, "reference")


def bits(x):
    return x.contiguous().view(torch.int64 if x.dtype == torch.float64 else torch.int32)


def spread(advantages, segments, mask):
    """The trajectory advantage on its unmasked tokens: what GRPO and RLOO use."""
    return torch.where(mask, advantages[segments.sequence_ids()], 0.0)


def unmasked_lengths(segments, mask):
    return torch.tensor([sum(bool(mask[t]) for t in tokens(segments, s)) for s in range(segments.num_segments)], dtype=torch.float64)


def loops(scores, segments, advantages, mask, form, bound, gain, reliability, exclude, scale):
    """Section 4 of the method, segment by segment, in Python floats."""
    kept = [[bool(mask[t]) for t in tokens(segments, s)].count(True) for s in range(segments.num_segments)]
    phi = [x if math.isfinite(x) else 0.0 for x in scores]
    last = {b: of[-1] for b, of in sequences(segments) if len(of) and exclude and segments.terminal is not None and segments.terminal[b]}
    ordinary = [s for s in range(segments.num_segments) if s not in last.values()]
    if scale is None:
        sizes = [abs(phi[s]) if form == "weights" else phi[s] ** 2 for s in ordinary]
        mean = sum(sizes) / max(len(sizes), 1)
        scale = (mean if form == "weights" else math.sqrt(mean)) + 1e-6
    weights, credit = [1.0] * segments.num_segments, [0.0] * segments.num_tokens
    for b, of_sequence in sequences(segments):
        a, others = advantages[b], [s for s in of_sequence if s != last.get(b)]
        level = dict.fromkeys(of_sequence, a)
        if form == "additive":
            level |= {s: a + reliability[b] * gain * max(-3.0, min(3.0, phi[s] / scale)) for s in others}
        elif len(others) >= 2:
            sign = (a > 0) - (a < 0)
            tilde = {s: max(1 - bound, min(1 + bound, 1 + gain * sign * phi[s] / scale)) for s in others}
            if b in last:
                tilde[last[b]] = sum(tilde.values()) / len(others)
            w = {s: 1 + reliability[b] * (tilde[s] - 1) for s in of_sequence}
            total, weighted = sum(kept[s] for s in of_sequence), sum(kept[s] * w[s] for s in of_sequence)
            for s in of_sequence:
                weights[s] = w[s] * (total / weighted if weighted else 1.0)
            level = {s: a * weights[s] for s in of_sequence}
        for s in of_sequence:
            for t in tokens(segments, s):
                credit[t] = level[s] if mask[t] else 0.0
    return credit, weights


# 1. Oracle. (No gradient flows: there is no gradcheck.)


@pytest.mark.parametrize("impl", IMPLS)
def test_weights_by_hand(impl, device):
    # Rollout 0: three segments of 2, 1, 1 tokens, the last terminal. scale 2: m = (1, -3); A > 0: w~ = (1.5, 0.5), terminal their mean 1.
    # T = 4, sum n w~ = 2(1.5) + 0.5 + 1 = 4.5, w = w~ * 4/4.5. Rollout 1: A < 0 turns the sign, w~ = (0.9, 1.1), 2 tokens each.
    segments = segments_of([[2, 1, 1], [2, 2]], terminal=[True, False], device=device)
    scores = torch.tensor([2.0, -6.0, 99.0, 0.4, -0.4], dtype=torch.float64, device=device)
    advantages = torch.tensor([3.0, -1.0], dtype=torch.float64, device=device)
    credit, weights = segment_credit(scores, segments, advantages, scale=2.0, impl=impl)
    wanted = torch.tensor([1.5 / 1.125, 0.5 / 1.125, 1 / 1.125, 0.9, 1.1], dtype=torch.float64, device=device)
    torch.testing.assert_close(weights, wanted, rtol=1e-15, atol=0)
    torch.testing.assert_close(credit, (wanted * advantages[[0, 0, 0, 1, 1]])[[0, 0, 1, 2, 3, 3, 4, 4]], rtol=1e-15, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
def test_additive_by_hand(impl, device):
    segments = segments_of([[2, 1, 1], [2]], terminal=[True, False], device=device)
    scores = torch.tensor([1.0, -50.0, 99.0, 8.0], dtype=torch.float64, device=device)
    advantages = torch.tensor([0.0, 1.0], dtype=torch.float64, device=device)
    mask = torch.tensor([1, 0, 1, 1, 1, 1], dtype=torch.bool, device=device)
    reliability = torch.tensor([1.0, 0.5], device=device)
    credit, weights = segment_credit(scores, segments, advantages, form="additive", scale=2.0, mask=mask, reliability=reliability, impl=impl)
    assert credit.tolist() == [0.25, 0.0, -1.5, 0.0, 1.75, 1.75]  # +-3 clip, terminal gets A_b = 0, one segment alone is shaped too
    assert weights.tolist() == [1.0] * 4


@pytest.mark.parametrize("impl", IMPLS)
def test_the_batchs_own_scale_by_hand(impl):
    segments = segments_of([[1, 1, 1], [1]], terminal=[True, False])
    scores = torch.tensor([3.0, -1.0, 1000.0, math.nan], dtype=torch.float64)  # terminal left out, NaN counts as a 0
    advantages = torch.tensor([1.0, 1.0], dtype=torch.float64)
    credit, _ = segment_credit(scores, segments, advantages, form="additive", gain=1.0, impl=impl)
    scale = math.sqrt((9.0 + 1.0 + 0.0) / 3.0) + 1e-6
    torch.testing.assert_close(credit, torch.tensor([1 + 3 / scale, 1 - 1 / scale, 1.0, 1.0], dtype=torch.float64), rtol=1e-15, atol=0)
    _, weights = segment_credit(scores, segments, advantages, gain=0.1, impl=impl)
    scale = (3.0 + 1.0 + 0.0) / 3.0 + 1e-6
    raw = torch.tensor([1 + 0.3 / scale, 1 - 0.1 / scale], dtype=torch.float64)
    wanted = torch.cat([raw, raw.mean(0, keepdim=True)])
    torch.testing.assert_close(weights[:3], wanted * 3 / wanted.sum(), rtol=1e-15, atol=0)


@given(
    hierarchies(),
    st.sampled_from(FORMS),
    st.sampled_from([0.0, 0.3, 0.5, 0.9]),
    st.sampled_from([0.0, 0.5, 4.0]),
    st.booleans(),
    st.sampled_from([None, 0.7]),
)
def test_the_definition_segment_by_segment(case, form, bound, gain, exclude, scale):
    segments, mask = case
    scores = torch.randn(segments.num_segments, dtype=torch.float64)
    scores[torch.rand(segments.num_segments) < 0.1] = math.nan
    advantages = torch.randn(segments.num_sequences, dtype=torch.float64).mul(2).round()
    reliability = torch.rand(segments.num_sequences, dtype=torch.float64)
    credit, weights = loops(
        scores.tolist(), segments, advantages.tolist(), mask, form, bound, gain, reliability.tolist(), exclude, scale,
    )  # fmt: skip
    settings = dict(mask=mask, form=form, bound=bound, gain=gain, reliability=reliability, scale=scale, terminal="exclude" if exclude else "include")
    for impl in IMPLS:
        actual = segment_credit(scores, segments, advantages, **settings, impl=impl)
        torch.testing.assert_close(actual.weights, torch.tensor(weights, dtype=torch.float64), rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(actual.token_advantages, torch.tensor(credit, dtype=torch.float64), rtol=1e-13, atol=1e-13)


# 2. Implementation against the oracle


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [None, 0.8])
@pytest.mark.parametrize("form", FORMS)
def test_against_the_reference(form, scale, dtype, device):
    segments = segments_of([*LENGTHS, (300, 70, 1)], terminal=[*TERMINAL, True], device=device)
    mask = torch.rand(segments.num_tokens, device=device) < 0.8
    scores = torch.randn(segments.num_segments, device=device).to(dtype)
    advantages = torch.randn(segments.num_sequences, device=device).to(dtype)
    settings = dict(mask=mask, form=form, scale=scale, reliability=torch.rand(segments.num_sequences, device=device))
    actual = segment_credit(scores, segments, advantages, **settings)
    exact = segment_credit(scores.double(), segments, advantages.double(), **settings, impl="reference")
    working = exact if dtype == torch.float64 else segment_credit(scores.float(), segments, advantages.float(), **settings, impl="reference")
    assert actual.weights.dtype == actual.token_advantages.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_right("weights", actual.weights, working.weights, exact.weights)
    assert_right("token advantages", actual.token_advantages, working.token_advantages, exact.token_advantages)


# 3. Properties


@given(
    hierarchies(), st.sampled_from(FORMS), st.sampled_from(["float", "0-d", "[B]"]), st.booleans(), st.sampled_from([torch.float32, torch.float64])
)
def test_reliability_0_is_bitwise_the_trajectory_advantage(case, form, kind, terminal, dtype):
    segments, mask = case
    scores = torch.randn(segments.num_segments, dtype=dtype).mul(10)
    scores[torch.rand(segments.num_segments) < 0.2] = math.inf
    advantages = torch.randn(segments.num_sequences, dtype=dtype)
    advantages[torch.rand(segments.num_sequences) < 0.3] = -0.0  # the sign of a zero is a bit too
    reliability = {"float": 0.0, "0-d": torch.tensor(0.0), "[B]": torch.zeros(segments.num_sequences)}[kind]
    for impl in IMPLS:
        credit, weights = segment_credit(
            scores, segments, advantages, mask=mask, form=form, reliability=reliability, terminal="exclude" if terminal else "include", impl=impl
        )
        assert torch.equal(bits(credit), bits(spread(advantages, segments, mask)))
        assert torch.equal(weights, torch.ones_like(weights))


@given(hierarchies(), st.sampled_from(FORMS))
def test_scores_of_0_are_bitwise_the_trajectory_advantage(case, form):
    segments, mask = case
    advantages = torch.randn(segments.num_sequences)
    for zeros in (torch.zeros(segments.num_segments), torch.full((segments.num_segments,), math.nan)):
        credit, weights = segment_credit(zeros, segments, advantages, mask=mask, form=form)
        assert torch.equal(bits(credit), bits(spread(advantages, segments, mask)))
        assert torch.equal(weights, torch.ones_like(weights))


@given(hierarchies(), st.sampled_from(FORMS))
def test_reliability_of_some_rollouts_leaves_the_others_bitwise_alone(case, form):
    """The default method: the form acts only in groups without reward variance."""
    segments, mask = case
    scores, advantages = torch.randn(segments.num_segments), torch.randn(segments.num_sequences)
    chosen = torch.rand(segments.num_sequences) < 0.5
    mixed = segment_credit(scores, segments, advantages, mask=mask, form=form, reliability=chosen.float(), scale=1.0)
    full = segment_credit(scores, segments, advantages, mask=mask, form=form, scale=1.0)
    on = chosen[segments.sequence_ids()]
    assert torch.equal(mixed.token_advantages[on], full.token_advantages[on])
    assert torch.equal(bits(mixed.token_advantages[~on]), bits(spread(advantages, segments, mask)[~on]))


@given(hierarchies(), st.floats(0.0, 0.95), st.floats(0.0, 1.0), st.floats(0.0, 50.0), st.booleans(), st.sampled_from([torch.float32, torch.float64]))
def test_weights_conserve_keep_the_sign_and_stay_bounded(case, bound, reliability, gain, exclude, dtype):
    segments, mask = case
    scores = torch.randn(segments.num_segments, dtype=dtype) * 10 ** torch.empty(segments.num_segments, dtype=dtype).uniform_(-3, 3)
    advantages = torch.randn(segments.num_sequences, dtype=dtype)
    credit, weights = segment_credit(
        scores, segments, advantages, mask=mask, bound=bound, gain=gain, reliability=reliability, terminal="exclude" if exclude else "include"
    )
    rounding = 16 * torch.finfo(dtype).eps
    low = (1 - reliability * bound) / (1 + reliability * bound)
    assert (weights >= low * (1 - rounding)).all()
    assert (weights <= (1 + rounding) / low).all()
    given_, got = spread(advantages, segments, mask).double(), credit.double()
    assert torch.equal(got.sign(), given_.sign())
    lengths = unmasked_lengths(segments, mask)
    for b, of_sequence in sequences(segments):
        here = list(of_sequence)
        total = lengths[here].sum()
        torch.testing.assert_close((lengths[here] * weights[here].double()).sum(), total, rtol=rounding, atol=0)
        inside = segments.sequence_ids() == b
        torch.testing.assert_close(got[inside].sum(), given_[inside].sum(), rtol=rounding, atol=0)


@pytest.mark.skipif(not _cpu.available, reason="a property of the C++ kernel, and built without it")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("masked", [False, True])
def test_the_sum_of_the_weights_is_the_number_of_tokens_to_one_rounding_of_each_weight(dtype, masked):
    """The bound of the docstring: a weight is the exact one rounded once, so the sum is off by at most T times half a unit."""
    lengths = torch.randint(0, 200, (64, 64)).tolist() + torch.randint(1, 5000, (4, 500)).tolist()
    segments = segments_of(lengths, [True] * len(lengths))
    mask = torch.rand(segments.num_tokens) < 0.6 if masked else torch.ones(segments.num_tokens, dtype=torch.bool)
    scores = torch.randn(segments.num_segments, dtype=dtype) * 3
    _, weights = segment_credit(scores, segments, torch.randn(segments.num_sequences, dtype=dtype), mask=mask if masked else None, bound=0.9)
    assert (weights != 1).float().mean() > 0.9
    half_unit = torch.finfo(dtype).eps / 2
    kept = mask.long().cumsum(0).tolist()
    offsets = segments.token_offsets.tolist()
    for _, of_sequence in sequences(segments):
        counts = [(kept[offsets[s + 1] - 1] if offsets[s + 1] else 0) - (kept[offsets[s] - 1] if offsets[s] else 0) for s in of_sequence]
        total = sum(counts)
        exact = sum(Fraction(n) * Fraction(w) for n, w in zip(counts, weights[of_sequence.start : of_sequence.stop].tolist(), strict=True))
        # float64's own arithmetic is float64's: a few roundings more, whatever the number of segments
        assert abs(exact - total) <= total * half_unit * (1 + 1e-6 if dtype == torch.float32 else 5)


def test_the_number_of_threads_changes_no_bit():
    segments = segments_of([[3] * 9000, [70_000, 0, 8193], [], [40_000]], [True, True, True, False])
    scores, advantages = torch.randn(segments.num_segments), torch.randn(4)
    mask = torch.rand(segments.num_tokens) < 0.8
    for form in FORMS:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(segment_credit(scores, segments, advantages, mask=mask, form=form))
        for other in results[1:]:
            assert torch.equal(other.token_advantages, results[0].token_advantages)
            assert torch.equal(other.weights, results[0].weights)


@given(hierarchies())
def test_more_credit_where_the_score_helps(case):
    """Within a rollout the weights are ordered as sgn(A) phi, and turning both signs changes nothing."""
    segments, mask = case
    scores, advantages = torch.randn(segments.num_segments), torch.randn(segments.num_sequences)
    credit, weights = segment_credit(scores, segments, advantages, mask=mask, terminal="include")
    for b, of_sequence in sequences(segments):
        order = sorted(of_sequence, key=lambda s: float(scores[s] * advantages[b].sign()))
        assert (weights[order].diff() >= 0).all()
    turned = segment_credit(-scores, segments, -advantages, mask=mask, terminal="include")
    assert torch.equal(turned.weights, weights)
    assert torch.equal(turned.token_advantages, -credit)


@given(hierarchies())
def test_a_rollout_alone_is_bitwise_the_same(case):
    segments, mask = case
    scores, advantages = torch.randn(segments.num_segments), torch.randn(segments.num_sequences)
    cu_seqlens = segments.cu_seqlens.tolist()
    for form in FORMS:
        together = segment_credit(scores, segments, advantages, mask=mask, form=form, scale=0.5)
        for b, of_sequence in sequences(segments):
            alone = segments_of([[len(tokens(segments, s)) for s in of_sequence]], [bool(segments.terminal[b])])
            here = slice(cu_seqlens[b], cu_seqlens[b + 1])
            result = segment_credit(scores[list(of_sequence)], alone, advantages[b : b + 1], mask=mask[here], form=form, scale=0.5)
            assert torch.equal(result.token_advantages, together.token_advantages[here])
            assert torch.equal(result.weights, together.weights[list(of_sequence)])


@given(hierarchies())
def test_the_additive_form_adds_at_most_three_scales(case):
    segments, mask = case
    scores = torch.randn(segments.num_segments) * 100
    advantages = torch.randn(segments.num_sequences)
    assume(segments.num_tokens > 0)
    credit, _ = segment_credit(scores, segments, advantages, mask=mask, form="additive", gain=0.5, scale=1.0)
    shaping = credit - spread(advantages, segments, mask)
    assert (shaping.abs() <= 1.5 + 1e-6).all()
    assert (shaping[segments.is_terminal()[segments.segment_ids()]] == 0).all()
    assert (shaping[~mask] == 0).all()


# 4. Edges


@pytest.mark.parametrize("impl", IMPLS)
def test_terminal_rule(impl):
    segments = segments_of([[1, 2, 3, 4]], terminal=[True])
    scores, advantages = torch.tensor([1.0, -1.0, 0.5, 7.0], dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    _, weights = segment_credit(scores, segments, advantages, gain=0.25, scale=1.0, impl=impl)
    # The plain mean of the others' w~, not weighted by their lengths; conservation multiplies all alike.
    torch.testing.assert_close(weights[3], weights[:3].mean(), rtol=1e-15, atol=0)
    changed = segment_credit(torch.cat([scores[:3], -scores[3:]]), segments, advantages, gain=0.25, scale=1.0, impl=impl)
    assert torch.equal(changed.weights, weights)  # the terminal score is not read
    included = segment_credit(scores, segments, advantages, gain=0.25, scale=1.0, terminal="include", impl=impl)
    assert included.weights[3] == included.weights.max()


@pytest.mark.parametrize("impl", IMPLS)
def test_fewer_than_two_other_segments(impl):
    segments = segments_of([[3], [2, 2], [2, 2], [1, 1, 1]], terminal=[False, True, False, True])
    scores = torch.arange(1.0, 9.0)
    _, weights = segment_credit(scores, segments, torch.ones(4), impl=impl)
    assert weights[:3].tolist() == [1.0] * 3  # one segment; one beside the terminal
    assert (weights[3:] != 1).any()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("form", FORMS)
def test_scores_that_are_not_finite_count_as_0(form, impl):
    segments = segments_of([[2, 1, 3]])
    advantages = torch.tensor([1.5])
    zeroed = segment_credit(torch.tensor([0.4, 0.0, -0.2]), segments, advantages, form=form, impl=impl)
    for bad in (math.nan, math.inf, -math.inf):
        result = segment_credit(torch.tensor([0.4, bad, -0.2]), segments, advantages, form=form, impl=impl)
        assert torch.equal(result.token_advantages, zeroed.token_advantages)
        assert torch.equal(result.weights, zeroed.weights)


@pytest.mark.parametrize("form", FORMS)
def test_a_tiny_scale_in_a_tensor(form):
    """One whose inverse is no float32 clips all scores, as a number of 1e-36 does."""
    segments, scores, advantages = segments_of([[2, 1, 1]]), torch.tensor([1.0, -2.0, 0.0]), torch.tensor([0.5])
    wanted = segment_credit(scores, segments, advantages, form=form, scale=1e-36)
    for scale in (torch.tensor(1e-37), torch.tensor(1e-40)):
        for x, y in zip(segment_credit(scores, segments, advantages, form=form, scale=scale), wanted, strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("form", FORMS)
def test_empty_calls_and_masked_rollouts(form, impl, device):
    for lengths in ([], [[]], [[0]], [[], [0, 0]]):
        segments = segments_of(lengths, [True] * len(lengths), device)
        credit, weights = segment_credit(
            torch.zeros(segments.num_segments, device=device), segments, torch.ones(len(lengths), device=device), form=form, impl=impl
        )
        assert credit.shape == (0,)
        assert weights.tolist() == [1.0] * segments.num_segments
    segments = segments_of([[1, 2], [2, 1, 1]], [False, True], device)
    mask = torch.tensor([0, 0, 0, 1, 1, 1, 1], dtype=torch.bool, device=device)  # rollout 0 masked whole
    scores = torch.tensor([1.0, -1.0, 1.0, -1.0, 0.0], device=device)
    credit, weights = segment_credit(scores, segments, torch.ones(2, device=device), mask=mask, form=form, impl=impl)
    assert credit[:3].tolist() == [0.0] * 3
    assert weights.isfinite().all()
    clean = segment_credit(scores[2:], segments_of([[2, 1, 1]], [True], device), torch.ones(1, device=device), form=form, scale=1.0, impl=impl)
    both = segment_credit(scores, segments, torch.ones(2, device=device), mask=mask, form=form, scale=1.0, impl=impl)
    assert torch.equal(both.token_advantages[3:], clean.token_advantages)


def test_many_rows(device):
    lengths = [[1, 2, 5] * 20] * 450  # 72,000 tokens
    segments = segments_of(lengths, [True] * 450, device)
    scores, advantages = torch.randn(segments.num_segments, device=device), torch.randn(450, device=device)
    credit, weights = segment_credit(scores, segments, advantages)
    total = torch.zeros(450, dtype=torch.float64, device=device).index_add(0, segments.sequence_ids(), weights.double()[segments.segment_ids()])
    torch.testing.assert_close(total, torch.full_like(total, 160.0), rtol=1e-6, atol=0)
    assert torch.equal(credit, (advantages[segments.segment_sequence_ids()] * weights)[segments.segment_ids()])


def test_no_gradient_and_views():
    segments = segments_of([[2, 1], [1, 1]])
    scores, advantages = torch.randn(4, 3)[:, 1].requires_grad_(), torch.randn(2, 2)[:, 0].requires_grad_()
    credit, weights = segment_credit(scores, segments, advantages)
    assert not credit.requires_grad
    assert not weights.requires_grad
    contiguous = segment_credit(scores.detach().clone(), segments, advantages.detach().clone())
    assert torch.equal(credit, contiguous.token_advantages)


# 5. Registration


@pytest.mark.parametrize("form", FORMS)
def test_opcheck(form, device):
    segments = segments_of(LENGTHS, TERMINAL, device)
    mask = torch.rand(segments.num_tokens, device=device) < 0.7
    head = segments.token_offsets, segments.sequence_offsets
    advantages = torch.randn(segments.num_sequences, device=device)
    reliability, scale = torch.rand(segments.num_sequences, device=device), torch.tensor(0.5, device=device)
    for scores in (torch.randn(segments.num_segments, device=device), torch.randn(segments.num_segments, 2, device=device)[:, 1]):
        n = segments.num_tokens
        op = torch.ops.acpo_kernels.segment_credit.default
        torch.library.opcheck(op, (scores, *head, advantages, n, segments.terminal, mask, form, 0.5, 0.5, 1.0, None, True, None, None))
        torch.library.opcheck(op, (scores, *head, advantages, n, None, None, form, 0.5, 0.5, None, reliability, False, None, scale))


@pytest.mark.parametrize("form", FORMS)
def test_compiles_in_one_graph(form):
    compiled = torch.compile(segment_credit, fullgraph=True, backend="aot_eager")
    for steps in (1, 2, 15, 16, 17):
        segments = segments_of([[2] * steps, [1]], [True, False])
        scores, advantages = torch.randn(steps + 1), torch.randn(2)
        eager, actual = segment_credit(scores, segments, advantages, form=form), compiled(scores, segments, advantages, form=form)
        assert torch.equal(actual.token_advantages, eager.token_advantages)
        assert torch.equal(actual.weights, eager.weights)


# 6. Bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": torch.ones(3)}, r"scores must have shape \[S\] = \(2,\), got \(3,\)"),
        ({"scores": torch.ones(2, dtype=torch.int64)}, "scores must have dtype float32"),
        ({"advantages": torch.ones(5)}, r"advantages must have shape \[B\] = \(1,\), got \(5,\)"),
        ({"advantages": torch.ones(1, device="meta")}, "advantages must be on cpu, got meta"),
        ({"mask": torch.ones(4, dtype=torch.bool)}, r"mask must have shape \[N\] = \(5,\), got \(4,\)"),
        ({"mask": torch.ones(5)}, "mask must have dtype bool"),
        ({"form": "softmax"}, "form must be one of 'weights', 'additive', got 'softmax'"),
        ({"terminal": "skip"}, "terminal must be one of 'exclude', 'include', got 'skip'"),
        ({"bound": -0.1}, "bound must be at least 0"),
        ({"bound": 1.0}, "bound must be below 1"),
        ({"gain": -1.0}, "gain must be at least 0"),
        ({"reliability": 1.5}, "reliability must be at most 1"),
        ({"reliability": -0.5}, "reliability must be at least 0"),
        ({"reliability": math.nan}, "reliability must be finite"),
        ({"reliability": torch.ones(2)}, r"reliability must be a number, 0-d or \[B\] = \(1,\), got \(2,\)"),
        ({"scale": 0.0}, "scale must be greater than 0"),
        ({"scale": 1e-37}, "scale must be at least 1e-36"),  # float32 has no inverse of it
        ({"scale": 1e37}, r"scale must be at most 1e\+36"),
        ({"scale": torch.ones(1)}, "scale must have 0 dimensions"),
        ({"impl": "triton"}, "impl must be one of None, 'reference'"),
    ],
)
def test_bad_input(change, message):
    arguments = {"scores": torch.ones(2), "segments": segments_of([[2, 3]]), "advantages": torch.ones(1)} | change
    positional = [arguments.pop(name) for name in ("scores", "segments", "advantages")]
    with pytest.raises(ValueError, match=message):
        segment_credit(*positional, **arguments)


def test_bad_type():
    with pytest.raises(TypeError, match="gain must be a number, got str"):
        segment_credit(torch.ones(1), segments_of([[1]]), torch.ones(1), gain="half")
