"""policy_loss: clipped surrogate, KL to a reference, entropy bonus."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ragged import LENGTHS, assert_right, hierarchies, segments_of, sequences, tokens

from acpo_kernels import Segments, policy_loss, segment_credit, segment_reduce

RATIOS = ("token", "segment", "sequence")
IMPLS = (None, "reference")
PER_TOKEN = ("old_logp", "entropy", "ref_logp", "rollout_logp")


def plain(logp, old_logp, advantages, segments, *, mask=None, clip=(0.2, 0.28), ratio="token", entropy=None, entropy_weight=None,
          ref_logp=None, kl_weight=0.0, rollout_logp=None, rollout_cap=2.0, denominator=None):  # fmt: skip
    """The docstring's formula token by token in Python floats: (loss, gradient of logp, gradient of entropy, ratios)."""
    n = segments.num_tokens
    kept = [True] * n if mask is None else mask.tolist()
    groups = [list(tokens(segments, s)) for s in range(segments.num_segments)]
    of_sequence = {t: b for b, of in sequences(segments) for s in of for t in groups[s]}
    group_of = {t: [t] for t in range(n)}
    if ratio == "segment":
        group_of = {t: group for group in groups for t in group}
    elif ratio == "sequence":
        group_of = {t: [u for s in of for u in groups[s]] for _, of in sequences(segments) for s in of for t in groups[s]}
    logp, advantages = logp.tolist(), advantages.tolist()
    old, entropy, ref, rollout = (None if x is None else x.tolist() for x in (old_logp, entropy, ref_logp, rollout_logp))
    old = logp if old is None else old
    loss, grad, grad_entropy, ratios = 0.0, [0.0] * n, [0.0] * n, {}

    def limited(x):
        return max(-20.0, min(20.0, x))

    for t in range(n):
        if not kept[t]:
            continue
        mine = [u for u in group_of[t] if kept[u]]
        r = math.exp(sum(limited(logp[u] - old[u]) for u in mine) / len(mine))
        low, high = (c / math.sqrt(len(mine)) if ratio == "segment" else c for c in clip)
        a, c = advantages[t], 1.0 if rollout is None else min(math.exp(limited(old[t] - rollout[t])), rollout_cap)
        clipped = max(1 - low, min(1 + high, r)) * a
        ratios[t] = (r, low, high, a)
        l_t, g_t, e_t = -c * min(r * a, clipped), -c * r * a if r * a <= clipped else 0.0, 0.0
        if ref is not None:
            rho, d = math.exp(limited(logp[t] - old[t])), limited(ref[t] - logp[t])
            k3 = math.exp(d) - d - 1
            l_t += kl_weight * rho * k3
            g_t += kl_weight * rho * (k3 - (math.expm1(d) if abs(ref[t] - logp[t]) <= 20 else 0.0))
        if entropy is not None and entropy_weight is not None:
            e_t = -(float(entropy_weight[t]) if isinstance(entropy_weight, torch.Tensor) else entropy_weight)
            l_t += e_t * entropy[t]
        if denominator is None:
            over = sum(kept)
        elif isinstance(denominator, torch.Tensor):
            over = float(denominator if denominator.ndim == 0 else denominator[t if denominator.shape[0] == n else of_sequence[t]])
        else:
            over = denominator
        loss, grad[t], grad_entropy[t] = loss + l_t / over, g_t / over, e_t / over
    return loss, grad, grad_entropy, ratios


def inputs(segments, dtype=torch.float64, device="cpu", drift=0.3):
    n = segments.num_tokens
    logp = -torch.rand(n, device=device) * 3
    values = dict(
        logp=logp,
        old_logp=logp + drift * torch.randn(n, device=device),
        advantages=torch.randn(n, device=device),
        entropy=torch.rand(n, device=device) * 2,
        ref_logp=logp + torch.randn(n, device=device),
        rollout_logp=logp + drift * torch.randn(n, device=device),
        entropy_weight=torch.rand(n, device=device) * 0.1,
    )
    return {name: x.to(dtype) for name, x in values.items()}


def forward_backward(values, segments, impl, upstream=1.0, **settings):
    """Loss, gradients of logp and of entropy, metrics."""
    values = dict(values)
    leaves = {name: values[name].clone().requires_grad_() for name in ("logp", "entropy") if values.get(name) is not None}
    values |= leaves
    loss, metrics = policy_loss(values.pop("logp"), values.pop("old_logp"), values.pop("advantages"), segments, **values, **settings, impl=impl)
    grads = torch.autograd.grad(loss * upstream, list(leaves.values()), allow_unused=True)
    return loss.detach(), dict(zip(leaves, grads, strict=True)), metrics


# 1. Oracle


