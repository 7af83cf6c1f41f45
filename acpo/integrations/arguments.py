"""What a loop hands over, checked by name and brought to the host. Errors name its own rollouts, whatever order they are taken in."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from types import NoneType
from typing import Any

import torch
from torch import Tensor

from acpo_kernels import pack, unpack

ROUNDING = 1e-3  # by so much an engine's log-prob of a certain token may lie above 0


def layered(below: Mapping[str, Any], settings: Mapping[str, Any] | None, where: str) -> dict[str, Any]:
    """A caller's settings over those that stand below them."""
    if not isinstance(settings, (Mapping, NoneType)):
        raise TypeError(f"{where} must be a mapping of the method's settings, got {type(settings).__name__}")
    return {**below, **(settings or {})}


def whole(name: str, value: Any) -> int:
    try:
        number = 0 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = 0
    if number < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
    return number


def refuse(name: str, wanted: str, values: Tensor, wrong: Tensor, order: Tensor) -> None:
    """ValueError for the first value that is wrong, both [B] or [B,T]; order [B] are the caller's numbers of the rollouts."""
    if wrong.any():
        at = wrong.nonzero()[0]
        raise ValueError(f"{name} must {wanted}, got {values[tuple(at)].item()} for rollout {int(order[at[0]])}")


def tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")


def rows(name: str, values: Tensor, order: Tensor) -> Tensor:
    """Values [B] in order."""
    tensor(name, values)
    if tuple(values.shape) != (len(order),):
        raise ValueError(f"{name} must be [B] = ({len(order)},), got {tuple(values.shape)}")
    return values.detach().cpu()[order]


def finite(name: str, values: Tensor, order: Tensor) -> Tensor:
    own = rows(name, values, order).float()
    if wrong := int((~own.isfinite()).sum()):
        raise ValueError(f"{name} must be finite, got NaN or infinity for {wrong} of {len(own)} rollouts")
    return own


def probabilities(name: str, values: Tensor, order: Tensor) -> Tensor:
    own = rows(name, values, order).float()
    refuse(name, "lie in [0, 1]", own, ~((own >= 0) & (own <= 1)), order)
    return own


def truth(name: str, values: Tensor, order: Tensor) -> Tensor:
    """Host values [B] or [B,T], in order, as bool: 0.5 and NaN would be True without a word."""
    refuse(name, "hold True and False, or 1 and 0", values, (values != 0) & (values != 1), order)
    return values.bool()


def answer_starts(values: Tensor, order: Tensor, lengths: Tensor) -> Tensor:
    """Places in responses of these lengths [B], -1 for none."""
    own = rows("answer_start", values, order)
    place = own.double()
    inside = (place == place.floor()) & (place >= 0) & (place < lengths)
    refuse("answer_start", "be -1 or the place of a token in its response, from 0", own, ~inside & (place != -1), order)
    return own.long()


def outcomes(values: Tensor, order: Tensor) -> Tensor:
    """Host values [B], in order, as outcomes: NaN where there is none."""
    own = values.float()
    refuse("outcome", "lie in [0, 1], or be NaN where there is none", own, (own < 0) | (own > 1), order)
    return own


def count(outcome: Tensor) -> int:
    tensor("outcome", outcome)
    if outcome.ndim != 1:
        raise ValueError(f"outcome must be [B], got {tuple(outcome.shape)}")
    return len(outcome)


class Packed:
    """The batch's real tokens, packed on the host in the order of groups."""

    def __init__(self, ids: Tensor, mask: Tensor, written: Tensor | None, order: Tensor, vocab_size: int):
        tensor("ids", ids)
        if ids.ndim != 2 or ids.shape[0] != len(order):
            raise ValueError(f"ids must be [B,T] with B = {len(order)}, the length of outcome, got {tuple(ids.shape)}")
        self.device, self.shape, self.order = ids.device, ids.shape, order
        self.mask = truth("mask", self._host("mask", mask), order)
        padded = self._host("ids", ids)
        refuse("ids", f"lie in [0, vocab_size) with vocab_size = {vocab_size}", padded, self.mask & ((padded < 0) | (padded >= vocab_size)), order)
        self.ids = pack(padded, self.mask)
        inside = torch.ones_like(self.mask) if written is None else truth("written", self._host("written", written), order)
        self.written = pack(inside, self.mask)
        self.lengths = self.mask.sum(1)
        self.cu_seqlens = torch.nn.functional.pad(self.lengths.cumsum(0), (1, 0))

    def _host(self, name: str, values: Tensor) -> Tensor:
        tensor(name, values)
        if tuple(values.shape) != tuple(self.shape):
            raise ValueError(f"{name} must be [B,T] = {tuple(self.shape)} as ids, got {tuple(values.shape)}")
        return values.detach().cpu()[self.order]

    def pack(self, name: str, values: Tensor) -> Tensor:
        return pack(self._host(name, values).float(), self.mask)

    def unpack(self, values: Tensor, fill: float = 0) -> Tensor:
        out = torch.empty(self.shape, dtype=values.dtype)
        out[self.order] = unpack(values, self.mask, fill)
        return out.to(self.device)

    def responses(self) -> list[Tensor]:
        return list(self.ids.split(self.lengths.tolist()))


def same_kinds(name: str, given: Any, fresh: Any) -> None:
    """ValueError where a state is none of the kind of `fresh`, that of before the first batch: there None is a number to come, [] are numbers."""
    if isinstance(fresh, dict):
        held = set(given) if isinstance(given, Mapping) else set()
        if fresh.keys() - held - {"batches"} or held - fresh.keys():  # an attributor's of an earlier release has no `batches`
            got = ", ".join(map(str, given)) or "nothing" if isinstance(given, Mapping) else type(given).__name__
            raise ValueError(f"{name} must hold {', '.join(fresh)}, got {got}")
        for key, value in given.items():
            same_kinds(f"{name}.{key}", value, fresh[key])
        return
    if isinstance(fresh, list):
        fits = _numbers(given, 3 if name.endswith(".batches") else 1) and len(given) == (len(fresh) or len(given))
    else:
        kinds = {NoneType: (NoneType, int, float), float: (int, float)}.get(type(fresh), type(fresh))
        fits = isinstance(given, kinds) and isinstance(given, bool) == isinstance(fresh, bool)
    if not fits:
        raise ValueError(f"{name} must be of the kind of {fresh!r}, got {given!r:.60}")


def _numbers(values: Any, depth: int) -> bool:
    if depth:
        return isinstance(values, list) and all(_numbers(value, depth - 1) for value in values)
    return isinstance(values, (int, float)) and not isinstance(values, bool)
