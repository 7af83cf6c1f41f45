"""`pytest benchmarks/ --benchmark`: measured; without the option collected and skipped.

pytest-benchmark keeps the books: the rounds of ours are its statistics (so --benchmark-json, --benchmark-compare and -save work) and
all providers' rows are its extra_info. It times one function a test; here all are timed in turn in one process (common.py), and what
was measured is handed to it through a timer that reads out the recorded seconds.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import subprocess
import time
from pathlib import Path

import pytest
import torch

from acpo.environment import processor

from . import clocks, common, outputs, peers
from .report import table

ROWS = pytest.StashKey[list]()
BEGIN = pytest.StashKey[float]()


class Replay:
    """The timer and the target of pytest-benchmark: each call of the target moves the clock on by one measured round."""

    def __init__(self):
        self.now, self.seconds = 0.0, iter(())

    def clock(self) -> float:
        return self.now

    def advance(self) -> None:
        self.now += next(self.seconds)


REPLAY = Replay()


def pytest_addoption(parser):
    group = parser.getgroup("acpo benchmarks")
    group.addoption("--benchmark", action="store_true", help="measure (without it the files of benchmarks/ are skipped)")
    group.addoption("--shapes", choices=("small", "default", "large"), default="default", help="sizes: small tries the path, large is for a GPU")
    group.addoption("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: cuda where there is one")
    group.addoption("--threads", type=int, default=2, help="CPU threads of every provider (default 2)")
    group.addoption(
        "--seconds", type=float, default=clocks.SECONDS, metavar="S",
        help=f"a provider whose {clocks.ROUNDS} rounds take longer takes part in fewer, at least {clocks.LEAST_ROUNDS} (default {clocks.SECONDS:g})",
    )  # fmt: skip
    group.addoption(
        "--providers", default="", metavar="NAMES",
        help="only those whose name begins with one of these, separated by commas, beside ours and the ceilings (default: all)",
    )  # fmt: skip
    group.addoption(
        "--rows", type=outputs.file, metavar="FILE", help="JSON that is written anew after every case; what it holds of earlier sessions stays"
    )
    group.addoption(
        "--rehearse", action="store_true",
        help="call every provider once and time nothing: what Triton and torch.compile compile for it lies in their caches behind that",
    )  # fmt: skip
    group.addoption("--limit", type=float, default=0, metavar="SECONDS", help="begin no further case after this long (default: no limit)")


def pytest_configure(config):
    config.stash[ROWS], config.stash[BEGIN] = [], time.monotonic()
    clocks.SECONDS = config.getoption("--seconds")
    if config.getoption("--benchmark") and not config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError("--benchmark needs pytest-benchmark: pip install -e '.[bench]'")
    config.option.benchmark_quiet = True  # its table knows ours alone; ours is printed below


def pytest_collection_modifyitems(config, items):
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            if item.path.stem == "bench_scaling" and "scaling" not in config.option.keyword:
                item.add_marker(pytest.mark.skip(reason="curves are measured with -k scaling"))
            elif config.getoption("--benchmark"):
                item.add_marker(pytest.mark.benchmark(timer=REPLAY.clock, group=item.path.stem.removeprefix("bench_")))
            else:
                item.add_marker(pytest.mark.skip(reason="measures only with --benchmark"))


@pytest.fixture
def device(request) -> torch.device:
    name = request.config.getoption("--device")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        pytest.fail("--device cuda, and there is no CUDA device")
    torch.set_num_threads(request.config.getoption("--threads"))
    return torch.device(name)


@pytest.fixture
def shapes(request) -> str:
    return request.config.getoption("--shapes")


@pytest.fixture
def run(request, benchmark):
    """run(case): checks, times and records the providers of one case."""
    limit = request.config.getoption("--limit")
    if limit and time.monotonic() - request.config.stash[BEGIN] > limit:
        pytest.skip(f"--limit: {limit:g} seconds are over")
    torch.manual_seed(0)
    torch._dynamo.reset()

    wanted = tuple(name for name in ("ours", *request.config.getoption("--providers").split(",")) if name)

    def measured(case: common.Case) -> list[dict]:
        if len(wanted) > 1:
            case.providers = {name: provider for name, provider in case.providers.items() if name.startswith(wanted)}
        if request.config.getoption("--rehearse"):
            if torch.cuda.is_available():  # not alone on the GPU: what is larger is refused here, and compiled where it is measured
                torch.cuda.set_per_process_memory_fraction(0.3)
            pytest.skip(f"--rehearse: {common.rehearse(case)}")
        record(*common.measure(case))

    def record(rows: list[dict], seconds: list[float]) -> None:
        benchmark.extra_info["rows"] = rows
        request.config.stash[ROWS].extend(rows)
        if request.config.getoption("--rows"):
            keep(request.config.getoption("--rows"), request.node.nodeid, rows)
        REPLAY.seconds = iter(seconds)
        benchmark.pedantic(REPLAY.advance, rounds=len(seconds))

    measured.record = record
    yield measured
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def keep(path: Path, name: str, rows: list[dict]) -> None:
    """Adds a case to the file, in the form of --benchmark-json, whole at any instant: a run that is cut off keeps what it measured."""
    data = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"acpo": environment(), "benchmarks": []}
    data["benchmarks"] = [b for b in data["benchmarks"] if b["fullname"] != name] + [{"fullname": name, "extra_info": {"rows": rows}}]
    temporary = path.with_suffix(".writing")
    temporary.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def pytest_terminal_summary(terminalreporter, config):
    rows = config.stash[ROWS]
    if rows:
        terminalreporter.section("benchmarks")
        terminalreporter.write_line(table(rows))


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(config, benchmarks, output_json):
    output_json["acpo"] = environment()


def environment() -> dict:
    """What a figure means nothing without."""
    import triton

    from acpo_kernels import _cpu

    gpu = None
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        gpu = {
            "name": properties.name, "capability": f"{properties.major}.{properties.minor}", "memory_gb": properties.total_memory / 2**30,
            "multiprocessors": properties.multi_processor_count, **gpu_state(),
        }  # fmt: skip
    return {
        "commit": commit(), "python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__,
        "cuda": torch.version.cuda, "gpu": gpu, "cpu": processor(), "cpus": os.cpu_count(), "threads": torch.get_num_threads(),
        "extension": _cpu.available, "cpu_isa": _cpu._C.cpu_isa() if _cpu.available else "none", "peers": peers.versions(),
        "loadavg": os.getloadavg()[0],
    }  # fmt: skip


def gpu_state() -> dict[str, str]:
    """Driver, clocks, power and temperature, read only; empty where nvidia-smi is not there."""
    names = ("driver_version", "clocks.sm", "clocks.mem", "power.limit", "temperature.gpu")
    try:
        command = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader", "--id=0"]
        values = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip().split(", ")
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(names, values, strict=False))


def commit() -> str:
    """The commit that was measured, "+" where the files differ from it; ACPO_COMMIT where the history did not travel with them."""
    root = Path(__file__).parents[1]
    try:
        head = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=root, capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=root, capture_output=True, text=True, check=True).stdout.strip()
        return head + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("ACPO_COMMIT", "unknown")
