"""linear_logprob_entropy and linear_hindsight_information: the same head, so the same tests. The edges (4) have a file of their own."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from linear_logprob_entropy_cases import IMPLS, NAMES, forward_backward, inputs
from ragged import assert_right

from acpo_kernels import HindsightInformation, _torch, hindsight_information, linear_hindsight_information, linear_logprob_entropy
from acpo_kernels.reference import head_logits, logprob_entropy

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


# 1. Oracle


@pytest.mark.parametrize("impl", IMPLS)
def test_by_hand(impl, device):
    # Logits (log 1, log 2, log 5) in row 0 by the weight, uniform in row 1 where the hidden state is 0, and the bias alone below.
    weight = torch.tensor([[1.0], [2.0], [5.0]], dtype=torch.float64, device=device).log()
    hidden, ids = torch.tensor([[1.0], [0.0]], dtype=torch.float64, device=device), torch.tensor([2, 0], device=device)
    p = (1 / 8, 2 / 8, 5 / 8)
    entropy = -sum(x * math.log(x) for x in p)
    logp_, entropy_ = linear_logprob_entropy(hidden, weight, ids, impl=impl)
    assert logp_.tolist() == pytest.approx([math.log(5 / 8), -math.log(3)], rel=1e-14)
    assert entropy_.tolist() == pytest.approx([entropy, math.log(3)], rel=1e-14)
    bias = weight[:, 0]
    with_bias = linear_logprob_entropy(hidden, torch.zeros_like(weight), ids, bias=bias, impl=impl)
    assert with_bias.logp.tolist() == pytest.approx([math.log(5 / 8), math.log(1 / 8)], rel=1e-14)
    halved = linear_logprob_entropy(hidden * 2, weight, ids, temperature=2.0, impl=impl)
    assert halved.logp.tolist() == pytest.approx(logp_.tolist(), rel=1e-14)
    capped = linear_logprob_entropy(hidden, weight, ids, softcap=0.5, impl=impl)
    z = [0.5 * math.tanh(2 * math.log(x)) for x in (1, 2, 5)]
    assert float(capped.logp[0]) == pytest.approx(z[2] - math.log(sum(map(math.exp, z))), rel=1e-14)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradcheck(softcap, impl):
    hidden, weight, ids, bias = (x.requires_grad_() if x.is_floating_point() else x for x in inputs(5, 4, 3, torch.float64))
    ids[1] = -100
    mask = torch.tensor([1, 1, 1, 0, 1], dtype=torch.bool)
    temperature = torch.rand(5, dtype=torch.float64) + 0.5

    def both(hidden, weight, bias):
        return tuple(linear_logprob_entropy(hidden, weight, ids, bias=bias, temperature=temperature, softcap=softcap, mask=mask, impl=impl))

    torch.autograd.gradcheck(both, (hidden, weight, bias))


# 2. Implementation against the oracle


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "vocab", "width"), [(1, 1, 1), (2, 2, 3), (70, 37, 8), (130, 1009, 24)])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_against_the_reference(rows, vocab, width, softcap, dtype, device):
    hidden, weight, ids, bias = inputs(rows, vocab, width, dtype, device)
    mask = torch.rand(rows, device=device) < 0.8
    temperature = torch.rand(rows, device=device) + 0.5
    upstream = [torch.randn(rows, device=device) for _ in range(2)]

    def run(kind, impl):
        return forward_backward(
            hidden.to(kind), weight.to(kind), ids, bias.to(kind), *(g.to(kind) if kind == torch.float64 else g for g in upstream),
            temperature=temperature, softcap=softcap, mask=mask, impl=impl,
        )  # fmt: skip

    actual, exact = run(dtype, None), run(torch.float64, "reference")
    single = exact if dtype == torch.float64 else run(torch.float32, "reference")
    for i, (name, x, y, z) in enumerate(zip(NAMES, actual, single, exact, strict=True)):
        assert x.dtype == (dtype if i >= 2 or dtype == torch.float64 else torch.float32), name
        assert_right(name, x, y, z, factor=4.0, gradient_dtype=dtype if i >= 2 else None)


@pytest.mark.parametrize("dtype", DTYPES)
def test_hindsight_against_the_reference(dtype, device):
    hidden, weight, ids, bias = inputs(70, 37, 8, dtype, device)
    other = (hidden + 0.3 * torch.randn(70, 8, device=device)).to(dtype)
    mask = torch.rand(70, device=device) < 0.8
    temperature = torch.rand(70, device=device) + 0.5

    def run(kind, impl):
        return linear_hindsight_information(
            hidden.to(kind), other.to(kind), weight.to(kind), ids, bias=bias.to(kind), temperature=temperature, softcap=5.0, mask=mask, impl=impl
        )

    actual, exact = run(dtype, None), run(torch.float64, "reference")
    single = exact if dtype == torch.float64 else run(torch.float32, "reference")
    for name, x, y, z in zip(HindsightInformation._fields, actual, single, exact, strict=True):
        assert_right(name, x, y, z, factor=4.0)


def test_logits_that_are_rounded_fail_the_budget():
    hidden, weight, ids, _ = inputs(64, 500, 16, torch.bfloat16)
    exact = linear_logprob_entropy(hidden.double(), weight.double(), ids, impl="reference")
    single = linear_logprob_entropy(hidden.float(), weight.float(), ids, impl="reference")
    rounded = logprob_entropy((hidden @ weight.T), ids)  # what `lm_head` and then a float32 softmax do
    for name, x, y, z in zip(NAMES, rounded, single, exact, strict=False):
        with pytest.raises(AssertionError, match="budget"):
            assert_right(name, x, y, z, factor=4.0)


# 3. Properties


@given(st.integers(1, 20), st.integers(1, 30), st.integers(1, 6), st.integers(0, 2**32 - 1), st.sampled_from([None, 4.0]))
def test_it_is_the_head_and_then_the_operation_on_logits(rows, vocab, width, seed, softcap):
    torch.manual_seed(seed)
    hidden, weight, ids, bias = inputs(rows, vocab, width, torch.float64)
    other, mask = torch.randn_like(hidden), torch.rand(rows) < 0.8
    settings = dict(temperature=0.7, mask=mask)
    logits, hindsight = (head_logits(x, weight, bias, softcap) for x in (hidden, other))
    actual = linear_logprob_entropy(hidden, weight, ids, bias=bias, softcap=softcap, **settings)
    for x, y in zip(actual, logprob_entropy(logits, ids, **settings), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-13)
    actual = linear_hindsight_information(hidden, other, weight, ids, bias=bias, softcap=softcap, **settings)
    for x, y in zip(actual, hindsight_information(logits, hindsight, ids, **settings), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("vocab", "width"), [(17, 5), (1003, 32), (40_001, 4)])
def test_a_row_is_bitwise_the_same_alone_in_any_batch_and_at_any_position(vocab, width, dtype, device, monkeypatch):
    """Contract line 5, with V past the size where torch splits a lone row over its threads; 70 rows are two tiles there. On CUDA float64 is
    torch's own, whose sums are split by how many rows there are: there to its rounding."""

    def same(x, y):
        return torch.allclose(x, y, rtol=1e-13, atol=1e-13) if device.type == "cuda" and dtype == torch.float64 else torch.equal(x, y)

    if vocab > 40_000:
        monkeypatch.setattr(_torch, "TILE_ELEMENTS", {"cpu": 0, "cuda": 0})
    hidden, weight, ids, bias = inputs(70, vocab, width, dtype, device)
    upstream = torch.randn(70, device=device), torch.randn(70, device=device)
    whole = forward_backward(hidden, weight, ids, bias, *upstream)[:3]
    both = linear_hindsight_information(hidden, hidden.flip(0), weight, ids, bias=bias)
    for first, count in ((0, 1), (37, 1), (69, 1), (63, 2), (11, 15), (30, 17)) if vocab < 40_000 else ((37, 1), (69, 1), (63, 2)):
        rows = slice(first, first + count)
        part = forward_backward(hidden[rows], weight, ids[rows], bias, *(g[rows] for g in upstream))[:3]
        for name, x, y in zip(NAMES, part, whole, strict=False):
            assert same(x, y[rows]), f"{name} of {rows}"
        part = linear_hindsight_information(hidden[rows], hidden.flip(0)[rows], weight, ids[rows], bias=bias)
        for name, x, y in zip(HindsightInformation._fields, part, both, strict=True):
            assert same(x, y[rows]), f"{name} of {rows}"
    order = torch.randperm(70, device=device)
    moved = forward_backward(hidden[order], weight, ids[order], bias, *(g[order] for g in upstream))[:3]
    for name, x, y in zip(NAMES, moved, whole, strict=False):
        assert same(x, y[order]), name


