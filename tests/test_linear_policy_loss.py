"""linear_policy_loss, equal to the two operations that it joins; its properties (3) and edges (4) have files of their own."""

from __future__ import annotations

import math

import pytest
import torch
from linear_policy_loss_cases import IMPLS, NAMES, RATIOS, forward_backward, inputs, rows_in_products
from ragged import LENGTHS, assert_right, segments_of

from acpo_kernels import _cpu, _linear_loss, linear_logprob_entropy, linear_policy_loss

# 1. Oracle


@pytest.mark.parametrize("impl", IMPLS)
def test_by_hand(impl, device):
    # Two tokens with probability 1/4 and 3/4 under the head, on-policy: loss -A/2 + kl k3 - w H, gradient of the bias by p - 1[j = id].
    segments = segments_of([[1, 1]], device=device)
    weight = torch.tensor([[math.log(3.0)], [0.0]], dtype=torch.float64, device=device)
    values = dict(
        hidden=torch.ones(2, 1, dtype=torch.float64, device=device), weight=weight, bias=torch.zeros(2, dtype=torch.float64, device=device),
        ids=torch.tensor([1, 0], device=device), old_logp=None, advantages=torch.tensor([1.0, -2.0], dtype=torch.float64, device=device),
        ref_logp=torch.tensor([0.25, 0.75], dtype=torch.float64, device=device).log() + 0.5,
    )  # fmt: skip
    result, metrics = forward_backward(values, segments, impl, kl_weight=0.1, entropy_weight=0.2)
    entropy = -0.25 * math.log(0.25) - 0.75 * math.log(0.75)
    k3 = math.exp(0.5) - 1.5
    assert float(result[0]) == pytest.approx((-1.0 + 2.0) / 2 + 0.1 * k3 - 0.2 * entropy, rel=1e-14)
    assert result[1].tolist() == pytest.approx([math.log(0.25), math.log(0.75)], rel=1e-14)
    assert result[2].tolist() == pytest.approx([entropy] * 2, rel=1e-14)
    # d loss / d logp = (-A - 0.1 * 0.5)/2; d logp_t / d z_0 = -3/4 and 1/4; d H / d z_0 = -p_0 (log p_0 + H)
    of_logp = [(-1.0 - 0.05) / 2 * -0.75, (2.0 - 0.05) / 2 * 0.25]
    of_entropy = -0.2 * -0.75 * (math.log(0.75) + entropy)
    assert result[5].tolist() == pytest.approx([sum(of_logp) + of_entropy, -sum(of_logp) - of_entropy], rel=1e-13)
    assert float(metrics["entropy"]) == pytest.approx(entropy)
    assert float(metrics["kl/ref"]) == pytest.approx(k3)


@pytest.mark.parametrize("impl", IMPLS)
def test_gradcheck(impl):
    """At token level with a given old_logp the gradient is the derivative of the value."""
    segments = segments_of([[2, 1], [2]])
    values = inputs(segments, vocab=4, width=3)
    leaves = [values.pop(name).requires_grad_() for name in ("hidden", "weight", "bias")]
    head = [values.pop(name) for name in ("ids", "old_logp", "advantages")]

    def loss(hidden, weight, bias):
        settings = dict(bias=bias, kl_weight=0.1, clip=(0.9, 9.0), softcap=4.0, temperature=1.3)
        return linear_policy_loss(hidden, weight, *head, segments, **values, **settings, impl=impl).loss

    torch.autograd.gradcheck(loss, leaves)


