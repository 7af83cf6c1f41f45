"""Dao-AILab's quack 0.6.5 (CUDA, needs nvidia-cutlass-dsl): log-prob alone, no entropy and no temperature."""

from __future__ import annotations

from . import Absent, require

NAME = "quack"
INSTALL = "quack-kernels==0.6.5"


def logprob_entropy(device):
    if device.type != "cuda":
        raise Absent("runs on CUDA alone")
    module = require("quack.cross_entropy", INSTALL)

    def row(logits, ids, temperature=1.0):
        if temperature != 1.0:
            raise NotImplementedError("no temperature")
        return -module.cross_entropy(logits, ids, reduction="none"), None

    return {"quack": row}
