"""Thin calls into the compiled extension: tensors go in as address, sizes, strides and dtype.

`available` is False where the package was installed with ACPO_NO_EXT=1; the operations then use PyTorch formulas.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from ._layout import row_layout

available = importlib.util.find_spec(f"{__package__}._C") is not None
if available:  # one that is there and does not load is an error, not a reason to be slow
    from . import _C


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _logit_rows(logits: Tensor, ids: Tensor, temperature: float, temperatures: Tensor | None, mask: Tensor | None):
    """The C++ view of the rows, and the tensors it points into."""
    logits, inner, stride_outer, stride_inner = row_layout(logits)
    ids = ids.to(torch.int64).contiguous()
    temperatures = None if temperatures is None else temperatures.to(torch.float64).contiguous()
    mask = None if mask is None else mask.contiguous()
    rows = _C.LogitRows(
        logits.data_ptr(), str(logits.dtype).removeprefix("torch."), ids.numel(), logits.shape[-1], inner, stride_outer, stride_inner,
        ids.data_ptr(), _address(mask), temperature, _address(temperatures),
    )  # fmt: skip
    return rows, (logits, ids, temperatures, mask)


def logprob_entropy_forward(
    logits: Tensor, ids: Tensor, temperature: float, temperatures: Tensor | None, mask: Tensor | None, results: tuple[Tensor, ...]
) -> bool:
    """Fills the four results; False, and nothing filled, where an active id lies outside the vocabulary."""
    rows, _keep = _logit_rows(logits, ids, temperature, temperatures, mask)
    return _C.logprob_entropy_forward(rows, _C.RowStatistics(*map(_address, results)), torch.get_num_threads()) < 0


def logprob_entropy_backward(
    grad_logp: Tensor | None,
    grad_entropy: Tensor | None,
    logits: Tensor,
    ids: Tensor,
    statistics: tuple[Tensor, Tensor, Tensor],
    temperature: float,
    temperatures: Tensor | None,
    mask: Tensor | None,
    gradient: Tensor,
) -> None:
    rows, _keep = _logit_rows(logits, ids, temperature, temperatures, mask)
    saved = [s.contiguous() for s in statistics]
    incoming = [None if g is None else g.to(saved[0].dtype).contiguous() for g in (grad_logp, grad_entropy)]
    _C.logprob_entropy_backward(
        rows, _C.RowStatistics(0, *map(_address, saved)), *map(_address, incoming), gradient.data_ptr(), torch.get_num_threads()
    )


def _rows(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(-1) == 1 or matrix.shape[-1] <= 1 else matrix.contiguous()


def _head(hidden, weight, ids, bias, temperature, temperatures, softcap, rows: Tensor):
    """The C++ view of the head at the rows `rows`, and the tensors it points into."""
    hidden, weight = _rows(hidden), _rows(weight)
    bias = None if bias is None else bias.to(torch.float32).contiguous()
    temperatures = None if temperatures is None else temperatures.to(torch.float64).contiguous()
    ids = ids.to(torch.int64).contiguous()
    head = _C.Head(
        hidden.data_ptr(), hidden.stride(0), weight.data_ptr(), weight.stride(0), str(hidden.dtype).removeprefix("torch."), *weight.shape,
        _address(bias), softcap or 0.0, 1.0 if temperature is None else temperature, _address(temperatures), ids.data_ptr(), rows.data_ptr(),
        rows.numel(),
    )  # fmt: skip
    return head, (hidden, weight, bias, temperatures, ids, rows)


def head_forward(hidden, weight, ids, bias, temperature, temperatures, softcap, rows: Tensor, results: tuple[Tensor, ...]) -> None:
    """Fills logp, entropy, maximum and centred logsumexp [N] at `rows`; the others are left alone."""
    head, _keep = _head(hidden, weight, ids, bias, temperature, temperatures, softcap, rows)
    _C.head_forward(head, *map(_address, results), torch.get_num_threads())


def head_backward(
    hidden, weight, ids, bias, temperature, temperatures, softcap, rows: Tensor, statistics: tuple[Tensor, Tensor, Tensor],
    upstream: tuple[Tensor | None, Tensor | None], gradients: tuple[Tensor | None, Tensor | None, Tensor | None],
) -> None:  # fmt: skip
    """Writes the gradients of hidden (at `rows`), weight and bias (float32) that are not None."""
    head, _keep = _head(hidden, weight, ids, bias, temperature, temperatures, softcap, rows)
    saved = [s.contiguous() for s in statistics]
    incoming = [None if g is None else g.to(torch.float32).contiguous() for g in upstream]
    _C.head_backward(head, *map(_address, (*saved, *incoming, *gradients)), torch.get_num_threads())


def head_hindsight(
    hidden, hindsight_hidden, weight, ids, bias, temperature, temperatures, softcap, rows: Tensor, results: tuple[Tensor, ...]
) -> None:  # fmt: skip
    """Fills the six results [N] at `rows`; the others are left alone."""
    head, _keep = _head(hidden, weight, ids, bias, temperature, temperatures, softcap, rows)
    other = _rows(hindsight_hidden)
    _C.head_hindsight(head, other.data_ptr(), other.stride(0), *map(_address, results), torch.get_num_threads())
