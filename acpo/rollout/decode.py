"""The next token's logits of every row, from a policy and its key-value cache.

`Decoder` is transformers' own forward. `DenseDecoder` makes the very operations of a Qwen2 or Llama forward, on the same weights and in the same
order, and nothing around them: no module calls, no masks that mask nothing, and keys and values written into room that was taken once, where the
library's cache copies itself at every token. For a small model on a CPU what is around the arithmetic is nine tenths of the time.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import ConfigError
from ..policy import Policy


def decoder(policy: Policy, ids: Tensor, mask: Tensor, room: int) -> Decoder:
    """Of prompts ids [B,P], padded on the left where mask [B,P] is False, and up to `room` tokens behind each."""
    return (DenseDecoder if room > 1 and dense(policy) else Decoder)(policy, ids, mask, room)


def dense(policy: Policy) -> bool:
    """Whether DenseDecoder stands for the policy's forward: Qwen2 or Llama, float32, on a CPU, layers as transformers built them, no hooks."""
    model, config = policy.model, policy.model.config
    if type(model).__name__ not in ("Qwen2ForCausalLM", "LlamaForCausalLM") or config._attn_implementation != "sdpa" or config.hidden_act != "silu":
        return False
    if any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or ()) or policy.dtype != torch.float32:
        return False
    if model.model.rotary_emb.rope_type in ("dynamic", "longrope"):  # their angles depend on how far the text has come
        return False
    if any(p.dtype != torch.float32 or p.device.type != "cpu" or type(p) not in (Tensor, nn.Parameter) for p in model.parameters()):
        return False
    own = type(model).__module__
    return all(
        (type(m) in (nn.Linear, nn.Embedding, nn.ModuleList, nn.SiLU) or type(m).__module__ in (own, "transformers.activations"))
        and "forward" not in vars(m)
        and not (m._forward_hooks or m._forward_pre_hooks)
        for m in model.modules()
    )


class Decoder:
    """Rows [B] of one batch; `step` appends a token to each, `keep` takes these rows, each as often as it is named."""

    def __init__(self, policy: Policy, ids: Tensor, mask: Tensor, room: int):
        self.policy = policy
        self.cache: Any = None  # transformers' own, from the first forward on
        self.mask = None if bool(mask.all()) else mask  # prompts of one length need neither mask nor positions
        self.positions = (mask.cumsum(1) - 1).clamp(min=0)
        self.first = self._forward(ids)  # the logits [B,V] behind the prompts

    def _forward(self, ids: Tensor) -> Tensor:
        extra = {} if self.mask is None else {"attention_mask": self.mask.long(), "position_ids": self.positions}
        with self.policy.precision():
            out = self.policy.model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1, **extra)
        self.cache = getattr(out, "past_key_values", None)
        if self.cache is None:
            name = type(self.policy.model).__name__
            raise ConfigError(f"rollout.engine = 'local' needs a policy whose forward returns past_key_values, and {name}'s does not")
        return out.logits[:, -1]

    def step(self, chosen: Tensor) -> Tensor:
        """The logits [B,V] behind the tokens chosen [B]."""
        if self.mask is not None:
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], 1)
            self.positions = self.positions[:, -1:] + 1
        return self._forward(chosen.unsqueeze(1))

    def keep(self, rows: Tensor) -> None:
        self.cache.reorder_cache(rows)  # batch_select_indices knows nothing of recurrent states
        if self.mask is not None:
            self.mask, self.positions = self.mask[rows], self.positions[rows]


class DenseDecoder(Decoder):
    def __init__(self, policy: Policy, ids: Tensor, mask: Tensor, room: int):
        super().__init__(policy, ids, mask, room)
        body = policy.model.model
        prompts, self.length = ids.shape
        self.keys, self.values = [], []
        for layer in self.cache.layers:
            for past, into in ((layer.keys, self.keys), (layer.values, self.values)):
                grown = past.new_empty(*past.shape[:2], self.length + room, past.shape[-1])
                grown[:, :, : self.length] = past
                into.append(grown)
        self.cache = None
        ahead = torch.arange(room).unsqueeze(0) + self.positions[:, -1:] + 1  # of every row; of the first where all are alike
        cos, sin = body.rotary_emb(self.first, ahead if self.mask is not None else ahead[:1])
        sin = torch.cat([-sin[..., : sin.shape[-1] // 2], sin[..., sin.shape[-1] // 2 :]], -1)  # the sign of rotate_half
        self.cos, self.sin, self.taken = cos.unsqueeze(2), sin.unsqueeze(2), 0  # [B or 1,room,1,D]
        if self.mask is not None:
            self.mask = torch.cat([self.mask, self.mask.new_ones(prompts, room)], 1)[:, None, None]

    def step(self, chosen: Tensor) -> Tensor:
        body, n, at = self.policy.model.model, len(chosen), self.length
        cos, sin = self.cos[:, self.taken], self.sin[:, self.taken]
        self.taken, self.length = self.taken + 1, at + 1
        mask = None if self.mask is None else self.mask[..., : self.length]
        x = F.embedding(chosen, body.embed_tokens.weight)
        for layer, keys, values in zip(body.layers, self.keys, self.values, strict=True):
            attention, mlp = layer.self_attn, layer.mlp
            width = attention.head_dim
            h = _norm(layer.input_layernorm, x)
            q, k = _linear(attention.q_proj, h).view(n, -1, width), _linear(attention.k_proj, h).view(n, -1, width)
            both = torch.cat([q, k], 1)
            both = both * cos + both.roll(width // 2, -1) * sin
            keys[:, :, at] = both[:, q.shape[1] :]
            values[:, :, at] = _linear(attention.v_proj, h).view(n, -1, width)
            mixed = F.scaled_dot_product_attention(
                both[:, : q.shape[1]].unsqueeze(2), keys[:, :, : self.length], values[:, :, : self.length], attn_mask=mask,
                scale=attention.scaling, enable_gqa=attention.num_key_value_groups > 1,
            )  # fmt: skip
            x = x + _linear(attention.o_proj, mixed.reshape(n, -1))
            h = _norm(layer.post_attention_layernorm, x)
            x = x + _linear(mlp.down_proj, F.silu(_linear(mlp.gate_proj, h)) * _linear(mlp.up_proj, h))
        return _linear(self.policy.model.lm_head, _norm(body.norm, x))

    def keep(self, rows: Tensor) -> None:
        self.keys, self.values = [k[rows] for k in self.keys], [v[rows] for v in self.values]
        if self.mask is not None:
            self.mask, self.cos, self.sin = self.mask[rows], self.cos[rows], self.sin[rows]


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    parameters = layer._parameters  # layer.weight goes through nn.Module.__getattr__
    return F.linear(x, parameters["weight"], parameters["bias"])


def _norm(layer: nn.Module, x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), layer._parameters["weight"], layer.variance_epsilon)
