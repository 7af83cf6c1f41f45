"""Sampling from the policy itself, with its key-value cache."""

from __future__ import annotations

import torch
from torch import Tensor

from acpo_kernels import logprob_entropy

from ..policy import Policy
from . import Sample
from .decode import decoder

UNSCORED = 2**18  # logits that are kept until their log-probs are computed together, 1 MiB: many steps of a small vocabulary, one of a wide one
# Tokens of a prompt from which on it is read once for all of its rollouts. Below, little is gained, and rollouts stay what they were to the bit.
SHARED = 64


class LocalEngine:
    """Samples from the training policy: no second copy of the weights, and behaviour log-probs of those very weights.

    Prompts are padded on the left and sampled together, as many as fit into `batch_tokens`; a long one that several rollouts share is read
    once. Rows that have ended leave the batch as soon as they are half of it.
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
        device, longest = self.policy.device, max(map(len, prompts))
        read = [*dict.fromkeys(map(tuple, prompts))] if longest >= SHARED else [*map(tuple, prompts)]
        padded = torch.tensor([(self.policy.pad_id,) * (longest - len(p)) + p for p in read], device=device)
        mask = torch.arange(longest, device=device) >= longest - torch.tensor([*map(len, read)], device=device).unsqueeze(1)
        alive = torch.arange(len(prompts), device=device)
        going = torch.ones(len(prompts), dtype=torch.bool, device=device)  # of the alive
        ids = torch.full((max_new_tokens, len(prompts)), self.policy.pad_id, device=device)
        logp = torch.zeros(max_new_tokens, len(prompts), device=device)
        unscored: list[tuple[int, Tensor, Tensor, Tensor]] = []  # step, alive, chosen, logits

        def score() -> None:
            """The log-probs of many steps in one call: at the temperature that they were sampled at, greedy at 1."""
            chosen, logits = (torch.cat(part) for part in list(zip(*unscored, strict=True))[2:])
            found = logprob_entropy(logits, chosen, temperature=temperature or 1.0).logp
            for (step, rows, _, _), part in zip(unscored, found.split([len(rows) for _, rows, _, _ in unscored]), strict=True):
                logp[step, rows] = part
            unscored.clear()

        decode = decoder(self.policy, padded, mask, max_new_tokens)
        logits = decode.first
        if len(read) < len(prompts):
            place = {prompt: i for i, prompt in enumerate(read)}
            rows = torch.tensor([place[tuple(p)] for p in prompts], device=device)
            decode.keep(rows)
            logits = logits[rows]
        for step in range(max_new_tokens):
            chosen = sample(logits, temperature, generator)
            ids[step].index_copy_(0, alive, chosen)
            unscored.append((step, alive, chosen, logits))
            if len(unscored) * logits.numel() >= UNSCORED or step + 1 == max_new_tokens:
                score()
            going = going & (chosen.unsqueeze(1) != self.eos_ids).all(1)
            left = int(going.sum())
            if left == 0 or step + 1 == max_new_tokens:
                break
            if 2 * left <= len(alive):
                keep = going.nonzero().squeeze(1)
                decode.keep(keep)
                alive, chosen, going = alive[keep], chosen[keep], going[keep]
            logits = decode.step(chosen)
        if unscored:
            score()
        ends = torch.isin(ids[: step + 1], self.eos_ids)
        finished = ends.any(0)  # what stands behind a row's first end is nobody's
        count = torch.where(finished, ends.int().argmax(0) + 1, step + 1)
        return [Sample(ids[:n, b], logp[:n, b], done) for b, (n, done) in enumerate(zip(count.tolist(), finished.tolist(), strict=True))]


def sample(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """One token a row.

    Sampled by inverting the cumulative distribution: one uniform number a row, where torch.multinomial draws one a logit (a sixth of the
    time at V = 151,936 on CPU). A token of probability 0 is never chosen.
    """
    if temperature == 0:
        return logits.argmax(-1)
    cumulative = torch.softmax(logits.float() / temperature, -1).cumsum(-1)
    total = cumulative[:, -1:]
    u = torch.rand(total.shape, generator=generator, device=total.device) * total
    u = torch.minimum(u, torch.nextafter(total, torch.zeros_like(total)))
    # A row of NaN finds no place: any token then, its log-prob is NaN and the caller sees it there.
    return torch.searchsorted(cumulative, u, right=True).squeeze(1).clamp(max=logits.shape[-1] - 1)
