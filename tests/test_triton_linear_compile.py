"""The Triton kernels on hidden states compiled for sm_80, sm_90 and sm_100, with the launcher's own hints: tensor cores, wide loads, no stack."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("under the interpreter nothing compiles", allow_module_level=True)

from triton_compile import ARCHITECTURES, ELEMENTS, Compiled, compile_kernel, launched  # noqa: E402

from acpo_kernels._triton import (  # noqa: E402
    linear_gradients,
    linear_hindsight_information,
    linear_logprob_entropy,
    linear_policy_loss,
    linear_tiles,
    policy_loss,
)

RESOURCES = Path(__file__).parent / "triton_resources.json"
SIZES = ("V", "H", "stride_weight", "stride_held", "padded", "column", "width_out")
TENSOR_CORES = {80: r"mma\.sync\.aligned\.m16n8k\d+", 90: r"wgmma\.mma_async", 100: r"tcgen05\.mma"}


def linear(which: str, element: str, architecture: int, extras: bool = False) -> Compiled:
    """The hints of a launch at V = 151,936 and H = 896: no bias, one temperature, no softcap; or with bias, temperatures and softcap.

    "forward, held" keeps the logits, "gradient, held" begins with them, "weight, added" is a later chunk's: the one sweep of the policy loss."""
    which, _, held = which.partition(", ")
    size = ELEMENTS[element]
    tile = linear_tiles.tiles(size, architecture)
    kernel = {
        "forward": linear_logprob_entropy._linear_logprob_entropy_fwd_kernel, "gradient": linear_gradients._linear_gradient_kernel,
        "hidden": linear_gradients._hidden_gradient_kernel, "weight": linear_gradients._weight_gradient_kernel,
        "hindsight": linear_hindsight_information._linear_hindsight_kernel,
    }[which]  # fmt: skip
    if which == "forward":
        tile = linear_logprob_entropy.logits_tiles(tile, extras or bool(held))
    elif which == "gradient":
        tile = linear_gradients.gradient_tiles(tile, architecture, extras, bool(held))
    elif which in ("hidden", "weight"):
        tile = linear_gradients.product_tiles(tile, architecture)
        if which == "weight":
            tile = linear_gradients.weight_tiles(tile)
    elif which == "hindsight":
        tile = linear_hindsight_information.pair_tiles(tile)
    rows, columns, inner = {
        "forward": ("M", "V", "H"), "gradient": ("M", "V", "H"), "hindsight": ("M", "V", "H"), "hidden": ("M", "H", "V"), "weight": ("V", "H", "M"),
    }[which]  # fmt: skip
    # What the kernel multiplies: [rows, inner] and [columns, inner], or the other way round in memory.
    left, right = [tile.m, tile.k], [tile.n, tile.k]
    if which in ("hidden", "weight"):
        right = right[::-1]
    if which == "weight":
        left = left[::-1]
    operands = {
        "forward": {"hidden_ref": left, "weight_ref": right}, "gradient": {"hidden_ref": left, "weight_ref": right},
        "hindsight": {"hidden_ref": left, "hindsight_ref": left, "weight_ref": right},
        "hidden": {"gradient_ref": left, "residue_ref": left, "weight_ref": right},
        "weight": {"gradient_ref": left, "residue_ref": left, "hidden_ref": right},
    }[which]  # fmt: skip
    types = {name: f"tensordesc<{element}[{r},{c}]>" if tile.tma else f"*{element}" for name, (r, c) in operands.items()}
    scaled = element == "fp16"
    absent = (set() if extras else {"bias_ptr", "temperatures_ptr", "column_sums_ptr"}) | (set() if scaled else {"scales_ptr", "least_ptr"})
    absent |= set() if held else {"held_ptr", "places_ptr"}
    integers = {"places_ptr": "*i32", "ids_ptr": "*i64", "index_ptr": "*i32", "count_ptr": "*i32", "flags_ptr": "*i32", "infinite_ptr": "*i32"}
    for name in kernel.arg_names:
        if name in SIZES:
            types[name] = "i32"
        elif name in ("inverse_temperature", "softcap"):
            types[name] = "fp32"
        elif name in ("gradient_ptr", "residue_ptr", "out_ptr"):
            types[name] = "*fp32" if held and name == "out_ptr" else f"*{element}"
        elif name.endswith("_ptr") and name not in absent:
            types[name] = integers.get(name, "*fp32")
    constants = {
        "HAS_BIAS": extras, "HAS_TEMPERATURES": extras, "HAS_SOFTCAP": extras, "NEEDS_BIAS": extras, "HAS_LOGP": True, "HAS_ENTROPY": True,
        "RESIDUE": size == 2, "SCALED": scaled, "TMA": tile.tma, "PRECISION": tile.precision, f"BLOCK_{rows}": tile.m, f"BLOCK_{columns}": tile.n,
        f"BLOCK_{inner}": tile.k, "SPLIT": linear_logprob_entropy.SPLIT, "WIDTH": linear_gradients.SLICE, "CHUNK": 128,
        "HOLD": bool(held), "HELD": bool(held), "ADD": bool(held), "PART": min(tile.n, linear_gradients.PART),
    }  # fmt: skip
    constants = {name: constants.get(name) for name in kernel.arg_names if name not in types}
    divisible = {name for name in types if name.endswith("_ptr") or (name.endswith("_ref") and not tile.tma)}
    divisible |= {"V", "H", "stride_weight", "stride_held", "width_out"} & set(types)
    compiled = compile_kernel(kernel, types, constants, divisible, architecture, tile.warps, tile.stages)
    # Nothing spilled; but for 32 registers or 30, once a tile, of the gradient of 256 columns, which was faster on an H100 than 128 without.
    wide = (which, held, architecture, extras) == ("gradient", "", 90, False) and tile.n == 256
    spilled = 0 if not wide else 120 if (element, triton.__version__) == ("bf16", "3.7.1") else 128
    assert compiled.stack == spilled and compiled.local == 0, (which, held, element, architecture)
    return compiled


