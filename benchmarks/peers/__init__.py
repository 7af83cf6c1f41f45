"""Other implementations of the same operations, found at run time. One file a family; each imports its package only when it is asked.

A family is a module with a function per operation that it has, `name(device) -> {provider: function}`, which raises `Absent` with
the reason where it cannot run. `find` collects them; what is absent is named in the table, never left out silently.

    logprob_entropy          f(logits, ids, temperature) -> (logp, entropy | None)
    linear_logprob_entropy   f(hidden, weight, ids, temperature) -> (logp, entropy | None)
    hindsight_information    f(logits, hindsight_logits, ids) -> the six results
    policy_loss_from_logits  f(logits[B,L+1,V], ids[B,L], old_logp[B,L], advantages[B]) -> loss, the mean over tokens
    linear_policy_loss       f(hidden[B,L,H], weight, ids[B,L], old_logp[B,L], advantages[B]) -> the same

Peers whose packages do not install beside ours are single files, loaded by their path in the package from the folder that ACPO_PEER_FILES names:
`python -m benchmarks.peers.fetch FOLDER` puts them into FOLDER/files.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType

import torch

FAMILIES = ("plain", "trl", "liger", "cut_cross_entropy", "verl", "unsloth", "quack", "flash_attn")

FILES = {  # single files: path in the package
    "verl": "verl/utils/kernel/kernels.py", "unsloth_zoo": "unsloth_zoo/fused_losses/fused_linear.py",
    "flash-attn": "flash_attn/ops/triton/cross_entropy.py",
}  # fmt: skip


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


@cache
def by_path(path: str, **stubs: ModuleType) -> ModuleType:
    """The module of one file of a package, e.g. verl/utils/kernel/kernels.py, without the package. stubs (a_b for a.b) stand in for modules
    that it imports and that are not needed."""
    folder = os.environ.get("ACPO_PEER_FILES", "")
    if not folder:
        raise Absent(f"ACPO_PEER_FILES does not name a folder that holds {path}")
    file = Path(folder, path)
    if not file.is_file():
        raise Absent(f"ACPO_PEER_FILES: no such file: {file}")
    kept = {name.replace("_", "."): sys.modules.get(name.replace("_", ".")) for name in stubs}
    sys.modules.update({name.replace("_", "."): stub for name, stub in stubs.items()})
    try:
        spec = importlib.util.spec_from_file_location(f"acpo_peer_{path.removesuffix('.py').replace('/', '_')}", file)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    except Exception as error:
        raise Absent(f"{path} does not import: {type(error).__name__}: {' '.join(str(error).split())[:120]}") from None
    finally:
        for name, old in kept.items():
            if old is None:
                del sys.modules[name]
            else:
                sys.modules[name] = old
    return module


def on_gpu_or_interpreted(device: torch.device) -> None:
    """Absent where Triton kernels cannot run."""
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise Absent("its Triton kernels run on CUDA alone")


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
    folder = os.environ.get("ACPO_PEER_FILES", "")
    for name, path in FILES.items():
        out[name] = "its file" if folder and Path(folder, path).is_file() else "absent"
    return out
