"""`linear_policy_loss` on CUDA: the forward of linear_logprob_entropy.py, the loss, and the backward of linear_gradients.py over the rows whose
gradient is not exactly zero. Nothing is read back: which rows those are is found on the device. (2u + 6a) N H V operations, for any ratio.

Why not (2u + 4a), with the logits of the forward kept until the loss has seen them? They would have to be float32 (1,024 rows of
V = 151,936 are 622 MB), and then the weight's gradient is summed over row tiles in memory. At 8,192 tokens on an H200 (4 TB/s, 700 TF/s):
writing and reading the logits 10 GB, 2.5 ms; a float32 weight gradient read and written for eight tiles of 1,024 rows 2 V H 4 bytes each,
8.7 GB or 2.2 ms at H = 896 and 40 GB or 10 ms at H = 4096. The product that this saves costs 3.2 and 14.6 ms for rows with a
gradient alone, less where groups without reward variance and clipped tokens have none. So it would gain at most a tenth, for
some gigabytes. These are estimates; nothing here has been measured on a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference import active_rows
from . import linear_gradients, linear_logprob_entropy


def forward(
    hidden: Tensor, weight: Tensor, ids: Tensor, bias: Tensor | None, temperature, temperatures, softcap, old_logp, advantages, token_offsets,
    sequence_offsets, mask, clip_low, clip_high, ratio, entropy_weight, entropy_weights, ref_logp, kl_weight, rollout_logp, rollout_cap,
    denominator, denominators, needs,
) -> tuple[Tensor, ...]:  # fmt: skip
    """loss, metrics, logp, entropy, and the float32 gradients of hidden, weight and bias (empty where not needed) for a loss gradient of 1."""
    head = (hidden, weight, ids, bias, temperature, temperatures, softcap, mask)
    logp, *statistics = linear_logprob_entropy.forward(*head)
    loss, metrics, *grads = torch.ops.acpo_kernels.policy_loss(
        logp, old_logp, advantages, token_offsets, sequence_offsets, active_rows(ids, mask), clip_low, clip_high, ratio, statistics[0],
        entropy_weight, entropy_weights, ref_logp, kl_weight, rollout_logp, rollout_cap, denominator, denominators,
    )  # fmt: skip
    grads = linear_gradients.backward(*head, *grads, statistics, needs, dtype=torch.float32)
    return loss, metrics, logp, statistics[0], *grads
