"""What a token shares with the answer: two streams of logits, one without and one with the answer in the prompt."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _checks as check
from . import _cpu, _torch, reference
from ._library import define, number_or_tensor, triton
from ._results import HindsightInformation


@torch.no_grad()
def hindsight_information(
    logits: Tensor,
    hindsight_logits: Tensor,
    ids: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    impl: str | None = None,
) -> HindsightInformation:
    """Log-probs of the token under policy pi and hindsight q, and the divergences between the two distributions.

        logp = log pi(y),  hindsight_logp = log q(y),  entropy = H(pi),  log_ratio = hindsight_logp - logp
        kl = KL(pi || q) = sum_j pi_j (log pi_j - log q_j),   information = KL(q || pi) = sum_j q_j (log q_j - log pi_j)

    log_ratio is the pointwise conditional mutual information of the token with the answer; log_ratio + kl has mean zero over tokens that
    pi itself samples. Averaged over answers, information is I(Y_t; A | state) where pi is the mixture of the hinted policies.

    Shapes
        logits and hindsight_logits [...,V]; ids, mask [...]; temperature a number or the shape of ids; six results of the shape of ids; N = 0
        gives six empty ones.
    Dtypes
        Both logits of one dtype: float32, bfloat16, float16 (results float32) or float64 (results float64). No gradient flows.
    Units
        Nats. kl and information are >= 0, exactly 0 for equal streams, finite with -inf columns shared by both streams and +inf where
        only the first has mass. mask=False or ids == -100: all outputs 0. A row with NaN, +inf or only -inf gives NaN there alone;
        a target that is -inf in both streams has log_ratio NaN.
    Errors
        TypeError for what is no tensor or number; ValueError for shapes, dtypes or devices that do not fit, ids outside [0, V) (CPU), a
        temperature outside [1e-16, 1e36] (a number; a tensor is the caller's promise).
    Source
        Section 3 of docs/method.md; the centring E[log_ratio] = -kl is the definition of KL.
    """
    check.implementation(impl)
    check.rows(logits, ids, temperature, mask, coldest=check.COLDEST_DIVERGENCE)
    check.tensor("hindsight_logits", hindsight_logits, (logits.dtype,), shape=tuple(logits.shape), shape_name="that of logits", device=logits.device)
    if impl == "reference":
        check.ids_in_range(ids, reference.active_rows(ids, mask), logits.shape[-1])
        return reference.hindsight_information(logits, hindsight_logits, ids, temperature=temperature, mask=mask)
    return HindsightInformation(*_op(logits, hindsight_logits, ids, *number_or_tensor(temperature), mask))


def _forward_cpu(logits, hindsight_logits, ids, temperature, temperatures, mask):
    if _cpu.available:
        results = _fake(logits, hindsight_logits, ids)
        number = 1.0 if temperature is None else temperature
        if _cpu.hindsight_information(logits, hindsight_logits, ids, number, temperatures, mask, results):
            return results
    check.ids_in_range(ids, reference.active_rows(ids, mask), logits.shape[-1])
    return _torch.hindsight_information(logits, hindsight_logits, ids, temperature, temperatures, mask)


def _fake(logits, hindsight_logits, ids, *rest):
    return tuple(logits.new_empty(ids.shape, dtype=reference.working_dtype(logits.dtype)) for _ in range(6))


_op = define(
    "hindsight_information(Tensor logits, Tensor hindsight_logits, Tensor ids, float? temperature, Tensor? temperatures, Tensor? mask)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    cpu=_forward_cpu,
    cuda=triton("hindsight_information"),
    fake=_fake,
)
