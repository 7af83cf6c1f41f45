"""The Triton kernels on hidden states in the interpreter (`test_triton_interpreter.py` runs this file): log-probs, entropies, gradients."""

from __future__ import annotations

import math

import pytest
import torch
import triton.language as tl
from contract import assert_within_budget
from linear_kernels import DTYPES, NAMES, inputs, narrow_slices  # noqa: F401  (the fixture `narrow`)

from acpo_kernels import _vocabulary_parallel, linear_logprob_entropy, reference
from acpo_kernels._triton import linear_gradient_slice, linear_gradients
from acpo_kernels._triton import linear_logprob_entropy as kernels


def run(hidden, weight, ids, bias=None, grad_logp=None, grad_entropy=None, *, temperature=1.0, softcap=None, mask=None, needs=(True, True, True)):
    """logp, entropy, and the gradients of hidden, weight and bias."""
    number, tensor = (None, temperature) if isinstance(temperature, torch.Tensor) else (temperature, None)
    head = (hidden, weight, ids, bias, number, tensor, softcap, mask)
    results = kernels.forward(*head)
    needs = (*needs[:2], needs[2] and bias is not None)
    return (*results[:2], *linear_gradients.backward(*head, grad_logp, grad_entropy, results[1:], needs))


def oracle(kind, hidden, weight, ids, bias, grad_logp, grad_entropy, **settings):
    leaves = [x.to(kind).requires_grad_() for x in (hidden, weight, bias) if x is not None]
    logp, entropy = linear_logprob_entropy(*leaves[:2], ids, bias=leaves[2] if bias is not None else None, impl="reference", **settings)
    grads = torch.autograd.grad([logp, entropy], leaves, [grad_logp.to(kind), grad_entropy.to(kind)])
    return logp.detach(), entropy.detach(), *grads


def check(hidden, weight, ids, bias, grad_logp, grad_entropy, **settings):
    actual = run(hidden, weight, ids, bias, grad_logp, grad_entropy, **settings)
    single, exact = (oracle(kind, hidden, weight, ids, bias, grad_logp, grad_entropy, **settings) for kind in (torch.float32, torch.float64))
    for i, (name, x, y, z) in enumerate(zip(NAMES, actual, single, exact, strict=False)):
        assert_within_budget(x, y, z, name, factor=4.0, gradient_dtype=hidden.dtype if i >= 2 else None)


SHAPES = [(1, 1, 1, None), (2, 2, 3, 3.0), (15, 37, 8, None), (130, 600, 24, 3.0)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "vocab", "width", "softcap"), SHAPES)
def test_against_the_reference(rows, vocab, width, softcap, dtype, narrow):
    hidden, weight, ids, bias = inputs(rows, vocab, width, dtype)
    mask, temperature = torch.rand(rows) < 0.8, torch.rand(rows) + 0.5
    check(hidden, weight, ids, bias, torch.randn(rows), torch.randn(rows), temperature=temperature, softcap=softcap, mask=mask)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_and_uneven_upstream_gradients(dtype, narrow):
    """Those of a mean over many tokens, below float16's range, and of rows 1e6 apart."""
    hidden, weight, ids, bias = inputs(40, 600, 16, dtype)
    spread = 10.0 ** torch.linspace(-6, 0, 40)
    check(hidden, weight, ids, bias, 1e-2 * torch.randn(40) * spread, 1e-3 * torch.randn(40) * spread)


def test_the_residue_is_what_keeps_the_gradients_exact_before_their_rounding(monkeypatch):
    """In float32, of bfloat16 operands: 1e-5 of the largest with the residue of G, 2e-3 without (a unit of bfloat16 is 8e-3)."""
    hidden, weight, ids, bias = inputs(60, 300, 16, torch.bfloat16)
    upstream = torch.randn(60), torch.randn(60)
    exact = oracle(torch.float64, hidden, weight, ids, bias, *upstream)[2:4]
    head = (hidden, weight, ids, bias, 1.0, None, None, None)
    statistics = kernels.forward(*head)[1:]

    def errors():
        grads = linear_gradients.backward(*head, *upstream, statistics, (True, True, False), dtype=torch.float32)
        return [float((x - y).abs().max() / y.abs().max()) for x, y in zip(grads, exact, strict=False)]

    assert max(errors()) < 2.0**-15
    monkeypatch.setattr(linear_gradient_slice, "KEEP", tl.constexpr(1e30))
    assert min(errors()) > 2.0**-11


