"""Credit comes down: from a rollout's advantage and its segments' scores to token advantages."""

from __future__ import annotations

import math

from torch import Tensor

from . import _checks as check
from . import _cpu, _torch, reference
from ._library import define, number_or_tensor, triton
from ._results import SegmentCredit
from .segments import Segments, check_segments


def segment_credit(
    scores: Tensor,
    segments: Segments,
    advantages: Tensor,
    *,
    mask: Tensor | None = None,
    form: str = "weights",
    bound: float = 0.5,
    gain: float = 0.5,
    reliability: float | Tensor = 1.0,
    terminal: str = "exclude",
    scale: float | Tensor | None = None,
    impl: str | None = None,
) -> SegmentCredit:
    """Token advantages from one advantage a rollout and one signed score a segment.

    form="weights", bounded and conserving (segment k of rollout b with n_k unmasked tokens, T = sum_k n_k, e = bound, r = reliability_b):

        m_k = phi_k / scale                                   w~_k = clip(1 + gain sgn(A_b) m_k, 1-e, 1+e)
        w_k = 1 + r (w~_k - 1)                                w_k <- w_k T / sum_j n_j w_j
        token advantage = A_b w_k

    so that the rollout keeps exactly the credit sum_t A_b = A_b T, the sign never flips, and (with e and r as above)
    (1 - r e)/(1 + r e) <= w_k <= (1 + r e)/(1 - r e). The terminal segment takes the mean w~ of the others; a rollout with
    fewer than two other segments has w = 1. The C++ kernel sums in double (compensated for float64) and rounds w once, so that
    |sum_t w - T| <= 2^-24 T for float32 results: half a unit of each weight. form="additive" is shaping and works where
    A_b = 0 as well:

        token advantage = A_b + r gain clip(phi_k / scale, -3, 3)       (the terminal segment: A_b; weights are 1)

    Reliability 0 returns A_b bitwise in both forms.

    Shapes
        scores [S], advantages [B], mask [N], reliability a number, 0-d or [B], scale a number or 0-d;
        results token_advantages [N], weights [S]. B = 0 gives empty ones.
    Dtypes
        float32, bfloat16, float16 (results float32) or float64 (results float64); mask bool. No gradient flows.
    Units
        Those of advantages; scores in any unit, divided by scale. scale=None is the batch's own over non-terminal segments:
        mean |phi| + 1e-6 for weights, sqrt(mean phi^2) + 1e-6 for additive, whose scores come centred. A score that is not finite
        counts as 0. Masked tokens get advantage 0 and count in no length. terminal="include" treats the last segment as any other.
    Errors
        TypeError for what is no tensor, number or Segments; ValueError for shapes and devices that do not match segments, an unknown
        form or terminal, bound outside [0, 1),
        gain < 0, reliability outside [0, 1] or scale outside [1e-36, 1e36] (numbers; a tensor is the caller's promise).
    Source
        Section 4 of docs/method.md: our reading of ACPO's factorized reward (arXiv 2510.08899).
    """
    check_segments(segments)
    device = segments.device
    if not (
        impl is None
        and check.is_vector(scores, segments.num_segments, device)
        and check.is_vector(advantages, segments.num_sequences, device)
        and (mask is None or check.is_vector(mask, segments.num_tokens, device, check.BOOL))
        and type(form) is type(terminal) is str
        and form in _FORM
        and terminal in _TERMINAL
        and type(bound) is type(gain) is type(reliability) is float
        and 0.0 <= bound < 1.0
        and 0.0 <= gain < math.inf
        and 0.0 <= reliability <= 1.0
        and scale is None
    ):
        _check(scores, segments, advantages, mask, form, bound, gain, reliability, terminal, scale, impl)
    if impl == "reference":
        return reference.segment_credit(
            scores, segments, advantages, mask=mask, form=form, bound=bound, gain=gain, reliability=reliability, terminal=terminal, scale=scale
        )
    rho = (reliability, None) if type(reliability) is float else _constant(reliability)
    unit = (None, None) if scale is None else _constant(scale)
    token_advantages, weights = _op(
        scores.detach() if scores.requires_grad else scores, segments.token_offsets, segments.sequence_offsets,
        advantages.detach() if advantages.requires_grad else advantages, segments.num_tokens, segments.terminal, mask, form, bound, gain,
        *rho, terminal == "exclude", *unit,
    )  # fmt: skip
    return SegmentCredit(token_advantages, weights)


_FORM, _TERMINAL = ("weights", "additive"), ("exclude", "include")


def _check(scores, segments: Segments, advantages, mask, form, bound, gain, reliability, terminal, scale, impl) -> None:
    check.implementation(impl)
    check.tensor("scores", scores, check.FLOAT, shape=(segments.num_segments,), shape_name="[S]", device=segments.device)
    check.tensor("advantages", advantages, check.FLOAT, shape=(segments.num_sequences,), shape_name="[B]", device=segments.device)
    if mask is not None:
        check.tensor("mask", mask, check.BOOL, shape=(segments.num_tokens,), shape_name="[N]", device=segments.device)
    check.choice("form", form, _FORM)
    check.choice("terminal", terminal, _TERMINAL)
    check.number("bound", bound, low=0.0)
    if bound >= 1:
        raise ValueError(f"bound must be below 1, where a weight could reach 0, got {bound}")
    check.number("gain", gain, low=0.0)
    if isinstance(reliability, Tensor):
        check.tensor("reliability", reliability, check.FLOAT, device=segments.device)
        if reliability.ndim != 0 and tuple(reliability.shape) != (segments.num_sequences,):
            raise ValueError(f"reliability must be a number, 0-d or [B] = ({segments.num_sequences},), got {tuple(reliability.shape)}")
    else:
        check.number("reliability", reliability, low=0.0, high=1.0)
    if isinstance(scale, Tensor):
        check.tensor("scale", scale, check.FLOAT, ndim=0, device=segments.device)
    elif scale is not None:
        check.number("scale", scale, above=0, low=check.DIVISORS[0], high=check.DIVISORS[1])


def _constant(value):
    """No gradient flows; what needs none is passed on as it is (a detached view costs a microsecond)."""
    return number_or_tensor(value.detach() if isinstance(value, Tensor) and value.requires_grad else value)


def _fake(scores, token_offsets, sequence_offsets, advantages, num_tokens, *rest):
    dtype = reference.working_dtype(scores.dtype)
    return scores.new_empty(num_tokens, dtype=dtype), scores.new_empty(scores.shape, dtype=dtype)


_op = define(
    "segment_credit(Tensor scores, Tensor token_offsets, Tensor sequence_offsets, Tensor advantages, SymInt num_tokens, Tensor? terminal_segments,"
    " Tensor? mask, str form, float bound, float gain, float? reliability, Tensor? reliabilities, bool exclude_terminal, float? scale,"
    " Tensor? scales) -> (Tensor, Tensor)",
    cpu=_cpu.segment_credit if _cpu.available else _torch.segment_credit,
    cuda=triton("segment_credit"),
    fake=_fake,
)
