"""Triton's interpreter as a GPU rounds, with the check of overflows that it only seems to have, and without work that it does again for every
value. Everything is Triton's own but what stands here."""

from __future__ import annotations

import inspect

import numpy
import torch
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter


def prepare() -> None:
    """Once a process."""
    if not hasattr(interpreter, "ORIGINAL"):
        interpreter.ORIGINAL = True
        round_as_a_gpu_does()
        check_overflows()
        patch_the_language_once()
        make_types_once()


def round_as_a_gpu_does() -> None:
    """The interpreter cuts float32 off where it becomes bfloat16 (a compiled kernel rounds to nearest even, cvt.rn), and has no fused multiply."""
    builder = interpreter.InterpreterBuilder
    cut_off, unfused = builder.cast_impl, builder.create_fma

    def cast(self, src, dst_type):
        if src.dtype.scalar != tl.float32 or dst_type.scalar != tl.bfloat16:
            return cut_off(self, src, dst_type)
        rounded = torch.from_numpy(numpy.atleast_1d(src.data).copy()).bfloat16().view(torch.int16).numpy().view(numpy.uint16)
        return interpreter.TensorHandle(rounded.reshape(numpy.shape(src.data)), dst_type.scalar)

    def fused(self, x, y, z):
        """Rounded once: the interpreter rounds the product as well, and a compensated sum would find nothing lost."""
        if z.dtype.scalar != tl.float32:
            return unfused(self, x, y, z)
        wide = numpy.multiply(x.data, y.data, dtype=numpy.float64) + z.data
        return interpreter.TensorHandle(wide.astype(numpy.float32), tl.float32)

    builder.cast_impl, builder.create_fma = cast, fused


def check_overflows() -> None:
    """Triton computes every sum, difference and product of integers once more in int64, a quarter of its time here, and then asserts nothing."""

    def check(self, lhs, rhs, binary_op):
        kind = lhs.type.scalar
        if kind.int_bitwidth >= 64:
            return
        operation = {"add": numpy.add, "sub": numpy.subtract, "mul": numpy.multiply}[binary_op.__name__]
        wide = operation(lhs.handle.data, rhs.handle.data, dtype=numpy.int64)
        if wide.size and (wide.max() > kind.get_int_max_value() or wide.min() < kind.get_int_min_value()):
            raise OverflowError(f"{kind} of {binary_op.__name__}: {wide.min()} to {wide.max()}")

    TritonSemantic.binary_op_sanitize_overflow_impl = check


def patch_the_language_once() -> None:
    """The interpreter looks through the whole language again for every function that a kernel calls, which takes half of its time."""
    patch_all, languages = interpreter._patch_lang, {}  # of a module's globals

    def patch(fn):
        module = id(fn.__globals__)  # a module's, which stays
        if module not in languages:
            languages[module] = [x for x in fn.__globals__.values() if inspect.ismodule(x) and x in (tl, tl.core)]
        if any(tl.core.is_builtin(x.load) for x in languages[module]):
            scope = patch_all(fn)
            # Triton 3.6 takes int() of an array of one element, which NumPy 2.4 refuses.
            tl.core.tensor.__index__ = lambda self: int(self.handle.data.item())
            return scope
        return interpreter._LangPatchScope()

    interpreter._patch_lang = patch


def make_types_once() -> None:
    """The element type of an array, the type of a block and the shape of a value are made anew for every value, and blocks of one shape
    are compared axis by axis."""
    element_type, elements, shapes = interpreter._get_np_dtype, {}, {}
    make_block, broadcast = tl.block_type.__init__, TritonSemantic.broadcast_impl_value

    def np_dtype(of):
        if type(of) is not tl.dtype:
            return element_type(of)
        if of.name not in elements:
            elements[of.name] = element_type(of)
        return elements[of.name]

    def block(self, element, shape):
        key = tuple([s.value if type(s) is tl.constexpr else s for s in shape])
        if key not in shapes:
            make_block(self, element, shape)
            shapes[key] = self.shape, self.numel, tl.constexpr(self.numel), tl.tuple([tl.constexpr(s) for s in key])
        self.element_ty, self.key, self.name = element, key, f"<{key}, {element}>"
        self.shape, self.numel, *self.of_values = shapes[key]

    def same(self, other):
        return type(other) is tl.block_type and self.key == other.key and self.element_ty == other.element_ty

    def value(self, handle, type):
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.numel, self.shape = type.of_values if type.is_block() else (tl.constexpr(1), tl.tuple([]))

    def alike(self, x, y):
        return (x, y) if x.type.is_block() and y.type.is_block() and x.type.key == y.type.key else broadcast(self, x, y)

    interpreter._get_np_dtype = np_dtype
    tl.block_type.__init__, tl.block_type.__eq__ = block, same
    tl.core.tensor.__init__ = value
    TritonSemantic.broadcast_impl_value = alike
