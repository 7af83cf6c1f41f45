"""What a run will hold, from sizes alone: an estimate, to tell a run that fits from one that does not.

Held from the first step to the last:

    weights       4 bytes a parameter (float32 always; `policy.dtype` is that of the computation)
    optimizer     8 a trained parameter (AdamW)
    reference     4 a trained parameter, with loss.kl_weight > 0 (what adapters leave alone is not held twice)
    libraries     on the host, what torch, pyarrow and matplotlib take at their first use, measured; the last two where they are not loaded yet

While sampling (engine `local`):

    cache         keys and values: 2 x layers x key-value width x bytes x tokens in flight
    logits        of one sampling step: rollouts in flight x vocabulary x 4 bytes x 3 (logits, their softmax, its running sum)

In an update:

    gradients     4 a trained parameter
    activations   what a backward keeps of one micro-batch: tokens x layers x (10 hidden + 4 intermediate) x bytes; with policy.gradient_checkpointing
                  one layer of that and `hidden` a layer
    workspace     five times the largest trained tensor in float32: the head's gradient as its forward left it, the same times the loss's, a tied
                  embedding's beside it; two more in AdamW's step

The larger of the last two counts, sampling or update. The head's own logits are never held (linear_policy_loss). Not counted: what an allocator
holds on to. Estimate and peak of the process (`acpo train`, one thread): arithmetic.yaml 683 and 674 MB; gsm8k.yaml with a tiny policy on bytes 632
and 680, with one of 9.8 million parameters on Qwen2's vocabulary of 151,936 1,125 and 1,108.
"""

from __future__ import annotations

import importlib.util
import sys
from typing import NamedTuple

from .config import Config
from .evaluation import CHUNK
from .policy import Policy

HELD, SAMPLING, UPDATE = "held", "sampling", "update"
TORCH = 40 * 2**20  # its libraries' first products and threads, on the host
LIBRARIES = {"pyarrow.parquet": 65 * 2**20, "matplotlib.pyplot": 30 * 2**20}


class Term(NamedTuple):
    name: str
    bytes: int
    when: str


def estimate(config: Config, policy: Policy, longest_prompt: int, held_out: int) -> list[Term]:
    """The terms above, largest first, without what the process holds before the policy is built. held_out: the problems of an evaluation."""
    shape = policy.model.config.get_text_config()
    parameters = sum(p.numel() for p in policy.parameters())
    trained = [p.numel() for p in policy.parameters() if p.requires_grad]
    width = 2 if config.policy.dtype == "bfloat16" else 4
    layers, hidden = shape.num_hidden_layers, shape.hidden_size
    intermediate = getattr(shape, "intermediate_size", None) or 4 * hidden
    heads = shape.num_attention_heads
    key_value = (getattr(shape, "num_key_value_heads", None) or heads) * (getattr(shape, "head_dim", None) or hidden // heads)
    length = longest_prompt + config.rollout.max_new_tokens
    rollouts = config.rollout.prompts * config.rollout.group_size
    micro = max(length, min(config.trainer.micro_batch_tokens, rollouts * length))
    layer = (10 * hidden + 4 * intermediate) * width
    kept = layer + layers * hidden * width if config.policy.gradient_checkpointing else layers * layer
    terms = [
        Term("weights", 4 * parameters, HELD), Term("optimizer", 8 * sum(trained), HELD), Term("gradients", 4 * sum(trained), UPDATE),
        Term("activations", micro * kept, UPDATE), Term("workspace", 5 * 4 * max(trained, default=0), UPDATE),
    ]  # fmt: skip
    if config.loss.kl_weight > 0:
        terms.append(Term("reference", 4 * sum(trained), HELD))
    if policy.device.type == "cpu":
        terms.append(Term("libraries", TORCH + sum(size for name, size in LIBRARIES.items() if _to_come(name)), HELD))
    if config.rollout.engine == "local":
        asked = max(rollouts, min(CHUNK, held_out * max(1, config.eval.samples)))  # an evaluation may sample more at a time
        flying = min(asked, max(1, config.rollout.batch_tokens // length))
        terms += [
            Term("cache", flying * length * 2 * layers * key_value * width, SAMPLING),
            Term("logits", flying * policy.vocab_size * 4 * 3, SAMPLING),
        ]
    return sorted(terms, key=lambda t: -t.bytes)


def total(terms: list[Term]) -> int:
    """What is held, and the larger of sampling and update beside it."""
    sums = {when: sum(t.bytes for t in terms if t.when == when) for when in (HELD, SAMPLING, UPDATE)}
    return sums[HELD] + max(sums[SAMPLING], sums[UPDATE])


def _to_come(name: str) -> bool:
    return name not in sys.modules and importlib.util.find_spec(name.partition(".")[0]) is not None


def human(size: float) -> str:
    for unit, scale in (("GB", 2**30), ("MB", 2**20), ("kB", 2**10)):
        if size >= scale:
            return f"{size / scale:.{1 if size < 100 * scale else 0}f} {unit}"
    return f"{size:.0f} B"
