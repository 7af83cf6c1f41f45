"""hindsight_information: log-ratio and divergences of two streams of logits."""

from __future__ import annotations

import math
import os

import pytest
import torch
from contract import assert_within_budget
from hypothesis import given
from hypothesis import strategies as st
from ragged import assert_right
from streams import NAMES, assert_bitwise, streams

from acpo_kernels import HindsightInformation, _checks, _cpu, hindsight_information, logprob_entropy

IMPLS = (None, "reference")
ROWS = 3 if os.environ.get("TRITON_INTERPRET") == "1" else 16  # the interpreter takes one after the other


def formula(p, q, y):
    """Two lists of probabilities, the definition in Python floats; 0 log 0 = 0."""

    def kl(p, q):
        return math.fsum(math.inf if b == 0 else a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)

    entropy = -math.fsum(a * math.log(a) for a in p if a > 0)
    return math.log(p[y]), math.log(q[y]), entropy, math.log(q[y]) - math.log(p[y]), kl(p, q), kl(q, p)


# 1. Oracle. (No gradient flows: there is no gradcheck.)


@pytest.mark.parametrize("impl", IMPLS)
def test_by_hand(impl, device):
    p, q = (0.5, 0.25, 0.25), (0.25, 0.25, 0.5)
    logits = torch.tensor([p, p], dtype=torch.float64, device=device).log() + 3.0
    hindsight = torch.tensor([q, p], dtype=torch.float64, device=device).log() - 1.0
    result = hindsight_information(logits, hindsight, torch.tensor([2, 0], device=device), impl=impl)
    log2 = math.log(2.0)
    wanted = dict(
        logp=[-2 * log2, -log2], hindsight_logp=[-log2, -log2], entropy=[1.5 * log2] * 2, log_ratio=[log2, 0.0], kl=[0.25 * log2, 0.0],
        information=[0.25 * log2, 0.0],
    )  # fmt: skip
    for name, values in wanted.items():
        torch.testing.assert_close(getattr(result, name), torch.tensor(values, dtype=torch.float64, device=device), rtol=1e-14, atol=1e-15)