@pytest.mark.parametrize("impl", IMPLS)
def test_token_level_by_hand(impl, device):
    # Ratios 2, 1/2, 2, 1/2, 1 against clip (0.2, 0.28): -min(rA, clip(r)A) is -1.28 (clipped), -0.5, 2, 0.8 (clipped), -3.
    segments = segments_of([[2], [3]], device=device)
    log_ratio = torch.tensor([2.0, 0.5, 2.0, 0.5, 1.0], dtype=torch.float64, device=device).log()
    old = torch.full_like(log_ratio, -1.5)
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0, 3.0], dtype=torch.float64, device=device)
    loss, grads, metrics = forward_backward(dict(logp=old + log_ratio, old_logp=old, advantages=advantages), segments, impl)
    assert float(loss) == pytest.approx((-1.28 - 0.5 + 2.0 + 0.8 - 3.0) / 5, rel=1e-14)
    torch.testing.assert_close(grads["logp"] * 5, torch.tensor([0.0, -0.5, 2.0, 0.0, -3.0], dtype=torch.float64, device=device), rtol=1e-14, atol=0)
    expected = {
        "tokens": 5, "clip_ratio/low_mean": 1 / 5, "clip_ratio/high_mean": 1 / 5, "ratio/mean": 6 / 5, "ratio/min": 0.5, "ratio/max": 2.0,
        "ratio/ess": 36 / (5 * 9.5), "kl/old": (2 * (0.5 - 1 + math.log(2)) + 2 * (2 - 1 - math.log(2))) / 5, "kl/ref": 0.0, "entropy": 0.0,
    }  # fmt: skip
    assert set(metrics) == set(expected)
    for name, value in expected.items():
        assert float(metrics[name]) == pytest.approx(value, rel=1e-14), name


