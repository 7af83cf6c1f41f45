"""`hindsight_information` from hidden states: each weight tile serves both streams, no N x V tensor exists."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _checks as check
from . import _cpu, _torch, reference
from ._library import define, number_or_tensor
from ._results import HindsightInformation


@torch.no_grad()
def linear_hindsight_information(
    hidden: Tensor,
    hindsight_hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    mask: Tensor | None = None,
    impl: str | None = None,
) -> HindsightInformation:
    """`hindsight_information` of the head's logits z = softcap tanh((hidden weight^T + bias) / softcap) in both streams.

        log_ratio = log q(y) - log pi(y),   kl = KL(pi || q),   information = KL(q || pi)

    Shapes
        hidden and hindsight_hidden [N,H], weight [V,H], ids and mask [N], bias [V], temperature a number or [N]; six results [N].
    Dtypes
        As `linear_logprob_entropy`. No gradient flows.
    Units
        As `hindsight_information`.
    Errors
        TypeError for what is no tensor or number; ValueError for shapes, dtypes or devices that do not fit, ids outside [0, V) (CPU), a
        temperature outside [1e-16, 1e36] (a number; a tensor is the caller's promise), a softcap outside [1e-36, 1e30].
    Source
        As `hindsight_information`.
    """
    check.implementation(impl)
    check.tensor("hidden", hidden, check.FLOAT, ndim=2)
    check.tensor("weight", weight, check.FLOAT, ndim=2)
    check.tensor("hindsight_hidden", hindsight_hidden, check.FLOAT, shape=tuple(hidden.shape), shape_name="that of hidden", device=hidden.device)
    hidden, hindsight_hidden, weight, bias = check.autocast(hidden, hindsight_hidden, weight, bias)
    check.tensor("hindsight_hidden", hindsight_hidden, (hidden.dtype,))
    check.head(hidden, weight, ids, bias, temperature, softcap, mask, coldest=check.COLDEST_DIVERGENCE)
    if impl == "reference":
        check.ids_in_range(ids, reference.active_rows(ids, mask), weight.shape[0])
        return reference.linear_hindsight_information(
            hidden, hindsight_hidden, weight, ids, bias=bias, temperature=temperature, softcap=softcap, mask=mask
        )
    return HindsightInformation(*_op(hidden, hindsight_hidden, weight, ids, bias, *number_or_tensor(temperature), softcap, mask))


def _forward_cpu(hidden, hindsight_hidden, weight, ids, bias, temperature, temperatures, softcap, mask):
    active = reference.active_rows(ids, mask)
    check.ids_in_range(ids, active, weight.shape[0])
    if _cpu.available and hidden.dtype != torch.float64:
        results = tuple(ids.new_zeros(ids.shape, dtype=torch.float32) for _ in range(6))
        _cpu.head_hindsight(hidden, hindsight_hidden, weight, ids, bias, temperature, temperatures, softcap, active.nonzero(), results)
        return results
    return _torch.linear_hindsight_information(hidden, hindsight_hidden, weight, ids, bias, temperature, temperatures, softcap, mask)


def _forward_cuda(hidden, hindsight_hidden, weight, ids, bias, temperature, temperatures, softcap, mask):
    if hidden.dtype == torch.float64:
        return _torch.linear_hindsight_information(hidden, hindsight_hidden, weight, ids, bias, temperature, temperatures, softcap, mask)
    from ._triton import linear_hindsight_information as kernels

    return kernels.forward(hidden, hindsight_hidden, weight, ids, bias, temperature, temperatures, softcap, mask)


def _fake(hidden, hindsight_hidden, weight, ids, *rest):
    return tuple(hidden.new_empty(ids.shape, dtype=reference.working_dtype(hidden.dtype)) for _ in range(6))


_op = define(
    "linear_hindsight_information(Tensor hidden, Tensor hindsight_hidden, Tensor weight, Tensor ids, Tensor? bias, float? temperature,"
    " Tensor? temperatures, float? softcap, Tensor? mask) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    cpu=_forward_cpu,
    cuda=_forward_cuda,
    fake=_fake,
)
