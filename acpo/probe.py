"""The `probe` source: what would the policy answer if it had to answer now?

ONE forward: behind the trajectory stand copies of "suffix + candidate answer", one for each boundary and candidate. A copy has the positions that
it would have right behind its boundary and attends to the question, the tokens up to its boundary and itself, so its log-probs are those of a
separate forward. It measures USABLE information: a policy that cannot finish the remaining steps in one jump shows nothing until the end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .config import Config, ConfigError

MAX_BOUNDARIES = 16
MAX_CANDIDATES = 4


def suffix_of(config: Config) -> str:
    """What stands between a step and an answer given at once: as configured; else a sentence, for the characters of a synthetic task a mark."""
    return config.attribution.probe_suffix or (";A" if config.problems.task else "\nThe answer is ")


def refuse_windows(model: Any) -> None:
    """ConfigError for a model with a sliding window (or chunks): the branches' mask would stand in for it in every layer, and would open it."""
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:  # then they alone say which layers have the window
        found = next((f"layer_types hold {kind!r}" for kind in kinds if kind in ("sliding_attention", "chunked_attention")), "")
    else:
        window = getattr(config, "sliding_window", None)
        found = f"sliding_window = {window}" if window and getattr(config, "use_sliding_window", True) is not False else ""
    if found:
        raise ConfigError(
            f"attribution.source = 'probe' cannot be used with {type(model).__name__}: its attention has a window ({found}), which the mask of the "
            "branches would replace"
        )


@dataclass
class Packed:
    """One rollout with its branches: ids [L], positions [L], which positions each may attend to [L,L]; and for each answer token of a branch the
    row that predicts it and the branch that it belongs to (boundary-major)."""

    ids: Tensor
    positions: Tensor
    visible: Tensor
    rows: Tensor
    branch: Tensor
    branches: int


def pack_branches(prompt: list[int], response: Tensor, ends: list[int], suffix: list[int], candidates: list[list[int]]) -> Packed:
    """ends: how many response tokens stand before each boundary; every candidate is probed at each of them."""
    trunk = [*prompt, *response.tolist()]
    n = len(trunk)
    total = n + len(ends) * sum(len(suffix) + len(c) for c in candidates)
    visible = torch.zeros(total, total, dtype=torch.bool)
    visible[:n, :n] = torch.ones(n, n, dtype=torch.bool).tril()
    ids, positions, rows, branch = list(trunk), list(range(n)), [], []
    for k, end in enumerate(ends):
        read = len(prompt) + end
        for c, answer in enumerate(candidates):
            start, length = len(ids), len(suffix) + len(answer)
            ids += [*suffix, *answer]
            positions += range(read, read + length)
            visible[start : start + length, :read] = True
            visible[start : start + length, start : start + length] = torch.ones(length, length, dtype=torch.bool).tril()
            before = start + len(suffix) - 1 if suffix else read - 1
            rows += [before if i == 0 else start + len(suffix) + i - 1 for i in range(len(answer))]
            branch += [k * len(candidates) + c] * len(answer)
    return Packed(torch.tensor(ids), torch.tensor(positions), visible, torch.tensor(rows), torch.tensor(branch), len(ends) * len(candidates))


def targets(packed: Packed, candidates: list[list[int]]) -> Tensor:
    """The ids that packed.rows predict."""
    answers = [token for answer in candidates for token in answer]
    return torch.tensor(answers * (packed.branches // len(candidates)))


def chosen_boundaries(count: int) -> list[int]:
    """At most MAX_BOUNDARIES of `count` boundaries, evenly spread, the last one among them."""
    if count <= MAX_BOUNDARIES:
        return list(range(count))
    return sorted({round((i + 1) * count / MAX_BOUNDARIES) - 1 for i in range(MAX_BOUNDARIES)})


def group_candidates(right: list[int], answers: list[list[int]]) -> list[list[int]]:
    """The right answer first, then the group's distinct answers, the most frequent first, MAX_CANDIDATES in all. One alone leaves nothing to tell
    apart: then there is no probe."""
    others: dict[tuple, int] = {}
    for answer in answers:
        if answer and answer != right:
            others[tuple(answer)] = others.get(tuple(answer), 0) + 1
    ranked = sorted(others, key=lambda a: (-others[a], a))
    return [right, *map(list, ranked[: MAX_CANDIDATES - 1])]


def posterior_evidence(logp: Tensor) -> Tensor:
    """From log p(candidate | prefix) at the question (row 0) and the boundaries [1+K, C], the right answer first: log-odds of the right answer
    among the candidates at each boundary, minus those at the question, [K]."""
    posterior = logp.double().log_softmax(1)
    odds = posterior[:, 0] - torch.logsumexp(posterior[:, 1:], 1)
    return odds[1:] - odds[0]
