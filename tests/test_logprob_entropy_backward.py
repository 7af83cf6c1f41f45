"""logprob_entropy: its backward pass, the memory that it takes, and the gradient in the place of the logits."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from implementations import implementation  # noqa: F401  (the fixture `run`)
from logprob_entropy_cases import DTYPES, INF, NAN, case, torch_only

from acpo_kernels import logprob_entropy


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


# Memory, and the gradient in the place of the logits


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
    block = torch.randn(2, 2, 9, requires_grad=True)
    for view in (block.view(4, 9), block.view(4, 9)[:, :5], block.transpose(0, 1)[:, 1].view(2, 9)):
        with pytest.raises(ValueError, match="got a view of a leaf"):
            logprob_entropy(view, ids[: len(view)], inplace_backward=True)
    computed = (block * 1.0).view(4, 9)  # a view of what was computed
    logprob_entropy(computed, ids, inplace_backward=True).logp.sum().backward()
    assert block.grad.data_ptr() != block.data_ptr() and torch.allclose(block.grad.view(4, 9).sum(1), torch.zeros(4), atol=1e-6)
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
