"""The interleaved timer: every call in turn, round after round, with the caches emptied before each, and the memory that a call holds.

On the CPU a call is also timed warm, its operands where the call before left them: in a training loop a small operand was just written by the
operation before, a large one was not, and whoever reads the table knows which is theirs. What is long has no warm time: it moves more than a
cache holds, or computes so long that reading counts for nothing.
"""

from __future__ import annotations

import ctypes
import gc
import math
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

ROUNDS = 30
SECONDS = 1.0  # a call takes part in fewer than ROUNDS rounds when they would cost more than this; its row says in how many
LEAST_ROUNDS = 5
SHORTEST = 2e-4  # seconds between two readings of the clock, where a call is warm: shorter ones are repeated between them
LONG = 2e-2  # seconds from which on a call is not timed warm as well
HEAD_START = 2_000_000  # GPU cycles, a millisecond: the host has launched a call before the GPU reaches it


@dataclass
class Timed:
    """The seconds of each round, by which clock, whether the caches were emptied before each, the memory that a call holds, and the seconds of the
    same call where the caches were not emptied (`warm`)."""

    seconds: list[float]
    clock: str
    cold: bool
    peak_bytes: int | None
    warm: list[float] = field(default_factory=list)


class HostClock:
    def __init__(self, run: Callable[[], object], cold: bool):
        self.run, self.cold, self.number, self.name = run, cold, 1, "perf_counter, cold caches" if cold else "perf_counter"
        self.once, self.peak = with_peak(self.measure_warm, torch.device("cpu"))
        if self.once < 10 * LONG:  # its first touch of new memory says little of how long it takes
            self.once = self.measure_warm()
        self.has_warm = self.once < LONG
        while self.once * self.number < SHORTEST:  # the first calls of a short one are the slowest: asked again until as many take that long
            self.number = math.ceil(SHORTEST / max(self.once, 1e-9))
            self.once = self.measure_warm()

    def measure(self) -> float:
        if not self.cold:
            return self.measure_warm()
        Caches.of_this_machine().empty()
        begin = time.perf_counter()
        self.run()
        return time.perf_counter() - begin

    def measure_warm(self) -> float:
        begin = time.perf_counter()
        for _ in range(self.number):
            self.run()
        return (time.perf_counter() - begin) / self.number


class Caches:
    """The cores that share a last level read four times its size together. Threads of our own: torch's would spin on behind a product of theirs,
    on cores that the next call needs. Read, not written: lines that wait to be written back would be paid for by that call."""

    def __init__(self):
        size, sharers = last_level()
        cores = os.cpu_count() or 1
        self.part = 4 * size // sharers
        self.libc = ctypes.CDLL(None)
        self.libc.memchr.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t)
        self.libc.memchr.restype = ctypes.c_void_p
        self.buffer = torch.ones(self.part * cores, dtype=torch.int8)  # memory that was never written is one page of zeros
        self.readers = ThreadPoolExecutor(cores)

    @staticmethod
    @cache
    def of_this_machine() -> Caches:
        return Caches()

    def empty(self) -> None:
        begins = range(self.buffer.data_ptr(), self.buffer.data_ptr() + self.buffer.numel(), self.part)
        found = list(self.readers.map(lambda begin: self.libc.memchr(begin, 0, self.part), begins))
        if any(found):  # nothing in it is zero, so that all of it is read
            raise RuntimeError(f"a part of the buffer was not read to its end, a zero found at {found}")


def last_level() -> tuple[int, int]:
    """(bytes of the largest cache of the first core, cores that share it); (32 MiB, 1) where the system does not tell."""
    found = [(32 << 20, 1)]
    for folder in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        size, shared = ((folder / name).read_text(encoding="ascii").strip() for name in ("size", "shared_cpu_list"))
        ends = [[int(x) for x in part.split("-")] for part in shared.split(",")]
        found.append((int(size.removesuffix("K")) * 1024, sum(end[-1] - end[0] + 1 for end in ends)))
    return max(found[1:] or found)


class DeviceClock:
    """CUDA events around the call, the level-2 cache emptied before it; a launch-bound call as a replayed graph. The GPU waits a millisecond
    before the first event: else the time in which Python launches would count."""

    _flush: Tensor | None = None

    def __init__(self, run: Callable[[], object], cold: bool):
        self.run, self.cold, self.number, self.name = run, cold, 1, "CUDA events, cold L2"
        if not cold:
            self.number, self.name = 20, "CUDA events, 20 calls"
            try:
                self.run, self.name = self._capture(run), "CUDA graph, 20 replays"
            except RuntimeError as error:  # this call synchronises or allocates outside the pool: its launches are part of its time
                torch.cuda.synchronize()
                self.name += f" (not capturable: {str(error).splitlines()[0][:80]})"
        if DeviceClock._flush is None:
            size = 2 * torch.cuda.get_device_properties(0).L2_cache_size
            DeviceClock._flush = torch.empty(size, dtype=torch.int8, device="cuda")
        self.has_warm = False
        self.once, self.peak = with_peak(self.measure, torch.device("cuda"))

    @staticmethod
    def _capture(run: Callable[[], object]) -> Callable[[], object]:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            keep = run()
        del keep
        return graph.replay

    def measure(self) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if self.cold:
            DeviceClock._flush.zero_()
        torch.cuda._sleep(HEAD_START)
        begin.record()
        for _ in range(self.number):
            self.run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e-3 / self.number


def interleave(calls: dict[str, Callable[[], object]], device: torch.device, *, cold: bool = True) -> dict[str, Timed]:
    """One call of warm-up, whose memory is looked at, then round after round each call once, slow ones in fewer rounds. (In `measure` the check was
    one more call before.)"""
    clock = DeviceClock if device.type == "cuda" else HostClock
    clocks = {name: clock(call, cold) for name, call in calls.items()}
    rounds = {name: max(LEAST_ROUNDS, min(ROUNDS, int(SECONDS / max(timer.once * timer.number, 1e-9)))) for name, timer in clocks.items()}
    timed = {name: Timed([], timer.name, cold, timer.peak) for name, timer in clocks.items()}
    for i in range(ROUNDS):
        for name, timer in clocks.items():
            if (i + 1) * rounds[name] // ROUNDS > i * rounds[name] // ROUNDS:  # spread evenly over the rounds
                timed[name].seconds.append(timer.measure())
                if timer.has_warm and cold:
                    timed[name].warm.append(timer.measure_warm())
    return timed


def quartile(values: list[float], which: float = 0.25) -> float:
    return sorted(values)[int(which * (len(values) - 1))]


class Peak:
    """The most memory held since `begin`, beyond what was held then; None where the system does not tell."""

    def __init__(self, device: torch.device):
        self.device, self.before = device, 0

    def begin(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
            return
        try:
            ctypes.CDLL(None).malloc_trim(0)  # what the allocator keeps for later would hide what a call takes
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # sets the high-water mark back
            self.before = _status("VmRSS")
        except (OSError, AttributeError):
            self.before = -1

    def bytes(self) -> int | None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated() - self.before
        return None if self.before < 0 else max(0, _status("VmHWM") - self.before)


def with_peak(call: Callable[[], float], device: torch.device) -> tuple[float, int | None]:
    """What the call returns, and the most memory that it holds beyond what is held before it, its results included."""
    peak = Peak(device)
    peak.begin()
    return call(), peak.bytes()


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {name} in /proc/self/status")
