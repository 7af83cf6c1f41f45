"""What a comparison says: areas under held-out accuracy, and paired differences with their intervals.

The primary figure of a run is the area under its held-out greedy accuracy against generated tokens, up to a budget and divided by it: the mean
accuracy over the budget. The budget of a seed is what the arm `against` spent on that seed; a curve that ends before it keeps its last value.
The same against all tokens that went through the policy, those of the extra forwards (hindsight, probe, reference) beside the generated ones; a token
that is only read costs less than one that is written, so this axis is the strictest. And against seconds, where the seconds of an interval between
two evaluations are the MEDIAN over the arm's seeds of its CPU seconds (one thread; on a GPU wall seconds): a machine that is busy with other things
makes noise in single runs, and that is no property of a method. Where runs were made by several versions of the code, seconds are those of one.

Over seeds: interquartile mean; the interval of a difference is the 2.5 % to 97.5 % percentile bootstrap of the interquartile mean of the PAIRED
differences, resampling seeds (Agarwal et al. 2021, arXiv 2108.13264); in seconds each resample has the medians of its own runs. It speaks for the
warm starts that the runs began with: where there are several, `by_start` holds the differences' means by warm start and what they say of another.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

BOOTSTRAP = 10_000
LEAST_SEEDS = 8  # fewer differences resampled give an interval that means nothing: then there is none
SERIES = {"entropy": "entropy", "reliability": "attribution/reliability", "zero_variance": "frac_reward_zero_std", "reward": "reward"}
AXES = ("tokens", "all_tokens", "seconds")  # generated; with those of the extra forwards; CPU
SERIES_ELSEWHERE = {"decisions": "entropy/decisions"}  # only of tasks with filler: entropy without it


# --- one run ------------------------------------------------------------------------------------------------------------------------


def run_record(records: list[dict], total_steps: int, cpu: bool) -> dict[str, Any]:
    """A run's curve at its evaluations, and what happened between them: generated tokens and seconds so far, accuracy, means of SERIES.

    A run that broke down before its end has accuracy 0 from there to the end that it would have had.
    """
    points: list[dict[str, float]] = []
    seconds, since, tokens, extra, step = 0.0, [], 0, 0, 0
    for record in records:
        if record["phase"] == "warmup":
            continue
        if record["phase"] != "start":
            seconds += record["time/cpu"] if cpu else record["step_time"]
            since.append(record)
            tokens, extra, step = record["tokens/generated"], record["tokens/forward_extra"], record["step"]
        if "eval/accuracy" in record:
            there = {**SERIES, **{n: k for n, k in SERIES_ELSEWHERE.items() if all(k in r for r in since)}} if since else {}
            means = {name: _round(np.mean([r[key] for r in since])) for name, key in there.items()}
            spent = {"tokens": tokens, "extra": extra, "seconds": _round(seconds)}
            points.append({"step": record["step"], **spent, "accuracy": record["eval/accuracy"], **means})
            since = []
    if step < total_steps:
        for s in (step + 1, total_steps):
            spent = {"tokens": tokens / step * s if step else float(s), "extra": extra / max(step, 1) * s, "seconds": seconds / max(step, 1) * s}
            points.append({"step": s, **spent, "accuracy": 0.0})
    held_out = [{k.removeprefix("eval/"): v for k, v in r.items() if k.startswith("eval/pass@")} for r in records]  # not the rollouts' own pass@k
    passes = [found for found in held_out if found]
    stage2 = next((r["step"] for r in records if r["phase"] == "stage2"), None)
    return {"points": points, "passes": passes, "stage2_from": stage2}


def _round(x: float) -> float:
    return round(float(x), 5)


def area(x: list[float], y: list[float], budget: float) -> float:
    """(1/budget) of the integral of y from 0 to budget: linear between the points, constant before the first and behind the last."""
    if budget <= 0 or len(x) < 2:
        return float(y[-1])
    x, y = ([0.0, *x], [y[0], *y]) if x[0] > 0 else (x, y)
    inside = [(a, b) for a, b in zip(x, y, strict=True) if a < budget]
    points = [*inside, (budget, float(np.interp(budget, x, y)))]
    return sum((x1 - x0) * (y0 + y1) / 2 for (x0, y0), (x1, y1) in itertools.pairwise(points)) / budget


def mean_area(record: dict) -> float:
    """The area of a run over all its own tokens: what learning rates are chosen by."""
    tokens, accuracy = [p["tokens"] for p in record["points"]], [p["accuracy"] for p in record["points"]]
    return area(tokens, accuracy, tokens[-1])


# --- over seeds ---------------------------------------------------------------------------------------------------------------------


def interquartile_mean(values: np.ndarray) -> np.ndarray:
    """Mean of the middle half along the last axis (of 16 values the middle 8; of n the outer floor(n/4) on each side are left out)."""
    values = np.sort(values, -1)
    cut = values.shape[-1] // 4
    return values[..., cut : values.shape[-1] - cut].mean(-1)


def interval(values: np.ndarray, resample: Callable[[np.ndarray], np.ndarray] | None = None, seed: int = 0) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the interquartile mean, resampling the entries. `resample` makes the entries [resamples, n] of drawn
    places [resamples, n] where they are more than values[places]."""
    drawn = np.random.default_rng(seed).integers(len(values), size=(BOOTSTRAP, len(values)))
    low, high = np.quantile(interquartile_mean(values[drawn] if resample is None else resample(drawn)), [0.025, 0.975])
    return float(low), float(high)


