"""Each operation against the float64 reference on a small ragged case, within the budget that the tests hold it to:

error <= 2 (error of the reference computing in float32 from the same inputs + eps(float32) max |exact|),      4 in the place of 2 for products;
half a unit of its own dtype more for a gradient in bfloat16
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

import acpo_kernels
from acpo_kernels import Segments, reference

SECONDS = {"cpu": 10.0, "cuda": 120.0}  # Triton compiles each kernel at its first call: 29 s on an H100 were two of the eight operations
EPS = torch.finfo(torch.float32).eps


class Check(NamedTuple):
    operation: str
    result: str
    device: str  # and dtype
    error: float
    budget: float
    ok: bool | None  # None: not run
    note: str = ""


def checks(seconds: float | None = None) -> list[Check]:
    """On the host, and on CUDA where there is a device. What has not begun after `seconds` of its device (SECONDS) is not run and says so."""
    out: list[Check] = []
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        begin, most = time.monotonic(), SECONDS[device] if seconds is None else seconds
        for name, case in _cases(torch.device(device)).items():
            if time.monotonic() - begin > most:
                out.append(Check(name, "", device, float("nan"), float("nan"), None, f"no time left of {most:g} s"))
                continue
            try:
                out += _check(name, device, torch.float32, *case)
                if "logprob" in name or name.startswith("linear"):  # kernels of their own
                    out += _check(name, device, torch.bfloat16, *case)
            except Exception as error:  # a kernel that does not run is what this is here to tell
                out.append(
                    Check(name, "", device, float("nan"), float("nan"), False, f"{type(error).__name__}: {' '.join(str(error).split())[:120]}")
                )
    out.append(_segmenter())
    return out


def _check(name: str, device: str, given: torch.dtype, call: Callable, inputs: list[Tensor], results: tuple[str, ...], factor: float) -> list[Check]:
    """call(implementation, *inputs) gives the differentiable and other results; the gradients of their weighted sum are results as well."""

    def run(implementation, dtype) -> list[Tensor]:
        leaves = [x.detach().to(given).to(dtype).requires_grad_() for x in inputs]
        found = call(implementation, *leaves)
        differentiable = [f for f in found if f.requires_grad]
        # Weights that differ by element: a sum alone would not see two gradients in each other's place.
        total = sum((f * torch.linspace(0.5, 1.5, f.numel(), dtype=f.dtype, device=f.device).view_as(f)).sum() for f in differentiable)
        gradients = list(torch.autograd.grad(total, leaves, allow_unused=True)) if differentiable else []
        return [f.detach() for f in found] + [g for g in gradients if g is not None]

    ours = run(getattr(acpo_kernels, name), given)
    single, exact = (run(getattr(reference, name), dtype) for dtype in (torch.float32, torch.float64))
    out = []
    for result, a, s, e in zip(results, ours, single, exact, strict=True):
        error = float((a.double() - e).abs().max())
        largest = float(e.abs().max())
        budget = factor * (float((s.double() - e).abs().max()) + EPS * largest)
        if a.dtype == torch.bfloat16:
            budget += 0.5 * torch.finfo(torch.bfloat16).eps * largest
        where = f"{device}, {str(given).removeprefix('torch.')}"
        out.append(Check(name, result, where, error, budget, error <= budget))  # NaN is no success
    return out


def working(x: Tensor) -> torch.dtype:
    """What is no logit and no weight is never below float32."""
    return torch.promote_types(x.dtype, torch.float32)


def _segments(device: torch.device) -> Segments:
    """Rollouts of four, one and two steps, of 1 to 17 tokens; the last has no answer span."""
    ends = torch.tensor([0, 3, 4, 8, 10, 27, 29, 37], device=device)
    return Segments(ends, torch.tensor([0, 4, 5, 7], device=device), terminal=torch.tensor([True, True, False], device=device))


def _cases(device: torch.device) -> dict[str, tuple]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(device)

    segments, vocabulary, width = _segments(device), 1003, 40
    n = segments.num_tokens
    ids = torch.randint(vocabulary, (n,), generator=generator).to(device)
    logits, hinted = draw(n, vocabulary, scale=4.0), draw(n, vocabulary, scale=4.0)
    hidden, other, weight = draw(n, width), draw(n, width), draw(vocabulary, width, scale=0.5)
    logp, old = -draw(n).abs(), -draw(n).abs()
    token, advantage, scores = draw(n), draw(segments.num_sequences), draw(segments.num_segments)
    information = ("logp", "hindsight_logp", "entropy", "log_ratio", "kl", "information")
    no_grad = torch.no_grad()

    def without_gradients(call: Callable) -> Callable:
        return no_grad(call)

    return {
        "logprob_entropy": (lambda f, x: f(x, ids), [logits], ("logp", "entropy", "dlogits"), 2.0),
        "linear_logprob_entropy": (lambda f, x, w: f(x, w, ids), [hidden, weight], ("logp", "entropy", "dhidden", "dweight"), 4.0),
        "hindsight_information": (without_gradients(lambda f, x, y: list(f(x, y, ids))), [logits, hinted], information, 2.0),
        "linear_hindsight_information": (without_gradients(lambda f, x, y, w: list(f(x, y, w, ids))), [hidden, other, weight], information, 4.0),
        "segment_reduce": (
            lambda f, x: [f(x, segments, reduce="mean"), f(x, segments, reduce="sum", level="sequence")], [token], ("mean", "sum", "dvalues"), 2.0,
        ),
        "segment_credit": (without_gradients(lambda f, s, a: list(f(s, segments, a))), [scores, advantage], ("advantages", "weights"), 2.0),
        "policy_loss": (lambda f, x, o: [f(x, o.detach(), token.to(working(x)), segments).loss], [logp, old], ("loss", "dlogp"), 2.0),
        "linear_policy_loss": (
            lambda f, x, w, o: [f(x, w, ids, o.detach(), token.to(working(x)), segments, entropy_weight=1e-2).loss], [hidden, weight, old],
            ("loss", "dhidden", "dweight"), 4.0,
        ),
    }  # fmt: skip


def _segmenter() -> Check:
    """Three lines of a made-up solution, cut where a reader would."""
    from .policy import byte_tokenizer

    text = "First, 2 + 2 = 4.\n\nThen 4 * 3 = 12, so far so good.\n\nThe answer is 12."
    try:
        tokenizer = byte_tokenizer()
        ids = torch.tensor(tokenizer(text)["input_ids"])
        ends = acpo_kernels.Segmenter.from_tokenizer(tokenizer)(ids, torch.tensor([0, len(ids)])).token_offsets.tolist()
    except Exception as error:
        return Check("Segmenter", "", "cpu", float("nan"), 0.0, False, f"{type(error).__name__}: {' '.join(str(error).split())[:120]}")
    wanted = [0, text.index("Then"), text.index("The answer"), len(text)]
    return Check(
        "Segmenter", "boundaries", "cpu", float(ends != wanted), 0.0, ends == wanted, "" if ends == wanted else f"cut at {ends}, wanted {wanted}"
    )
