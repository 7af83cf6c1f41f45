"""Argument checks shared by all operations: each error names the argument, what was wanted and what came."""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction
from numbers import Real
from typing import Any

import torch
from torch import Tensor

FLOAT = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGER = (torch.int64, torch.int32)
BOOL = (torch.bool,)

# What the float32 kernels hold, on every device: beside logits of up to 100, log2(e) / temperature and their product with it, its inverse, and
# 1 / softcap. The sums of a divergence carry 2^64 besides (csrc/row_sums.h): up to 1,800 / temperature they stay below 2^128.
COLDEST, COLDEST_DIVERGENCE, HOTTEST = 1e-36, 1e-16, 1e36
SOFTCAPS = (1e-36, 1e30)  # 1e-38 of it is lost where a device takes the smallest float32 for 0
DIVISORS = (1e-36, 1e36)  # of a loss or a score: the inverse is a float32 as well


def _short(dtypes: Iterable[torch.dtype]) -> str:
    return ", ".join(str(d).removeprefix("torch.") for d in dtypes)


def tensor(
    name: str,
    value: object,
    dtypes: tuple[torch.dtype, ...] | None,
    *,
    ndim: int | None = None,
    shape: tuple[int, ...] | None = None,
    shape_name: str = "",
    device: torch.device | None = None,
) -> None:
    """value is a tensor of one of dtypes (None: any), of this rank or shape, on this device."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if dtypes is not None and value.dtype not in dtypes:
        hint = " (fp8 is not supported)" if "float8" in str(value.dtype) else ""
        raise ValueError(f"{name} must have dtype {_short(dtypes)}, got {_short([value.dtype])}{hint}")
    if value.layout is not torch.strided:
        raise ValueError(f"{name} must be a dense tensor, got layout {value.layout}")
    if ndim is not None and value.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} dimension{'s' if ndim != 1 else ''}, got shape {tuple(value.shape)}")
    if shape is not None and tuple(value.shape) != tuple(shape):
        wanted = f"{shape_name} = {tuple(shape)}" if shape_name else f"{tuple(shape)}"
        raise ValueError(f"{name} must have shape {wanted}, got {tuple(value.shape)}")
    if device is not None and value.device != device:
        raise ValueError(f"{name} must be on {device}, got {value.device}")


def is_vector(value: object, length: int, device: torch.device, dtypes: tuple[torch.dtype, ...] = FLOAT) -> bool:
    """What `tensor` checks of a tensor [length], in one expression: an operation says what is wrong only once this has failed."""
    return (
        isinstance(value, Tensor) and value.dtype in dtypes and value.shape == (length,) and value.device == device and value.layout is torch.strided
    )


def _is_number(value: object) -> bool:
    """One of numpy's too; no fraction, of which torch knows nothing."""
    return isinstance(value, Real) and not isinstance(value, (bool, Fraction))


def number(name: str, value: Any, *, low: float | None = None, above: float | None = None, high: float | None = None) -> None:
    """value is a finite number inside [low, high], and above a bound."""
    if not _is_number(value):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if value != value or value in (float("inf"), float("-inf")):
        raise ValueError(f"{name} must be finite, got {value}")
    if isinstance(value, int) and abs(value) > 2**1023:
        raise ValueError(f"{name} must be a number that a float holds, got an integer of {value.bit_length()} bits")
    if above is not None and not value > above:
        raise ValueError(f"{name} must be greater than {above}, got {value}")
    if low is not None and value < low:
        raise ValueError(f"{name} must be at least {low}, got {value}")
    if high is not None and value > high:
        raise ValueError(f"{name} must be at most {high}, got {value}")


def tensor_or_number(
    name: str, value, shapes: tuple, device, *, low: float | None = None, above: float | None = None, high: float | None = None
) -> None:
    """value is None, a number, or a floating tensor of one of shapes (its values are the caller's promise)."""
    if isinstance(value, Tensor):
        tensor(name, value, FLOAT, device=device)
        if tuple(value.shape) not in shapes:
            wanted = " or ".join(str(s) for s in dict.fromkeys(shapes))
            raise ValueError(f"{name} must be a number or have shape {wanted}, got {tuple(value.shape)}")
    elif value is not None:
        number(name, value, low=low, above=above, high=high)