KERNELS = ("forward", "gradient", "hidden", "weight", "hindsight")
EVERY = [(w, e, a, False) for w in KERNELS for e in ELEMENTS for a in ARCHITECTURES]
EVERY += [(w, "bf16", a, True) for w in ("forward", "gradient", "hindsight") for a in ARCHITECTURES]
SWEEP = ("forward, held", "gradient, held", "weight, added")
EVERY += [(w, e, a, False) for w in SWEEP for e in ELEMENTS for a in ARCHITECTURES]
# A second each: by default bfloat16 on sm_90, and on the others the two with the most registers; `pytest -m every_target` compiles the rest.
USUAL = [c for c in EVERY if c[1] == "bf16" and not c[3] and (c[2] == 90 or c[0] in ("forward", "gradient", "weight, added"))]
USUAL += [("forward", "fp32", 90, False), ("gradient", "bf16", 90, True)]
CASES = [pytest.param(*c, id=" ".join(map(str, c)), marks=() if c in USUAL else pytest.mark.every_target) for c in EVERY]


def key(which, element, architecture, extras):
    return f"linear_{which}{' with bias, temperatures, softcap' if extras else ''} {element} sm_{architecture}"


@pytest.fixture(scope="module")
def recorded():
    return json.loads(RESOURCES.read_text()).get(triton.__version__)


@pytest.mark.parametrize(("which", "element", "architecture", "extras"), CASES)
def test_products(which, element, architecture, extras, recorded):
    compiled = linear(which, element, architecture, extras)
    if recorded is not None:
        assert recorded[key(which, element, architecture, extras)] == [compiled.registers, compiled.dynamic]
    for pointer in ("held_ptr", "gradient_ptr", "residue_ptr", "out_ptr"):  # rows of V or SLICE numbers: past 2^31
        assert compiled.offsets(pointer) <= {"i64"}
    if which in SWEEP:  # float32 logits and sums are moved in whole words
        assert 128 in compiled.accesses(compiled.ptx, "st" if which == "forward, held" else "ld")
    if which == "gradient, held":
        assert not re.search(TENSOR_CORES[architecture], compiled.ptx)
        return
    assert re.search(TENSOR_CORES[architecture], compiled.ptx)
    if element == "fp32":  # three products of TF32's high and low halves, never one
        assert "tf32" in compiled.ptx
    if architecture >= 90 and element != "fp32":
        assert "cp.async.bulk.tensor.2d" in compiled.ptx and not re.search(r"cp\.async\.c[ag]", compiled.ptx)
    else:
        # TF32 takes no operand that lies across: G and hidden are turned on their way to the weight's product, four bytes at a time.
        narrow = {"0x4"} if element == "fp32" and which.startswith("weight") else set()
        assert set(re.findall(r"cp\.async\.c[ag]\.shared\.global.*?, (0x\w+),", compiled.ptx)) - narrow == {"0x10"}
        assert re.search(r"cp\.async\.cg", compiled.ptx)
    limit = {80: 166912, 90: 232448, 100: 232448}[architecture]
    assert compiled.dynamic <= limit