@given(st.integers(1, 9), st.integers(0, 2**32 - 1), st.sampled_from([0.5, 1.0, 1.7]), st.booleans())
def test_the_definition_column_by_column(vocab, seed, temperature, per_row):
    torch.manual_seed(seed)
    rows = 5
    logits, hindsight = (torch.randn(rows, vocab, dtype=torch.float64) * 3 for _ in range(2))
    ids = torch.randint(vocab, (rows,))
    temperatures = temperature + torch.rand(rows, dtype=torch.float64) if per_row else torch.full((rows,), temperature, dtype=torch.float64)
    p, q = ((x / temperatures.unsqueeze(-1)).softmax(-1).tolist() for x in (logits, hindsight))
    wanted = torch.tensor([formula(*row) for row in zip(p, q, ids.tolist(), strict=True)], dtype=torch.float64).T
    for impl in IMPLS:
        result = hindsight_information(logits, hindsight, ids, temperature=temperatures if per_row else temperature, impl=impl)
        for name, x, y in zip(HindsightInformation._fields, result, wanted, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


# 2. Implementation against the oracle


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab", [1, 2, 33, 4099])
@pytest.mark.parametrize("closeness", [1.0, 1e-2])
def test_against_the_reference(vocab, dtype, closeness, device):
    rows = 37
    logits = torch.randn(rows, vocab, device=device) * 4
    hindsight = (logits + closeness * torch.randn(rows, vocab, device=device)).to(dtype)
    logits = logits.to(dtype)
    ids = torch.randint(vocab, (rows,), device=device)
    ids[3] = -100
    mask = torch.rand(rows, device=device) < 0.8
    temperature = torch.rand(rows, device=device) + 0.5
    actual = hindsight_information(logits, hindsight, ids, temperature=temperature, mask=mask)

    def reference(kind):
        return hindsight_information(logits.to(kind), hindsight.to(kind), ids, temperature=temperature.to(kind), mask=mask, impl="reference")

    exact = reference(torch.float64)
    working = exact if dtype == torch.float64 else reference(torch.float32)
    for name, x, y, z in zip(HindsightInformation._fields, actual, working, exact, strict=True):
        assert x.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert_right(name, x, y, z)


@pytest.mark.parametrize(("vocab", "dtype"), [(5, torch.float32), (700, torch.float16), (9001, torch.float32), (9001, torch.bfloat16)])
@pytest.mark.parametrize("name", NAMES)
def test_hard_streams_on_every_instruction_set(cpu_isa, name, vocab, dtype):
    logits, hindsight, ids, temperature = streams(name, vocab)
    logits, hindsight = logits.to(dtype), hindsight.to(dtype)
    for a, b in ((logits, hindsight), (hindsight, logits)):
        actual = hindsight_information(a, b, ids, temperature=temperature)
        working = hindsight_information(a.float(), b.float(), ids, temperature=temperature, impl="reference")
        exact = hindsight_information(a.double(), b.double(), ids, temperature=temperature, impl="reference")
        for field, x, y, z in zip(HindsightInformation._fields, actual, working, exact, strict=True):
            assert_within_budget(x, y, z, f"{name}: {field}")
        own = logprob_entropy(a, ids, temperature=temperature)
        assert torch.equal(actual.logp, own.logp) and torch.equal(actual.entropy, own.entropy)
        turned = hindsight_information(b, a, ids, temperature=temperature)
        assert torch.equal(turned.kl, actual.information) and torch.equal(turned.information, actual.kl)


def test_large_vocabulary_on_every_instruction_set(cpu_isa):
    logits, hindsight, ids, _ = streams("close", 151_936)
    exact = hindsight_information(logits.double(), hindsight.double(), ids, impl="reference")
    working = hindsight_information(logits, hindsight, ids, impl="reference")
    for field, x, y, z in zip(HindsightInformation._fields, hindsight_information(logits, hindsight, ids), working, exact, strict=True):
        assert_within_budget(x, y, z, field)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_broken_element_deep_in_a_row(cpu_isa, bad):
    """Past the first groups, where the vectors take no notice of it."""
    logits, hindsight, ids, _ = streams("close", 9001)
    clean = hindsight_information(logits, hindsight, ids)
    for stream, kept in ((0, "hindsight_logp"), (1, "logp")):
        pair = [logits.clone(), hindsight.clone()]
        pair[stream][1, 6000] = bad
        result = hindsight_information(*pair, ids)
        assert_bitwise([x[::2] for x in result], [x[::2] for x in clean])
        for name in ("log_ratio", "kl", "information", *(("logp", "entropy") if stream == 0 else ("hindsight_logp",))):
            assert getattr(result, name)[1].isnan(), name
        assert getattr(result, kept)[1] == getattr(clean, kept)[1]


def test_without_the_extension(monkeypatch):
    logits, hindsight, ids, temperature = streams("temperatures", 60)
    compiled = hindsight_information(logits, hindsight, ids, temperature=temperature)
    monkeypatch.setattr(_cpu, "available", False)
    for x, y in zip(hindsight_information(logits, hindsight, ids, temperature=temperature), compiled, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


def test_logits_rounded_to_bf16_fail_the_budget():
    logits, hindsight = torch.randn(20, 500) * 4, torch.randn(20, 500) * 4
    ids = torch.randint(500, (20,))
    exact = hindsight_information(logits.double(), hindsight.double(), ids)
    working = hindsight_information(logits, hindsight, ids, impl="reference")
    rounded = hindsight_information(logits.bfloat16(), hindsight.bfloat16(), ids)
    for name, x, y, z in zip(HindsightInformation._fields, rounded, working, exact, strict=True):
        with pytest.raises(AssertionError, match="budget"):
            assert_right(name, x, y, z)


# 3. Properties


@given(st.integers(1, 12), st.integers(0, 2**32 - 1), st.sampled_from([0.0, 1e-6, 1.0, 30.0]))
def test_the_centred_log_ratio_has_mean_zero_under_the_policy(vocab, seed, spread):
    """E_{y ~ pi}[log_ratio + kl] = 0 and E_{y ~ q}[log_ratio] = information, summed over the whole vocabulary."""
    torch.manual_seed(seed)
    logits = torch.randn(1, vocab, dtype=torch.float64) * 3
    hindsight = logits + spread * torch.randn(1, vocab, dtype=torch.float64)
    ids = torch.arange(vocab)
    result = hindsight_information(logits.expand(vocab, -1), hindsight.expand(vocab, -1), ids)
    scale = 1e-14 * (1 + spread)
    assert abs((result.logp.exp() * (result.log_ratio + result.kl)).sum()) < 20 * scale
    torch.testing.assert_close((result.hindsight_logp.exp() * result.log_ratio).sum(), result.information[0], rtol=1e-12, atol=20 * scale)
    torch.testing.assert_close(-(result.logp.exp() * result.logp).sum(), result.entropy[0], rtol=1e-12, atol=20 * scale)
    assert torch.equal(result.log_ratio, result.hindsight_logp - result.logp)


@given(st.integers(1, 300), st.integers(0, 2**32 - 1), st.sampled_from([1e-7, 1e-3, 1.0, 100.0]), st.sampled_from([torch.float32, torch.bfloat16]))
def test_divergences_are_not_negative_and_0_for_equal_streams(vocab, seed, spread, dtype):
    torch.manual_seed(seed)
    logits = torch.randn(ROWS, vocab) * 5
    hindsight = (logits + spread * torch.randn(ROWS, vocab)).to(dtype)
    logits, ids = logits.to(dtype), torch.randint(vocab, (ROWS,))
    result = hindsight_information(logits, hindsight, ids)
    assert (result.kl >= 0).all()
    assert (result.information >= 0).all()
    same = hindsight_information(logits, logits.clone(), ids)
    for name in ("log_ratio", "kl", "information"):
        assert (getattr(same, name) == 0).all(), name
    assert torch.equal(same.logp, same.hindsight_logp)


@given(st.integers(2, 64), st.integers(0, 2**32 - 1), st.sampled_from([torch.float32, torch.bfloat16]))
def test_the_streams_and_the_rows_change_places(vocab, seed, dtype):
    torch.manual_seed(seed)
    logits, hindsight = (torch.randn(ROWS, vocab).mul(3).to(dtype) for _ in range(2))
    ids = torch.randint(vocab, (ROWS,))
    result, turned = hindsight_information(logits, hindsight, ids), hindsight_information(hindsight, logits, ids)
    assert torch.equal(turned.kl, result.information)
    assert torch.equal(turned.information, result.kl)
    assert torch.equal(turned.log_ratio, -result.log_ratio)
    order = torch.randperm(ROWS)
    assert_bitwise(hindsight_information(logits[order], hindsight[order], ids[order]), [x[order] for x in result])
    own = logprob_entropy(logits, ids)  # the same bits as the operation that gives these two alone
    assert torch.equal(result.logp, own.logp)
    assert torch.equal(result.entropy, own.entropy)


@pytest.mark.parametrize("vocab", [17, 1000, 40_001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_alone_is_bitwise_the_row_in_a_batch(vocab, dtype, device):
    logits, hindsight = (torch.randn(33, vocab, device=device).mul(3).to(dtype) for _ in range(2))
    ids = torch.randint(vocab, (33,), device=device)
    whole = hindsight_information(logits, hindsight, ids)
    for first, count in ((0, 1), (7, 1), (32, 1), (5, 2), (1, 15), (2, 16), (3, 17)):
        rows = slice(first, first + count)
        assert_bitwise(hindsight_information(logits[rows], hindsight[rows], ids[rows]), [x[rows] for x in whole])
    one = hindsight_information(logits[7], hindsight[7], ids[7], temperature=torch.ones((), device=device), mask=torch.tensor(True, device=device))
    assert_bitwise(one, [x[7] for x in whole])


# 4. Edges


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_columns_that_are_impossible(impl, dtype, device):
    inf = math.inf
    logits = torch.tensor([[0.0, 1.0, -inf], [0.0, 1.0, -1.0], [0.0, -inf, 0.0], [0.0, -inf, 1.0], [5.0, -inf, -inf]], dtype=dtype, device=device)
    hindsight = torch.tensor([[1.0, 0.0, -inf], [0.0, 1.0, -inf], [0.0, 0.0, 0.0], [1.0, -inf, 0.0], [-2.0, -inf, -inf]], dtype=dtype, device=device)
    ids = torch.tensor([1, 2, 1, 1, 0], device=device)
    result = hindsight_information(logits, hindsight, ids, impl=impl)
    p, q = (x.double().softmax(-1).tolist() for x in (logits, hindsight))
    assert float(result.kl[0]) == pytest.approx(formula(p[0], q[0], 1)[4], rel=1e-6)  # shared by both: finite
    assert float(result.information[0]) == pytest.approx(formula(p[0], q[0], 1)[5], rel=1e-6)
    assert result.kl[1] == inf  # the policy has mass where hindsight has none
    assert float(result.information[1]) == pytest.approx(math.log1p(math.exp(-1) / (1 + math.e)), rel=1e-6)
    assert result.log_ratio[1] == -inf
    assert result.information[2] == inf  # and the other way round
    assert float(result.kl[2]) == pytest.approx(math.log(1.5), rel=1e-6)
    assert result.log_ratio[2] == inf
    assert result.log_ratio[3].isnan()  # -inf - -inf
    assert result.logp[3] == result.hindsight_logp[3] == -inf
    assert result.kl[3].isfinite()
    assert [float(x[4]) for x in result] == [0.0] * 6  # one possible token in both


@pytest.mark.parametrize("impl", IMPLS)
def test_a_column_whose_probability_underflows_is_still_possible(impl):
    """exp(-200) is 0 in float32; hindsight's -inf there is an infinite divergence and not 0 x inf."""
    logits = torch.tensor([[0.0, -200.0], [0.0, -200.0]])
    hindsight = torch.tensor([[0.0, -math.inf], [-200.0, 0.0]])
    result = hindsight_information(logits, hindsight, torch.tensor([0, 0]), impl=impl)
    assert result.kl.tolist() == [math.inf, 200.0]
    assert result.information.tolist() == [0.0, 200.0]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, "all -inf"])
def test_a_broken_row_gives_nan_there_alone(bad, impl, device):
    logits, hindsight = torch.randn(4, 6, device=device), torch.randn(4, 6, device=device)
    ids = torch.randint(6, (4,), device=device)
    clean = hindsight_information(logits, hindsight, ids, impl=impl)
    for stream, kept in ((0, "hindsight_logp"), (1, "logp")):
        streams = [logits.clone(), hindsight.clone()]
        if bad == "all -inf":
            streams[stream][2] = -math.inf
        else:
            streams[stream][2, 4] = bad
        result = hindsight_information(*streams, ids, impl=impl)
        others = torch.tensor([0, 1, 3], device=device)
        assert_bitwise([x[others] for x in result], [x[others] for x in clean])
        for name in ("log_ratio", "kl", "information", *(("logp", "entropy") if stream == 0 else ("hindsight_logp",))):
            assert getattr(result, name)[2].isnan(), name
        assert getattr(result, kept)[2] == getattr(clean, kept)[2]


@pytest.mark.parametrize("temperature", [_checks.COLDEST_DIVERGENCE, _checks.HOTTEST])
@pytest.mark.parametrize("vocab", [100, 5000])
def test_no_temperature_that_is_accepted_gives_nan(vocab, temperature, cpu_isa):
    logits, hindsight = 30 * torch.randn(2, 4, vocab)
    assert all(x.isfinite().all() for x in hindsight_information(logits, hindsight, torch.randint(vocab, (4,)), temperature=temperature))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("row", [[math.nan], [math.nan, -math.inf, -math.inf]], ids=["alone", "beside -inf"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_nan_that_nothing_is_compared_with(row, dtype, impl, device):
    bad = torch.tensor([row], dtype=dtype, device=device)
    good, ids = torch.zeros_like(bad), torch.zeros(1, dtype=torch.int64, device=device)
    for both, names in (((bad, good), ("logp", "entropy")), ((good, bad), ("hindsight_logp",))):
        result = hindsight_information(*both, ids, impl=impl)
        assert all(getattr(result, name).isnan() for name in (*names, "log_ratio", "kl", "information"))
    assert all(x.isnan() for x in logprob_entropy(bad, ids, impl=impl))


@pytest.mark.parametrize("impl", IMPLS)
def test_masked_rows_are_0_and_not_read(impl, device):
    logits, hindsight = torch.randn(2, 3, 6, device=device), torch.randn(2, 3, 6, device=device)
    ids = torch.randint(6, (2, 3), device=device)
    ids[0, 1] = -100
    ids[1, 2] = 10**9  # out of range under the mask
    mask = torch.tensor([[1, 1, 1], [0, 1, 0]], dtype=torch.bool, device=device)
    active = mask & (ids != -100)
    clean = hindsight_information(logits, hindsight, ids, mask=mask, impl=impl)
    dirty = [torch.where(active.unsqueeze(-1), x, math.nan) for x in (logits, hindsight)]
    temperature = torch.where(active, 1.0, math.nan)
    result = hindsight_information(*dirty, ids, mask=mask, temperature=temperature, impl=impl)
    for name, x, y in zip(HindsightInformation._fields, result, clean, strict=True):
        assert (x[~active] == 0).all(), name
        assert torch.equal(x, y), name


@pytest.mark.parametrize("impl", IMPLS)
def test_margins_offsets_and_low_maxima(impl):
    vocab = 5000
    logits = torch.zeros(4, vocab)
    logits[0, 7] = 40.0
    logits[1] = torch.randn(vocab).mul(32).round() / 32
    logits[2] = logits[1] + 1e4  # exact in float32
    logits[3] = logits[1] - 200.0
    hindsight = torch.zeros(4, vocab)
    hindsight[0, 7] = 44.0
    hindsight[1:] = torch.randn(vocab).mul(32).round() / 32
    result = hindsight_information(logits, hindsight, torch.full((4,), 7), impl=impl)
    a, b = (vocab - 1) * math.exp(-40.0), (vocab - 1) * math.exp(-44.0)
    assert float(result.logp[0]) == pytest.approx(-a, rel=1e-5, abs=0)
    assert float(result.log_ratio[0]) == pytest.approx(a - b, rel=1e-5, abs=0)
    assert float(result.entropy[0]) == pytest.approx(a * 41, rel=1e-5, abs=0)
    for name, x in zip(HindsightInformation._fields, result, strict=True):
        assert x[1] == x[2] == x[3], name  # the streams shift each by its own offset


@pytest.mark.parametrize("impl", IMPLS)
def test_empty_and_strided(impl, device):
    for shape in ((0,), (2, 0), (0, 3)):
        empty = torch.zeros(*shape, 5, device=device)
        result = hindsight_information(empty, empty, torch.zeros(shape, dtype=torch.int64, device=device), impl=impl)
        assert all(x.shape == shape for x in result)
    logits, hindsight = torch.randn(3, 5, 8, device=device), torch.randn(3, 5, 8, device=device)
    ids = torch.randint(8, (3, 5), device=device)
    shifted = hindsight_information(logits[:, :-1], hindsight[:, 1:], ids[:, 1:], impl=impl)
    assert_bitwise(shifted, hindsight_information(logits[:, :-1].contiguous(), hindsight[:, 1:].contiguous(), ids[:, 1:].contiguous(), impl=impl))
    int32 = hindsight_information(logits, hindsight, ids.int(), impl=impl)
    assert_bitwise(int32, hindsight_information(logits, hindsight, ids, impl=impl))


def test_many_rows(device):
    logits, hindsight = torch.randn(66_000, 3, device=device), torch.randn(66_000, 3, device=device)
    ids = torch.randint(3, (66_000,), device=device)
    whole = hindsight_information(logits, hindsight, ids)
    assert_bitwise([x[65_990:] for x in whole], hindsight_information(logits[65_990:], hindsight[65_990:], ids[65_990:]))


def test_no_gradient_flows():
    logits = torch.randn(2, 4, requires_grad=True)
    assert not any(x.requires_grad for x in hindsight_information(logits, logits, torch.tensor([0, 1])))


# 5. Registration


def test_opcheck(device):
    ids = torch.randint(9, (5,), device=device)
    temperatures, mask = torch.rand(5, device=device) + 0.5, torch.rand(5, device=device) < 0.7
    compact = [torch.randn(5, 9, device=device) for _ in range(2)]
    permuted = [torch.randn(9, 5, device=device).T for _ in range(2)]
    op = torch.ops.acpo_kernels.hindsight_information.default
    for pair in (compact, permuted):
        torch.library.opcheck(op, (*pair, ids, 1.0, None, None))
        torch.library.opcheck(op, (*pair, ids, None, temperatures, mask))
    torch.library.opcheck(op, (*[x[:1] for x in compact], ids[:1], None, temperatures[:1], mask[:1]))
    torch.library.opcheck(op, (*[x.bfloat16().reshape(1, 5, 9) for x in compact], ids[None], 0.7, None, None))


def test_compiles_in_one_graph():
    compiled = torch.compile(lambda a, b, ids: hindsight_information(a * 2, b, ids), fullgraph=True, backend="aot_eager")
    for rows in (1, 2, 15, 16, 17):
        logits, hindsight, ids = torch.randn(rows, 9), torch.randn(rows, 9), torch.randint(9, (rows,))
        assert_bitwise(compiled(logits, hindsight, ids), hindsight_information(logits * 2, hindsight, ids))


# 6. Bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.ones(3, 5, dtype=torch.int64)}, "logits must have dtype float32"),
        ({"logits": torch.ones(3, 0), "hindsight_logits": torch.ones(3, 0)}, r"logits must be \[...,V\] with V >= 1, got \(3, 0\)"),
        ({"hindsight_logits": torch.ones(3, 6)}, r"hindsight_logits must have shape that of logits = \(3, 5\), got \(3, 6\)"),
        ({"hindsight_logits": torch.ones(3, 5, dtype=torch.bfloat16)}, "hindsight_logits must have dtype float32, got bfloat16"),
        ({"hindsight_logits": torch.ones(3, 5, device="meta")}, "hindsight_logits must be on cpu, got meta"),
        ({"ids": torch.zeros(2, dtype=torch.int64)}, r"ids must have shape the leading dimensions = \(3,\), got \(2,\)"),
        ({"ids": torch.zeros(3)}, "ids must have dtype int64, int32, got float32"),
        ({"ids": torch.tensor([0, 5, 1])}, r"ids must lie in \[0, V\) with V = 5, or be -100, got 5 at index 1"),
        ({"ids": torch.tensor([0, 1, -1])}, r"ids must lie in \[0, V\) with V = 5, or be -100, got -1 at index 2"),
        ({"mask": torch.ones(3)}, "mask must have dtype bool"),
        ({"mask": torch.ones(5, dtype=torch.bool)}, "mask must have shape the shape of ids"),
        ({"temperature": 0.0}, "temperature must be greater than 0"),
        ({"temperature": math.inf}, "temperature must be finite"),
        ({"temperature": 1e-17}, "temperature must be at least 1e-16, got 1e-17"),
        ({"temperature": 1e39}, r"temperature must be at most 1e\+36, got 1e\+39"),
        ({"temperature": torch.ones(2)}, "temperature must have shape the shape of ids"),
        ({"impl": "triton"}, "impl must be one of None, 'reference'"),
    ],
)
def test_bad_input(change, message):
    arguments = dict(logits=torch.ones(3, 5), hindsight_logits=torch.ones(3, 5), ids=torch.zeros(3, dtype=torch.int64)) | change
    positional = [arguments.pop(name) for name in ("logits", "hindsight_logits", "ids")]
    with pytest.raises(ValueError, match=message):
        hindsight_information(*positional, **arguments)


def test_bad_types():
    with pytest.raises(TypeError, match=r"logits must be a torch\.Tensor, got list"):
        hindsight_information([1.0], [1.0], torch.tensor(0))
    with pytest.raises(TypeError, match="temperature must be a number, got str"):
        hindsight_information(torch.ones(1, 2), torch.ones(1, 2), torch.tensor([0]), temperature="1")
