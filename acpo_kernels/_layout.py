"""How rows of logits lie in memory."""

from __future__ import annotations

from torch import Tensor


def row_layout(logits: Tensor) -> tuple[Tensor, int, int, int]:
    """(logits, inner, stride_outer, stride_inner): row r begins at (r // inner) stride_outer + (r % inner) stride_inner.

    Leading dimensions that lie one behind the other count as one. With more than two left over, or a last dimension that is
    not contiguous, the logits that come back are a contiguous copy.
    """
    size_v, stride_v = logits.shape[-1], logits.stride(-1)
    runs: list[list[int]] = []  # [size, stride], outermost first
    for size, stride in zip(logits.shape[:-1], logits.stride()[:-1], strict=True):
        if size == 1:
            continue
        if runs and runs[-1][1] == size * stride:
            runs[-1] = [runs[-1][0] * size, stride]
        else:
            runs.append([size, stride])
    if len(runs) > 2 or (stride_v != 1 and size_v != 1):
        return row_layout(logits.contiguous())
    if len(runs) == 2:
        return logits, max(runs[1][0], 1), runs[0][1], runs[1][1]
    size, stride = runs[0] if runs else (1, size_v)
    return logits, max(size, 1), 0, stride
