"""logprob_entropy: the six tests of an operation; the edges (4) and the backward pass have files of their own."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch
from contract import assert_within_budget
from hypothesis import given
from hypothesis import strategies as st
from implementations import INTERPRETED, exact, implementation, single  # noqa: F401  (the fixture `run`)
from logprob_entropy_cases import DTYPES, INF, NAN, case, check, quick, torch_only

from acpo_kernels import _cpu, logprob_entropy, reference

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
@given(seed=st.integers(0, 1000), v=st.integers(1, 300), shift=st.integers(-1024, 1024), temperature=st.sampled_from([1.0, 0.3, 1.7]))
def test_shift_invariance(run, seed, v, shift, temperature):
    logits, ids, _ = case(3, v, seed=seed)
    logits = (logits * 64).round() / 64  # so that the shift is exact
    for a, b in zip(run(logits, ids, temperature=temperature), run(logits + shift, ids, temperature=temperature), strict=True):
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
    wrong(ValueError, "temperature must be at least 1e-36, got 1e-37", temperature=1e-37)
    wrong(ValueError, r"temperature must be at most 1e\+36, got 1e\+39", temperature=1e39)
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


@pytest.mark.parametrize("impl", [None, "reference"])
def test_temperature_gets_no_gradient(impl):
    logits, temperature = torch.randn(2, 5, requires_grad=True), torch.ones(2, requires_grad=True)
    logp, entropy = logprob_entropy(logits, torch.tensor([1, 2]), temperature=temperature, impl=impl)
    found = torch.autograd.grad((logp + entropy).sum(), (logits, temperature), allow_unused=True)
    assert found[0].any() and found[1] is None
