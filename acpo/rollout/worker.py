"""What runs inside vLLM's workers: a weight-transfer backend for every device. Named to vLLM as `EXTENSION`, which imports this module in each
worker process before the model is built.

vLLM's own backends (nccl, ipc) need CUDA. This one loads, within vLLM's own start / update / finish, weights that are handed over in this very
process, or that lie in a safetensors file which both sides see.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from safetensors import safe_open
from torch import Tensor
from vllm.distributed.weight_transfer import WeightTransferEngine, WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.platforms import current_platform

from .transfer import BACKEND

handed_over: list[Iterator[tuple[str, Tensor]]] = []  # by the engine `vllm`, whose worker is the trainer's own process


@dataclass
class InitInfo(WeightTransferInitInfo):
    """Nothing to agree upon."""


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    path: str = ""  # empty: handed over


class WeightReceiver(WeightTransferEngine[InitInfo, UpdateInfo]):
    init_info_cls, update_info_cls = InitInfo, UpdateInfo

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        pass

    def start_weight_update(self) -> None:
        self.missing = {name for name, _ in self.model.named_parameters()} if self.model_config.quantization is None else set()
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict) -> None:
        self.receive_weights(self.parse_update_info(update_info))

    @torch.no_grad()
    def receive_weights(self, update_info: UpdateInfo) -> None:
        weights = _read(update_info.path) if update_info.path else handed_over.pop()
        loaded = self.model.load_weights(weights)
        if loaded is not None:  # a model that does not say what it loaded is taken at its word
            self.missing -= loaded
        else:
            self.missing.clear()

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        if self.missing:  # vLLM itself leaves the old values in place and says so in its log
            raise RuntimeError(f"the weight update lacked {len(self.missing)} parameters, among them {min(self.missing)}")

    def shutdown(self) -> None:
        pass


def _read(path: str) -> Iterator[tuple[str, Tensor]]:
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118  it is not a mapping
            yield name, file.get_tensor(name)


class Extension:
    """Adds nothing to the worker: naming it is how this module gets there."""


def keep_plain_weights() -> None:
    """On CPU vLLM packs the weights of linear layers for oneDNN and AMX when it loads them; a later load would fill the tensors that those
    kernels no longer read, and report success. Plain products read what is loaded."""
    import vllm._custom_ops as operations
    import vllm.model_executor.layers.utils as layers

    operations._supports_onednn = False
    layers.check_cpu_sgl_kernel = lambda *_, **__: False


if current_platform.is_cpu():
    keep_plain_weights()
WeightTransferEngineFactory.register_engine(BACKEND, WeightReceiver)