@pytest.mark.parametrize("element", ELEMENTS)
def test_gathered_rows_are_moved_in_whole_words(element):
    kernel = linear_tiles._gather_kernel
    types = {
        "hidden_ptr": f"*{element}",
        "index_ptr": "*i32",
        "count_ptr": "*i32",
        "out_ptr": f"*{element}",
        "stride": "i32",
        "H": "i32",
        "HS": "i32",
    }
    constants = {
        "scale_ptr": None, "ALIGNED": 16 // ELEMENTS[element], "SCALED": False, "ROWS": linear_tiles.GATHER_ROWS,
        "TILE_ROWS": linear_tiles.ROW_BLOCK, "BLOCK": linear_tiles.GATHER_COLUMNS,
    }  # fmt: skip
    compiled = compile_kernel(kernel, types, constants, {name for name in types if name.endswith("_ptr")}, 90, 4)
    (loop,) = compiled.loops()
    assert set(compiled.accesses(loop, "ld")) == {128} and set(compiled.accesses(loop, "st")) == {128}
    assert compiled.stack == 0


def test_launchers_compile_once_for_every_number_of_rows(monkeypatch):
    """Launches of a forward and a backward counted, and what they compile: nothing more when N changes."""
    names = ("_index_kernel", "_gather_kernel"), ("_linear_logprob_entropy_fwd_kernel", "_linear_logprob_entropy_combine_kernel")
    gradients = ("_linear_gradient_kernel", "_hidden_gradient_kernel", "_weight_gradient_kernel", "_bias_gradient_kernel", "_scatter_kernel")
    modules = linear_tiles, linear_logprob_entropy, linear_gradients
    kernels = [getattr(module, name) for module, group in zip(modules, (*names, gradients), strict=True) for name in group]
    launches = launched(monkeypatch, 90, *kernels)
    weight, bias = torch.empty(10_000, 64, dtype=torch.bfloat16), torch.empty(10_000)

    def launch(rows):
        head = (torch.empty(rows, 64, dtype=torch.bfloat16), weight, torch.zeros(rows, dtype=torch.int64), bias, 0.7, None, None, None)
        results = linear_logprob_entropy.forward(*head)
        linear_gradients.backward(*head, results[0], results[1], results[1:], (True, True, True))

    launch(17)
    assert Counter(name for name, _ in launches.log) == {
        "_index_kernel": 2, "_gather_kernel": 2, "_linear_logprob_entropy_fwd_kernel": 1, "_linear_logprob_entropy_combine_kernel": 1,
        "_linear_gradient_kernel": 2, "_hidden_gradient_kernel": 2, "_weight_gradient_kernel": 2, "_bias_gradient_kernel": 2, "_scatter_kernel": 1,
    }  # fmt: skip
    once = launches.compiled()
    assert once == [2, 1, 1, 1, 1, 1, 1, 1, 1]  # the index with and without upstream gradients
    for rows in (1, 2, 15, 16, 300, 70_000):
        launch(rows)
    assert launches.compiled() == once


def test_launches_of_the_policy_loss_in_one_sweep(monkeypatch):
    """Chunks of 128 rows, two slices of the vocabulary: what is launched does not depend on what the device finds, and nothing is compiled
    again for another N, or for another chunk than the first two."""
    modules = linear_tiles, linear_logprob_entropy, linear_gradients, linear_policy_loss, policy_loss
    kernels = [value for module in modules for name, value in vars(module).items() if re.fullmatch(r"_\w+_kernel", name)]
    kernels = list({id(k): k for k in kernels}.values())
    launches = launched(monkeypatch, 90, *kernels)
    monkeypatch.setattr(linear_policy_loss, "holding_pays", lambda *_: True)
    monkeypatch.setattr(linear_policy_loss, "chunk_rows", lambda _: 128)
    monkeypatch.setattr(torch.ops.acpo_kernels, "policy_loss", policy_loss.policy_loss)
    weight, bias = torch.empty(10_000, 64, dtype=torch.bfloat16), torch.empty(10_000)

    def launch(rows):
        hidden, x = torch.empty(rows, 64, dtype=torch.bfloat16), torch.zeros(rows)
        offsets, sequences = torch.tensor([0, rows]), torch.tensor([0, 1])
        linear_policy_loss.forward(
            hidden, weight, torch.zeros(rows, dtype=torch.int64), bias, 1.0, None, None, x, x, offsets, sequences, None, 0.2, 0.28, "token", None,
            None, None, 0.0, None, 2.0, None, None, (True, True, True),
        )  # fmt: skip

    launch(300)
    chunk = {
        "_gather_kernel": 2, "_linear_logprob_entropy_fwd_kernel": 1, "_linear_logprob_entropy_combine_kernel": 1, "_row_gradients_kernel": 1,
        "_linear_gradient_kernel": 2, "_hidden_gradient_kernel": 2, "_weight_gradient_kernel": 2, "_bias_gradient_kernel": 2, "_scatter_kernel": 1,
    }  # fmt: skip
    once = {
        "_index_kernel": 1,
        "_chunks_kernel": 1,
        "_policy_loss_kernel": 1,
    }
    assert Counter(name for name, _ in launches.log) == {name: 3 * count for name, count in chunk.items()} | once
    compiled = launches.compiled()
    for rows in (129, 1000):
        launch(rows)
    assert launches.compiled() == compiled