def choice(name: str, value: object, choices: tuple) -> None:
    if not (value is None or isinstance(value, str)) or value not in choices:  # an array would compare its elements
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def temperature(value: float | Tensor, shape: tuple[int, ...], device: torch.device, coldest: float = COLDEST) -> None:
    """A number in [coldest, HOTTEST], or a floating tensor of the shape of ids (its values are the caller's promise)."""
    if isinstance(value, Tensor):
        tensor("temperature", value, FLOAT, shape=shape, shape_name="the shape of ids", device=device)
    else:
        number("temperature", value, above=0, low=coldest, high=HOTTEST)


def implementation(value: str | None) -> None:
    choice("impl", value, (None, "reference"))


def ids_in_range(ids: Tensor, active: Tensor, vocab_size: int) -> None:
    """On the host, every active id lies in [0, V): one pass, one error that names the first that does not. On a GPU nothing is read back."""
    if ids.device.type != "cpu":
        return
    bad = active & ((ids < 0) | (ids >= vocab_size))
    if bool(bad.any()):
        at = tuple(bad.nonzero()[0].tolist())
        raise ValueError(f"ids must lie in [0, V) with V = {vocab_size}, or be -100, got {int(ids[at])} at index {at[0] if len(at) == 1 else at}")


def rows(logits: Tensor, ids: Tensor, temperature_: float | Tensor, mask: Tensor | None, *, coldest: float = COLDEST) -> None:
    """The arguments of an operation on logits: logits[...,V] floating, ids[...], temperature, mask[...]."""
    tensor("logits", logits, FLOAT)
    if logits.ndim < 1 or logits.shape[-1] == 0:
        raise ValueError(f"logits must be [...,V] with V >= 1, got {tuple(logits.shape)}")
    _ids_mask_temperature(ids, tuple(logits.shape[:-1]), logits.device, temperature_, mask, coldest)


def head(
    hidden: Tensor, weight: Tensor, ids: Tensor, bias: Tensor | None, temperature_: float | Tensor, softcap: float | None, mask: Tensor | None,
    *, coldest: float = COLDEST,
) -> None:  # fmt: skip
    """The arguments of an operation on hidden states: hidden[N,H], weight[V,H], ids[N], bias[V], temperature, softcap, mask[N]."""
    tensor("hidden", hidden, FLOAT, ndim=2)
    if hidden.shape[1] == 0:
        raise ValueError(f"hidden must be [N,H] with H >= 1, got {tuple(hidden.shape)}")
    tensor("weight", weight, FLOAT, ndim=2, device=hidden.device)
    if weight.shape[1] != hidden.shape[1]:
        raise ValueError(f"weight must be [V,H] with hidden's H = {hidden.shape[1]}, got {tuple(weight.shape)}")
    if weight.shape[0] == 0:
        raise ValueError(f"weight must be [V,H] with V >= 1, got {tuple(weight.shape)}")
    if weight.dtype != hidden.dtype:
        raise ValueError(f"weight must have hidden's dtype {_short([hidden.dtype])} (outside autocast), got {_short([weight.dtype])}")
    if bias is not None:
        tensor("bias", bias, FLOAT, shape=(weight.shape[0],), shape_name="[V]", device=hidden.device)
    if softcap is not None:
        number("softcap", softcap, above=0, low=SOFTCAPS[0], high=SOFTCAPS[1])
    _ids_mask_temperature(ids, (hidden.shape[0],), hidden.device, temperature_, mask, coldest)


def _ids_mask_temperature(ids, shape, device, temperature_, mask, coldest) -> None:
    tensor("ids", ids, INTEGER, shape=shape, shape_name="the leading dimensions", device=device)
    if mask is not None:
        tensor("mask", mask, BOOL, shape=shape, shape_name="the shape of ids", device=device)
    temperature(temperature_, shape, device, coldest)


def autocast(*tensors: Any) -> tuple[Any, ...]:
    """Under autocast the operands of a matrix product take its dtype (differentiably); outside they are left as they are, and what autocast casts
    nowhere always is: no tensor, float64, integers."""
    kind = tensors[0].device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind) or tensors[0].dtype == torch.float64:
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(t.to(dtype) if isinstance(t, Tensor) and t.dtype in FLOAT[:3] else t for t in tensors)
