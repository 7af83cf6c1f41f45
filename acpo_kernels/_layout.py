"""How rows of logits lie in memory."""

from __future__ import annotations

from torch import Tensor


def row_layout(logits: Tensor) -> tuple[Tensor, int, int, int]:
    """(logits, inner, stride_outer, stride_inner): row r begins at (r // inner) stride_outer + (r % inner) stride_inner.

    Leading dimensions that lie one behind the other count as one. With more than two left over, or a last dimension that is
    not contiguous, the logits that come back are a contiguous copy.
    """
    if logits.numel() == 0:  # whatever its strides are, it is contiguous already
        return logits, 1, 0, 0
    runs = _runs(logits)
    if runs is None:
        return row_layout(logits.contiguous())
    if len(runs) == 2:
        return logits, max(runs[1][0], 1), runs[0][1], runs[1][1]
    size, stride = runs[0] if runs else (1, logits.shape[-1])
    return logits, max(size, 1), 0, stride


def writable_in_place(logits: Tensor) -> bool:
    """Rows that `row_layout` does not copy, and that share no element with each other."""
    if logits.numel() == 0:
        return True
    runs = _runs(logits)
    if runs is None:
        return False
    if len(runs) == 2 and runs[0][1] > runs[1][1]:
        runs = runs[::-1]
    reach = logits.shape[-1]  # elements from the first to the last of the rows so far, the closest first
    for size, stride in runs:
        if stride < reach and size > 1:
            return False
        reach += (size - 1) * stride
    return True


def _runs(logits: Tensor) -> list[list[int]] | None:
    """[size, stride] of the leading dimensions, outermost first; None where at most two do not describe the rows."""
    runs: list[list[int]] = []
    for size, stride in zip(logits.shape[:-1], logits.stride()[:-1], strict=True):
        if size == 1:
            continue
        if runs and runs[-1][1] == size * stride:
            runs[-1] = [runs[-1][0] * size, stride]
        else:
            runs.append([size, stride])
    return None if len(runs) > 2 or (logits.stride(-1) != 1 and logits.shape[-1] != 1) else runs