@pytest.mark.parametrize("ratio", ["token", "segment"])
def test_which_rows_count_is_never_read_back(monkeypatch, ratio):
    """Tensors without memory: an .item(), a boolean index or a copy to the host would raise. One sweep, and two phases."""
    modules = linear_tiles, linear_logprob_entropy, linear_gradients, linear_policy_loss, linear_hindsight_information, policy_loss
    kernels = {id(v): v for module in modules for name, v in vars(module).items() if re.fullmatch(r"_\w+_kernel", name)}
    launches = launched(monkeypatch, 90, *kernels.values(), compiling=False)
    monkeypatch.setattr(linear_policy_loss, "holding_pays", lambda *_: True)
    monkeypatch.setattr(torch.ops.acpo_kernels, "policy_loss", policy_loss.policy_loss)
    with torch.device("meta"):
        hidden, weight, x = torch.empty(300, 64, dtype=torch.float16), torch.empty(10_000, 64, dtype=torch.float16), torch.zeros(300)
        ids, offsets, sequences = (torch.zeros(size, dtype=torch.int64) for size in (300, 3, 2))
        mask = torch.ones(300, dtype=torch.bool)
        with pytest.raises(RuntimeError):  # what this test would see
            hidden[mask]
        linear_policy_loss.forward(
            hidden, weight, ids, None, 1.0, None, None, x, x, offsets, sequences, mask, 0.2, 0.28, ratio, None, x, x, 0.1, x, 2.0, None, None,
            (True, True, False),
        )  # fmt: skip
        linear_hindsight_information.forward(hidden, hidden, weight, ids, None, 1.0, None, None, mask)
    names = {name for name, _ in launches.log}
    assert {"_linear_hindsight_kernel", "_weight_gradient_kernel"} <= names and ("_row_gradients_kernel" in names) == (ratio == "token")


def test_what_only_float16_and_two_streams_launch(monkeypatch):
    kernels = (
        linear_gradients._scales_kernel, linear_hindsight_information._linear_hindsight_kernel,
        linear_hindsight_information._linear_hindsight_combine_kernel,
    )  # fmt: skip
    others = (linear_tiles._index_kernel, linear_tiles._gather_kernel, linear_logprob_entropy._linear_logprob_entropy_fwd_kernel)
    others += (linear_logprob_entropy._linear_logprob_entropy_combine_kernel, linear_gradients._linear_gradient_kernel)
    others += (linear_gradients._hidden_gradient_kernel, linear_gradients._weight_gradient_kernel, linear_gradients._scatter_kernel)
    launches = launched(monkeypatch, 90, *kernels, *others)
    weight = torch.empty(3000, 64, dtype=torch.float16)
    for rows in (1, 16, 300):
        hidden, ids, t = torch.empty(rows, 64, dtype=torch.float16), torch.zeros(rows, dtype=torch.int32), torch.ones(rows)
        head = (weight, ids, None, None, t, 30.0, torch.ones(rows, dtype=torch.bool))
        results = linear_logprob_entropy.forward(hidden, *head)
        linear_gradients.backward(hidden, *head, results[0], None, results[1:], (True, True, False))
        linear_hindsight_information.forward(hidden, hidden, *head)
    assert launches.compiled()[:3] == [1, 1, 1]


def record() -> None:
    """The table for this version of triton, what every run compares first; what spills is named, and stays out of it."""
    for case in sorted(EVERY, key=lambda c: c not in USUAL):
        try:
            compiled = linear(*case)
        except AssertionError as spilled:
            print(spilled)
            continue
        table = json.loads(RESOURCES.read_text())
        table.setdefault(triton.__version__, {})[key(*case)] = [compiled.registers, compiled.dynamic]
        RESOURCES.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    record()