def difference(ours: dict[int, float], theirs: dict[int, float], resample: Callable[[np.ndarray], np.ndarray] | None = None) -> dict[str, Any] | None:
    """Paired difference over the seeds that both have, without an interval for fewer than LEAST_SEEDS; None for fewer than two."""
    seeds = sorted(set(ours) & set(theirs))
    if len(seeds) < 2:
        return None
    values = np.array([ours[s] - theirs[s] for s in seeds])
    low, high = map(_round, interval(values, resample)) if len(values) >= LEAST_SEEDS else (None, None)
    return {
        "seeds": len(seeds), "iqm": _round(interquartile_mean(values)), "low": low, "high": high,
        "mean": _round(values.mean()), "standard_error": _round(values.std(ddof=1) / len(values) ** 0.5), "wins": int((values > 0).sum()),
    }  # fmt: skip


T_975 = (math.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # Student's t, by degrees of freedom


def by_start(ours: dict[int, float], theirs: dict[int, float], starts: list[int]) -> dict[str, Any] | None:
    """The paired difference's mean by warm start (the runs' seeds go round them by turns), the mean of those and half the width of its 95 % interval
    by Student's t: what the runs say of a warm start that was not tried. None for fewer than two, and without an interval for more than ten."""
    found: dict[int, list[float]] = {}
    for s in sorted(set(ours) & set(theirs)):
        found.setdefault(starts[s % len(starts)], []).append(ours[s] - theirs[s])
    if len(found) < 2:
        return None
    means = np.array([np.mean(v) for v in found.values()])
    half = T_975[len(means) - 1] * means.std(ddof=1) / len(means) ** 0.5 if len(means) <= len(T_975) else None
    return {
        "means": {start: _round(mean) for start, mean in zip(found, means, strict=True)},
        "mean": _round(means.mean()), "half_width": None if half is None else _round(half),
    }  # fmt: skip


class Clock:
    """An arm in time. The seconds between two evaluations are the median over its timed runs; accuracies are of all its runs, on the steps at which
    any of them has a point: one that broke down has some of its own."""

    def __init__(self, runs: dict[int, dict], timed: dict[int, dict]):
        whole = {s: r for s, r in timed.items() if not r.get("failure")} or timed
        self.steps = max(([p["step"] for p in r["points"]] for r in whole.values()), key=len)
        self.timed = sorted(whole)
        self.taken = np.array([np.diff(np.interp(self.steps, *_series(whole[s], "step", "seconds"))) for s in self.timed])
        self.seeds = sorted(runs)
        self.grid = sorted({p["step"] for r in runs.values() for p in r["points"]})
        self.accuracy = np.array([np.interp(self.grid, *_series(runs[s], "step", "accuracy")) for s in self.seeds])

    def elapsed(self, drawn: np.ndarray | None = None) -> np.ndarray:
        """Seconds until each of `steps` [resamples, steps], by the timed runs drawn [resamples, n]; without drawn by all of them, one resample."""
        taken = np.median(self.taken[np.arange(len(self.timed))[None] if drawn is None else drawn], axis=1)
        return np.concatenate([np.zeros((len(taken), 1)), np.cumsum(taken, 1)], 1)

    def areas(self, elapsed: np.ndarray, budget: np.ndarray) -> np.ndarray:
        """What `area` says of every run [resamples, seeds], at seconds until each of `steps` [resamples, steps] and budgets [resamples]."""
        at = np.interp(self.grid, self.steps, range(len(self.steps)))
        left = np.minimum(at.astype(int), max(len(self.steps) - 2, 0))
        part = at - left
        t = elapsed[:, left] * (1 - part) + elapsed[:, np.minimum(left + 1, len(self.steps) - 1)] * part
        width, budget = np.diff(t), np.maximum(budget, 1e-12)[:, None]
        inside = np.clip((budget - t[:, :-1]) / np.maximum(width, 1e-12), 0.0, 1.0)  # how much of each interval is within the budget
        weight = np.zeros_like(t)
        weight[:, :-1] += width * (inside - inside**2 / 2)
        weight[:, 1:] += width * inside**2 / 2
        weight[:, -1:] += np.maximum(budget - t[:, -1:], 0.0)
        return weight @ self.accuracy.T / budget


def _series(record: dict, x: str, y: str) -> tuple[list, list]:
    return [p[x] for p in record["points"]], [p[y] for p in record["points"]]


def clocks(runs: dict[str, dict[int, dict]], against: str) -> dict[str, Clock]:
    """Of the arms that were timed beside `against`, on the seeds that both have; none where that one was not."""
    reference = runs.get(against, {})
    timed = _timed({arm: {s: r for s, r in found.items() if s in reference} for arm, found in runs.items()}, reference)
    return {arm: Clock({s: runs[arm][s] for s in runs[arm] if s in reference}, found) for arm, found in timed.items()} if against in timed else {}


def seconds_difference(arms: dict[str, Clock], arm: str, other: str, against: str) -> dict[str, Any] | None:
    """`difference` of two arms' areas in equal seconds. A resample draws seeds, and each arm's clock is that of its runs of these seeds (an arm that
    was timed on fewer of them: of as many draws of those)."""
    if arm not in arms or other not in arms:
        return None
    budget = arms[against].elapsed()[:, -1]
    ours, theirs = (dict(zip(c.seeds, c.areas(c.elapsed(), budget)[0], strict=True)) for c in (arms[arm], arms[other]))
    seeds = sorted(set(ours) & set(theirs))

    def resample(drawn: np.ndarray) -> np.ndarray:
        rng = np.random.default_rng(1)

        def elapsed(clock: Clock) -> np.ndarray:
            if set(seeds) <= set(clock.timed):
                return clock.elapsed(np.array([clock.timed.index(s) for s in seeds])[drawn])
            return clock.elapsed(rng.integers(len(clock.timed), size=(len(drawn), len(clock.timed))))

        budgets = elapsed(arms[against])[:, -1]
        areas = []
        for clock in (arms[arm], arms[other]):
            found = clock.areas(elapsed(clock), budgets)
            areas.append(np.take_along_axis(found, np.array([clock.seeds.index(s) for s in seeds])[drawn], 1))
        return areas[0] - areas[1]

    return difference(ours, theirs, resample)


def summarise(runs: dict[str, dict[int, dict]], against: str, baselines: list[str], starts: list[int] | None = None) -> dict[str, Any]:
    """The table: runs[arm][seed] are the records of finished runs; arms without any are left out. starts are the warm starts, where there are
    several.

    The best baseline is the one of highest mean area against `against` on the seeds that the candidates have in common, which favours it, among those
    that were run on more than half of the seeds of `against`.
    """
    runs = {arm: found for arm, found in runs.items() if found}
    reference = runs.get(against, {})
    arms: dict[str, dict[str, Any]] = {}
    timed = clocks(runs, against)
    areas: dict[str, dict[str, dict[int, float]]] = {axis: {arm: {} for arm in runs} for axis in AXES}
    at_budget: dict[str, list[float]] = {arm: [] for arm in runs}
    for arm, found in runs.items():
        for s in sorted(set(found) & set(reference)):
            points, budget = found[s]["points"], reference[s]["points"][-1]
            accuracy = [p["accuracy"] for p in points]
            areas["tokens"][arm][s] = area([p["tokens"] for p in points], accuracy, budget["tokens"])
            at_budget[arm].append(float(np.interp(budget["tokens"], [p["tokens"] for p in points], accuracy)))
            if "extra" in points[0] and "extra" in budget:
                areas["all_tokens"][arm][s] = area([p["tokens"] + p["extra"] for p in points], accuracy, budget["tokens"] + budget["extra"])
    for arm, clock in timed.items():
        budget = timed[against].elapsed()[:, -1]
        areas["seconds"][arm] = dict(zip(clock.seeds, map(float, clock.areas(clock.elapsed(), budget)[0]), strict=True))
    gain = {b: {s: a - areas["tokens"][against][s] for s, a in areas["tokens"][b].items()} for b in baselines if b in runs}
    gain = {b: found for b, found in gain.items() if 2 * len(found) > len(reference)}
    common = set(reference).intersection(*gain.values())
    best = max(gain, key=lambda b: float(np.mean([g for s, g in gain[b].items() if s in common or not common])), default=against)
    for arm, found in runs.items():
        values = {axis: areas[axis][arm] for axis in areas}
        if not values["tokens"]:
            continue
        others = [(name, other) for name, other in (("against", against), ("best_baseline", best)) if arm != other]
        arms[arm] = {
            "seeds": sorted(values["tokens"]),
            "failures": [f"seed {s}: {r['failure']}" for s, r in sorted(found.items()) if r.get("failure")],
            **{f"area_{axis}": _round(interquartile_mean(np.array(list(v.values())))) for axis, v in values.items() if v},
            **{f"area_{axis}_by_seed": {s: _round(a) for s, a in v.items()} for axis, v in values.items()},
            **{
                f"{name}_{axis}": (
                    seconds_difference(timed, arm, other, against) if axis == "seconds" else difference(values[axis], areas[axis].get(other, {}))
                )
                for axis in areas
                for name, other in others
            },
            **{f"{n}_by_start": by_start(values["tokens"], areas["tokens"].get(b, {}), starts) for n, b in others if starts},
            "at_budget": _round(interquartile_mean(np.array(at_budget[arm]))),
            **_ends({s: found[s] for s in values["tokens"]}),
            "seconds": round(float(timed[arm].elapsed()[0, -1]), 2) if arm in timed else None,
        }
    return {"against": against, "best_baseline": best, "arms": arms}


def _timed(runs: dict[str, dict[int, dict]], reference: dict[int, dict]) -> dict[str, dict[int, dict]]:
    """The runs of one code, of those that made runs of the reference the one that made most runs: a faster loop is no property of an arm."""
    made = Counter(r.get("code") for found in runs.values() for r in found.values())
    code = max({r.get("code") for r in reference.values()}, key=lambda code: (made[code], str(code)), default=None)
    own = {arm: {s: r for s, r in found.items() if r.get("code") == code} for arm, found in runs.items()}
    return {arm: found for arm, found in own.items() if found}


def _ends(found: dict[int, dict]) -> dict[str, Any]:
    """Of the runs' own ends: accuracy, pass@k, entropy (where filler is known, that of the other tokens as well: the decisions), reliability and
    groups without variance, interquartile means over the seeds. Of what a run that broke down before never had (entropy, reliability)
    it is the others' mean; its accuracy and pass@k are 0."""
    records = list(found.values())

    def over(values: list[float | None]) -> float | None:
        values = [v for v in values if v is not None]
        return _round(interquartile_mean(np.array(values))) if values else None

    out = {
        "before": over([r["points"][0]["accuracy"] for r in records]),
        "after": over([r["points"][-1]["accuracy"] for r in records]),
        "entropy_first": over([_first(r, "entropy") for r in records]),
        "entropy_stage1_end": over([_stage1_end(r, "entropy") for r in records]),
        "decisions_first": over([_first(r, "decisions") for r in records]),
        "decisions_stage1_end": over([_stage1_end(r, "decisions") for r in records]),
        "entropy_last": over([r["points"][-1].get("entropy") for r in records]),
        "stage2_from": over([r["stage2_from"] for r in records]),
    }
    for name in ("reliability", "zero_variance"):
        seen = [[p[name] for p in r["points"] if name in p] for r in records]
        out[name] = over([float(np.mean(values)) if values else None for values in seen])
    for name in sorted({k for r in records for p in r["passes"] for k in p}):
        out[f"{name} after"] = over([0.0 if r.get("failure") else r["passes"][-1].get(name) for r in records if r["passes"] or r.get("failure")])
    return out


def _first(record: dict, name: str) -> float | None:
    return next((p[name] for p in record["points"] if name in p), None)


def _stage1_end(record: dict, name: str) -> float | None:
    """The mean of a series between the last two evaluations of stage 1; without a second stage of those up to 60 % of the run, its latest end."""
    end = (record["stage2_from"] or 0.6 * record["points"][-1]["step"] + 1) - 1
    inside = [p[name] for p in record["points"] if name in p and p["step"] <= end]
    return inside[-1] if inside else None
