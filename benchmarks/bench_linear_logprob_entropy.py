"""`linear_logprob_entropy` beside the bare matrix products, TRL's chunked head, Liger, cut-cross-entropy, verl, eager and torch.compile.

FLOP: forward 2 N H V, backward 6 N H V (the logits again, then dHidden and dW), 4 where the logits are kept. Shares: with a share u of unmasked rows
and a share a of rows whose gradient is not zero, (2 u + 6 a) N H V are needed; a frozen weight needs 2 + 4. All these variants of ours are timed
in one process, in turn; at 1,024 rows alone (--shapes large, size2), where reading the weight and writing its gradient, which cost
the same for any share, no longer count.

The bare products are torch's own from float32 to float32, since torch has none from bfloat16 to float32 on the CPU: a bfloat16 weight is
converted tile by tile. Forward 2 N H V, forward + backward 8 N H V with the logits computed twice; with a frozen weight the 4 N H V of
logits and dHidden (ours computes the logits twice there too). On CUDA they are products in the inputs' dtype, 6 N H V; those of bfloat16 are
measured on the CPU as well, from bfloat16 to bfloat16: the processor's own speed, at logits of eight bits.
"""

from __future__ import annotations

import pytest
import torch

from acpo_kernels import linear_logprob_entropy, reference

from . import peers
from .common import SIZES, Case, Ceiling, Expected, Provider, V, copy_ceiling, gradients, sampled_rows

# (N, H, V)
SHAPES = {
    ("small", "cpu"): [(16, 128, 1000)], ("default", "cpu"): [(64, 896, V)], ("large", "cpu"): [(256, 896, V), (256, 1536, V), (1024, 896, V)],
    ("small", "cuda"): [(64, 128, 5000)], ("default", "cuda"): [(8192, 896, V)],
    ("large", "cuda"): [(8192, h, V) for h in (896, 1536, 2048, 4096)],
}  # fmt: skip
ONE_OUTPUT = {"cut-cross-entropy"}
# N H V, forward + backward: logits that are kept are not made again; how many tiles are skipped depends on what is in them: not known
MULTIPLIED = {"eager": 6, "torch.compile": 6, "cut-cross-entropy": 0}
SHARES = [(1.0, 0.25), (0.25, 0.25)]  # of unmasked rows, and of rows whose gradient is not zero (clipped, no advantage)
ALONE = 1024  # rows from which on the CPU times ours and its shares alone: the others take many seconds a call
FALLBACKS = ("Liger", "cut-cross-entropy")  # their kernels need a GPU; what they run here is torch in chunks, at seconds a call


def inputs(n: int, h: int, v: int, dtype: torch.dtype, device: torch.device):
    """Hidden states and a head whose logits have a standard deviation of 2."""
    hidden = torch.randn(n, h, device=device).to(dtype)
    weight = (torch.randn(v, h, device=device) * (2 / h**0.5)).to(dtype)
    return hidden, weight, torch.randint(v, (n,), device=device)


TILE = 4096  # entries of the vocabulary a product on the CPU


def bare_products(hidden, weight, backward: bool, frozen: bool = False) -> Ceiling:
    n, (v, h) = len(hidden), weight.shape
    if hidden.device.type == "cuda":
        return products_as_they_are(hidden, weight, backward)
    x, d_hidden = hidden.float(), torch.empty(n, h)
    d_weight, logits = torch.empty(v if backward and not frozen else 0, h), torch.empty(n, min(v, TILE))

    def tiles():
        for begin in range(0, v, TILE):
            w = weight[begin : begin + TILE].float()
            z = logits[:, : len(w)]
            torch.mm(x, w.T, out=z)
            if backward:
                if not frozen:
                    torch.mm(x, w.T, out=z)
                    torch.mm(z.T, x, out=d_weight[begin : begin + TILE])
                d_hidden.addmm_(z, w)

    return Ceiling(tiles, flop=(2 if not backward else 4 if frozen else 8) * n * h * v)


