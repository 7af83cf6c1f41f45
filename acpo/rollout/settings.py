"""Settings of the engines that run vLLM, `rollout.vllm.*` and `rollout.server.*`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass
class VLLMConfig:
    """Handed on to vLLM, by the engine `vllm` and by a server that we start."""

    gpu_memory_utilization: float = 0.3  # share of the device's memory (on CPU: of the host's): the trainer needs the rest
    max_model_len: int = 0  # most tokens of a prompt and its response; 0: the model's own
    tensor_parallel_size: int = 1
    enforce_eager: bool = False
    seed: int = 0  # of the engine; every rollout has a seed of its own, from the run's
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: policy.dtype
    sleep: bool = False  # engine `vllm`: give the device's memory back between rollouts


@dataclass
class ServerConfig:
    url: str = ""  # http://host:port of a running server; empty: start one here
    devices: str = ""  # CUDA_VISIBLE_DEVICES of a server that we start; empty: the trainer's
    transfer: Literal["files", "nccl", "ipc"] = "files"  # how weights reach it
    folder: str = ""  # files: a folder that both sides see; empty: vllm/ in the run directory
    concurrency: int = 128  # requests at a time
    timeout: float = 600.0  # seconds that a request may take, a weight update too
    start_timeout: float = 600.0  # seconds that a server may take to answer for the first time
    retries: int = 3  # of a request that failed, each after twice the wait of the one before
