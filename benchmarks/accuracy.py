"""Error against float64 of every implementation and of every peer that runs on this machine: python -m benchmarks.accuracy

Two tables in Markdown, and benchmarks/results/cpu/accuracy.json. An error is the worst row's |x - x64| over that row's |x64| (a gradient: over
the row's largest |x64|; dW: over the largest of all), with x64 in float64 from the SAME inputs; NaN is written NaN. So 1 means that a
confident token's log-prob or gradient was lost altogether. Triton kernels, ours and the peers', run in the interpreter, each lot in a
process of its own, because TRITON_INTERPRET=1 must be set before a kernel is decorated.

What is equal, one rule for every column: an error counts as the best of its row where it exceeds the least one by no more than the rounding of
one result, or is at most twice what the float32 products alone bring (column `products alone`: torch's products in float32 with all else in
float64): sums of other orders differ by so much, and nobody who multiplies in float32 can do better than by luck. Those are bold.

On the CPU TRL, Liger, cut-cross-entropy and Unsloth run their torch paths. The interpreter truncates where a GPU rounds to bfloat16 (4e-3 in
every Triton kernel's bf16 gradient), and its bf16 products are not those of a GPU, so kernels with products run on float32 alone. Peers that
are single files (verl, Unsloth, flash-attn) are read from the folder that ACPO_PEER_FILES names: see benchmarks/peers/fetch.py.
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

from . import outputs, peers
from .common import V, from_tests

N = 8
LINEAR = {"N": 32, "H": 128, "V": 4096}  # H: verl's kernel takes multiples of 128
EQUAL = 2.0**-22  # twice the spacing of float32 numbers, relative
EQUAL_BF16 = 2.0**-8  # the same for a gradient that is stored as bfloat16
ORDERS = 2.0  # two orders of one sum
OURS, PRODUCTS = "ours", "products alone"
YARDSTICKS = ("reference", PRODUCTS)  # no peers
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

    def target_above(margin: float) -> Tensor:
        return hidden + towards * (near.amax(-1, keepdim=True) + margin - near.gather(-1, ids.unsqueeze(-1)))

    above_weight = below_weight.clone()
    above_weight[:, 0] = 1e4
    greedy = near.argmax(-1)
    return {  # a column of -inf cannot come from finite states and weights
        "float32": (hidden, weight, ids), "bfloat16": (hidden.bfloat16(), weight.bfloat16(), ids),
        "bfloat16, top token": ((4 * hidden).bfloat16(), weight.bfloat16(), greedy),
        "float32, offset 1e4": (below_hidden, above_weight, ids), "float32, margin 40": (target_above(40.0), weight, ids),
        "float32, near-deterministic": (target_above(16.0), weight, ids), "float32, row maximum -200": (below_hidden, below_weight, ids),
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
    got = dict(zip(("logp", "entropy", "gradient"), function(logits, ids, *incoming), strict=True))
    of_entropy = incoming[1] if got["entropy"] is not None else torch.zeros(len(ids))  # without entropy: the log-prob's own gradient
    exact = dict(zip(got, implementations.exact(logits, ids, grad_logp=incoming[0], grad_entropy=of_entropy), strict=True))
    return {name: relative(x, exact[name], int(name == "gradient")) for name, x in got.items() if x is not None}


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
    if getattr(function, "gradients_alone", False):
        del pairs["logp"]
    if with_entropy:
        pairs["entropy"] = (entropy, e_entropy, 0)
    return {name: relative(x, e, dims) for name, (x, e, dims) in pairs.items()}


# --- implementations --------------------------------------------------------------------------------------------------------------


def by_autograd(function: Callable) -> Callable:
    def run(logits, ids, grad_logp, grad_entropy):
        leaf = logits.detach().clone().requires_grad_()
        outputs = function(leaf, ids)
        given = [x for x in outputs if x is not None]
        (gradient,) = torch.autograd.grad(given, leaf, [g.to(o.dtype) for g, o in zip((grad_logp, grad_entropy), given, strict=False)])
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


class ProductsAlone(torch.autograd.Function):
    """torch's three products in float32, and everything between them in float64."""

    @staticmethod
    def forward(ctx, hidden, weight, ids):
        ctx.save_for_backward(hidden, weight, ids)
        return implementations.exact((hidden.float() @ weight.float().T).double(), ids)[:2]

    @staticmethod
    def backward(ctx, grad_logp, grad_entropy):
        hidden, weight, ids = ctx.saved_tensors
        logits = (hidden.float() @ weight.float().T).double()
        d_logits = implementations.exact(logits, ids, grad_logp=grad_logp, grad_entropy=grad_entropy)[2].float()
        return (d_logits @ weight.float()).to(hidden.dtype), (d_logits.T @ hidden.float()).to(weight.dtype), None


def of_loss(function: Callable) -> Callable:
    """A GRPO loss on one rollout at advantage -1 and ratio 1, times the number of tokens: its gradients are those of the summed log-prob."""

    def run(hidden, weight, ids):
        loss = function(hidden.unsqueeze(0), weight, ids.unsqueeze(0), None, torch.tensor([-1.0]))
        return loss.expand(len(ids)), None

    run.gradients_alone = True
    return run


