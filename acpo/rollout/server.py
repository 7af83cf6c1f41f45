"""Rollouts from a vLLM server over HTTP: its OpenAI-compatible completions with token ids both ways, and its weight-update calls.

A request that fails is asked again, with the same seed, so that it gives the same rollout; one that keeps failing stops the call with an
error, and what is finished by then is in `done`.
"""

from __future__ import annotations

import os
import threading
from collections.abc import MutableMapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch

from ..config import ConfigError, RolloutConfig
from ..policy import Policy
from . import RolloutError, Sample, check_lengths, checked_sample, request_seeds
from .client import Client, NoAnswer, Refused
from .transfer import Devices, Files, json_safe

DEV_MODE = "start it with VLLM_SERVER_DEV_MODE=1 as docs/rollouts.md says"


class ServerEngine:
    first_wait = 1.0  # seconds before a request is asked again; doubled each time

    def __init__(self, policy: Policy, eos_ids: list[int], settings: RolloutConfig, directory: Path):
        self.policy, self.eos_ids, self.settings = policy, eos_ids, settings.server
        self.process = None
        if not self.settings.url:
            from .process import Process

            self.process = Process(policy, settings.vllm, self.settings, directory)
        self.client = Client(self.settings.url or self.process.url)
        self.stop = threading.Event()
        self.run = os.urandom(4).hex()  # tells this training process's weights from another's
        self.loaded: int | None = None
        try:
            self._meet()
            self.transfer = self._transfer(settings, directory)
        except BaseException:
            self.close()
            raise

    def _meet(self) -> None:
        """The model's name, its longest sequence, and whether its log-probs are those of the distribution that it samples from."""
        served = self._ask("/v1/models")
        try:
            self.model, self.most = served["data"][0]["id"], served["data"][0]["max_model_len"]
            if type(self.model) is not str or type(self.most) is not int:
                raise TypeError
        except (TypeError, KeyError, IndexError):
            raise RolloutError(f"{self.client.url}/v1/models does not name a model and its max_model_len: is this a vLLM server?") from None
        try:
            info = self._ask("/server_info?config_format=json", most_bytes=8 << 20)
        except RolloutError as error:
            raise RolloutError(f"{error}; {DEV_MODE}") from None
        try:
            mode = info["vllm_config"]["model_config"]["logprobs_mode"]
        except (TypeError, KeyError):
            raise RolloutError(f"{self.client.url}/server_info does not tell logprobs_mode: {DEV_MODE}") from None
        if mode != "processed_logprobs":
            raise ConfigError(f"the server at {self.client.url} must run with --logprobs-mode processed_logprobs, got {mode!r:.40}")

    def _transfer(self, settings: RolloutConfig, directory: Path) -> Files | Devices:
        name = settings.vllm.dtype
        dtype = self.policy.dtype if name == "auto" else getattr(torch, name)
        if self.settings.transfer == "files":
            return Files(self, self.policy, dtype, Path(self.settings.folder or directory / "vllm"))
        from .process import free_port

        workers = self._ask("/get_world_size")["world_size"]
        return Devices(self, self.policy, dtype, self.settings.transfer, workers, (self.client.own_address(), free_port()))

    # --- weights ------------------------------------------------------------------------------------------------------------------

    def sync(self) -> None:
        self._send()

    def _send(self) -> None:
        if self.loaded == self.policy.version:
            return
        self._ask("/pause?mode=abort", {})  # a request that was given up must not put keys of old weights into the cache
        self.transfer.send()
        if self._ask("/reset_prefix_cache", {}) != {"success": True}:
            raise RolloutError("the vLLM server kept its prefix cache over a weight update: it holds keys and values of the old weights")
        self._ask("/resume", {})
        self.loaded = self.policy.version

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._ask("/init_weight_transfer_engine", {"init_info": init_info})

    def start_weight_update(self) -> None:
        self._ask("/start_weight_update", {})

    def update_weights(self, update_info: Any) -> None:
        self._ask("/update_weights", {"update_info": json_safe(update_info)})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._ask("/finish_weight_update", {"weight_version": weight_version or f"{self.run}-{self.policy.version}"})

    def _check_weights(self) -> None:
        """That the server still holds what was sent: one that was restarted holds something else, and says nothing."""
        wanted, found = f"{self.run}-{self.loaded}", (self._ask("/weight_info") or {}).get("weight_version")
        if found != wanted:
            raise Refused(f"the server's weights are {found!r:.60} and not {wanted!r} that were sent to it: was it restarted?")

    def _ask(self, path: str, payload: Any = None, most_bytes: int = 1 << 20) -> Any:
        """A call that is not repeated."""
        try:
            return self.client.call(path, payload, seconds=self.settings.timeout, most_bytes=most_bytes)
        except (NoAnswer, Refused) as error:
            raise RolloutError(self._told(error)) from None

    def _told(self, error: Exception) -> str:
        ended = self.process.ended() if self.process is not None else ""
        return f"the vLLM server at {self.client.url}: {error}" + (f"; {ended}" if ended else "")

    # --- rollouts -----------------------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: list[list[int]],
        *,
        max_new_tokens: int,
        temperature: float,
        generator: torch.Generator,
        done: MutableMapping[int, Sample] | None = None,
    ) -> list[Sample]:
        check_lengths(prompts, max_new_tokens, self.most, "the vLLM server's max_model_len")
        done = {} if done is None else done
        self._send()
        seeds = request_seeds(len(prompts), generator)
        missing = [i for i in range(len(prompts)) if i not in done]
        self.stop.clear()
        failures: list[Exception] = []

        def one(i: int) -> None:
            try:
                done[i] = self._request(prompts[i], max_new_tokens, temperature, seeds[i])
            except (NoAnswer, Refused) as error:
                failures.append(error)
                self.stop.set()  # those under way may finish; no other begins

        pool = ThreadPoolExecutor(self.settings.concurrency, thread_name_prefix="rollout")
        try:
            for asked in wait([pool.submit(one, i) for i in missing], return_when=FIRST_EXCEPTION).done:
                asked.result()  # what is no failure of the server, a full disk, is raised as it is
        except BaseException:  # and does not wait for the server, nor does an interrupt
            self.stop.set()
            self.client.hang_up()
            raise
        finally:
            pool.shutdown(cancel_futures=True)
        if not failures and missing:
            try:
                self._check_weights()
            except (Refused, RolloutError) as error:
                for i in missing:
                    del done[i]
                failures.append(error)
        if failures:
            raise RolloutError(f"{self._told(failures[0])}; {len(done)} of {len(prompts)} rollouts are finished and kept")
        return [done[i] for i in range(len(prompts))]

    def _request(self, prompt: list[int], max_new_tokens: int, temperature: float, seed: int) -> Sample:
        payload = {
            "model": self.model, "prompt": prompt, "max_tokens": max_new_tokens, "temperature": temperature, "seed": seed, "logprobs": 0,
            "return_token_ids": True, "return_tokens_as_token_ids": True, "stop_token_ids": self.eos_ids, "ignore_eos": True,
            # Said, lest the model's generation_config.json say otherwise: the distribution itself, nothing cut off or penalised.
            "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
        }  # fmt: skip
        most_bytes = 65536 + 64 * len(prompt) + 512 * max_new_tokens
        for attempt in range(self.settings.retries + 1):
            try:
                if attempt:
                    self._check_weights()
                if self.stop.is_set():
                    raise NoAnswer("another request has failed")
                answer = self.client.call("/v1/completions", payload, seconds=self.settings.timeout, most_bytes=most_bytes)
                return self._sample(answer, prompt, max_new_tokens)
            except (NoAnswer, RolloutError) as error:
                failed = error
            if attempt < self.settings.retries and self.stop.wait(self.first_wait * 2**attempt):
                break
        raise NoAnswer(f"{failed}, asked {attempt + 1} times")

    def _sample(self, answer: Any, prompt: list[int], max_new_tokens: int) -> Sample:
        try:
            (choice,) = answer["choices"]
            if choice["prompt_token_ids"] != prompt:
                raise ValueError("prompt_token_ids must be the prompt that was sent")
            return checked_sample(
                choice["token_ids"], choice["logprobs"]["token_logprobs"], choice["finish_reason"], vocab_size=self.policy.vocab_size,
                eos_ids=self.eos_ids, max_new_tokens=max_new_tokens, device=self.policy.device,
            )  # fmt: skip
        except (KeyError, TypeError, ValueError) as error:
            raise NoAnswer(f"/v1/completions answered what no rollout is: {type(error).__name__}: {error!s:.300}") from None

    def close(self) -> None:
        self.stop.set()
        self.client.hang_up()
        if self.process is not None:
            self.process.close()
