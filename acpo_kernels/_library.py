"""Registration with the PyTorch dispatcher: one schema an operation, a CPU and a CUDA implementation, a fake, a backward.

The dispatcher chooses the implementation, torch.compile sees one node, and autograd sees the backward that is written here.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import _cpu

NAMESPACE = "acpo_kernels"
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")


def define(
    schema: str,
    *,
    cpu: Callable,
    cuda: Callable,
    fake: Callable,
    setup_context: Callable | None = None,
    backward: Callable | None = None,
) -> Callable:
    """Defines `NAMESPACE::name` from its schema `name(arguments) -> results` and returns its callable overload.

    An operation without `backward` is not differentiable: gradients that reach it raise instead of being dropped. One with it has no
    forward-mode derivative, and a tangent that reaches it raises. One that writes into an argument (`Tensor(a!)`) is called below
    autograd, from a backward, and has none.
    """
    name = schema.split("(", 1)[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, _without_autocast(cpu, "cpu"), "CPU")
    _LIBRARY.impl(name, _without_autocast(cuda, "cuda"), "CUDA")
    qualified = f"{NAMESPACE}::{name}"
    torch.library.register_fake(qualified, fake, lib=_LIBRARY)
    operation = getattr(getattr(torch.ops, NAMESPACE), name).default
    if "!)" in schema:
        return operation
    dispatched = operation if backward is None else _without_tangents(operation)
    if backward is None:

        def backward(ctx, *grads):
            raise RuntimeError(f"{qualified} has no derivative: second derivatives and gradients through detached results are not supported")

    torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=_LIBRARY)
    return _lean(operation, cpu, dispatched)


def once_differentiable(backward: Callable, through: Callable) -> Callable:
    """The backward of an operation that has no second derivative: backward(ctx, *grads) gives a gradient an argument; through(ctx) its saved result,
    whose history is every argument that needs a gradient.

    Under create_graph every gradient hangs on that result by an operation without a derivative, so that whoever differentiates it is told. torch's
    own decorator of this name looks at the incoming gradient alone: that of a loss is a constant, and second derivatives would be 0 without a word.
    """

    def run(ctx, *grads):
        with torch.no_grad():
            found = backward(ctx, *grads)
        if not torch.is_grad_enabled():
            return found
        seen = through(ctx)
        return tuple(g if g is None else _first_derivative(g, seen) for g in found)

    return run


# Who may be watching a call, beside autograd: modes, transforms, a trace, a profiler. Names that PyTorch keeps private; where one is
# missing, every call goes through the dispatcher.
_WATCHERS = [
    (torch._C, "_len_torch_dispatch_stack"),  # TorchDispatchMode: fake tensors, export, make_fx
    (torch._C, "_is_torch_function_mode_enabled"),  # TorchFunctionMode: a default device
    (torch._C, "_is_any_autocast_enabled"),
    (torch._C, "_get_tracing_state"),  # torch.jit.trace
    (torch.autograd, "_profiler_enabled"),
    (getattr(torch._C, "_functorch", None), "peek_interpreter_stack"),  # vmap, grad, jvp, functionalize
]
_LEAN = _cpu.available and all(hasattr(module, name) for module, name in _WATCHERS)
_PLAIN = (Tensor, torch.nn.Parameter)  # no other subclass: it may mean something else by its elements
_transform = getattr(getattr(torch._C, "_functorch", None), "peek_interpreter_stack", lambda: None)


def transformed() -> bool:
    """Whether the call is inside of vmap, grad, jvp or functionalize: there a tensor does not say whether a gradient is asked for."""
    return forward_ad._current_level >= 0 or _transform() is not None


def _without_tangents(operation: Callable) -> Callable:
    """The operation, which raises where torch would drop a tangent without a word: its custom operators have no forward-mode derivative."""

    def run(*args):
        if forward_ad._current_level >= 0 and any(isinstance(x, Tensor) and _has_tangent(x) for x in args):
            name = operation.name()
            raise RuntimeError(f'{name} has no forward-mode derivative: use impl="reference", which has one, or reverse mode (backward)')
        return operation(*args)

    return run


def _has_tangent(x: Tensor) -> bool:
    while torch._C._functorch.is_batchedtensor(x):  # vmap has no rule for what asks
        x = torch._C._functorch.get_unwrapped(x)
    return forward_ad.unpack_dual(x).tangent is not None


def _lean(operation: Callable, cpu: Callable, dispatched: Callable) -> Callable:
    """The operation without what a call does not need; dispatched: the operation for a call inside of a transform.

    Where no gradient is asked for, below autograd: to find that out costs torch 10 us a call. Where besides nobody watches and every
    tensor is an ordinary one in the host's memory, its CPU implementation itself: the dispatcher would call that very function, 5 to
    10 us later.
    """
    if not _LEAN:
        return _below_autograd(operation, dispatched)
    plain_call, watchers, strided = _cpu._C.plain_call, tuple(getattr(*watcher) for watcher in _WATCHERS), torch.strided
    compiling, grad_enabled, below_autograd = torch.compiler.is_compiling, torch.is_grad_enabled, torch._C._AutoDispatchBelowAutograd

    def run(*args):
        if compiling():
            return operation(*args)
        if transformed():
            return dispatched(*args)
        answer = plain_call(args, grad_enabled(), watchers, _PLAIN, strided)
        if answer == 2:
            return cpu(*args)
        if answer == 1:
            return operation(*args)
        with below_autograd():
            return operation(*args)

    return run


def _below_autograd(operation: Callable, dispatched: Callable) -> Callable:
    def run(*args):
        if torch.compiler.is_compiling():
            return operation(*args)
        if transformed():
            return dispatched(*args)
        if torch.is_grad_enabled():
            for x in args:
                if isinstance(x, Tensor) and x.requires_grad:
                    return operation(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return operation(*args)

    return run


def triton(operation: str, name: str | None = None) -> Callable:
    """The CUDA implementation `_triton/<operation>.py: name`, imported when it is first called: the package imports without triton."""
    name = name or operation

    def call(*args):
        return getattr(importlib.import_module(f"._triton.{operation}", __package__), name)(*args)

    call.__name__ = name
    return call


def _without_autocast(function: Callable, device: str) -> Callable:
    """Autocast has cast the arguments (see `_checks.autocast`); it must not round the products inside once more."""

    @functools.wraps(function)
    def run(*args):
        if not torch.is_autocast_enabled(device):
            return function(*args)
        with torch.autocast(device, enabled=False):
            return function(*args)

    return run


def number_or_tensor(value: float | Tensor | None) -> tuple[float | None, Tensor | None]:
    """A schema holds either as two arguments: the number, or the tensor."""
    return (None, value) if isinstance(value, Tensor) else (value, None)


_first_derivative = define(
    "first_derivative(Tensor gradient, Tensor through) -> Tensor",
    cpu=lambda gradient, through: gradient.clone(),
    cuda=lambda gradient, through: gradient.clone(),
    fake=lambda gradient, through: torch.empty_like(gradient),
)
