"""Weights from the policy to a vLLM engine, through vLLM's own start / update / finish."""

from __future__ import annotations

import base64
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..policy import Policy

BACKEND = "acpo"  # the name of ours in vLLM's registry, see worker.py
EXTENSION = "acpo.rollout.worker.Extension"
SHARD_BYTES = 1 << 30


class Receiver(Protocol):
    """The receiving side: vLLM's `VLLMWeightSyncClient`."""

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None: ...

    def start_weight_update(self) -> None: ...

    def update_weights(self, update_info: dict[str, Any] | list[dict[str, Any]]) -> None: ...

    def finish_weight_update(self, weight_version: str | None = None) -> None: ...


class Files:
    """Through safetensors files in a folder that both sides see: a piece of at most SHARD_BYTES (or one tensor) at a time is written, loaded
    and removed, so that no second copy of the weights exists in memory or on disk."""

    def __init__(self, receiver: Receiver, policy: Policy, dtype: torch.dtype, folder: Path):
        self.receiver, self.policy, self.dtype, self.folder = receiver, policy, dtype, folder.resolve()
        self.name = f"update-{os.getpid()}-{os.urandom(4).hex()}.safetensors"  # another process may write into the same folder, on another machine
        self.receiver.init_weight_transfer_engine({})

    def send(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / self.name
        self.receiver.start_weight_update()
        try:
            for shard in _shards(_converted(self.policy, self.dtype)):
                save_file(shard, path)
                shard.clear()
                self.receiver.update_weights({"path": str(path)})
        finally:
            path.unlink(missing_ok=True)
        self.receiver.finish_weight_update()


class Devices:
    """From device to device by vLLM's own backends: nccl between different GPUs, ipc where trainer and workers share them. Both sides of it are
    vLLM's, so vLLM must be installed beside the trainer."""

    def __init__(self, receiver: Receiver, policy: Policy, dtype: torch.dtype, backend: str, workers: int, address: tuple[str, int]):
        from vllm.distributed.weight_transfer import ParamMeta, WeightSource, WeightTransferTrainerFactory

        class Source(WeightSource):
            meta: list[ParamMeta] | None = None

            def __iter__(self) -> Iterator[tuple[str, Tensor]]:
                return _converted(policy, dtype)

            def metadata(self) -> list[ParamMeta]:
                if self.meta is None:  # names and shapes never change
                    self.meta = [ParamMeta(name, value.dtype, tuple(value.shape)) for name, value in self]
                return self.meta

        if backend == "nccl":
            from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

            info = NCCLTrainerInitInfo(master_address=address[0], master_port=address[1], world_size=workers + 1, rank=0)
        else:
            from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

            info = IPCTrainerInitInfo(packed=True, rank=0)
        self.engine = WeightTransferTrainerFactory.trainer_init(info, client=receiver, source=Source())

    def send(self) -> None:
        self.engine.send_weights()


def _converted(policy: Policy, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    return ((name, value.to(dtype)) for name, value in policy.weights())


def _shards(weights: Iterator[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    size = 0
    for name, value in weights:
        if shard and size + value.nbytes > SHARD_BYTES:
            yield shard
            shard, size = {}, 0
        shard[name] = value.contiguous()
        size += value.nbytes
    if shard:
        yield shard


def json_safe(update_info: Any) -> Any:
    """An update as JSON can carry it: the handles of CUDA IPC are pickled for the worker, as vLLM's own HTTP client does it."""
    if isinstance(update_info, list):
        return [json_safe(part) for part in update_info]
    if update_info.get("ipc_handles") is None:
        return update_info
    handles = base64.b64encode(pickle.dumps(update_info["ipc_handles"])).decode()
    return {name: value for name, value in update_info.items() if name != "ipc_handles"} | {"ipc_handles_pickled": handles}
