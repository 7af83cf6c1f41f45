"""CPU time of `logprob_entropy` beside torch.compile, eager torch and one read of the logits.

    python benchmarks/bench_logprob_entropy.py [rows] [rounds]

Interleaved rounds, lower quartile, load average: on a shared machine the ratios of one process mean something, medians do not.
"""

from __future__ import annotations

import os
import sys
import time
from functools import partial

import torch

from acpo_kernels.logprob_entropy import logprob_entropy

V = 151_936  # the Qwen2.5 vocabulary


def four_lines(logits: torch.Tensor, ids: torch.Tensor):
    log_p = torch.log_softmax(logits.float(), -1)
    logp = log_p.gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    return logp, entropy


def forward(op, logits, ids):
    with torch.no_grad():
        return op(logits, ids)


def forward_backward(op, logits, ids):
    leaf = logits.detach().requires_grad_()
    logp, entropy = op(leaf, ids)
    (logp.sum() + 0.01 * entropy.sum()).backward()
    return leaf.grad


def lower_quartile(cases: dict, rounds: int) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in cases}
    for case in cases.values():
        case()
        case()
    for _ in range(rounds):
        for name, case in cases.items():
            begin = time.perf_counter()
            case()
            times[name].append(time.perf_counter() - begin)
    return {name: sorted(t)[len(t) // 4] * 1e3 for name, t in times.items()}


def main() -> None:
    rows, rounds = (int(a) for a in (*sys.argv[1:], *["64", "30"][len(sys.argv) - 1 :]))
    torch.set_num_threads(2)
    compiled = torch.compile(four_lines)
    print(f"N = {rows}, V = {V}, {torch.get_num_threads()} threads, torch {torch.__version__}, load {os.getloadavg()[0]:.2f}")
    ops = {"ours": logprob_entropy, "torch.compile": compiled, "eager": four_lines}
    for dtype in (torch.float32, torch.bfloat16):
        logits, ids = (torch.randn(rows, V) * 2).to(dtype), torch.randint(0, V, (rows,))
        cases = {"amax": partial(torch.amax, logits, -1)}
        cases |= {f"{name} forward": partial(forward, op, logits, ids) for name, op in ops.items()}
        cases |= {f"{name} forward+backward": partial(forward_backward, op, logits, ids) for name, op in ops.items()}
        result = lower_quartile(cases, rounds)
        for name, ms in result.items():
            ours = result["ours forward+backward" if name.endswith("backward") else "ours forward"]
            print(f"  {str(dtype).removeprefix('torch.'):9} {name:32} {ms:8.2f} ms   {ms / ours:6.2f} x ours")
    print(f"load {os.getloadavg()[0]:.2f}")


if __name__ == "__main__":
    main()
