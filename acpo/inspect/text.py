"""The same view of any traces and any model, without training: the model reads each trace once, with the answer in the prompt a second time.

What can be told from one pass, with the trainer's own kernels and formulas: segments, log-prob, entropy, hindsight (l_t summed over a step's tokens).
Credit is the additive form at reliability 1: A of the trace in its group (0 where there is no group with both outcomes) + gain times the step's
standardised, centred hindsight. V is the calibrator before it has seen an outcome: logit V = logit base + evidence. What a run measures first
(reliability, the calibration) cannot be known here, and the view says so.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from acpo_kernels import Segmenter, Segments, segment_credit, segment_reduce

from .. import credit, verify
from ..attribution import (
    Calibrator,
    answer_copies,
    hindsight_evidence,
    host,
    information,
    layout,
    leave_one_out,
    previous_in_sequence,
    standardised,
    zero_variance,
)
from ..batch import Batch
from ..config import Config
from ..policy import Policy, build
from ..problems import HINT, Problem
from ..prompts import Prompts
from ..segmentation import ForkThreshold, answered, segmenter_of
from .data import Group, InspectError, Rollout, Step, View, finite
from .traces import Trace

NOTES = (
    "credit at reliability 1 and V uncalibrated (logit V = logit base + evidence): without training neither is measured",
    "credit and hindsight need an answer: {without} of {count} traces have none",
    "{long} of {count} traces are longer than the model reads, and left out",
)

# What of a run's settings plays a part here (segmenter.fixed does not).
READS = (
    "policy.", "problems.", "verify.", "segmenter.", "rollout.temperature", "attribution.mask_answer_copies", "attribution.clamp", "credit.advantage",
    "credit.gain", "trainer.micro_batch_tokens",
)  # fmt: skip


@dataclass
class Packed:
    """Token ids of a text and where each token ends in it, in characters."""

    ids: Tensor
    ends: list[int]


def tokenized(tokenizer, texts: list[str]) -> list[Packed]:
    """Texts as ids without special tokens. ValueError for a tokenizer that cannot say where its tokens stand."""
    if not getattr(tokenizer, "is_fast", False):
        raise InspectError(f"the tokenizer must be a fast one: {type(tokenizer).__name__} does not say where its tokens stand in the text")
    out = []
    for text in texts:
        found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        out.append(Packed(torch.tensor(found["input_ids"], dtype=torch.int64), [end for _, end in found["offset_mapping"]]))
    return out


def segmented(segmenter: Segmenter, packed: list[Packed], **settings) -> tuple[Segments, list[str]]:
    """Segments of packed texts and the rule behind the end of each; settings are the segmenter's keywords."""
    ids, cu = torch.cat([p.ids for p in packed]), torch.tensor([0, *itertools.accumulate(len(p.ids) for p in packed)])
    return segmenter(ids, cu, **settings), segmenter.explain(ids, cu, **settings)


def steps_of(packed: list[Packed], texts: list[str], segments: Segments, rules: list[str]) -> list[list[Step]]:
    """The steps of each text, without numbers. The last one ends where the text does."""
    lengths, offsets, last = segments.lengths.tolist(), segments.sequence_offsets.tolist(), answered(segments)
    out = []
    for b, (text, p) in enumerate(zip(texts, packed, strict=True)):
        steps, token, start = [], 0, 0
        for s in range(offsets[b], offsets[b + 1]):
            token += lengths[s]
            final = s == offsets[b + 1] - 1
            end = len(text) if final else max(start, p.ends[token - 1])
            steps.append(Step(start, end, lengths[s], rules[s], answer=final and last[b]))
            start = end
        out.append(steps)
    return out


