"""What every bench file stands on: a case, its check against float64, the interleaved timer, and the row that comes out.

A `Case` is one operation at one shape with the calls that compute it ("ours" among them) and the ceilings that bound it. `measure`
checks every call against the reference in float64, then times all of them in turn, round after round, in one process: what disturbs
the machine disturbs all alike, so ratios mean something where medians would not. A call with a wrong result is never timed.

Bytes are those that an ideal kernel moves (each input read once, each output written once); FLOP those of its matrix products. Where a provider
multiplies more or less than the case says, it has a count of its own.
"""

from __future__ import annotations

import gc
import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from .clocks import Timed, interleave, quartile

PEER_LIMIT = 0.05  # bfloat16 arithmetic is off by 1e-3 to 1e-2 of the norm, a wrong formula by about 1
SIZES = [f"size{i}" for i in range(4)]  # names for -k: "logprob_entropy and size0"
V = 151_936  # the Qwen2.5 vocabulary

Results = dict[str, Tensor]


def from_tests(name: str):
    """A module of tests/, which is no package: the error budget, and the closed-form gradient, are written down once."""
    folder = str(Path(__file__).parents[1] / "tests")
    if folder not in sys.path:
        sys.path.append(folder)
    return importlib.import_module(name)


contract = from_tests("contract")


@dataclass
class Expected:
    """One output in float64; `single` is the reference computing in float32 from the same inputs. `rows` says which rows were computed."""

    exact: Tensor
    single: Tensor
    rows: Tensor | None = None
    factor: float = 2.0  # 4 for products on tensor cores
    gradient_dtype: torch.dtype | None = None


@dataclass
class Provider:
    run: Callable[[], Results]
    note: str = ""
    gradients_of: str = "all"  # "logp": has no entropy, so its gradients are those of the log-prob alone
    flop: int | None = None  # of its own; None: the case's; 0 where the case's are not: nobody knows, and the row has no rate


@dataclass
class Ceiling:
    """Something that only moves the bytes or only multiplies: no operation of this shape is faster."""

    run: Callable[[], object]
    bytes: int = 0
    flop: int = 0


@dataclass
class Case:
    op: str
    mode: str
    shape: dict[str, float]
    dtype: torch.dtype
    device: torch.device
    providers: dict[str, Provider]
    expected: Callable[[str], dict[str, Expected]] | None  # called with gradients_of
    bytes: int = 0
    flop: int = 0
    ceilings: dict[str, Ceiling] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)  # peers that are not here, and why
    baselines: frozenset[str] = frozenset()  # providers that compute something else, for scale: not checked, and said so by their note
    judge: Callable[[Results], dict] | None = None  # in place of `expected`, where results are no floating-point numbers: what `check` returns
    launch_bound: bool = False  # on CUDA: timed as a graph, without emptying the cache
    cold: bool = True  # False: nothing to read, all of it is Python's and the dispatcher's time
    curve: str = ""  # the size over which this case is a point of a curve
    budgeted: bool = True  # False: one row, where the budget (how far float32 happened to be off there) is chance

    @property
    def title(self) -> str:
        return f"{self.op} {self.mode} {shape_text(self.shape)} {dtype_text(self.dtype)}"


def shape_text(shape: dict[str, float]) -> str:
    return " ".join(f"{name}={size:,}" if isinstance(size, int) else f"{name}={size:g}" for name, size in shape.items())


