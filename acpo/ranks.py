"""Several processes that train one policy (`torchrun`, `accelerate launch`).

Each rank samples and scores its share of a step's rollouts and takes its share of every optimiser step. In between all of them hold the whole batch
and come to the same segments, credit and controllers, so that a group may lie across ranks and no state has to be sent about. Gradients are
summed once an optimiser step; with trainer.sharding = "full" (FSDP2) parameters, gradients and optimizer state are shared out instead.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from acpo_kernels import Segments

from .config import Config, ConfigError
from .guard import Interrupted
from .run import Run

if TYPE_CHECKING:
    from .batch import Batch
    from .policy import Policy

T = TypeVar("T")
CPU = torch.device("cpu")
WORD_AFTER = 15.0  # seconds behind a SIGTERM: torchrun kills 30 seconds behind its own


class RankLost(Interrupted):
    """Another process of the job ended."""


def first_to_tell() -> bool:
    """Whether this process is the one that says why the job ends: the first of those that come to it."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return True
    if not dist.is_initialized():
        return os.environ.get("RANK") == "0"
    try:
        return dist.distributed_c10d._get_default_store().add("acpo/told", 1) == 1  # with torchrun its agent keeps the store
    except RuntimeError:  # kept by rank 0, which is gone
        return dist.get_rank() <= 1


def last_word(word: Callable[[], str]) -> Callable[[], None]:
    """Says `word()` if the process lives on WORD_AFTER seconds behind a SIGTERM and no process of the job has said anything; the result calls it off.

    A process that waits for a dead one inside nccl never comes back to Python, and no Python handler runs in it; the signal wakes a thread.
    """
    ours, signals = os.pipe()
    os.set_blocking(signals, False)
    over = threading.Event()

    def wait() -> None:
        while (came := os.read(ours, 1)) and came[0] != signal.SIGTERM:
            pass
        os.close(ours)
        if came and not over.wait(WORD_AFTER) and first_to_tell():
            print(f"acpo: {word()}", file=sys.stderr, flush=True)

    threading.Thread(target=wait, name="last word", daemon=True).start()
    before = signal.set_wakeup_fd(signals, warn_on_full_buffer=False)

    def call_off() -> None:
        over.set()
        signal.set_wakeup_fd(before)
        os.close(signals)

    return call_off


