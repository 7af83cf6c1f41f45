"""Which problems to train on: those whose success is open, by a Beta posterior a difficulty cell and Thompson sampling. Where the data names no
cells problems are drawn uniformly, as without a curriculum: one visit to a problem is no posterior of it."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from .config import ConfigError, CurriculumConfig
from .problems import Problem

MASTERED = 0.9


@dataclass
class Curriculum:
    """Beta(a, b) a cell, decayed at each visit. Of the problems of a step a share is uniform over everything, a share comes from
    mastered cells (guards against forgetting), and the rest are those whose sampled success is nearest to the centre."""

    problems: list[Problem]
    config: CurriculumConfig
    a: np.ndarray = field(init=False)
    b: np.ndarray = field(init=False)
    uniform: bool = field(init=False)

    def __post_init__(self):
        self.cells = sorted({self._name(p) for p in self.problems})
        index = {name: i for i, name in enumerate(self.cells)}
        self.cell = np.array([index[self._name(p)] for p in self.problems])
        self.a, self.b = np.ones(len(self.cells)), np.ones(len(self.cells))
        self.uniform = self.config.sampler == "uniform" or (self.config.cells == "named" and not any(p.cell for p in self.problems))

    def _name(self, problem: Problem) -> str:
        return (problem.cell if self.config.cells == "named" else "") or f"id:{problem.id}"

    def prior(self, indices: np.ndarray) -> np.ndarray:
        """Posterior mean of success for the given problems: what is known before they are tried again."""
        cells = self.cell[indices]
        return self.a[cells] / (self.a[cells] + self.b[cells])

    def sample(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """Indices of `count` problems, without repetition while there are enough."""
        if self.uniform:
            return rng.choice(len(self.problems), count, replace=count > len(self.problems))
        kind = rng.random(count)
        anywhere = int((kind < self.config.uniform_share).sum())
        mastered = int((kind >= 1 - self.config.mastered_share).sum())
        wanted = [(self._anywhere(rng), anywhere), (self._mastered(rng), mastered), (self._open(count, rng), count)]
        chosen: dict[int, None] = {}  # in order, each once
        for pool, most in wanted:
            fresh = [i for i in dict.fromkeys(pool.tolist()) if i not in chosen]
            chosen.update(dict.fromkeys(fresh[: min(most, count - len(chosen))]))
        while len(chosen) < min(count, len(self.problems)):
            chosen[int(rng.integers(len(self.problems)))] = None
        missing = count - len(chosen)
        return np.array([*chosen, *rng.integers(len(self.problems), size=missing).tolist()])

    def _anywhere(self, rng: np.random.Generator) -> np.ndarray:
        return rng.permutation(len(self.problems))

    def _mastered(self, rng: np.random.Generator) -> np.ndarray:
        return rng.permutation(np.flatnonzero((self.a / (self.a + self.b))[self.cell] > MASTERED))

    def _open(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """Of `candidates` times as many problems drawn at random those whose sampled success is nearest to the centre; all within `band` of it are
        equally near. Taking them from all problems instead would give one cell at a time, and a policy that sees one kind of problem forgets the
        others."""
        pool = rng.permutation(len(self.problems))[: self.config.candidates * count]
        drawn = rng.beta(self.a[self.cell[pool]], self.b[self.cell[pool]])
        return pool[np.argsort(np.maximum(np.abs(drawn - self.config.centre) - self.config.band, 0.0), kind="stable")]

    def update(self, indices: np.ndarray, successes: np.ndarray, trials: int) -> None:
        """Adds what was seen: successes[i] of `trials` rollouts of problem indices[i]."""
        for index, wins in zip(indices.tolist(), successes.tolist(), strict=True):
            cell = self.cell[index]
            self.a[cell] = self.config.decay * self.a[cell] + (1 - self.config.decay) + wins
            self.b[cell] = self.config.decay * self.b[cell] + (1 - self.config.decay) + trials - wins

    def metrics(self) -> dict[str, float]:
        """How hard what was tried is: shares of the visited cells whose posterior mean of success lies in [0, 0.1), [0.1, 0.2), ..., [0.9, 1]."""
        visited = self.a + self.b > 2.0 + 1e-9
        mean = (self.a / (self.a + self.b))[visited]
        counts = np.bincount(np.minimum((mean * 10).astype(int), 9), minlength=10) / max(1, len(mean))
        return {"curriculum/visited": float(visited.mean()), **{f"curriculum/share_0.{i}": float(c) for i, c in enumerate(counts)}}

    def state(self) -> dict:
        return {"cells": self.cells, "a": self.a.tolist(), "b": self.b.tolist()}

    def load(self, state: dict) -> None:
        if state["cells"] != self.cells:
            raise ConfigError("the checkpoint's curriculum is of other problems: the problem set has changed since; give another run_dir")
        self.a, self.b = np.array(state["a"]), np.array(state["b"])


def refuse_curriculum(config: CurriculumConfig, where: str) -> None:
    """ValueError for a curriculum in a loop that is not ours and draws its problems itself: it would do nothing, without a word."""
    for name, off in (("sampler", "uniform"), ("dynamic_sampling", False)):
        if (got := getattr(config, name)) != off:
            raise ValueError(f"{where}: curriculum.{name} must be left out, got {got!r}: the loop draws the prompts itself")
