"""What a report shows: its panels as one table, and the numbers of each. Figures, tables and CSV are drawn from the same Lines."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from ..layers import ConfigError
from .records import Group, Records, interval, wildcard

POINTS = 25  # a curve of more steps is drawn in so many pieces at most, each the mean of its steps
PHASES = 6  # of a step, by time; the rest is "other"


@dataclass(frozen=True)
class Panel:
    """Series are (key of metrics.jsonl, name); a * in a key stands for whatever the runs have. An empty name is the panel's own."""

    title: str
    unit: str
    series: tuple[tuple[str, str], ...]
    limits: tuple[float | None, float | None] = (None, None)
    kind: str = "lines"  # histogram: shares of ten bins, early and late;  bars: means over the steps, the largest first
    note: str = ""  # one line for a reader who does not know the quantity


@dataclass(frozen=True)
class Line:
    """One series of one group: x, mean, and the interval over seeds (empty: fewer than three); seeds are the runs' own curves."""

    group: int
    series: int
    name: str
    x: list
    mean: list[float]
    low: list[float]
    high: list[float]
    seeds: list[tuple[list, list[float]]]
    runs: int


SHARE = (0.0, 1.0)
FROM_0 = (0.0, None)
Sections = tuple[tuple[str, tuple[Panel, ...]], ...]
SECTIONS: Sections = (
    ("Outcome", (
        Panel("Reward", "mean outcome of the rollouts", (("reward", ""),), SHARE),
        Panel("pass@k of the rollouts", "share", (("pass@*", "pass@*"),), SHARE, note="pass@G: groups with at least one right rollout"),
        Panel("Held-out accuracy", "greedy, share", (("eval/accuracy", ""),), SHARE),
        Panel("Held-out pass@k", "share", (("eval/pass@*", "pass@*"),), SHARE),
    )),
    ("Policy", (
        Panel("Entropy", "nats per token", (("entropy", "measured"), ("entropy/target", "target")), FROM_0,
              note="at the sampling temperature, which stage 1 may raise"),
        Panel("KL", "nats per token", (("kl/old", "to the sampling policy"), ("kl/ref", "to the reference")), FROM_0),
        Panel("Clip fractions", "share of tokens", (("clip_ratio/low_mean", "low"), ("clip_ratio/high_mean", "high")), FROM_0),
        Panel("Groups without variance", "share of groups", (("frac_reward_zero_std", ""),), SHARE, note="all outcomes equal: no outcome gradient"),
    )),
    ("Attribution", (
        Panel("Reliability of each source", "skill in [0, 1]", (("attribution/reliability/*", "*"),), SHARE, note="0: that source changes nothing"),
        Panel("Information budget", "nats per rollout", (("attribution/iota_sum", "sum of iota"), ("attribution/budget", "h_b(V)")),
              note="equal on average where V is calibrated"),
        Panel("Segments", "per rollout", (("segments/mean_count", ""),), FROM_0),
        Panel("Length of a segment", "tokens", (("segments/mean_length", ""),), FROM_0),
    )),
    ("Curriculum and cost", (
        Panel("Difficulty of the problems", "share of those tried, by success", (("curriculum/share_*", ""),), FROM_0, "histogram"),
        Panel("Length of a rollout", "tokens", (("completions/mean_length", "mean"), ("completions/max_length", "longest")), FROM_0),
        Panel("Time of a step", "seconds, by phase", (("time/*", "*"),), FROM_0, "bars"),
        Panel("Memory", "GB, peak", (("memory_gb", "host"), ("memory_gpu_gb", "GPU")), FROM_0),
    )),
    ("Running", (
        Panel("Warm-up loss", "nats per token", (("warmup/loss", ""),), FROM_0),
        Panel("Gradient norm", "before clipping", (("grad_norm", ""),), FROM_0),
        Panel("Throughput", "generated tokens per second", (("tokens/per_second", ""),), FROM_0),
        Panel("Verifier", "rollouts per step",
              (("verify/timeouts", "timeouts"), ("verify/kills", "killed"), ("verify/unparseable", "unreadable")), FROM_0),
    )),
)  # fmt: skip
NOT_A_PHASE = ("time/cpu", "time/segment_share")


def chosen(names: list[str]) -> Sections:
    """SECTIONS, or of their panels those whose title holds one of the names, in the order of the names, as one section."""
    if not names:
        return SECTIONS
    panels = [panel for _, section in SECTIONS for panel in section]
    found = []
    for name in names:
        of_that_name = [panel for panel in panels if name.lower() in panel.title.lower()]
        if not of_that_name:
            raise ConfigError(f"--panels: no panel is named {name!r}; there are {', '.join(panel.title for panel in panels)}")
        found += [panel for panel in of_that_name if panel not in found]
    return (("", tuple(found)),)


