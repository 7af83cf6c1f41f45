"""Liger-Kernel 0.8.5: the fused head (on Hopper it needs nvidia-cutlass-dsl and bfloat16; elsewhere 512-token chunks of torch)."""

from __future__ import annotations

import os

from . import Absent, require

NAME = "Liger"
INSTALL = "liger-kernel==0.8.5"


def linear_logprob_entropy(device):
    os.environ.setdefault("LIGER_SCALED_CE_SM90_VALIDATE_TARGETS", "0")  # its check of the targets synchronises with the host
    function = getattr(require("liger_kernel.ops", INSTALL), "LigerFusedLinearScaledCrossEntropyFunction", None)
    if function is None:
        raise Absent("this Liger has no LigerFusedLinearScaledCrossEntropyFunction (0.8.5 has)")

    def fused(hidden, weight, ids, temperature=1.0):
        nll, entropy = function.apply(hidden, weight, ids, temperature, -100, 1, True)
        return -nll, entropy

    return {"Liger": fused}
