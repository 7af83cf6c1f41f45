"""The Triton kernels on hidden states in the interpreter. `test_triton_interpreter.py` runs this file, under TRITON_INTERPRET=1, in a
process of its own. The interpreter multiplies float32 by float32; a product of bfloat16 or float16 numbers is exact in that."""

from __future__ import annotations

import math

import pytest
import torch
import triton.language as tl
from contract import assert_within_budget

from acpo_kernels import HindsightInformation, Segments, linear_logprob_entropy, reference
from acpo_kernels._triton import linear_gradient_slice, linear_gradients
from acpo_kernels._triton import linear_hindsight_information as hindsight
from acpo_kernels._triton import linear_logprob_entropy as kernels
from acpo_kernels._triton import linear_policy_loss as policy

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMES = ("logp", "entropy", "gradient of hidden", "gradient of weight", "gradient of bias")


def inputs(rows, vocab, width, dtype=torch.float32, scale=1.0):
    hidden, weight = (torch.randn(rows, width) * scale).to(dtype), torch.randn(vocab, width).to(dtype)
    return hidden, weight, torch.randint(vocab, (rows,)), torch.randn(vocab).to(dtype)


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


@pytest.fixture
def narrow(monkeypatch):
    """Slices of 512 columns: a small vocabulary takes several."""
    monkeypatch.setattr(linear_gradients, "SLICE", 512)


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


def both_streams(hidden, other, weight, ids, bias=None, *, temperature=1.0, softcap=None, mask=None):
    number, tensor = (None, temperature) if isinstance(temperature, torch.Tensor) else (temperature, None)
    return hindsight.forward(hidden, other, weight, ids, bias, number, tensor, softcap, mask)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("closeness", [1.0, 1e-2])
@pytest.mark.parametrize(("rows", "vocab", "width", "softcap"), [(2, 2, 3, None), (20, 1100, 24, 5.0)])
def test_hindsight_against_the_reference(rows, vocab, width, softcap, closeness, dtype):
    hidden, weight, ids, bias = inputs(rows, vocab, width, dtype)
    other = (hidden.float() + closeness * torch.randn(rows, width)).to(dtype)
    settings = dict(temperature=torch.rand(rows) + 0.5, softcap=softcap, mask=torch.rand(rows) < 0.8)
    actual = both_streams(hidden, other, weight, ids, bias, **settings)
    single, exact = (
        reference.linear_hindsight_information(hidden.to(k), other.to(k), weight.to(k), ids, bias=bias.to(k), **settings)
        for k in (torch.float32, torch.float64)
    )
    for name, x, y, z in zip(HindsightInformation._fields, actual, single, exact, strict=True):
        assert_within_budget(x, y, z, name, factor=4.0)


@pytest.mark.parametrize("spread", [1e-4, 1.0, 40.0])
def test_divergences_relative_to_themselves(spread):
    """Near streams keep what the sum of non-negative terms in float32 loses; equal streams give exactly 0."""
    hidden, weight, ids, _ = inputs(20, 700, 8)
    hidden, weight = hidden.mul(64).round() / 64, weight.mul(64).round() / 64  # exact logits: their rounding is not what is tested
    step = 2.0 ** round(math.log2(spread / 8))
    other = hidden + step * torch.randn(20, 8).mul(8).round()
    actual = both_streams(hidden, other, weight, ids)
    exact = reference.linear_hindsight_information(hidden.double(), other.double(), weight.double(), ids)
    for name in ("kl", "information"):
        i = HindsightInformation._fields.index(name)
        torch.testing.assert_close(actual[i].double(), exact[i], rtol=2e-3 if spread < 1e-2 else 2e-5, atol=0)
    same = both_streams(hidden, hidden.clone(), weight, ids)
    assert all((same[i] == 0).all() for i in (3, 4, 5)) and torch.equal(same[0], same[1])


def test_hindsight_rows_stay_alone():
    hidden, weight, ids, bias = inputs(70, 1040, 8)
    other, bias[5] = torch.randn_like(hidden), -math.inf
    clean = both_streams(hidden, other, weight, ids, bias)
    assert all(x.isfinite().all() for x in clean[2:3] + clean[4:])
    mask = torch.rand(70) < 0.5
    dirty = torch.where(mask.unsqueeze(-1), hidden, math.nan)
    moved = both_streams(dirty, other, weight, torch.where(mask, ids, -1), bias, mask=mask)
    alone = both_streams(hidden[69:], other[69:], weight, ids[69:], bias)
    hidden, ids = hidden.clone(), ids.clone()
    hidden[3, 0], ids[4] = math.nan, 1040
    broken = both_streams(hidden, other, weight, ids, bias)
    kept = torch.arange(70) != 3
    kept[4] = False
    for name, x, y, z, b in zip(HindsightInformation._fields, clean, moved, alone, broken, strict=True):
        assert torch.equal(x[mask].nan_to_num(), y[mask].nan_to_num()) and (y[~mask] == 0).all(), name
        assert torch.equal(x[69:], z), name
        assert torch.equal(x[kept].nan_to_num(), b[kept].nan_to_num()), name
        assert b[4].isnan() and (name == "hindsight_logp" or b[3].isnan()), name


