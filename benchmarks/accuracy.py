"""Error against float64 of every implementation and of every peer that runs on this machine: python -m benchmarks.accuracy

Two tables in Markdown, and benchmarks/results/accuracy.json. An error is the worst row's |x - x64| over that row's |x64| (a gradient: over
the row's largest |x64|; dW: over the largest of all), with x64 in float64 from the SAME inputs; NaN is written NaN. So 1 means that a
confident token's log-prob or gradient was lost altogether. Triton kernels, ours and the peers', run in the interpreter, each lot in a
process of its own, because TRITON_INTERPRET=1 must be set before a kernel is decorated.

Ours counts as best or equal where no peer's error is smaller by more than the rounding of one result (EQUAL below), or where ours is no
further off than the reference computing in float32: what is smaller than that is luck of the order of a sum, and is listed as such.

On the CPU TRL, Liger and cut-cross-entropy run their torch paths. The interpreter truncates where a GPU rounds to bfloat16 (4e-3 in
every Triton kernel's bf16 gradient), and its bf16 products are not those of a GPU, so kernels with products run on float32 alone.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from acpo_kernels import _cpu, linear_logprob_entropy, reference

from . import peers
from .common import V, from_tests

N = 8
LINEAR = {"N": 32, "H": 128, "V": 4096}  # H: verl's kernel takes multiples of 128
EQUAL = 2.0**-22  # twice the spacing of float32 numbers, relative
SAME = 1.5  # no further off than the reference in float32: two orders of one sum differ by so much
EQUAL_BF16 = 2.0**-8  # the same for a gradient that is stored as bfloat16
OURS = "ours"
WORKERS = {  # name: (environment, interpreter's options)
    "interpreter": ({"TRITON_INTERPRET": "1"}, []),
    "interpreter, peers": ({"TRITON_INTERPRET": "1"}, ["-O"]),  # -O: their wrappers assert tensors on CUDA
}

implementations = from_tests("implementations")


# --- inputs -----------------------------------------------------------------------------------------------------------------------


def logit_inputs() -> dict[str, tuple[Tensor, Tensor]]:
    """{what: (logits, ids)}"""
    generator = torch.Generator().manual_seed(7)
    plain = torch.randn(N, V, generator=generator) * 2
    ids = torch.randint(V, (N,), generator=generator)
    rows = torch.arange(N)

    def target_above(margin: float) -> Tensor:
        out = plain.clone()
        out[rows, ids] = float("-inf")
        out[rows, ids] = out.logsumexp(-1) + margin  # of the log of the others' sum: log-prob -softplus(-margin)
        return out

    gone = plain.clone()
    gone[:, torch.rand(V, generator=generator) < 0.1] = float("-inf")
    gone[rows, ids] = plain[rows, ids]
    return {
        "ordinary": (plain, ids), "offset 1e4": (plain + 1e4, ids), "margin 40": (target_above(40.0), ids),
        "near-deterministic": (target_above(14.0), ids), "-inf columns": (gone, ids),
        "row maximum -200": (plain - plain.amax(-1, keepdim=True) - 200, ids), "bf16 logits": (plain.bfloat16(), ids),
    }  # fmt: skip


def linear_inputs() -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """{what: (hidden, weight, ids)}"""
    generator = torch.Generator().manual_seed(7)
    n, h, v = LINEAR["N"], LINEAR["H"], LINEAR["V"]
    hidden, weight = torch.randn(n, h, generator=generator), torch.randn(v, h, generator=generator) * (2 / h**0.5)
    ids = torch.randint(v, (n,), generator=generator)
    below_hidden, below_weight = hidden.clone(), weight.clone()
    below_hidden[:, 0], below_weight[:, 0] = 1.0, -220.0
    near = hidden @ weight.T
    # Each hidden state turned towards its own token's row until that logit is far above the rest
    towards = weight[ids] / weight[ids].square().sum(-1, keepdim=True)
    confident = hidden + towards * (near.amax(-1, keepdim=True) + 16 - near.gather(-1, ids.unsqueeze(-1)))
    greedy = near.argmax(-1)
    return {
        "float32": (hidden, weight, ids), "bfloat16": (hidden.bfloat16(), weight.bfloat16(), ids),
        "bfloat16, top token": ((4 * hidden).bfloat16(), weight.bfloat16(), greedy),
        "float32, confident": (confident, weight, ids), "float32, row maximum -200": (below_hidden, below_weight, ids),
    }  # fmt: skip


# --- errors -----------------------------------------------------------------------------------------------------------------------


def relative(got: Tensor, exact: Tensor, dims: int) -> float:
    """The worst |got - exact| / max|exact| over slices of the last `dims` dimensions; NaN where they differ in what is finite."""
    got, exact = (x.detach().double().reshape(*x.shape[: x.ndim - dims], -1) for x in (got, exact))
    if not torch.equal(got.isfinite(), exact.isfinite()):
        return math.nan
    scale = torch.where(exact.isfinite(), exact.abs(), 0.0).amax(-1).clamp(min=1e-300)
    return (torch.where(exact.isfinite(), (got - exact).abs(), 0.0).amax(-1) / scale).max().item()


def logit_errors(function: Callable, logits: Tensor, ids: Tensor) -> dict[str, float]:
    """function(logits, ids, grad_logp, grad_entropy) -> (logp, entropy, gradient)."""
    incoming = torch.ones(len(ids)), torch.full((len(ids),), 0.01)
    exact = implementations.exact(logits, ids, grad_logp=incoming[0], grad_entropy=incoming[1])
    got = function(logits, ids, *incoming)
    return {name: relative(x, e, dims) for name, x, e, dims in zip(("logp", "entropy", "gradient"), got, exact, (0, 0, 1), strict=True)}


def linear_errors(function: Callable, hidden: Tensor, weight: Tensor, ids: Tensor) -> dict[str, float]:
    """function(hidden, weight, ids) -> (logp, entropy or None), differentiable."""
    incoming = torch.ones(len(ids)), torch.full((len(ids),), 0.01)
    leaves = [hidden.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()]
    logp, entropy = function(*leaves, ids)
    with_entropy = entropy is not None
    outputs = [x for x in (logp, entropy) if x is not None]
    grads = torch.autograd.grad(outputs, leaves, [g.to(o.dtype) for g, o in zip(incoming, outputs, strict=False)])

    h64, w64 = hidden.double(), weight.double()
    upstream = {"grad_logp": incoming[0], "grad_entropy": incoming[1] if with_entropy else torch.zeros(len(ids))}
    e_logp, e_entropy, e_logits = implementations.exact(h64 @ w64.T, ids, **upstream)
    pairs = {"logp": (logp, e_logp, 0), "dHidden": (grads[0], e_logits @ w64, 1), "dW": (grads[1], e_logits.T @ h64, 2)}
    if with_entropy:
        pairs["entropy"] = (entropy, e_entropy, 0)
    return {name: relative(x, e, dims) for name, (x, e, dims) in pairs.items()}


# --- implementations --------------------------------------------------------------------------------------------------------------


def by_autograd(function: Callable) -> Callable:
    def run(logits, ids, grad_logp, grad_entropy):
        leaf = logits.detach().clone().requires_grad_()
        outputs = function(leaf, ids)
        (gradient,) = torch.autograd.grad(outputs, leaf, [g.to(o.dtype) for g, o in zip((grad_logp, grad_entropy), outputs, strict=True)])
        return *outputs, gradient

    return run


def compiled_isa(name: str) -> Callable:
    def run(logits, ids, grad_logp, grad_entropy):
        _cpu._C.restrict_cpu_isa(name)
        try:
            return implementations.Implementation(name)(logits, ids, grad_logp=grad_logp, grad_entropy=grad_entropy)
        finally:
            _cpu._C.restrict_cpu_isa("")

    return run


def linear_isa(name: str) -> Callable:
    def run(hidden, weight, ids):
        _cpu._C.restrict_cpu_isa(name)
        return linear_logprob_entropy(hidden, weight, ids)

    return run


def here(worker: str) -> tuple[dict[str, dict[str, Callable]], dict[str, str]]:
    """({"logits" or "linear": {implementation: function}}, {what is absent: why}) of this process."""
    logits: dict[str, Callable] = {}
    linear: dict[str, Callable] = {}
    absent: dict[str, str] = {}

    def peer(family: ModuleType, device: torch.device, name: str, into: dict, wrap: Callable = lambda f: f) -> None:
        make = family.logprob_entropy if into is logits else family.linear_logprob_entropy
        try:
            into |= {f"{provider}{name}": wrap(function) for provider, function in make(device).items()}
        except peers.Absent as why:
            absent[f"{family.__name__.rsplit('.', 1)[-1]}{name}"] = str(why)

    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    if worker == "compiled":
        for isa in ("amx", "avx512bf16", "avx512", "avx2", "baseline") if _cpu.available else ():
            try:
                _cpu._C.restrict_cpu_isa(isa)
            except ValueError as missing:
                absent[f"{OURS}, {isa}"] = str(missing)
                continue
            _cpu._C.restrict_cpu_isa("")
            linear[f"{OURS}, {isa}"] = linear_isa(isa)
            if isa not in ("amx", "avx512bf16"):  # these levels have products alone
                logits[f"{OURS}, {isa}"] = compiled_isa(isa)
        logits["reference, float32"] = by_autograd(lambda z, ids: reference.logprob_entropy(z.float(), ids))
        linear["reference, float32"] = lambda h, w, ids: reference.linear_logprob_entropy(h.float(), w.float(), ids)
        from .peers import cut_cross_entropy, liger, plain, trl

        for family in (plain, trl):
            peer(family, cpu, "", logits, by_autograd)
        for family in (plain, trl, liger, cut_cross_entropy):
            peer(family, cpu, "", linear)
    elif worker == "interpreter":
        ours = implementations.Implementation("interpreter")
        logits[f"{OURS}, Triton"] = lambda z, ids, a, b: ours(z, ids, grad_logp=a, grad_entropy=b)
        from .peers import trl

        peer(trl, cuda, " Triton", logits, by_autograd)
    else:
        from .peers import verl

        peer(verl, cpu, " Triton", linear)
    return {"logits": logits, "linear": linear}, absent


def errors(worker: str) -> dict:
    """{"logits" or "linear": {input: {quantity: {implementation: error}}}, "absent": {...}} of one process."""
    functions, absent = here(worker)
    out: dict = {"logits": {}, "linear": {}, "absent": absent}
    for kind, inputs, measure in (("logits", logit_inputs(), logit_errors), ("linear", linear_inputs(), linear_errors)):
        for what, arguments in inputs.items():
            if kind == "linear" and worker in WORKERS and arguments[0].dtype != torch.float32:
                continue
            for name, function in functions[kind].items():
                torch._dynamo.reset()
                try:
                    measured = measure(function, *arguments)
                except Exception as error:  # a peer that refuses an input is shown as absent there
                    if name.startswith(OURS):
                        raise
                    absent[f"{name}, {what}"] = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
                    continue
                finally:
                    if _cpu.available:
                        _cpu._C.restrict_cpu_isa("")  # also what linear_isa left for the backward
                for quantity, value in measured.items():
                    out[kind].setdefault(what, {}).setdefault(quantity, {})[name] = value
    return out


# --- the table --------------------------------------------------------------------------------------------------------------------


def merge(parts: list[dict]) -> dict:
    whole: dict = {"logits": {}, "linear": {}, "absent": {}}
    for part in parts:
        whole["absent"] |= part["absent"]
        for kind in ("logits", "linear"):
            for what, quantities in part[kind].items():
                for quantity, values in quantities.items():
                    whole[kind].setdefault(what, {}).setdefault(quantity, {}).update(values)
    return whole


def number(value: float | None) -> str:
    return "" if value is None else "NaN" if math.isnan(value) else f"{value:.0e}".replace("e-0", "e-").replace("e+00", "")


def table(results: dict) -> str:
    """Markdown; ours first, then the reference, then the peers."""
    names = list(dict.fromkeys(n for quantities in results.values() for values in quantities.values() for n in values))
    names.sort(key=lambda n: (not n.startswith(OURS), not n.startswith("reference")))
    lines = ["| input | | " + " | ".join(names) + " |", "|" + "---|" * (len(names) + 2)]
    for what, quantities in results.items():
        for i, (quantity, values) in enumerate(quantities.items()):
            lines.append(f"| {what if i == 0 else ''} | {quantity} | " + " | ".join(number(values.get(n)) for n in names) + " |")
    return "\n".join(lines)


def not_best(results: dict) -> tuple[list[str], list[str]]:
    """(Where an implementation of ours is further from float64 than some peer; where that is the rounding of the formula in float32)."""
    behind, luck = [], []
    for what, quantities in results.items():
        for quantity, values in quantities.items():
            others = {n: v for n, v in values.items() if not n.startswith((OURS, "reference")) and not math.isnan(v)}
            rounding = EQUAL_BF16 if what.startswith("bf") and quantity in ("gradient", "dHidden", "dW") else EQUAL
            for name in (n for n in values if n.startswith(OURS)):
                best = min(others, key=others.get, default=None)
                if math.isnan(values[name]) or (best and values[name] > others[best] + rounding):
                    line = f"{what}, {quantity}: {name} {values[name]:.1e}, {best} {others.get(best, math.nan):.1e}"
                    (luck if values[name] <= SAME * values.get("reference, float32", 0.0) else behind).append(line)
    return behind, luck


def spawn(worker: str) -> dict:
    environment, options = WORKERS[worker]
    command = [sys.executable, *options, "-m", "benchmarks.accuracy", "--worker", worker]
    root = Path(__file__).parents[1]
    result = subprocess.run(command, cwd=root, env={**os.environ, **environment}, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{result.stderr[-3000:]}")
    return json.loads(result.stdout.splitlines()[-1])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=__doc__.split("\n\n")[0])
    parser.add_argument("--worker", choices=["compiled", *WORKERS], help="only this process's errors, as JSON")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "accuracy.json")
    options = parser.parse_args(arguments)
    if options.worker:
        print(json.dumps(errors(options.worker)))
        return 0
    whole = merge([errors("compiled"), *map(spawn, WORKERS)])
    print(f"From logits, N = {N}, V = {V:,}:\n\n{table(whole['logits'])}\n")
    print(f"From hidden states, {', '.join(f'{k} = {v:,}' for k, v in LINEAR.items())}:\n\n{table(whole['linear'])}\n")
    for name, why in whole["absent"].items():
        print(f"absent: {name}: {why}")
    behind, luck = (a + b for a, b in zip(not_best(whole["logits"]), not_best(whole["linear"]), strict=True))
    if behind:
        print("Ours is NOT best or equal:\n" + "\n".join(behind))
    else:
        print("Ours is best or equal in every row" + (", but for these:" if luck else "."))
    if luck:
        print("A peer is nearer, ours as near as the reference in float32:\n" + "\n".join(luck))

    from .conftest import environment

    options.out.parent.mkdir(parents=True, exist_ok=True)
    clean = json.loads(json.dumps(whole), parse_constant=lambda c: "NaN")  # JSON has no NaN
    options.out.write_text(json.dumps({"acpo": environment(), "behind": behind, "luck": luck, **clean}, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
