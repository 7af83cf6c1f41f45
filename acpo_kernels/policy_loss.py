"""The policy loss on log-probs: clipped surrogate, KL to a reference, entropy bonus."""

from __future__ import annotations

from torch import Tensor

from . import _checks as check
from . import _cpu, _torch, reference
from ._library import define, number_or_tensor, once_differentiable, triton
from ._results import METRICS, PolicyLoss
from .segments import Segments, check_segments


def policy_loss(
    logp: Tensor,
    old_logp: Tensor | None,
    advantages: Tensor,
    segments: Segments,
    *,
    mask: Tensor | None = None,
    clip: tuple[float, float] = (0.2, 0.28),
    ratio: str = "token",
    entropy: Tensor | None = None,
    entropy_weight: float | Tensor | None = None,
    ref_logp: Tensor | None = None,
    kl_weight: float = 0.0,
    rollout_logp: Tensor | None = None,
    rollout_cap: float = 2.0,
    denominator: float | Tensor | None = None,
    impl: str | None = None,
) -> PolicyLoss:
    """Clipped policy-gradient loss over packed tokens, summed over tokens with a given denominator.

        loss = sum_t l_t / denominator_t
        l_t  = -c_t min(r_t A_t, clip(r_t, 1 - low, 1 + high) A_t) + kl_weight rho_t (exp(d_t) - d_t - 1) - entropy_weight_t H_t
        r_t  = sg[s_t] exp(logp_t - sg[logp_t]),   s_t = exp(mean log-ratio over the token, its segment or its sequence)
        rho_t = exp(logp_t - old_t),  d_t = ref_logp_t - logp_t,  c_t = min(exp(old_t - rollout_logp_t), rollout_cap), no gradient

    Log-ratios are clamped to +-20 before they are averaged; that of two log-probs of -inf is 0. ratio="token" is GRPO's, "sequence"
    GSPO-token's (each token keeps its own advantage), "segment" the same over a reasoning step, with clip divided by sqrt(n_k): the noise of
    a mean of n_k tokens.

    Shapes
        logp, old_logp, advantages, mask, entropy, ref_logp, rollout_logp [N]; entropy_weight a number or [N]; denominator a number, 0-d,
        [B] (one a sequence: sequence-mean GRPO, GSPO) or [N] (which it is read as where B = N); None is the number of unmasked tokens
        of this call. loss is 0-d, metrics are 0-d. To accumulate micro-batches pass the denominator of the whole optimisation step.
    Dtypes
        float32, bfloat16, float16 (loss float32) or float64; mask bool. Differentiable in logp and entropy; second derivatives raise.
    Units
        Nats. old_logp=None is on-policy: old = sg[logp]. Masked tokens add nothing and get gradient 0. An empty call returns 0.
        Metrics over unmasked tokens: `tokens`; `clip_ratio/low_mean`, `clip_ratio/high_mean` (shares clipped); `ratio/mean|min|max`;
        `ratio/ess` (effective sample size as a share); `kl/old`, `kl/ref` (k3 estimates); `entropy`. Without any unmasked token they are 0, but
        for `ratio/min` = inf and `ratio/max` = -inf.
    Errors
        TypeError for what is no tensor, number or Segments; ValueError for shapes or devices that do not match segments, an unknown
        ratio, clip[0] outside [0, 1], clip[1] negative, kl_weight < 0, kl_weight > 0 without ref_logp, entropy_weight
        without entropy, rollout_cap <= 0, denominator outside [1e-36, 1e36] (a number; a tensor is the caller's promise).
    Source
        DAPO (arXiv 2503.14476) eq. 8-12, GSPO (arXiv 2507.18071) eq. 13-14, k3 with importance correction (DeepSeek-V3.2 eq. 7).
    """
    check.implementation(impl)
    low, high = check_arguments(
        segments, clip, ratio, kl_weight, rollout_cap, entropy_weight, denominator,
        (("logp", logp), ("advantages", advantages)),
        (("old_logp", old_logp), ("entropy", entropy), ("ref_logp", ref_logp), ("rollout_logp", rollout_logp)),
    )  # fmt: skip
    if mask is not None:
        check.tensor("mask", mask, check.BOOL, shape=(segments.num_tokens,), shape_name="[N]", device=segments.device)
    if kl_weight > 0 and ref_logp is None:
        raise ValueError("ref_logp must be given with kl_weight > 0, got None")
    if entropy_weight is not None and entropy is None:
        raise ValueError("entropy must be given with entropy_weight, got None")
    if impl == "reference":
        return reference.policy_loss(
            logp, old_logp, advantages, segments, mask=mask, clip=clip, ratio=ratio, entropy=entropy, entropy_weight=entropy_weight,
            ref_logp=ref_logp, kl_weight=kl_weight, rollout_logp=rollout_logp, rollout_cap=rollout_cap, denominator=denominator,
        )  # fmt: skip
    loss, metrics, _, _ = _op(
        logp, old_logp, advantages, segments.token_offsets, segments.sequence_offsets, mask, low, high, ratio, entropy,
        *number_or_tensor(entropy_weight), ref_logp, kl_weight, rollout_logp, rollout_cap, *number_or_tensor(denominator),
    )  # fmt: skip
    return PolicyLoss(loss, dict(zip(METRICS, metrics.unbind(), strict=True)))


