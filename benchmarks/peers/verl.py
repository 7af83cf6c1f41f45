"""verl's Triton head, loaded by path: the package itself pulls in ray. ACPO_VERL_KERNELS names verl/utils/kernel/kernels.py of a
verl 0.9 wheel (`pip download --no-deps verl==0.9.1`, unpacked anywhere); the file is read where it lies."""

from __future__ import annotations

import importlib.util
import os
import sys
import types
from functools import lru_cache
from pathlib import Path

import torch

from . import Absent

NAME = "verl"


@lru_cache(maxsize=1)
def _kernels():
    path = os.environ.get("ACPO_VERL_KERNELS", "")
    if not path:
        raise Absent("ACPO_VERL_KERNELS does not name verl/utils/kernel/kernels.py")
    if not Path(path).is_file():
        raise Absent(f"ACPO_VERL_KERNELS: no such file: {path}")
    device = types.ModuleType("verl.utils.device")
    device.get_device_capability = lambda: torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
    device.get_device_name = lambda: "cuda" if torch.cuda.is_available() else "cpu"
    device.is_cuda_available = torch.cuda.is_available()
    device.get_torch_device = lambda: torch.cuda
    stubs = {"verl": types.ModuleType("verl"), "verl.utils": types.ModuleType("verl.utils"), "verl.utils.device": device}
    kept = {name: sys.modules.get(name) for name in stubs}
    sys.modules.update(stubs)
    try:
        spec = importlib.util.spec_from_file_location("acpo_benchmarks_verl_kernels", path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    finally:
        for name, old in kept.items():
            if old is None:
                del sys.modules[name]
            else:
                sys.modules[name] = old
    return module


class _Head(torch.autograd.Function):
    """Its forward and backward in the order of verl/utils/kernel/linear_cross_entropy.py, without reduction or process group."""

    @staticmethod
    def forward(ctx, hidden, weight, ids, temperature):
        kernels = _kernels()
        ctx.reduction = kernels.get_entropy_reduction_enum_number("none")
        logp, entropy, *statistics = kernels.efficient_entropy_forward(hidden, weight, ids, ctx.reduction, temperature, None)
        ctx.save_for_backward(hidden, weight, ids, *statistics)
        ctx.temperature = temperature
        return logp, entropy

    @staticmethod
    def backward(ctx, grad_logp, grad_entropy):
        hidden, weight, ids, *statistics = ctx.saved_tensors
        incoming = [g.contiguous() for g in (grad_logp, grad_entropy)]
        grads = _kernels().efficient_entropy_backward(*incoming, hidden, weight, ids, *statistics, ctx.reduction, False, ctx.temperature, None)
        return (*grads, None, None)


def linear_logprob_entropy(device):
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise Absent("its Triton kernels run on CUDA alone")
    _kernels()
    return {"verl": lambda hidden, weight, ids, temperature=1.0: _Head.apply(hidden, weight, ids, float(temperature))}
