"""What a run wrote, read back, and the runs that differ in nothing but their seed as one group."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from ..config import Config, to_dict
from ..layers import flatten
from ..methods import METHODS

# Student's t at 97.5 %, 1 to 30 degrees of freedom: a handful of seeds is far from normal.
_T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
LEAST_SEEDS = 3  # two seeds give an interval six times as wide as their distance: they are drawn themselves
APART = ("seed", "run_dir", "name", "trainer.threads", "trainer.log", "policy.device", "warmup.steps", "policy.path")  # no other method
# Where a run begins: one policy a seed, where seeds have warm starts of their own; several policies, where a seed is there twice.
APART_BUT_START = tuple(key for key in APART if key not in ("warmup.steps", "policy.path"))


class ReportError(ValueError):
    """What was given is no run, or not one that can be read."""


@dataclass(frozen=True)
class Records:
    """One run: its settings (dotted; empty where config.yaml cannot be read), and the records of its warm-up and of its steps, in order. left_out:
    what was wrong with the lines that are no records, empty where there are none."""

    path: Path
    settings: dict[str, Any]
    warmup: list[dict]
    steps: list[dict]
    name: str
    left_out: str = ""

    @property
    def stage2(self) -> int | None:
        """The first step of stage 2."""
        return next((r["step"] for r in self.steps if r["phase"] == "stage2"), None)

    def points(self, key: str) -> list[tuple[float, float]]:
        """(step, value) wherever the key holds a finite number."""
        records = self.warmup if key.startswith("warmup/") else self.steps
        return [(r["step"], float(r[key])) for r in records if _number(r, key)]

    def names(self) -> set[str]:
        """Every key of its records."""
        return {key for r in (*self.warmup, *self.steps) for key in r}


@dataclass
class Group:
    """Runs of the same settings but for the seed."""

    label: str
    runs: list[Records] = field(default_factory=list)


def read(directory: Path) -> Records:
    """A run's records. A last line without its end is still being written and is left out, a damaged line as the trainer's resume does
    it; without any other it is an error. Of a step that stands there twice (a run that was
    broken off and is not resumed yet) the later record counts."""
    path = directory / "metrics.jsonl"
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
    except OSError:
        raise ReportError(f"{directory} is no run directory: it has no metrics.jsonl") from None
    found: dict[tuple[bool, int], dict] = {}
    damaged = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if not isinstance(record["phase"], str) or not isinstance(record["step"], int):
                raise TypeError
            found[record["phase"] == "warmup", record["step"]] = record
        except json.JSONDecodeError as error:
            damaged.append(f"{path}, line {number}: this line is not JSON: {error.msg}")
        except (TypeError, KeyError, ValueError, RecursionError):
            damaged.append(f"{path}, line {number}: wanted an object with `phase` and `step`, got {line[:60]!r}")
    if damaged and not found:
        raise ReportError(damaged[0])
    left_out = damaged[0] + (f", and {len(damaged) - 1} more like it" if damaged[1:] else "") + "; left out" if damaged else ""
    ordered = [found[key] for key in sorted(found)]
    return Records(
        directory, _settings(directory), [r for r in ordered if r["phase"] == "warmup"], [r for r in ordered if r["phase"] != "warmup"],
        directory.resolve().name, left_out,
    )  # fmt: skip


def distinct(runs: list[Records]) -> list[Records]:
    """The runs under their folders' names, with as much of the path before them as tells them apart."""
    paths, depth = [run.path.resolve().parts for run in runs], 1
    while len({p[-depth:] for p in paths}) < len(runs):
        depth += 1
    return [replace(run, name="/".join(p[-depth:])) for run, p in zip(runs, paths, strict=True)]


