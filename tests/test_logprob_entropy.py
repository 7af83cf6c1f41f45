"""logprob_entropy: the six tests of an operation, and a test for each line of the numerical contract."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch
from contract import assert_within_budget
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from implementations import INTERPRETED, exact, implementation, single  # noqa: F401  (the fixture `run`)

from acpo_kernels import _cpu, logprob_entropy, reference
from acpo_kernels._layout import row_layout

INF, NAN = math.inf, math.nan
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
torch_only = pytest.mark.skipif(INTERPRETED, reason="the interpreter lane tests kernels, not the dispatcher")
quick = settings(deadline=None, max_examples=4 if INTERPRETED else 15, suppress_health_check=[HealthCheck.function_scoped_fixture])


def case(n: int, v: int, dtype=torch.float32, seed: int = 0, scale: float = 3.0):
    g = torch.Generator().manual_seed(seed)
    logits = (torch.randn(n, v, generator=g) * scale).to(dtype)
    ids = torch.randint(0, v, (n,), generator=g)
    if n > 1:
        ids[1] = logits[1].argmax()
    grads = {"grad_logp": torch.randn(n, generator=g), "grad_entropy": torch.randn(n, generator=g)}
    return logits, ids, grads


def check(run, logits, ids, **arguments):
    actual, wanted, plain = (f(logits, ids, **arguments) for f in (run, exact, single))
    for name, a, s, e in zip(("logp", "entropy"), actual, plain, wanted, strict=False):
        assert_within_budget(a, s, e, name)
    assert_within_budget(actual[2], plain[2], wanted[2], "gradient", gradient_dtype=logits.dtype)
    return actual


# 1. Oracle


def test_oracle_by_hand():
    logits = torch.tensor([[math.log(1.0), math.log(2.0), math.log(5.0)]], dtype=torch.float64)
    for impl in (None, "reference"):
        logp, entropy = logprob_entropy(logits, torch.tensor([1]), impl=impl)
        assert logp.item() == pytest.approx(math.log(0.25), rel=1e-14)
        assert entropy.item() == pytest.approx(-(0.125 * math.log(0.125) + 0.25 * math.log(0.25) + 0.625 * math.log(0.625)), rel=1e-14)


@torch_only
@pytest.mark.parametrize("impl", [None, "reference"])
def test_gradcheck(impl):
    logits, ids, _ = case(4, 7)
    logits = logits.double().requires_grad_()
    mask, temperature = torch.tensor([True, True, False, True]), torch.tensor([0.5, 1.0, 1.0, 2.0], dtype=torch.float64)
    ids[3] = -100
    assert torch.autograd.gradcheck(lambda z: tuple(logprob_entropy(z, ids, temperature=temperature, mask=mask, impl=impl)), logits)


def test_closed_form_is_the_gradient_of_the_oracle():
    logits, ids, grads = case(6, 50)
    leaf = logits.double().requires_grad_()
    results = reference.logprob_entropy(leaf, ids, temperature=0.7)
    (wanted,) = torch.autograd.grad(list(results), leaf, [g.double() for g in grads.values()])
    torch.testing.assert_close(exact(logits, ids, temperature=0.7, **grads)[2], wanted, rtol=1e-12, atol=1e-14)


# 2. Implementations against the oracle


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("v", [1, 15, 1000, 4097] if INTERPRETED else [1, 2, 15, 64, 1000, 4095, 4096, 4097, 9001])
def test_budget(run, dtype, v):
    logits, ids, grads = case(5, v, dtype, seed=v)
    check(run, logits, ids, **grads)
    check(run, logits, ids, temperature=0.7, **grads)


def test_budget_large_vocabulary(run):
    logits, ids, grads = case(1 if INTERPRETED else 3, 151_936, seed=5)
    check(run, logits, ids, **grads)
    check(run, logits.bfloat16(), ids, temperature=torch.tensor([0.6, 1.0, 1.7])[: len(ids)], **grads)


def test_rounding_logits_to_bfloat16_breaks_the_budget():
    logits, ids, grads = case(5, 1000)
    rounded = single(logits.bfloat16().float(), ids, **grads)
    for actual, plain, wanted in zip(rounded, single(logits, ids, **grads), exact(logits, ids, **grads), strict=True):
        with pytest.raises(AssertionError, match="budget"):
            assert_within_budget(actual, plain, wanted)


@torch_only
def test_float64_is_exact():
    logits, ids, grads = case(5, 300)
    temperature = torch.tensor([0.5, 1, 2, 1, 1])
    wanted = exact(logits, ids, temperature=temperature, **grads)
    leaf = logits.double().requires_grad_()
    logp, entropy = logprob_entropy(leaf, ids, temperature=temperature)
    (gradient,) = torch.autograd.grad([logp, entropy], leaf, [g.double() for g in grads.values()])
    for actual, e in zip((logp, entropy, gradient), wanted, strict=True):
        assert actual.dtype == torch.float64
        torch.testing.assert_close(actual, e, rtol=1e-12, atol=1e-14)


# 3. Properties


@quick
@given(seed=st.integers(0, 1000), v=st.integers(1, 300), shift=st.integers(-1024, 1024))
def test_shift_invariance(run, seed, v, shift):
    logits, ids, _ = case(3, v, seed=seed)
    logits = (logits * 64).round() / 64  # so that the shift is exact
    for a, b in zip(run(logits, ids), run(logits + shift, ids), strict=True):
        assert torch.equal(a, b)


@quick
@given(seed=st.integers(0, 1000), n=st.integers(1, 7), v=st.integers(1, 600), dtype=st.sampled_from(DTYPES))
def test_rows_do_not_know_each_other(run, seed, n, v, dtype):
    logits, ids, grads = case(n, v, dtype, seed)
    together = run(logits, ids, **grads)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    permuted = run(logits[order], ids[order], **{k: g[order] for k, g in grads.items()})
    alone = [run(logits[i : i + 1], ids[i : i + 1], **{k: g[i : i + 1] for k, g in grads.items()}) for i in range(n)]
    for k in range(3):
        assert torch.equal(together[k][order], permuted[k])
        assert torch.equal(together[k], torch.cat([a[k] for a in alone]))


@quick
@given(seed=st.integers(0, 1000), v=st.integers(1, 600), spread=st.floats(0.0, 60.0))
def test_gradient_sums_to_zero_and_entropy_is_bounded(run, seed, v, spread):
    logits, ids, grads = case(3, v, seed=seed, scale=spread)
    logp, entropy, gradient = run(logits, ids, **grads)
    assert (logp <= 0).all()
    assert (entropy >= 0).all() and (entropy <= math.log(v) + 1e-5).all()
    assert (gradient.double().sum(-1).abs() <= 2e-6 * (1 + gradient.double().abs().sum(-1))).all()


# 4. Edges: the lines of the numerical contract


def test_infinite_logits_contribute_nothing(run):
    logits, ids, grads = case(4, 5000)
    logits[:, ::2] = -INF
    logits[0] = -INF
    logits[0, 7] = 3.0  # the target is the only finite logit
    ids[:] = torch.tensor([7, 1, 4999, 2])  # the last two: finite, and itself -inf
    logits[2, 4999] = 1.0
    logp, entropy, gradient = check(run, logits, ids, **grads)
    assert logp[0] == 0 and entropy[0] == 0 and (gradient[0] == 0).all()
    assert logp[3] == -INF and gradient.isfinite().all()
    dead = (logits == -INF) & (torch.arange(5000) != ids.unsqueeze(-1))
    assert (gradient[dead] == 0).all()


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_only_infinite_logits_before_the_first_finite_one(run, temperature):
    logits, ids, grads = case(2, 13_000)
    logits[:, :8500] = -INF
    ids[:] = 12_999
    check(run, logits, ids, temperature=temperature, **grads)


@pytest.mark.parametrize("v", [3, 40, 9001])
@pytest.mark.parametrize("value", [NAN, INF])
def test_bad_row_is_nan_and_no_other(run, v, value):
    logits, ids, grads = case(5, v)
    logits[1, v // 2] = value
    logits[3] = -INF
    logits[4, :-1] = -INF
    logits[4, 0] = value
    actual = run(logits, ids, **grads)
    good = run(logits[[0, 2]], ids[[0, 2]], **{k: g[[0, 2]] for k, g in grads.items()})
    for a, g in zip(actual, good, strict=True):
        assert a[[1, 3, 4]].isnan().all()
        assert torch.equal(a[[0, 2]], g)


def test_nan_of_any_payload(run):
    logits, ids, grads = case(3, 2000)
    logits.view(torch.int32)[0, 700] = 0x7FC00001
    logits.view(torch.int32)[2, 1990] = -1
    for result in run(logits, ids, **grads):
        assert result[[0, 2]].isnan().all() and result[1].isfinite().all()


@pytest.mark.parametrize("v", [2, 4097] if INTERPRETED else [2, 9, 4097, 151_936])
def test_confident_tokens(run, v):
    logits = torch.zeros(4, v)
    margins = torch.tensor([40.0, 20.0, 5.0, 60.0])
    logits[:, v // 2] = margins
    ids = torch.tensor([v // 2] * 4)
    for arguments in ({"grad_entropy": torch.zeros(4)}, {"grad_logp": torch.zeros(4)}):
        actual, wanted = run(logits, ids, **arguments), exact(logits, ids, **arguments)
        for name, a, w in zip(("logp", "entropy", "gradient"), actual, wanted, strict=True):
            if name == "gradient":  # at a margin of 5 the terms of the entropy's gradient cancel: the budget is for that row
                a, w = a[margins >= 20], w[margins >= 20]
            rtol = 2e-6 if name == "gradient" else 5e-7
            torch.testing.assert_close(a.double(), w, rtol=rtol, atol=0, msg=lambda m, name=name: f"{name}: {m}")
    if v == 151_936:
        assert actual[0][0].item() == pytest.approx(-6.4e-13, rel=0.01)


def test_confident_rows_whose_target_is_another(run):
    logits, ids, grads = case(3, 700)
    logits[:, 5] = 45.0
    check(run, logits, ids, **grads)


def test_rows_with_columns_far_below_the_maximum(run):
    """Finite, -inf, before and after a new maximum; and a maximum of -0, beside which a 0 is no larger one."""
    logits, ids, grads = case(4, 9000)
    logits[:, 3] = 9.0
    logits[0, 2000:] -= 250.0
    logits[1, 1500:3000] = -INF
    logits[2, 2500:2600] = -200.0
    logits[2, 7000] = 14.0
    logits[3] = -torch.relu(logits[3])
    ids[:] = 3
    check(run, logits, ids, **grads)
    check(run, logits.bfloat16(), ids, temperature=0.05, **grads)


@pytest.mark.parametrize("margin", [86.0, 90.0, 100.0, 120.0])
def test_margins_near_underflow(run, margin):
    logits = torch.zeros(1, 5000)
    logits[0, 3] = margin
    check(run, logits, torch.tensor([3]))
    check(run, logits, torch.tensor([4]))


@pytest.mark.parametrize("offset", [1e4, -1e4, -200.0])
def test_offsets(run, offset):
    """Row maximum below -104, and entropy from centred logits."""
    logits, ids, grads = case(4, 3000)
    check(run, logits + offset, ids, **grads)


@pytest.mark.parametrize("v", [5, 6000])
def test_ties_and_lowest_numbers(run, v):
    logits, ids, grads = case(5, v)
    lowest = torch.finfo(torch.float32).min
    logits[0] = 2.5
    logits[1, ::2] = 9.0
    logits[2, 1:] = lowest  # a mask by finfo.min
    logits[3] = lowest
    logits[4, 0], logits[4, 1:] = -lowest, lowest
    ids[4] = 0
    check(run, logits, ids, temperature=1.0, **grads)


def test_temperatures(run):
    logits, ids, grads = case(5, 500)
    temperature = torch.tensor([0.01, 0.6, 1.0, 30.0, 1e4])
    rows = check(run, logits, ids, temperature=temperature, **grads)
    for i, t in enumerate(temperature.tolist()):
        for a, b in zip(rows, run(logits, ids, temperature=t, **grads), strict=True):
            torch.testing.assert_close(a[i], b[i], rtol=1e-5, atol=1e-6)


def test_temperatures_whose_square_is_no_float(run):
    """Greedy in all but name: the likeliest token alone has mass. Right targets have no gradient, wrong ones +-1/T."""
    logits, ids, grads = case(6, 100)
    temperature = torch.tensor([1e-18, 1e-20, 1e-25] * 2)
    ids[:3] = logits[:3].argmax(-1)
    check(run, logits, ids, temperature=temperature, **grads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_rows_are_zero_and_not_read(run, dtype):
    logits, ids, grads = case(5, 100, dtype)
    mask = torch.tensor([True, False, True, True, False])
    ids[2], ids[4] = -100, 10**6  # a masked id may be anything
    logits[1:3] = NAN
    grads["grad_logp"][1] = NAN
    logits[3], grads["grad_logp"][3], grads["grad_entropy"][3] = NAN, 0.0, 0.0  # no gradient asked for
    for result in run(logits, ids, mask=mask, **grads):
        assert (result[[1, 2, 4]] == 0).all()
        assert result[0].isfinite().all()
    assert (result[3] == 0).all()


def test_strided_rows_are_read_in_place(run):
    logits, ids, _ = case(3 * 5, 130)
    logits, ids = logits.view(3, 5, 130), ids.view(3, 5)
    grads = {"grad_logp": torch.randn(3, 4), "grad_entropy": torch.randn(3, 4)}
    wanted = run(logits[:, :-1].contiguous(), ids[:, 1:].contiguous(), **grads)
    # two leading strides; rows inside wider rows; a broadcast row; three leading strides and a strided V, which are copied
    wide = torch.zeros(3, 5, 150)
    wide[..., 7:137] = logits
    for view in (logits[:, :-1], wide[:, :-1, 7:137], logits.transpose(0, 1).contiguous().transpose(0, 1)[:, :-1]):
        for a, b in zip(run(view, ids[:, 1:], **grads), wanted, strict=True):
            assert torch.equal(a, b)
    columns = logits.transpose(1, 2).contiguous().transpose(1, 2)
    for a, b in zip(run(columns[:, :-1], ids[:, 1:], **grads), wanted, strict=True):
        assert torch.equal(a, b)
    same = run(logits[0, :1].expand(5, 130), ids[0, :1].expand(5))
    assert (same[0] == same[0][0]).all()
    deep = torch.randn(2, 3, 2, 4, 11)[:, :2, :, :3]
    picked = torch.randint(0, 11, deep.shape[:-1])
    for a, b in zip(run(deep, picked), run(deep.contiguous(), picked), strict=True):
        assert torch.equal(a, b)


def test_which_layouts_are_copied():
    logits = torch.zeros(4, 9, 6)
    for view in (logits[:, :-1], logits.transpose(0, 1), logits[1, 2], logits[:, :, :4], logits[:0], logits.view(2, 2, 9, 6)[:, :, :-1]):
        assert row_layout(view)[0] is view
    assert row_layout(logits[:, :-1])[1:] == (8, 54, 6)
    for view in (logits[..., ::2], logits.transpose(1, 2), torch.zeros(2, 3, 4, 5, 11)[:, :2, :, :3]):
        assert row_layout(view)[0].is_contiguous() and row_layout(view)[0] is not view


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_empty(run, dtype):
    for shape in ((0, 5), (3, 0, 5)):
        logp, entropy, gradient = run(torch.zeros(shape, dtype=dtype), torch.zeros(shape[:-1], dtype=torch.int64))
        assert logp.shape == entropy.shape == shape[:-1] and gradient.shape == shape


def test_scalar_row_and_int32_ids(run):
    logits, ids, _ = case(1, 33)
    logp, _, gradient = run(logits[0], ids[0].to(torch.int32))
    assert logp.shape == () and gradient.shape == (33,)
    assert torch.equal(logp, run(logits, ids)[0][0]) and torch.equal(gradient, run(logits, ids)[2][0])


@torch_only
def test_more_than_65535_rows(run):
    logits, ids, grads = case(70_000, 3)
    check(run, logits, ids, **grads)


def test_offsets_past_2_to_the_31(run):
    """Two rows 2^31 elements apart; only their own pages are ever touched."""
    if run.device == "cuda":
        pytest.skip("4 GB would be copied")
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        logits = torch.empty(2**31 + 100, dtype=torch.bfloat16).as_strided((2, 100), (2**31, 1))
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = fill
    near, ids, grads = case(2, 100, torch.bfloat16)
    logits.copy_(near)
    for a, b in zip(run(logits, ids, **grads), run(near, ids, **grads), strict=True):
        assert torch.equal(a, b)


def test_same_bits_in_any_batch(run):
    n = 8 if INTERPRETED else 19
    logits, ids, grads = case(n, 4500, seed=3)
    whole = run(logits, ids, **grads)
    for begin, end in ((0, 1), (3, 4), (5, 7), (1, n - 1)):
        part = run(logits[begin:end], ids[begin:end], **{k: g[begin:end] for k, g in grads.items()})
        for a, b in zip(whole, part, strict=True):
            assert torch.equal(a[begin:end], b)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5)[: 0 if INTERPRETED else 3]:
            torch.set_num_threads(count)
            for a, b in zip(whole, run(logits, ids, **grads), strict=True):
                assert torch.equal(a, b)
    finally:
        torch.set_num_threads(threads)
    # at another alignment
    moved = torch.empty(n * 4500 + 1)[1:].view(n, 4500).copy_(logits)
    for a, b in zip(whole, run(moved, ids, **grads), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("v", [37, 9001])
def test_the_gradient_may_take_the_place_of_the_logits(run, dtype, v):
    """The kernel's own option: every element is read before it is written. The target lies in the first, a middle, the last chunk."""
    if run.name != "interpreter":
        pytest.skip("the launcher is called directly in the interpreter alone; the public option has tests of its own")
    from acpo_kernels._triton import logprob_entropy as kernels

    logits, ids, grads = case(2 * 4, v, dtype)
    ids[:3] = torch.tensor([0, v // 2, v - 1])
    ids[5] = -100
    wide = torch.zeros(2, 5, v, dtype=dtype)
    wide[:, :4] = logits.view(2, 4, v)
    view, ids = wide[:, :4], ids.view(2, 4)  # two leading strides
    grads = {name: g.view(2, 4) for name, g in grads.items()}
    statistics = tuple(torch.full(ids.shape, NAN) for _ in range(4))
    kernels.forward(view, ids, 0.7, None, None, statistics)
    wanted = torch.full(view.shape, NAN, dtype=dtype)
    arguments = (grads["grad_logp"], grads["grad_entropy"], view, ids, statistics[1:], 0.7, None, None)
    kernels.backward(*arguments, wanted)
    kernels.backward(*arguments, view)
    assert torch.equal(view, wanted) and (wide[:, 4] == 0).all()
    columns = torch.zeros(v, 3, dtype=dtype).T
    with pytest.raises(ValueError, match="gradient must have the strides"):
        kernels.backward(None, torch.ones(3), columns, ids[0, :3], tuple(s[0, :3] for s in statistics[1:]), 1.0, None, None, columns)


@torch_only
def test_gradients_through_either_output(run):
    logits, ids, _ = case(4, 90)
    leaf = logits.to(run.device).requires_grad_()
    ids = ids.to(run.device)
    logp, entropy = logprob_entropy(leaf, ids)
    (both,) = torch.autograd.grad(logp.sum() + entropy.sum(), leaf, retain_graph=True)
    (of_logp,) = torch.autograd.grad(logp.sum(), leaf, retain_graph=True)
    (of_entropy,) = torch.autograd.grad(entropy.sum(), leaf, retain_graph=True)
    (again,) = torch.autograd.grad(entropy.sum(), leaf)
    torch.testing.assert_close(both, of_logp + of_entropy, rtol=1e-5, atol=1e-7)
    assert torch.equal(of_entropy, again)
    log_p = torch.log_softmax(logits, -1)
    torch.testing.assert_close(of_entropy.cpu(), -log_p.exp() * (log_p + entropy.detach().cpu().unsqueeze(-1)), rtol=1e-4, atol=1e-6)
    assert not logprob_entropy(leaf.detach(), ids).logp.requires_grad


@torch_only
def test_unused_output_reaches_backward_as_none(run, monkeypatch):
    module = sys.modules["acpo_kernels.logprob_entropy"]
    seen = []
    inner = module._backward_op
    monkeypatch.setattr(module, "_backward_op", lambda *arguments: seen.append(arguments[:2]) or inner(*arguments))
    logits, ids, _ = case(2, 9)
    leaf = logits.to(run.device).requires_grad_()
    logprob_entropy(leaf, ids.to(run.device)).logp.sum().backward()
    assert seen[0][0] is not None and seen[0][1] is None


@torch_only
def test_second_derivatives_raise(run):
    logits, ids, _ = case(2, 9)
    leaf = logits.to(run.device).requires_grad_()
    (gradient,) = torch.autograd.grad(logprob_entropy(leaf, ids.to(run.device)).entropy.sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="has no derivative"):
        torch.autograd.grad(gradient.sum(), leaf)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_ids_outside_are_nan_and_graphs_capture():
    logits, ids, _ = case(4, 5000)
    logits, ids = logits.cuda().bfloat16(), ids.cuda()
    ids[0], ids[1] = 5000, -3
    leaf = logits.requires_grad_()

    def step():
        logp, entropy = logprob_entropy(leaf, ids)
        return logp, entropy, torch.autograd.grad(logp.sum() + entropy.sum(), leaf)[0]

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        eager = step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    for a, b in zip(captured, eager, strict=True):
        assert a[:2].isnan().all() and a[2:].isfinite().all() and torch.equal(a[2:], b[2:])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_compiles_once_for_every_number_of_rows():
    from acpo_kernels._triton import logprob_entropy as kernels

    def compiled():
        caches = (k.device_caches for k in (kernels._logprob_entropy_fwd_kernel, kernels._logprob_entropy_bwd_kernel))
        return sum(len(c[0]) for cache in caches for c in cache.values())

    counts = set()
    for n in (1, 2, 15, 16, 17):
        leaf = torch.randn(n, 4096, device="cuda", requires_grad=True)
        sum(logprob_entropy(leaf, torch.zeros(n, dtype=torch.int64, device="cuda"))).sum().backward()
        counts.add(compiled())
    assert len(counts) == 1


# Backward: memory, and the gradient in the place of the logits


@torch_only
@pytest.mark.parametrize("dtype", (*DTYPES, torch.float64), ids=str)
def test_gradient_in_the_place_of_the_logits(run, dtype):
    """The same bits as the gradient in a buffer of its own, at the strides of the logits, and nothing beside the rows is written."""
    values, ids, _ = case(3 * 5, 4500, dtype)
    ids, grads = ids.view(3, 5).clone(), [torch.randn(3, 5) for _ in range(2)]
    ids[0, 2], values[4], values[7, 3], grads[0][2, 2], grads[1][2, 2] = -100, NAN, -INF, 0.0, 0.0
    mask = torch.rand(3, 5) < 0.9
    wide = torch.zeros(3, 7, 4600, dtype=dtype)
    for shape in ("compact", "rows inside wider rows", "other order"):
        if shape == "compact":
            base = view = values.clone().view(3, 5, 4500)
        elif shape == "other order":
            base = values.view(3, 5, 4500).transpose(0, 1).contiguous()
            view = base.transpose(0, 1)
        else:
            base = wide
            view = wide[:, 1:6, 50:4550].copy_(values.view(3, 5, 4500))
        base, outside = base.to(run.device), base.clone().to(run.device)
        view = torch.as_strided(base, view.shape, view.stride(), view.storage_offset())
        plain = view.clone().requires_grad_()
        move = lambda t: t.to(run.device)  # noqa: E731
        incoming = [move(g).to(torch.float64 if dtype == torch.float64 else torch.float32) for g in grads]
        wanted_results = logprob_entropy(plain, move(ids), temperature=0.7, mask=move(mask))
        (wanted,) = torch.autograd.grad(list(wanted_results), plain, incoming)
        alias = Holder.apply(view.detach().requires_grad_(), view)
        results = logprob_entropy(alias, move(ids), temperature=0.7, mask=move(mask), inplace_backward=True)
        version = view._version
        (gradient,) = torch.autograd.grad(list(results), alias, incoming)
        assert view._version > version
        assert gradient.data_ptr() == view.data_ptr() and gradient.stride() == view.stride()
        for a, b in zip((*results, gradient), (*wanted_results, wanted), strict=True):
            assert torch.equal(a.nan_to_num(nan=7e4), b.nan_to_num(nan=7e4)), shape
        torch.as_strided(base, view.shape, view.stride(), view.storage_offset()).zero_()
        torch.as_strided(outside, view.shape, view.stride(), view.storage_offset()).zero_()
        assert torch.equal(base, outside), "something beside the rows was written"


class Holder(torch.autograd.Function):
    """An operation whose result lies in a given tensor, as that of a matrix product into a buffer."""

    @staticmethod
    def forward(ctx, leaf, result):
        return result.view_as(result)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


@torch_only
def test_gradient_in_place_reaches_the_head(run):
    hidden, weight = torch.randn(6, 8, device=run.device), torch.randn(300, 8, device=run.device)
    ids = torch.randint(0, 300, (6,), device=run.device)
    gradients = []
    for inplace in (False, True):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        logp, entropy = logprob_entropy(h @ w.T, ids, inplace_backward=inplace)
        (logp.sum() + 0.3 * entropy.sum()).backward()
        gradients.append((h.grad, w.grad))
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


@torch_only
def test_who_else_needs_the_overwritten_logits_hears_of_it(run):
    leaf = torch.randn(4, 50, device=run.device, requires_grad=True)
    ids = torch.zeros(4, dtype=torch.int64, device=run.device)
    logits = leaf.exp()  # saves its result
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logprob_entropy(logits, ids, inplace_backward=True).logp.sum().backward()
    logits = leaf * 2.0
    logp, entropy = logprob_entropy(logits, ids, inplace_backward=True)
    logp.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        entropy.sum().backward()
    logp = logprob_entropy(leaf * 2.0, ids, inplace_backward=True).logp
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(logp.sum(), leaf, create_graph=True)


@torch_only
def test_which_logits_cannot_hold_their_gradient():
    ids = torch.zeros(4, dtype=torch.int64)
    leaf = torch.randn(4, 9, requires_grad=True)
    with pytest.raises(ValueError, match="got a leaf"):
        logprob_entropy(leaf, ids, inplace_backward=True)
    with torch.no_grad():
        logprob_entropy(leaf, ids, inplace_backward=True)  # no backward comes
    logits = leaf * 2.0
    for bad in (logits[:1].expand(4, 9), torch.as_strided(logits, (4, 9), (5, 1)), logits[:, ::2], torch.zeros(9, 4).T):
        with pytest.raises(ValueError, match="rows do not overlap"):
            logprob_entropy(bad, ids, inplace_backward=True)
    with pytest.raises(ValueError, match="rows do not overlap"):
        logprob_entropy(torch.as_strided(logits, (2, 2, 9), (9, 4, 1)), ids.view(2, 2), inplace_backward=True)
    logprob_entropy(torch.zeros(2, 5, 9).transpose(0, 1)[:4, 0], ids, inplace_backward=True)
    with pytest.raises(TypeError, match="inplace_backward must be a bool, got int"):
        logprob_entropy(logits, ids, inplace_backward=1)


@torch_only
@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process is read the Linux way")
def test_no_buffer_of_the_size_of_the_logits_but_the_gradient():
    """The peak resident memory of a process: 97 MB of logits, a gradient of as much, or none."""
    code = """
import re, torch
from acpo_kernels import logprob_entropy
peak = lambda: int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
def step(n, v, inplace):
    leaf = torch.ones(n, 1, requires_grad=True)
    logits = leaf.expand(n, v).clone()
    before = peak()
    logp, entropy = logprob_entropy(logits, torch.arange(n), inplace_backward=inplace)
    torch.autograd.grad(logp.sum() + entropy.sum(), logits)
    return (peak() - before) / (4 * n * v)
step(4, 50, True), step(4, 50, False)
print(step(160, 151_936, True), step(160, 151_936, False))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    inplace, beside = map(float, run.stdout.split())
    assert inplace < 0.05
    assert 0.9 < beside < 1.05


# 5. Registration


@torch_only
def test_registration():
    logits, ids, grads = case(6, 20)
    compact = logits.view(2, 3, 20)
    forward, backward = torch.ops.acpo_kernels.logprob_entropy.default, torch.ops.acpo_kernels.logprob_entropy_backward.default
    permuted = compact.transpose(0, 1).contiguous().transpose(0, 1)
    for z in (compact, permuted, compact.transpose(0, 1)):
        picked = ids[:6].view(z.shape[:2])
        temperatures, mask = torch.full(picked.shape, 0.7), picked > 3
        torch.library.opcheck(forward, (z.detach().requires_grad_(), picked, 1.0, None, None))
        torch.library.opcheck(forward, (z.detach().requires_grad_(), picked, 1.0, temperatures, mask))
        _, entropy, maximum, logsumexp = forward(z, picked, 1.0, temperatures, mask)
        g = grads["grad_logp"].view(picked.shape)
        torch.library.opcheck(backward, (g, None, z, picked, entropy, maximum, logsumexp, 1.0, temperatures, mask))
        inplace = torch.ops.acpo_kernels.logprob_entropy_backward_.default
        torch.library.opcheck(inplace, (g, None, z.clone(), picked, entropy, maximum, logsumexp, 1.0, temperatures, mask))
    torch.library.opcheck(forward, ((logits.detach().requires_grad_() * 2.0), ids, 1.0, None, None, True))


@torch_only
@pytest.mark.parametrize("inplace", [False, True])
def test_torch_compile_traces_one_graph(inplace):
    logits, ids, _ = case(6, 20)

    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def loss(z, ids):
        logp, entropy = logprob_entropy(z * 2.0, ids, temperature=0.7, inplace_backward=inplace)
        return (logp + 0.1 * entropy).sum()

    for n in (6, 5):
        leaf, plain = (logits[:n].clone().requires_grad_() for _ in range(2))
        loss(leaf, ids[:n]).backward()
        logp, entropy = logprob_entropy(plain * 2.0, ids[:n], temperature=0.7)
        (logp + 0.1 * entropy).sum().backward()
        torch.testing.assert_close(leaf.grad, plain.grad)


# 6. Bad input


@torch_only
def test_bad_input():
    logits, ids, _ = case(4, 9)

    def wrong(error, match, z=logits, t=ids, **arguments):
        with pytest.raises(error, match=match):
            logprob_entropy(z, t, **arguments)

    wrong(TypeError, "logits must be a torch.Tensor", z=[1.0])
    wrong(ValueError, "logits must have dtype", z=logits.long())
    wrong(ValueError, "V >= 1", z=torch.zeros(4, 0))
    wrong(ValueError, "V >= 1", z=torch.tensor(1.0))
    wrong(ValueError, "ids must have dtype", t=ids.float())
    wrong(ValueError, "ids must have shape", t=ids[:3])
    wrong(ValueError, "mask must have dtype", mask=torch.ones(4))
    wrong(ValueError, "mask must have shape", mask=torch.ones(3, dtype=torch.bool))
    wrong(ValueError, "temperature must be greater than 0", temperature=0.0)
    wrong(ValueError, "temperature must be finite", temperature=INF)
    wrong(ValueError, "temperature must have shape", temperature=torch.ones(3))
    wrong(ValueError, "impl must be one of", impl="fast")
    for impl in (None, "reference"):
        bad = ids.clone()
        bad[2] = 9
        wrong(ValueError, r"ids must lie in \[0, V\) with V = 9, or be -100, got 9 at index 2", t=bad, impl=impl)
        bad[2] = -1
        wrong(ValueError, "got -1 at index", z=logits.view(2, 2, 9), t=bad.view(2, 2), impl=impl)


@torch_only
@pytest.mark.skipif(not _cpu.available, reason="built without the C++ extension")
def test_instruction_set_from_the_environment():
    def ask(isa):
        code = "from acpo_kernels import _C; print(_C.cpu_isa())"
        return subprocess.run([sys.executable, "-c", code], env={**os.environ, "ACPO_CPU_ISA": isa}, capture_output=True, text=True)

    assert ask("baseline").stdout.strip() == "baseline"
    assert "ACPO_CPU_ISA must be amx, avx512bf16, avx512, avx2 or baseline, got 'sse9'" in ask("sse9").stderr


@torch_only
@pytest.mark.skipif(not _cpu.available or not hasattr(os, "fork"), reason="the threads of the C++ extension, in a forked process")
def test_a_forked_child_has_threads_of_its_own():
    """Not those of torch's OpenMP runtime, whose copy in the child waits for threads that stayed behind."""
    code = """
import os, torch
from acpo_kernels import logprob_entropy
torch.set_num_threads(2)
logits, ids = torch.randn(16, 40_000), torch.zeros(16, dtype=torch.int64)
wanted = logprob_entropy(logits, ids).entropy.numpy().tobytes()
child = os.fork()
if child == 0:
    os._exit(0 if logprob_entropy(logits, ids).entropy.numpy().tobytes() == wanted else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert logprob_entropy(logits, ids).entropy.numpy().tobytes() == wanted
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@torch_only
def test_without_the_extension(monkeypatch):
    """ACPO_NO_EXT=1: the PyTorch formulas, under the same contract."""
    monkeypatch.setattr(_cpu, "available", False)
    logits, ids, grads = case(4, 60)
    ids[2], logits[2], logits[3, 5] = -100, NAN, -INF
    leaf = logits.requires_grad_()
    results = logprob_entropy(leaf, ids, temperature=0.7)
    (gradient,) = torch.autograd.grad(list(results), leaf, list(grads.values()))
    arguments = {"temperature": 0.7, **grads}
    for a, s, e in zip((*results, gradient), single(logits, ids, **arguments), exact(logits.detach(), ids, **arguments), strict=True):
        assert_within_budget(a.detach(), s, e, gradient_dtype=torch.float32)
    with pytest.raises(ValueError, match="got 60 at index 0"):
        logprob_entropy(logits, torch.full((4,), 60))
