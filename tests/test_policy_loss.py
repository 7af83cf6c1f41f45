"""policy_loss: clipped surrogate, KL to a reference, entropy bonus. Its properties (3) and edges (4) have files of their own."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from policy_loss_cases import DENOMINATORS, IMPLS, PER_TOKEN, RATIOS, denominator_of, forward_backward, inputs
from ragged import LENGTHS, assert_right, hierarchies, segments_of, sequences, tokens

from acpo_kernels import policy_loss


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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ratio", ["token", "segment"])
def test_every_instruction_set_around_every_block(ratio, dtype, cpu_isa):
    """N around a vector, a block of 256 tokens and a share of 4096."""
    for n in (1, 7, 9, 255, 257, 4097):
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
        ({"denominator": 1e-37}, "denominator must be at least 1e-36"),  # float32 has no inverse of it
        ({"denominator": 1e37}, r"denominator must be at most 1e\+36"),
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
