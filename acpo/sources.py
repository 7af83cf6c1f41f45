"""Where a run's problems come from: a synthetic task, or a file."""

from __future__ import annotations

import numpy as np

from .config import Config, ConfigError
from .problems import Problem, load
from .synthetic import TASKS, Chain, Multiplication, problems


def load_problems(config: Config) -> tuple[Chain | Multiplication | None, list[Problem], list[Problem]]:
    """(synthetic task or None, training problems, held-out problems), the two sets disjoint."""
    settings = config.problems
    if settings.task:
        kinds = {
            "multiplication": {"digits": settings.digits},
            "chain": {name: getattr(settings, name) for name in ("steps", "modulus", "distractors", "luck", "decoys")},
        }
        try:
            task = TASKS[settings.task](
                **kinds[settings.task], hard=settings.hard, q=(settings.wrong_low, settings.wrong_high), table_seed=settings.seed
            )
            held_out = problems(task, settings.held_out, settings.seed + 1)
            train = problems(task, settings.train, settings.seed + 2, frozenset(p.id for p in held_out))
        except ValueError as error:
            raise ConfigError(str(error)) from None
        return task, train, held_out
    found = load(
        settings.path, question=settings.question, answer=settings.answer, cell=settings.cell, template=settings.template, hint=settings.hint
    )
    order = np.random.default_rng((settings.seed, 4)).permutation(len(found))
    count = min(settings.held_out, len(found) // 5)
    if count == 0:
        raise ConfigError(f"problems.path: {settings.path} holds {len(found)} problems: at least 5 are needed to keep one apart")
    return None, [found[i] for i in order[count:]], [found[i] for i in order[:count]]
