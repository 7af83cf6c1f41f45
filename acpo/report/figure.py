"""Panels drawn with matplotlib: all of them as one picture, or each as an SVG whose colours are the page's."""

from __future__ import annotations

import io
import re
from pathlib import Path

from ..layers import ConfigError
from .panels import SECTIONS, Line, Panel, Sections, lines
from .records import Group

INK, MUTED, GRID = "#1c1e21", "#6a6f76", "#e4e5e7"
# Told apart by colour-blind readers as well; on a page with dark ground the second row stands in.
PALETTE = ("#2a6fbb", "#d9730d", "#2b8a5a", "#8e5bb5", "#c43d4b", "#13858f", "#8a6d3b", "#555c66")
DARK = ("#6cabf0", "#f2a154", "#6cc892", "#c09be2", "#f0818c", "#5cc7d0", "#c9aa73", "#a5acb8")
STYLES = ("-", (0, (4, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)))
SIZE = (3.9, 2.5)  # inches of a panel
COLUMNS = 4
ROW = 3.0  # inches of a row of the sheet, titles included
SETTINGS = {
    "font.size": 8.5, "font.family": "DejaVu Sans", "axes.edgecolor": MUTED, "axes.labelcolor": MUTED, "text.color": INK, "xtick.color": MUTED,
    "ytick.color": MUTED, "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.6, "xtick.major.width": 0.6,
    "ytick.major.width": 0.6, "grid.color": GRID, "grid.linewidth": 0.6, "axes.axisbelow": True, "svg.fonttype": "none", "text.parse_math": False,
    "lines.solid_capstyle": "round", "axes.formatter.useoffset": False, "axes.formatter.limits": (-4, 5),
}  # fmt: skip


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def picture(groups: list[Group], path: Path, sections: Sections = SECTIONS) -> None:
    """Every panel on one sheet, four in a row; the format is that of the path's suffix."""
    pyplot = _pyplot()
    panels = [panel for _, section in sections for panel in section]
    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    with pyplot.rc_context(SETTINGS):
        head = 0.35 if len(groups) > 1 else 0.0
        height = ROW * rows + head
        figure, axes = pyplot.subplots(rows, columns, figsize=(SIZE[0] * columns, height), squeeze=False)
        # Margins by hand: a layout engine draws everything twice, and half of a report's time goes into that.
        figure.subplots_adjust(
            left=0.16 / columns, right=1 - 0.04 / columns, top=1 - (head + 0.55) / height, bottom=0.42 / height, wspace=0.22, hspace=0.62
        )
        if path.suffix[1:] not in figure.canvas.get_supported_filetypes():
            pyplot.close(figure)
            raise ConfigError(f"--out: no picture can be written as {path.name}; end it in .png (or give a folder, .html or .csv)")
        for axis in axes.flat[len(panels) :]:
            axis.set_axis_off()
        for axis, panel in zip(axes.flat, panels, strict=False):
            draw(axis, panel, lines(panel, groups), groups)
            axis.set_title(panel.title, fontsize=10, fontweight="bold", loc="left", y=1.0, pad=24)
            axis.text(0, 1.09, panel.unit, transform=axis.transAxes, fontsize=8, color=MUTED)
        if len(groups) > 1:
            handles = [pyplot.Line2D([], [], color=colour(g), linewidth=2.5) for g in range(len(groups))]
            where = {"loc": "upper left", "bbox_to_anchor": (0.005, 1.0), "ncols": min(4, len(groups))}
            figure.legend(handles, [_named(g) for g in groups], **where, frameon=False, fontsize=10)
        figure.savefig(path, dpi=110, facecolor="white")
        pyplot.close(figure)


def svg(panel: Panel, drawn: list[Line], groups: list[Group], name: str) -> str:
    """One panel for the page: its text is text, its colours are the page's variables, so that it follows light and dark. name: unique on the page."""
    pyplot = _pyplot()
    with pyplot.rc_context({**SETTINGS, "svg.hashsalt": name}):
        figure, axis = pyplot.subplots(figsize=SIZE)
        figure.subplots_adjust(left=0.19 if panel.kind == "bars" else 0.135, right=0.985, top=0.93, bottom=0.155)
        draw(axis, panel, drawn, groups)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        pyplot.close(figure)
    text = out.getvalue()
    text = text[text.index("<svg") :]
    variables = {INK: "ink", MUTED: "muted", GRID: "grid", **{c: f"c{i}" for i, c in enumerate(PALETTE)}}
    text = re.sub(r"(?<=: )(#[0-9a-f]{6})(?=[;\"])", lambda m: f"var(--{variables[m[1]]})" if m[1] in variables else m[1], text)
    text = re.sub(r"font: ([\d.]+px) [^;\"]+", r"font: \1 inherit; font-family: inherit", text)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    # Ids are the figure's own: several figures stand on one page.
    text = re.sub(r'(\bid="|href="#|url\(#)', lambda m: f"{m[1]}{name}-", text)
    head = r'<svg xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="\1" aria-hidden="true">'
    return re.sub(r'<svg [^>]*?viewBox="([^"]+)"[^>]*>', head, text, count=1)


