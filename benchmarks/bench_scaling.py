"""Curves over one size at a time, ours and eager: pytest benchmarks/ --benchmark -k scaling (some three minutes on two cores, outside the default).

Rows N, vocabulary V, hidden size H, threads, tokens of one sequence up to 131,072, rollouts up to 512 of a thousand tokens. The cases are those
of the other files, checked as there.
"""

from __future__ import annotations

import pytest
import torch

from . import bench_linear_logprob_entropy, bench_logprob_entropy, bench_policy_loss, bench_segment_credit, bench_segment_reduce
from .common import Case, V

F32 = torch.float32
LENGTHS, ROLLOUTS = (1024, 8192, 32_768, 131_072), (8, 64, 512)


@pytest.fixture
def curve(run, shapes, device):
    """curve(along, case) measures ours and eager of a case, as one point over `along`."""

    def point(along: str, case: Case) -> None:
        case.providers = {name: provider for name, provider in case.providers.items() if name in ("ours", "eager")}
        case.absent, case.curve = {}, along
        run(case)

    if shapes == "small":
        pytest.skip("curves need their sizes")
    return point


@pytest.mark.parametrize("n", [1, 8, 64, 512])
def test_scaling_rows(curve, device, n):
    curve("N", bench_logprob_entropy.case(n, V, F32, "forward", device))


@pytest.mark.parametrize("v", [1024, 8192, 65_536, 262_144])
def test_scaling_vocabulary(curve, device, v):
    curve("V", bench_logprob_entropy.case(64, v, F32, "forward+backward", device))


@pytest.mark.parametrize("h", [128, 512, 1536])
def test_scaling_hidden(curve, device, h):
    curve("H", bench_linear_logprob_entropy.case(64, h, V, F32, "forward", device))


@pytest.mark.parametrize("threads", [1, 2])
def test_scaling_threads(curve, device, threads):
    if device.type == "cuda":
        pytest.skip("of the CPU")
    torch.set_num_threads(threads)
    case = bench_logprob_entropy.case(64, V, torch.bfloat16, "forward", device)
    case.shape["threads"] = threads
    curve("threads", case)


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("operation", ["policy_loss", "segment_credit", "segment_reduce"])
def test_scaling_length(curve, device, operation, n):
    """One sequence in steps of 16 tokens."""
    curve("N", ragged(operation, n, n // 16, 1, device))


@pytest.mark.parametrize("b", ROLLOUTS)
@pytest.mark.parametrize("operation", ["policy_loss", "segment_credit", "segment_reduce"])
def test_scaling_rollouts(curve, device, operation, b):
    """Rollouts of 1,024 tokens in 64 steps."""
    curve("B", ragged(operation, 1024 * b, 64 * b, b, device))


def ragged(operation: str, n: int, s: int, b: int, device: torch.device) -> Case:
    if operation == "policy_loss":
        return bench_policy_loss.case(n, s, b, "segment", device)
    if operation == "segment_credit":
        return bench_segment_credit.case(n, s, b, "weights", device)
    return bench_segment_reduce.case(n, s, b, "mean", "forward", device)