@pytest.mark.parametrize("rows", [0, 2, 16, 17])
def test_numbers_of_rows(rows):
    hidden, weight, ids, bias = inputs(rows, 300, 10)
    check(hidden, weight, ids, bias, torch.randn(rows), torch.randn(rows))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_is_bitwise_the_same_alone_in_any_batch_and_at_any_position(dtype, narrow):
    hidden, weight, ids, bias = inputs(140, 530, 9, dtype)  # two row tiles, two slices
    upstream = torch.randn(140), torch.randn(140)
    whole = run(hidden, weight, ids, bias, *upstream)
    again = run(hidden, weight, ids, bias, *upstream)
    for name, x, y in zip(NAMES, whole, again, strict=True):
        assert torch.equal(x, y), f"{name} of the same call twice"
    mask = torch.rand(140) < 0.5  # compaction moves every row
    moved = run(hidden, weight, ids, bias, *upstream, mask=mask)
    order = torch.randperm(140)
    shuffled = run(hidden[order], weight, ids[order], bias, *(g[order] for g in upstream))
    for name, x, y, z in zip(NAMES[:3], whole, moved, shuffled, strict=False):
        assert torch.equal(x[mask], y[mask]) and (y[~mask] == 0).all(), name
        assert torch.equal(x[order], z), name
    for first, count in ((139, 1), (60, 15)):
        rows = slice(first, first + count)
        part = run(hidden[rows], weight, ids[rows], bias, *(g[rows] for g in upstream), needs=(True, False, False))
        for name, x, y in zip(NAMES[:3], part, whole, strict=False):
            assert torch.equal(x, y[rows]), f"{name} of {rows}"


def test_rows_that_do_not_count_reach_nothing(narrow):
    """Masked rows and rows whose gradient is zero hold NaN, are out of range, and change no bit."""
    hidden, weight, ids, bias = inputs(20, 600, 8, torch.bfloat16)
    mask = torch.rand(20) < 0.7
    upstream = torch.where(torch.rand(20) < 0.6, torch.randn(20), 0.0), torch.zeros(20)
    clean = run(hidden, weight, ids, bias, *upstream, mask=mask, temperature=0.75)
    dirty = torch.where(mask.unsqueeze(-1), hidden, math.nan)
    actual = run(
        dirty, weight, torch.where(mask, ids, 10**9), bias, *(torch.where(mask, g, math.nan) for g in upstream), mask=mask,
        temperature=torch.where(mask, 0.75, math.nan),
    )  # fmt: skip
    for name, x, y in zip(NAMES, actual, clean, strict=True):
        assert torch.equal(x, y), name
    silent = upstream[0] == 0
    poisoned = torch.where(silent.unsqueeze(-1), math.nan, hidden)
    actual = run(poisoned, weight, ids, bias, *upstream, mask=mask, temperature=0.75)
    assert actual[0][silent & mask].isnan().all()
    for name, x, y in zip(NAMES[2:], actual[2:], clean[2:], strict=True):
        assert torch.equal(x, y), name
    nothing = run(poisoned, weight, ids, bias, torch.zeros(20), None, mask=mask)
    assert all((g == 0).all() for g in nothing[2:])


def test_nan_rows_and_ids_out_of_range_stay_alone():
    hidden, weight, ids, bias = inputs(6, 300, 8)
    clean = run(hidden, weight, ids, bias, torch.ones(6), torch.ones(6))
    hidden, ids = hidden.clone(), ids.clone()
    hidden[1, 3], ids[2], ids[4], ids[5] = math.nan, 300, -7, -100
    hidden[3] = math.inf
    broken = run(hidden, weight, ids, bias, torch.ones(6), torch.ones(6))
    for name, x, y in zip(NAMES[:3], broken, clean, strict=False):
        assert torch.equal(x[0], y[0]), name
        assert x[1:5].isnan().all() and (x[5] == 0).all(), name
    assert broken[3].isnan().any() and broken[4].isnan().any()