def colour(number: int) -> str:
    return PALETTE[number % len(PALETTE)]


def _named(group: Group) -> str:
    return f"{group.label} ({len(group.runs)} seeds)" if len(group.runs) > 1 else group.label


def draw(axis, panel: Panel, drawn: list[Line], groups: list[Group]) -> None:
    """The numbers of a panel. A group is a colour, a series a style of line; where there is one group the series have colours as well."""
    if not drawn:
        axis.set_axis_off()
        keys = "\n".join(key for key, _ in panel.series)
        axis.text(0.5, 0.5, f"not in these runs:\n{keys}", ha="center", va="center", color=MUTED, transform=axis.transAxes, linespacing=1.5)
        return
    axis.set_title("", y=1.0)  # a place of its own, or every tick label is laid out once more to find one
    axis.grid(axis="x" if panel.kind == "bars" else "y")
    axis.tick_params(length=2.5)
    {"lines": _curves, "histogram": _stairs, "bars": _bars}[panel.kind](axis, panel, drawn, groups)


def _curves(axis, panel: Panel, drawn: list[Line], groups: list[Group]) -> None:
    one = len(groups) == 1
    for line in drawn:
        colour_ = colour(line.series if one else line.group)
        style = {"color": colour_, "linestyle": STYLES[line.series % len(STYLES)]}
        if line.low and len(line.x) > 1:
            axis.fill_between(line.x, line.low, line.high, color=colour_, alpha=0.13, linewidth=0)
        elif line.runs > 1:
            for x, y in line.seeds:
                axis.plot(x, y, **style, linewidth=0.7, alpha=0.35)
        few = {"marker": "o", "markersize": 3.2} if len(line.x) <= 12 else {}
        axis.plot(line.x, line.mean, **style, **few, linewidth=1.7)
    warmup = panel.series[0][0].startswith("warmup/")
    if not warmup:
        _switches(axis, groups)
        last = max((run.steps[-1]["step"] for group in groups for run in group.runs if run.steps), default=1)
        axis.set_xlim(-0.02 * last, max(1, last) * 1.02)
    _limits(axis, panel)
    axis.set_xlabel("warm-up step" if warmup else "step", labelpad=1)
    axis.xaxis.get_major_locator().set_params(integer=True, nbins=6)
    _series_legend(axis, drawn, one)


def _switches(axis, groups: list[Group]) -> None:
    """Where stage 2 begins: the median of a group's runs."""
    named = False
    for g, group in enumerate(groups):
        steps = sorted(s for run in group.runs if (s := run.stage2) is not None)
        if steps:
            axis.axvline(steps[len(steps) // 2], color=MUTED if len(groups) == 1 else colour(g), linestyle=(0, (1, 2)), linewidth=1)
            if not named:
                where = {"xycoords": axis.get_xaxis_transform(), "textcoords": "offset points", "ha": "center"}
                axis.annotate("stage 2", (steps[len(steps) // 2], 1.0), (0, 2), **where, fontsize=7, color=MUTED)
            named = True


def _limits(axis, panel: Panel) -> None:
    low, high = panel.limits
    if high is not None:
        axis.set_ylim(low - 0.03 * (high - low), high + 0.03 * (high - low))
    elif low is not None:
        top = axis.get_ylim()[1]
        axis.set_ylim(low, low + 1.08 * (top - low) if top > low else low + 1.0)


def _series_legend(axis, drawn: list[Line], one: bool) -> None:
    names = {line.series: line.name for line in drawn if line.name}
    if not names:
        return
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=colour(s) if one else MUTED, linestyle=STYLES[s % len(STYLES)], linewidth=1.6) for s in names]
    style = {"fontsize": 7.5, "frameon": False, "handlelength": 2.2, "labelcolor": MUTED, "borderaxespad": 0.3, "labelspacing": 0.25}
    axis.legend(handles, names.values(), loc="best", **style)


def _stairs(axis, panel: Panel, drawn: list[Line], groups: list[Group]) -> None:
    one = len(groups) == 1
    for line in drawn:
        edges = [*line.x, 1.0]
        colour_ = colour(line.series if one else line.group)
        axis.stairs(line.mean, edges, color=colour_, linestyle=STYLES[line.series], linewidth=1.6, baseline=None)
        if line.series == 0:
            axis.stairs(line.mean, edges, fill=True, color=colour_, alpha=0.13)
    axis.set_xlim(0, 1)
    _limits(axis, panel)
    axis.set_xlabel("expected success (1: easy)", labelpad=1)
    _series_legend(axis, drawn, one)


def _bars(axis, panel: Panel, drawn: list[Line], groups: list[Group]) -> None:
    names = drawn[0].x
    thick = 0.76 / len(drawn)
    for i, line in enumerate(drawn):
        at = [k + (i - (len(drawn) - 1) / 2) * thick for k in range(len(names))]
        axis.barh(at, line.mean, thick * 0.92, color=colour(line.group), linewidth=0)
    axis.set_yticks(range(len(names)), names)
    axis.tick_params(axis="y", length=0)
    axis.invert_yaxis()
    axis.set_xlabel("seconds per step", labelpad=1)
