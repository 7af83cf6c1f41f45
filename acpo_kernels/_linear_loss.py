"""`linear_policy_loss` in PyTorch: on the CPU without the extension row by row where it matters, elsewhere as a composition.

Which rows a matrix product sees is decided here: masked rows none, rows whose gradient is exactly zero (clipped, or nothing to
learn from) the forward product alone. Products take a fixed number of rows, the last ones padded, so that a row's results do not
depend on its neighbours; no N x V tensor exists.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import _torch, reference

TILE = 64  # rows of a product on the CPU: the price of reading the weight is shared, and few rows are padded


@dataclass
class RowCount:
    """How many rows took part in a product with the weight: the forward one, and the gradient's two."""

    forward: int = 0
    gradient: int = 0


def per_token_denominator(denominator, denominators, active: Tensor, sequence_ids) -> tuple[float | None, Tensor | None]:
    """The denominator of a call as one that any piece of it can be divided by: a number, 0-d or [N]."""
    if denominators is None:
        return denominator, active.sum().clamp(min=1).double() if denominator is None else None
    if denominators.ndim == 1 and denominators.shape[0] != active.shape[0]:
        denominators = denominators[sequence_ids()]
    return None, denominators


def in_one_sweep(ratio: str, old_logp: Tensor | None) -> bool:
    """Whether a row's gradient is known as soon as its own logits are: without a ratio that is a mean over other rows."""
    return ratio == "token" or old_logp is None


def linear_policy_loss(
    hidden, weight, ids, bias, temperature, temperatures, softcap, old_logp, advantages, token_offsets, sequence_offsets, mask, clip_low,
    clip_high, ratio, entropy_weight, entropy_weights, ref_logp, kl_weight, rollout_logp, rollout_cap, denominator, denominators, needs,
):  # fmt: skip
    """The composition, for any device and without reading anything back."""
    head = (hidden, weight, ids, bias, temperature, temperatures, softcap, mask)
    logp, *statistics = _torch.linear_logprob_entropy(*head)
    entropy = statistics[0]
    loss, metrics, *grads = _torch.policy_loss(
        logp, old_logp, advantages, token_offsets, sequence_offsets, reference.active_rows(ids, mask), clip_low, clip_high, ratio, entropy,
        entropy_weight, entropy_weights, ref_logp, kl_weight, rollout_logp, rollout_cap, denominator, denominators,
    )  # fmt: skip
    grads = _torch.linear_logprob_entropy_gradients(*head, *grads, *statistics, needs)
    return loss, metrics, logp, entropy, *grads


