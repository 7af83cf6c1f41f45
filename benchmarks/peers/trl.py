"""TRL 1.16: its Triton kernel on CUDA, its torch path on the CPU, and the chunked head."""

from __future__ import annotations

from . import Absent, require

NAME = "TRL"
INSTALL = "'trl==1.16.*'"


def logprob_entropy(device):
    if device.type == "cuda":
        try:
            kernels = require("trl.kernels", INSTALL)
            return {"TRL": lambda logits, ids, temperature=1.0: kernels.selective_log_softmax_and_entropy(logits, ids, temperature, None)}
        except AttributeError:
            raise Absent("this TRL has no Triton log-prob kernel (1.16 has)") from None
    utils = require("trl.trainer.utils", INSTALL)

    def torch_path(logits, ids, temperature=1.0):
        scaled = logits if temperature == 1.0 else logits / temperature
        return utils.selective_log_softmax(scaled, ids), utils.entropy_from_logits(scaled)

    return {"TRL": torch_path}


def linear_logprob_entropy(device):
    function = getattr(require("trl.kernels", INSTALL), "ChunkedLogProbFunction", None)
    if function is None:
        raise Absent("this TRL has no ChunkedLogProbFunction (1.16 has)")

    def chunked(hidden, weight, ids, temperature=1.0):
        return function.apply(hidden, weight, None, ids, temperature, 32768, None, 1.0, ("entropy",))[:2]

    return {"TRL chunked": chunked}
