"""Which problems to train on: those whose success is open, by a Beta posterior a difficulty cell and Thompson sampling."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from .config import CurriculumConfig
from .problems import Problem

CENTRE = {1: 0.5, 2: 0.35}  # success probability that a stage looks for
MASTERED = 0.9


@dataclass
class Curriculum:
    """Beta(a, b) a cell, decayed at each visit. Of the problems of a step a share is uniform over everything, a share comes from
    mastered cells (guards against forgetting), and the rest from the cells whose sampled success is nearest to the stage's centre."""

    problems: list[Problem]
    config: CurriculumConfig
    a: np.ndarray = field(init=False)
    b: np.ndarray = field(init=False)

    def __post_init__(self):
        self.cells = sorted({self._name(p) for p in self.problems})
        index = {name: i for i, name in enumerate(self.cells)}
        self.cell = np.array([index[self._name(p)] for p in self.problems])
        order = np.argsort(self.cell, kind="stable")
        self.members = np.split(order, np.cumsum(np.bincount(self.cell, minlength=len(self.cells)))[:-1])
        self.a, self.b = np.ones(len(self.cells)), np.ones(len(self.cells))

    @staticmethod
    def _name(problem: Problem) -> str:
        return problem.cell or f"id:{problem.id}"

    def prior(self, indices: np.ndarray) -> np.ndarray:
        """Posterior mean of success for the given problems: what is known before they are tried again."""
        cells = self.cell[indices]
        return self.a[cells] / (self.a[cells] + self.b[cells])

    def sample(self, count: int, stage: int, rng: np.random.Generator) -> np.ndarray:
        """Indices of `count` problems, without repetition while there are enough."""
        if self.config.sampler == "uniform":
            return rng.choice(len(self.problems), count, replace=count > len(self.problems))
        chosen: list[int] = []
        kind = rng.random(count)
        mean = self.a / (self.a + self.b)
        mastered = np.flatnonzero(mean > MASTERED)
        for k in kind:
            if k < self.config.uniform_share:
                pool = None
            elif k < self.config.uniform_share + self.config.mastered_share and len(mastered):
                pool = self.members[rng.choice(mastered)]
            else:
                drawn = rng.beta(self.a, self.b)
                pool = self.members[int(np.argmin(np.abs(drawn - CENTRE[stage])))]
            chosen.append(self._pick(pool, chosen, rng))
        return np.array(chosen)

    def _pick(self, pool: np.ndarray | None, chosen: list[int], rng: np.random.Generator) -> int:
        for _ in range(8):
            index = int(rng.integers(len(self.problems))) if pool is None else int(rng.choice(pool))
            if index not in chosen:
                return index
            if pool is not None and len(pool) <= len(chosen):
                pool = None  # the cell is used up
        return index

    def update(self, indices: np.ndarray, successes: np.ndarray, trials: int) -> None:
        """Adds what was seen: successes[i] of `trials` rollouts of problem indices[i]."""
        for index, wins in zip(indices.tolist(), successes.tolist(), strict=True):
            cell = self.cell[index]
            self.a[cell] = self.config.decay * self.a[cell] + (1 - self.config.decay) + wins
            self.b[cell] = self.config.decay * self.b[cell] + (1 - self.config.decay) + trials - wins

    def state(self) -> dict:
        return {"cells": self.cells, "a": self.a.tolist(), "b": self.b.tolist()}

    def load(self, state: dict) -> None:
        if state["cells"] != self.cells:
            raise ValueError("the checkpoint's curriculum is of other problems: the problem set has changed since")
        self.a, self.b = np.array(state["a"]), np.array(state["b"])
