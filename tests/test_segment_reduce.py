"""segment_reduce: sum, mean and maximum over segments and sequences."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ragged import LENGTHS, assert_right, hierarchies, segments_of, sequences, tokens

from acpo_kernels import _cpu, _torch, segment_reduce

REDUCE, LEVEL = ("sum", "mean", "max"), ("segment", "sequence")
HALF = (torch.bfloat16, torch.float16)


def loops(values, segments, reduce, level, mask):
    """The definition, token by token, in Python floats."""
    kept = [True] * segments.num_tokens if mask is None else mask.tolist()
    groups = [list(tokens(segments, s)) for s in range(segments.num_segments)]
    if level == "sequence":
        groups = [[t for s in of_sequence for t in groups[s]] for _, of_sequence in sequences(segments)]
    out = []
    for group in groups:
        xs = [values[t] for t in group if kept[t]]
        out.append(max(xs, default=-math.inf) if reduce == "max" else math.fsum(xs) / (max(len(xs), 1) if reduce == "mean" else 1))
    return out


# 1. Oracle


def test_by_hand(device):
    segments = segments_of([[2, 1], [], [0, 3]], device=device)
    values = torch.tensor([1.0, 2.0, 4.0, -1.0, 8.0, -16.0], device=device)
    mask = torch.tensor([1, 1, 0, 1, 1, 1], dtype=torch.bool, device=device)
    for impl in (None, "reference"):
        assert segment_reduce(values, segments, impl=impl).tolist() == [3.0, 4.0, 0.0, -9.0]
        assert segment_reduce(values, segments, reduce="mean", impl=impl).tolist() == [1.5, 4.0, 0.0, -3.0]
        assert segment_reduce(values, segments, reduce="max", impl=impl).tolist() == [2.0, 4.0, -math.inf, 8.0]
        assert segment_reduce(values, segments, level="sequence", impl=impl).tolist() == [7.0, 0.0, -9.0]
        assert segment_reduce(values, segments, mask=mask, impl=impl).tolist() == [3.0, 0.0, 0.0, -9.0]
        assert segment_reduce(values, segments, reduce="mean", level="sequence", mask=mask, impl=impl).tolist() == [1.5, 0.0, -3.0]
        assert segment_reduce(values, segments, reduce="max", mask=mask, impl=impl).tolist() == [2.0, -math.inf, -math.inf, 8.0]


def test_gradients_by_hand():
    segments = segments_of([[3, 0], [2]])
    values = torch.tensor([5.0, 1.0, 5.0, 2.0, 3.0], requires_grad=True)
    mask = torch.tensor([1, 1, 1, 0, 1], dtype=torch.bool)
    upstream = torch.tensor([6.0, 100.0, 10.0])

    def grad(reduce):
        return torch.autograd.grad(segment_reduce(values, segments, reduce=reduce, mask=mask), values, upstream)[0].tolist()

    assert grad("sum") == [6.0, 6.0, 6.0, 0.0, 10.0]
    assert grad("mean") == [2.0, 2.0, 2.0, 0.0, 10.0]
    assert grad("max") == [3.0, 0.0, 3.0, 0.0, 10.0]  # two tokens attain the maximum and share it


@pytest.mark.parametrize("reduce", REDUCE)
@pytest.mark.parametrize("level", LEVEL)
@pytest.mark.parametrize("impl", [None, "reference"])
def test_gradcheck(reduce, level, impl):
    segments = segments_of([[2, 1, 3], [2]])  # none is empty: the finite difference of -inf is not a number
    mask = torch.tensor([1, 1, 1, 0, 1, 1, 1, 0], dtype=torch.bool)
    values = torch.randn(2, segments.num_tokens, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda x: segment_reduce(x, segments, reduce=reduce, level=level, mask=mask, impl=impl), values)


# 2. Implementation against the oracle


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("level", LEVEL)
@pytest.mark.parametrize("reduce", REDUCE)
def test_against_the_reference(reduce, level, masked, dtype, device):
    segments = segments_of([*LENGTHS, (300, 70)], device=device)
    mask = torch.rand(segments.num_tokens, device=device) < 0.7 if masked else None
    inputs = torch.randn(3, segments.num_tokens, device=device).mul(3).round(decimals=1).to(dtype)  # some maxima are attained twice
    upstream = torch.randn(3, segments.num_segments if level == "segment" else segments.num_sequences, device=device)

    def forward_backward(values, impl):
        values = values.clone().requires_grad_()
        out = segment_reduce(values, segments, reduce=reduce, level=level, mask=mask, impl=impl)
        return out.detach(), torch.autograd.grad(out, values, upstream.to(out.dtype))[0]

    actual, actual_grad = forward_backward(inputs, None)
    working, working_grad = forward_backward(inputs if dtype == torch.float64 else inputs.float(), "reference")
    exact, exact_grad = forward_backward(inputs.double(), "reference")
    assert actual.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert actual_grad.dtype == dtype
    assert_right("values", actual, working, exact)
    assert_right("gradient", actual_grad, working_grad, exact_grad, gradient_dtype=dtype)


# 3. Properties


@given(hierarchies(), st.sampled_from(REDUCE), st.sampled_from(LEVEL), st.booleans())
def test_the_definition_token_by_token(case, reduce, level, masked):
    segments, mask = case
    mask = mask if masked else None
    values = torch.randn(segments.num_tokens, dtype=torch.float64)
    wanted = torch.tensor(loops(values.tolist(), segments, reduce, level, mask), dtype=torch.float64)
    for impl in (None, "reference"):
        actual = segment_reduce(values, segments, reduce=reduce, level=level, mask=mask, impl=impl)
        torch.testing.assert_close(actual, wanted, rtol=1e-14, atol=1e-14)


@given(hierarchies())
def test_levels_compose(case):
    """Segment sums add to sequence sums and segment maxima to sequence maxima; integers make both exact."""
    segments, mask = case
    values = torch.randint(-50, 50, (segments.num_tokens,)).float()
    of_sequence = segments.segment_sequence_ids()
    sums = torch.zeros(segments.num_sequences).index_add(0, of_sequence, segment_reduce(values, segments, mask=mask))
    assert torch.equal(sums, segment_reduce(values, segments, level="sequence", mask=mask))
    maxima = torch.full((segments.num_sequences,), -math.inf)
    maxima = maxima.scatter_reduce(0, of_sequence, segment_reduce(values, segments, reduce="max", mask=mask), "amax")
    assert torch.equal(maxima, segment_reduce(values, segments, reduce="max", level="sequence", mask=mask))


@given(hierarchies(), st.sampled_from(REDUCE), st.sampled_from(LEVEL))
def test_a_channel_alone_and_a_sequence_alone_are_bitwise_the_same(case, reduce, level):
    segments, mask = case
    values = torch.randn(3, segments.num_tokens)
    together = segment_reduce(values, segments, reduce=reduce, level=level, mask=mask)
    for c in range(3):
        assert torch.equal(segment_reduce(values[c], segments, reduce=reduce, level=level, mask=mask), together[c])
    cu_seqlens = segments.cu_seqlens.tolist()
    for b, of_sequence in sequences(segments):
        alone = segments_of([[len(tokens(segments, s)) for s in of_sequence]])
        here = slice(cu_seqlens[b], cu_seqlens[b + 1])
        result = segment_reduce(values[:, here], alone, reduce=reduce, level=level, mask=mask[here])
        assert torch.equal(result, together[:, list(of_sequence)] if level == "segment" else together[:, b : b + 1])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("level", LEVEL)
@pytest.mark.parametrize("reduce", REDUCE)
def test_the_number_of_threads_changes_no_bit(reduce, level, masked):
    """Pieces of 8192 tokens and shares of 32768 on a ragged hierarchy: lengths around both, empty groups between and behind."""
    segments = segments_of([[8191, 8192, 0, 8193, 1], [], [40_000, 0, 0], [3] * 3000, [16_384, 32_767, 0]])
    values = torch.randn(3, segments.num_tokens)
    mask = torch.rand(segments.num_tokens) < 0.5 if masked else None

    def forward_backward(threads):
        torch.set_num_threads(threads)
        leaf = values.clone().requires_grad_()
        out = segment_reduce(leaf, segments, reduce=reduce, level=level, mask=mask)
        return out.detach(), torch.autograd.grad(out, leaf, torch.arange(out.numel()).reshape(out.shape).float())[0]

    one = forward_backward(1)
    for threads in (2, 5):
        for x, y in zip(forward_backward(threads), one, strict=True):
            assert torch.equal(x, y)
    if _cpu.available:  # which adds up in double and rounds once; PyTorch adds float32
        exact = segment_reduce(values.double(), segments, reduce=reduce, level=level, mask=mask, impl="reference")
        torch.testing.assert_close(one[0].double(), exact, rtol=2**-24, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF])
@pytest.mark.parametrize("level", LEVEL)
@pytest.mark.parametrize("reduce", REDUCE)
def test_the_closed_form_of_the_gradient_is_the_same_in_pytorch(reduce, level, dtype):
    segments = segments_of(LENGTHS)
    values = torch.randn(2, segments.num_tokens).round(decimals=1).to(dtype)
    for mask in (None, torch.rand(segments.num_tokens) < 0.7):
        output = segment_reduce(values, segments, reduce=reduce, level=level, mask=mask)
        offsets = segments.token_offsets, segments.sequence_offsets
        arguments = (torch.randn_like(output), *offsets, reduce, level, mask, segments.num_tokens, dtype, values, output)
        torch.testing.assert_close(
            torch.ops.acpo_kernels.segment_reduce_backward(*arguments), _torch.segment_reduce_backward(*arguments), rtol=1e-6, atol=1e-7
        )


# 4. Edges


@pytest.mark.parametrize("impl", [None, "reference"])
def test_a_nan_is_the_maximum_of_its_segment_alone(impl):
    segments = segments_of([[9, 30], [20]])
    for at in (0, 8, 9, 25, 38, 58):
        values = torch.randn(59)
        values[at] = math.nan
        out = segment_reduce(values, segments, reduce="max", impl=impl)
        assert out.isnan().nonzero().tolist() == [[int(segments.segment_ids()[at])]]


@pytest.mark.skipif(not _cpu.available, reason="built without the C++ extension")
def test_offsets_that_were_overwritten_are_an_error_not_a_read_out_of_bounds():
    for offsets, at, wrong in (("token_offsets", 1, 99), ("token_offsets", 2, 6), ("token_offsets", 0, -1), ("sequence_offsets", 1, 7)):
        segments = segments_of([[2, 3]])
        getattr(segments, offsets)[at] = wrong
        with pytest.raises(ValueError, match=f"{offsets} must start at 0, not decrease, and end at"):
            segment_reduce(torch.ones(5), segments)


@pytest.mark.parametrize("impl", [None, "reference"])
@pytest.mark.parametrize("reduce", REDUCE)
def test_nothing_to_reduce(reduce, impl, device):
    for lengths in ([], [[]], [[0]], [[0, 0], [], [0]]):
        segments = segments_of(lengths, device=device)
        for channels in ((), (2,), (0,)):
            values = torch.zeros(*channels, 0, device=device, requires_grad=True)
            for level, size in (("segment", segments.num_segments), ("sequence", segments.num_sequences)):
                out = segment_reduce(values, segments, reduce=reduce, level=level, impl=impl)
                assert out.shape == (*channels, size)
                assert (out == (-math.inf if reduce == "max" else 0.0)).all()
                assert torch.autograd.grad(out.sum(), values)[0].shape == values.shape
    assert segment_reduce(torch.zeros(0, 3, device=device), segments_of([[3]], device=device), reduce=reduce, impl=impl).shape == (0, 1)


@pytest.mark.parametrize("impl", [None, "reference"])
@pytest.mark.parametrize("reduce", REDUCE)
def test_nan_in_masked_tokens_is_harmless(reduce, impl, device):
    segments = segments_of([[2, 1], [3]], device=device)
    mask = torch.tensor([1, 0, 0, 0, 1, 1], dtype=torch.bool, device=device)
    clean = torch.randn(6, device=device)
    dirty = torch.where(mask, clean, math.nan).requires_grad_()
    out = segment_reduce(dirty, segments, reduce=reduce, mask=mask, impl=impl)
    assert torch.equal(out, segment_reduce(clean, segments, reduce=reduce, mask=mask, impl=impl))
    (grad,) = torch.autograd.grad(out[mask.new_tensor([1, 0, 1], dtype=torch.bool)].sum(), dirty)
    assert grad.isfinite().all()
    assert (grad[~mask] == 0).all()


def test_maxima_of_infinite_values(device):
    segments = segments_of([[2, 2, 0]], device=device)
    values = torch.tensor([-math.inf, -math.inf, -math.inf, -200.0], device=device, requires_grad=True)
    mask = torch.tensor([1, 1, 1, 1], dtype=torch.bool, device=device)
    out = segment_reduce(values, segments, reduce="max", mask=mask)
    assert out.tolist() == [-math.inf, -200.0, -math.inf]
    (grad,) = torch.autograd.grad(out, values, torch.tensor([2.0, 1.0, 5.0], device=device))
    assert grad.tolist() == [1.0, 1.0, 0.0, 1.0]  # as torch.amax: equally among those that attain it
    mask[0] = False
    for impl in (None, "reference"):
        out = segment_reduce(values, segments, reduce="max", mask=mask, impl=impl)
        assert torch.autograd.grad(out[0], values)[0].tolist() == [0.0, 1.0, 0.0, 0.0], "a masked token attains nothing"


def test_views_are_read_in_place(device):
    segments = segments_of([[2, 3]], device=device)
    values = torch.randn(5, 4, device=device)
    assert torch.equal(segment_reduce(values.T, segments), segment_reduce(values.T.contiguous(), segments))
    assert torch.equal(segment_reduce(values[:, 1], segments), segment_reduce(values[:, 1].clone(), segments))
    expanded = torch.ones((), device=device).expand(3, 5)
    assert segment_reduce(expanded, segments).tolist() == [[2.0, 3.0]] * 3


@pytest.mark.parametrize("reduce", REDUCE)
def test_many_tiny_and_one_huge(reduce, device):
    segments = segments_of([[1] * 66_000, [66_000]], device=device)
    values = torch.randint(-8, 8, (segments.num_tokens,), device=device).float()  # integers: every order of adding is exact
    out = segment_reduce(values, segments, reduce=reduce)
    assert torch.equal(out[:66_000], values[:66_000])
    huge = values[66_000:].double()
    assert out[-1] == {"sum": huge.sum(), "mean": huge.sum() / 66_000, "max": huge.max()}[reduce].float()


def test_gradients_that_are_not_asked_for_cost_nothing():
    values = torch.randn(3)
    assert not segment_reduce(values, segments_of([[3]])).requires_grad


# 5. Registration


@pytest.mark.parametrize("reduce", REDUCE)
def test_opcheck(reduce, device):
    segments = segments_of(LENGTHS, device=device)
    mask = torch.rand(segments.num_tokens, device=device) < 0.7
    compact = torch.randn(2, segments.num_tokens, device=device)
    permuted = torch.randn(segments.num_tokens, 2, device=device).T
    offsets = segments.token_offsets, segments.sequence_offsets
    for values in (compact.clone().requires_grad_(), permuted.requires_grad_(), compact[0].clone().requires_grad_()):
        for level in LEVEL:
            torch.library.opcheck(torch.ops.acpo_kernels.segment_reduce.default, (values, *offsets, reduce, level, mask))
            values = values.detach()
            output = segment_reduce(values, segments, reduce=reduce, level=level, mask=mask)
            saved = (values, output) if reduce == "max" else (None, None)
            arguments = (torch.randn_like(output), *offsets, reduce, level, mask, segments.num_tokens, torch.float32, *saved)
            torch.library.opcheck(torch.ops.acpo_kernels.segment_reduce_backward.default, arguments)


@pytest.mark.parametrize("reduce", REDUCE)
def test_compiles_in_one_graph(reduce):
    segments = segments_of([[2, 1, 3], [2]])
    compiled = torch.compile(segment_reduce, fullgraph=True, backend="aot_eager")
    for channels in (1, 2, 3, 16):
        values = torch.randn(channels, segments.num_tokens, requires_grad=True)
        eager, actual = segment_reduce(values, segments, reduce=reduce), compiled(values, segments, reduce=reduce)
        assert torch.equal(actual, eager)
        assert torch.equal(torch.autograd.grad(actual.sum(), values)[0], torch.autograd.grad(eager.sum(), values)[0])


def test_second_derivatives_raise():
    values = torch.randn(5, requires_grad=True)
    (grad,) = torch.autograd.grad(segment_reduce(values, segments_of([[2, 3]])).square().sum(), values, create_graph=True)
    with pytest.raises(RuntimeError, match="has no derivative"):
        grad.sum().backward()


# 6. Bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": torch.ones(4)}, r"values must have shape \[N\] or \[C,N\] with N = 5, got \(4,\)"),
        ({"values": torch.ones(1, 1, 5)}, r"values must have shape \[N\] or \[C,N\]"),
        ({"values": torch.ones(5, dtype=torch.int64)}, "values must have dtype float32, bfloat16, float16, float64, got int64"),
        ({"values": torch.ones(5, device="meta")}, "values must be on cpu, got meta"),
        ({"reduce": "min"}, "reduce must be one of 'sum', 'mean', 'max', got 'min'"),
        ({"level": "token"}, "level must be one of 'segment', 'sequence', got 'token'"),
        ({"mask": torch.ones(4, dtype=torch.bool)}, "mask must have shape"),
        ({"mask": torch.ones(5)}, "mask must have dtype bool, got float32"),
        ({"impl": "triton"}, "impl must be one of None, 'reference', got 'triton'"),
    ],
)
def test_bad_input(change, message):
    arguments = {"values": torch.ones(5), "segments": segments_of([[2, 3]])} | change
    with pytest.raises(ValueError, match=message):
        segment_reduce(arguments.pop("values"), arguments.pop("segments"), **arguments)
    with pytest.raises(TypeError, match=r"values must be a torch\.Tensor, got list"):
        segment_reduce([1.0], segments_of([[1]]))
