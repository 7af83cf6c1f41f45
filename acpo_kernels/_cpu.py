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


def hindsight_information(
    logits: Tensor,
    hindsight_logits: Tensor,
    ids: Tensor,
    temperature: float,
    temperatures: Tensor | None,
    mask: Tensor | None,
    results: tuple[Tensor, ...],
) -> bool:
    """Fills the six results; False, and nothing filled, where an active id lies outside the vocabulary."""
    rows, _keep = _logit_rows(logits, ids, temperature, temperatures, mask)
    hindsight, _keep_too = _logit_rows(hindsight_logits, ids, temperature, temperatures, mask)
    return _C.hindsight_information(rows, hindsight, list(map(_address, results)), torch.get_num_threads()) < 0


def logprob_entropy_backward(
    grad_logp: Tensor | None,
    grad_entropy: Tensor | None,
    logits: Tensor,
    ids: Tensor,
    statistics: tuple[Tensor, Tensor, Tensor],
    temperature: float,
    temperatures: Tensor | None,
    mask: Tensor | None,
    gradient: Tensor | None,
) -> None:
    """Fills the contiguous gradient; with None the gradient takes the place of the logits."""
    rows, _keep = _logit_rows(logits, ids, temperature, temperatures, mask)
    saved = [s.contiguous() for s in statistics]
    incoming = [None if g is None else g.to(saved[0].dtype).contiguous() for g in (grad_logp, grad_entropy)]
    _C.logprob_entropy_backward(
        rows, _C.RowStatistics(0, *map(_address, saved)), *map(_address, incoming), _address(gradient), torch.get_num_threads()
    )
