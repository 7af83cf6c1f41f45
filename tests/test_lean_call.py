"""The way around the dispatcher: the same results where it is taken, and not taken where somebody watches the call."""

from __future__ import annotations

import importlib

import pytest
import torch
from ragged import segments_of
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import acpo_kernels as ops
from acpo_kernels import Segments, _cpu, _library

pytestmark = pytest.mark.skipif(not _library._LEAN, reason="built without the C++ extension, or a torch without one of the names")

V, H = 11, 8
OPERATIONS = (
    "segment_reduce", "segment_credit", "policy_loss", "logprob_entropy", "hindsight_information", "linear_logprob_entropy",
    "linear_hindsight_information", "linear_policy_loss",
)  # fmt: skip


def arguments(operation: str, n: int = 6, dtype: torch.dtype = torch.float32) -> tuple[tuple, dict]:
    """(positional, keywords), masked and with every tensor that may stand in for a number."""
    logits, other = torch.randn(n, V, dtype=dtype), torch.randn(n, V, dtype=dtype)
    hidden, hinted, weight = torch.randn(n, H, dtype=dtype), torch.randn(n, H, dtype=dtype), torch.randn(V, H, dtype=dtype)
    ids, mask = torch.randint(V, (n,)), torch.rand(n) < 0.8
    segments = segments_of([[n // 2, n - n // 2], [0]], terminal=[True, False])
    tokens, scores, advantages = torch.randn(n, dtype=dtype), torch.randn(3, dtype=dtype), torch.randn(2, dtype=dtype)
    temperature = {"temperature": torch.rand(n) + 0.5, "mask": mask}
    return {
        "segment_reduce": ((torch.randn(2, n, dtype=dtype), segments), {"reduce": "mean", "mask": mask}),
        "segment_credit": ((scores, segments, advantages), {"mask": mask, "reliability": torch.rand(2), "scale": torch.tensor(0.7)}),
        "policy_loss": ((tokens, tokens + 0.1, tokens, segments), {"mask": mask, "denominator": torch.tensor(3.0)}),
        "logprob_entropy": ((logits, ids), temperature),
        "hindsight_information": ((logits, other, ids), temperature),
        "linear_logprob_entropy": ((hidden, weight, ids), {"bias": torch.randn(V, dtype=dtype), **temperature}),
        "linear_hindsight_information": ((hidden, hinted, weight, ids), temperature),
        "linear_policy_loss": ((hidden, weight, ids, tokens, tokens, segments), {"mask": mask}),
    }[operation]


def tensors(result) -> list[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        return [result]
    return [x for part in result for x in (part.values() if isinstance(part, dict) else [part])]


@pytest.fixture
def taken(monkeypatch):
    """taken(operation) -> a list that grows by one each time the way around the dispatcher is taken."""

    def count(operation: str) -> list:
        calls: list[bool] = []
        module = importlib.import_module(f"acpo_kernels.{operation}")
        run = module._op
        cells = dict(zip(run.__code__.co_freevars, run.__closure__, strict=True))
        cpu = cells["cpu"].cell_contents
        monkeypatch.setattr(cells["cpu"], "cell_contents", lambda *args: calls.append(True) or cpu(*args))
        return calls

    return count


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_bitwise_what_the_dispatcher_gives(operation, dtype, taken, monkeypatch):
    positional, keywords = arguments(operation, dtype=dtype)
    calls = taken(operation)
    lean = tensors(getattr(ops, operation)(*positional, **keywords))
    assert len(calls) == 1
    with Dispatch():
        registered = tensors(getattr(ops, operation)(*positional, **keywords))
    assert len(calls) == 1
    assert len(lean) == len(registered)
    for x, y in zip(lean, registered, strict=True):
        assert x.dtype == y.dtype
        assert x.shape == y.shape
        assert x.contiguous().view(torch.uint8 if x.ndim else x.dtype).equal(y.contiguous().view(torch.uint8 if y.ndim else y.dtype))
        assert not x.requires_grad


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("grad", [False, True])
def test_taken_where_nothing_asks_for_a_gradient(operation, grad, taken):
    positional, keywords = arguments(operation)
    calls = taken(operation)
    with torch.set_grad_enabled(grad):
        getattr(ops, operation)(*positional, **keywords)
        with torch.inference_mode():
            getattr(ops, operation)(*positional, **keywords)
    assert len(calls) == 2


DIFFERENTIABLE = ("segment_reduce", "policy_loss", "logprob_entropy", "linear_logprob_entropy", "linear_policy_loss")


@pytest.mark.parametrize("operation", DIFFERENTIABLE)
def test_not_taken_where_a_gradient_is_wanted(operation, taken):
    (first, *rest), keywords = arguments(operation)
    calls = taken(operation)
    leaf = first.requires_grad_()
    results = tensors(getattr(ops, operation)(leaf, *rest, **keywords))
    assert calls == []
    assert results[0].requires_grad
    with torch.no_grad():
        getattr(ops, operation)(leaf, *rest, **keywords)
    assert len(calls) == 1


class Subclass(torch.Tensor):
    pass


class Function(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


WATCHERS = {
    "dispatch mode": Dispatch,
    "function mode": Function,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "profiler": lambda: torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]),
    "default device": lambda: torch.device("cpu"),
}


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("watcher", WATCHERS)
def test_not_taken_where_somebody_watches(operation, watcher, taken):
    positional, keywords = arguments(operation)
    calls = taken(operation)
    with WATCHERS[watcher]():
        getattr(ops, operation)(*positional, **keywords)
    assert calls == []
    getattr(ops, operation)(*positional, **keywords)
    assert len(calls) == 1


def test_a_profiler_sees_the_operation():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        ops.segment_reduce(torch.ones(3), segments_of([[3]]))
    assert "acpo_kernels::segment_reduce" in {event.name for event in profile.events()}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_not_taken_for_a_subclass(operation, taken):
    (first, *rest), keywords = arguments(operation)
    calls = taken(operation)
    getattr(ops, operation)(first.as_subclass(Subclass), *rest, **keywords)
    assert calls == []
    with torch.no_grad():  # a parameter is no other tensor
        getattr(ops, operation)(torch.nn.Parameter(first), *rest, **keywords)
    assert len(calls) == 1


def test_not_taken_for_fake_tensors(taken):
    calls = taken("segment_reduce")
    segments = segments_of([[2, 1]])
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        out = ops.segment_reduce(mode.from_tensor(torch.ones(3)), segments)
    assert type(out).__name__ == "FakeTensor"
    assert out.shape == (2,)
    assert calls == []


@pytest.mark.parametrize("compiled", [False, True])
def test_not_taken_in_a_trace(compiled, taken):
    calls = taken("segment_reduce")
    segments, values = segments_of([[2, 1]]), torch.randn(3)
    if compiled:
        out = torch.compile(lambda x: ops.segment_reduce(x, segments), fullgraph=True, backend="aot_eager")(values)
    else:
        out = torch.func.functionalize(lambda x: ops.segment_reduce(x, segments))(values)
    assert calls == []
    assert torch.equal(out, ops.segment_reduce(values, segments))


def test_not_taken_in_a_transform(taken):
    calls = taken("segment_reduce")
    segments, rows = segments_of([[2, 1]]), torch.randn(4, 3)
    mapped = torch.func.vmap(lambda x: ops.segment_reduce(x, segments))(rows)  # torch's own loop over the rows
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(lambda x: ops.segment_reduce(x, segments).sum())(rows[0])
    assert calls == []
    assert torch.equal(mapped, torch.stack([ops.segment_reduce(x, segments) for x in rows]))


@pytest.mark.parametrize("operation", ["segment_reduce", "policy_loss", "logprob_entropy", "linear_logprob_entropy", "linear_policy_loss"])
@pytest.mark.parametrize("lean", [True, False])
def test_a_gradient_reaches_through_vmap(operation, lean, monkeypatch):
    """A tensor of torch.vmap's does not say that a gradient is asked for: the rows' gradient is what it is without vmap, of the head's weight too."""
    if not lean:
        op = _library._below_autograd(*[getattr(torch.ops.acpo_kernels, operation).default] * 2)
        monkeypatch.setattr(importlib.import_module(f"acpo_kernels.{operation}"), "_op", op)
    (first, *rest), keywords = arguments(operation)
    rows, others = torch.stack([first, 2 * first]).requires_grad_(), [x for x in rest if isinstance(x, torch.Tensor) and x.is_floating_point()]
    weight = others[0].requires_grad_() if operation == "linear_policy_loss" else None

    def value(row):
        return tensors(getattr(ops, operation)(row, *rest, **keywords))[0].sum()

    leaves = [rows] if weight is None else [rows, weight]
    wanted = torch.autograd.grad(sum(value(row) for row in rows), leaves)
    found = torch.autograd.grad(torch.vmap(value)(rows).sum(), leaves)
    assert wanted[0].any() and all(torch.allclose(x, y, rtol=1e-5, atol=1e-6) for x, y in zip(found, wanted, strict=True))


def test_a_tensor_that_is_not_what_lies_in_its_memory(taken):
    calls = taken("segment_reduce")
    segments = segments_of([[2, 1]])
    negated = torch.complex(torch.zeros(3), torch.tensor([1.0, 2.0, 4.0])).conj().imag
    assert negated.is_neg()
    assert ops.segment_reduce(negated, segments).tolist() == [-3.0, -4.0]
    assert ops.segment_reduce(torch._efficientzerotensor(3), segments).tolist() == [0.0, 0.0]
    assert calls == []


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_default_device_and_a_default_dtype_change_nothing(operation):
    positional, keywords = arguments(operation)
    wanted = tensors(getattr(ops, operation)(*positional, **keywords))
    try:
        torch.set_default_dtype(torch.float64)
        actual = tensors(getattr(ops, operation)(*positional, **keywords))
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        elsewhere = tensors(getattr(ops, operation)(*positional, **keywords))
    for x, y, z in zip(wanted, actual, elsewhere, strict=True):
        torch.testing.assert_close(y, x, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(z, x, rtol=0, atol=0, equal_nan=True)


def test_where_a_name_is_missing_every_call_is_registered(monkeypatch):
    monkeypatch.setattr(_library, "_LEAN", False)
    calls = []
    op = torch.ops.acpo_kernels.segment_reduce.default
    run = _library._lean(op, lambda *args: calls.append(args), op)
    segments = segments_of([[2, 1]])
    assert run(torch.ones(3), segments.token_offsets, segments.sequence_offsets, "sum", "segment", None).tolist() == [2.0, 1.0]
    assert calls == []


def test_offsets_of_another_kind_are_not_read():
    segments = segments_of([[2, 1]])
    other = Segments._trusted(segments.token_offsets.to("meta"), segments.sequence_offsets, None, 3)
    with pytest.raises((RuntimeError, ValueError, NotImplementedError)):
        ops.segment_reduce(torch.ones(3), other)
    assert _cpu.available


@pytest.mark.parametrize("lean", [True, False])
@pytest.mark.parametrize("operation", [o for o in OPERATIONS if o not in ("segment_credit", "hindsight_information", "linear_hindsight_information")])
def test_a_forward_mode_derivative_is_not_dropped(operation, lean, monkeypatch):
    """Custom operators have none: an operation says so, and the reference has one."""
    (values, *others), keywords = arguments(operation)
    module = importlib.import_module(f"acpo_kernels.{operation}")
    if not lean:
        plain = getattr(torch.ops.acpo_kernels, operation).default
        monkeypatch.setattr(module, "_op", _library._below_autograd(plain, _library._without_tangents(plain)))

    def first(x, impl=None):
        return tensors(getattr(ops, operation)(x, *others, impl=impl, **keywords))[0]

    tangent = torch.rand_like(values)
    for f, x, t in ((first, values, tangent), (torch.vmap(first), values[None], tangent[None])):
        with pytest.raises(RuntimeError, match=f"acpo_kernels::{operation} has no forward-mode derivative: use impl="):
            torch.func.jvp(f, (x,), (t,))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(values, tangent)
        with pytest.raises(RuntimeError, match=f"acpo_kernels::{operation} has no forward-mode derivative"):
            first(dual)
        assert torch.equal(first(values), first(values.clone()))  # without a tangent the level means nothing
        assert forward_ad.unpack_dual(first(dual, "reference")).tangent.isfinite().all()
