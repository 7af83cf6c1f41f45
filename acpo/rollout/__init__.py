"""Sampling engines. One protocol: token ids in, token ids, behaviour log-probs and the finish reason out."""

from __future__ import annotations

import math
from collections.abc import MutableMapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:  # the verifier's workers import the configuration, and with it this package: without torch
    import torch
    from torch import Tensor

    from ..config import Config
    from ..policy import Policy
    from ..ranks import Ranks


class RolloutError(RuntimeError):
    """Rollouts cannot be had: what failed, and what is kept."""


class Sample(NamedTuple):
    """One rollout: ids [T] with the end token when there is one, log-probs [T] under the policy that sampled, and whether it ended
    (finish reason "stop": its last token is an end token) or was cut at max_new_tokens ("length")."""

    ids: Tensor
    logp: Tensor
    finished: bool


class Engine(Protocol):
    def sync(self) -> None:
        """Takes the policy's present weights, where they have changed since the last time."""
        ...

    def generate(
        self,
        prompts: list[list[int]],
        *,
        max_new_tokens: int,
        temperature: float,
        generator: torch.Generator,
        done: MutableMapping[int, Sample] | None = None,
    ) -> list[Sample]:
        """One rollout a prompt, in their order. temperature=0 is greedy (log-probs at temperature 1).

        The same prompts, weights and generator state give the same rollouts. `done` holds finished rollouts by their place: those are
        not sampled again, and an engine that can lose the others puts each there as it finishes.
        """
        ...

    def close(self) -> None: ...


def build(config: Config, policy: Policy, eos_ids: list[int], directory: Path, ranks: Ranks) -> Engine:
    """The engine of the configuration; directory is the run's."""
    if config.rollout.engine == "local":
        from .local import LocalEngine

        return LocalEngine(policy, eos_ids, config.rollout.batch_tokens)
    if config.rollout.engine == "vllm":
        from .vllm import VLLMEngine

        return VLLMEngine(policy, eos_ids, config.rollout.vllm, directory)
    if ranks.size > 1:
        from .shared import SharedServerEngine

        return SharedServerEngine(policy, eos_ids, config.rollout, directory, ranks)
    from .server import ServerEngine

    return ServerEngine(policy, eos_ids, config.rollout, directory)


def checked_sample(
    ids: object, logp: object, reason: object, *, vocab_size: int, eos_ids: Sequence[int], max_new_tokens: int, device: torch.device
) -> Sample:
    """A rollout as another program gave it; ValueError says what is wrong with it. Nothing is taken on trust."""
    if not isinstance(ids, list) or not isinstance(logp, list):
        raise ValueError(f"token ids and log-probs must be lists, got {type(ids).__name__} and {type(logp).__name__}")
    if not 1 <= len(ids) <= max_new_tokens:
        raise ValueError(f"a rollout must have 1 to max_new_tokens = {max_new_tokens} tokens, got {len(ids)}")
    if len(logp) != len(ids):
        raise ValueError(f"there must be a log-prob for each of the {len(ids)} tokens, got {len(logp)}")
    for i in ids:
        if type(i) is not int or not 0 <= i < vocab_size:
            raise ValueError(f"token ids must be integers in [0, {vocab_size}), got {i!r:.40}")
    for p in logp:
        if type(p) not in (float, int) or not math.isfinite(p) or p > 0:
            raise ValueError(f"log-probs must be finite and at most 0, got {p!r:.40}")
    ends = [t for t, i in enumerate(ids) if i in eos_ids]
    if reason not in ("stop", "length"):
        raise ValueError(f"the finish reason must be 'stop' or 'length', got {reason!r:.40}")
    if reason == "stop" and ends != [len(ids) - 1]:
        raise ValueError(f"a rollout that stopped must hold one end token, its last: of {len(ids)} tokens {ends[:3]} are end tokens")
    if reason == "length" and (ends or len(ids) != max_new_tokens):
        raise ValueError(f"a rollout that was cut must have max_new_tokens = {max_new_tokens} tokens and no end token, got {len(ids)}")
    import torch

    values = torch.tensor(logp, dtype=torch.float32, device=device)
    return Sample(torch.tensor(ids, dtype=torch.int64, device=device), values, reason == "stop")


def check_lengths(prompts: list[list[int]], max_new_tokens: int, most: int, name: str) -> None:
    longest = max(map(len, prompts), default=0)
    if longest + max_new_tokens > most:
        raise RolloutError(
            f"{name} = {most}, and a prompt of {longest} tokens with rollout.max_new_tokens = {max_new_tokens} needs {longest + max_new_tokens}"
        )


def request_seeds(count: int, generator: torch.Generator) -> list[int]:
    """A seed for each place, whether or not its rollout is finished already."""
    import torch

    return torch.randint(2**62, (count,), generator=generator, device=generator.device).tolist()