# 2. Implementation against the oracle


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ratio", RATIOS)
def test_against_the_reference(ratio, dtype, device):
    segments = segments_of([*LENGTHS, (60, 7, 1)], device=device)
    head = dict(softcap=8.0, temperature=1.2)
    values = inputs(segments, 101, 12, dtype, device, **head)
    mask = torch.rand(segments.num_tokens, device=device) < 0.8
    settings = dict(mask=mask, ratio=ratio, kl_weight=0.2, upstream=0.37, **head)

    def run(kind, impl, roll=0):
        given = {name: x.to(kind) if x.is_floating_point() else x for name, x in values.items()}
        given |= {"weight": given["weight"].roll(roll, 0), "bias": given["bias"].roll(roll, 0), "ids": (given["ids"] + roll) % 101}
        return forward_backward(given, segments, impl, **settings)

    actual, metrics = run(dtype, None)
    exact, exact_metrics = run(torch.float64, "reference")
    single, single_metrics = (exact, exact_metrics) if dtype == torch.float64 else run(torch.float32, "reference")
    # The loss is one number, in which terms cancel: how far float32 is off is chance (1e-9 to 5e-8 here). On CUDA the worst of four orders of
    # the vocabulary counts; on an H100 one order gave 3e-10, and the kernels 3e-8.
    draws = [single[0], *(run(single[0].dtype, "reference", roll)[0][0] for roll in ((17, 50, 80) if device.type == "cuda" else ()))]
    single = (max(draws, key=lambda x: (x.double() - exact[0]).abs().item()), *single[1:])
    for i, (name, x, y, z) in enumerate(zip(NAMES, actual, single, exact, strict=True)):
        assert x.dtype == (dtype if i >= 3 or dtype == torch.float64 else torch.float32), name
        assert_right(name, x, y, z, factor=4.0, gradient_dtype=dtype if i >= 3 else None)
    for name, value in exact_metrics.items():
        assert_right(name, metrics[name], single_metrics[name], value, factor=4.0)


def sweep(values, segments, mask, needs=(True, True, True), ratio="token", clip=(0.2, 0.28)):
    """The PyTorch form, as the dispatcher would call it: (results, RowCount)."""
    return _linear_loss.linear_policy_loss_cpu(
        values["hidden"].detach(), values["weight"].detach(), values["ids"], values["bias"].detach(), 1.0, None, None, values["old_logp"],
        values["advantages"], segments.token_offsets, segments.sequence_offsets, mask, *clip, ratio, None, None, None, 0.0, None, 2.0, None, None,
        list(needs),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("ratio", "on_policy"), [("token", False), ("segment", False), ("sequence", True)])
def test_every_instruction_set_over_several_tiles(ratio, on_policy, dtype, cpu_isa):
    """600 rows, some masked and most without a gradient: tiles of 256 with gaps, rows that wait, two flushes; then no gaps at all."""
    segments = segments_of([[100, 3], [397], [100]])
    values = inputs(segments, 77, 33, dtype)
    if on_policy:
        values["old_logp"] = None
    del values["ref_logp"], values["rollout_logp"], values["entropy_weight"]
    torch.manual_seed(1)
    for mask, advantages in (
        (torch.rand(600) < 0.95, torch.where(torch.rand(600) < 0.8, values["advantages"], 0.0)),
        (torch.rand(600) < 0.9, torch.where(torch.rand(600) < 0.1, values["advantages"], 0.0)),
        (torch.ones(600, dtype=torch.bool), values["advantages"].abs() + 1),
    ):
        case = values | {"advantages": advantages.to(dtype)}
        settings = dict(mask=mask, ratio=ratio, clip=(0.9, 9.0), upstream=0.37)

        def run(kind, impl, case=case, settings=settings):
            cast = {name: x.to(kind) if x is not None and x.is_floating_point() else x for name, x in case.items()}
            return forward_backward(cast, segments, impl, **settings)

        actual, metrics = run(dtype, None)
        exact, exact_metrics = run(torch.float64, "reference")
        single, single_metrics = run(torch.float32, "reference")
        for i, (name, x, y, z) in enumerate(zip(NAMES, actual, single, exact, strict=True)):
            assert_right(name, x, y, z, factor=4.0, gradient_dtype=dtype if i >= 3 else None)
        for name, value in exact_metrics.items():
            assert_right(name, metrics[name], single_metrics[name], value, factor=4.0)


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("on_policy", [True, False])
def test_which_rows_take_part_in_which_product(ratio, on_policy):
    """Masked rows in none, rows without a gradient in the forward one alone; only a ratio over other rows computes logits twice, and
    only where they are more than are held."""
    segments = segments_of([[100, 3], [397], [100]])
    values = inputs(segments, dtype=torch.float32)
    for name in ("ref_logp", "rollout_logp", "entropy_weight"):
        del values[name]
    if on_policy:
        values["old_logp"] = None
    mask = torch.rand(600) < 0.9
    some = torch.rand(600) < 0.25
    values["advantages"] = torch.where(some, values["advantages"], 0.0)
    unmasked, with_gradient = int(mask.sum()), int((mask & some).sum())
    settings = dict(mask=mask, ratio=ratio, clip=(1.0, 1e9))  # nothing is clipped

    def call(needs, small=False):
        rows = slice(0, 103) if small else slice(None)
        leaves = [values[name].detach().requires_grad_(need) for name, need in zip(("hidden", "weight", "bias"), needs, strict=True)]
        leaves[0] = leaves[0][rows]
        of_rows = [None if values[name] is None else values[name][rows] for name in ("ids", "old_logp", "advantages")]
        these = segments_of([[100, 3]]) if small else segments
        return linear_policy_loss(*leaves[:2], *of_rows, these, bias=leaves[2], **(settings | {"mask": mask[rows]}))

    again = with_gradient if ratio != "token" and not on_policy else 0
    if _cpu.available:
        for needs, wanted in (
            ((True, True, True), (unmasked + again, with_gradient, with_gradient)),
            ((True, False, False), (unmasked + again, with_gradient, 0)),
            ((False, True, False), (unmasked + again, 0, with_gradient)),
            ((False, False, False), (unmasked, 0, 0)),
        ):
            assert rows_in_products(lambda needs=needs: call(needs)) == wanted
        assert rows_in_products(lambda: torch.no_grad()(call)((True, True, True))) == (unmasked, 0, 0)
        small = int((mask & some)[:103].sum())
        assert rows_in_products(lambda: call((True, True, True), small=True)) == (int(mask[:103].sum()), small, small)
    for needs in ((True, True, True), (False, False, False)):
        _, rows = sweep(values, segments, mask, needs, **{name: settings[name] for name in ("ratio", "clip")})
        assert (rows.forward, rows.gradient) == ((unmasked + again, with_gradient) if any(needs) else (unmasked, 0))


