"""What the operations on packed tokens, and the two-stream one, launch on CUDA: how many kernels, compiled with the launcher's own
hints for sm_80, sm_90 and sm_100, and what each takes of a multiprocessor. Nothing runs: a driver that is not there stands in."""

from __future__ import annotations

import importlib
import json
import os
import re
import threading
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("under the interpreter nothing compiles", allow_module_level=True)

from triton_compile import ARCHITECTURES, launched, measured  # noqa: E402

MODULES = {
    n: importlib.import_module(f"acpo_kernels._triton.{n}") for n in ("segment_reduce", "segment_credit", "policy_loss", "hindsight_information")
}
KERNELS = [value for module in MODULES.values() for name, value in vars(module).items() if re.fullmatch(r"_\w+_kernel", name)]
EACH = importlib.import_module("acpo_kernels._triton.logits_rows").EACH.value
RESOURCES = Path(__file__).parent / "triton_resources.json"

OFFSETS, SEQUENCES = torch.tensor([0, 3000, 3004, 9000]), torch.tensor([0, 2, 3])
N = 9000


def reduce(reduce, *, n=N, dtype=torch.float32, mask=True, level="segment"):
    values, mask = torch.zeros(2, n, dtype=dtype), torch.ones(n, dtype=torch.bool) if mask else None
    return MODULES["segment_reduce"].segment_reduce(values, OFFSETS.clamp(max=n), SEQUENCES, reduce, level, mask)


def reduce_backward(reduce, *, n=N, mask=True):
    mask = torch.ones(n, dtype=torch.bool) if mask else None
    units = torch.zeros(2, 3)
    kept = (torch.zeros(2, n), units) if reduce == "max" else (None, None)  # what the operation keeps for its backward
    operation = MODULES["segment_reduce"].segment_reduce_backward
    return operation(units, OFFSETS, SEQUENCES, reduce, "segment", mask, n, torch.float32, *kept)


def credit(form, scale, *, mask=True, segments=3):
    mask = torch.ones(N, dtype=torch.bool) if mask else None
    arguments = (torch.zeros(segments), OFFSETS, SEQUENCES, torch.zeros(2), N, torch.ones(2, dtype=torch.bool), mask, form, 0.5, 0.5)
    return MODULES["segment_credit"].segment_credit(*arguments, None, torch.ones(2), True, scale, None)


def loss(ratio, denominator, *, n=N, mask=True, everything=True):
    x, mask = torch.zeros(n), torch.ones(n, dtype=torch.bool) if mask else None
    number, tensor = (None, denominator) if isinstance(denominator, torch.Tensor) else (denominator, None)
    more = x if everything else None
    return MODULES["policy_loss"].policy_loss(
        x, more, x, OFFSETS, SEQUENCES, mask, 0.2, 0.28, ratio, more, None, more, more, 0.1, more, 2.0, number, tensor
    )  # fmt: skip


def hindsight(dtype, vocab=1024):
    streams = [torch.zeros(3, vocab, dtype=dtype) for _ in range(2)]
    return MODULES["hindsight_information"].hindsight_information(*streams, torch.zeros(3, dtype=torch.int64), 1.0, None, None)


