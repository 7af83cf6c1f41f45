"""Rollouts one behind the other in a single row, without padding: what the body of a causal language model is given, and whether it may be."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from .config import ConfigError


def hidden_states(model: Any, rows: list[Tensor], starts: list[int]) -> Tensor:
    """The hidden states that predict the tokens of each row from its `starts` on, packed [N,H].

    Positions that begin anew tell the rows apart: transformers makes sdpa's mask from them, causal within a row and closed between rows,
    of (all tokens)^2 booleans; flash attention takes the offsets and its variable-length kernel.
    """
    lengths, device = [len(r) for r in rows], model.device
    ends = [0, *itertools.accumulate(lengths)]
    positions = torch.cat([torch.arange(n) for n in lengths])
    # Row t predicts token t + 1: those from the end of a prompt to the token before the last.
    chosen = torch.cat([torch.arange(end + start - 1, end + n - 1) for end, start, n in zip(ends, starts, lengths, strict=False)])
    extra = {}
    if model.config._attn_implementation.startswith("flash_attention"):  # otherwise read back from the positions, in every layer
        offsets = torch.tensor(ends, dtype=torch.int32, device=device)
        extra = dict(cu_seq_lens_q=offsets, cu_seq_lens_k=offsets, max_length_q=max(lengths), max_length_k=max(lengths))
    ids = torch.cat(rows).unsqueeze(0).to(device)
    out = model.base_model(input_ids=ids, position_ids=positions.unsqueeze(0).to(device), use_cache=False, **extra).last_hidden_state[0]
    return out[chosen.to(device)]


@torch.no_grad()
def check(model: Any, precision: torch.autocast) -> None:
    """Refuses a model that would let one rollout see another, or that counts positions through: recurrent layers and convolutions carry
    their state over, some position biases know no beginning but the row's. Asked of the model itself, in three forwards of a dozen tokens."""
    training, vocabulary = model.training, model.get_input_embeddings().weight.shape[0]
    first, other, second = (torch.arange(begin, begin + n) % vocabulary for begin, n in ((0, 8), (9, 8), (3, 6)))
    model.eval()
    with precision:
        behind, behind_other = (hidden_states(model, [x, second], [1, 1])[len(x) - 1 :] for x in (first, other))
        alone = hidden_states(model, [second], [1])
    model.train(training)
    seen, moved = (float((behind - x).abs().max() / alone.abs().max()) for x in (behind_other, alone))
    # What differs between two forwards of one shape was seen; a forward of another shape also rounds otherwise.
    if not (seen <= 1e-6 and moved <= (1e-4 if alone.dtype == torch.float32 else 5e-2)):
        raise ConfigError(
            f"policy.packing: {type(model).__name__} does not keep packed rollouts apart (hidden states move by {seen:.1e} with the one in front, "
            f"by {moved:.1e} against one alone): it needs policy.packing = 'padded'"
        )
