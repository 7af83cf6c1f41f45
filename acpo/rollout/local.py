"""Sampling from the policy itself, with its key-value cache."""

from __future__ import annotations

import torch
from torch import Tensor

from acpo_kernels import logprob_entropy

from ..policy import Policy
from . import Sample


class LocalEngine:
    """Samples from the training policy: no second copy of the weights, and behaviour log-probs of those very weights.

    Prompts are padded on the left and sampled together, as many as fit into `batch_tokens`; rows that have ended leave the batch as
    soon as they are half of it.
    """

    def __init__(self, policy: Policy, eos_ids: list[int], batch_tokens: int):
        self.policy, self.batch_tokens = policy, batch_tokens
        self.eos_ids = torch.tensor(eos_ids, device=policy.device)

    def sync(self) -> None:
        pass

    def close(self) -> None:
        pass

    @torch.no_grad()
    def generate(self, prompts: list[list[int]], *, max_new_tokens: int, temperature: float, generator: torch.Generator, done=None) -> list[Sample]:
        samples: list[Sample] = []
        longest = max((len(p) for p in prompts), default=0)
        rows = max(1, self.batch_tokens // (longest + max_new_tokens))
        training = self.policy.training
        self.policy.eval()
        try:
            for begin in range(0, len(prompts), rows):
                samples += self._generate(prompts[begin : begin + rows], max_new_tokens, temperature, generator)
        finally:
            self.policy.train(training)
        return samples

    def _generate(self, prompts: list[list[int]], max_new_tokens: int, temperature: float, generator: torch.Generator) -> list[Sample]:
        model, device = self.policy.model, self.policy.device
        lengths = [len(p) for p in prompts]
        longest = max(lengths)
        current = torch.tensor([[self.policy.pad_id] * (longest - len(p)) + p for p in prompts], device=device)
        mask = torch.arange(longest, device=device) >= longest - torch.tensor(lengths, device=device).unsqueeze(1)
        ragged = min(lengths) < longest  # prompts of one length need neither mask nor positions
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        alive = torch.arange(len(prompts), device=device)
        ids = torch.full((len(prompts), max_new_tokens), self.policy.pad_id, device=device)
        logp = torch.zeros(len(prompts), max_new_tokens, device=device)
        ended = torch.zeros(len(prompts), dtype=torch.bool, device=device)
        count = torch.zeros(len(prompts), dtype=torch.int64, device=device)
        cache = None
        for step in range(max_new_tokens):
            extra = {"attention_mask": mask.long(), "position_ids": positions} if ragged else {}
            with self.policy.precision():
                out = model(input_ids=current, past_key_values=cache, use_cache=True, logits_to_keep=1, **extra)
            cache = out.past_key_values
            chosen, chosen_logp = sample(out.logits[:, -1], temperature, generator)
            ids[alive, step], logp[alive, step] = chosen, chosen_logp
            count[alive] += ~ended[alive]
            ended[alive] |= torch.isin(chosen, self.eos_ids)
            going = ~ended[alive]
            left = int(going.sum())
            if left == 0:
                break
            current = chosen.unsqueeze(1)
            if ragged:
                mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
                positions = positions[:, -1:] + 1
            if 2 * left <= len(alive):
                keep = going.nonzero().squeeze(1)
                cache.batch_select_indices(keep)
                alive, current = alive[keep], current[keep]
                mask, positions = (mask[keep], positions[keep]) if ragged else (mask, positions)
        return [Sample(ids[b, :n], logp[b, :n], done) for b, (n, done) in enumerate(zip(count.tolist(), ended.tolist(), strict=True))]


def sample(logits: Tensor, temperature: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """One token a row and its log-prob at the temperature it was sampled at (greedy: at 1).

    Sampled by inverting the cumulative distribution: one uniform number a row, where torch.multinomial draws one a logit (a sixth of the
    time at V = 151,936 on CPU). A token of probability 0 is never chosen.
    """
    if temperature == 0:
        chosen = logits.argmax(-1)
    else:
        cumulative = torch.softmax(logits.float() / temperature, -1).cumsum(-1)
        total = cumulative[:, -1:]
        u = torch.rand(total.shape, generator=generator, device=total.device) * total
        u = torch.minimum(u, torch.nextafter(total, torch.zeros_like(total)))
        # A row of NaN finds no place: any token then, its log-prob is NaN and the caller sees it there.
        chosen = torch.searchsorted(cumulative, u, right=True).squeeze(1).clamp(max=logits.shape[-1] - 1)
    return chosen, logprob_entropy(logits, chosen, temperature=temperature or 1.0).logp
