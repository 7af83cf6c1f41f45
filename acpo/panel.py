"""The sources that a configuration names: which rollouts each looks at, their calibrators, the pick. What a source sees is its caller's affair."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from acpo_kernels import Segments

from .attribution import MIN_BOUNDARIES, Attribution, Attributor, Evidence, leave_one_out, one_of_each, pick, zero_variance
from .config import AttributionConfig, CreditConfig

SHUT_EVERY = 4  # batches: how often what costs a forward of its own is measured while its gate is shut


class Panel:
    """Rollouts of one problem stand side by side, group_size of them; outcome [B] is the verifier's R in [0, 1], NaN for
    a rollout that it left out: no source's credit is for it, and none looks at it."""

    def __init__(self, attribution: AttributionConfig, credit: CreditConfig, group_size: int):
        fixed = None if attribution.reliability < 0 else attribution.reliability
        self.form, self.scope, self.group_size = credit.form, credit.scope, group_size
        per_std = credit.advantage == "grpo"
        self.by_name = {name: Attributor(fixed, credit.gain, credit.value_gain, attribution.slope, per_std) for name in attribution.sources}
        self.judged: tuple[Tensor, Tensor] | None = None

    def same(self, outcome: Tensor) -> Tensor:
        """`zero_variance`, which every source asks of the same batch."""
        if self.judged is None or self.judged[0] is not outcome:
            self.judged = outcome, zero_variance(outcome, self.group_size)
        return self.judged[1]

    def acts(self, name: str, outcome: Tensor) -> Tensor:
        """Which rollouts the source's credit is for, [B]. Scope `own`: the hindsight stream where the outcomes of a group are equal, so that they say
        nothing themselves; the others where they differ."""
        if name not in self.by_name:
            return torch.zeros_like(outcome, dtype=torch.bool)
        same = self.same(outcome)
        if self.form == "ratio" or self.scope == "all":
            acts = torch.ones_like(same)
        else:
            acts = same if self.scope == "zero_variance" or name == "hindsight" else ~same
        return acts & ~outcome.isnan()

    def looks(self, name: str, outcome: Tensor) -> Tensor:
        """Which rollouts the source looks at, [B]: all until there is a first measure of its skill, then those that its credit is for and, to go on
        measuring, one right and one wrong rollout of each group with both outcomes. Nothing of a source whose gate is shut is used: it is
        only measured, in one batch of SHUT_EVERY."""
        acts = self.acts(name, outcome)
        if name not in self.by_name or self.by_name[name].reliability.fixed is not None or self.form == "ratio":  # RLSD has no gate
            return acts
        reliability, known = self.by_name[name].reliability, ~outcome.isnan()
        if reliability.boundaries < MIN_BOUNDARIES:
            return known
        measured = one_of_each(outcome, self.group_size) & known
        if reliability.value > 0:
            return acts | measured
        return measured if self.by_name[name].batches % SHUT_EVERY == 0 else torch.zeros_like(acts)

    def attribute(
        self, evidence: Callable[[str, Tensor], Evidence], outcome: Tensor, prior: Tensor, segments: Segments, finished: Tensor | None = None
    ) -> tuple[Attribution | None, dict[str, float]]:
        """evidence(name, base) is asked of each source in turn; prior [B] is the probability of success known before the problem was tried again;
        finished [B] says which rollouts ended by themselves (None: all). Also the reliabilities.

        A rollout that was cut off has no answer that its steps lead to, and what it failed in, its form, is in no value: its reliability is 0, its
        outcome is for all of it. With a mask that spared the filler of such rollouts nothing kept lines from growing longer."""
        found, metrics = [], {}
        # In a group without variance the others' outcomes are this outcome: what is known before the steps is the prior.
        base = torch.where(self.same(outcome), prior.to(outcome.dtype), leave_one_out(outcome, self.group_size))
        for name, attributor in self.by_name.items():
            seen = evidence(name, base)
            metrics[f"attribution/reliability/{name}"] = attributor.reliability.value  # of earlier batches: what gates this one
            found.append(attributor(seen, outcome, base, segments, self.group_size))
        if not found:
            return None, metrics
        picked = pick(found, segments)
        return picked if finished is None else replace(picked, reliability=picked.reliability * finished), metrics

    def state(self) -> dict:
        return {name: attributor.state() for name, attributor in self.by_name.items()}

    def load(self, state: dict) -> None:
        for name, attributor in self.by_name.items():
            attributor.load(state[name])
