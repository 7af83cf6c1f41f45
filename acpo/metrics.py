"""What a step leaves behind: one record of numbers under the names that people know, and its rollouts as rows."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from acpo_kernels import segment_reduce

from .attribution import Attribution, binary_entropy, group_std, zero_variance
from .batch import Batch, on_host
from .problems import Problem
from .segmentation import answered, character_ends
from .verify import STATUSES


def step_metrics(
    batch: Batch, outcome: Tensor, attribution: Attribution | None, advantages: Tensor, weights: Tensor, group_size: int, filler: Tensor | None = None
) -> dict[str, float]:
    """The figures of a batch after credit: outcome [B], advantages [B] of the rollouts, weights [S] of the segments. With filler, the ids of tokens
    that are known to mean nothing, also the entropy without them: that of the decisions."""
    segments = batch.segments
    lengths = torch.tensor(batch.lengths, dtype=torch.float32)
    mismatch = batch.token["old_logp"] - batch.token["rollout_logp"]  # the engine that sampled against the training forward
    ratio = mismatch.double().clamp(-20, 20).exp()
    shaping = batch.token["advantages"] - advantages[segments.sequence_ids()]
    out = {
        "reward": float(outcome.nanmean().nan_to_num()),
        "reward_std": float(group_std(outcome, group_size).mean()),
        **passes(outcome, group_size),
        "frac_reward_zero_std": float(zero_variance(outcome, group_size).float().mean()),
        "entropy": float(batch.token["entropy"].mean()),
        "completions/mean_length": float(lengths.mean()),
        "completions/max_length": float(lengths.max()),
        "completions/clipped_ratio": 1.0 - float(batch.sequence["finished"].float().mean()),
        "segments/mean_count": segments.num_segments / segments.num_sequences,
        "segments/mean_length": float(segments.lengths.float().mean()),
        "segments/terminal_ratio": float(segments.is_terminal().sum()) / segments.num_sequences,
        "sampling/logp_difference": float(mismatch.abs().mean()),
        "sampling/logp_difference_max": float(mismatch.abs().max()),
        "sampling/kl": float((ratio - 1 - ratio.log()).mean()),  # k3 estimate of KL(engine || policy)
        "sampling/ess": float(ratio.sum() ** 2 / (len(ratio) * ratio.square().sum())),
        "credit/nonzero_ratio": float((batch.token["advantages"] != 0).float().mean()),
        "credit/shaping_abs": float(shaping.abs().mean()),
        "credit/weight_max": float(weights.max()),
        "attribution/reliability": 0.0 if attribution is None or not len(outcome) else float(attribution.reliability.max()),
    }
    if filler is not None:
        out["entropy/decisions"] = float(batch.token["entropy"][~torch.isin(batch.token["ids"], filler)].mean())
    if attribution is not None:
        out["attribution/rows"] = float(attribution.rows.float().mean())
        looked_at = max(1.0, float(attribution.rows.sum()))
        first = segments.sequence_offsets[:-1][attribution.rows & (segments.sequence_offsets.diff() > 0)]
        iota = attribution.iota[attribution.rows[segments.segment_sequence_ids()]]  # a source measures more rollouts than its credit is for
        # Equal on average where V is calibrated: the outcome's uncertainty before the first step, and what the steps were credited with.
        out["attribution/budget"] = float(binary_entropy(attribution.previous[first].double()).sum()) / looked_at
        out["attribution/iota_sum"] = float(iota.sum()) / looked_at
        if "kl" in batch.token:
            out["attribution/not_finite"] = int((~torch.isfinite(batch.token["log_ratio"] + batch.token["kl"])).sum())
    if "confidence" in batch.sequence:
        out["confidence"] = float(batch.sequence["confidence"].mean())
    return out


def passes(outcome: Tensor, group_size: int) -> dict[str, float]:
    """pass@1, the share of right rollouts (reward 1), and pass@G, that of groups with at least one, among problems that the curriculum chose. What
    the verifier left out (NaN) is not counted."""
    right = (outcome >= 1.0).view(-1, group_size)
    known = ~outcome.isnan()
    tried = known.view(-1, group_size).any(1)
    return {
        "pass@1": float(right.sum()) / max(1, int(known.sum())),
        f"pass@{group_size}": float(right.any(1).sum()) / max(1, int(tried.sum())),
    }


def rollout_rows(
    batch: Batch,
    outcome: Tensor,
    attribution: Attribution | None,
    sources: list[str],
    advantages: Tensor,
    weights: Tensor,
    rules: list[str],
    problems: list[Problem],
    group_size: int,
    tokenizer,
) -> dict[str, list[Any]]:
    """Columns of rollouts/step-N.parquet: one row a rollout, float32 lists over its segments. None stands where nothing was measured: phi, iota and
    value, and the source that they come from, outside of the attribution's rows; hindsight and centred (the sums of l_t and of l_t + KL_t, nats)
    outside of those that the hindsight stream looked at.

    outcome and advantages [B], weights [S]; sources are the names that attribution.source counts; rules [S] are the segmenter's reasons, empty for
    pieces of one length.
    """
    segments, token = batch.segments, batch.token
    means = segment_reduce(torch.stack([token["advantages"], token["entropy"], token["old_logp"]]).float(), segments, reduce="mean")
    columns: dict[str, Tensor] = dict(zip(("credit", "entropy", "logp"), means, strict=True)) | {"weight": weights}
    everywhere = torch.ones_like(outcome, dtype=torch.bool)
    where = dict.fromkeys(columns, everywhere)
    if attribution is not None:
        columns |= {"phi": attribution.phi, "iota": attribution.iota, "value": attribution.values}
        where |= dict.fromkeys(("phi", "iota", "value"), attribution.rows)
    if "log_ratio" in token and len(token["log_ratio"]) == segments.num_tokens:
        seen = torch.nan_to_num(torch.stack([token["log_ratio"], token["log_ratio"] + token["kl"]]), nan=0.0, posinf=0.0, neginf=0.0)
        columns |= dict(zip(("hindsight", "centred"), segment_reduce(seen, segments), strict=True))
        where |= dict.fromkeys(("hindsight", "centred"), batch.sequence.get("hindsight", everywhere))
    counts = segments.sequence_offsets.diff().tolist()
    responses = on_host(batch.responses())
    texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
    names = iter(rules or ["fixed"] * segments.num_segments)
    return {
        "group": [b // group_size for b in range(len(batch))],
        "problem": [p.id for p in problems],
        "answer": [p.answer for p in problems],
        "prompt": [p.prompt for p in problems],
        "response": texts,
        "outcome": [None if math.isnan(r) else r for r in outcome.tolist()],
        "verdict": [STATUSES[v] for v in batch.sequence["verdict"].tolist()],
        "finished": batch.sequence["finished"].tolist(),
        "advantage": advantages.tolist(),
        "reliability": [0.0] * len(batch) if attribution is None else attribution.reliability.tolist(),
        "source": _spoke(attribution, sources, len(batch)),
        "answered": answered(segments),
        "segment_ends": character_ends(responses, segments, texts, tokenizer),
        "segment_tokens": [part.tolist() for part in segments.lengths.split(counts)],
        "segment_rule": [list(itertools.islice(names, count)) for count in counts],
        **{
            f"segment_{name}": [
                part.numpy() if use else None for part, use in zip(value.float().cpu().split(counts), where[name].tolist(), strict=True)
            ]
            for name, value in columns.items()
        },
    }


def _spoke(attribution: Attribution | None, sources: list[str], rollouts: int) -> list[str | None]:
    """The source whose phi a rollout has."""
    if attribution is None or attribution.source is None:
        return [None] * rollouts
    return [sources[i] if looked_at else None for i, looked_at in zip(attribution.source.tolist(), attribution.rows.tolist(), strict=True)]