# The launches of a call, as the docstrings of the kernels state them: one, and two where what every program would read again is much.
CALLS = {
    "segment_reduce sum": (lambda: reduce("sum"), 1),
    "segment_reduce mean": (lambda: reduce("mean"), 1),
    "segment_reduce max bf16": (lambda: reduce("max", dtype=torch.bfloat16), 1),
    "segment_reduce mean, N <= CHUNK": (lambda: reduce("mean", n=100), 1),
    "segment_reduce sum, sequences, no mask": (lambda: reduce("sum", level="sequence", mask=False), 1),
    "segment_reduce_backward sum": (lambda: reduce_backward("sum"), 1),
    "segment_reduce_backward mean, no mask": (lambda: reduce_backward("mean", mask=False), 1),
    "segment_reduce_backward mean": (lambda: reduce_backward("mean"), 1),
    "segment_reduce_backward max": (lambda: reduce_backward("max"), 1),
    "segment_reduce_backward mean, many tokens": (lambda: reduce_backward("mean", n=100_000), 2),
    "segment_reduce_backward max, many tokens": (lambda: reduce_backward("max", n=100_000), 2),
    "segment_credit weights": (lambda: credit("weights", 0.7), 1),
    "segment_credit weights, no mask": (lambda: credit("weights", 0.7, mask=False), 1),
    "segment_credit weights, the batch's scale": (lambda: credit("weights", None), 1),
    "segment_credit additive, the batch's scale": (lambda: credit("additive", None), 1),
    "segment_credit weights, the batch's scale, many segments": (lambda: credit("weights", None, segments=500_000), 2),
    "policy_loss token": (lambda: loss("token", None), 1),
    "policy_loss token, a denominator": (lambda: loss("token", 7.0), 1),
    "policy_loss token, no mask, on-policy": (lambda: loss("token", None, mask=False, everything=False), 1),
    "policy_loss segment, one denominator a sequence": (lambda: loss("segment", torch.ones(2)), 1),
    "policy_loss sequence": (lambda: loss("sequence", None), 1),
    "policy_loss token, many tokens": (lambda: loss("token", None, n=200_000), 2),
    "policy_loss token, a denominator, many tokens": (lambda: loss("token", 7.0, n=200_000), 1),
    "policy_loss segment, many tokens": (lambda: loss("segment", None, n=20_000), 2),
    "hindsight_information bf16": (lambda: hindsight(torch.bfloat16), 1),
    "hindsight_information fp32": (lambda: hindsight(torch.float32), 1),
    "hindsight_information fp16 unaligned": (lambda: hindsight(torch.float16, 1001), 1),
}


# What is compiled in every run: each kernel for sm_90, the large ones for the others too. `pytest -m every_target` compiles all calls on
# all three (a minute); `python tests/test_triton_launches.py` records what they take, held to the same.
LARGE = ("segment_credit weights, the batch's scale", "policy_loss segment, one denominator a sequence", "hindsight_information bf16")
EVERY_RUN = [(name, a) for name in LARGE for a in ARCHITECTURES]
EVERY_RUN += [
    (name, 90)
    for name in (
        "segment_reduce mean",
        "segment_reduce_backward mean",
        "segment_reduce_backward max",
        "hindsight_information fp32",
        "policy_loss token, no mask, on-policy",
    )
]
RESOURCE_CASES = [
    pytest.param(name, a, marks=() if (name, a) in EVERY_RUN else pytest.mark.every_target, id=f"{name} sm_{a}")
    for name in CALLS
    for a in ARCHITECTURES
]


@pytest.mark.parametrize("name", CALLS)
def test_launches(name, monkeypatch):
    call, wanted = CALLS[name]
    launches = launched(monkeypatch, 90, *KERNELS, compiling=False)
    call()
    assert len(launches.log) == wanted, [kernel for kernel, _ in launches.log]


def measure(monkeypatch, architecture: int, name: str):
    """{key of the table: Compiled} of one call, held to what each kernel is to be."""
    launches = launched(monkeypatch, architecture, *KERNELS)
    CALLS[name][0]()
    found = {f"{name}: {kernel.strip('_')} sm_{architecture}": measured(compiled) for kernel, compiled in launches.log}
    for key, compiled in found.items():
        assert compiled.stack == 0 and compiled.local == 0, key  # nothing spilled
        before, arrival, after = compiled.ptx.partition("atom.global.gpu.acq_rel.add")
        assert bool(arrival) == (("segment_reduce_fwd" in key and "N <= CHUNK" not in key) or "policy_loss_kernel" in key), key
        if arrival:  # what a program leaves to the last one: stored, then a barrier, then the arrival; and read from L2
            assert before.rindex("bar.sync") > before.rindex("st.global") and "ld.global.cg" in after and "atom." not in before + after
    if name in ("hindsight_information bf16", "hindsight_information fp32"):
        (compiled,) = found.values()
        loop, *again = [loop for loop in compiled.loops() if ".global" in loop]
        assert len(again) == 2  # both streams are read once, and of a confident row of either the words of one thread
        assert {width for x in (loop, *again) for width in compiled.accesses(x, "ld")} == {128}
        assert not re.search(r"shfl|bar\.|ld\.shared|st\.shared|\bdiv\.|\brcp\.|\bst\.", loop)
        assert loop.count("ex2.approx") == 2 * EACH + 6  # one a logit, six a step: both maxima, and the centre's rise and fall, twice
        if architecture == 90:  # an H200 at 4.8 TB/s leaves 52 issue slots to a pair of float32 logits
            machine = next(loop for loop in compiled.machine_loops() if any("LDG" in i for i in loop))
            assert len(machine) / EACH <= 52
    return found