def test_a_clipped_row_takes_part_in_the_forward_product_alone():
    segments = segments_of([[40]])
    values = inputs(segments, dtype=torch.float32)
    logp = linear_logprob_entropy(values["hidden"], values["weight"], values["ids"], bias=values["bias"]).logp
    values["old_logp"], values["advantages"] = torch.where(torch.arange(40) < 30, logp - 1.0, logp), torch.ones(40)
    if _cpu.available:
        leaf = values["hidden"].requires_grad_()
        head = (values["weight"].requires_grad_(), values["ids"], values["old_logp"], values["advantages"], segments)
        assert rows_in_products(lambda: linear_policy_loss(leaf, *head, bias=values["bias"])) == (40, 10, 10)
    assert sweep(values, segments, torch.ones(40, dtype=torch.bool))[1] == _linear_loss.RowCount(40, 10)


@pytest.mark.parametrize("ratio", RATIOS)
def test_the_form_in_pytorch_is_the_same(ratio):
    """What runs without the extension, and in float64."""
    segments = segments_of([*LENGTHS, (60, 7, 80)])
    values = inputs(segments)
    for name in ("ref_logp", "rollout_logp", "entropy_weight"):
        del values[name]
    mask = torch.rand(segments.num_tokens) < 0.8
    actual, _ = sweep(values, segments, mask, ratio=ratio)
    wanted, metrics = forward_backward(values, segments, "reference", mask=mask, ratio=ratio)
    for name, x, y in zip(NAMES, (actual[0], *actual[2:]), wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}")
    torch.testing.assert_close(actual[1], torch.stack(list(metrics.values())), rtol=1e-10, atol=1e-11)


