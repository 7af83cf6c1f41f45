"""Times the CUDA kernels with other constants than those that are built: python -m benchmarks.variants OUT.json CASE ...

A case is an operation and its changed settings, `F:tile=128x128x64x4x4,f=2`, without any (`F:`) the code as it is. Operations, at N = 8,192 and
V = 151,936: LF and LB, logprob_entropy forward and backward; F, linear_logprob_entropy forward; B, its forward and backward, with the time of each
kernel (H = 896 and 4,096). Settings:

    tile=MxNxKxWARPSxSTAGES   of every product          f=F        programs a multiprocessor       group, slice, split=SIZE   linear_tiles.py, ...
    g=COLUMNSxWARPSxSTAGES    of the head's gradient    p=...      tile of the products with it
    warps, chunk, block=SIZE  of rows of logits         dtype=float32

Each case is a process of its own (constants are read when a kernel compiles); several compile at a time, one at a time is timed, by the
benchmarks' own clock: median, cold. Nothing is checked here: tests/ and the benchmarks are.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from . import outputs
from .common import V

N = 8192
OPERATIONS = ("LF", "LB", "F", "B")


def read(case: str) -> tuple[str, dict[str, str]]:
    """The operation and the settings of a case."""
    operation, colon, rest = case.partition(":")
    settings = dict(part.split("=", 1) if "=" in part else (part, "") for part in rest.split(",") if part)
    if operation not in OPERATIONS or not colon or any(not value for value in settings.values()):
        raise SystemExit(f"{case!r}: wanted {'|'.join(OPERATIONS)} and a colon, then NAME=VALUE with commas between")
    return operation, settings


def change(settings: dict[str, str]) -> None:
    """Puts the settings in the place of the modules' constants, before anything is compiled."""
    import triton.language as tl

    from acpo_kernels._triton import linear_gradients, linear_logprob_entropy, linear_tiles, logits_rows, logprob_entropy

    users = linear_tiles, linear_logprob_entropy, linear_gradients
    for name, value in settings.items():
        sizes = [int(size) for size in value.split("x")] if name != "dtype" else []
        match name, sizes:
            case "tile", [m, n, k, warps, stages]:
                chosen = linear_tiles.Tiles(m, n, k, warps, stages, True, "ieee")
                for module in users:
                    module.tiles = lambda size, architecture, chosen=chosen: chosen
            case "f", [factor]:
                machine = linear_tiles.machine
                for module in users:
                    module.machine = lambda tensor, machine=machine, factor=factor: (machine(tensor)[0], factor * machine(tensor)[1])
            case "group", [size]:
                linear_tiles.GROUP = tl.constexpr(size)
            case "slice", [size]:
                linear_gradients.SLICE = size
            case "split", [size]:
                linear_logprob_entropy.SPLIT = size
            case "g", [n, warps, stages]:
                new = {"n": n, "warps": warps, "stages": stages}
                linear_gradients.gradient_tiles = lambda tile, *rest, new=new: tile._replace(**new)
            case "p", [m, n, k, warps, stages]:
                new = {"m": m, "n": n, "k": k, "warps": warps, "stages": stages}
                linear_gradients.product_tiles = lambda tile, architecture, new=new: tile._replace(**new)
            case "warps", [warps]:
                logits_rows.NUM_WARPS = logprob_entropy.NUM_WARPS = warps
                logits_rows.THREADS, logits_rows.STEP = tl.constexpr(32 * warps), tl.constexpr(32 * warps * logits_rows.EACH.value)
            case "chunk" | "block", [size]:
                setattr(logprob_entropy, name.upper(), size)
            case "dtype", _:
                pass
            case _:
                raise SystemExit(f"{name}={value}: no such setting")


def measure(case: str, lock: Path) -> dict:
    """The row of one case; compiles on few rows first, and times while it holds the lock."""
    import torch

    from acpo_kernels import linear_logprob_entropy, logprob_entropy

    from .bench_linear_logprob_entropy import inputs
    from .clocks import DeviceClock, quartile

    operation, settings = read(case)
    change(settings)
    dtype, head = getattr(torch, settings.get("dtype", "bfloat16")), operation in ("F", "B")
    backward = operation in ("B", "LB")

    def call(n: int, v: int, h: int):
        torch.manual_seed(0)
        if head:
            *leaves, ids = inputs(n, h, v, dtype, torch.device("cuda"))
        else:
            leaves, ids = [(torch.randn(n, v, device="cuda") * 2).to(dtype)], torch.randint(v, (n,), device="cuda")
        leaves = [x.requires_grad_(backward) for x in leaves]
        function = linear_logprob_entropy if head else logprob_entropy
        if not backward:
            return lambda: function(*leaves, ids)
        upstream = [torch.ones(n, device="cuda"), torch.full((n,), 0.01, device="cuda")]
        if head:
            return lambda: torch.autograd.grad(list(function(*leaves, ids)), leaves, upstream)
        results = list(function(*leaves, ids))
        return lambda: torch.autograd.grad(results, leaves, upstream, retain_graph=True)

    def seconds(run, rounds: int) -> float:
        clock = DeviceClock(run, cold=True)
        return quartile([clock.measure() for _ in range(rounds)], 0.5)

    row: dict = {"name": case}
    call(256, 32_768 if head else V, 896)()
    torch.cuda.synchronize()
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        for h in (896, 4096) if head else (0,):
            run = call(N, V, h)
            taken = seconds(run, 5 if operation == "B" else 15)
            key = f"H{h}_" if head else ""
            row |= {f"{key}ms": 1e3 * taken}
            if not head:
                row["GBs"] = (2 if backward else 1) * N * V * dtype.itemsize / taken / 1e9
                continue
            row[f"{key}tflops"] = (8 if backward else 2) * N * V * h / taken / 1e12
            if backward:
                with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                    run()
                    torch.cuda.synchronize()
                row[f"{key}parts"] = {e.key: e.self_device_time_total / 1e3 for e in profile.key_averages() if e.self_device_time_total > 20}
            del run
            torch.cuda.empty_cache()
    return row


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.variants", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=outputs.file, help="the rows, as JSON")
    parser.add_argument("cases", nargs="+", metavar="CASE")
    parser.add_argument("--jobs", type=int, default=6, help="cases that compile at a time")
    parser.add_argument("--lock", type=Path, help=argparse.SUPPRESS)  # given: measures the one case itself
    options = parser.parse_args(arguments)
    for case in options.cases:
        read(case)
    if options.lock:
        options.out.write_text(json.dumps(measure(options.cases[0], options.lock)), encoding="utf-8")
        return 0
    import torch
    import triton

    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device")
    with tempfile.TemporaryDirectory() as folder:
        out = [Path(folder, f"{i}.json") for i in range(len(options.cases))]

        def one(case: str, file: Path) -> dict:
            command = [sys.executable, "-m", "benchmarks.variants", str(file), case, "--lock", str(Path(folder, "lock"))]
            ended = subprocess.run(command, capture_output=True, text=True)
            return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"name": case, "error": ended.stderr[-300:]}

        with ThreadPoolExecutor(options.jobs) as pool:
            rows = list(pool.map(one, options.cases, out))
    machine = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
    options.out.write_text(json.dumps({**machine, "runs": [{"rows": rows}]}, indent=1) + "\n", encoding="utf-8")
    for row in rows:
        print(json.dumps(row))
    return 0


if __name__ == "__main__":
    sys.exit(main())
