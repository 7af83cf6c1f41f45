"""Values from the group's own rollouts: those that share a prefix share a state, and the others' outcomes estimate its value.

A prefix is recognised by a KEY: its exact tokens, or a canonical form of its steps in which wording, spacing and filler do not count. The
canonical form `numbers` takes a step for the numbers that stand in it.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from acpo_kernels import Segments

from .batch import on_host
from .segmentation import pieces_of

_NUMBER = re.compile(r"(?:(?<![\w)\]}])-)?\d+(?:\.\d+)?")  # a minus behind a number, a name or a bracket takes away


START = 0  # the path of a rollout that has changed nothing yet


@dataclass
class Prefixes:
    """What is recognised at each boundary [b][k]: the way there, the last step that changed the state (with its place among those that did), and
    whether this segment changed it."""

    path: list[Sequence[Hashable]]
    state: list[Sequence[Hashable]]
    changed: list[list[bool]]


def prefixes_of(ids: Tensor, segments: Segments, keys: str, tokens: Sequence[bytes]) -> Prefixes:
    """Prefixes of packed ids [N] by the kind of key that the configuration names: "tokens", or "numbers", read from each step's text; tokens as in
    `pieces_of`."""
    if keys == "tokens":
        return exact_prefixes(list(ids.split(segments.cu_seqlens.diff().tolist())), segments)
    pieces = pieces_of(ids.tolist(), tokens)
    texts = [b"".join(pieces[a:b]).decode(errors="replace") for a, b in itertools.pairwise(segments.token_offsets.tolist())]
    return canonical_prefixes([texts[a:b] for a, b in itertools.pairwise(segments.sequence_offsets.tolist())])


def exact_prefixes(responses: list[Tensor], segments: Segments) -> Prefixes:
    """Keys from token ids: the same prefix is the same tokens."""
    ends, offsets = segments.token_offsets.tolist(), segments.sequence_offsets.tolist()
    steps = []
    for b, ids in enumerate(on_host(responses)):
        data, width = ids.numpy().tobytes(), ids.element_size()
        start = ends[offsets[b]]
        steps.append([data[width * (ends[s] - start) : width * (ends[s + 1] - start)] for s in range(offsets[b], offsets[b + 1])])
    return _accumulate(steps)


def canonical_prefixes(steps: list[list[str]]) -> Prefixes:
    """Keys from the text of each step: its numbers, in order. A step without a number leaves the state as it is."""
    return _accumulate([[" ".join(_NUMBER.findall(text)).encode() for text in rollout] for rollout in steps])


def _accumulate(steps: list[list[bytes]]) -> Prefixes:
    """A path is a number for the path before it and the step: the same number for the same two, however long the rollout."""
    known: dict[tuple[int, bytes], int] = {}
    out = Prefixes([], [], [])
    for rollout in steps:
        path, state, count = START, (0, b""), 0
        paths, states = [], []
        for step in rollout:
            if step:
                count += 1
                path, state = known.setdefault((path, step), len(known) + 1), (count, step)
            paths.append(path)
            states.append(state)
        out.path.append(paths)
        out.state.append(states)
        out.changed.append([bool(step) for step in rollout])
    return out


def tree_values(prefixes: Prefixes, rewards: Tensor, group_size: int, kappa: float, by_state: bool = False, before: bool = False) -> Tensor:
    """Leave-one-out values at every boundary, [S] in float64, from the other rollouts of the group:

        V(s) = (sum of the others' R through s + kappa V') / (n + kappa)

    V' is the mean of the others; with by_state it is the same estimate over the rollouts that are in the same STATE however they came there, drawn
    to that mean in turn. Where nobody shares the prefix, V is V'. With before it is not that mean that values are drawn to but the value one boundary
    earlier: a step that nobody else took says nothing, where otherwise V jumps back to the mean. Before the first step that changes the state all
    are where they began, and V is the mean. NaN, an outcome that the verifier left out, counts nowhere.
    """
    outcome = rewards.tolist()
    values = []
    for begin in range(0, len(outcome), group_size):
        group = range(begin, begin + group_size)
        known = [r for r in outcome[begin : begin + group_size] if not math.isnan(r)]
        total = sum(known)
        tables = [_through(keys, group, outcome) for keys in ((prefixes.state, prefixes.path) if by_state else (prefixes.path,))]
        for b in group:
            own, mine = (0.0, 0) if math.isnan(outcome[b]) else (outcome[b], 1)
            base = (total - own) / max(1, len(known) - mine)
            names = (prefixes.state, prefixes.path) if by_state else (prefixes.path,)
            value = base
            for k in range(len(prefixes.path[b])):
                value = value if before else base
                begun = prefixes.path[b][k] != START
                for table, keys in zip(tables, names, strict=True) if begun else ():
                    summed, count = table.get(keys[b][k], (0.0, 0))
                    n = count - mine
                    value = (summed - own + kappa * value) / (n + kappa) if n + kappa > 0 else value
                values.append(value)
    return torch.tensor(values, dtype=torch.float64, device=rewards.device)


def _through(keys: list[Sequence[Hashable]], group: range, outcome: list[float]) -> dict[Hashable, tuple[float, int]]:
    """Sum of outcomes and number of the group's rollouts that pass through each key, each rollout once a key, none that was left out."""
    table: dict[Hashable, list[float]] = defaultdict(list)
    for b in group:
        if math.isnan(outcome[b]):
            continue
        for key in dict.fromkeys(keys[b]):
            table[key].append(outcome[b])
    return {key: (sum(found), len(found)) for key, found in table.items()}


