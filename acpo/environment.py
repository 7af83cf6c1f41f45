"""What is here: versions, the device, the kernels that an operation runs on and why, optional packages and what their absence costs."""

from __future__ import annotations

import importlib.util
import os
import platform
from importlib import metadata
from typing import NamedTuple

import torch

OPERATIONS = (
    "logprob_entropy", "linear_logprob_entropy", "hindsight_information", "linear_hindsight_information", "segment_reduce", "segment_credit",
    "policy_loss", "linear_policy_loss",
)  # fmt: skip
REQUIRED = ("torch", "triton", "transformers", "tokenizers", "numpy", "safetensors")
# Distribution, module, extra, and what is lost without it.
OPTIONAL = (
    ("pyarrow", "pyarrow", "report", "rollouts are not kept; no problems from parquet files"),
    ("datasets", "datasets", "data", "no problems from folders of datasets or from the hub"),
    ("math-verify", "math_verify", "math", "verify.kind=math is refused: answers that are formulas are compared as text"),
    ("reasoning-gym", "reasoning_gym", "reasoning-gym", "no reasoning_gym: problems"),
    ("peft", "peft", "peft", "policy.lora_rank is refused: every weight is trained"),
    ("vllm", "vllm", "vllm", "rollout.engine=vllm is refused: the local engine samples, without paged attention"),
    ("flash-attn", "flash_attn", "flash-attn", "policy.attention=flash_attention_2 is refused: sdpa"),
    ("trl", "trl", "trl", "no trainer of TRL with step credit"),
    ("tensorboard", "tensorboard", "tensorboard", "trainer.log=tensorboard is refused; metrics.jsonl and the report are there all the same"),
    ("wandb", "wandb", "wandb", "trainer.log=wandb is refused"),
    ("trackio", "trackio", "trackio", "trainer.log=trackio is refused"),
    ("shtab", "shtab", "completion", "no completion in bash, zsh and tcsh"),
)


class Kernel(NamedTuple):
    operation: str
    implementation: str
    why: str


class Extra(NamedTuple):
    name: str
    version: str | None
    extra: str
    cost: str


def version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "acpo": version("acpo") or "not installed (run from a checkout)"}
    return found | {name: version(name) or "missing" for name in REQUIRED}


def machine() -> dict[str, str]:
    """Processor, threads, GPUs, memory."""
    threads = torch.get_num_threads()
    cores = f"{threads} thread{'s' * (threads > 1)} of torch on {os.cpu_count()} processors"
    out = {"processor": f"{processor()}, {cores}", "platform": platform.platform()}
    total = memory_total("cpu")
    if total:
        out["memory"] = f"{total / 2**30:.1f} GB, {(memory_free('cpu') or 0) / 2**30:.1f} GB free"
    if not torch.cuda.is_available():
        out["gpu"] = "none" if torch.version.cuda else "none: this torch is built without CUDA"
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        found = torch.cuda.get_device_properties(i)
        out[f"gpu {i}"] = f"{found.name}, sm_{found.major}{found.minor}, {found.total_memory / 2**30:.0f} GB"
    return out


def processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _meminfo(name: str) -> int | None:
    try:
        with open("/proc/meminfo", encoding="utf-8") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name + ":"))
    except (OSError, StopIteration):
        return None


def memory_total(device: str) -> int | None:
    return torch.cuda.get_device_properties(device).total_memory if device.startswith("cuda") else _meminfo("MemTotal")


def memory_free(device: str) -> int | None:
    """Bytes that can still be had, None where nobody says."""
    return torch.cuda.mem_get_info(device)[0] if device.startswith("cuda") else _meminfo("MemAvailable")


ISA = {
    "amx": "AMX", "avx512bf16": "AVX-512 with BF16", "avx512": "AVX-512", "avx2": "AVX2", "baseline": "baseline",
}  # fmt: skip


def cpu_kernels(head: bool = True) -> tuple[str, str]:
    """What the operations run on in host memory, and why; bfloat16 products are those of the head's alone."""
    from acpo_kernels import _cpu

    if not _cpu.available:
        return (
            "PyTorch formulas",
            "the extension acpo_kernels._C is not built: installed with ACPO_NO_EXT=1, or a checkout without a build (pip install -e .)",
        )
    found = _cpu._C.cpu_isa()
    wanted = os.environ.get("ACPO_CPU_ISA", "")
    why = f"ACPO_CPU_ISA={wanted} asks for it" if wanted else "the best that this processor has"
    if found in ("amx", "avx512bf16"):
        name = f"{ISA[found]} for bfloat16, else AVX-512" if head else ISA["avx512"]
    else:
        name = ISA[found]
    return f"C++, {name}", why


def cuda_kernels() -> tuple[str, str] | None:
    """The same on CUDA; None without a device."""
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    if importlib.util.find_spec("triton") is None:
        return "none", "triton is not installed: pip install triton"
    return f"Triton {version('triton')}, sm_{major}{minor}", "tensors on a CUDA device"


def kernels() -> list[Kernel]:
    """Every operation; float64 runs on PyTorch formulas everywhere."""
    cuda, out = cuda_kernels(), []
    for name in OPERATIONS:
        cpu, why = cpu_kernels(head=name.startswith("linear_"))
        out.append(Kernel(name, cpu if cuda is None else f"{cuda[0]}; on the host {cpu}", why if cuda is None else f"{cuda[1]}; {why}"))
    has = cpu.startswith("C++")
    return [*out, Kernel("Segmenter", "C++" if has else "missing", "on the host" if has else f"{why}; without it there is no training")]


def extras() -> list[Extra]:
    return [Extra(name, version(name) or ("installed" if _there(module) else None), extra, cost) for name, module, extra, cost in OPTIONAL]


def _there(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
