"""Where a step's time goes, and the most memory that the process held."""

from __future__ import annotations

import resource
import time
from collections import defaultdict
from contextlib import contextmanager

import torch


class Clock:
    """Seconds of the parts of a step, time/* in the metrics. A part inside another is taken out of it, so that they add up to step_time."""

    def __init__(self, device: torch.device):
        self.device, self.seconds = device, defaultdict(float)
        self.inside = 0.0  # seconds of the parts inside the one that runs

    @contextmanager
    def __call__(self, name: str):
        outer, self.inside = self.inside, 0.0
        begin = self._now()
        yield
        taken = self._now() - begin
        self.seconds[name] += taken - self.inside
        self.inside = outer + taken

    def _now(self) -> float:
        if self.device.type == "cuda":  # a part's kernels are its own: a dozen waits a step
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def peak_memory(device: torch.device) -> dict[str, float]:
    """GB of the process, and on CUDA what its tensors took, at their most since the start."""
    out = {"memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
    if device.type == "cuda":
        out["memory_gpu_gb"] = torch.cuda.max_memory_allocated(device) / 2**30
    return out