def products_as_they_are(hidden, weight, backward: bool) -> Ceiling:
    """Of the same bytes: from the inputs' dtype to that dtype, whole. In bfloat16 no logit would keep more than eight bits."""
    n, (v, h) = len(hidden), weight.shape
    logits = torch.empty(n, v, dtype=hidden.dtype, device=hidden.device)
    if not backward:
        return Ceiling(lambda: torch.mm(hidden, weight.T, out=logits), flop=2 * n * h * v)
    logits.copy_(torch.randn(n, v, device=hidden.device))
    d_hidden, d_weight = torch.empty_like(hidden), torch.empty_like(weight)

    def products():
        torch.mm(hidden, weight.T, out=logits)
        torch.mm(logits, weight, out=d_hidden)
        torch.mm(logits.T, hidden, out=d_weight)

    return Ceiling(products, flop=6 * n * h * v)


def rows_of(n: int, unmasked: float, active: float, device) -> tuple[torch.Tensor, torch.Tensor]:
    """(unmasked rows, rows whose gradient flows) of a batch, as bool; the second are some of the first."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(1)).to(device)
    mask, flows = torch.zeros(2, n, dtype=torch.bool, device=device)
    mask[order[: round(unmasked * n)]] = True
    flows[order[: round(active * n)]] = True
    return mask, flows


def case(n, h, v, dtype, mode, device, temperature: float = 1.0, slow_peers: bool = False, shares: bool = True) -> Case:
    hidden, weight, ids = inputs(n, h, v, dtype, device)
    backward = mode == "forward+backward"
    incoming = {"logp": torch.randn(n, device=device), "entropy": torch.full((n,), 0.01, device=device)}

    def call(function, ids=ids, incoming=incoming, leaves=("hidden", "weight")):
        tensors = {"hidden": hidden, "weight": weight}
        if backward:
            fixed = {name: x for name, x in tensors.items() if name not in leaves}
            trained = {name: tensors[name] for name in leaves}
            return lambda: gradients(lambda *x: function(*x, *fixed.values(), ids, temperature), trained, incoming)

        def forward():
            with torch.no_grad():
                return {name: out for name, out in zip(incoming, function(hidden, weight, ids, temperature), strict=True) if out is not None}

        return forward

    def ours(x, w, ids, temperature):
        return linear_logprob_entropy(x, w, ids, temperature=temperature)

    found, absent = peers.find("linear_logprob_entropy", device)
    if device.type == "cpu" and v == V:
        slow = (*FALLBACKS, *(("TRL chunked",) if backward else ()), *(("eager",) if backward and dtype == torch.float32 else ()))
        for name in slow if not slow_peers else ():
            if found.pop(name, None):
                absent[name] = "seconds a call on the CPU: --shapes large"
    alone = device.type == "cpu" and n >= ALONE
    if alone:
        found, absent = {}, {}
    providers = {"ours": Provider(call(ours))}
    variants = {"all": (ids, incoming)}  # by the gradients that they are held to
    ceilings = {} if alone else {"matrix products": bare_products(hidden, weight, backward), "copy": copy_ceiling(weight)}
    if not alone and device.type == "cpu" and dtype == torch.bfloat16:
        ceilings["matrix products, bfloat16"] = products_as_they_are(hidden, weight, backward)
    if backward and temperature == 1.0 and shares:
        for unmasked, active in SHARES:
            mask, flows = rows_of(n, unmasked, active, device)
            name = f"u={unmasked:g} a={active:g}"
            some = torch.where(mask, ids, reference.IGNORED), {key: torch.where(flows, g, 0.0) for key, g in incoming.items()}
            variants[name] = some
            needed = 2 * unmasked + 6 * active
            providers[f"ours, {name}"] = Provider(call(ours, *some), f"{100 * needed / 8:.2f} % of the FLOP", name, round(needed * n * h * v))
        if not alone:
            providers["ours, frozen weight"] = Provider(call(ours, leaves=("hidden",)), "75 % of the FLOP", flop=6 * n * h * v)
        if device.type == "cpu" and not alone:
            ceilings["matrix products, frozen weight"] = bare_products(hidden, weight, backward, frozen=True)
    for name, f in found.items():
        flop = MULTIPLIED[name] * n * h * v if backward and name in MULTIPLIED else None
        providers[name] = Provider(call(f), *(("log-prob alone", "logp") if name in ONE_OUTPUT else ("", "all")), flop)

    def wanted(of: str) -> dict[str, Expected]:
        some, upstream = variants.get(of) or (ids, {"logp": incoming["logp"]})
        return expected(hidden, weight, some, upstream, temperature, backward)

    return Case(
        "linear_logprob_entropy", mode, {"N": n, "H": h, "V": v} | ({} if temperature == 1 else {"T": temperature}), dtype, device, providers,
        wanted, bytes=(n * h + v * h) * hidden.element_size() * (3 if backward else 1), flop=(8 if backward else 2) * n * h * v,
        ceilings=ceilings, absent=absent,
    )  # fmt: skip


def sampled_entries(v: int, ids: torch.Tensor) -> torch.Tensor:
    """Rows of dW that are checked: both ends of the vocabulary, some between, and those of targets, where it is largest."""
    ends = torch.arange(min(v, 64), device=ids.device)
    return torch.cat([ends, v - 1 - ends, torch.linspace(0, v - 1, 128, device=ids.device).long(), ids[ids >= 0][:64]]).unique()


def expected(hidden, weight, ids, incoming, temperature, backward) -> dict[str, Expected]:
    """Outputs of all rows; dHidden of a sample of rows, dW of a sample of the vocabulary, summed over all rows. The logits' gradient is
    autograd's of the reference, the products with it are written out: of dW, 300 rows of 151,936 are computed. On the CPU many rows are
    minutes in float64: of them the sample alone is checked, and dW, a sum over all, is not (it is at fewer rows)."""
    rows, entries = sampled_rows(len(ids), ids.device, 32), sampled_entries(weight.shape[0], ids)
    every = ids.device.type == "cuda" or len(ids) < ALONE
    step = 512 if ids.device.type == "cuda" else 32  # rows of logits in float64 at a time
    some_rows = rows.new_tensor(range(len(ids))) if every else rows
    out = {}
    for dtype in (torch.float64, torch.float32):
        w = weight.to(dtype)
        one = {name: torch.zeros(len(ids), dtype=dtype, device=ids.device) for name in incoming}
        d_hidden = torch.zeros(hidden.shape, dtype=dtype, device=ids.device)
        d_weight = torch.zeros(len(entries), weight.shape[1], dtype=dtype, device=ids.device)
        for some in some_rows[ids[some_rows] != reference.IGNORED].split(step):
            x = hidden[some].to(dtype)
            needed = backward and any(bool((g[some] != 0).any()) for g in incoming.values())
            z = (x @ w.T).requires_grad_(needed)
            results = reference.logprob_entropy(z, ids[some], temperature=temperature)._asdict()
            for name in incoming:
                one[name][some] = results[name].detach()
            if needed:
                upstream = [g[some].to(dtype) for g in incoming.values()]
                (grad,) = torch.autograd.grad([results[name] for name in incoming], z, upstream)
                here = torch.isin(some, rows)
                d_hidden[some[here]] = grad[here] @ w
                d_weight += grad[:, entries].T @ x
        if not every:
            one = {name: x[rows] for name, x in one.items()}
        out[dtype] = one | ({"d_hidden": d_hidden[rows]} if backward else {}) | ({"d_weight": d_weight} if backward and every else {})
    # Products on matrix units may sum in another order than the reference: the contract's factor of 4
    which = dict.fromkeys(incoming, None if every else rows) | {"d_hidden": rows, "d_weight": entries}
    return {
        name: Expected(exact, out[torch.float32][name], which[name], 4.0, hidden.dtype if name.startswith("d_") else None)
        for name, exact in out[torch.float64].items()
    }


@pytest.mark.parametrize("mode", ["forward", "forward+backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", range(4), ids=SIZES[:4])
def test_linear_logprob_entropy(run, device, shapes, dtype, mode, size):
    wanted = SHAPES[shapes, device.type]
    if size >= len(wanted):
        pytest.skip(f"--shapes {shapes} has {len(wanted)} sizes on {device.type}")
    if device.type == "cuda" and dtype == torch.float32 and shapes != "small":
        pytest.skip("heads are bfloat16 on a GPU; float32 is tested, not timed")
    run(case(*wanted[size], dtype, mode, device, slow_peers=shapes == "large", shares=device.type == "cuda" or shapes != "default"))


@pytest.mark.parametrize("size", range(4), ids=SIZES[:4])
def test_linear_logprob_entropy_temperature(run, device, shapes, size):
    wanted = SHAPES[shapes, device.type]
    if size >= len(wanted):
        pytest.skip(f"--shapes {shapes} has {len(wanted)} sizes on {device.type}")
    if device.type == "cpu" and shapes != "small":
        pytest.skip("a temperature is free beside a matrix product on the CPU")
    run(case(*wanted[size], torch.bfloat16, "forward+backward", device, temperature=0.7))