class Sweep:
    """The rows of a call in tiles: forward, the gradient of each row's log-prob and entropy, gradient."""

    def __init__(self, hidden, weight, ids, bias, temperature, temperatures, softcap, active, needs):
        self.hidden, self.ids, self.temperature, self.temperatures = hidden, ids, temperature, temperatures
        self.head = _torch._Head(weight, bias, softcap, active)
        self.head.rows = TILE
        self.rows = RowCount()
        dtype, n = self.head.dtype, ids.shape[0]
        self.logp, self.entropy = (torch.zeros(n, dtype=dtype) for _ in range(2))
        self.needs = needs
        need_hidden, need_weight, need_bias = needs
        self.grad_hidden = torch.zeros(hidden.shape if need_hidden else 0, dtype=dtype)
        self.grad_weight = torch.zeros(weight.shape if need_weight else 0, dtype=dtype)
        self.grad_bias = torch.zeros(weight.shape[0] if need_bias else 0, dtype=dtype)
        self.held: list[tuple[Tensor, Tensor]] = []  # (row, gradient of its logits) that wait until a tile of them is full

    def forward(self, rows: Tensor) -> tuple:
        """Fills in the results of these rows; returns what `gradient` wants of them."""
        self.rows.forward += rows.shape[0]
        logits = self.head.logits_of(self.hidden, rows)
        temperature = (self.temperature, None) if self.temperatures is None else (1.0, self.temperatures[rows])
        tile = (logits, self.ids[rows], *temperature, None)
        self.logp[rows], self.entropy[rows], *rest = torch.ops.acpo_kernels.logprob_entropy(*tile)
        return rows, tile, rest

    def gradient(self, forward: tuple, grad_logp: Tensor, grad_entropy: Tensor) -> None:
        """Adds what these rows give to the gradients; rows with a zero gradient are dropped first."""
        rows, tile, (maximum, logsumexp) = forward
        grad = torch.ops.acpo_kernels.logprob_entropy_backward(
            grad_logp, grad_entropy, *tile[:2], self.entropy[rows], maximum, logsumexp, *tile[2:]
        )  # fmt: skip
        grad = self.head.before_softcap(tile[0], grad)
        upstream = _torch.has_upstream(grad_logp, grad_entropy)
        self.rows.gradient += int(upstream.sum())
        self.held.append((rows[upstream], grad[upstream]))
        if sum(part[0].shape[0] for part in self.held) >= TILE:
            rows, grad = (torch.cat(parts) for parts in zip(*self.held, strict=True))
            self._products(rows[:TILE], grad[:TILE])
            self.held = [(rows[TILE:], grad[TILE:])]

    def finish(self) -> None:
        if self.held:
            self._products(*(torch.cat(parts) for parts in zip(*self.held, strict=True)))
        self.held = []

    def _products(self, rows: Tensor, grad: Tensor) -> None:
        if rows.shape[0] == 0:
            return
        if self.needs[0]:
            self.grad_hidden[rows] = self.head.grad_hidden(grad)
        if self.needs[1]:
            self.grad_weight.addmm_(grad.T, self.hidden[rows].to(grad.dtype))
        if self.needs[2]:
            self.grad_bias += grad.sum(0)


def linear_policy_loss_cpu(
    hidden, weight, ids, bias, temperature, temperatures, softcap, old_logp, advantages, token_offsets, sequence_offsets, active, clip_low,
    clip_high, ratio, entropy_weight, entropy_weights, ref_logp, kl_weight, rollout_logp, rollout_cap, denominator, denominators, needs,
):  # fmt: skip
    """Two matrix products a row, or one sweep of forward and gradient where the ratio allows it. Returns the results and a RowCount."""
    segments = _torch._segments(token_offsets, sequence_offsets, ids.shape[0])
    denominator, denominators = per_token_denominator(denominator, denominators, active, segments.sequence_ids)
    sweep = Sweep(hidden, weight, ids, bias, temperature, temperatures, softcap, active, needs)

    def loss_of(rows: Tensor | None, offsets, sequences, mask, level):
        of = (lambda x: x) if rows is None else (lambda x: x if x is None or x.ndim == 0 else x[rows])
        return torch.ops.acpo_kernels.policy_loss(
            of(sweep.logp), of(old_logp), of(advantages), offsets, sequences, mask, clip_low, clip_high, level, of(sweep.entropy),
            entropy_weight, of(entropy_weights), of(ref_logp), kl_weight, of(rollout_logp), rollout_cap, denominator, of(denominators),
        )  # fmt: skip

    def of_all():
        return loss_of(None, token_offsets, sequence_offsets, active, ratio)

    def in_tiles(rows: Tensor):
        return rows.nonzero().squeeze(1).split(TILE) if rows.any() else ()

    tiles = in_tiles(active)
    if not any(needs):
        for rows in tiles:
            sweep.forward(rows)
        loss, metrics, _, _ = of_all()
    elif in_one_sweep(ratio, old_logp):
        for rows in tiles:
            forward = sweep.forward(rows)
            _, _, *grads = loss_of(rows, torch.tensor([0, rows.shape[0]]), torch.tensor([0, 1]), None, "token")
            sweep.gradient(forward, *grads)
        loss, metrics, _, _ = of_all()
    else:
        for rows in tiles:
            sweep.forward(rows)
        loss, metrics, *grads = of_all()
        for rows in in_tiles(active & _torch.has_upstream(*grads)):
            sweep.gradient(sweep.forward(rows), *(grad[rows] for grad in grads))
    sweep.finish()
    return (loss, metrics, sweep.logp, sweep.entropy, sweep.grad_hidden, sweep.grad_weight, sweep.grad_bias), sweep.rows
