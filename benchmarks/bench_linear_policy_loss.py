"""`linear_policy_loss` beside `linear_logprob_entropy` and then `policy_loss`, and beside eager torch, at shares of active rows.

FLOP that are needed: 2 u N H V for the logits of unmasked rows, and 4 a N H V for dHidden and dW of rows whose gradient is not zero
(outside the clip, with an advantage), where the gradient is formed beside the loss. Rows get advantage 0 until their share is a. The two calls make
the logits twice, 8 N H V.
"""

from __future__ import annotations

import pytest
import torch

from acpo_kernels import linear_logprob_entropy, linear_policy_loss, policy_loss, reference

from .bench_linear_logprob_entropy import ALONE, SHARES, bare_products, inputs, products_as_they_are, rows_of
from .bench_linear_logprob_entropy import SHAPES as HEADS
from .bench_linear_logprob_entropy import expected as head_expected
from .common import SIZES, Case, Expected, Provider, copy_ceiling, gradients
from .hierarchy import segments_of
from .peers import plain

SHAPES = HEADS


def case(n, h, v, dtype, device, shares: bool = True) -> Case:
    hidden, weight, ids = inputs(n, h, v, dtype, device)
    segments = segments_of(n, max(2, n // 16), max(1, n // 128), device)
    advantages, incoming = torch.randn(n, device=device), {"loss": torch.ones((), device=device)}
    variants = {"all": (torch.ones(n, dtype=torch.bool, device=device), advantages)}
    for unmasked, active in SHARES if shares else ():
        mask, flows = rows_of(n, unmasked, active, device)
        variants[f"u={unmasked:g} a={active:g}"] = mask, torch.where(flows, advantages, 0.0)

    def ours(x, w, mask, advantages):
        return (linear_policy_loss(x, w, ids, None, advantages, segments, mask=mask).loss,)

    def two_calls(x, w, mask, advantages):
        logp, _ = linear_logprob_entropy(x, w, ids, mask=mask)
        return (policy_loss(logp, None, advantages, segments, mask=mask).loss,)

    def eager(x, w, mask, advantages):
        logp, _ = plain.linear_four_lines(x, w, ids)
        return (reference.policy_loss(logp, None, advantages, segments, mask=mask).loss,)

    def provider(function, of: str = "all", flop: int | None = None) -> Provider:
        call = lambda: gradients(lambda x, w: function(x, w, *variants[of]), {"hidden": hidden, "weight": weight}, incoming)  # noqa: E731
        return Provider(call, gradients_of=of, flop=flop)

    def expected(of: str) -> dict[str, Expected]:
        """On-policy the ratio is 1 whatever logp is: the loss is -sum A / tokens, its gradient with respect to logp -A / tokens."""
        mask, some = variants[of]
        upstream = torch.where(mask, -some.double() / mask.sum(), 0.0)
        result = head_expected(hidden, weight, torch.where(mask, ids, reference.IGNORED), {"logp": upstream}, 1.0, True)
        del result["logp"]
        single = reference.policy_loss(torch.zeros(n, device=device), None, some, segments, mask=mask).loss
        return result | {"loss": Expected(upstream.sum(), single, None, 4.0)}

    providers = {"ours": provider(ours)}
    for unmasked, active in SHARES if shares else ():
        name = f"u={unmasked:g} a={active:g}"
        providers[f"ours, {name}"] = provider(ours, name, round((2 * unmasked + 4 * active) * n * h * v))
    alone = device.type == "cpu" and n >= ALONE
    if not alone:
        providers |= {"linear_logprob_entropy + policy_loss": provider(two_calls, flop=8 * n * h * v), "eager": provider(eager)}
    ceilings = {} if alone else {"matrix products of 8 N H V": bare_products(hidden, weight, backward=True), "copy": copy_ceiling(weight)}
    if not alone and device.type == "cpu" and dtype == torch.bfloat16:
        ceilings["matrix products, bfloat16"] = products_as_they_are(hidden, weight, backward=True)
    return Case(
        "linear_policy_loss", "forward+backward", {"N": n, "H": h, "V": v}, dtype, device, providers, expected,
        bytes=3 * (n * h + v * h) * hidden.element_size(), flop=6 * n * h * v,
        ceilings=ceilings,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", range(4), ids=SIZES[:4])
def test_linear_policy_loss(run, device, shapes, dtype, size):
    wanted = SHAPES[shapes, device.type]
    if size >= len(wanted):
        pytest.skip(f"--shapes {shapes} has {len(wanted)} sizes on {device.type}")
    if device.type == "cuda" and dtype == torch.float32 and shapes != "small":
        pytest.skip("heads are bfloat16 on a GPU; float32 is tested, not timed")
    if device.type == "cpu" and dtype == torch.float32 and shapes == "default":
        pytest.skip("float32 beside the matrix products is in linear_logprob_entropy's table; of the whole loss: --shapes large")
    run(case(*wanted[size], dtype, device, shares=device.type == "cuda" or shapes != "default"))