class Ranks:
    """Where this process stands among those of its job; alone, every exchange is with itself."""

    def __init__(self, config: Config):
        self.size = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank, local = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
        self.sharded, self.own_group = False, False
        if self.size == 1:
            return
        _check(config, self.size)
        cuda = torch.cuda.is_available() and config.policy.device in ("auto", "cuda")
        if cuda:
            torch.cuda.set_device(local)
        if not dist.is_initialized():
            minutes = timedelta(minutes=config.trainer.rank_timeout)
            dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=minutes)
            self.own_group = True

    @property
    def leads(self) -> bool:
        """Whether this rank writes what the run leaves behind."""
        return self.rank == 0

    @property
    def seed(self) -> tuple[int, ...]:
        """What makes this rank's chance its own."""
        return (self.rank,) if self.size > 1 else ()

    def share(self, items: Sequence[T]) -> list[T]:
        """This rank's part, side by side: those of all ranks in their order are the whole."""
        return list(items[len(items) * self.rank // self.size : len(items) * (self.rank + 1) // self.size])

    def parts(self, batch: Batch, rows: list[int], budget: int, packed: bool) -> list[tuple[list[int], bool]]:
        """This rank's micro-batches of an optimiser step, rollouts dealt out by length. With sharded parameters every rank makes as many passes as
        the others: False marks one that is there for that alone."""
        dealt = sorted(rows, key=lambda b: (-batch.lengths[b] - len(batch.prompts[b]), b))
        each = [list(batch.micro_batches(dealt[r :: self.size], budget, packed)) for r in range(self.size)]
        fill = max(map(len, each)) - len(each[self.rank]) if self.sharded else 0
        return [(part, True) for part in each[self.rank]] + [(rows[:1], False)] * fill

    # --- exchange -----------------------------------------------------------------------------------------------------------------

    def gather(self, value: T) -> list[T]:
        """The value of every rank, tensors on the host."""
        if self.size == 1:
            return [value]
        out: list[Any] = [None] * self.size
        with self._together():
            dist.all_gather_object(out, value)
        return out

    def concat(self, part: list[T], device: torch.device | None = None) -> list[T]:
        """The list of which every rank has its part; tensors in it on `device`."""
        return part if self.size == 1 else [_moved(x, device) for one in self.gather([_moved(x, CPU) for x in part]) for x in one]

    def exchange(self, batch: Batch, rows: list[int], *names: str) -> None:
        """Gives everybody the token values of these rollouts, and takes the others'."""
        if self.size == 1:
            return
        index = batch.tokens_of(rows)
        for others, values in self.gather((rows, {name: batch.token[name][index].cpu() for name in names if name in batch.token})):
            batch.put(others, **{name: value.to(batch.segments.device) for name, value in values.items()})

    def added(self, figures: dict[str, float]) -> dict[str, float]:
        """Figures summed over the ranks; largest and least where the name says so."""
        if self.size == 1:
            return figures
        every = self.gather(figures)
        how = {"max": max, "min": min}
        return {name: how.get(name.rpartition("/")[2], sum)([one[name] for one in every]) for name in figures}

    def of_leader(self, make: Callable[[], T]) -> T:
        """What rank 0 makes, for everybody; the others wait."""
        if self.size == 1:
            return make()
        made: list[Any] = [make() if self.leads else None]
        with self._together():
            dist.broadcast_object_list(made, src=0)
        return made[0]

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Gradients of what every rank held as one sum, in place; a rank without a gradient adds nothing. Sharded ones are summed by their own
        backward."""
        if self.size == 1 or self.sharded:
            return
        with self._together():
            for p in parameters:
                if p.grad is None:
                    p.grad = torch.zeros_like(p)
                dist.all_reduce(p.grad)

    @contextlib.contextmanager
    def _together(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # gloo's and nccl's: a connection that is closed, or nothing within the time-out
            raise RankLost(f"another of the {self.size} processes ended ({str(error).splitlines()[0][:160]})") from None

    # --- FSDP2 --------------------------------------------------------------------------------------------------------------------

    def shard(self, policy: Policy) -> None:
        """Shares out the policy's parameters: a group a layer, the rest (embeddings, head) one more."""
        from torch.distributed.fsdp import fully_shard

        mesh = dist.device_mesh.init_device_mesh(policy.device.type, (self.size,))
        layers = next((m for m in policy.model.modules() if isinstance(m, nn.ModuleList)), None)
        for layer in layers or ():
            fully_shard(layer, mesh=mesh)
        root = fully_shard(policy, mesh=mesh)
        one = torch.zeros(1, dtype=torch.int64, device=policy.device)
        segments = Segments(torch.tensor([0, 1], device=policy.device), torch.tensor([0, 1], device=policy.device))
        with torch.no_grad():  # the whole learns of its layers in its first forward, and they must not have theirs before
            policy([[0]], [one], None, one.float(), segments)
        root.reshard()  # behind a forward the root stays whole, and an optimiser made now would hold parameters that no gradient reaches
        self.sharded = True

    @contextlib.contextmanager
    def whole(self, policy: nn.Module) -> Iterator[None]:
        """Every rank holds all parameters meanwhile, so that each may make as many forward passes as it likes."""
        if not self.sharded:
            yield
            return
        from torch.distributed.fsdp import FSDPModule

        parts = [m for m in policy.modules() if isinstance(m, FSDPModule)]
        for part in parts:
            part.set_reshard_after_forward(False, recurse=False)
            part.unshard()
        try:
            yield
        finally:
            for part in parts:
                part.reshard()
                part.set_reshard_after_forward(True, recurse=False)

    def close(self) -> None:
        if self.own_group and dist.is_initialized():
            dist.destroy_process_group()
            self.own_group = False


def _moved(value: Any, device: torch.device | None) -> Any:
    if isinstance(value, Tensor):
        return value if device is None else value.to(device)
    return type(value)(*(_moved(x, device) for x in value)) if isinstance(value, tuple) else value


def full(value: Tensor) -> Tensor:
    """A sharded tensor whole, on every rank; any other as it is."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def placed(value: Tensor, like: Any) -> Tensor:
    """A whole tensor shared out as `like` is."""
    if not hasattr(like, "placements") or value.shape != like.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


class Follower(Run):
    """The run as the other ranks see it: they write nothing and say nothing."""

    def __init__(self, config: Config, quiet: bool = True):
        super().__init__(config, quiet=True)
        self.keeps_rollouts = False

    def nothing(self, *_, **__) -> None:
        pass

    lock = begin = cut_back = log = track = say = facts = warn = start_phase = nothing


def run_of(config: Config, quiet: bool = False) -> Run:
    """The run as this process trains it."""
    if "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ and os.environ.get("ACCELERATE_USE_CPU") == "True":
        raise ConfigError(
            "accelerate launch --cpu starts one process whatever --num_processes says, and this one was to be one of several; on CPUs: "
            "accelerate launch --multi_gpu --num_processes N -m acpo.cli train ... policy.device=cpu, or torchrun"
        )
    if config.trainer.sharding != "none" and os.environ.get("WORLD_SIZE", "1") == "1":
        raise ConfigError(
            f"trainer.sharding = {config.trainer.sharding!r} needs several processes: torchrun --nproc-per-node N -m acpo.cli train ..."
        )
    return (Run if int(os.environ.get("RANK", "0")) == 0 else Follower)(config, quiet)


def _machines() -> int:
    return int(os.environ["WORLD_SIZE"]) // int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))


def _check(config: Config, size: int) -> None:
    """What several processes cannot do, by name."""
    full_ = config.trainer.sharding == "full"
    for wrong, text in (
        (config.rollout.engine == "vllm", "rollout.engine = 'vllm': vLLM would stand in every process; several share one with 'vllm_server'"),
        (config.rollout.engine == "vllm_server" and not config.rollout.server.url and _machines() > 1, "rollout.engine = 'vllm_server' on several "
         "machines needs rollout.server.url: a server that is started here listens on this machine alone"),
        (full_ and config.loss.kl_weight > 0, "trainer.sharding = 'full' needs loss.kl_weight = 0: the reference is a whole copy of the policy"),
        (full_ and config.warmup.steps > 0, "trainer.sharding = 'full' needs warmup.steps = 0"),
        (full_ and (config.entropy.covariance == "always" or (config.entropy.controller == "target" and config.entropy.covariance == "fallback")),
         "trainer.sharding = 'full' needs entropy.covariance = 'never': its passes differ from rank to rank"),
        (config.rollout.prompts * config.rollout.group_size < size, f"rollout.prompts * rollout.group_size must be at least {size}, a rollout for "
         f"each process, got {config.rollout.prompts} * {config.rollout.group_size}"),
        (full_ and config.policy.lora_rank > 0, "trainer.sharding = 'full' needs policy.lora_rank = 0: adapters are small, share nothing out"),
    ):  # fmt: skip
        if wrong:
            raise ConfigError(text)
