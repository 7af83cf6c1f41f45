"""Liger-Kernel 0.8.5: the fused head (on Hopper it needs nvidia-cutlass-dsl and bfloat16; elsewhere 512-token chunks of torch), and its
GRPO losses, from logits in Triton and from hidden states in chunks of torch. They take one advantage a rollout and have no entropy."""

from __future__ import annotations

import os

import torch

from . import Absent, on_gpu_or_interpreted, require

NAME = "Liger"
INSTALL = "liger-kernel==0.8.5"


def linear_logprob_entropy(device):
    os.environ.setdefault("LIGER_SCALED_CE_SM90_VALIDATE_TARGETS", "0")  # its check of the targets synchronises with the host
    function = getattr(require("liger_kernel.ops", INSTALL), "LigerFusedLinearScaledCrossEntropyFunction", None)
    if function is None:
        raise Absent("this Liger has no LigerFusedLinearScaledCrossEntropyFunction (0.8.5 has)")
    if device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0):
        require("liger_kernel.ops.cutedsl.ops.fused_scaled_cross_entropy_sm90", f"'{INSTALL.replace('==', '[cutedsl]==')}'")

    def fused(hidden, weight, ids, temperature=1.0):
        nll, entropy = function.apply(hidden, weight, ids, temperature, -100, 1, True)
        return -nll, entropy

    return {"Liger": fused}


def logprob_entropy(device):
    """The log-prob kernel beside triton_grpo_loss, and that loss's gradient at advantage -1 and ratio 1, which is that of the log-prob."""
    on_gpu_or_interpreted(device)
    loss = require("liger_kernel.transformers.grpo_loss", INSTALL)

    def row(logits, ids, temperature=1.0):
        padded = torch.cat([logits, torch.zeros_like(logits[:1])]).unsqueeze(0)  # [1,L+1,V]: the last row is nobody's
        one = torch.full((1,), -1.0, device=logits.device)
        ratio, _, _ = loss.triton_grpo_loss(padded, None, None, ids.unsqueeze(0), one, temperature=temperature, beta=0.0, inplace=False, reduce=False)
        logp = loss.fused_selective_log_softmax(padded.detach(), ids.unsqueeze(0), temperature)
        return (logp + (ratio - ratio.detach()))[0], None

    return {"Liger GRPO": row}


def policy_loss_from_logits(device):
    on_gpu_or_interpreted(device)
    loss = require("liger_kernel.transformers.grpo_loss", INSTALL)

    def grpo(logits, ids, old_logp, advantages):
        return loss.triton_grpo_loss(
            logits,
            old_logp,
            None,
            ids,
            advantages,
            temperature=1.0,
            beta=0.0,
            eps_low=0.2,
            eps_high=0.28,
            inplace=False,
            loss_type="bnpo",
            reduce=True,
        )[0]

    return {"Liger triton_grpo_loss": grpo}


def linear_policy_loss(device):
    module = require("liger_kernel.chunked_loss", INSTALL)
    loss = module.LigerFusedLinearGRPOLoss(beta=0.0, epsilon_low=0.2, epsilon_high=0.28, loss_type="bnpo", use_ref_model=False)

    def grpo(hidden, weight, ids, old_logp, advantages):
        mask = torch.ones_like(ids)
        return loss(hidden, weight, ids, mask, advantages, old_per_token_logps=old_logp)[0]

    return {"Liger LigerFusedLinearGRPOLoss": grpo}
