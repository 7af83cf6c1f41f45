"""Arguments that nobody should pass: every public function of acpo_kernels gives what its contract says, or a ValueError or TypeError that names
the argument. Valid arguments are drawn, one or two of them spoiled; what comes back is compared with the reference, NaN for NaN.

`make fuzz` draws thousands: ACPO_EXAMPLES examples a function, other ones each time.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import Phase, event, given, settings
from hypothesis import strategies as st

import acpo_kernels as kernels
from acpo_kernels import Segmenter, Segments, pack, unpack

EXAMPLES = int(os.environ.get("ACPO_EXAMPLES", "0"))
PHASES = (Phase.explicit, Phase.generate, Phase.shrink)  # explaining traces every line
many = settings(max_examples=EXAMPLES, derandomize=False, phases=PHASES) if EXAMPLES else settings(max_examples=12, phases=PHASES)
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
OTHERS = (torch.int32, torch.int64, torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn, *FLOATS)
SPECIAL = (float("nan"), float("inf"), -float("inf"), 1e38, -1e38, 1e-40, 0.0, -200.0, 6e4)
NUMBERS = (float("nan"), float("inf"), -1.0, 0.0, -0.0, 1e300, 1e-300, 1e-320, 10**400, -(10**400), True, 2, 1.0, 20.0)
OBJECTS = (None, "x", 3, 2.5, [1.0], (), object(), np.zeros(3, np.float32), torch.Size([2]), {})
IDS = (-1, -2, -100, -(2**63), 2**62, 2**31, 2**31 - 1, 0)


def spoiled_tensor(draw, x: torch.Tensor) -> Any:
    """Another layout or dtype or shape or other values of a tensor, or no tensor at all."""
    how = draw(st.sampled_from(["stride", "expand", "negated", "grad", "values", "dtype", "shape", "empty", "device", "sparse", "object"]))
    event(how)
    if how == "object":
        return draw(st.sampled_from(OBJECTS))
    if how == "dtype":
        return x.to(draw(st.sampled_from(OTHERS)))
    if how == "device":
        return x.to("meta")
    if how == "sparse":
        return x.to_sparse()
    if how == "grad":
        return x.detach().clone().requires_grad_() if x.is_floating_point() else x
    if how == "negated" and x.is_floating_point():
        return torch._neg_view(x)
    if how == "stride" and x.ndim:
        return x.repeat_interleave(2, -1)[..., ::2] if draw(st.booleans()) else x.mT.contiguous().mT if x.ndim > 1 else x.repeat_interleave(3)[::3]
    if how == "expand" and x.numel():
        return x.flatten()[0].expand(x.shape)
    if how == "shape":
        return draw(st.sampled_from([lambda: x.unsqueeze(0), lambda: x.flatten()[:-1], lambda: x[:-1] if x.ndim else x, lambda: x.new_zeros(())]))()
    if how == "empty":
        return x.new_zeros((*x.shape[:-1], 0)) if x.ndim and draw(st.booleans()) else x[:0] if x.ndim else x
    x = x.clone()
    if x.numel():
        choices = SPECIAL if x.is_floating_point() else IDS if x.dtype == torch.int64 else (0, 1)
        for _ in range(draw(st.integers(1, 3))):
            x.view(-1)[draw(st.integers(0, x.numel() - 1))] = draw(st.sampled_from(choices))
    return x


def spoiled(draw, value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return spoiled_tensor(draw, value)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return draw(st.sampled_from(NUMBERS + OBJECTS))
    if isinstance(value, tuple):
        return draw(st.sampled_from([(0.2,), (0.2, float("nan")), (1.5, 0.2), ("a", "b"), (10**400, 0.2), None, 0.2, [0.1, 0.2], (-0.1, 0.2)]))
    return draw(st.sampled_from(OBJECTS + NUMBERS))


def segments_of(draw) -> Segments:
    lengths = draw(st.lists(st.integers(0, 5), max_size=6))
    parts = draw(st.lists(st.integers(0, len(lengths)), max_size=3).map(sorted))
    kind = draw(st.sampled_from([torch.int64, torch.int32]))
    terminal = torch.tensor([draw(st.booleans()) for _ in range(len(parts) + 1)]) if draw(st.booleans()) else None
    return Segments(torch.tensor([0, *np.cumsum(lengths)]).to(kind), torch.tensor([0, *parts, len(lengths)]).to(kind), terminal=terminal)


def normal(draw, *shape: int, dtype=None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    return torch.randn(shape, generator=generator).to(dtype or draw(st.sampled_from(FLOATS)))


def maybe(draw, make: Callable) -> Any:
    return make() if draw(st.booleans()) else None


def ids_of(draw, *shape: int, vocab: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    return torch.randint(vocab, shape, generator=generator).to(draw(st.sampled_from([torch.int64, torch.int32])))


def mask_of(draw, *shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 99)))) < 0.7


def rows(draw) -> dict[str, Any]:
    shape, vocab = draw(st.sampled_from([(4,), (2, 3), (), (0,), (1, 1, 2)])), draw(st.sampled_from([1, 2, 17, 65, 300]))
    temperature = draw(st.sampled_from([1.0, 0.7, normal(draw, *shape, dtype=torch.float32).abs() + 0.1]))
    return {"logits": normal(draw, *shape, vocab), "ids": ids_of(draw, *shape, vocab=vocab), "temperature": temperature,
            "mask": maybe(draw, lambda: mask_of(draw, *shape))}  # fmt: skip


def head(draw, n: int | None = None) -> dict[str, Any]:
    n, vocab, width = draw(st.integers(0, 5)) if n is None else n, draw(st.sampled_from([1, 3, 40, 130])), draw(st.sampled_from([1, 2, 33]))
    dtype = draw(st.sampled_from(FLOATS))
    return {"hidden": normal(draw, n, width, dtype=dtype), "weight": normal(draw, vocab, width, dtype=dtype), "ids": ids_of(draw, n, vocab=vocab),
            "bias": maybe(draw, lambda: normal(draw, vocab)),
            "temperature": draw(st.sampled_from([1.0, normal(draw, n, dtype=torch.float32).abs() + 0.1])),
            "softcap": draw(st.sampled_from([None, 20.0])), "mask": maybe(draw, lambda: mask_of(draw, n))}  # fmt: skip


def loss(draw, n: int) -> dict[str, Any]:
    dtype = draw(st.sampled_from(FLOATS))
    ref = maybe(draw, lambda: normal(draw, n, dtype=dtype))
    return {"old_logp": maybe(draw, lambda: normal(draw, n, dtype=dtype)), "advantages": normal(draw, n, dtype=dtype), "clip": (0.2, 0.28),
            "ratio": draw(st.sampled_from(["token", "segment", "sequence"])), "ref_logp": ref, "kl_weight": 0.0 if ref is None else 0.01,
            "rollout_logp": maybe(draw, lambda: normal(draw, n, dtype=dtype)), "rollout_cap": 2.0, "denominator": draw(st.sampled_from([None, 7.0])),
            "mask": maybe(draw, lambda: mask_of(draw, n))}  # fmt: skip


def of_hindsight(draw) -> dict[str, Any]:
    given = rows(draw)
    return {**given, "hindsight_logits": normal(draw, *given["logits"].shape, dtype=given["logits"].dtype)}


def of_linear_hindsight(draw) -> dict[str, Any]:
    given = head(draw)
    return {**given, "hindsight_hidden": normal(draw, *given["hidden"].shape, dtype=given["hidden"].dtype)}


def of_reduce(draw) -> dict[str, Any]:
    segments = segments_of(draw)
    shape = draw(st.sampled_from([(), (2,), (0,)]))
    return {"values": normal(draw, *shape, segments.num_tokens), "segments": segments, "reduce": draw(st.sampled_from(["sum", "mean", "max"])),
            "level": draw(st.sampled_from(["segment", "sequence"])), "mask": maybe(draw, lambda: mask_of(draw, segments.num_tokens))}  # fmt: skip


def of_credit(draw) -> dict[str, Any]:
    segments = segments_of(draw)
    return {"scores": normal(draw, segments.num_segments), "segments": segments, "advantages": normal(draw, segments.num_sequences),
            "mask": maybe(draw, lambda: mask_of(draw, segments.num_tokens)), "form": draw(st.sampled_from(["weights", "additive"])),
            "bound": 0.5, "gain": 0.5, "reliability": draw(st.sampled_from([1.0, torch.tensor(0.5)])),
            "terminal": draw(st.sampled_from(["exclude", "include"])), "scale": draw(st.sampled_from([None, 2.0, torch.tensor(1.5)]))}  # fmt: skip


def of_loss(draw) -> dict[str, Any]:
    segments = segments_of(draw)
    n = segments.num_tokens
    entropy = maybe(draw, lambda: normal(draw, n))
    return {"logp": normal(draw, n), "segments": segments, "entropy": entropy, "entropy_weight": None if entropy is None else 1e-3, **loss(draw, n)}


def of_linear_loss(draw) -> dict[str, Any]:
    segments = segments_of(draw)
    n = segments.num_tokens
    return {**loss(draw, n), **head(draw, n), "segments": segments, "entropy_weight": draw(st.sampled_from([None, 1e-3]))}


FUNCTIONS = {
    "logprob_entropy": rows, "hindsight_information": of_hindsight, "linear_logprob_entropy": head,
    "linear_hindsight_information": of_linear_hindsight,
    "segment_reduce": of_reduce, "segment_credit": of_credit, "policy_loss": of_loss, "linear_policy_loss": of_linear_loss,
}  # fmt: skip
DIFFERENTIABLE = {
    "logprob_entropy": ("logits",), "linear_logprob_entropy": ("hidden", "weight", "bias"), "segment_reduce": ("values",),
    "policy_loss": ("logp", "entropy"), "linear_policy_loss": ("hidden", "weight", "bias"),
}  # fmt: skip


def outputs(function: Callable, given: dict[str, Any], grads: tuple[str, ...], **more) -> list[torch.Tensor]:
    """Results and, of what is asked for, the gradients of their sum."""
    inputs = {k: v.detach().clone().requires_grad_() if k in grads and isinstance(v, torch.Tensor) and v.is_floating_point() else v
              for k, v in given.items()}  # fmt: skip
    found = function(**inputs, **more)
    if isinstance(found, torch.Tensor):
        found = (found,)
    flat = [x for part in found for x in (part.values() if isinstance(part, dict) else (part,))]
    differentiable = [x for x in flat if x.requires_grad]
    if differentiable and all(x.numel() for x in differentiable):
        sum(x.double().sum() for x in differentiable).backward()
        flat += [inputs[k].grad for k in grads if isinstance(inputs.get(k), torch.Tensor) and inputs[k].is_leaf and inputs[k].grad is not None]
    return [x.detach() for x in flat]


def names_one(error: Exception, names: list[str]) -> bool:
    said = str(error)
    return any(name in said for name in names) or ("segments" in names and "offsets" in said)


@pytest.mark.parametrize("name", FUNCTIONS)
@many
@given(st.data())
def test_the_contract_or_an_error_that_names_the_argument(name, data):
    draw, function = data.draw, getattr(kernels, name)
    given_ = FUNCTIONS[name](draw)
    changed = draw(st.lists(st.sampled_from(sorted(given_)), max_size=2, unique=True))
    for key in changed:
        given_[key] = spoiled(draw, given_[key])
    grads = DIFFERENTIABLE.get(name, ()) if draw(st.booleans()) else ()
    if any(isinstance(v, torch.Tensor) and (v.device.type == "meta" or v.is_sparse) for v in given_.values()):
        grads = ()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = outputs(function, given_, grads)
        except (ValueError, TypeError) as error:
            assert changed, f"{name} refused what is valid: {error}"
            assert names_one(error, [*changed, *(k for k in given_ if k in str(error))]), f"{name}, {changed} spoiled: {error}"
            event("refused")
            return
        if any(x.device.type == "meta" for x in found):
            return
        wanted = outputs(function, given_, grads, impl="reference")
    assert len(found) == len(wanted)
    infinite, unknown = (any(isinstance(v, torch.Tensor) and bool(of(v).any()) for v in given_.values()) for of in (torch.isinf, torch.isnan))
    for i, (one, other) in enumerate(zip(found, wanted, strict=True)):
        assert one.shape == other.shape and one.dtype == other.dtype, (name, changed)
        differs = one.isnan() != other.isnan()
        if name.endswith("policy_loss") and (infinite or (unknown and i > 0)):
            # The formula as written has exp(logp - logp) in every ratio, NaN for an infinite logp, and spreads it over a segment's mean; the kernels
            # know that this is 1. A logp that is NaN makes the loss NaN for all that.
            differs &= one.isnan()
        if any(isinstance(v, float) and not 1e-37 < v < 1e38 and v for v in given_.values()):  # for float32, the reference's, 0 or infinity
            differs &= one.isnan()
        assert not differs.any(), (name, changed, one, other)
    event("agreed")


@pytest.mark.parametrize("vocab", [1, 17, 300, 5000])
@pytest.mark.parametrize("name", ["logprob_entropy", "hindsight_information", "linear_logprob_entropy", "linear_hindsight_information"])
def test_an_infinite_temperature_is_a_uniform_policy(name, vocab):
    """Of a number it is refused; of a tensor nothing looks at the values beforehand."""
    torch.manual_seed(0)
    temperature, ids = torch.tensor([float("inf"), 1.0]), torch.randint(vocab, (2,))
    streams = torch.randn(2, 2, 3) if "linear" in name else torch.randn(2, 2, vocab)
    rest = (torch.randn(vocab, 3), ids) if "linear" in name else (ids,)
    found = getattr(kernels, name)(*(streams if "hindsight" in name else streams[:1]), *rest, temperature=temperature)._asdict()
    for key, value in found.items():
        wanted = {"logp": -np.log(vocab), "hindsight_logp": -np.log(vocab), "entropy": np.log(vocab)}.get(key, 0.0)
        assert float(value[0]) == pytest.approx(wanted, abs=1e-6) and value.isfinite().all(), key
    with pytest.raises(ValueError, match="temperature"):
        getattr(kernels, name)(*(streams if "hindsight" in name else streams[:1]), *rest, temperature=float("inf"))


@many
@given(st.data())
def test_offsets_that_lie(data):
    """Offsets out of order, negative, past the end, of 32 and 64 bits, before a Segments object is made and written into it afterwards."""
    draw = data.draw
    segments = segments_of(draw)
    kind = draw(st.sampled_from([torch.int64, torch.int32]))
    numbers = st.lists(
        st.sampled_from([0, 1, 2, 5, -1, 2**31 - 1, -(2**31)] + ([2**62, -(2**63), 2**63 - 1] if kind == torch.int64 else [])), max_size=5
    )
    tokens, sequences = (torch.tensor(draw(numbers), dtype=kind) for _ in range(2))
    try:
        made = Segments(tokens, sequences, num_tokens=draw(st.sampled_from([None, 0, 3, -1, 2**40])))
        assert made.num_tokens >= 0 and (made.lengths >= 0).all() and made.segment_sequence_ids().shape == (made.num_segments,)
    except (ValueError, TypeError) as error:
        assert "offsets" in str(error) or "num_tokens" in str(error)
    n = segments.num_tokens
    which = draw(st.sampled_from([segments.token_offsets, segments.sequence_offsets]))
    before = which.clone()
    which[draw(st.integers(0, len(which) - 1))] = draw(st.sampled_from([-1, 2**40, 2**62, -(2**63), n + segments.num_segments + 1]))
    calls = (
        lambda: kernels.segment_reduce(torch.zeros(n), segments), lambda: kernels.segment_reduce(torch.zeros(n), segments, level="sequence"),
        lambda: kernels.segment_credit(torch.zeros(segments.num_segments), segments, torch.zeros(segments.num_sequences)),
        lambda: kernels.policy_loss(torch.zeros(n), None, torch.zeros(n), segments, ratio="segment"),
    )  # fmt: skip
    for call in calls:
        if torch.equal(which, before):
            call()
        else:
            with pytest.raises(ValueError, match="offsets must start at 0, not decrease, and end at"):
                call()


@many
@given(st.data())
def test_padded_batches(data):
    draw = data.draw
    b, t = draw(st.integers(0, 3)), draw(st.integers(0, 4))
    mask = mask_of(draw, b, t)
    given_ = {"mask": mask, "boundaries": maybe(draw, lambda: mask_of(draw, b, t)), "terminal": maybe(draw, lambda: mask_of(draw, b)),
              "values": normal(draw, b, t, dtype=torch.float32)}  # fmt: skip
    changed = draw(st.lists(st.sampled_from(sorted(given_)), max_size=1))
    for key in changed:
        given_[key] = spoiled(draw, given_[key])
    try:
        if any(isinstance(v, torch.Tensor) and v.device.type == "meta" for v in given_.values()) and draw(st.booleans()):
            return
        found = Segments.from_padded(given_["mask"], given_["boundaries"], terminal=given_["terminal"])
        packed = pack(given_["values"], given_["mask"])
        back = unpack(packed, given_["mask"], fill=7)
        assert found.num_tokens == int(given_["mask"].sum()) == packed.shape[0]
        assert torch.equal(back[~given_["mask"]], torch.full_like(back[~given_["mask"]], 7))
    except (ValueError, TypeError) as error:
        assert changed and names_one(error, list(given_)), error


def test_a_mask_without_values_is_refused():
    with pytest.raises(ValueError, match="mask must hold values, for the number of tokens is read from it, got a meta tensor"):
        Segments.from_padded(torch.ones(2, 3, dtype=torch.bool, device="meta"))


@pytest.mark.parametrize("dtype", OTHERS, ids=str)
def test_values_of_any_dtype_are_packed_and_unpacked(dtype):
    mask = torch.tensor([[True, False], [True, True]])
    values = torch.arange(4).view(2, 2).to(dtype)
    back = unpack(pack(values, mask), mask, fill=1)
    assert back.dtype == dtype and back.to(torch.complex128).tolist() == torch.where(mask, values.to(torch.complex128), 1).tolist()


SEGMENTER = None


def segmenter() -> Segmenter:
    global SEGMENTER
    SEGMENTER = SEGMENTER or Segmenter([b"Wait", b" so", b"\n\n", b".", b" 2", b"", b"\xff\xfe", b" The answer is"], vocab_size=12)
    return SEGMENTER


@many
@given(st.data())
def test_the_segmenter(data):
    draw = data.draw
    lengths = draw(st.lists(st.integers(0, 30), min_size=1, max_size=4))
    n = sum(lengths)
    given_ = {"ids": ids_of(draw, n, vocab=12), "cu_seqlens": torch.tensor([0, *np.cumsum(lengths)]), "entropy": maybe(draw, lambda: normal(draw, n)),
              "entropy_threshold": None, "answer_start": maybe(draw, lambda: torch.full((len(lengths),), -1)),
              "scores": maybe(draw, lambda: normal(draw, n, dtype=torch.float32).abs())}  # fmt: skip
    changed = draw(st.lists(st.sampled_from(sorted(given_)), max_size=2, unique=True))
    for key in changed:
        given_[key] = spoiled(draw, given_[key])
    ids, cu_seqlens = given_.pop("ids"), given_.pop("cu_seqlens")
    try:
        if any(isinstance(v, torch.Tensor) and v.device.type == "meta" for v in (ids, cu_seqlens, *given_.values())):
            return
        found = segmenter()(ids, cu_seqlens, **given_)
        assert found.num_tokens == ids.shape[0] and found.num_sequences == cu_seqlens.shape[0] - 1
        assert len(segmenter().explain(ids, cu_seqlens, **given_)) == found.num_segments
        assert segmenter().read(ids, cu_seqlens).scores.shape == ids.shape
    except (ValueError, TypeError) as error:
        assert changed and names_one(error, ["ids", "cu_seqlens", *given_]), (changed, error)


@many
@given(st.data())
def test_the_segmenters_settings(data):
    draw = data.draw
    given_ = {"tokens": [b"a", b".\n", b""], "vocab_size": 5, "min_tokens": 2, "max_tokens": 8, "max_segments": 3, "target_tokens": 4, "threads": 1,
              "markers": ("Wait",), "aloud": ("Hmm",), "boundary_scores": {"line": 1.0}}  # fmt: skip
    changed = draw(st.lists(st.sampled_from(sorted(given_)), min_size=1, max_size=2, unique=True))
    for key in changed:
        texts = ["Wait", [""], [b"x"], None, [3], ("\ud800",), ["y" * 400]]
        strange = {
            "markers": texts,
            "aloud": texts,
            "tokens": [["a"], "abc", None, 3, [b"a", None], [], [b"x" * 70_000]],
            "boundary_scores": [{"line": float("nan")}, {"nothing": 1}, {"line": -1}, {"line": 1e9}, {"line": "1"}, [1], 3],
        }
        given_[key] = draw(st.sampled_from(strange.get(key, [0, -1, 2**30, 2**70, 1.5, True, "8", None, float("nan")])))
    try:
        made = Segmenter(**given_)
        ids = torch.zeros(9, dtype=torch.int64)
        if made.vocab_size:
            assert made(ids, torch.tensor([0, 9])).num_tokens == 9
    except (ValueError, TypeError) as error:
        assert names_one(error, [*changed, "vocab_size", "min_tokens"]), (changed, error)


def test_sixteen_threads_at_once_give_the_bits_of_one():
    """Every operation with its gradients, each thread in another order, beside torch's own use of the same pool."""
    segments = Segments(torch.arange(0, 40_001, 50), torch.arange(0, 801, 8))
    n = segments.num_tokens
    torch.manual_seed(0)
    logits, ids, hidden, weight = torch.randn(40, 3000), torch.randint(3000, (40,)), torch.randn(40, 24), torch.randn(3000, 24)
    few = Segments(torch.arange(0, 41, 4), torch.tensor([0, 5, 10]))
    values, scores, advantages = torch.randn(n), torch.randn(800), torch.randn(100)
    cases = [
        ("logprob_entropy", {"logits": logits, "ids": ids}),
        ("hindsight_information", {"logits": logits, "hindsight_logits": logits + 1, "ids": ids}),
        ("linear_logprob_entropy", {"hidden": hidden, "weight": weight, "ids": ids}),
        ("linear_hindsight_information", {"hidden": hidden, "hindsight_hidden": hidden * 0.9, "weight": weight, "ids": ids}),
        ("segment_reduce", {"values": values, "segments": segments, "reduce": "max"}),
        ("segment_credit", {"scores": scores, "segments": segments, "advantages": advantages}),
        ("policy_loss", {"logp": values, "old_logp": values * 0.9, "advantages": values.flip(0), "segments": segments, "ratio": "segment"}),
        ("linear_policy_loss", {"hidden": hidden, "weight": weight, "ids": ids, "old_logp": None, "advantages": values[:40], "segments": few}),
    ]  # fmt: skip
    text = torch.randint(12, (5000,))
    cu = torch.tensor([0, 2000, 5000])

    def run(k: int) -> list[torch.Tensor]:
        if k == len(cases):
            return [segmenter()(text, cu).token_offsets]
        name, given_ = cases[k]
        return outputs(getattr(kernels, name), given_, DIFFERENTIABLE.get(name, ()))

    alone = [run(k) for k in range(len(cases) + 1)]
    wrong: list[Any] = []

    def work(first: int) -> None:
        try:
            for i in range(len(alone)):
                k = (first + i) % len(alone)
                if not all(torch.equal(a, b) for a, b in zip(run(k), alone[k], strict=True)):
                    wrong.append(k)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_fork_after_use_gives_the_same_bits():
    """The child has neither the pool's threads nor OpenMP's: it starts its own."""
    logits, ids = torch.randn(64, 4000), torch.randint(4000, (64,))
    segments = Segments(torch.arange(0, 200_001, 50), torch.arange(0, 4001, 8))
    values = torch.randn(segments.num_tokens)
    wanted = kernels.logprob_entropy(logits, ids).logp, kernels.segment_reduce(values, segments)
    pid = os.fork()
    if pid == 0:
        os._exit(0 if all(map(torch.equal, (kernels.logprob_entropy(logits, ids).logp, kernels.segment_reduce(values, segments)), wanted)) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