def inspect_traces(traces: list[Trace], settings: Config, title: str, advance: Callable[[int], None] = lambda n: None) -> View:
    """Reads the traces with the model of `policy.path`. Traces of one problem are a group. advance(n) is told of n more traces read."""
    policy, tokenizer = build(settings, writes=False)
    prompter = Prompts(settings.problems, tokenizer)
    place = {name: i for i, name in enumerate(dict.fromkeys(t.group for t in traces))}
    traces = sorted(traces, key=lambda t: place[t.group])
    problems = [_problem(t, settings) for t in traces]
    first = [tokenizer.bos_token_id or tokenizer.eos_token_id or 0]  # where a prompt is empty: something must predict the first token
    prompts, hinted = [prompter.prompt(p.prompt) or first for p in problems], [prompter.hinted(p) or first for p in problems]
    packed = tokenized(tokenizer, [t.response for t in traces])
    most = getattr(policy.model.config, "max_position_embeddings", None) or math.inf
    fits = [len(p.ids) + max(len(a), len(b)) <= most for p, a, b in zip(packed, prompts, hinted, strict=True)]
    long = len(traces) - sum(fits)
    if not any(fits):
        raise InspectError(f"the model reads at most {most:,} tokens (max_position_embeddings), and every trace is longer with its prompt")
    traces, problems, packed, prompts, hinted = (list(itertools.compress(x, fits)) for x in (traces, problems, packed, prompts, hinted))

    statuses = _judged(traces, problems, settings)
    batch = Batch.from_responses(prompts, [p.ids for p in packed])
    known = torch.tensor([bool(t.answer) for t in traces])
    advance(long)
    score(batch, policy, known, hinted, settings, advance)

    entropy = batch.token["entropy"]
    forks = {"entropy": entropy, "entropy_threshold": ForkThreshold(settings.segmenter.forking_share).update(entropy)}
    chosen = settings.segmenter
    segmenter = segmenter_of(tokenizer, chosen, policy.vocab_size)
    batch.segments, rules = segmented(segmenter, packed, **(forks if chosen.entropy and len(entropy) else {}))
    steps = steps_of(packed, [t.response for t in traces], batch.segments, rules)

    sizes = [len(list(members)) for _, members in itertools.groupby(traces, key=lambda t: t.group)]
    advantages = _fill(steps, batch, traces, sizes, known, settings, prompter)
    groups, at = [], 0
    for number, size in enumerate(sizes, 1):
        head = traces[at]
        rollouts = []
        for n, b in enumerate(range(at, at + size), 1):
            source = "hindsight" if traces[b].answer else None
            rollouts.append(Rollout(n, traces[b].response, steps[b], traces[b].outcome, *statuses[b], True, finite(advantages[b]), None, source))
        groups.append(Group(number, head.name or head.id, head.problem, head.answer, rollouts))
        at += size
    notes = [NOTES[0]] if known.any() else []
    if long:
        notes.append(NOTES[2].format(long=long, count=long + len(traces)))
    if not known.all():
        notes.append(NOTES[1].format(without=int((~known).sum()), count=len(traces)))
    return View(title, None, groups, notes)


def _problem(trace: Trace, settings: Config) -> Problem:
    prompt = settings.problems.template.replace("{problem}", trace.problem)
    return Problem(trace.id, prompt, trace.answer, question=trace.problem, hint=settings.problems.hint or HINT)


def _judged(traces: list[Trace], problems: list[Problem], settings: Config) -> list[tuple[str | None, str | None]]:
    """(status, answer that was read) of each trace; where it has an answer and no outcome, the outcome is the verifier's."""
    open_ = [b for b, t in enumerate(traces) if t.answer and t.outcome is None]
    verifier = verify.Verifier(settings.verify, verify.kind_of(settings))
    try:
        verdicts = iter(verifier([problems[b] for b in open_], [traces[b].response for b in open_]) if open_ else [])
        out = []
        for trace in traces:
            status = None
            if trace.answer and trace.outcome is None:
                trace.outcome, status = next(verdicts)
            out.append((status, verifier.answer(trace.response)))
        return out
    finally:
        verifier.close()