def dtype_text(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --- the check --------------------------------------------------------------------------------------------------------------------


def check(results: Results, expected: dict[str, Expected], *, ours: bool) -> dict:
    """{"error": the largest |x - float64| over the largest |float64| of its output, "errors": per output, "correct", "why"}.

    Ours is held to the error budget of the contract, a peer to being the same function (PEER_LIMIT of the norm, NaN never).
    """
    errors: dict[str, float | None] = {}
    why = []
    for name, wanted in expected.items():
        if name not in results:
            continue
        got = results[name].detach() if wanted.rows is None else results[name].detach()[wanted.rows]
        try:
            worst = contract.error(got, wanted.exact)
        except AssertionError as wrong:
            errors[name] = None  # JSON has no NaN
            why.append(f"{name}: {str(wrong)[:200]}")  # it may name every NaN of a batch
            continue
        finite = wanted.exact[wanted.exact.isfinite()].double()
        largest = finite.abs().max().item() if finite.numel() else 0.0
        errors[name] = worst / max(largest, torch.finfo(torch.float32).tiny)
        if ours:
            allowed = contract.budget(wanted.single, wanted.exact, factor=wanted.factor, gradient_dtype=wanted.gradient_dtype)
            if not worst <= allowed:
                why.append(f"{name}: error {worst:.2e}, budget {allowed:.2e}")
        else:
            norm = finite.norm().item()
            off = (got.double()[wanted.exact.isfinite()] - finite).norm().item() / max(norm, torch.finfo(torch.float32).tiny)
            if not off <= PEER_LIMIT:
                why.append(f"{name}: ||x - float64|| / ||float64|| = {off:.2e}, limit {PEER_LIMIT}")
    if not errors:
        why.append("no output to check")
    worst = None if None in errors.values() else max(errors.values(), default=None)
    return {"error": worst, "errors": errors, "correct": not why, "why": "; ".join(why)}


def sampled_rows(n: int, device: torch.device, most: int = 64) -> Tensor:
    """All rows, or the first and the last ones: in float64 a whole batch of logits costs minutes."""
    if n <= most:
        return torch.arange(n, device=device)
    return torch.cat([torch.arange(most // 2, device=device), torch.arange(n - most // 2, n, device=device)])


# --- the rows ---------------------------------------------------------------------------------------------------------------------


def measure(case: Case) -> tuple[list[dict], list[float]]:
    """The rows of a case, and the seconds of ours. Raises where ours is wrong: then nothing is timed."""
    rows, good = [], {}
    expected: dict[str, dict[str, Expected]] = {}
    for name, provider in case.providers.items():
        if name in case.baselines:
            rows.append({**_common(case), "provider": name, "kind": "baseline", "note": provider.note})
            good[name] = provider.run
            continue
        verdict = _verdict(name, provider, case, expected)
        rows.append({**_common(case), "provider": name, "kind": "provider", "note": provider.note, **verdict})
        if verdict["correct"]:
            good[name] = provider.run
        elif is_ours(name):
            raise AssertionError(f"{case.title}: {name} is wrong, nothing was timed: {verdict['why']}")
    expected.clear()
    gc.collect()
    rows += [{**_common(case), "provider": name, "kind": "ceiling", "correct": True} for name in case.ceilings]
    rows += [{**_common(case), "provider": name, "kind": "absent", "correct": True, "why": why} for name, why in case.absent.items()]

    calls = {**good, **{name: ceiling.run for name, ceiling in case.ceilings.items()}}
    before = os.getloadavg()[0]
    timed = interleave(calls, case.device, cold=_cold(case))
    after = os.getloadavg()[0]
    for row in rows:
        if row["provider"] in timed and row["kind"] != "absent":
            ceiling = case.ceilings.get(row["provider"])
            moved, flop = (ceiling.bytes, ceiling.flop) if ceiling else _work(case, case.providers[row["provider"]])
            row |= {
                **_times(timed[row["provider"]]), "load": [before, after],
                "peak_bytes": timed[row["provider"]].peak_bytes if row["provider"] in good else None,
                **_rates(moved, flop, quartile(timed[row["provider"]].seconds)),
            }  # fmt: skip
    _relate(rows)
    return rows, timed[next(filter(is_ours, timed))].seconds


def rehearse(case: Case) -> str:
    """Calls each provider of the case once, and says how many of them ran. What fails here fails, and is judged, where it is measured."""
    failed = {}
    for name, provider in case.providers.items():
        try:
            provider.run()
        except Exception as error:  # the others are to be compiled all the same
            failed[name] = type(error).__name__
    done = f"{len(case.providers) - len(failed)} of {len(case.providers)} called once, nothing timed"
    return "; ".join([done, *(f"{name}: {error}" for name, error in failed.items())])


def _times(timed: Timed) -> dict:
    low, median, high = (quartile(timed.seconds, which) for which in (0.25, 0.5, 0.75))
    return {
        "seconds": low, "median": median, "spread": high / low - 1, "rounds": len(timed.seconds), "clock": timed.clock,
        **({"warm_seconds": quartile(timed.warm)} if timed.warm else {}),
    }  # fmt: skip


def is_ours(name: str) -> bool:
    return name == "ours" or name.startswith("ours,")


def _verdict(name: str, provider: Provider, case: Case, expected: dict) -> dict:
    if case.judge is not None:
        return case.judge(provider.run())
    if provider.gradients_of not in expected:
        expected[provider.gradients_of] = case.expected(provider.gradients_of)
    if is_ours(name):
        return check(provider.run(), expected[provider.gradients_of], ours=case.budgeted)
    try:
        results = provider.run()
    except Exception as error:  # a peer's refusal is a finding of its own: it stands in the table, and the others are measured
        return {"correct": False, "error": None, "errors": {}, "why": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
    return check(results, expected[provider.gradients_of], ours=False)


def _cold(case: Case) -> bool:
    return case.cold and not (case.device.type == "cuda" and case.launch_bound)


def _common(case: Case) -> dict:
    return {
        "op": case.op, "mode": case.mode, "shape": dict(case.shape), "dtype": dtype_text(case.dtype), "device": case.device.type,
        "threads": torch.get_num_threads(), "cold": _cold(case),
        **({"curve": case.curve} if case.curve else {}),
    }  # fmt: skip


def _work(case: Case, provider: Provider) -> tuple[int, int]:
    """Bytes and FLOP. Without its FLOP a provider that multiplies has no bytes either: their rate would stand in the column of the others' FLOP."""
    flop = case.flop if provider.flop is None else provider.flop
    return (case.bytes if flop or not case.flop else 0), flop


def _rates(moved: int, flop: int, seconds: float) -> dict:
    return {
        "bytes": moved, "flop": flop,
        "gb_s": moved / seconds / 1e9 if moved else None, "gflop_s": flop / seconds / 1e9 if flop else None,
    }  # fmt: skip


def _relate(rows: list[dict]) -> None:
    """ratio: this time over ours; percents: this rate over each ceiling's of the same kind; percent: over the best one's, FLOP where there are."""
    ours = next(row["seconds"] for row in rows if is_ours(row["provider"]))
    for rate in ("gb_s", "gflop_s"):
        ceilings = {row["provider"]: row[rate] for row in rows if row["kind"] == "ceiling" and row.get(rate)}
        for row in rows:
            if row.get(rate) and ceilings:
                row["percents"] = row.get("percents", {}) | {name: 100 * row[rate] / ceiling for name, ceiling in ceilings.items()}
                row["percent"] = 100 * row[rate] / max(ceilings.values())
    for row in rows:
        if "seconds" in row:
            row["ratio"] = row["seconds"] / ours


# --- what bench files share -------------------------------------------------------------------------------------------------------


def copy_ceiling(like: Tensor) -> Ceiling:
    target = torch.empty_like(like)
    return Ceiling(lambda: target.copy_(like), bytes=2 * like.numel() * like.element_size())


def amax_ceiling(like: Tensor) -> Ceiling:
    return Ceiling(lambda: torch.amax(like, -1), bytes=like.numel() * like.element_size())


def gradients(function: Callable[..., tuple[Tensor, ...]], leaves: dict[str, Tensor], incoming: dict[str, Tensor]) -> Results:
    """The outputs that `incoming` names, in its order, and their gradients with respect to the leaves as "d_leaf"."""
    fresh = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}
    outputs = {name: out for name, out in zip(incoming, function(*fresh.values()), strict=False) if out is not None}
    upstream = [incoming[name].to(out.dtype) for name, out in outputs.items()]
    grads = torch.autograd.grad(list(outputs.values()), list(fresh.values()), upstream)
    return {**outputs, **{f"d_{name}": grad for name, grad in zip(fresh, grads, strict=True)}}
