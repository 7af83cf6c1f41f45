"""Apple's cut-cross-entropy 25.1.1: log-prob alone, no entropy, no temperature (the hidden state is divided by it)."""

from __future__ import annotations

from . import require

NAME = "cut-cross-entropy"
INSTALL = "cut-cross-entropy==25.1.1"


def linear_logprob_entropy(device):
    module = require("cut_cross_entropy", INSTALL)
    implementation = "cce" if device.type == "cuda" else "torch_compile"

    def cut(hidden, weight, ids, temperature=1.0):
        scaled = hidden if temperature == 1.0 else hidden / temperature
        return -module.linear_cross_entropy(scaled, weight, ids, reduction="none", impl=implementation), None

    return {"cut-cross-entropy": cut}
