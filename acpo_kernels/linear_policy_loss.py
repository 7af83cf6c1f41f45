"""From hidden states to the policy loss: the trainer's path."""

from __future__ import annotations

from torch import Tensor

from . import _checks as check
from . import reference
from ._results import LinearPolicyLoss
from .linear_logprob_entropy import linear_logprob_entropy
from .policy_loss import policy_loss
from .segments import Segments


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    old_logp: Tensor | None,
    advantages: Tensor,
    segments: Segments,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    mask: Tensor | None = None,
    clip: tuple[float, float] = (0.2, 0.28),
    ratio: str = "token",
    entropy_weight: float | Tensor | None = None,
    ref_logp: Tensor | None = None,
    kl_weight: float = 0.0,
    rollout_logp: Tensor | None = None,
    rollout_cap: float = 2.0,
    denominator: float | Tensor | None = None,
    impl: str | None = None,
) -> LinearPolicyLoss:
    """`policy_loss` of the log-probs and entropies that `linear_logprob_entropy` gives; the bonus takes its entropy from there.

        loss = sum_t l_t(logp_t, H_t) / denominator_t,   (logp, H) = linear_logprob_entropy(hidden, weight, ids)

    Shapes
        hidden [N,H], weight [V,H], ids, old_logp, advantages [N]; the others as in the two operations. logp and entropy [N] come back detached.
    Dtypes
        As `linear_logprob_entropy`. Gradients of hidden, weight and bias.
    Units
        Nats; rows with mask=False or ids == -100 take no part.
    Errors
        Those of the two operations.
    Source
        Those of the two operations; today it is their composition (two forward products and one recompute).
    """
    settings = dict(
        clip=clip, ratio=ratio, entropy_weight=entropy_weight, ref_logp=ref_logp, kl_weight=kl_weight, rollout_logp=rollout_logp,
        rollout_cap=rollout_cap, denominator=denominator,
    )  # fmt: skip
    head = dict(bias=bias, temperature=temperature, softcap=softcap, mask=mask)
    logp, entropy = linear_logprob_entropy(hidden, weight, ids, **head, impl=impl)
    check.tensor("ids", ids, check.INTEGER, shape=(segments.num_tokens,), shape_name="[N] of segments", device=segments.device)
    active = reference.active_rows(ids, mask)
    loss, metrics = policy_loss(logp, old_logp, advantages, segments, mask=active, entropy=entropy, **settings, impl=impl)
    return LinearPolicyLoss(loss, metrics, logp.detach(), entropy.detach())
