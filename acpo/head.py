"""The `head` source: a small non-linear reader of the policy's own hidden states, which asks what the policy already knows about the outcome.

No forward pass of its own: the states are those of the scoring pass, detached. Prequential: it predicts a batch before it learns from it, by log
loss on a sliding window of batches.
"""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor, nn

from acpo_kernels import Segments

from .checkpoint import load_optimizer, optimizer_tensors

WINDOW = 8  # batches, as the calibrator's
UNITS = 32
EPOCHS, RATE = 20, 3e-3  # full passes over the window after each batch: some tens of milliseconds for a few thousand boundaries


def boundary_rows(segments: Segments) -> Tensor:
    """The row whose hidden state has read every token of each segment, [S]: that of the next token; at the end of a rollout the last row there is."""
    ends = segments.token_offsets[1:]
    return torch.minimum(ends, segments.cu_seqlens[1:][segments.segment_sequence_ids()] - 1)


class Head:
    """logit P(R = 1) = logit(base) + MLP(state / its norm, logit(base), k/K). The last layer starts at 0: nothing is said before it has learned."""

    def __init__(self, width: int, seed: int):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.network = nn.Sequential(nn.Linear(width + 2, UNITS), nn.Tanh(), nn.Linear(UNITS, 1))
        nn.init.zeros_(self.network[2].weight)
        nn.init.zeros_(self.network[2].bias)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=RATE, weight_decay=0.1)
        self.batches: deque = deque(maxlen=WINDOW)

    def features(self, hidden: Tensor, base: Tensor, place: Tensor) -> Tensor:
        """hidden [S,H] at the boundaries, base [S] in log-odds, place [S] in (0, 1]."""
        state = nn.functional.normalize(hidden.detach().float(), dim=-1)
        return torch.cat([state, base.float().unsqueeze(1), place.float().unsqueeze(1)], 1).cpu()

    @torch.no_grad()
    def evidence(self, features: Tensor) -> Tensor:
        return self.network(features).squeeze(1)

    def learn(self, features: Tensor, outcome: Tensor) -> None:
        """Adds a batch of boundaries, base in log-odds being their second to last feature, and fits."""
        if len(outcome):
            self.batches.append((features, outcome.float().cpu()))
        if not self.batches:
            return
        x, y = (torch.cat(parts) for parts in zip(*self.batches, strict=True))
        with torch.enable_grad():
            for _ in range(EPOCHS):
                self.optimizer.zero_grad(set_to_none=True)
                nn.functional.binary_cross_entropy_with_logits(x[:, -2] + self.network(x).squeeze(1), y).backward()
                self.optimizer.step()

    def tensors(self) -> dict[str, Tensor]:
        """All state, for a checkpoint."""
        out = {f"network.{name}": value for name, value in self.network.state_dict().items()}
        out |= {f"optimizer.{name}": value for name, value in optimizer_tensors(self.optimizer).items()}
        for i, (x, y) in enumerate(self.batches):
            out |= {f"batch.{i}.features": x, f"batch.{i}.outcome": y}
        return out

    def load(self, tensors: dict[str, Tensor]) -> None:
        self.network.load_state_dict({k.removeprefix("network."): v for k, v in tensors.items() if k.startswith("network.")})
        load_optimizer(self.optimizer, {k.removeprefix("optimizer."): v for k, v in tensors.items() if k.startswith("optimizer.")})
        count = sum(name.endswith(".features") for name in tensors)
        self.batches = deque(((tensors[f"batch.{i}.features"], tensors[f"batch.{i}.outcome"]) for i in range(count)), maxlen=WINDOW)
