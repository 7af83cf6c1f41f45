"""The Triton kernels compiled for sm_80, sm_90 and sm_100, with the launcher's own hints, and held to what they are to be."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("under the interpreter nothing compiles", allow_module_level=True)

from triton_compile import ARCHITECTURES, ELEMENTS, Compiled, compile_kernel, launched  # noqa: E402

from acpo_kernels._triton import logits_rows  # noqa: E402
from acpo_kernels._triton import logprob_entropy as kernels  # noqa: E402

EACH = logits_rows.EACH.value
RESOURCES = Path(__file__).parent / "triton_resources.json"  # {triton version: {kernel: [registers, shared bytes]}}


def logprob_entropy(which: str, element: str, aligned: bool, architecture: int, **changed) -> Compiled:
    """The hints of a launch at V = 151,936 (aligned), or at V = 50,257, where a row of two-byte logits begins anywhere."""
    sizes = {"V": "i32", "inner": "i32", "stride_outer": "i32", "stride_inner": "i32", "inverse_temperature": "fp32"}
    common = {
        "ALIGNED": 16 // ELEMENTS[element] if aligned else 1, "HAS_MASK": True, "HAS_TEMPERATURES": False, "temperatures_ptr": None,
        "IGNORED": -100,
    }  # fmt: skip
    pointers = {"logits_ptr": f"*{element}", "ids_ptr": "*i64", "mask_ptr": "*u8"}
    statistics = {f"{name}_ptr": "*fp32" for name in ("entropy", "maximum", "logsumexp")}
    if which == "fwd":
        kernel, types = kernels._logprob_entropy_fwd_kernel, {**pointers, "logp_ptr": "*fp32", **statistics, **sizes}
    else:
        incoming = {"grad_logp_ptr": "*fp32", "grad_entropy_ptr": "*fp32"}
        kernel, types = kernels._logprob_entropy_bwd_kernel, {**incoming, **pointers, **statistics, "gradient_ptr": f"*{element}", **sizes}
        common |= {"HAS_LOGP": True, "HAS_ENTROPY": True, "BLOCK": kernels.BLOCK, "CHUNK": kernels.CHUNK, "INPLACE": False}
    common |= changed
    if changed.get("HAS_TEMPERATURES"):
        del common["temperatures_ptr"]
        types["temperatures_ptr"] = "*fp32"
    divisible = {name for name in types if name.endswith("_ptr")} | ({"V"} if aligned else set())
    compiled = compile_kernel(kernel, types, common, divisible, architecture, kernels.NUM_WARPS)
    assert compiled.stack == 0 and compiled.local == 0, (which, element, aligned, architecture)  # nothing spilled
    return compiled


def usual(element: str, architecture: int) -> tuple:
    """A compilation takes up to four seconds: all elements on sm_90 and bfloat16 on the others; `pytest -m every_target` has the rest."""
    return () if architecture == 90 or element == "bf16" else (pytest.mark.every_target,)


EVERY = [(w, e, a, arch) for w in ("fwd", "bwd") for e in ELEMENTS for a in (True, False) for arch in ARCHITECTURES]
CASES = [pytest.param(*c, marks=usual(c[1], c[3]), id="-".join(map(str, c))) for c in EVERY]


def key(which, element, aligned, architecture):
    return f"logprob_entropy_{which} {element} {'aligned' if aligned else 'unaligned'} sm_{architecture}"


@pytest.fixture(scope="module")
def recorded():
    table = json.loads(RESOURCES.read_text())
    return table.get(triton.__version__)


@pytest.mark.parametrize(("which", "element", "aligned", "architecture"), CASES)
def test_logprob_entropy(which, element, aligned, architecture, recorded):
    compiled = logprob_entropy(which, element, aligned, architecture)
    bits = 128 if aligned else 8 * ELEMENTS[element]
    if which == "fwd":
        loop, end, again = compiled.loops()  # the row two tiles a turn, what is left of it, and of a confident one the words of one thread
        assert set(compiled.accesses(loop, "ld")) == set(compiled.accesses(again, "ld")) == {bits}
        assert not re.search(r"shfl|bar\.|\bmembar|ld\.shared|st\.shared|\bdiv\.|\brcp\.|\bst\.", loop)
        assert loop.count("ex2.approx") == 2 * end.count("ex2.approx") == 2 * (EACH + 1)  # one a logit, and one a tile for what the maximum was
        assert loop.rindex("ld.global") < loop.index("ex2.approx")
    else:
        # The row's scalars are narrow; every other access is wide. Divisions: one of the row number, one of a row constant.
        loads, stores = compiled.accesses(compiled.ptx, "ld"), compiled.accesses(compiled.ptx, "st")
        threads = 32 * kernels.NUM_WARPS
        chunk_words = kernels.CHUNK * ELEMENTS[element] * 8 // threads // bits
        assert stores == [bits] * chunk_words
        assert loads.count(bits) >= chunk_words and len(loads) <= chunk_words + 8
        assert not re.search(r"shfl|bar\.|ld\.shared|st\.shared", compiled.ptx)
        assert len(re.findall(r"\b(?:div|rcp)\.", compiled.ptx)) <= 2
    if recorded is not None:
        assert recorded[key(which, element, aligned, architecture)] == [compiled.registers, compiled.shared]


@pytest.mark.parametrize(("element", "architecture"), [pytest.param(e, a, marks=usual(e, a)) for e in ELEMENTS for a in ARCHITECTURES])
def test_a_temperature_a_token_costs_one_division_a_row(element, architecture):
    compiled = logprob_entropy("fwd", element, True, architecture, HAS_TEMPERATURES=True)
    loop, *_ = compiled.loops()
    assert set(compiled.accesses(loop, "ld")) == {128} and not re.search(r"\bdiv\.|\brcp\.|shfl|bar\.", loop)


@pytest.mark.parametrize("architecture", (80, 90))
def test_what_a_rounded_product_gained_is_that_of_the_product_taken(architecture):
    """Fused with the addition behind it, the product would round elsewhere: 2.7e-6 of a confident row's entries, as measured on an H100."""
    ptx = logprob_entropy("bwd", "bf16", True, architecture).ptx
    logits = kernels.CHUNK // (32 * kernels.NUM_WARPS)
    products = re.findall(r"fma\.rn\.f32\s+(%r\d+), %r\d+, 0f3FB8AA3B, 0f00000000", ptx)
    shifted = dict(re.findall(r"add\.f32\s+(%r\d+), %r\d+, (%r\d+)", ptx))
    exponents = [x for x in re.findall(r"ex2\.approx\.ftz\.f32\s+%r\d+, (%r\d+)", ptx) if x in shifted]
    assert sorted(shifted[x] for x in exponents) == sorted(products) and len(products) == logits


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_in_place_the_gradient_waits_once_for_the_target(architecture):
    """A scalar that every warp reads lies where one of them writes: one barrier between, after all narrow loads and before any store."""
    compiled = logprob_entropy("bwd", "bf16", True, architecture, INPLACE=True)
    assert set(compiled.accesses(compiled.ptx, "st")) == {128}
    (barrier,) = re.finditer(r"bar\.sync|barrier\.sync", compiled.ptx)
    assert "st.global" not in compiled.ptx[: barrier.start()]
    assert set(compiled.accesses(compiled.ptx[barrier.end() :], "ld")) <= {128}


