"""What every test stands on: no unwritten output, no chance, two threads."""

from __future__ import annotations

import importlib
import os
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # several at a time (-n): a thread that waits for work must not spin on a core that another one needs
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("GOMP_SPINCOUNT", "0")

import torch
from hypothesis import HealthCheck, settings

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic algorithms ask of matrix products on CUDA
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
settings.register_profile(
    "acpo", deadline=None, derandomize=True, max_examples=2 if INTERPRETED else 25, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
settings.load_profile("acpo")

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(autouse=True)
def deterministic():
    """torch.empty holds NaN, so an output that an operation forgot to write shows; the generator starts from one seed."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.set_num_threads(2)
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


# `pytest -m long`: what takes half of the time of all tests, and is not the first thing to run.
LONG = (
    "faults/",
    "test_triton_interpreter.py", "test_triton_compile.py", "test_triton_linear_compile.py", "test_triton_launches.py",
    "test_rollout_server_run.py",
    "test_attribution_quality.py::test_the_whole_of_it",
    "test_benchmarks.py::test_rows_are_kept", "test_benchmarks.py::test_a_rehearsal", "test_benchmarks.py::test_the_gpu_script",
    "test_compare.py::test_killed_and_continued", "test_compare.py::test_a_run_is_anothers",
    "test_gsm8k_path.py::test_real_problems_with_the_real_vocabulary",
    "test_integrations_slime.py::test_groups_across_data_parallel_ranks",
    "test_left_out.py::test_a_run_whose_verifier_hangs",
    "test_preflight.py::test_the_memory_estimate_is_near",
)  # fmt: skip


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items) -> None:
    names = [item.nodeid.removeprefix("tests/") for item in items]
    for item, name in zip(items, names, strict=True):
        if name.startswith(LONG) and not (item.get_closest_marker("slow") or item.get_closest_marker("every_target")):
            item.add_marker("long")


DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def pytest_report_header() -> str:
    return f"devices: {', '.join(DEVICES)}" + ("" if "cuda" in DEVICES else " (no CUDA device: the same tests on it are left out)")


@pytest.fixture(params=DEVICES)
def device(request) -> torch.device:
    return torch.device(request.param)


def restricted(name: str):
    from acpo_kernels import _cpu

    if not _cpu.available:
        pytest.skip("built without the C++ extension")
    try:
        _cpu._C.restrict_cpu_isa(name)
    except ValueError as missing:
        pytest.skip(str(missing))
    yield name
    _cpu._C.restrict_cpu_isa("")


@pytest.fixture(params=["avx512", "avx2", "baseline"])
def cpu_isa(request):
    """Every instruction set of the C++ kernels that this machine has, one after the other."""
    yield from restricted(request.param)


@pytest.fixture(params=["amx", "avx512bf16", "avx512", "avx2", "baseline"])
def head_isa(request):
    """Those of the matrix products: bf16 has some of its own."""
    yield from restricted(request.param)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is absent: real data is not part of the repository")
    return SHARED


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory) -> Path:
    """The directory of a small run, warm-up and both stages, that nothing broke off. Not to be written to."""
    from loop import train

    folder = tmp_path_factory.mktemp("finished")
    assert train(folder) == 0
    return folder / "run"


@pytest.fixture(scope="session")
def warmed(finished_run) -> dict[str, torch.Tensor]:
    """The weights at the end of that run: a policy that is right at times."""
    from acpo.checkpoint import latest

    return latest(finished_run / "checkpoints")[0]["policy"]


# Operations in whose test files (test_NAME.py, test_NAME_*.py) the Triton kernels stand in for the dispatcher's CPU implementation under
# TRITON_INTERPRET=1, so that the tests are the same ones (`logprob_entropy` has a fixture of its own in implementations.py).
KERNELS = {
    "segment_reduce": ("segment_reduce", "segment_reduce_backward"),
    "segment_credit": ("segment_credit",),
    "policy_loss": ("policy_loss",),
    "hindsight_information": ("hindsight_information", "logprob_entropy"),
    "chunks": ("segment_reduce", "segment_reduce_backward", "segment_credit", "policy_loss"),
}


@pytest.fixture(autouse=True, scope="module")
def kernels_in_the_interpreter(request):
    module = request.module.__name__
    operation = next((name for name in KERNELS if f"{module}_".startswith(f"test_{name}_")), None)
    if INTERPRETED:
        import interpreter

        interpreter.prepare()
    if not INTERPRETED or operation is None:
        yield
        return
    from acpo_kernels._library import NAMESPACE, triton

    reached = set()

    def seen(name, kernel):
        return lambda *args: (reached.add(name), kernel(*args))[1]

    library = torch.library.Library(NAMESPACE, "IMPL")
    for name in KERNELS[operation]:
        own = name != "logprob_entropy"
        kernel = triton(name.removesuffix("_backward"), name) if own else importlib.import_module("acpo_kernels.logprob_entropy")._forward_cuda
        library.impl(name, seen(name, kernel), "CPU", allow_override=True)
    with torch.overrides.BaseTorchFunctionMode():  # somebody watches: a call without gradient does not go around the dispatcher to C++
        yield
    library._destroy()
    assert KERNELS[operation][0] in reached, f"{module} never reached the Triton kernel of {operation}"