def test_impossible_and_confident_tokens():
    vocab = 700
    weight = torch.zeros(vocab, 2)
    weight[7, 0] = 40.0
    bias = torch.zeros(vocab)
    bias[9] = -math.inf
    hidden, ids = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]), torch.tensor([7, 9, 8])
    logp, entropy, grad_hidden, grad_weight, grad_bias = run(hidden, weight, ids, bias, torch.tensor([1.0, 0.0, 0.0]))
    rest = (vocab - 2) * math.exp(-40.0)
    assert float(logp[0]) == pytest.approx(-rest, rel=1e-5, abs=0)
    assert float(entropy[0]) == pytest.approx(41 * rest, rel=1e-5, abs=0)
    assert float(grad_bias[7]) == pytest.approx(rest, rel=1e-5, abs=0)
    assert logp[1] == -math.inf and float(logp[2]) == pytest.approx(-math.log(vocab - 1), rel=1e-6)
    assert grad_bias[9] == 0
    assert all(x.isfinite().all() for x in (grad_hidden, grad_weight, grad_bias, entropy))
    alone = torch.full((vocab,), -math.inf)
    alone[[7, 9]] = torch.tensor([0.0, -math.inf])
    logp, entropy, *grads = run(hidden[:1], weight, ids[:1], alone, torch.ones(1), torch.ones(1))
    assert logp.item() == 0 and entropy.item() == 0 and all((g == 0).all() for g in grads)
    assert all(x.isnan().all() for x in run(hidden[:1], weight, ids[:1], torch.full((vocab,), -math.inf), torch.ones(1))[:3])


def test_shifted_and_tied_logits():
    weight = torch.randn(300, 3).mul(32).round() / 32  # exact in float32 beside the offset
    weight[100:110] = weight[100]  # some equal, in one tile and in two
    weight[250] = weight[100]
    hidden, ids = torch.tensor([[4.0, 0.0, 1.0]]) * weight[100].sign(), torch.tensor([100])
    plain = kernels.forward(hidden, weight, ids, None, 1.0, None, None, None)
    exact = reference.linear_logprob_entropy(hidden.double(), weight.double(), ids)
    for x, y in zip(plain, exact, strict=False):
        torch.testing.assert_close(x.double(), y, rtol=1e-6, atol=1e-6)
    for offset in (1e4, -200.0):
        shifted = kernels.forward(hidden, weight, ids, torch.full((300,), offset), 1.0, None, None, None)
        assert torch.equal(shifted[0], plain[0]) and torch.equal(shifted[1], plain[1])


def test_strided_operands():
    hidden, weight, ids, bias = inputs(12, 100, 8)
    wide = torch.randn(12, 2, 8)
    wide[:, 1] = hidden
    wanted = run(hidden, weight, ids, bias, torch.ones(12), torch.ones(12))
    for h, w, i in ((wide[:, 1], weight, ids.int()), (hidden.T.contiguous().T, weight.T.contiguous().T, ids)):
        for name, x, y in zip(NAMES, run(h, w, i, bias, torch.ones(12), torch.ones(12)), wanted, strict=True):
            assert torch.equal(x, y), name


def test_a_frozen_operand_costs_no_product(monkeypatch):
    hidden, weight, ids, bias = inputs(5, 50, 4)
    ones = torch.ones(5)
    whole = run(hidden, weight, ids, bias, ones, ones)
    for kernel, needs, kept in (("_weight_gradient_kernel", (True, False, False), 2), ("_hidden_gradient_kernel", (False, True, False), 3)):
        with monkeypatch.context() as patch:
            patch.setattr(linear_gradients, kernel, None)  # a launch would raise
            part = run(hidden, weight, ids, bias, ones, ones, needs=needs)
        assert torch.equal(part[kept], whole[kept])
        assert [p.numel() for i, p in enumerate(part[2:], 2) if i != kept] == [0, 0]


def test_more_rows_than_a_grid_dimension():
    hidden, weight, ids, _ = inputs(66_000, 5, 2)
    ids[:65_990] = -100
    logp, entropy, *_ = kernels.forward(hidden, weight, ids, None, 1.0, None, None, None)
    tail = kernels.forward(hidden[65_990:], weight, ids[65_990:], None, 1.0, None, None, None)
    assert (logp[:65_990] == 0).all() and torch.equal(logp[65_990:], tail[0]) and torch.equal(entropy[65_990:], tail[1])


