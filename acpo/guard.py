"""A loss or a gradient that is not a finite number: the optimiser step is left out and counted, and three in a row end the run with a diagnosis."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint import put

LIMIT = 3  # one is bad luck with a batch, three in a row are not


class Guard:
    def __init__(self) -> None:
        self.skipped = 0  # optimiser steps of this run
        self.in_a_row: list[str] = []

    def taken(self) -> None:
        """An optimiser step was fine."""
        self.in_a_row.clear()

    def skip(self, why: str) -> bool:
        """An optimiser step is left out; whether that is one too many."""
        self.skipped += 1
        self.in_a_row.append(why)
        return len(self.in_a_row) >= LIMIT

    def diagnose(self, path: Path, model: nn.Module, values: dict[str, Tensor], **more: Any) -> None:
        """Writes what was at hand: why each step was left out, the weights, the gradients that are not finite, and the batch's values."""
        gradients = [name for name, p in model.named_parameters() if p.grad is not None and not bool(p.grad.isfinite().all())]
        found = {
            **more,
            "left_out": self.in_a_row,
            "left_out_in_all": self.skipped,
            "torch": torch.__version__,
            "weights": {name: _look(p) for name, p in model.named_parameters() if not bool(p.isfinite().all())} or "all finite",
            "largest_weight": _number(max(float(p.abs().max()) for p in model.parameters() if p.numel())),
            "gradients_not_finite": gradients,
            "batch": {name: _look(v) for name, v in values.items() if v.is_floating_point()},
        }
        put(path, lambda p: p.write_text(json.dumps(found, indent=2, allow_nan=False) + "\n", encoding="utf-8"))

    def state(self) -> dict[str, Any]:
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load(self, state: dict[str, Any]) -> None:
        self.skipped, self.in_a_row = state["skipped"], list(state["in_a_row"])


def _look(values: Tensor) -> dict[str, Any]:
    values = values.detach().float()
    finite = values[values.isfinite()]
    least, most = (_number(float(f(finite))) if len(finite) else None for f in (torch.min, torch.max))
    return {"count": values.numel(), "not_finite": values.numel() - len(finite), "min": least, "max": most}


def _number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