def _settings(directory: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load((directory / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    return flatten(tree) if isinstance(tree, dict) else {}


def grouped(runs: list[Records]) -> list[Group]:
    """Runs whose settings are equal but for the seed, in the order of their first; named by the method and by what tells the groups apart and is not
    the method's default."""
    found = [part for group in _by_settings(runs, APART) for part in (_by_settings(group.runs, APART_BUT_START) if _twice(group.runs) else [group])]
    settings = [group.runs[0].settings for group in found]
    for group in found:
        own = group.runs[0].settings
        method = str(own.get("method") or group.runs[0].name)
        rivals = [s for s in settings if s is not own and s.get("method") == own.get("method")]
        default = flatten(to_dict(Config())) | METHODS.get(method, {})
        differs = [k for k in own if k not in APART_BUT_START and own[k] != default.get(k) and any(s.get(k) != own[k] for s in rivals)]
        more = ", ".join(f"{k}={own[k]}" for k in differs[:2]) + (", ..." if len(differs) > 2 else "")
        group.label = f"{method}, {more}" if more else method
    for same in (g for g in found if sum(o.label == g.label for o in found) > 1):
        same.label = f"{same.label} ({same.runs[0].name})"
    return found


def _by_settings(runs: list[Records], apart: tuple[str, ...]) -> list[Group]:
    groups: dict[Any, Group] = {}
    for run in runs:
        kept = {k: v for k, v in run.settings.items() if k not in apart}
        key = json.dumps(kept, sort_keys=True, default=str) if run.settings else run.name.rpartition("-")[0] or run.name
        groups.setdefault(key, Group("")).runs.append(run)
    return list(groups.values())


def _twice(runs: list[Records]) -> bool:
    """Whether two of the runs have the same seed."""
    seeds = [run.settings.get("seed") for run in runs if run.settings]
    return len(set(seeds)) < len(seeds)


def interval(values: list[float]) -> tuple[float, float] | None:
    """95 % interval of the mean over seeds, mean +- t s / sqrt(n); None for fewer than LEAST_SEEDS."""
    n = len(values)
    if n < LEAST_SEEDS:
        return None
    mean = sum(values) / n
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1))
    half = (_T[n - 2] if n - 2 < len(_T) else 1.96) * spread / math.sqrt(n)
    return mean - half, mean + half


def _number(record: dict, key: str) -> bool:
    """Whether a finite number stands there."""
    return isinstance(record.get(key), (int, float)) and math.isfinite(record[key])


def area(records: list[dict]) -> float:
    """Area under held-out accuracy against generated tokens, divided by the tokens: the mean accuracy over the budget."""
    points = [(r["tokens/generated"], r["eval/accuracy"]) for r in records if _number(r, "tokens/generated") and _number(r, "eval/accuracy")]
    if len(points) < 2 or points[-1][0] == points[0][0]:
        return float("nan")
    total = sum((x1 - x0) * (y0 + y1) / 2 for (x0, y0), (x1, y1) in itertools.pairwise(points))
    return total / (points[-1][0] - points[0][0])


def summary(run: Records) -> dict[str, float | str]:
    """The figures of a run that people compare: accuracy before and after, area, pass@k, entropy, time and memory; none that it does not have yet."""
    evaluations = [r for r in run.steps if _number(r, "eval/accuracy")]
    steps = [r for r in run.steps if r["phase"] != "start"]
    out: dict[str, float | str] = {"run": run.name, "steps": run.steps[-1]["step"] if run.steps else 0}
    if evaluations:
        first, last = evaluations[0], evaluations[-1]
        out |= {"before": first["eval/accuracy"], "after": last["eval/accuracy"], "area": area(run.steps)}
        for when, record in (("before", first), ("after", last)):
            out |= {f"{k.removeprefix('eval/')} {when}": v for k, v in record.items() if k.startswith("eval/pass@")}
    if run.points("entropy"):
        values = [v for _, v in run.points("entropy")]
        out["least entropy / first"] = min(values) / values[0] if values[0] else math.nan
    if steps:
        out["stage 2 from"] = run.stage2 or "-"
    for name, key, fold in (
        ("reliability", "attribution/reliability", _mean), ("step seconds", "step_time", _mean), ("memory GB", "memory_gb", max),
    ):  # fmt: skip
        values = [v for _, v in run.points(key)]
        if values:
            out[name] = fold(values)
    return out


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def group_summary(group: Group) -> dict[str, str | float]:
    """Means over a group's runs, with the half width of their interval where there are enough."""
    rows = [summary(run) for run in group.runs]
    out: dict[str, str | float] = {"run": group.label, "runs": len(rows)}
    for key in columns(rows)[1:]:
        values = [row[key] for row in rows if _number(row, key)]
        if not values:
            continue
        between = interval(values)
        if all(isinstance(v, int) for v in values):
            out[key] = str(min(values)) if min(values) == max(values) else f"{min(values)} to {max(values)}"
        else:
            out[key] = _mean(values) if between is None else f"{cell(_mean(values))} ± {cell((between[1] - between[0]) / 2)}"
    return out


def columns(rows: list[dict]) -> list[str]:
    return list(dict.fromkeys(key for row in rows for key in row))


def cell(value: Any) -> str:
    """A figure as people read it: three decimals, and no digits that say nothing."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int) or not math.isfinite(value):
        return str(value)
    return f"{value:.3f}" if 1e-3 <= abs(value) < 1e4 or value == 0 else f"{value:.3g}"


def wildcard(key: str, runs: list[Records]) -> list[str]:
    """The keys that runs have under a name with one * in it, those with a number by the number."""
    head, star, tail = key.partition("*")
    if not star:
        return [key]
    found = {k for run in runs for k in run.names() if k.startswith(head) and k.endswith(tail) and len(k) > len(head) + len(tail)}
    return sorted(found, key=lambda k: (int(k[len(head) :]) if k[len(head) :].isdigit() else 0, k))
