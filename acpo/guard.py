"""A loss or a gradient that is not a finite number: the optimiser step is left out and counted, and three in a row end the run with a diagnosis."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint import put_text

LIMIT = 3  # one is bad luck with a batch, three in a row are not
STANDS = "the last checkpoint stands; a lower optimizer.learning_rate is the usual way out"


class TrainingError(RuntimeError):
    """Training cannot go on; the last checkpoint stands."""


class Interrupted(TrainingError):
    """Nothing that the policy did: what the loop stands on is gone, a rollout engine or another process. The same command continues."""


class NotFinite(ArithmeticError):
    """What was about to change the weights."""


def finite(what: str, value: Tensor) -> float:
    number = float(value.detach())
    if not math.isfinite(number):
        raise NotFinite(f"the {what} is {number}")
    return number


class Guard:
    def __init__(self, path: Path, writes: bool = True):
        """path: where the diagnosis goes; writes: whether this process is the one that writes it."""
        self.path, self.writes = path, writes
        self.left_out = 0  # optimiser steps of the run
        self.in_a_row: list[str] = []

    def taken(self) -> None:
        """An optimiser step was fine."""
        self.in_a_row.clear()

    def leave_out(self, error: NotFinite, where: str, model: nn.Module, batch: dict[str, Tensor], **more: Any) -> None:
        """Counts an optimiser step that is not taken. TrainingError where it is one too many."""
        self.left_out += 1
        self.in_a_row.append(f"{where}: {error}")
        if len(self.in_a_row) < LIMIT:
            return
        self._diagnose(model, batch, more)
        raise TrainingError(f"{error} at {where}, {LIMIT} times in a row: {self.path} says what was at hand; {STANDS}")

    def _diagnose(self, model: nn.Module, batch: dict[str, Tensor], more: dict[str, Any]) -> None:
        weights = dict(model.named_parameters())
        found = {
            **more,
            "left_out": self.in_a_row,
            "left_out_in_all": self.left_out,
            "torch": torch.__version__,
            "largest_weight": _number(max((float(p.detach().abs().max()) for p in weights.values() if p.numel()), default=0.0)),
            "weights_not_finite": [name for name, p in weights.items() if not bool(p.isfinite().all())],
            "gradients_not_finite": [name for name, p in weights.items() if p.grad is not None and not bool(p.grad.isfinite().all())],
            "batch": {name: _look(v) for name, v in batch.items() if v.is_floating_point()},
        }
        if self.writes:
            put_text(self.path, json.dumps(found, indent=2, allow_nan=False) + "\n")

    def state(self) -> dict[str, Any]:
        return {"left_out": self.left_out, "in_a_row": self.in_a_row}

    def load(self, state: dict[str, Any]) -> None:
        self.left_out, self.in_a_row = state["left_out"], list(state["in_a_row"])


def _look(values: Tensor) -> dict[str, Any]:
    values = values.detach().double()
    known = values[values.isfinite()]
    least, most = (_number(float(f(known))) if len(known) else None for f in (torch.min, torch.max))
    return {"count": values.numel(), "not_finite": values.numel() - len(known), "min": least, "max": most}


def _number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
