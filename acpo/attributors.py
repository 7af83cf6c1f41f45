"""What the sources of our own loop see: the evidence of each from a batch and, for those with a forward or a network of their own, the policy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .attribution import Attribution, Evidence, entropy_evidence, hindsight_evidence, place_in_sequence, tree_evidence
from .batch import Batch, on_host
from .config import Config
from .head import Head, boundary_rows
from .panel import Panel
from .policy import Policy
from .probe import Packed, chosen_boundaries, group_candidates, pack_branches, posterior_evidence, refuse_windows, suffix_of, targets
from .tree import prefixes_of, sharing
from .verify.answers import behind, extract_answer, normalise


class Attributors(Panel):
    def __init__(self, config: Config, policy: Policy, tokenizer, tokens: Sequence[bytes]):
        """tokens: the bytes of each id, as the segmenter has them."""
        super().__init__(config.attribution, config.credit, config.rollout.group_size)
        self.config, self.policy, self.tokenizer, self.tokens = config, policy, tokenizer, tokens
        self.head = Head(policy.head()["weight"].shape[1], config.seed) if "head" in self.by_name else None
        if "probe" in self.by_name:
            refuse_windows(policy.model)
        self.extra_tokens = 0  # of the forward passes that a source made itself in the last call

    def __call__(
        self, batch: Batch, outcome: Tensor, prior: Tensor, keep: Tensor | None, answers: list[list[int]]
    ) -> tuple[Attribution | None, dict[str, float]]:
        """prior [B] is the curriculum's probability of success; keep [N] leaves out tokens that spell the answer; answers[b] are the right answer's
        tokens (empty without the source `probe`, which alone asks for them). Also the figures of each source."""
        figures: dict[str, float] = {}
        self.extra_tokens = 0
        attribution, metrics = self.attribute(
            lambda name, base: self._evidence(name, batch, outcome, base, keep, answers, figures), outcome, prior, batch.segments,
            batch.sequence["finished"],
        )  # fmt: skip
        return attribution, {**metrics, **figures}

    def _evidence(
        self,
        name: str,
        batch: Batch,
        outcome: Tensor,
        base: Tensor,
        keep: Tensor | None,
        answers: list[list[int]],
        metrics: dict[str, float],
    ) -> Evidence:
        settings, acts, segments = self.config.attribution, self.acts(name, outcome), batch.segments
        if name == "hindsight":
            rows = batch.sequence["hindsight"]
            return replace(hindsight_evidence(batch.token["log_ratio"], batch.token["kl"], segments, keep, rows, settings.clamp), acts=acts & rows)
        if name == "entropy":
            return entropy_evidence(batch.token["entropy"], outcome, self.group_size, segments, acts)
        if name == "head":
            return self._head(batch, outcome, base, acts)
        if name == "probe":
            return self._probe(batch, outcome, acts, answers)
        prefixes = prefixes_of(batch.token["ids"], segments, settings.keys, self.tokens)
        metrics["attribution/shared"] = sharing(prefixes, segments, self.group_size)
        by_state, before = settings.keys == "numbers", settings.drawn_to == "before"
        return tree_evidence(prefixes, outcome, self.group_size, segments, settings.kappa, by_state, acts, before)

    def _head(self, batch: Batch, outcome: Tensor, base: Tensor, acts: Tensor) -> Evidence:
        segments = batch.segments
        sequence, low = segments.segment_sequence_ids(), 0.5 / self.group_size
        place = (place_in_sequence(segments) + 1) / segments.sequence_offsets.diff()[sequence]
        features = self.head.features(batch.token["hidden"][boundary_rows(segments)], torch.logit(base.double(), low)[sequence], place)
        evidence = self.head.evidence(features).to(outcome.device)
        use = acts[sequence] & ~segments.is_terminal()
        self.head.learn(features[use.cpu()], outcome[sequence[use]])
        return Evidence(evidence, None, acts)

    def _given(self, responses: list[Tensor], outcome: list[float], right: list[list[int]]) -> list[list[int]]:
        """The answer that each rollout gives, empty without one. One answer in two spellings is one answer, and the right one is as the problem
        spells it, also where only the verifier knows that it is."""
        verify, given = self.config.verify, []
        texts = self.tokenizer.batch_decode(responses, skip_special_tokens=True)
        for b, text in enumerate(texts):
            if b % self.group_size == 0:
                spelled = {normalise(self.tokenizer.decode(right[b], skip_special_tokens=True)): right[b]}
            read = behind(text, verify.after)
            answer = ("" if read is None else extract_answer(read, verify.extract)) or ""
            ids = self.tokenizer(answer, add_special_tokens=False)["input_ids"]
            given.append(right[b] if outcome[b] == 1 else spelled.setdefault(normalise(answer), ids))
        return given

    def _probe(self, batch: Batch, outcome: Tensor, acts: Tensor, answers: list[list[int]]) -> Evidence:
        """Candidates are the right answer and the other answers of the group; a boundary that is not probed takes the value of the one before, and
        one is not where a candidate behind it would stand beyond the policy's last position."""
        size, segments, responses = self.group_size, batch.segments, on_host(batch.responses())
        suffix = self.tokenizer(suffix_of(self.config), add_special_tokens=False)["input_ids"]
        own = self._given(responses, outcome.tolist(), answers)
        ends, offsets = segments.token_offsets.tolist(), segments.sequence_offsets.tolist()
        evidence, rows = torch.zeros(segments.num_segments, dtype=torch.float64, device=acts.device), torch.zeros_like(acts)
        jobs: list[tuple[int, list[int], list[list[int]], Packed]] = []
        for b, response in enumerate(responses):
            begin = b // size * size
            candidates = group_candidates(answers[b], own[begin : begin + size])
            if acts[b] and len(candidates) > 1:
                room = math.inf if self.policy.positions is None else self.policy.positions
                room -= len(batch.prompts[b]) + len(suffix) + max(map(len, candidates))
                read = {k: ends[offsets[b] + k + 1] - ends[offsets[b]] for k in chosen_boundaries(offsets[b + 1] - offsets[b])}
                boundaries = [k for k, end in read.items() if end <= room]
                if boundaries:
                    packed = pack_branches(batch.prompts[b], response, [0, *(read[k] for k in boundaries)], suffix, candidates)
                    jobs.append((b, boundaries, candidates, packed))
        jobs.sort(key=lambda job: -len(job[3].ids))
        rows_at_once = max(1, self.config.trainer.micro_batch_tokens // max((len(job[3].ids) for job in jobs), default=1))
        for part in (jobs[i : i + rows_at_once] for i in range(0, len(jobs), rows_at_once)):
            rollouts = [job[3] for job in part]
            ids = [targets(job[3], job[2]) for job in part]
            self.extra_tokens += sum(len(p.ids) for p in rollouts)
            found = self.policy.branch_logp(rollouts, ids, batch.temperature)
            for (b, boundaries, candidates, _), logp in zip(part, found, strict=True):
                probed = posterior_evidence(logp.view(-1, len(candidates)))
                last = torch.tensor([sum(k <= s for k in boundaries) - 1 for s in range(offsets[b + 1] - offsets[b])])
                evidence[offsets[b] : offsets[b + 1]] = torch.where(last.to(probed.device) >= 0, probed[last.clamp(min=0)], 0.0)
                rows[b] = True
        return Evidence(evidence, None, rows)
