"""What a run did, to look at: curves.png, and report.html with the figures behind it."""

from __future__ import annotations

import base64
import html
import itertools
import json
from pathlib import Path

from .config import ConfigError

PANELS = (
    ("eval/accuracy", "held-out greedy accuracy"), ("reward", "mean outcome of the rollouts"), ("entropy", "token entropy, nats"),
    ("frac_reward_zero_std", "groups without variance"), ("attribution/reliability", "reliability of the attribution"),
    ("kl/ref", "KL to the reference, nats"),
)  # fmt: skip


def read(directory: Path) -> list[dict]:
    path = directory / "metrics.jsonl"
    try:
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]  # behind the last end of line: nothing, or what is being written
    except OSError:
        raise ConfigError(f"{directory} is no run directory: it has no metrics.jsonl") from None
    try:
        records = [json.loads(line) for line in lines]
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path} holds a line that is not JSON: {error.msg}") from None
    return [r for r in records if r["phase"] != "warmup"]


def area(records: list[dict]) -> float:
    """Area under held-out accuracy against generated tokens, divided by the tokens: the mean accuracy over the budget."""
    points = [(r["tokens/generated"], r["eval/accuracy"]) for r in records if "eval/accuracy" in r]
    if len(points) < 2 or points[-1][0] == points[0][0]:
        return float("nan")
    total = sum((x1 - x0) * (y0 + y1) / 2 for (x0, y0), (x1, y1) in itertools.pairwise(points))
    return total / (points[-1][0] - points[0][0])


def summary(directory: Path) -> dict[str, float | str]:
    """The figures of a run that people compare: accuracy before and after, area, pass@k, entropy, time and memory."""
    records = read(directory)
    evaluations = [r for r in records if "eval/accuracy" in r]
    steps = [r for r in records if "entropy" in r]
    if not evaluations or not steps:
        raise ConfigError(f"{directory} has no finished step yet")
    first, last = evaluations[0], evaluations[-1]
    return {
        "run": directory.name, "steps": last["step"], "before": first["eval/accuracy"], "after": last["eval/accuracy"], "area": area(records),
        **{f"{k.removeprefix('eval/')} {when}": r[k] for when, r in (("before", first), ("after", last)) for k in r if "pass@" in k},
        "least entropy / first": min(r["entropy"] for r in steps) / steps[0]["entropy"],
        "stage 2 from": next((r["step"] for r in steps if r["phase"] == "stage2"), "-"),
        "reliability": sum(r["attribution/reliability"] for r in steps) / len(steps),
        "step seconds": sum(r["step_time"] for r in steps) / len(steps), "memory GB": max(r["memory_gb"] for r in steps),
    }  # fmt: skip


def draw(runs: list[Path], out: Path | None = None) -> Path:
    """The curves of the runs, overlaid, as a PNG. Runs whose names differ in the last part alone (the seed) share a colour; the first
    step of stage 2 is a dashed line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    loaded = [(run.name.rpartition("-")[0] if len(runs) > 1 else run.name, read(run)) for run in runs]
    groups = list(dict.fromkeys(group for group, _ in loaded))
    figure, axes = pyplot.subplots(2, 3, figsize=(13, 6.5), layout="constrained")
    for axis, (key, title) in zip(axes.flat, PANELS, strict=True):
        named = set()
        for group, records in loaded:
            colour = f"C{groups.index(group)}"
            points = [(r["step"], r[key]) for r in records if key in r]
            if points:
                label = None if group in named else group
                named.add(group)
                axis.plot(*zip(*points, strict=True), label=label, color=colour, linewidth=1.2, alpha=0.8)
            switch = next((r["step"] for r in records if r.get("phase") == "stage2"), None)
            if switch is not None:
                axis.axvline(switch, color=colour, linestyle="--", linewidth=0.7)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step", fontsize=9)
        axis.grid(alpha=0.3)
    axes.flat[0].set_ylim(0, 1)
    axes.flat[0].legend(fontsize=8, loc="lower right")
    path = out or runs[0] / "curves.png"
    if path.suffix[1:] not in figure.canvas.get_supported_filetypes():
        raise ConfigError(f"--out: no picture can be written as {path.name}; end it in .png")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


def write(directory: Path) -> None:
    """curves.png and report.html of one run."""
    picture = base64.b64encode(draw([directory]).read_bytes()).decode()
    records = read(directory)
    evaluations = [r for r in records if "eval/accuracy" in r]
    columns = sorted({k for r in evaluations for k in r if k.startswith("eval/")})
    head = "".join(f"<th>{html.escape(c)}</th>" for c in ("step", "phase", "tokens", *columns))
    rows = "".join(
        "<tr>" + "".join(f"<td>{c}</td>" for c in (r["step"], html.escape(r["phase"]), f"{r['tokens/generated']:,}",
                                                    *(f"{r[c]:.3f}" if c in r else "" for c in columns))) + "</tr>"
        for r in evaluations
    )  # fmt: skip
    settings = html.escape((directory / "config.yaml").read_text(encoding="utf-8"))
    (directory / "report.html").write_text(
        "<!doctype html><meta charset='utf-8'><meta name='viewport' content='width=device-width'>"
        f"<title>{html.escape(directory.name)}</title>"
        "<style>:root{color-scheme:light dark}body{font:15px/1.5 system-ui;margin:2rem auto;max-width:70rem;padding:0 1rem}"
        "table{border-collapse:collapse}td,th{padding:.2rem .8rem;text-align:right;border-bottom:1px solid #8884}img{max-width:100%}</style>"
        f"<h1>{html.escape(directory.name)}</h1><p>Mean held-out accuracy over the token budget (area): {area(records):.4f}</p>"
        f"<img alt='curves' src='data:image/png;base64,{picture}'><table><tr>{head}</tr>{rows}</table>"
        f"<details><summary>settings</summary><pre>{settings}</pre></details>",
        encoding="utf-8",
    )
