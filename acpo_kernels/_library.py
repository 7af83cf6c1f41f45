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

    An operation without `backward` is not differentiable: gradients that reach it raise instead of being dropped. One that writes
    into an argument (`Tensor(a!)`) is called below autograd, from a backward, and has none.
    """
    name = schema.split("(", 1)[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, _without_autocast(cpu, "cpu"), "CPU")
    _LIBRARY.impl(name, _without_autocast(cuda, "cuda"), "CUDA")
    qualified = f"{NAMESPACE}::{name}"
    torch.library.register_fake(qualified, fake, lib=_LIBRARY)
    if "!)" in schema:
        return getattr(getattr(torch.ops, NAMESPACE), name).default
    if backward is None:

        def backward(ctx, *grads):
            raise RuntimeError(f"{qualified} has no derivative: second derivatives and gradients through detached results are not supported")

    torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=_LIBRARY)
    return _below_autograd(getattr(getattr(torch.ops, NAMESPACE), name).default)


def _below_autograd(operation: Callable) -> Callable:
    """The operation, without autograd where nothing asks for a gradient: what torch does to find that out costs 10 us a call."""

    def run(*args):
        if torch.compiler.is_compiling() or forward_ad._current_level >= 0:
            return operation(*args)
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