# Issue slots an H200 leaves a logit at 4.8 TB/s: 132 multiprocessors x 4 warps x 32 lanes x 1.83 GHz over 4.8e12 / bytes.
SLOTS = {2: 12.9, 4: 25.8}


@pytest.mark.parametrize("element", ELEMENTS)
def test_a_logit_of_the_forward_fits_its_issue_slots(element):
    """Machine instructions of the streaming loop for each logit on sm_90, loads and loop control included."""
    compiled = logprob_entropy("fwd", element, True, 90)
    loops = [loop for loop in compiled.machine_loops() if any(i.startswith("LDG") or " LDG" in i for i in loop)]
    a_logit = len(loops[0]) / (2 * EACH)  # two tiles a turn; the last loop reads a confident row's top thread again
    assert 5 < a_logit <= SLOTS[ELEMENTS[element]], a_logit


@pytest.mark.parametrize(("which", "pointers"), [("fwd", ("logits_ptr",)), ("bwd", ("logits_ptr", "gradient_ptr"))])
def test_row_offsets_are_64_bit(which, pointers):
    """N V past 2^31: what is added to the pointer of the rows before anything else is a 64-bit number."""
    compiled = logprob_entropy(which, "bf16", True, 90)
    assert [compiled.offsets(name) for name in pointers] == [{"i64"}] * len(pointers)
    assert compiled.offsets("ids_ptr") == {"i32"}  # what it would read


def test_launcher_compiles_once_for_every_number_of_rows(monkeypatch):
    """What varies with the batch never leads to another compilation; V and the alignment of rows may."""
    launches = launched(monkeypatch, 90, kernels._logprob_entropy_fwd_kernel, kernels._logprob_entropy_bwd_kernel)

    def launch(logits, temperatures=None):
        n = logits.shape[:-1]
        ids, results, gradient = torch.zeros(n, dtype=torch.int64), [torch.empty(n) for _ in range(4)], torch.empty_like(logits)
        kernels.forward(logits, ids, 0.7, temperatures, None, tuple(results))
        kernels.backward(results[0], results[0], logits, ids, tuple(results[1:]), 0.7, temperatures, None, gradient)

    for n in (1, 2, 15, 16, 17):
        launch(torch.empty(n, 1024, dtype=torch.bfloat16))
        launch(torch.empty(3, n + 1, 1024, dtype=torch.bfloat16)[:, :-1])
    assert launches.compiled() == [1, 1]
    launch(torch.empty(2, 1001, dtype=torch.bfloat16))
    assert launches.compiled() == [2, 2]
    launch(torch.empty(2, 1024, dtype=torch.bfloat16), torch.ones(2))
    assert launches.compiled() == [3, 3]


if __name__ == "__main__":  # records the table for this version of triton
    built = {key(*c): logprob_entropy(*c) for c in EVERY}
    table = json.loads(RESOURCES.read_text()) if RESOURCES.exists() else {}
    table.setdefault(triton.__version__, {}).update({k: [c.registers, c.shared] for k, c in built.items()})
    RESOURCES.write_text(json.dumps(table, indent=1) + "\n")