@torch.no_grad()
def score(batch: Batch, policy: Policy, known: Tensor, hinted: list[list[int]], settings: Config, advance) -> None:
    """Puts old_logp and entropy of every token into the batch, log_ratio and kl of those of traces with an answer (0 elsewhere): [N], nats, at the
    temperature of the settings. known [B] says which have one, hinted[b] are the prompt's ids with it; advance(n) is told of n traces."""
    nothing = batch.token["ids"].new_zeros(batch.segments.num_tokens, dtype=torch.float32)
    batch.token |= {name: nothing.clone() for name in ("old_logp", "entropy", "log_ratio", "kl")}
    temperature = settings.rollout.temperature
    for part in batch.micro_batches(list(range(len(batch))), settings.trainer.micro_batch_tokens):
        for looked_at in (True, False):
            rows = [b for b in part if bool(known[b]) == looked_at and batch.lengths[b]]
            if not rows:
                continue
            responses = batch.responses(rows)
            ids = torch.cat(responses).to(policy.device)
            plain = policy.hidden([batch.prompts[b] for b in rows], responses)
            if looked_at:
                both = policy.hindsight(plain, policy.hidden([hinted[b] for b in rows], responses), ids, temperature)
                values = {"old_logp": both.logp, "entropy": both.entropy, "log_ratio": both.log_ratio, "kl": both.kl}
            else:
                found = policy.score(plain, ids, temperature)
                values = {"old_logp": found.logp, "entropy": found.entropy}
            batch.put(rows, **{name: value.float().cpu() for name, value in values.items()})
        advance(len(part))


def _fill(
    steps: list[list[Step]], batch: Batch, traces: list[Trace], sizes: list[int], known: Tensor, settings: Config, prompter: Prompts
) -> list[float]:
    """Writes the numbers into the steps; returns the traces' advantages, NaN where there is no outcome."""
    segments, token = batch.segments, batch.token
    outcome = torch.tensor([math.nan if t.outcome is None else t.outcome for t in traces])
    groups = outcome.split(sizes)
    advantages = torch.cat([credit.outcome_advantages(r, len(r), settings.credit.advantage) for r in groups])
    # The mean of the others, in groups with both outcomes; else nothing is known before the steps.
    base = torch.cat([torch.where(zero_variance(r, len(r)), 0.5, leave_one_out(r, len(r))) for r in groups]).double()
    low = 0.5 / max(2, max(sizes))

    keep = None
    if settings.attribution.mask_answer_copies:
        spellings = [prompter.spellings(t.answer) if t.answer else [] for t in traces]
        keep = answer_copies(batch.responses(), spellings)
    evidence = hindsight_evidence(token["log_ratio"], token["kl"], segments, keep, known, settings.attribution.clamp)
    sequence, terminal = segments.segment_sequence_ids(), segments.is_terminal()
    use = known[sequence] & ~terminal
    offsets, of, _ = layout(segments)
    group = np.repeat(np.arange(len(sizes)), sizes)[of]
    score = settings.credit.gain * torch.from_numpy(standardised(host(evidence.shaping), host(use), group)).clamp(-3.0, 3.0)
    shaped = segment_credit(score, segments, advantages.double(), form="additive", gain=1.0, reliability=known.double(), scale=1.0)

    calibrator = Calibrator()
    values = calibrator.predict(host(base)[of], host(evidence.evidence), low)
    before = previous_in_sequence(values, calibrator.predict_before(host(base), low), offsets)
    iota = information(host(outcome)[of], values, before)
    seen = torch.nan_to_num(torch.stack([token["log_ratio"], token["log_ratio"] + token["kl"]]), nan=0.0, posinf=0.0, neginf=0.0)
    hindsight, centred = segment_reduce(seen, segments)
    entropy, logp = segment_reduce(torch.stack([token["entropy"], token["old_logp"]]), segments, reduce="mean")
    credited = segment_reduce(shaped.token_advantages, segments, reduce="mean")
    useful = (known | (advantages != 0))[sequence]  # without an answer and without an advantage a credit of 0 would say what nobody knows

    numbers = {
        "credit": (credited, useful), "own": (credited - advantages[sequence], use), "phi": (values - before, use), "iota": (iota, use),
        "value": (values, use), "hindsight": (hindsight, known[sequence]), "centred": (centred, known[sequence]),
        "entropy": (entropy, torch.ones_like(use)), "logp": (logp, torch.ones_like(use)),
    }  # fmt: skip
    flat = list(itertools.chain.from_iterable(steps))
    for name, (value, where) in numbers.items():
        for step, x, told in zip(flat, value.tolist(), where.tolist(), strict=True):
            setattr(step, name, finite(x) if told else None)
    return torch.where(outcome.isnan(), math.nan, advantages).tolist()
