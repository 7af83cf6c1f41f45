"""The sources that a configuration names, behind one interface: which rollouts each looks at, its evidence, its calibrator, and the pick."""

from __future__ import annotations

import itertools
from dataclasses import replace

import torch
from torch import Tensor

from .attribution import (
    MIN_BOUNDARIES,
    Attribution,
    Attributor,
    Evidence,
    entropy_evidence,
    hindsight_evidence,
    leave_one_out,
    one_of_each,
    pick,
    tree_evidence,
    zero_variance,
)
from .batch import Batch
from .config import Config
from .head import Head, boundary_rows
from .policy import Policy
from .probe import Packed, chosen_boundaries, group_candidates, pack_branches, posterior_evidence, suffix_of, targets
from .tree import Prefixes, canonical_prefixes, exact_prefixes, sharing
from .verify.answers import extract_answer


class Attributors:
    def __init__(self, config: Config, policy: Policy, tokenizer):
        self.config, self.policy, self.tokenizer = config, policy, tokenizer
        settings = config.attribution
        fixed = None if settings.reliability < 0 else settings.reliability
        names = [] if settings.source == "none" else settings.source.split(",")
        self.by_name = {name: Attributor(fixed, config.credit.gain, config.credit.value_gain, settings.slope) for name in names}
        self.head = Head(policy.head()["weight"].shape[1], config.seed) if "head" in names else None
        self.extra_tokens = 0  # of the forward passes that a source made itself in the last call

    def looks(self, name: str, outcome: Tensor) -> Tensor:
        """Which rollouts the source looks at, [B]: those that its credit is for, and where groups with both outcomes are not among them enough of
        those to measure its skill: all until there is a first measure, then one right and one wrong rollout of each."""
        acts = self.acts(name, outcome)
        if name not in self.by_name or self.by_name[name].reliability.fixed is not None:
            return acts
        first = self.by_name[name].reliability.boundaries < MIN_BOUNDARIES
        return acts | (~outcome.isnan() if first else one_of_each(outcome, self.config.rollout.group_size))

    def acts(self, name: str, outcome: Tensor) -> Tensor:
        """Which rollouts the source's credit is for, [B], none that the verifier left out. Scope `own`: the hindsight stream where the outcomes of a
        group are equal, so that they say nothing themselves; the others where they differ."""
        if name not in self.by_name:
            return torch.zeros_like(outcome, dtype=torch.bool)
        same, known = zero_variance(outcome, self.config.rollout.group_size), ~outcome.isnan()
        scope = self.config.credit.scope
        if self.config.credit.form in ("none", "ratio") or scope == "all":
            return known
        return known & (same if scope == "zero_variance" or name == "hindsight" else ~same)

    def __call__(
        self, batch: Batch, outcome: Tensor, prior: Tensor, keep: Tensor | None, answers: list[list[int]]
    ) -> tuple[Attribution | None, dict[str, float]]:
        """prior [B] is the curriculum's probability of success; keep [N] leaves out tokens that spell the answer; answers[b] are the right answer's
        tokens. Also the figures of each source."""
        found, metrics, size = [], {}, self.config.rollout.group_size
        self.extra_tokens = 0
        for name, attributor in self.by_name.items():
            # In a group without variance the others' outcomes are this outcome: what is known before the steps is the curriculum's prior.
            same = zero_variance(outcome, size)
            base = torch.where(same, prior.to(outcome.dtype), leave_one_out(outcome, size))
            evidence = self._evidence(name, batch, outcome, base, keep, answers, metrics)
            metrics[f"attribution/reliability/{name}"] = attributor.reliability.value  # of earlier batches: what gates this one
            found.append(attributor(evidence, outcome, base, batch.segments, size))
        return (pick(found, batch.segments) if found else None), metrics

    def _evidence(
        self, name: str, batch: Batch, outcome: Tensor, base: Tensor, keep: Tensor | None, answers: list[list[int]], metrics: dict[str, float]
    ) -> Evidence:
        settings, acts, segments = self.config.attribution, self.acts(name, outcome), batch.segments
        if name == "hindsight":
            rows = batch.sequence["hindsight"]
            return replace(hindsight_evidence(batch.token["log_ratio"], batch.token["kl"], segments, keep, rows, settings.clamp), acts=acts)
        if name == "entropy":
            return entropy_evidence(batch.token["entropy"], outcome, self.config.rollout.group_size, segments, acts)
        if name == "head":
            return self._head(batch, outcome, base, acts)
        if name == "probe":
            return self._probe(batch, acts, answers)
        prefixes = self._prefixes(batch)
        metrics["attribution/shared"] = sharing(prefixes, batch.segments, self.config.rollout.group_size)
        by_state = settings.keys == "numbers"
        return tree_evidence(prefixes, outcome, self.config.rollout.group_size, batch.segments, settings.kappa, by_state, acts)

    def _head(self, batch: Batch, outcome: Tensor, base: Tensor, acts: Tensor) -> Evidence:
        segments = batch.segments
        sequence, low = segments.segment_sequence_ids(), 0.5 / self.config.rollout.group_size
        order = torch.arange(segments.num_segments, device=sequence.device) - segments.sequence_offsets[:-1][sequence]
        place = (order + 1) / segments.sequence_offsets.diff()[sequence]
        features = self.head.features(batch.token["hidden"][boundary_rows(segments)], torch.logit(base.double(), low)[sequence], place)
        evidence = self.head.evidence(features).to(outcome.device)
        use = acts[sequence] & ~segments.is_terminal()
        self.head.learn(features[use.cpu()], outcome[sequence[use]])
        return Evidence(evidence, None, acts)

    def _probe(self, batch: Batch, acts: Tensor, answers: list[list[int]]) -> Evidence:
        """Candidates are the right answer and the other answers of the group; a boundary that is not probed takes the value of the one before."""
        size, segments = self.config.rollout.group_size, batch.segments
        suffix = self.tokenizer(suffix_of(self.config), add_special_tokens=False)["input_ids"]
        texts = self.tokenizer.batch_decode(batch.responses(), skip_special_tokens=True)
        given = [extract_answer(text, self.config.verify.extract) or "" for text in texts]
        own = [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in given]
        ends, offsets = segments.token_offsets.tolist(), segments.sequence_offsets.tolist()
        evidence, rows = torch.zeros(segments.num_segments, dtype=torch.float64, device=acts.device), torch.zeros_like(acts)
        jobs: list[tuple[int, list[int], list[list[int]], Packed]] = []
        for b, response in enumerate(batch.responses()):
            begin = b // size * size
            candidates = group_candidates(answers[b], own[begin : begin + size])
            if acts[b] and len(candidates) > 1:
                boundaries = chosen_boundaries(offsets[b + 1] - offsets[b])
                read = [0, *(ends[offsets[b] + k + 1] - ends[offsets[b]] for k in boundaries)]
                jobs.append((b, boundaries, candidates, pack_branches(batch.prompts[b], response, read, suffix, candidates)))
        jobs.sort(key=lambda job: -len(job[3].ids))
        rows_at_once = max(1, self.config.trainer.micro_batch_tokens // max((len(job[3].ids) for job in jobs), default=1))
        for part in (jobs[i : i + rows_at_once] for i in range(0, len(jobs), rows_at_once)):
            packed = [job[3] for job in part]
            ids = [targets(job[3], suffix, job[2]) for job in part]
            self.extra_tokens += sum(len(p.ids) for p in packed)
            found = self.policy.branch_logp(packed, ids, self.config.rollout.temperature)
            for (b, boundaries, candidates, _), logp in zip(part, found, strict=True):
                probed = posterior_evidence(logp.view(-1, len(candidates)))
                last = torch.tensor([sum(k <= s for k in boundaries) - 1 for s in range(offsets[b + 1] - offsets[b])])
                evidence[offsets[b] : offsets[b + 1]] = torch.where(last.to(probed.device) >= 0, probed[last.clamp(min=0)], 0.0)
                rows[b] = True
        return Evidence(evidence, None, rows)

    def _prefixes(self, batch: Batch) -> Prefixes:
        if self.config.attribution.keys == "tokens":
            return exact_prefixes(batch.responses(), batch.segments)
        ends, offsets = batch.segments.token_offsets.tolist(), batch.segments.sequence_offsets.tolist()
        ids = batch.token["ids"].tolist()
        texts = self.tokenizer.batch_decode([ids[a:b] for a, b in itertools.pairwise(ends)], skip_special_tokens=True)
        return canonical_prefixes([texts[a:b] for a, b in itertools.pairwise(offsets)])

    def state(self) -> dict:
        return {name: attributor.state() for name, attributor in self.by_name.items()}

    def load(self, state: dict) -> None:
        for name, attributor in self.by_name.items():
            attributor.load(state[name])