def lines(panel: Panel, groups: list[Group]) -> list[Line]:
    """The panel's numbers; empty where no run has any."""
    if panel.kind == "bars":
        return _bars(panel, groups)
    if panel.kind == "histogram":
        return _histogram(panel, groups)
    runs = [run for group in groups for run in group.runs]
    out, number = [], 0
    for pattern, name in panel.series:
        keys = wildcard(pattern, runs)
        for key in keys:
            label = name.replace("*", key[pattern.find("*") :]) if "*" in name else name
            ends = [points[-1][0] for run in runs if (points := run.points(key))]
            width = 1 if key.startswith(("eval/", "warmup/")) else -(-int(max(ends, default=1)) // POINTS)
            for g, group in enumerate(groups):
                line = _line(group, g, number, label, key, width)
                if line:
                    out.append(line)
            number += 1
    return out


def _line(group: Group, g: int, number: int, label: str, key: str, width: int) -> Line | None:
    curves = [curve for run in group.runs if (curve := _pieces(_known(run, key), width))]
    if not curves:
        return None
    shared = sorted(set.intersection(*(set(c) for c in curves)))
    mean, low, high = _over([[c[x] for c in curves] for x in shared])
    seeds = [(sorted(c), [c[x] for x in sorted(c)]) for c in curves]
    return Line(g, number, label, shared, mean, low, high, seeds, len(curves))


def _known(run: Records, key: str) -> list[tuple[float, float]]:
    """entropy/target is 0 until the first batches were measured, and kl/ref until there is a reference: neither is a value of the curve. A target
    that nothing follows is none."""
    points = [] if key == "entropy/target" and run.settings.get("entropy.controller") in ("none", "constant") else run.points(key)
    return [(x, y) for x, y in points if y != 0.0] if key in ("entropy/target", "kl/ref") else points


def _pieces(points: list[tuple[float, float]], width: int) -> dict[float, float]:
    """Means over `width` steps each, at the middle of the piece."""
    if width == 1:
        return dict(points)
    parts: dict[int, list[float]] = defaultdict(list)
    for x, y in points:
        parts[(int(x) - 1) // width].append(y)
    return {i * width + (width + 1) / 2: sum(ys) / len(ys) for i, ys in parts.items()}


def _over(columns: list[list[float]]) -> tuple[list[float], list[float], list[float]]:
    """Mean and interval over seeds of each column."""
    between = [interval(values) for values in columns]
    known = [b for b in between if b is not None]
    mean = [sum(values) / len(values) for values in columns]
    return (mean, [low for low, _ in known], [high for _, high in known]) if len(known) == len(between) else (mean, [], [])


def _bars(panel: Panel, groups: list[Group]) -> list[Line]:
    """Seconds a step of each phase, the same phases for every group: the largest, and what is left as `other`."""
    prefix = panel.series[0][0].rstrip("*")
    keys = [k for k in wildcard(panel.series[0][0], [r for g in groups for r in g.runs]) if k not in NOT_A_PHASE]
    taken: list[list[dict[str, float]]] = []
    for group in groups:
        counted = [(run, len(run.points("step_time"))) for run in group.runs]
        taken.append([{k: sum(v for _, v in run.points(k)) / steps for k in keys} for run, steps in counted if steps])
    largest = sorted(keys, key=lambda k: -max((t[k] for totals in taken for t in totals), default=0.0))
    shown, rest = largest[:PHASES], largest[PHASES:]
    out = []
    for g, totals in enumerate(taken):
        if not totals:
            continue
        named = {k.removeprefix(prefix): [t[k] for t in totals] for k in shown}
        if rest:
            named["other"] = [sum(t[k] for k in rest) for t in totals]
        seeds = [(list(named), [v[i] for v in named.values()]) for i in range(len(totals))]
        out.append(Line(g, 0, "", list(named), *_over(list(named.values())), seeds, len(totals)))
    return out


def _histogram(panel: Panel, groups: list[Group]) -> list[Line]:
    """Shares of the bins, means over the first and over the last tenth of the steps."""
    out = []
    keys = wildcard(panel.series[0][0], [r for g in groups for r in g.runs])
    for g, group in enumerate(groups):
        runs = [run for run in group.runs if keys and run.points(keys[0])]
        for number, name in enumerate(("last tenth of the steps", "first tenth")):
            found = []
            for run in runs:
                curves = [[v for _, v in run.points(key)] for key in keys]
                tenth = max(1, len(curves[0]) // 10)
                parts = [c[:tenth] if number else c[-tenth:] for c in curves]
                found.append([sum(p) / max(1, len(p)) for p in parts])
            if found:
                mean, low, high = _over([list(column) for column in zip(*found, strict=True)])
                x = [float(key.rpartition("_")[2]) for key in keys]
                out.append(Line(g, number, name, x, mean, low, high, [(x, f) for f in found], len(found)))
    return out
