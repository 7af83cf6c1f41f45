"""The README's table and the plots, from the JSON of `pytest benchmarks/ --benchmark --benchmark-json=FILE`.

    python -m benchmarks.report results/*.json [--out FOLDER]

Prints one table a file and draws ratios.png (time over ours), roofline.png (rate over operational intensity, with the ceilings of the same
run) and, of rows of bench_scaling.py, scaling.png. A row whose result was wrong or not checked is refused: it is neither printed as a time
nor drawn but named below the table, and where it carries a time all the same, or is ours, the exit status is 1. Italics are no providers:
ceilings, and baselines that compute something else.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from . import outputs

COLUMNS = (
    "operation", "shape", "dtype", "provider", "lower quartile", "median", "warm", "x ours", "rate", "of ceiling", "peak memory", "error",
    "rounds, spread",
)  # fmt: skip
CACHES = (
    "caches: emptied before every call, of which all columns but one speak; warm: the lower quartile of the same call with its operands where the "
    'call before left them (none from 20 ms on: what lasts so long does not live from the cache); "so timed": the caches were never emptied, and '
    "all columns are warm"
)


def refused(rows: list[dict]) -> list[dict]:
    """Rows whose result was wrong, or that carry a time without a check."""
    return [row for row in rows if row["kind"] in ("provider", "ceiling", "part") and row.get("correct") is not True]


def table(rows: list[dict]) -> str:
    """Markdown: the timed rows, and beneath them what is absent and what was refused."""
    bad = refused(rows)
    parts = [row for row in rows if row["kind"] == "part"]
    rows = [row for row in rows if row["kind"] != "part" or row in bad]
    lines = []
    for outcomes in dict.fromkeys(row["outcomes"] for row in parts):
        own = [row for row in parts if row["outcomes"] == outcomes]
        lines += [] if any(row in bad for row in own) else step_table(own)
    timed = [row for row in rows if "seconds" in row and row not in bad]
    if timed:
        lines += ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
        lines += ["| " + " | ".join(_cells(row)) + " |" for row in timed]
    absent = dict.fromkeys((row["provider"], row["why"]) for row in rows if row["kind"] == "absent")
    lines += [""] + [f"absent: {provider}: {why}" for provider, why in absent]
    lines += [f"refused: {name(row)}: {row.get('why') or 'its result was not checked'}" for row in bad]
    lines += sorted({f"{row['provider']}: {row['note']}" for row in rows if row.get("note") and row not in bad})
    loads = [load for row in rows for load in row.get("load", ())]
    if loads:
        clocks = ", ".join(sorted({row["clock"] for row in rows if "clock" in row}))
        shaken = sum(row["spread"] > 0.5 for row in rows if "spread" in row)
        if shaken:
            lines.append(f"{shaken} rows spread by more than 50 %: the machine was not quiet, measure those again")
        lines.append(CACHES)
        lines.append(f"{rows[0]['threads']} threads; load average {min(loads):.2f} to {max(loads):.2f}; clock: {clocks}")
    return "\n".join(lines)


def step_table(parts: list[dict]) -> list[str]:
    """One ACPO step beside one GRPO step (and TRL's), part by part, and what ACPO adds, in percent of the GRPO step."""
    found: dict[str, dict[str, float]] = {}
    for row in parts:
        found.setdefault(row["mode"], {})[row["provider"]] = row["part_seconds"]
    notes = {row["provider"]: row["note"] for row in parts}
    acpo, grpo, trl = found["acpo"], found["grpo"], found.get("trl", {})
    whole, updating = sum(grpo.values()), sum(grpo.values()) - grpo["rollout"]
    first = parts[0]
    lines = [
        f"One step, {first['outcomes']} groups, {_shape(first)}, {first['dtype']}, {first['threads']} threads, lower quartile of {first['rounds']} "
        f"steps; hindsight reads {100 * first['read']:.0f} % of the tokens:", "",
        f"| part | | GRPO | ACPO | {'TRL GRPO | ' if trl else ''}ACPO adds, of the GRPO step | without rollouts |",
        "|---|---|---|---|" + "---|" * (3 if trl else 2),
    ]  # fmt: skip

    def line(part: str, note: str, *times: float) -> str:
        added = times[1] - times[0]
        cells = [part, note, *(time_text(t) if t else "" for t in times), *(f"{100 * added / x:.2f} %" for x in (whole, updating))]
        return "| " + " | ".join(cells) + " |"

    methods = (grpo, acpo, trl) if trl else (grpo, acpo)
    lines += [line(part, notes[part], *(m.get(part, 0.0) for m in methods)) for part in acpo]
    lines.append(line("sum", "", *(sum(m.values()) for m in methods)))
    compared = [
        f"{mode}: {'peak memory behind the rollouts ' + _memory(row) + ', ' if row.get('peak_bytes') else ''}error against float64: "
        + ", ".join(f"{name} {error:.1e}" for name, error in row["errors"].items())
        for mode, row in {row["mode"]: row for row in parts if "errors" in row}.items()
    ]
    lines += ["", *compared] if compared else []

    forward = first["read"] * grpo["score"]
    information = sum(acpo[part] for part in ("score", "hindsight", "information")) - grpo["score"] - forward
    rest = information + sum(acpo[part] - grpo[part] for part in ("segment", "attribute", "credit", "rest"))
    reference = acpo.get("reference", 0.0)  # rows of before it was a part have none
    lines += ["", (
        f"The extra forward, body and head, at the price of the scoring forward a token: {_signed(forward)}, {100 * forward / whole:.1f} % of the "
        f"GRPO step, {100 * forward / updating:.1f} % without rollouts; the reference's {time_text(reference)}, {100 * reference / whole:.1f} % and "
        f"{100 * reference / updating:.1f} %. All else that ACPO adds before the loss: {_signed(rest)}, "
        f"{100 * rest / whole:.1f} % and {100 * rest / updating:.1f} %; of it the information kernel, beyond that forward, {_signed(information)}."
    )]  # fmt: skip
    if trl:
        theirs, rounds = sum(trl.values()), next(row["rounds"] for row in parts if row["mode"] == "trl")
        same = sum(grpo.get(part, 0.0) for part in trl)
        lines.append(
            f"TRL on the same rollouts, without them: {time_text(theirs)} ({rounds} measured), {theirs / same:.2f}x GRPO's same parts, "
            f"{theirs / (sum(acpo.values()) - acpo['rollout']):.2f}x the whole ACPO step."
        )
    return [*lines, ""]


def _signed(seconds: float) -> str:
    return f"{'-' if seconds < 0 else ''}{time_text(abs(seconds))}"


def name(row: dict) -> str:
    return f"{row['op']} {row['mode']} {_shape(row)} {row['dtype']} {row['provider']}"


def _shape(row: dict) -> str:
    return " ".join(f"{k}={v:,}" if isinstance(v, int) else f"{k}={v:g}" for k, v in row["shape"].items())


def _cells(row: dict) -> tuple[str, ...]:
    if row.get("gflop_s"):
        rate = f"{row['gflop_s'] / 1e3:.1f} TF/s" if row["gflop_s"] > 1e4 else f"{row['gflop_s']:.0f} GF/s"
    else:
        rate = f"{row['gb_s']:.3g} GB/s" if row.get("gb_s") else ""
    return (
        f"{row['op']} {row['mode']}", _shape(row), row["dtype"], row["provider"] if row["kind"] == "provider" else f"*{row['provider']}*",
        time_text(row["seconds"]), time_text(row["median"]) if "median" in row else "",
        _warm(row), f"{row['ratio']:.2f}", rate,
        f"{row['percent']:.0f} %" if row.get("percent") else "",
        "" if row.get("peak_bytes") is None else _memory(row), "" if row.get("error") is None else f"{row['error']:.1e}",
        f"{row['rounds']}, {100 * row['spread']:.0f} %",
    )  # fmt: skip


def _warm(row: dict) -> str:
    if "warm_seconds" in row:
        return time_text(row["warm_seconds"])
    return "" if "cold" in row.get("clock", "cold") else "so timed"


def _memory(row: dict) -> str:
    size = row["peak_bytes"] / 2**20
    return f"{size:,.0f} MiB" if size >= 10 else f"{size:.1f} MiB"


def time_text(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e9:.0f} ns"


def load(path: str | Path) -> tuple[dict, list[dict]]:
    """(environment, rows) of one file."""
    data = json.loads(Path(path).read_text(encoding="utf-8"))
    if not isinstance(data, dict) or "benchmarks" not in data:
        got = f"keys {', '.join(list(data)[:5]) or 'none'}" if isinstance(data, dict) else f"a {type(data).__name__}"
        raise SystemExit(f"{path} must be what --benchmark-json wrote, got {got}")
    return data.get("acpo", {}), [row for bench in data["benchmarks"] for row in bench.get("extra_info", {}).get("rows", [])]


def draw(rows: list[dict], folder: Path, title: str) -> list[Path]:
    """ratios.png, roofline.png and, where there are curves, scaling.png of the rows that were checked."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    bad = refused(rows)
    rows = [row for row in rows if "seconds" in row and row not in bad]
    cases: dict[str, list[dict]] = {}
    for row in rows:
        cases.setdefault(f"{row['op']} {row['mode']}\n{_shape(row)} {row['dtype']}", []).append(row)
    providers = sorted({row["provider"] for row in rows if row["kind"] == "provider"}, key=lambda p: (not p.startswith("ours"), p))
    colour = {p: f"C{i % 10}" for i, p in enumerate(providers)}

    paths = [folder / "ratios.png", folder / "roofline.png"]
    bars = [(case, row) for case, group in cases.items() for row in group if row["kind"] == "provider" and row["ratio"] != 1]
    figure, axis = plt.subplots(figsize=(9, 1 + 0.22 * max(4, len(bars))))
    labels = [f"{case.replace(chr(10), ' ')}: {row['provider']}" for case, row in bars]
    axis.barh(labels, [row["ratio"] for _, row in bars], color=[colour[row["provider"]] for _, row in bars])
    axis.axvline(1.0, color="black", linewidth=1)
    axis.set(xscale="log", xlabel="time / ours (right of the line: slower than ours)", title=title)
    axis.invert_yaxis()
    axis.tick_params(axis="y", labelsize=6)
    figure.tight_layout()
    figure.savefig(paths[0], dpi=150)

    figure, axis = plt.subplots(figsize=(8, 5))
    points = [row for row in rows if row.get("flop") and row.get("bytes") and row["kind"] == "provider"]
    for provider in providers:
        own = [row for row in points if row["provider"] == provider]
        if own:
            axis.scatter([r["flop"] / r["bytes"] for r in own], [r["flop"] / r["seconds"] for r in own], label=provider, color=colour[provider], s=18)
    bandwidth = max((row["gb_s"] for row in rows if row["kind"] == "ceiling" and row.get("gb_s")), default=0) * 1e9
    for dtype in sorted({row["dtype"] for row in points}):
        peak = max((r["gflop_s"] for r in rows if r["kind"] == "ceiling" and r.get("gflop_s") and r["dtype"] == dtype), default=0) * 1e9
        if peak and bandwidth:
            xs = [0.1, peak / bandwidth, max([10 * peak / bandwidth] + [2 * r["flop"] / r["bytes"] for r in points])]
            axis.plot(xs, [min(peak, bandwidth * x) for x in xs], linewidth=1, label=f"measured ceiling, {dtype}")
    axis.set(xscale="log", yscale="log", xlabel="FLOP / byte", ylabel="FLOP / s", title=title)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(paths[1], dpi=150)
    curves = sorted({(row["op"] + " " + row["mode"], row["curve"]) for row in rows if row.get("curve")})
    if curves:
        paths.append(folder / "scaling.png")
        figure, axes = plt.subplots(-(-len(curves) // 3), 3, figsize=(12, 3 * -(-len(curves) // 3)), squeeze=False)
        for axis, (case, along) in zip(axes.flat, curves, strict=False):
            draw_curve(axis, case, along, [row for row in rows if row.get("curve") == along and f"{row['op']} {row['mode']}" == case])
        for axis in axes.flat[len(curves) :]:
            axis.set_visible(False)
        figure.tight_layout()
        figure.savefig(paths[-1], dpi=150)
    plt.close("all")
    return paths


def draw_curve(axis, case: str, along: str, rows: list[dict]) -> None:
    """Seconds over one size; the title says which sizes all points have in common."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    rows = [row for row in rows if row["kind"] == "provider"]
    for provider in sorted({row["provider"] for row in rows}, key=lambda p: (not p.startswith("ours"), p)):
        points = sorted((row["shape"][along], row["seconds"]) for row in rows if row["provider"] == provider)
        axis.plot(*zip(*points, strict=True), marker="o", markersize=3, linewidth=1, label=provider)
    common = {name: size for name, size in rows[0]["shape"].items() if all(row["shape"].get(name) == size for row in rows)}
    axis.set(xscale="log", yscale="log", xlabel=along, title=f"{case}\n{_shape({'shape': common})} {rows[0]['dtype']}")
    axis.title.set_size(8)
    sizes = sorted({row["shape"][along] for row in rows})
    axis.set_xticks(sizes, [f"{size:,}" for size in sizes], fontsize=7)
    axis.set_xticks([], minor=True)
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda seconds, _: time_text(seconds)))
    axis.set_yticks([], minor=True)
    axis.tick_params(axis="y", labelsize=7)
    axis.legend(fontsize=6)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.split("\n\n")[0])
    parser.add_argument("files", nargs="+")
    parser.add_argument("--out", type=outputs.folder, help="folder of the plots (default: beside the first file)")
    options = parser.parse_args(arguments)
    out = options.out or Path(options.files[0]).parent
    everything, titles = [], []
    for path in options.files:
        environment, rows = load(path)
        hardware = (environment.get("gpu") or {}).get("name") or environment.get("cpu", "unknown processor")
        titles.append(f"{hardware}, torch {environment.get('torch', '?')}, commit {environment.get('commit', '?')}")
        print(f"{path}: {titles[-1]}, triton {environment.get('triton', '?')}, peers {environment.get('peers', {})}\n")
        print(table(rows) + "\n")
        everything += rows
    if not everything:
        raise SystemExit("no rows: were the files written with --benchmark?")
    timed = any("seconds" in row for row in everything)
    for path in draw(everything, out, "; ".join(dict.fromkeys(titles))) if timed else ():
        print(path)
    return 1 if any("seconds" in row or row["kind"] == "part" or row["provider"].startswith("ours") for row in refused(everything)) else 0


if __name__ == "__main__":
    sys.exit(main())
