"""The page of a report: one HTML file, its figures inline, nothing fetched. Whatever comes from a run is escaped."""

from __future__ import annotations

from html import escape

import yaml

from .figure import PALETTE, colour, svg
from .panels import POINTS, SECTIONS, Line, Panel, Sections, lines
from .records import LEAST_SEEDS, Group, area, cell, columns, group_summary, summary
from .style import STYLE


def html(groups: list[Group], sections: Sections = SECTIONS) -> str:
    """The whole page."""
    runs = [run for group in groups for run in group.runs]
    title = runs[0].name if len(runs) == 1 else f"{', '.join(g.label for g in groups)}: {len(runs)} runs"
    body, number = [], 0
    for heading, panels in sections:
        cards = []
        for panel in panels:
            cards.append(_card(panel, lines(panel, groups), groups, f"f{number}"))
            number += 1
        head = f"<h2>{escape(heading)}</h2>" if heading else ""
        body.append(f"<section>{head}<div class='grid'>{''.join(cards)}</div></section>")
    return (
        "<!doctype html><html lang='en'><meta charset='utf-8'><meta name='viewport' content='width=device-width,initial-scale=1'>"
        "<meta http-equiv='Content-Security-Policy' content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">"
        f"<title>{escape(title)}</title><style>{STYLE}</style><h1>{escape(title)}</h1><p class='muted'>{escape(_lead(groups))}</p>"
        f"{_legend(groups)}{_summary(groups)}{''.join(body)}{_settings(groups)}</html>"
    )


def _lead(groups: list[Group]) -> str:
    runs = [run for group in groups for run in group.runs]
    text = f"Each point of a longer curve is the mean of its steps, {POINTS} points at most. Dotted vertical line: stage 2 begins."
    if len(runs) > len(groups):
        text += " Curves of several seeds: their mean, as far as the shortest run goes; "
        text += f"shaded, from {LEAST_SEEDS} seeds on, its 95 % interval (Student's t)."
    if len(runs) == 1:
        text = f"Mean held-out accuracy over the token budget (area): {cell(area(runs[0].steps))}. " + text
    return text


def _legend(groups: list[Group]) -> str:
    if len(groups) == 1:
        return ""
    items = []
    for g, group in enumerate(groups):
        count = f"{len(group.runs)} run{'s' * (len(group.runs) > 1)}"
        items.append(f"<span><i style='background:var(--c{PALETTE.index(colour(g))})'></i>{escape(group.label)} <small>{count}</small></span>")
    return f"<div class='legend'>{''.join(items)}</div>"


def _summary(groups: list[Group]) -> str:
    """The means of each group, and every run behind a click; of groups of one run each the runs."""
    runs = _rows([summary(run) for group in groups for run in group.runs])
    if all(len(group.runs) == 1 for group in groups):
        return runs
    return _rows([group_summary(group) for group in groups]) + f"<details><summary>every run</summary>{runs}</details>"


def _rows(rows: list[dict]) -> str:
    names = columns(rows)
    head = "".join(f"<th scope='col'>{escape(n)}</th>" for n in names)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell(row[n])) if n in row else ''}</td>" for n in names) + "</tr>" for row in rows)
    return f"<div class='scroll'><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _card(panel: Panel, drawn: list[Line], groups: list[Group], name: str) -> str:
    caption = f"<figcaption><b>{escape(panel.title)}</b><small>{escape(panel.unit)}</small></figcaption>"
    note = f"<small>{escape(panel.note)}</small>" if panel.note else ""
    if not drawn:
        keys = ", ".join(key for key, _ in panel.series)
        return f"<figure>{caption}<div class='empty'>not in these runs<br>{escape(keys)}</div></figure>"
    about = f"{escape(panel.title, quote=True)}: the numbers are in the table below"
    picture = f"<div role='img' aria-label='{about}'>{svg(panel, drawn, groups, name)}</div>"
    return f"<figure>{caption}{picture}{note}<details><summary>numbers</summary>{_table(panel, drawn, groups)}</details></figure>"


def _table(panel: Panel, drawn: list[Line], groups: list[Group]) -> str:
    """One row an x, one column a line; with its interval where there is one."""
    xs = sorted({x for line in drawn for x in line.x}) if panel.kind != "bars" else drawn[0].x
    heads = [", ".join(filter(None, (groups[line.group].label if len(groups) > 1 else "", line.name))) or panel.title for line in drawn]
    columns_ = [
        {x: cell(m) + (f" [{cell(lo)}, {cell(hi)}]" if line.low else "")
         for x, m, lo, hi in zip(line.x, line.mean, line.low or line.mean, line.high or line.mean, strict=True)}
        for line in drawn
    ]  # fmt: skip
    first = {"bars": "phase", "histogram": "from"}.get(panel.kind, "step")
    head = "".join(f"<th scope='col'>{escape(h)}</th>" for h in (first, *heads))
    rows = ""
    for x in xs:
        where = f"{x:g}" if isinstance(x, (int, float)) else x
        rows += f"<tr><td>{escape(where)}</td>" + "".join(f"<td>{escape(c.get(x, ''))}</td>" for c in columns_) + "</tr>"
    return f"<div class='scroll' tabindex='0'><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"


def _settings(groups: list[Group]) -> str:
    """Of each group's first run."""
    out = []
    for group in groups:
        text = yaml.safe_dump(group.runs[0].settings, sort_keys=False) if group.runs[0].settings else "config.yaml cannot be read"
        out.append(f"<details><summary>settings: {escape(group.label)} ({escape(group.runs[0].name)})</summary><pre>{escape(text)}</pre></details>")
    return "<section><h2>Settings</h2>" + "".join(out) + "</section>"
