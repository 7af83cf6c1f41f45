"""verl 0.9.1's Triton head: one file, because the package pulls in ray."""

from __future__ import annotations

import types

import torch

from . import FILES, by_path, on_gpu_or_interpreted

NAME = "verl"


def _kernels():
    device = types.ModuleType("verl.utils.device")
    device.get_device_capability = lambda: torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
    device.get_device_name = lambda: "cuda" if torch.cuda.is_available() else "cpu"
    device.is_cuda_available = torch.cuda.is_available()
    device.get_torch_device = lambda: torch.cuda
    return by_path(FILES["verl"], verl=types.ModuleType("verl"), verl_utils=types.ModuleType("verl.utils"), verl_utils_device=device)


def linear_logprob_entropy(device):
    on_gpu_or_interpreted(device)
    kernels = _kernels()

    class Head(torch.autograd.Function):
        """Its forward and backward in the order of verl/utils/kernel/linear_cross_entropy.py, without reduction or process group."""

        @staticmethod
        def forward(ctx, hidden, weight, ids, temperature):
            ctx.reduction = kernels.get_entropy_reduction_enum_number("none")
            logp, entropy, *statistics = kernels.efficient_entropy_forward(hidden, weight, ids, ctx.reduction, temperature, None)
            ctx.save_for_backward(hidden, weight, ids, *statistics)
            ctx.temperature = temperature
            return logp, entropy

        @staticmethod
        def backward(ctx, grad_logp, grad_entropy):
            hidden, weight, ids, *statistics = ctx.saved_tensors
            incoming = [g.contiguous() for g in (grad_logp, grad_entropy)]
            grads = kernels.efficient_entropy_backward(*incoming, hidden, weight, ids, *statistics, ctx.reduction, False, ctx.temperature, None)
            return (*grads, None, None)

    return {"verl": lambda hidden, weight, ids, temperature=1.0: Head.apply(hidden, weight, ids, float(temperature))}
