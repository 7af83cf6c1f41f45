"""What a run will hold, from sizes alone: an estimate, to tell a run that fits from one that does not.

    weights       4 bytes a parameter (float32 always; `policy.dtype` is that of the computation)
    gradients     4 a trained parameter
    optimizer     8 a trained parameter (AdamW)
    reference     4 a parameter, in stage 2 with stages.kl_weight > 0
    activations   what a backward keeps of one micro-batch: tokens x layers x (10 hidden + 4 intermediate) x bytes; with policy.gradient_checkpointing
                  one layer of that and `hidden` a layer
    cache         keys and values while sampling (engine `local`): 2 x layers x key-value width x bytes x tokens in flight
    logits        of one sampling step: rollouts in flight x vocabulary x 4 bytes x 3 (logits, their softmax, its running sum)

The head's own logits are never held (linear_policy_loss). Not counted: its workspace and what torch's libraries take at their first use, some 100 MB,
and what an allocator holds on to: runs of 86 thousand and 246 thousand parameters peaked at 0.51 and 0.9 GB where this says 0.44 and 0.58.
"""

from __future__ import annotations

from typing import NamedTuple

from .config import Config
from .evaluation import CHUNK
from .policy import Policy


class Term(NamedTuple):
    name: str
    bytes: int


def estimate(config: Config, policy: Policy, longest_prompt: int) -> list[Term]:
    """The terms above, largest first, without what the process holds before the policy is built."""
    shape = policy.model.config.get_text_config()
    parameters = sum(p.numel() for p in policy.parameters())
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    width = 2 if config.policy.dtype == "bfloat16" else 4
    layers, hidden = shape.num_hidden_layers, shape.hidden_size
    intermediate = getattr(shape, "intermediate_size", None) or 4 * hidden
    heads = shape.num_attention_heads
    key_value = (getattr(shape, "num_key_value_heads", None) or heads) * (getattr(shape, "head_dim", None) or hidden // heads)
    length = longest_prompt + config.rollout.max_new_tokens
    rollouts = config.rollout.prompts * config.rollout.group_size
    asked = max(rollouts, CHUNK)  # an evaluation samples more at a time
    micro = max(length, min(config.trainer.micro_batch_tokens, rollouts * length))
    layer = (10 * hidden + 4 * intermediate) * width
    kept = layer + layers * hidden * width if config.policy.gradient_checkpointing else layers * layer
    terms = {"weights": 4 * parameters, "gradients": 4 * trained, "optimizer": 8 * trained, "activations": micro * kept}
    if config.stages.two and config.stages.kl_weight > 0:
        terms["reference"] = 4 * parameters
    if config.rollout.engine == "local":
        flying = min(asked, max(1, config.rollout.batch_tokens // length))
        terms["cache"] = flying * length * 2 * layers * key_value * width
        terms["logits"] = flying * policy.vocab_size * 4 * 3
    return sorted((Term(name, int(size)) for name, size in terms.items()), key=lambda t: -t.bytes)


def human(size: float) -> str:
    for unit, scale in (("GB", 2**30), ("MB", 2**20), ("kB", 2**10)):
        if size >= scale:
            return f"{size / scale:.{1 if size < 100 * scale else 0}f} {unit}"
    return f"{size:.0f} B"