def here(worker: str) -> tuple[dict[str, dict[str, Callable]], dict[str, str]]:
    """({"logits" or "linear": {implementation: function}}, {what is absent: why}) of this process."""
    logits: dict[str, Callable] = {}
    linear: dict[str, Callable] = {}
    absent: dict[str, str] = {}

    def peer(family: ModuleType, device: torch.device, name: str, into: dict, wrap: Callable = lambda f: f, make: Callable | None = None) -> None:
        make = make or (family.logprob_entropy if into is logits else family.linear_logprob_entropy)
        try:
            into |= {f"{provider}{name}": wrap(function) for provider, function in make(device).items()}
        except peers.Absent as why:
            absent[f"{family.NAME}{name}"] = str(why)

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
        linear[PRODUCTS] = ProductsAlone.apply
        from .peers import cut_cross_entropy, liger, plain, quack, trl, unsloth

        for family in (plain, trl):
            peer(family, cpu, "", logits, by_autograd)
        peer(quack, cpu, "", logits)
        for family in (plain, trl, liger, cut_cross_entropy, unsloth):
            peer(family, cpu, "", linear)
        peer(liger, cpu, "", linear, of_loss, liger.linear_policy_loss)
    elif worker == "interpreter":
        ours = implementations.Implementation("interpreter")
        logits[f"{OURS}, Triton"] = lambda z, ids, a, b: ours(z, ids, grad_logp=a, grad_entropy=b)
        from .peers import trl

        peer(trl, cuda, " Triton", logits, by_autograd)
    else:
        from .peers import flash_attn, liger, verl

        for family in (liger, flash_attn):
            peer(family, cpu, " Triton", logits, by_autograd)
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


SHORT = {"reference, float32": "float32 reference", "Liger LigerFusedLinearGRPOLoss": "Liger fused GRPO"}  # names of columns


def allowance(what: str, quantity: str, values: dict[str, float]) -> float:
    """The largest error that counts as the best of its row: the rule of the docstring."""
    rounding = EQUAL_BF16 if what.startswith("bf") and quantity in ("gradient", "dHidden", "dW") else EQUAL
    least = min((v for n, v in values.items() if not n.startswith(YARDSTICKS) and not math.isnan(v)), default=math.inf)
    return max(least + rounding, ORDERS * values.get(PRODUCTS, 0.0))


def table(results: dict) -> str:
    """Markdown; ours first, then the yardsticks, then the peers; bold is the best or equal."""
    names = list(dict.fromkeys(n for quantities in results.values() for values in quantities.values() for n in values))
    names.sort(key=lambda n: (not n.startswith(OURS), not n.startswith(YARDSTICKS)))
    lines = ["| input | | " + " | ".join(SHORT.get(n, n) for n in names) + " |", "|" + "---|" * (len(names) + 2)]
    for what, quantities in results.items():
        for i, (quantity, values) in enumerate(quantities.items()):
            best = allowance(what, quantity, values)
            cells = [
                f"**{number(values[n])}**" if n in values and values[n] <= best and not n.startswith(YARDSTICKS) else number(values.get(n))
                for n in names
            ]
            lines.append(f"| {what if i == 0 else ''} | {quantity} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def not_best(results: dict) -> list[str]:
    """Where an implementation of ours is not the best or equal to it."""
    behind = []
    for what, quantities in results.items():
        for quantity, values in quantities.items():
            peers_alone = {n: v for n, v in values.items() if not n.startswith((OURS, *YARDSTICKS)) and not math.isnan(v)}
            for name in (n for n in values if n.startswith(OURS)):
                if not values[name] <= allowance(what, quantity, {**peers_alone, **{n: v for n, v in values.items() if n.startswith(YARDSTICKS)}}):
                    best = min(peers_alone, key=peers_alone.get, default="none")
                    behind.append(f"{what}, {quantity}: {name} {values[name]:.1e}, {best} {peers_alone.get(best, math.nan):.1e}")
    return behind


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
    parser.add_argument("--out", type=outputs.file, default=str(Path(__file__).parent / "results" / "cpu" / "accuracy.json"))
    options = parser.parse_args(arguments)
    if options.worker:
        print(json.dumps(errors(options.worker)))
        return 0
    whole = merge([errors("compiled"), *map(spawn, WORKERS)])
    print(f"From logits, N = {N}, V = {V:,}:\n\n{table(whole['logits'])}\n")
    print(f"From hidden states, {', '.join(f'{k} = {v:,}' for k, v in LINEAR.items())}:\n\n{table(whole['linear'])}\n")
    for name, why in whole["absent"].items():
        print(f"absent: {name}: {why}")
    behind = not_best(whole["logits"]) + not_best(whole["linear"])
    print("Ours is NOT best or equal:\n" + "\n".join(behind) if behind else "Ours is best or equal in every row.")

    from .conftest import environment

    clean = json.loads(json.dumps(whole), parse_constant=lambda c: "NaN")  # JSON has no NaN
    options.out.write_text(json.dumps({"acpo": environment(), "behind": behind, **clean}, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