def check_arguments(segments, clip, ratio, kl_weight, rollout_cap, entropy_weight, denominator, given, optional) -> tuple[float, float]:
    """Checks what every form of the loss takes (given and optional: named tensors [N]); returns clip as two numbers."""
    check_segments(segments)
    n, device = segments.num_tokens, segments.device
    for name, value in given:
        check.tensor(name, value, check.FLOAT, shape=(n,), shape_name="[N]", device=device)
    for name, value in optional:
        if value is not None:
            check.tensor(name, value, check.FLOAT, shape=(n,), shape_name="[N]", device=device)
    if not isinstance(clip, (tuple, list)) or len(clip) != 2:
        raise ValueError(f"clip must be a pair (low, high), got {clip!r}")
    check.number("clip[0]", clip[0], low=0.0, high=1.0)
    check.number("clip[1]", clip[1], low=0.0)
    check.choice("ratio", ratio, ("token", "segment", "sequence"))
    check.number("kl_weight", kl_weight, low=0.0)
    check.number("rollout_cap", rollout_cap, above=0)
    if entropy_weight is not None:
        check.tensor_or_number("entropy_weight", entropy_weight, ((n,),), device)
    if denominator is not None:
        low, high = check.DIVISORS
        check.tensor_or_number("denominator", denominator, ((), (segments.num_sequences,), (n,)), device, above=0, low=low, high=high)
    return float(clip[0]), float(clip[1])


def _fake(logp, old_logp, advantages, token_offsets, sequence_offsets, mask, clip_low, clip_high, ratio, entropy, *rest):
    dtype = reference.working_dtype(logp.dtype)
    metrics = logp.new_empty(len(METRICS), dtype=dtype)
    return (
        logp.new_empty((), dtype=dtype),
        metrics,
        logp.new_empty(logp.shape, dtype=dtype),
        logp.new_empty(0 if entropy is None else entropy.shape, dtype=dtype),
    )


def _setup_context(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.dtypes = inputs[0].dtype, None if inputs[9] is None else inputs[9].dtype
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(output[2], output[3], output[0])


def _backward(ctx, grad_loss, *_):
    grads = [None] * 18
    if grad_loss is not None:
        grad_logp, grad_entropy, *_ = ctx.saved_tensors
        of_logp, of_entropy = ctx.dtypes
        grads[0] = (grad_logp * grad_loss).to(of_logp)
        grads[9] = None if of_entropy is None else (grad_entropy * grad_loss).to(of_entropy)
    return tuple(grads)


_op = define(
    "policy_loss(Tensor logp, Tensor? old_logp, Tensor advantages, Tensor token_offsets, Tensor sequence_offsets, Tensor? mask, float clip_low,"
    " float clip_high, str ratio, Tensor? entropy, float? entropy_weight, Tensor? entropy_weights, Tensor? ref_logp, float kl_weight,"
    " Tensor? rollout_logp, float rollout_cap, float? denominator, Tensor? denominators) -> (Tensor, Tensor, Tensor, Tensor)",
    cpu=_cpu.policy_loss if _cpu.available else _torch.policy_loss,
    cuda=triton("policy_loss"),
    fake=_fake,
    setup_context=_setup_context,
    backward=once_differentiable(_backward, lambda ctx: ctx.saved_tensors[2]),
)