@pytest.mark.parametrize(("name", "architecture"), RESOURCE_CASES)
def test_resources(name, architecture, monkeypatch):
    recorded = json.loads(RESOURCES.read_text()).get(triton.__version__)
    for key, compiled in measure(monkeypatch, architecture, name).items():
        if recorded is not None:
            assert recorded[key] == [compiled.registers, compiled.shared], key


def test_nothing_is_read_back(monkeypatch):
    """Tensors without memory: an .item(), a boolean index or a copy to the host would raise."""
    launches = launched(monkeypatch, 90, *KERNELS, compiling=False)
    monkeypatch.setitem(globals(), "OFFSETS", OFFSETS.to("meta"))
    monkeypatch.setitem(globals(), "SEQUENCES", SEQUENCES.to("meta"))
    with torch.device("meta"):
        for call, _ in CALLS.values():
            call()
    assert len(launches.log) == sum(number for _, number in CALLS.values())


def test_counters_of_arrivals(monkeypatch):
    """One buffer for a stream, zero; each captured call has its own."""
    ragged = importlib.import_module("acpo_kernels._triton.ragged")
    for name in ("_ARRIVALS", "_CAPTURED"):
        monkeypatch.setattr(ragged, name, {})
    on_cpu, zeros, threads = torch.zeros(1), torch.zeros, []

    class OnCuda:
        device, is_cuda = on_cpu.device, True

    def recorded(*args, **keywords):
        threads.append(threading.get_ident())
        return zeros(*args, **keywords)

    monkeypatch.setattr(torch, "zeros", recorded)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert ragged.arrivals(3, OnCuda()).tolist() == [0, 0, 0] and not ragged._CAPTURED  # nothing ran before the capture
    assert threads == [threading.get_ident()]  # the graph's own
    first = ragged.arrivals(1, on_cpu)
    assert len(threads) == 3 and threading.get_ident() not in threads[1:]  # what is kept: not where a warm-up hands out the memory of graphs
    assert first is ragged.arrivals(1024, on_cpu) and not first.any() and ragged.arrivals(1025, on_cpu).shape[0] >= 1025
    captured = [ragged.arrivals(number, OnCuda()) for number in (1, 5, 2)]
    assert [(x.data_ptr() - captured[0].data_ptr()) // 4 for x in captured] == [0, 4, 12] and all(x.data_ptr() % 16 == 0 for x in captured)
    assert ragged.arrivals(2**16, OnCuda()).shape[0] == 2**16  # spent: zeroed in the graph


def test_nothing_is_compiled_again_for_another_batch(monkeypatch):
    launches = launched(monkeypatch, 90, *KERNELS)
    seen = set()
    for n, sequences in ((129, 1), (130, 2), (1040, 15), (1041, 16), (4096, 17)):
        offsets, x, b = torch.linspace(0, n, sequences + 1).long(), torch.zeros(n), torch.zeros(sequences)
        each, mask = torch.arange(sequences + 1), torch.ones(n, dtype=torch.bool)
        MODULES["segment_reduce"].segment_reduce(x, offsets, each, "mean", "segment", mask)
        MODULES["segment_reduce"].segment_reduce_backward(b, offsets, each, "mean", "segment", mask, n, torch.float32, x, b)
        MODULES["segment_credit"].segment_credit(b, offsets, each, b, n, None, mask, "weights", 0.5, 0.5, 1.0, None, True, None, None)
        for ratio in ("token", "segment"):
            MODULES["policy_loss"].policy_loss(x, x, x, offsets, each, mask, 0.2, 0.28, ratio, x, 0.1, None, x, 0.1, x, 2.0, None, None)
        seen.add(tuple(launches.compiled()))
    assert len(seen) == 1, seen


def record() -> None:
    """The table for this version of triton, what every run compares first; written after each call."""
    for name, architecture in sorted(((n, a) for n in CALLS for a in ARCHITECTURES), key=lambda case: case not in EVERY_RUN):
        with pytest.MonkeyPatch.context() as monkeypatch:
            found = {key: [c.registers, c.shared] for key, c in measure(monkeypatch, architecture, name).items()}
        table = json.loads(RESOURCES.read_text())
        table.setdefault(triton.__version__, {}).update(found)
        RESOURCES.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    record()
