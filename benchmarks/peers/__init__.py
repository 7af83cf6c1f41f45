"""Other implementations of the same operations, found at run time. One file a family; each imports its package only when it is asked.

A family is a module with a function per operation that it has, `name(device) -> {provider: function}`, which raises `Absent` with
the reason where it cannot run. `find` collects them; what is absent is named in the table, never left out silently.

    logprob_entropy          f(logits, ids, temperature) -> (logp, entropy | None)
    linear_logprob_entropy   f(hidden, weight, ids, temperature) -> (logp, entropy | None)
    hindsight_information    f(logits, hindsight_logits, ids) -> the six results
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable

import torch

FAMILIES = ("plain", "trl", "liger", "cut_cross_entropy", "verl", "quack")


class Absent(Exception):
    """This peer cannot run here; the message says why."""


def require(module: str, install: str):
    """The imported module, or Absent with what to install."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        missing = getattr(error, "name", None) or module
        raise Absent(f"no module {missing} (pip install {install})") from None
    except Exception as error:  # a package that breaks on import is absent, and says how
        raise Absent(f"{module} does not import: {type(error).__name__}: {' '.join(str(error).split())[:120]}") from None


def find(operation: str, device: torch.device) -> tuple[dict[str, Callable], dict[str, str]]:
    """({provider: function}, {family: why it is absent})."""
    found: dict[str, Callable] = {}
    absent: dict[str, str] = {}
    for family in FAMILIES:
        module = importlib.import_module(f"{__name__}.{family}")
        make = getattr(module, operation, None)
        if make is None:
            continue
        try:
            found |= make(device)
        except Absent as why:
            absent[module.NAME] = str(why)
    return found, absent


def versions() -> dict[str, str]:
    out = {}
    for package in ("trl", "liger-kernel", "cut-cross-entropy", "quack-kernels", "nvidia-cutlass-dsl", "transformers"):
        try:
            out[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            out[package] = "absent"
    return out