def test_three_products_of_tf32_keep_the_budget_and_one_does_not():
    """What PRECISION = "tf32x3" stands for, which the interpreter computes in float32."""
    hidden, weight = torch.randn(16, 896), torch.randn(300, 896)

    def halves(x):
        def tf32(x):
            return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)

        high = tf32(x)
        return high, tf32(x - high)

    (a, b), (c, d) = halves(hidden), halves(weight.T.contiguous())
    exact, single = hidden.double() @ weight.double().T, hidden @ weight.T
    assert_within_budget(b @ c + a @ d + a @ c, single, exact, factor=4.0)
    with pytest.raises(AssertionError, match="budget"):
        assert_within_budget(a @ c, single, exact, factor=4.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("by_entropy", [0.0, 1e-3, 1.0])
def test_a_slice_of_the_vocabulary_without_the_targets(by_entropy, dtype):
    """What a rank of `group` hands over: the log-prob's gradient as a tiny one of an entropy that lies far off. It takes part in float16's scale."""
    rows, half = 20, 300
    hidden, weight, ids, _ = inputs(rows, 2 * half, 16, dtype)
    ids = ids % half  # all in the first slice; this is the second
    _, entropy, *rest = kernels.forward(hidden, weight, ids, None, 1.0, None, None, None)
    by_logp, given = torch.randn(rows), torch.full((rows,), by_entropy)
    least = _vocabulary_parallel.LEAST[torch.float32] * by_logp
    away = torch.where(given.abs() > least.abs(), given, least)
    head = (hidden, weight[half:], torch.zeros_like(ids), None, 1.0, None, None, None)
    found = linear_gradients.backward(*head, torch.zeros(rows), away, (entropy + by_logp / away, *rest), (True, True, False))
    wanted = []
    for kind in (torch.float32, torch.float64):
        h, w = (x.to(kind).requires_grad_() for x in (hidden, weight))
        logits = h @ w.T
        log_p = logits.log_softmax(-1)
        own = -torch.cat([torch.zeros(rows, half), torch.ones(rows, half)], 1).to(kind) * log_p.exp()
        own = own * (by_logp.to(kind).unsqueeze(1) + given.to(kind).unsqueeze(1) * (log_p + -(log_p.exp() * log_p).sum(-1, keepdim=True)))
        wanted.append((own @ w, (own.T @ h)[half:]))
    for name, x, y, z in zip(("gradient of hidden", "gradient of weight"), found, *wanted, strict=False):
        assert_within_budget(x, y.detach(), z.detach(), name, factor=4.0, gradient_dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("by_entropy", [0.0, 1e-3])
def test_a_slice_without_the_targets_multiplies_few_residues(by_entropy, dtype, monkeypatch):
    """What counts is the size of the gradient, that of the log-prob's: flat rows have no entry near it, and no block is flagged."""
    flagged, kernel = [], linear_gradients._hidden_gradient_kernel

    class Seen:
        def __getitem__(self, grid):
            return lambda *args, **keywords: (flagged.append(args[2].clone()), kernel[grid](*args, **keywords))

    monkeypatch.setattr(linear_gradients, "_hidden_gradient_kernel", Seen())
    rows, vocab = 128, 2048
    hidden, weight, ids, _ = inputs(rows, vocab, 16, dtype, scale=1e-3)
    _, entropy, *rest = kernels.forward(hidden, weight, ids, None, 1.0, None, None, None)
    away = torch.full((rows,), by_entropy or _vocabulary_parallel.LEAST[torch.float32])
    head = (hidden, weight, torch.zeros_like(ids), None, 1.0, None, None, None)
    linear_gradients.backward(*head, torch.zeros(rows), away, (entropy + 1.0 / away, *rest), (True, False, False))
    assert [flags.shape[0] for flags in flagged] == [rows // 64 * vocab // 64] and not flagged[0].any()


@pytest.mark.parametrize("temperature", [1e-6, 1e-18, 1e-20, 1e-30, 1e-36, 1e30])
def test_temperatures_whose_square_is_no_float(temperature):
    """One below 1e-19: with the chosen token the most likely one all gradients are 0, and none is NaN."""
    hidden, weight, _, _ = inputs(5, 300, 8, torch.float32)
    ids = (hidden @ weight.T).argmax(-1)
    _, _, *grads = run(hidden, weight, ids, None, torch.ones(5), torch.ones(5), temperature=temperature)
    assert all(g is None or g.isfinite().all() for g in grads)
    if temperature <= 1e-18:
        assert all(g is None or not g.any() for g in grads)