def test_a_batch_of_several_tiles():
    rows = 2 * _torch.tile_rows(50) + 1  # the last tile holds one row
    hidden, weight, ids, bias = inputs(rows, 50, 6)
    whole = forward_backward(hidden, weight, ids, bias)
    exact = forward_backward(hidden.double(), weight.double(), ids, bias.double(), impl="reference")
    single = forward_backward(hidden, weight, ids, bias, impl="reference")
    for i, (name, x, y, z) in enumerate(zip(NAMES, whole, single, exact, strict=True)):
        assert_right(name, x, y, z, factor=4.0, gradient_dtype=torch.float32 if i >= 2 else None)
    last = forward_backward(hidden[-1:], weight, ids[-1:], bias)
    for name, x, y in zip(NAMES[:3], last, whole, strict=False):
        assert torch.equal(x[0], y[-1]), name
    again = forward_backward(hidden, weight, ids, bias)
    for name, x, y in zip(NAMES, whole, again, strict=True):
        assert torch.equal(x, y), f"{name} of the same call twice"


@pytest.mark.parametrize("impl", IMPLS)
def test_a_tied_weight_gets_both_gradients(impl):
    """A tied embedding is one weight with two gradients: through the embedding and through the head."""
    weight = torch.randn(11, 4, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([3, 3, 7])

    def objective(embedding, head):
        logp, entropy = linear_logprob_entropy(embedding[ids].tanh(), head, ids.flip(0), impl=impl)
        return (logp + 0.3 * entropy).sum()

    (tied,) = torch.autograd.grad(objective(weight, weight), weight)
    apart = [weight.detach().clone().requires_grad_() for _ in range(2)]
    torch.testing.assert_close(tied, sum(torch.autograd.grad(objective(*apart), apart)), rtol=1e-14, atol=1e-14)


# 5. Registration


def test_opcheck(device):
    hidden, weight, ids, bias = inputs(6, 9, 4, device=device)
    temperatures, mask = torch.rand(6, device=device) + 0.5, torch.rand(6, device=device) < 0.7
    other = torch.randn_like(hidden)
    ops = torch.ops.acpo_kernels
    for h, w in ((hidden, weight), (hidden.T.contiguous().T, weight.T.contiguous().T), (hidden.bfloat16(), weight.bfloat16())):
        b = bias.to(h.dtype).requires_grad_()
        torch.library.opcheck(ops.linear_hindsight_information.default, (h, other.to(h.dtype), w, ids, b.detach(), None, temperatures, 3.0, mask))
        h, w = h.detach().requires_grad_(), w.detach().requires_grad_()
        torch.library.opcheck(ops.linear_logprob_entropy.default, (h, w, ids, b, None, temperatures, 3.0, mask))
        torch.library.opcheck(ops.linear_logprob_entropy.default, (h, w.detach(), ids, None, 0.9, None, None, None))
        grad = torch.randn(6, device=device)
        for needs in ([True, True, True], [True, False, False], [False, True, False]):
            saved = ops.linear_logprob_entropy(h.detach(), w.detach(), ids, b.detach(), 1.0, None, None, mask)[1:]
            arguments = (h.detach(), w.detach(), ids, b.detach(), 1.0, None, None, mask, grad, None, *saved, needs)
            torch.library.opcheck(ops.linear_logprob_entropy_backward.default, arguments)


def test_compiles_in_one_graph():
    def objective(hidden, weight, ids):
        logp, entropy = linear_logprob_entropy(hidden.tanh(), weight, ids, softcap=3.0)
        return logp.sum() + 0.1 * entropy.sum() + linear_hindsight_information(hidden, hidden * 2, weight, ids).kl.sum()

    compiled = torch.compile(objective, fullgraph=True, backend="aot_eager")
    for rows in (1, 2, 15, 16, 17):
        hidden, weight, ids, _ = inputs(rows)
        leaves = hidden.requires_grad_(), weight.requires_grad_()
        eager, actual = objective(*leaves, ids), compiled(*leaves, ids)
        assert torch.equal(actual, eager)
        for x, y in zip(torch.autograd.grad(actual, leaves), torch.autograd.grad(eager, leaves), strict=True):
            assert torch.equal(x, y)


# 6. Bad input


BAD = [
    ({"hidden": torch.ones(3)}, "hidden must have 2 dimensions"),
    ({"hidden": torch.ones(3, 4, dtype=torch.int64)}, "hidden must have dtype float32"),
    ({"hidden": torch.ones(3, 0), "weight": torch.ones(5, 0)}, r"hidden must be \[N,H\] with H >= 1, got \(3, 0\)"),
    ({"weight": torch.ones(5, 3)}, r"weight must be \[V,H\] with hidden's H = 4, got \(5, 3\)"),
    ({"weight": torch.ones(0, 4)}, r"weight must be \[V,H\] with V >= 1, got \(0, 4\)"),
    ({"weight": torch.ones(5, 4, dtype=torch.bfloat16)}, r"weight must have hidden's dtype float32 \(outside autocast\), got bfloat16"),
    ({"weight": torch.ones(5, 4).to(torch.float8_e4m3fn)}, r"weight must have dtype .*, got float8_e4m3fn \(fp8 is not supported\)"),
    ({"hidden": torch.ones(3, 4).to(torch.float8_e5m2)}, r"hidden must have dtype .*, got float8_e5m2 \(fp8 is not supported\)"),
    ({"weight": torch.ones(5, 4, device="meta")}, "weight must be on cpu, got meta"),
    ({"bias": torch.ones(4)}, r"bias must have shape \[V\] = \(5,\), got \(4,\)"),
    ({"ids": torch.zeros(2, dtype=torch.int64)}, "ids must have shape the leading dimensions"),
    ({"ids": torch.zeros(3)}, "ids must have dtype int64, int32, got float32"),
    ({"ids": torch.tensor([0, 1, 5])}, r"ids must lie in \[0, V\) with V = 5, or be -100, got 5 at index 2"),
    ({"ids": torch.tensor([-7, 1, 2])}, r"ids must lie in \[0, V\) with V = 5, or be -100, got -7 at index 0"),
    ({"mask": torch.ones(3)}, "mask must have dtype bool"),
    ({"mask": torch.ones(2, dtype=torch.bool)}, "mask must have shape the shape of ids"),
    ({"temperature": 0}, "temperature must be greater than 0"),
    ({"temperature": -1.0}, "temperature must be greater than 0"),
    ({"temperature": torch.ones(2)}, "temperature must have shape the shape of ids"),
    ({"softcap": 0.0}, "softcap must be greater than 0"),
    ({"softcap": -30.0}, "softcap must be greater than 0"),
    ({"temperature": 1e-37}, r"temperature must be at least 1e-(36|16), got 1e-37"),
    ({"temperature": 1e39}, r"temperature must be at most 1e\+36, got 1e\+39"),
    ({"softcap": 1e-39}, "softcap must be at least 1e-36, got 1e-39"),
    ({"softcap": 1e39}, r"softcap must be at most 1e\+30, got 1e\+39"),
    ({"impl": "triton"}, "impl must be one of None, 'reference'"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_input(change, message):
    arguments = dict(hidden=torch.ones(3, 4), weight=torch.ones(5, 4), ids=torch.zeros(3, dtype=torch.int64)) | change
    hidden, weight, ids = (arguments.pop(name) for name in ("hidden", "weight", "ids"))
    with pytest.raises(ValueError, match=message):
        linear_logprob_entropy(hidden, weight, ids, **arguments)
    with pytest.raises(ValueError, match=message):
        linear_hindsight_information(hidden, hidden, weight, ids, **arguments)


def test_bad_hindsight_stream():
    hidden, weight, ids = torch.ones(3, 4), torch.ones(5, 4), torch.zeros(3, dtype=torch.int64)
    for bad, message in (
        (torch.ones(2, 4), "hindsight_hidden must have shape that of hidden"),
        (torch.ones(3, 4, dtype=torch.float64), "hindsight_hidden must have dtype float32, got float64"),
        (torch.ones(3, 4, device="meta"), "hindsight_hidden must be on cpu, got meta"),
    ):
        with pytest.raises(ValueError, match=message):
            linear_hindsight_information(hidden, bad, weight, ids)


def test_what_is_refused_by_name():
    hidden, weight, ids = torch.ones(3, 4), torch.ones(5, 4), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match="impl = 'reference' holds the whole vocabulary: it must be None with a group"):
        linear_logprob_entropy(hidden, weight, ids, group=object(), impl="reference")
    with pytest.raises(TypeError, match="softcap must be a number, got str"):
        linear_logprob_entropy(hidden, weight, ids, softcap="30")
    with pytest.raises(TypeError, match=r"weight must be a torch\.Tensor"):
        linear_logprob_entropy(hidden, [1.0], ids)