class Case:
    """Rows that are masked, clipped, and of a group without reward variance, over several chunks of 128 rows."""

    def __init__(self, rows, dtype, *, vocab=300, width=8, ratio="token", on_policy=False, **settings):
        hidden, weight, ids, bias = inputs(rows, vocab, width, dtype)
        self.leaves, self.ids, self.ratio, self.settings = (hidden, weight, bias), ids, ratio, settings
        logp = reference.linear_logprob_entropy(hidden.double(), weight.double(), ids, bias=bias.double()).logp.float()
        self.old = None if on_policy else logp + 0.3 * torch.randn(rows)
        self.advantages = torch.randn(rows)
        self.advantages[rows // 2 :] = 0.0
        self.mask = torch.rand(rows) < 0.8
        self.segments = Segments(torch.tensor([0, rows // 3, rows // 2, rows]), torch.tensor([0, 2, 3]))

    def run(self, needs=(True, True, True)):
        extra = dict(entropy_weight=None, ref_logp=None, kl_weight=0.0, rollout_logp=None, denominator=None) | self.settings
        weights, denominators = (x if isinstance(x, torch.Tensor) else None for x in (extra["entropy_weight"], extra["denominator"]))
        number, over = (None if isinstance(x, torch.Tensor) else x for x in (extra["entropy_weight"], extra["denominator"]))
        hidden, weight, bias = self.leaves
        loss, _, *rest = policy.forward(
            hidden, weight, self.ids, bias, 0.8, None, None, self.old, self.advantages, self.segments.token_offsets, self.segments.sequence_offsets,
            self.mask, 0.2, 0.28, self.ratio, number, weights, extra["ref_logp"], extra["kl_weight"], extra["rollout_logp"], 2.0, over, denominators,
            needs,
        )  # fmt: skip
        return loss, *rest

    def wanted(self, kind):
        leaves = [x.to(kind).requires_grad_() for x in self.leaves]
        old = None if self.old is None else self.old.to(kind)
        result = reference.linear_policy_loss(
            *leaves[:2], self.ids, old, self.advantages.to(kind), self.segments, bias=leaves[2], mask=self.mask, clip=(0.2, 0.28), ratio=self.ratio,
            temperature=0.8, **self.settings,
        )  # fmt: skip
        return result.loss.detach(), result.logp.detach(), result.entropy.detach(), *torch.autograd.grad(result.loss, leaves)

    def check(self):
        names = ("loss", "logp", "entropy", "gradient of hidden", "gradient of weight", "gradient of bias")
        actual = self.run()
        for i, (name, x, y, z) in enumerate(zip(names, actual, self.wanted(torch.float32), self.wanted(torch.float64), strict=True)):
            assert x.dtype == torch.float32
            assert_within_budget(x, y, z, name, factor=4.0, gradient_dtype=self.leaves[0].dtype if i >= 3 else None)
        assert (actual[3][~self.mask] == 0).all()
        return actual


@pytest.fixture
def in_chunks(monkeypatch):
    """One sweep, in chunks of 128 rows."""
    monkeypatch.setattr(policy, "holding_pays", lambda *_: True)
    monkeypatch.setattr(policy, "chunk_rows", lambda _: 128)


@pytest.fixture
def products(monkeypatch):
    """Rows that took part in each product, by kernel."""
    rows = {}

    def counted(module, name, count):
        kernel = getattr(module, name)

        class Counting:
            def __getitem__(self, grid):
                def launch(*args, **options):
                    rows.setdefault(name, []).append((int(args[count]), options.get("HELD")))
                    return kernel[grid](*args, **options)

                return launch

        monkeypatch.setattr(module, name, Counting())

    counted(kernels, "_linear_logprob_entropy_fwd_kernel", 6)
    for name, count in (("_linear_gradient_kernel", 6), ("_hidden_gradient_kernel", 4), ("_weight_gradient_kernel", 4)):
        counted(linear_gradients, name, count)
    return rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ratio", ["token", "segment"])
def test_policy_loss_in_two_phases(ratio, dtype):
    Case(30, dtype, ratio=ratio).check()


@pytest.mark.parametrize("dtype", DTYPES)
def test_policy_loss_in_one_sweep(dtype, in_chunks, narrow):
    """Three chunks of compact rows (in 16 bits two), the last one empty; two slices of the vocabulary."""
    rows = 300 if dtype == torch.float32 else 180
    case = Case(rows, dtype, vocab=530)
    grads = case.check()[3:]
    assert (grads[0][rows // 2 :] == 0).all()
    again = case.run()[3:] if dtype == torch.float32 else grads
    assert all(torch.equal(x, y) for x, y in zip(grads, again, strict=True))


def test_policy_loss_in_one_sweep_takes_what_the_loss_takes(in_chunks):
    for denominator, weights in ((torch.tensor(5.0), 0.1), (torch.tensor([3.0, 9.0]), torch.rand(30)), (torch.rand(30) + 1, 0.1)):
        logp = -torch.rand(30) * 5
        Case(30, torch.float32, denominator=denominator, entropy_weight=weights, ref_logp=logp, kl_weight=0.2, rollout_logp=logp).check()
    Case(30, torch.float32, ratio="sequence", on_policy=True).check()


def test_which_rows_take_part_in_which_product(in_chunks, products):
    """Masked rows in none, rows without a gradient in the forward product alone; none twice."""
    case = Case(300, torch.float32)
    upstream = torch.where(case.mask, case.advantages, 0.0)
    logp = case.run()[1]
    products.clear()
    r = (logp - case.old).exp()
    clipped = ((r > 1.28) & (upstream > 0)) | ((r < 0.8) & (upstream < 0))
    unmasked, some = int(case.mask.sum()), int((case.mask & (upstream != 0) & ~clipped).sum())
    assert 0 < some < unmasked // 2 and bool((clipped & case.mask).any())

    def rows(name):
        return sum(count for count, _ in products.get(name, []))

    for needs, wanted in (
        ((True, True, True), (unmasked, some, some)), ((True, False, False), (unmasked, some, 0)), ((False, True, False), (unmasked, 0, some)),
    ):  # fmt: skip
        case.run(needs)
        assert (rows("_linear_logprob_entropy_fwd_kernel"), rows("_hidden_gradient_kernel"), rows("_weight_gradient_kernel")) == wanted
        assert all(held for _, held in products["_linear_gradient_kernel"])  # no product there
        products.clear()
    case.ratio = "segment"  # with old_logp: the logits of rows with a gradient are computed again
    case.run()
    assert not any(held for _, held in products["_linear_gradient_kernel"]) and rows("_linear_gradient_kernel") > 0
    case.run((False, False, False))
    assert rows("_linear_logprob_entropy_fwd_kernel") == 2 * unmasked


def test_one_sweep_keeps_rows_apart(in_chunks):
    """NaN in a row that is active, or not; and a row's bits in another batch."""
    case = Case(290, torch.float32, denominator=100.0)
    clean = case.run()
    broken = 150 + int(torch.nonzero(case.mask[150:])[0])
    hidden = case.leaves[0]
    poisoned = torch.where(case.mask.unsqueeze(-1), hidden, math.nan)
    case.leaves = (poisoned, *case.leaves[1:])
    assert all(torch.equal(x, y) for x, y in zip(case.run(), clean, strict=True))
    poisoned[broken] = math.nan
    loss, logp, _, of_hidden, of_weight, of_bias = case.run()
    assert loss.isnan() and logp[broken].isnan() and of_hidden[broken].isnan().all() and of_weight.isnan().any() and of_bias.isnan().any()
    others = torch.arange(290) != broken
    assert torch.equal(logp[others], clean[1][others]) and torch.equal(of_hidden[others], clean[3][others])
    case.leaves = (hidden[3:150], *case.leaves[1:])
    case.ids, case.old, case.advantages, case.mask = (x[3:150] for x in (case.ids, case.old, case.advantages, case.mask))
    case.segments = Segments(torch.tensor([0, 147]), torch.tensor([0, 1]))
    part = case.run()
    assert all(torch.equal(part[i], clean[i][3:150]) for i in (1, 2, 3))


def test_when_one_sweep_is_taken():
    for vocab in (1000, 32_000, 151_936, 262_144):
        assert policy.chunk_rows(vocab) % 128 == 0 and policy.chunk_rows(vocab) * vocab * 4 <= policy.WORKSPACE
    assert [policy.holding_pays(151_936, width, 2) for width in (896, 1280, 1536, 4096)] == [False, False, True, True]
    assert policy.holding_pays(151_936, 896, 4)


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
