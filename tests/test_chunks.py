"""segment_reduce, segment_credit and policy_loss where units are cut: lengths around the chunks of the CUDA kernels (128 tokens of a
segment, 1024 of a sequence, 32 chunks that are added at a time), and every setting of the loss. Any implementation passes them."""

from __future__ import annotations

import importlib
import os

import pytest
import torch
from ragged import assert_right, segments_of

from acpo_kernels import policy_loss, segment_credit, segment_reduce

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
LENGTHS = ((127, 128, 129, 0), (1,), (), (4097, 3), (0, 1023), (1025,), (1024, 0), (256, 0, 255, 257))
TERMINAL = (False, True, True, True, True, False, True, True)


SHORT = ((127, 129), (3, 0, 1), (), (1025,))


@pytest.fixture(params=["one launch", "two"] if INTERPRETED or torch.cuda.is_available() else [""])
def launches(request, monkeypatch):
    """The CUDA kernels read again what a launch before would tell them, or launch it, as for very many tokens."""
    if request.param == "two":
        for name in ("segment_reduce", "segment_credit", "policy_loss"):
            monkeypatch.setattr(importlib.import_module(f"acpo_kernels._triton.{name}"), "REDUNDANT", -1)


@pytest.fixture(autouse=True)
def everything_on(device):
    torch.set_default_device(device)
    yield
    torch.set_default_device(None)  # "cpu" would leave a function mode behind


def case(seed: int = 0, lengths=LENGTHS, terminal=TERMINAL):
    torch.manual_seed(seed)
    segments = segments_of(lengths, terminal, torch.get_default_device())
    return segments, torch.rand(segments.num_tokens) < 0.7


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("level", ["segment", "sequence"])
@pytest.mark.parametrize("reduce", ["sum", "mean", "max"])
def test_segment_reduce(reduce, level, masked, launches):
    segments, mask = case()
    mask = mask if masked else None
    values = torch.randn(2, segments.num_tokens).mul(3).round(decimals=1)

    def both(values, impl):
        leaf = values.clone().requires_grad_()
        out = segment_reduce(leaf, segments, reduce=reduce, level=level, mask=mask, impl=impl)
        upstream = torch.linspace(-1, 1, out.numel()).view(out.shape).to(out.dtype)
        return out.detach(), torch.autograd.grad(out, leaf, upstream)[0]

    for name, a, s, e in zip(("values", "gradient"), both(values, None), both(values, "reference"), both(values.double(), "reference"), strict=True):
        assert_right(name, a, s, e)


@pytest.mark.parametrize("terminal", ["exclude", "include"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("form", ["weights", "additive"])
def test_segment_credit(form, masked, terminal, launches):
    segments, mask = case(1)
    scores, advantages = torch.randn(segments.num_segments), torch.randn(segments.num_sequences)
    settings = dict(form=form, mask=mask if masked else None, terminal=terminal, reliability=torch.rand(segments.num_sequences))
    actual = segment_credit(scores, segments, advantages, **settings)
    single = segment_credit(scores, segments, advantages, **settings, impl="reference")
    exact = segment_credit(scores.double(), segments, advantages.double(), **settings, impl="reference")
    for name, a, s, e in zip(actual._fields, actual, single, exact, strict=True):
        assert_right(name, a, s, e)


RATIOS = ("token", "segment", "sequence")
KINDS = ("none", "number", "0-d", "[B]", "[N]")
OPTIONAL = ("old_logp", "entropy", "ref_logp", "rollout_logp")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ratio", RATIOS)
def test_every_setting_of_the_loss(ratio, kind, launches):
    segments, mask = case(2, SHORT, None)
    n = segments.num_tokens
    logp = -torch.rand(n) * 3
    values = {name: logp + 0.3 * torch.randn(n) for name in OPTIONAL} | {"entropy": torch.rand(n)}
    shape = {"0-d": (), "[B]": (segments.num_sequences,), "[N]": (n,)}
    denominator = {"none": None, "number": 7.5}[kind] if kind not in shape else torch.rand(shape[kind]) * 5 + 1
    subsets = ((), OPTIONAL, ("old_logp", "ref_logp"), ("entropy", "rollout_logp"), ("old_logp", "entropy"))
    for number in (KINDS.index(kind), KINDS.index(kind) + RATIOS.index(ratio) + 1)[: 1 if INTERPRETED else 2]:
        present = subsets[number % len(subsets)]
        given = {name: values[name] for name in present}
        settings = dict(mask=mask if number % 2 else None, ratio=ratio, kl_weight=0.2 if "ref_logp" in present else 0.0)

        def run(dtype, impl, given=given, settings=settings, number=number):
            cast = {name: x.to(dtype) for name, x in given.items()}
            leaf = logp.to(dtype).requires_grad_()
            entropy = cast["entropy"].requires_grad_() if "entropy" in cast else None
            weight = None if entropy is None else 0.1 if number % 2 else torch.linspace(0, 0.2, n).to(dtype)
            loss, metrics = policy_loss(
                leaf, cast.pop("old_logp", None), torch.linspace(-1, 1, n).to(dtype), segments, **cast, **settings, entropy_weight=weight,
                denominator=denominator, impl=impl,
            )  # fmt: skip
            grads = torch.autograd.grad(loss, [leaf] if entropy is None else [leaf, entropy])
            return {"loss": loss.detach(), **{f"gradient {i}": g for i, g in enumerate(grads)}, **metrics}

        actual, single, exact = run(torch.float32, None), run(torch.float32, "reference"), run(torch.float64, "reference")
        for name in exact:
            assert_right(f"{present} {name}", actual[name], single[name], exact[name])


@pytest.mark.parametrize("ratio", ["segment", "sequence"])
def test_a_sequence_alone_has_the_gradient_of_the_batch(ratio, monkeypatch):
    """Where it lies among the chunks of a batch changes no bit, nor does how many launches the batch takes."""
    segments, mask = case(3, SHORT, None)
    n = segments.num_tokens
    logp, old, advantages = -torch.rand(n), -torch.rand(n), torch.randn(n)
    offsets = segments.cu_seqlens.tolist()

    def gradient(segments, here):
        leaf = logp[here].clone().requires_grad_()
        loss = policy_loss(leaf, old[here], advantages[here], segments, mask=mask[here], ratio=ratio, denominator=3.0).loss
        return torch.autograd.grad(loss, leaf)[0]

    whole = gradient(segments, slice(None))
    if INTERPRETED or whole.is_cuda:
        monkeypatch.setattr(importlib.import_module("acpo_kernels._triton.policy_loss"), "REDUNDANT", -1)
    for b, lengths in enumerate(SHORT):
        here = slice(offsets[b], offsets[b + 1])
        assert torch.equal(gradient(segments_of([lengths], device=torch.get_default_device()), here), whole[here])
