"""`linear_logprob_entropy` over a process group: every rank holds a slice of the vocabulary and all of the hidden states.

A slice p gives its own log-prob, entropy H_p, maximum m_p and centred logsumexp. With lambda_p its logsumexp about the common maximum and w_p =
exp(lambda_p - l), l = logsumexp_p lambda_p, the probability that the slice has in all,

    logp = logp_p + log w_p  in the slice that holds the target,      H = sum_p w_p (H_p - log w_p)

and the backward of a slice is the whole one's on its columns, given the common maximum, logsumexp and entropy. Exchanged are 5 numbers a row and
rank in the forward, and in the backward the sum of dHidden, of which each share has been rounded to the dtype of hidden.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import reference

# Below this share of the log-prob's gradient the entropy's is raised to it: far inside the working dtype, and never a division by 0.
LEAST = {torch.float32: 2.0**-30, torch.float64: 2.0**-56}


class VocabularyParallel(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, ids, temperature, temperatures, softcap, mask, group):
        from .linear_logprob_entropy import _op

        ctx.set_materialize_grads(False)
        sizes = _gathered(torch.full((1,), weight.shape[0], device=ids.device), group).flatten()
        active, begin = reference.active_rows(ids, mask), sizes[: dist.get_rank(group)].sum()
        _check_ids(ids, active, sizes)
        here = active & (ids >= begin) & (ids < begin + weight.shape[0])
        local = torch.where(here, ids - begin, torch.where(active, 0, reference.IGNORED))
        logp, *rest = _op(hidden, weight, local, bias, temperature, temperatures, softcap, mask)
        every = _gathered(torch.stack([torch.where(here, logp, 0.0), *rest, here.to(logp.dtype)]), group)
        logps, entropies, maxima, logsumexps, owns = every.unbind(1)  # [ranks, N] each
        maximum = maxima.amax(0)
        lambdas = (maxima - maximum) / (temperature if temperatures is None else temperatures.to(logp.dtype)) + logsumexps
        top = lambdas.argmax(0, keepdim=True)
        beside = (lambdas - lambdas.gather(0, top)).exp().scatter(0, top, 0.0).sum(0)
        log_w = lambdas - lambdas.gather(0, top) - torch.log1p(beside)
        w = log_w.exp()
        logp = torch.where(owns > 0, logps + log_w, 0.0).sum(0)
        entropy = (w * entropies - torch.where(w > 0, w * log_w, 0.0)).sum(0)
        nobody = torch.where(active & (owns.sum(0) == 0), torch.nan, 0.0)  # CUDA: an id outside the vocabulary
        logsumexp = lambdas.gather(0, top).squeeze(0) + torch.log1p(beside) + nobody  # and with it the gradient
        ctx.save_for_backward(hidden, weight, bias, local, temperatures, mask, here, entropy, maximum, logsumexp)
        ctx.temperature, ctx.softcap, ctx.group = temperature, softcap, group
        return torch.where(active, logp + nobody, 0.0), torch.where(active, entropy + nobody, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx, by_logp, by_entropy):
        from .linear_logprob_entropy import _backward_op

        if by_logp is None and by_entropy is None:
            return (None,) * 9
        hidden, weight, bias, local, temperatures, mask, here, entropy, maximum, logsumexp = ctx.saved_tensors
        by_logp, by_entropy = (torch.zeros_like(entropy) if g is None else g for g in (by_logp, by_entropy))
        # Away from its target a row's gradient is -p (by_logp + by_entropy (log p + H)) = -p by_entropy (log p + H'), H' = H + by_logp / by_entropy.
        least = LEAST[by_logp.dtype] * by_logp
        away = torch.where(by_entropy.abs() > least.abs(), by_entropy, least)
        shifted = entropy + torch.where(away == 0, 0.0, by_logp / away)
        needs = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], bias is not None and ctx.needs_input_grad[2]]
        grads = _backward_op(
            hidden, weight, local, bias, ctx.temperature, temperatures, ctx.softcap, mask, torch.where(here, by_logp, 0.0),
            torch.where(here, by_entropy, away), torch.where(here, entropy, shifted), maximum, logsumexp, needs,
        )  # fmt: skip
        if needs[0]:
            summed = grads[0].to(reference.working_dtype(hidden.dtype))
            dist.all_reduce(summed, group=ctx.group)
            grads = (summed.to(hidden.dtype), *grads[1:])
        return *(grad if need else None for grad, need in zip(grads, needs, strict=True)), *(None,) * 6


def _gathered(value: Tensor, group) -> Tensor:
    out = [torch.empty_like(value) for _ in range(dist.get_world_size(group))]
    dist.all_gather(out, value.contiguous(), group=group)
    return torch.stack(out)


def _check_ids(ids: Tensor, active: Tensor, sizes: Tensor) -> None:
    """On the host alone: on a GPU nothing is read back."""
    if ids.device.type != "cpu":
        return
    outside = active & ((ids < 0) | (ids >= sizes.sum()))
    if bool(outside.any()):
        raise ValueError(f"ids must lie in [0, {int(sizes.sum())}), the vocabulary of the whole group, or be -100; got {int(ids[outside][0])}")
