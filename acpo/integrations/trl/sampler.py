"""Prompts by difficulty, in the order in which TRL's own sampler repeats them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from ...curriculum import Curriculum


class CurriculumSampler(Sampler):
    """As many rows as `trl.trainer.utils.RepeatSampler` would give: each generation batch holds `prompts` prompts, each `copies` times, and is
    repeated `repeats` times. Which prompts is decided when a batch is asked for, so by what the batches before the prefetched ones taught.

    A resumed run repeats the choices of the broken-off epoch instead of making them again.
    """

    def __init__(self, curriculum: Curriculum, *, prompts: int, copies: int, repeats: int, seed: int):
        self.curriculum, self.prompts, self.copies, self.repeats = curriculum, prompts, copies, repeats
        self.batches = len(curriculum.problems) // prompts
        self.rng = np.random.default_rng(seed)
        self.chosen: list[list[int]] = []  # in this epoch
        self.replay: list[list[int]] = []

    def __len__(self) -> int:
        return self.batches * self.prompts * self.copies * self.repeats

    def __iter__(self) -> Iterator[int]:
        replay, self.replay, self.chosen = self.replay, [], []
        for i in range(self.batches):
            batch = replay[i] if i < len(replay) else self.curriculum.sample(self.prompts, self.rng).tolist()
            self.chosen.append(batch)
            for _ in range(self.repeats):
                for index in batch:
                    for _ in range(self.copies):
                        yield index

    def state(self, epoch_is_over: bool) -> dict:
        """An epoch that is over is not repeated."""
        return {"chosen": [] if epoch_is_over else self.chosen, "random": self.rng.bit_generator.state}

    def load(self, state: dict) -> None:
        self.replay, self.rng.bit_generator.state = state["chosen"], state["random"]