@pytest.mark.parametrize("impl", IMPLS)
def test_segment_level_by_hand(impl):
    # Segment 0: log-ratios 0.1 and 0.3, s = e^0.2 past 1 + 0.2/sqrt(2), so a positive advantage is clipped. Segment 1: s = e^-0.1.
    segments = segments_of([[2, 1]])
    old = torch.zeros(3, dtype=torch.float64) - 1.0
    logp = old + torch.tensor([0.1, 0.3, -0.1], dtype=torch.float64)
    advantages = torch.tensor([1.0, -2.0, 4.0], dtype=torch.float64)
    values = dict(logp=logp, old_logp=old, advantages=advantages)
    loss, grads, _ = forward_backward(values, segments, impl, ratio="segment", clip=(0.2, 0.2), denominator=1.0)
    clipped = 1 + 0.2 / math.sqrt(2)
    assert float(loss) == pytest.approx(-clipped + 2 * math.exp(0.2) - 4 * math.exp(-0.1), rel=1e-14)
    wanted = torch.tensor([0.0, 2 * math.exp(0.2), -4 * math.exp(-0.1)], dtype=torch.float64)
    torch.testing.assert_close(grads["logp"], wanted, rtol=1e-14, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
def test_the_other_terms_by_hand(impl):
    segments = segments_of([[2]])
    logp = torch.tensor([-1.0, -2.0], dtype=torch.float64)
    values = dict(
        logp=logp, old_logp=None, advantages=torch.tensor([1.0, -1.0], dtype=torch.float64), entropy=torch.tensor([0.5, 0.25], dtype=torch.float64),
        entropy_weight=torch.tensor([0.2, 0.0], dtype=torch.float64), ref_logp=logp + torch.tensor([0.5, 0.0], dtype=torch.float64),
        rollout_logp=logp - torch.tensor([5.0, math.log(1.5)], dtype=torch.float64),
    )  # fmt: skip
    loss, grads, metrics = forward_backward(values, segments, impl, kl_weight=0.1, denominator=1.0)
    k3 = math.exp(0.5) - 0.5 - 1
    assert float(loss) == pytest.approx(-2.0 + 1.5 + 0.1 * k3 - 0.2 * 0.5, rel=1e-14)  # weights min(e^5, 2) and 1.5
    torch.testing.assert_close(grads["entropy"], torch.tensor([-0.2, 0.0], dtype=torch.float64), rtol=1e-14, atol=0)
    # k3 with the importance ratio: on-policy its gradient is k3 - (e^d - 1) = logp - ref_logp exactly, the gradient of the KL itself
    torch.testing.assert_close(grads["logp"], torch.tensor([-2.0 - 0.1 * 0.5, 1.5], dtype=torch.float64), rtol=1e-14, atol=0)
    assert float(metrics["kl/ref"]) == pytest.approx(k3 / 2, rel=1e-14)
    assert float(metrics["entropy"]) == pytest.approx(0.375, rel=1e-14)


DENOMINATORS = ("none", "float", "0-d", "[B]", "[N]")


def denominator_of(kind, segments):
    sizes = {"0-d": (), "[B]": (segments.num_sequences,), "[N]": (segments.num_tokens,)}
    return {"none": None, "float": 7.5}[kind] if kind in ("none", "float") else torch.rand(sizes[kind], dtype=torch.float64) * 5 + 1


@given(
    hierarchies(), st.sampled_from(RATIOS), st.sampled_from(DENOMINATORS), st.sets(st.sampled_from(PER_TOKEN)),
    st.sampled_from([(0.2, 0.28), (0.0, 0.0), (1.0, 3.0)]), st.sampled_from([0.1, 2.0, 40.0]), st.booleans(),
)  # fmt: skip
def test_the_definition_token_by_token(case, ratio, kind, present, clip, drift, masked):
    """Loss, gradients and metrics of both implementations: the closed-form gradient, autograd of the reference, and the formula."""
    segments, mask = case
    mask = mask if masked else None
    values = inputs(segments, drift=drift)
    values = {name: x for name, x in values.items() if name not in PER_TOKEN or name in present} | {"old_logp": values["old_logp"]}
    if "old_logp" not in present:
        values["old_logp"] = None
    if "entropy" not in present:
        del values["entropy_weight"]
    settings = dict(mask=mask, clip=clip, ratio=ratio, kl_weight=0.3 if "ref_logp" in present else 0.0, denominator=denominator_of(kind, segments))
    loss, grad, grad_entropy, ratios = plain(**values, segments=segments, **settings)
    for impl in IMPLS:
        actual, grads, metrics = forward_backward(values, segments, impl, **settings)
        assert float(actual) == pytest.approx(loss, rel=1e-11, abs=1e-11)
        torch.testing.assert_close(grads["logp"], torch.tensor(grad, dtype=torch.float64), rtol=1e-11, atol=1e-11)
        if "entropy" in present:
            torch.testing.assert_close(grads["entropy"], torch.tensor(grad_entropy, dtype=torch.float64), rtol=1e-11, atol=1e-11)
        count = len(ratios)
        assert metrics["tokens"] == count
        if count:
            clipped_low = sum(r < 1 - low and a < 0 for r, low, _, a in ratios.values()) / count
            clipped_high = sum(r > 1 + high and a > 0 for r, _, high, a in ratios.values()) / count
            if clip != (0.0, 0.0):  # there a ratio of exactly 1 lies on both borders, and its last bit decides
                assert float(metrics["clip_ratio/low_mean"]) == pytest.approx(clipped_low)
                assert float(metrics["clip_ratio/high_mean"]) == pytest.approx(clipped_high)
            r = [r for r, *_ in ratios.values()]
            assert float(metrics["ratio/mean"]) == pytest.approx(sum(r) / count)
            assert (float(metrics["ratio/min"]), float(metrics["ratio/max"])) == pytest.approx((min(r), max(r)))
            assert float(metrics["ratio/ess"]) == pytest.approx(sum(r) ** 2 / (count * sum(x * x for x in r)))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("old", [True, False])
def test_gradcheck(impl, old):
    """At token level with a given old_logp, and in the terms of the entropy, the gradient is the derivative of the value.

    (At the other levels, and on-policy, r_t = sg[s] exp(logp - sg[logp]) is a gradient estimator: its value does not move along one token.)
    """
    segments = segments_of([[3, 2], [4]])
    values = inputs(segments)
    logp, entropy = (values.pop(name).requires_grad_() for name in ("logp", "entropy"))
    values["advantages"] = values["advantages"] * (1.0 if old else 0.0)

    def loss(logp, entropy):
        old_logp = values["old_logp"] if old else logp.detach()
        rest = {name: values[name] for name in ("ref_logp", "rollout_logp", "entropy_weight")}
        kl = 0.1 if old else 0.0
        return policy_loss(logp, old_logp, values["advantages"], segments, entropy=entropy, **rest, kl_weight=kl, clip=(0.9, 9.0), impl=impl).loss

    torch.autograd.gradcheck(loss, (logp, entropy))


# 2. Implementation against the oracle


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("old", [True, False])
def test_against_the_reference(ratio, dtype, old, device):
    segments = segments_of([*LENGTHS, (300, 70, 1)], device=device)
    mask = torch.rand(segments.num_tokens, device=device) < 0.8
    # Ratios away from the clip borders: at a border float32 and float64 may rightly differ by the whole gradient.
    values = inputs(segments, dtype, device)
    if not old:
        values["old_logp"] = None
    settings = dict(mask=mask, ratio=ratio, kl_weight=0.2, upstream=0.37, clip=(0.2, 0.28))

    def run(kind, impl):
        return forward_backward({name: None if x is None else x.to(kind) for name, x in values.items()}, segments, impl, **settings)

    actual, exact = run(dtype, None), run(torch.float64, "reference")
    working = exact if dtype == torch.float64 else run(torch.float32, "reference")
    assert actual[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_right("loss", actual[0], working[0], exact[0])
    for name in ("logp", "entropy"):
        assert actual[1][name].dtype == dtype
        assert_right(f"gradient of {name}", actual[1][name], working[1][name], exact[1][name], gradient_dtype=dtype)
    for name, value in exact[2].items():
        assert_right(name, actual[2][name], working[2][name], value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ratio", RATIOS)
def test_every_instruction_set_around_every_block(ratio, dtype, cpu_isa):
    """N around a vector, a block of 256 tokens and a share of 4096."""
    for n in (1, 3, 7, 8, 9, 255, 256, 257, 4095, 4097):
        segments = segments_of([[n // 3, n - n // 3]])
        values = inputs(segments, dtype)
        mask = torch.rand(n) < 0.8
        settings = dict(mask=mask, ratio=ratio, kl_weight=0.2, denominator=float(n))
        actual = forward_backward(values, segments, None, **settings)
        doubles, singles = ({name: x.to(kind) for name, x in values.items()} for kind in (torch.float64, torch.float32))
        exact = forward_backward(doubles, segments, "reference", **settings)
        working = exact if dtype == torch.float64 else forward_backward(singles, segments, "reference", **settings)
        assert_right("loss", actual[0], working[0], exact[0])
        for name in ("logp", "entropy"):
            assert_right(f"gradient of {name}", actual[1][name], working[1][name], exact[1][name], gradient_dtype=dtype)
        for name, value in exact[2].items():
            assert_right(name, actual[2][name], working[2][name], value)


def test_the_divergence_of_nearly_equal_policies_is_not_lost(cpu_isa):
    """k3(x) = exp(x) - 1 - x at x = 1e-9 is 5e-19: the difference of the terms would be 0 or 1e-16."""
    segments = segments_of([[5, 4]])
    x = torch.tensor([1e-9, -1e-9, 1e-6, -1e-6, 1e-3, 0.3, -0.3, 3.0, -3.0], dtype=torch.float64)
    k3 = [sum(v**k / math.factorial(k) for k in range(2, 40)) for v in x.tolist()]
    for at in range(9):
        mask = torch.arange(9) == at
        logp = torch.zeros(9, dtype=torch.float64)
        settings = dict(mask=mask, kl_weight=1.0)
        metrics = forward_backward(dict(logp=logp, old_logp=None, advantages=logp, ref_logp=x), segments, None, **settings)[2]
        assert float(metrics["kl/ref"]) == pytest.approx(k3[at], rel=1e-13)
        metrics = forward_backward(dict(logp=logp, old_logp=x, advantages=logp), segments, None, mask=mask)[2]
        assert float(metrics["kl/old"]) == pytest.approx(k3[at], rel=1e-13)


@pytest.mark.parametrize("ratio", RATIOS)
def test_the_number_of_threads_changes_no_bit(ratio):
    segments = segments_of([[20_000, 3, 0, 9000], [5] * 4000, [8193]])
    values, denominator = inputs(segments, torch.float32), denominator_of("[B]", segments)
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        loss, grads, metrics = forward_backward(values, segments, None, ratio=ratio, kl_weight=0.1, denominator=denominator)
        results.append([loss, *grads.values(), *metrics.values()])
    for other in results[1:]:
        for x, y in zip(other, results[0], strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", ["logp", "old_logp", "advantages", "ref_logp", "rollout_logp"])
def test_an_active_nan_makes_the_loss_and_its_own_gradient_nan(name, impl):
    segments = segments_of([[2, 3], [4]])
    values = inputs(segments)
    values[name][4] = math.nan
    loss, grads, _ = forward_backward(values, segments, impl, kl_weight=0.1)
    assert loss.isnan()
    assert grads["logp"].isnan().nonzero().tolist() == [[4]]


def test_a_loss_scale_reaches_half_precision_gradients_before_they_are_rounded():
    """1e-7 a token is below float16's smallest number: rounding before the scale would give 0."""
    segments = segments_of([[4]])
    logp = -torch.rand(4).half()
    logp.requires_grad_()
    loss, _ = policy_loss(logp, None, torch.ones(4), segments, denominator=1e8)
    (loss * 2.0**16).backward()
    torch.testing.assert_close(logp.grad, torch.full((4,), -(2.0**16) / 1e8).half(), rtol=1e-3, atol=0)


# 3. Properties


@given(hierarchies(), st.sampled_from(RATIOS), st.sampled_from(DENOMINATORS[1:]), st.integers(0, 5))
def test_micro_batches_change_nothing(case, ratio, kind, cut):
    segments, mask = case
    values = inputs(segments)
    denominator = denominator_of(kind, segments)
    settings = dict(ratio=ratio, kl_weight=0.2)
    whole, grads, _ = forward_backward(values, segments, None, mask=mask, denominator=denominator, **settings)
    cut = min(cut, segments.num_sequences)
    total, parts = 0.0, {"logp": [], "entropy": []}
    cu_seqlens = segments.cu_seqlens.tolist()
    for first, last in ((0, cut), (cut, segments.num_sequences)):
        here = slice(cu_seqlens[first], cu_seqlens[last])
        borders = segments.sequence_offsets[first : last + 1]
        part = Segments(segments.token_offsets[borders[0] : borders[-1] + 1] - here.start, borders - borders[0])
        over = {"[B]": slice(first, last), "[N]": here}.get(kind)
        over = denominator if over is None else denominator[over]
        if kind == "[B]" and part.num_sequences == part.num_tokens:
            over = over[part.sequence_ids()]  # [B] and [N] have one shape here, which is read as [N]
        rows = {name: x[here] for name, x in values.items()}
        loss, part_grads, _ = forward_backward(rows, part, None, mask=mask[here], denominator=over, **settings)
        total += float(loss)
        for name, grad in part_grads.items():
            parts[name].append(grad)
    if kind == "[B]" and segments.num_sequences == segments.num_tokens:
        return
    assert total == pytest.approx(float(whole), rel=1e-12, abs=1e-12)
    for name, grad in grads.items():
        torch.testing.assert_close(torch.cat(parts[name]), grad, rtol=1e-12, atol=0)


def test_weights_act_in_the_token_form_and_cancel_in_the_plain_form():
    """GSPO-token: with the plain form sum_t s A w_t, conserving weights cancel exactly whatever the attribution (section 8)."""
    segments = segments_of([[2, 3, 1]], terminal=[True])
    values = inputs(segments, drift=0.01)
    weighted, weights = segment_credit(torch.tensor([1.0, -1.0, 0.0], dtype=torch.float64), segments, torch.ones(1, dtype=torch.float64))
    assert (weights != 1).any()

    def token_form(advantages):
        return forward_backward(dict(logp=values["logp"], old_logp=values["old_logp"], advantages=advantages), segments, None, ratio="sequence")[1]

    def plain_form(advantages):
        logp = values["logp"].clone().requires_grad_()
        s = torch.exp(segment_reduce(logp - values["old_logp"], segments, reduce="mean", level="sequence"))[segments.sequence_ids()]
        return torch.autograd.grad(-(s * advantages).sum() / segments.num_tokens, logp)[0]

    uniform = torch.ones_like(weighted)
    torch.testing.assert_close(plain_form(weighted), plain_form(uniform), rtol=1e-14, atol=0)  # the attribution is lost
    torch.testing.assert_close(token_form(weighted)["logp"], token_form(uniform)["logp"] * weighted, rtol=1e-14, atol=0)  # and here it is not
    torch.testing.assert_close(token_form(uniform)["logp"], plain_form(uniform), rtol=1e-14, atol=0)  # GSPO's own gradient without weights


@given(st.integers(1, 40), st.booleans())
def test_the_clip_of_a_segment_narrows_with_its_length(length, masked):
    """Half of twice as many tokens masked clips as the unmasked ones alone: n_k counts unmasked tokens."""
    segments = segments_of([[2 * length if masked else length]])
    mask = torch.arange(segments.num_tokens) % 2 == 0 if masked else None
    border = 0.3 / math.sqrt(length)
    old = torch.zeros(segments.num_tokens, dtype=torch.float64)
    for log_ratio, clipped in ((math.log1p(border) - 1e-9, 0), (math.log1p(border) + 1e-9, 1)):
        loss, grads, metrics = forward_backward(
            dict(logp=old + log_ratio, old_logp=old, advantages=old + 1), segments, None, mask=mask, ratio="segment", clip=(0.3, 0.3)
        )
        assert float(metrics["clip_ratio/high_mean"]) == clipped
        assert (grads["logp"] == 0).all() == bool(clipped)
        assert float(loss) == pytest.approx(-1 - border, abs=1e-8)


@given(hierarchies())
def test_levels_agree_on_segments_of_one_token_and_sequences_of_one_segment(case):
    segments, mask = case
    n = segments.num_tokens
    values = inputs(segments)
    singles = Segments(torch.arange(n + 1), torch.arange(n + 1))
    token = forward_backward(values, singles, None, mask=mask, kl_weight=0.1)
    for ratio in ("segment", "sequence"):
        other = forward_backward(values, singles, None, mask=mask, kl_weight=0.1, ratio=ratio)
        torch.testing.assert_close(other[0], token[0], rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(other[1]["logp"], token[1]["logp"], rtol=1e-13, atol=1e-13)


@given(hierarchies(), st.sampled_from(RATIOS))
def test_on_policy_is_the_policy_gradient(case, ratio):
    """old_logp=None and old_logp=logp are one thing: the gradient is -A over the denominator at every level, nothing is clipped."""
    segments, mask = case
    values = inputs(segments)
    values = dict(logp=values["logp"], old_logp=None, advantages=values["advantages"])
    loss, grads, metrics = forward_backward(values, segments, None, mask=mask, ratio=ratio)
    given_, given_grads, _ = forward_backward(values | {"old_logp": values["logp"]}, segments, None, mask=mask, ratio=ratio)
    assert torch.equal(loss, given_)
    assert torch.equal(grads["logp"], given_grads["logp"])
    wanted = torch.where(mask, -values["advantages"] / mask.sum().clamp(min=1), 0.0)
    torch.testing.assert_close(grads["logp"], wanted, rtol=1e-15, atol=0)
    assert metrics["clip_ratio/low_mean"] == metrics["clip_ratio/high_mean"] == metrics["kl/old"] == 0


def test_denominators_express_grpo_dr_grpo_and_gspo():
    segments = segments_of([[2, 1], [1], [4]])
    logp, advantages = -torch.rand(8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    per_sequence = segment_reduce(-advantages, segments, reduce="mean", level="sequence")
    lengths = segments.cu_seqlens.diff()
    sequence_mean = policy_loss(logp, None, advantages, segments, denominator=lengths.double() * 3).loss
    torch.testing.assert_close(sequence_mean, per_sequence.mean(), rtol=1e-14, atol=0)
    per_token = policy_loss(logp, None, advantages, segments, denominator=lengths.double()[segments.sequence_ids()] * 3).loss
    torch.testing.assert_close(per_token, sequence_mean, rtol=1e-15, atol=0)
    constant = policy_loss(logp, None, advantages, segments, denominator=3 * 1024.0).loss
    torch.testing.assert_close(constant, -advantages.sum() / 3072, rtol=1e-14, atol=0)
    integral = policy_loss(logp, None, advantages, segments, denominator=3072).loss
    tensor = policy_loss(logp, None, advantages, segments, denominator=torch.tensor(3072.0)).loss
    assert integral == constant == tensor


# 4. Edges


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("ratio", RATIOS)
def test_masked_tokens_may_hold_anything(ratio, impl, device):
    segments = segments_of([[2, 3], [2]], device=device)
    mask = torch.tensor([1, 0, 0, 1, 1, 0, 0], dtype=torch.bool, device=device)  # rollout 1 masked whole: 0 tokens, denominator 0
    clean = inputs(segments, torch.float32, device)
    denominator = torch.tensor([3.0, 0.0], device=device)
    settings = dict(mask=mask, ratio=ratio, kl_weight=0.1, denominator=denominator)
    wanted = forward_backward(clean, segments, impl, **settings)
    for junk in (math.nan, math.inf, -math.inf):
        dirty = {name: torch.where(mask, x, junk) for name, x in clean.items()}
        loss, grads, metrics = forward_backward(dirty, segments, impl, **settings)
        assert torch.equal(loss, wanted[0])
        for name, grad in grads.items():
            assert torch.equal(grad, wanted[1][name])
            assert (grad[~mask] == 0).all()
        assert metrics == wanted[2]
    assert wanted[0].isfinite()
    over = torch.where(mask, 3.0, 0.0)
    assert torch.equal(forward_backward(clean, segments, impl, **(settings | {"denominator": over}))[1]["logp"], wanted[1]["logp"])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("ratio", RATIOS)
def test_empty_calls_and_masked_calls(ratio, impl, device):
    for lengths in ([], [[]], [[0]], [[0, 0], []]):
        segments = segments_of(lengths, device=device)
        loss, grads, metrics = forward_backward(inputs(segments, torch.float32, device), segments, impl, ratio=ratio, kl_weight=0.1)
        assert loss == 0
        assert grads["logp"].shape == grads["entropy"].shape == (0,)
        assert metrics["tokens"] == 0
        assert (float(metrics["ratio/min"]), float(metrics["ratio/max"])) == (math.inf, -math.inf)
    segments = segments_of([[2, 1]], device=device)
    mask = torch.zeros(3, dtype=torch.bool, device=device)
    loss, grads, metrics = forward_backward(inputs(segments, torch.float32, device), segments, impl, mask=mask, ratio=ratio, kl_weight=0.1)
    assert loss == 0
    assert (grads["logp"] == 0).all()
    assert (grads["entropy"] == 0).all()
    assert all(float(value) == 0 for name, value in metrics.items() if name not in ("ratio/min", "ratio/max"))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("ratio", RATIOS)
def test_log_ratios_are_clamped_before_they_are_averaged(ratio, impl):
    segments = segments_of([[2]])
    logp = torch.tensor([-1.0, -1.0], dtype=torch.float64)
    values = dict(logp=logp, old_logp=torch.tensor([-500.0, -1.0], dtype=torch.float64), advantages=torch.tensor([-1.0, -1.0], dtype=torch.float64))
    loss, grads, metrics = forward_backward(values, segments, impl, ratio=ratio, denominator=1.0)
    wanted = math.exp(20) + 1 if ratio == "token" else 2 * math.exp(10)
    assert float(loss) == pytest.approx(wanted, rel=1e-13)
    assert float(grads["logp"].sum()) == pytest.approx(wanted, rel=1e-13)
    assert float(metrics["ratio/max"]) == pytest.approx(math.exp(20 if ratio == "token" else 10), rel=1e-13)
    impossible = values | {"ref_logp": torch.tensor([-math.inf, -1.0], dtype=torch.float64)}
    loss, grads, _ = forward_backward(impossible | {"old_logp": None}, segments, impl, ratio=ratio, kl_weight=0.5)
    assert loss.isfinite()
    assert grads["logp"].isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_a_ratio_on_the_border_of_the_clip_is_not_clipped(advantage, impl):
    """With clip (0, 0) an on-policy token lies on both borders: its gradient is whole, not a share of it."""
    segments = segments_of([[1]])
    values = dict(logp=torch.tensor([-1.0]), old_logp=None, advantages=torch.tensor([advantage]))
    assert forward_backward(values, segments, impl, clip=(0.0, 0.0))[1]["logp"].tolist() == [-advantage]


def test_mixed_dtypes_give_the_working_dtype_of_logp():
    segments = segments_of([[2], [1]])
    values = inputs(segments, torch.float64) | {"logp": -torch.rand(3)}
    for kind in DENOMINATORS:
        loss, grads, metrics = forward_backward(values, segments, None, kl_weight=0.1, denominator=denominator_of(kind, segments))
        assert loss.dtype == metrics["kl/ref"].dtype == grads["logp"].dtype == torch.float32
        assert grads["entropy"].dtype == torch.float64


def test_views_are_read_in_place():
    segments = segments_of([[2, 3], [4]])
    values = {name: torch.stack([x, x], 1)[:, 0] for name, x in inputs(segments).items()}
    compact = {name: x.clone() for name, x in values.items()}
    assert torch.equal(forward_backward(values, segments, None)[0], forward_backward(compact, segments, None)[0])
    expanded = policy_loss(values["logp"], None, torch.ones(()).double().expand(9), segments).loss
    assert float(expanded) == pytest.approx(-1.0)


@pytest.mark.parametrize("ratio", ["token", "segment"])
def test_many_rows(ratio, device):
    segments = segments_of([[64] * 8] * 150, device=device)  # 76,800 tokens
    values = inputs(segments, torch.float32, device)
    settings = dict(ratio=ratio, kl_weight=0.1)
    loss, grads, _ = forward_backward(values, segments, None, **settings)
    again, again_grads, _ = forward_backward(values, segments, None, **settings)
    assert torch.equal(loss, again)  # the same call twice is bitwise the same
    assert torch.equal(grads["logp"], again_grads["logp"])
    exact, _, _ = forward_backward({name: x.double() for name, x in values.items()}, segments, "reference", **settings)
    working, _, _ = forward_backward(values, segments, "reference", **settings)
    assert_right("loss", loss, working, exact)


def test_second_derivatives_raise():
    """A second derivative that is silently 0 would be a wrong one."""
    segments = segments_of([[3]])
    values = inputs(segments)
    logp = values["logp"].requires_grad_()
    loss = policy_loss(logp, values["old_logp"], values["advantages"], segments).loss
    for objective, message in ((loss.square(), "differentiate twice"), (loss, "does not require grad")):
        (grad,) = torch.autograd.grad(objective, logp, create_graph=True)
        with pytest.raises(RuntimeError, match=message):
            grad.sum().backward(retain_graph=True)


def test_only_the_gradients_that_are_wanted():
    segments = segments_of([[3]])
    values = inputs(segments)
    entropy = values["entropy"].requires_grad_()
    loss, metrics = policy_loss(values["logp"], None, values["advantages"], segments, entropy=entropy, entropy_weight=0.3)
    assert not any(value.requires_grad for value in metrics.values())
    assert torch.autograd.grad(loss, entropy)[0].tolist() == pytest.approx([-0.1] * 3)
    without_weight = policy_loss(values["logp"].requires_grad_(), None, values["advantages"], segments, entropy=entropy)
    assert torch.autograd.grad(without_weight.loss, entropy)[0].tolist() == [0.0] * 3  # reported, not rewarded
    assert float(without_weight.metrics["entropy"]) == pytest.approx(float(entropy.detach().mean()))


# 5. Registration


@pytest.mark.parametrize("ratio", RATIOS)
def test_opcheck(ratio, device):
    segments = segments_of(LENGTHS, device=device)
    mask = torch.rand(segments.num_tokens, device=device) < 0.7
    op = torch.ops.acpo_kernels.policy_loss.default
    for strided in (False, True):
        v = inputs(segments, torch.float32, device)
        if strided:
            v = {name: torch.stack([x, x], 1)[:, 1] for name, x in v.items()}
        logp, entropy = v["logp"].detach().requires_grad_(), v["entropy"].detach().requires_grad_()
        head = (logp, v["old_logp"], v["advantages"], segments.token_offsets, segments.sequence_offsets, mask, 0.2, 0.28, ratio)
        over = torch.ones(segments.num_sequences, device=device)
        torch.library.opcheck(op, (*head, entropy, None, v["entropy_weight"], v["ref_logp"], 0.1, v["rollout_logp"], 2.0, None, over))
        torch.library.opcheck(op, (logp, None, *head[2:5], None, *head[6:], None, None, None, None, 0.0, None, 2.0, 5.0, None))
    half = inputs(segments, torch.bfloat16, device)
    logp, entropy = half["logp"].requires_grad_(), half["entropy"].requires_grad_()
    head = (logp, half["old_logp"], half["advantages"], segments.token_offsets, segments.sequence_offsets, mask, 0.2, 0.28, ratio)
    torch.library.opcheck(op, (*head, entropy, 0.1, None, half["ref_logp"], 0.1, None, 2.0, None, None))


@pytest.mark.parametrize(("ratio", "backend"), [("token", "inductor"), ("segment", "aot_eager"), ("sequence", "aot_eager")])
def test_compiles_in_one_graph(ratio, backend):
    def objective(logp, old_logp, advantages, segments):
        loss, metrics = policy_loss(logp * 1.5, old_logp, advantages, segments, ratio=ratio)
        return loss * 2 + metrics["kl/old"]

    compiled = torch.compile(objective, fullgraph=True, backend=backend)
    for length in (1, 2, 15, 16, 17):
        segments = segments_of([[length], [1]])
        v = inputs(segments, torch.float32)
        logp = v["logp"].requires_grad_()
        eager = objective(logp, v["old_logp"], v["advantages"], segments)
        actual = compiled(logp, v["old_logp"], v["advantages"], segments)
        torch.testing.assert_close(actual, eager, rtol=1e-6, atol=1e-6)
        grads = [torch.autograd.grad(x, logp)[0] for x in (actual, eager)]
        torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-6)


# 6. Bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logp": torch.ones(4)}, r"logp must have shape \[N\] = \(5,\), got \(4,\)"),
        ({"logp": torch.ones(5, dtype=torch.int64)}, "logp must have dtype float32"),
        ({"advantages": torch.ones(1)}, r"advantages must have shape \[N\] = \(5,\), got \(1,\)"),
        ({"advantages": torch.ones(5, device="meta")}, "advantages must be on cpu, got meta"),
        *(({name: torch.ones(6)}, rf"{name} must have shape \[N\] = \(5,\), got \(6,\)") for name in PER_TOKEN),
        ({"mask": torch.ones(5)}, "mask must have dtype bool"),
        ({"mask": torch.ones(3, dtype=torch.bool)}, r"mask must have shape \[N\]"),
        ({"ratio": "step"}, "ratio must be one of 'token', 'segment', 'sequence', got 'step'"),
        ({"clip": 0.2}, "clip must be a pair"),
        ({"clip": (0.2,)}, "clip must be a pair"),
        ({"clip": (-0.1, 0.2)}, r"clip\[0\] must be at least 0"),
        ({"clip": (1.1, 0.2)}, r"clip\[0\] must be at most 1"),
        ({"clip": (0.2, -0.1)}, r"clip\[1\] must be at least 0"),
        ({"kl_weight": -0.1, "ref_logp": torch.ones(5)}, "kl_weight must be at least 0"),
        ({"kl_weight": 0.1}, "ref_logp must be given with kl_weight > 0"),
        ({"entropy_weight": 0.1}, "entropy must be given with entropy_weight"),
        ({"entropy_weight": torch.ones(2), "entropy": torch.ones(5)}, r"entropy_weight must be a number or have shape \(5,\), got \(2,\)"),
        ({"rollout_cap": 0.0}, "rollout_cap must be greater than 0"),
        ({"denominator": 0.0}, "denominator must be greater than 0"),
        ({"denominator": -3}, "denominator must be greater than 0"),
        ({"denominator": math.nan}, "denominator must be finite"),
        ({"denominator": torch.ones(3)}, r"denominator must be a number or have shape \(\) or \(2,\) or \(5,\), got \(3,\)"),
        ({"denominator": torch.ones(2, dtype=torch.int64)}, "denominator must have dtype"),
        ({"impl": "triton"}, "impl must be one of None, 'reference'"),
    ],
)
def test_bad_input(change, message):
    arguments = dict(logp=torch.zeros(5), old_logp=None, advantages=torch.ones(5), segments=segments_of([[2, 1], [2]])) | change
    positional = [arguments.pop(name) for name in ("logp", "old_logp", "advantages", "segments")]
    with pytest.raises(ValueError, match=message):
        policy_loss(*positional, **arguments)


def test_bad_types():
    for change in ({"kl_weight": "0.1"}, {"denominator": True}, {"entropy_weight": "x", "entropy": torch.ones(5)}):
        (name,) = [n for n in change if n != "entropy"]
        with pytest.raises(TypeError, match=f"{name} must be a number"):
            policy_loss(torch.zeros(5), None, torch.ones(5), segments_of([[5]]), **change)