def sharing(prefixes: Prefixes, segments: Segments, group_size: int) -> float:
    """Share of the non-terminal boundaries that some other rollout of the group passes through as well."""
    terminal = segments.is_terminal().tolist()
    offsets = segments.sequence_offsets.tolist()
    shared = total = 0
    for begin in range(0, len(prefixes.path), group_size):
        group = range(begin, begin + group_size)
        passed = Counter(key for b in group for key in {START, *prefixes.path[b]})
        for b in group:
            inside = [passed[key] > 1 for key, ends in zip(prefixes.path[b], terminal[offsets[b] :], strict=False) if not ends]
            total += len(inside)
            shared += sum(inside)
    return shared / max(total, 1)


def branch_differences(responses: list[Tensor], rewards: Tensor, group_size: int) -> Tensor:
    """The TEMPO form (arXiv 2509.18314): V(prefix) = mean outcome of ALL the group's rollouts through it, token by token, and each token gets
    V behind it minus V before it: not 0 where rollouts part alone. [N], summing to R_i - mean R over a rollout that ends alone or with its like."""
    outcome, responses, parts = rewards.tolist(), on_host(responses), []
    for begin in range(0, len(responses), group_size):
        group = range(begin, begin + group_size)
        ids = [responses[b].tolist() for b in group]
        together = [list(range(group_size))]  # rollouts of one prefix
        value = [[_known_mean(outcome[begin : begin + group_size], 0.0)] for _ in group]
        for t in range(max(map(len, ids))):
            parted: list[list[int]] = []
            for members in together:
                by_token: dict[int, list[int]] = defaultdict(list)
                for i in members:
                    if t < len(ids[i]):
                        by_token[ids[i][t]].append(i)
                parted += by_token.values()
            together = parted
            for members in together:
                mean = _known_mean([outcome[begin + i] for i in members], value[members[0]][-1])
                for i in members:
                    value[i].append(mean)
        parts += [torch.tensor(v, dtype=torch.float64).diff() for v in value]
    return torch.cat(parts).to(rewards)


def _known_mean(outcomes: list[float], otherwise: float) -> float:
    known = [r for r in outcomes if not math.isnan(r)]
    return sum(known) / len(known) if known else otherwise
