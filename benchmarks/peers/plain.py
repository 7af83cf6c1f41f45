"""What everybody writes: the formulas in plain torch, eager and under torch.compile."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

NAME = "torch"


def four_lines(logits: Tensor, ids: Tensor, temperature: float = 1.0):
    scaled = logits.float() if temperature == 1.0 else logits.float() / temperature
    log_p = torch.log_softmax(scaled, -1)
    logp = log_p.gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    return logp, entropy


def linear_four_lines(hidden: Tensor, weight: Tensor, ids: Tensor, temperature: float = 1.0):
    return four_lines(hidden @ weight.T, ids, temperature)


def hindsight_lines(logits: Tensor, hindsight_logits: Tensor, ids: Tensor):
    log_p, log_q = torch.log_softmax(logits.float(), -1), torch.log_softmax(hindsight_logits.float(), -1)
    p, q = log_p.exp(), log_q.exp()
    logp, hindsight_logp = (x.gather(-1, ids.unsqueeze(-1)).squeeze(-1) for x in (log_p, log_q))
    entropy = -(p * log_p).sum(-1)
    return logp, hindsight_logp, entropy, hindsight_logp - logp, (p * (log_p - log_q)).sum(-1), (q * (log_q - log_p)).sum(-1)


def linear_hindsight_lines(hidden: Tensor, hindsight_hidden: Tensor, weight: Tensor, ids: Tensor):
    return hindsight_lines(hidden @ weight.T, hindsight_hidden @ weight.T, ids)


def _both(function, device):
    # Static shapes: the most that the compiler can do. Compiled anew for every case (see the fixture), so no case pays for another.
    return {"eager": function, "torch.compile": torch.compile(function, dynamic=False)}


logprob_entropy = partial(_both, four_lines)
linear_logprob_entropy = partial(_both, linear_four_lines)
hindsight_information = partial(_both, hindsight_lines)
linear_hindsight_information = partial(_both, linear_hindsight_lines)
