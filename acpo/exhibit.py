"""What a comparison shows: its table as JSON, PNG and HTML."""

from __future__ import annotations

import base64
import html
import json
from pathlib import Path
from typing import Any

import numpy as np

from .evidence import clocks, interquartile_mean

COLUMNS = (
    ("arm", "arm"), ("learning rate", "rate"), ("seeds", "n"), ("area, tokens", "area_tokens"), ("against {against}, tokens", "against_tokens"),
    ("against {best_baseline}, tokens", "best_baseline_tokens"), ("against {against}, tokens of extra forwards counted", "against_all_tokens"),
    ("area, seconds", "area_seconds"), ("against {against}, seconds", "against_seconds"),
    ("accuracy at the budget", "at_budget"), ("at its end", "after"), ("pass@1", "pass@1 after"), ("pass@8", "pass@8 after"),
    ("entropy, end of stage 1", "entropy_stage1_end"), ("of its decisions", "decisions_stage1_end"), ("reliability", "reliability"),
    ("zero-variance groups", "zero_variance"), ("seconds", "seconds"),
)  # fmt: skip


def cell(value: Any) -> str:
    if isinstance(value, dict):
        between = "[too few seeds]" if value["low"] is None else f"[{value['low']:+.3f}, {value['high']:+.3f}]"
        return f"{value['iqm']:+.3f} {between} {value['wins']}/{value['seeds']}"
    if value is None:
        return ""
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def rows(results: dict) -> tuple[list[str], list[list[str]]]:
    """Head and body of the table, as text."""
    head = [title.format(against=results["against"], best_baseline=f"the best baseline ({results['best_baseline']})") for title, _ in COLUMNS]
    body = []
    for arm, found in results["arms"].items():
        found = {**found, "arm": arm, "n": len(found["seeds"]), "rate": f"{found['rate']:g}" if "rate" in found else ""}
        body.append([cell(found.get(key)) for _, key in COLUMNS])
    return head, body


def draw(results: dict, runs: dict[str, dict[int, dict]], path: Path) -> None:
    """Every seed as a dot: areas, paired differences with their intervals, and the mean curves against tokens and seconds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    arms = list(results["arms"])
    height = max(3.2, 0.34 * len(arms) + 1.2)
    figure, axes = pyplot.subplots(2, 2, figsize=(13, 2 * height), layout="constrained")
    place = {arm: len(arms) - 1 - i for i, arm in enumerate(arms)}
    for axis, kind in zip(axes[0], ("tokens", "seconds"), strict=True):
        for arm in arms:
            found = results["arms"][arm]
            ours, theirs = found[f"area_{kind}_by_seed"], results["arms"].get(results["against"], {}).get(f"area_{kind}_by_seed", {})
            differences = [v - theirs[s] for s, v in ours.items() if s in theirs]
            axis.plot(differences, [place[arm]] * len(differences), "o", color=f"C{arms.index(arm) % 10}", alpha=0.45, markersize=4)
            if isinstance(found.get(f"against_{kind}"), dict):
                d = found[f"against_{kind}"]
                if d["low"] is not None:
                    axis.plot([d["low"], d["high"]], [place[arm]] * 2, color="black", linewidth=1.5)
                axis.plot([d["iqm"]], [place[arm]], "|", color="black", markersize=14, markeredgewidth=2)
        axis.axvline(0, color="black", linewidth=0.6)
        axis.set_yticks(list(place.values()), list(place), fontsize=8)
        axis.set_title(f"area in equal {kind}: difference to {results['against']}, paired by seed", fontsize=10)
        axis.grid(alpha=0.3, axis="x")
    timed = clocks(runs, results["against"])
    for axis, kind in zip(axes[1], ("tokens", "seconds"), strict=True):
        for arm in arms:
            records = [r for r in runs.get(arm, {}).values() if not r.get("failure") and (kind == "tokens" or arm in timed)]
            if not records:
                continue
            if kind == "seconds":
                steps, taken = timed[arm].steps, timed[arm].elapsed()[0]
            else:
                steps = max(([p["step"] for p in r["points"]] for r in records), key=len)
            tokens, accuracy = (
                np.array([np.interp(steps, [p["step"] for p in r["points"]], [p[name] for p in r["points"]]) for r in records])
                for name in ("tokens", "accuracy")
            )
            x, y = taken if kind == "seconds" else tokens.mean(0), interquartile_mean(accuracy.T)
            label = f"{arm} ({len(records)} seed{'s' * (len(records) > 1)})"
            axis.plot(x, y, color=f"C{arms.index(arm) % 10}", linestyle="-" if arms.index(arm) < 10 else "--", label=label, linewidth=1.3)
        axis.set_xlabel("generated tokens" if kind == "tokens" else "seconds of training (CPU seconds on a CPU), median over seeds", fontsize=9)
        axis.set_title("held-out greedy accuracy, interquartile mean over seeds", fontsize=10)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def write(results: dict, runs: dict[str, dict[int, dict]], directory: Path) -> None:
    """results.json, results.png and results.html in the comparison's directory."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    draw(results, runs, directory / "results.png")
    picture = base64.b64encode((directory / "results.png").read_bytes()).decode()
    head, body = rows(results)
    table = "".join(f"<th>{html.escape(h)}</th>" for h in head)
    lines = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in body)
    failures = "".join(f"<li>{html.escape(arm)}, {html.escape(f)}</li>" for arm, found in results["arms"].items() for f in found["failures"])
    (directory / "results.html").write_text(
        "<!doctype html><meta charset='utf-8'><meta name='viewport' content='width=device-width'>"
        f"<title>{html.escape(results['name'])}</title>"
        "<style>:root{color-scheme:light dark}body{font:15px/1.5 system-ui;margin:2rem auto;max-width:90rem;padding:0 1rem}div{overflow-x:auto}"
        "table{border-collapse:collapse;font-size:13px}td,th{padding:.2rem .6rem;text-align:right;border-bottom:1px solid #8884;white-space:nowrap}"
        "td:first-child{text-align:left}img{max-width:100%}</style>"
        f"<h1>{html.escape(results['name'])}</h1><p>Interquartile means over seeds; in brackets the 95 % bootstrap interval of the "
        f"paired difference, then the seeds won. Best baseline: {html.escape(results['best_baseline'])}. "
        f"Warm start of all: {html.escape(', '.join(f'{k} {v:.3f}' for k, v in results['warm_start'].items() if isinstance(v, float)))}. "
        f"Learning rates chosen on other seeds, outside of these figures: {results['tuning']['runs']} runs, {results['tuning']['seconds']:.0f} s. "
        f"Code: {html.escape(', '.join(results['code']))}.</p>"
        f"<div><table><tr>{table}</tr>{lines}</table></div>{'<h2>Runs that broke down</h2><ul>' + failures + '</ul>' if failures else ''}"
        f"<img alt='every seed, and the mean curves' src='data:image/png;base64,{picture}'>"
        f"<details><summary>settings</summary><pre>{html.escape(json.dumps(results['settings'], indent=1))}</pre></details>",
        encoding="utf-8",
    )
