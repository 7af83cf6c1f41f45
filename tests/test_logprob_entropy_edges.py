"""logprob_entropy: a test for each line of the numerical contract."""

from __future__ import annotations

import itertools

import pytest
import torch
from implementations import INTERPRETED, exact, implementation  # noqa: F401  (the fixture `run`)
from logprob_entropy_cases import DTYPES, INF, NAN, case, check, torch_only

import acpo_kernels as ops
from acpo_kernels import Segments, _checks
from acpo_kernels._layout import row_layout


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


@pytest.mark.parametrize("temperature", [_checks.COLDEST, _checks.HOTTEST])
@pytest.mark.parametrize("v", [100, 5000])
def test_no_number_that_is_accepted_gives_nan(run, v, temperature):
    logits, ids, grads = case(4, v)
    assert all(x.isfinite().all() for x in run(logits * 4, ids, temperature=temperature, **grads))


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
    # Nor has such a row a temperature: what `unpack` made of one is 0 there.
    for result in run(logits, ids, mask=mask, temperature=torch.tensor([0.7, 0.0, NAN, 1.0, INF]), **grads):
        assert (result[[1, 2, 4]] == 0).all() and result[0].isfinite().all()


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
    run(torch.zeros(0, 3, 5, dtype=dtype)[:, :-1], torch.zeros(0, 2, dtype=torch.int64))  # a view whose rows would not lie side by side
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


def test_the_reference_refuses_ids_outside_of_the_vocabulary_too():
    """Every operation by name: one error, that says where; a masked or ignored row may hold anything."""
    logits, ids = torch.randn(3, 5), torch.tensor([0, 9, 1])
    hidden, weight, segments = torch.randn(3, 4), torch.randn(5, 4), Segments(torch.tensor([0, 3]), torch.tensor([0, 1]))
    calls = (
        lambda ids, **k: ops.logprob_entropy(logits, ids, **k),
        lambda ids, **k: ops.hindsight_information(logits, logits, ids, **k),
        lambda ids, **k: ops.linear_logprob_entropy(hidden, weight, ids, **k),
        lambda ids, **k: ops.linear_hindsight_information(hidden, hidden, weight, ids, **k),
        lambda ids, **k: ops.linear_policy_loss(hidden, weight, ids, None, torch.ones(3), segments, **k),
    )
    for call, impl in itertools.product(calls, (None, "reference")):
        with pytest.raises(ValueError, match=r"ids must lie in \[0, V\) with V = 5, or be -100, got 9 at index 1"):
            call(ids, impl=impl)
        call(ids, mask=ids < 5, impl=impl)
        call(torch.tensor([0, -100, 1]), impl=impl)