# 5. Registration


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_opcheck(ratio, dtype, device):
    segments = segments_of(LENGTHS, device=device)
    mask = torch.rand(segments.num_tokens, device=device) < 0.7
    op = torch.ops.acpo_kernels.linear_policy_loss.default
    v = inputs(segments, dtype=dtype, device=device)
    offsets = segments.token_offsets, segments.sequence_offsets
    over = torch.ones(segments.num_sequences, device=device)
    for strided in (False, True):
        hidden, weight = (torch.stack([v[name]] * 2, 1)[:, 1] if strided else v[name].clone() for name in ("hidden", "weight"))
        head = (hidden.requires_grad_(), weight.requires_grad_(), v["ids"], v["bias"].clone().requires_grad_())
        tail = (v["ref_logp"], 0.1, v["rollout_logp"], 2.0, None, over, [True, True, True])
        torch.library.opcheck(
            op, (*head, 0.7, None, 5.0, v["old_logp"], v["advantages"], *offsets, mask, 0.2, 0.28, ratio, None, v["entropy_weight"], *tail)
        )
        frozen = (head[0], weight.detach(), v["ids"], None, 1.0, None, None)
        torch.library.opcheck(
            op, (*frozen, None, v["advantages"], *offsets, None, 0.2, 0.28, ratio, None, None, None, 0.0, None, 2.0, 5.0, None, [True, False, False])
        )


@pytest.mark.parametrize("ratio", RATIOS)
def test_compiles_in_one_graph(ratio):
    def objective(hidden, weight, values, segments):
        rest = {name: values[name] for name in ("ref_logp", "rollout_logp", "entropy_weight")}
        head = (values["ids"], values["old_logp"], values["advantages"], segments)
        return linear_policy_loss(hidden.tanh(), weight, *head, kl_weight=0.1, ratio=ratio, **rest)

    compiled = torch.compile(objective, fullgraph=True, backend="aot_eager")
    for n in (1, 2, 15, 16, 17):
        segments = segments_of([[n], [1]])
        values = inputs(segments, dtype=torch.float32)
        leaves = [values[name].requires_grad_() for name in ("hidden", "weight")]
        eager, actual = objective(*leaves, values, segments), compiled(*leaves, values, segments)
        torch.testing.assert_close(actual.loss, eager.loss, rtol=1e-5, atol=1e-6)
        for x, y in zip(torch.autograd.grad(actual.loss, leaves), torch.autograd.grad(eager.loss, leaves), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


# 6. Bad input: the errors of the two operations, and what joins them


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.ones(5, 3)}, r"weight must be \[V,H\] with hidden's H = 4"),
        ({"weight": torch.ones(5, 4, dtype=torch.bfloat16)}, "weight must have hidden's dtype"),
        ({"weight": torch.ones(5, 4).to(torch.float8_e4m3fn)}, "fp8 is not supported"),
        ({"ids": torch.tensor([0, 1, 5])}, r"ids must lie in \[0, V\) with V = 5"),
        ({"segments": segments_of([[4]])}, r"ids must have shape \[N\] of segments = \(4,\), got \(3,\)"),
        ({"old_logp": torch.ones(2)}, r"old_logp must have shape \[N\]"),
        ({"advantages": torch.ones(1)}, r"advantages must have shape \[N\]"),
        ({"bias": torch.ones(4)}, r"bias must have shape \[V\]"),
        ({"temperature": 0.0}, "temperature must be greater than 0"),
        ({"softcap": 0.0}, "softcap must be greater than 0"),
        ({"temperature": 1e-37}, "temperature must be at least 1e-36"),
        ({"softcap": 1e39}, r"softcap must be at most 1e\+30"),
        ({"mask": torch.ones(3)}, "mask must have dtype bool"),
        ({"ratio": "step"}, "ratio must be one of"),
        ({"clip": (0.2,)}, "clip must be a pair"),
        ({"kl_weight": 0.1}, "ref_logp must be given with kl_weight > 0"),
        ({"rollout_cap": 0.0}, "rollout_cap must be greater than 0"),
        ({"entropy_weight": torch.ones(2)}, "entropy_weight must be a number or have shape"),
        ({"denominator": 0.0}, "denominator must be greater than 0"),
        ({"impl": "triton"}, "impl must be one of None, 'reference'"),
    ],
)
def test_bad_input(change, message):
    arguments = dict(
        hidden=torch.ones(3, 4), weight=torch.ones(5, 4), ids=torch.zeros(3, dtype=torch.int64), old_logp=None, advantages=torch.ones(3),
        segments=segments_of([[3]]),
    ) | change  # fmt: skip
    with pytest.raises(ValueError, match=message):
        linear_policy_loss(**arguments)
