"""The loss from hidden states by the Triton kernels in the interpreter (`test_triton_interpreter.py` runs this file): two phases, or one sweep."""

from __future__ import annotations

import math

import pytest
import torch
from contract import assert_within_budget
from linear_kernels import DTYPES, inputs, narrow_slices  # noqa: F401  (the fixture `narrow`)

from acpo_kernels import Segments, reference
from acpo_kernels._triton import linear_gradients
from acpo_kernels._triton import linear_logprob_entropy as kernels
from acpo_kernels._triton import linear_policy_loss as policy


class Case:
    """Rows that are masked, clipped, and of a group without reward variance, over several chunks of 128 rows."""

    def __init__(self, rows, dtype, *, vocab=300, width=8, ratio="token", on_policy=False, softcap=None, **settings):
        hidden, weight, ids, bias = inputs(rows, vocab, width, dtype)
        self.leaves, self.ids, self.ratio, self.softcap, self.settings = (hidden, weight, bias), ids, ratio, softcap, settings
        logp = reference.linear_logprob_entropy(hidden.double(), weight.double(), ids, bias=bias.double(), softcap=softcap).logp.float()
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
            hidden, weight, self.ids, bias, 0.8, None, self.softcap, self.old, self.advantages, self.segments.token_offsets,
            self.segments.sequence_offsets, self.mask, 0.2, 0.28, self.ratio, number, weights, extra["ref_logp"], extra["kl_weight"],
            extra["rollout_logp"], 2.0, over, denominators, needs,
        )  # fmt: skip
        return loss, *rest

    def wanted(self, kind):
        leaves = [x.to(kind).requires_grad_() for x in self.leaves]
        old = None if self.old is None else self.old.to(kind)
        result = reference.linear_policy_loss(
            *leaves[:2], self.ids, old, self.advantages.to(kind), self.segments, bias=leaves[2], mask=self.mask, clip=(0.2, 0.28), ratio=self.ratio,
            temperature=0.8, softcap=self.softcap, **self.settings,
        )  # fmt: skip
        return result.loss.detach(), result.logp.detach(), result.entropy.detach(), *torch.autograd.grad(result.loss, leaves)

    def check(self, first=0):
        """Results and gradients, or those from `first` on."""
        names = ("loss", "logp", "entropy", "gradient of hidden", "gradient of weight", "gradient of bias")
        actual = self.run()
        for i, (name, x, y, z) in enumerate(zip(names, actual, self.wanted(torch.float32), self.wanted(torch.float64), strict=True)):
            assert x.dtype == torch.float32
            if i < first:
                continue
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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [30, 150])
def test_a_softcap_in_one_sweep_with_rows_that_fill_no_tile(rows, dtype, in_chunks):
    """The held logits of a row that is not there are -inf: its gradient of 0 times the slope of their softcap would be NaN in every weight."""
    Case(rows, dtype, softcap=3.0).check(first=3)


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
