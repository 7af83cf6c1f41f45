"""vLLM inside the training process. Its weights are loaded from the policy's tensors one at a time, before the first rollout and after every
update; its prefix cache is emptied with them.

Each rollout is a request with a seed of its own; the `group_size` requests of one prompt find its keys and values in the prefix cache.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..config import ConfigError
from ..policy import Policy
from . import RolloutError, Sample, check_lengths, checked_sample, request_seeds
from .settings import VLLMConfig
from .transfer import BACKEND, EXTENSION, Files


class VLLMEngine:
    def __init__(self, policy: Policy, eos_ids: list[int], settings: VLLMConfig, directory: Path):
        self.policy, self.eos_ids, self.settings = policy, eos_ids, settings
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine in this process, so that weights need not leave it
        for name, value in QUIET.items():
            os.environ.setdefault(name, value)
        try:
            import vllm
        except ImportError as error:
            raise ConfigError(f"rollout.engine = 'vllm' needs vLLM in this environment ({error}); docs/rollouts.md says how to install it") from None
        from . import worker

        self.vllm, self.worker = vllm, worker
        model = policy.save_shape(directory / "vllm")
        with _random_state():  # vLLM seeds every generator there is
            self.llm = vllm.LLM(
                model=str(model), tensor_parallel_size=settings.tensor_parallel_size, seed=settings.seed, enforce_eager=settings.enforce_eager,
                gpu_memory_utilization=settings.gpu_memory_utilization, max_model_len=settings.max_model_len or None,
                dtype=dtype_of(settings, policy), enable_sleep_mode=settings.sleep, **COMMON,
            )  # fmt: skip
        self.files: Files | None = None
        if settings.tensor_parallel_size > 1:  # its workers are processes
            self.files = Files(Local(self.llm), policy, policy.dtype, directory / "vllm")
        else:
            self.llm.init_weight_transfer_engine({"init_info": {}})
        self.loaded: int | None = None  # the version of the policy whose weights it holds
        self.asleep = False

    def sync(self) -> None:
        if self.loaded == self.policy.version:
            return
        if self.asleep:
            self.llm.wake_up(tags=["weights"])
        if self.files is not None:
            self.files.send()
        else:
            self.llm.start_weight_update()
            self.worker.handed_over[:] = [self.policy.weights()]
            self.llm.update_weights({"update_info": {}})
            self.llm.finish_weight_update()
        if self.asleep:
            self.llm.wake_up(tags=["kv_cache"])
            self.asleep = False
        if not self.llm.reset_prefix_cache():
            raise RolloutError("vLLM kept its prefix cache over a weight update: it holds keys and values of the old weights")
        self.loaded = self.policy.version

    def generate(
        self,
        prompts: list[list[int]],
        *,
        max_new_tokens: int,
        temperature: float,
        generator: torch.Generator,
        done: MutableMapping[int, Sample] | None = None,
    ) -> list[Sample]:
        check_lengths(prompts, max_new_tokens, self.llm.model_config.max_model_len, "rollout.vllm.max_model_len")
        done = {} if done is None else done
        self.sync()
        engine = self.llm.llm_engine
        inputs = self.llm.renderer.render_cmpl([{"prompt_token_ids": prompt} for prompt in prompts])
        try:
            for i, (prompt, seed) in enumerate(zip(inputs, request_seeds(len(prompts), generator), strict=True)):
                if i not in done:
                    engine.add_request(str(i), prompt, self._sampling(max_new_tokens, temperature, seed))
            while engine.has_unfinished_requests():
                for output in engine.step():
                    done[int(output.request_id)] = self._sample(output.outputs[0], max_new_tokens)
        finally:
            engine.abort_request([str(i) for i in range(len(prompts)) if i not in done])
        if self.settings.sleep:
            self.llm.sleep(level=2)  # the weights are gone: level 1 would keep a copy on the host
            self.asleep, self.loaded = True, None
        return [done[i] for i in range(len(prompts))]

    def _sampling(self, max_new_tokens: int, temperature: float, seed: int) -> Any:
        from vllm.sampling_params import RequestOutputKind

        return self.vllm.SamplingParams(
            temperature=temperature, max_tokens=max_new_tokens, seed=seed, logprobs=0, stop_token_ids=self.eos_ids, ignore_eos=True,
            detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY,
        )  # fmt: skip

    def _sample(self, output: Any, max_new_tokens: int) -> Sample:
        ids = list(output.token_ids)
        logp = [chosen[i].logprob for i, chosen in zip(ids, output.logprobs, strict=True)]
        try:
            return checked_sample(
                ids, logp, output.finish_reason, vocab_size=self.policy.vocab_size, eos_ids=self.eos_ids, max_new_tokens=max_new_tokens,
                device=self.policy.device,
            )  # fmt: skip
        except ValueError as error:
            raise RolloutError(f"vLLM returned a rollout that cannot be: {error}") from None

    def close(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()


# What both engines ask of vLLM. The vocabulary is the policy's: no tokenizer takes part, and weights come from the policy alone.
COMMON = {
    "skip_tokenizer_init": True, "load_format": "dummy", "logprobs_mode": "processed_logprobs", "generation_config": "vllm",
    "enable_prefix_caching": True, "worker_extension_cls": EXTENSION, "weight_transfer_config": {"backend": BACKEND},
}  # fmt: skip
QUIET = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}


def dtype_of(settings: VLLMConfig, policy: Policy) -> str:
    return str(policy.dtype).removeprefix("torch.") if settings.dtype == "auto" else settings.dtype


class Local:
    """vLLM's weight-update calls on an engine of this process."""

    def __init__(self, llm: Any):
        self.llm = llm

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.llm.init_weight_transfer_engine({"init_info": init_info})

    def start_weight_update(self) -> None:
        self.llm.start_weight_update()

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.llm.update_weights({"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.llm.finish_weight_update(weight_version)


@contextmanager
def _random_state() -> Iterator[None]:
    states = random.getstate(), np.random.get_state(), torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    yield
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    if states[3]:
        torch.cuda.set_rng_state_all(states[3])
