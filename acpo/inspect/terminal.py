"""Rollouts side by side in a terminal: as many columns as fit, each step with its sign and size as text, a bar, and where there is colour a shade."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.cells import cell_len
from rich.console import Console
from rich.console import Group as Lines
from rich.style import Style
from rich.table import Table
from rich.text import Text

from ..display import Paper, output
from .data import MEASURES, RULES, Group, Rollout, Step, View
from .shown import plural, summary, visible

NARROWEST = 40  # columns of a rollout
FOR, AGAINST, SIZE = ((160, 200, 240), (90, 165, 235)), ((246, 188, 174), (236, 112, 92)), ((205, 190, 242), (165, 140, 230))
SIGNED = {name: signed for name, _, _, signed, *_ in MEASURES}
BLOCKS = " ▏▎▍▌▋▊▉█"


@contextmanager
def printing(width: int = 0, plain: bool = False) -> Iterator[Console]:
    """A console of the given width (0: the terminal's; piped, that of COLUMNS or 120), without colours where asked."""
    if not width and not sys.stdout.isatty() and not os.environ.get("COLUMNS"):
        width = 120
    with output():
        yield Paper(no_color=plain or None, highlight=False, width=width or None)


def show(view: View, console: Console, shade: str = "credit", groups: int = 1, rollouts: int = 0, figures: bool = False) -> None:
    """Prints the view: what there is, then the first `groups` groups (0: all) with their first `rollouts` rollouts (0: all). figures: every
    figure of a step under its text."""
    scale = view.scale(shade)
    console.print(Text(visible(view.title), "bold"), Text(summary(view)))
    label, what, unit = next((label, what, unit) for name, label, _, _, what, unit in MEASURES if name == shade)
    most = f"{number(scale, False)} {unit}".rstrip()
    measured = any(name == shade for name, *_ in view.measures)
    ends = f"full bar and shade at {'±' if SIGNED[shade] else ''}{most}" if scale else "0 in every step" if measured else "not measured here"
    console.print(Text(f"shade: {label}, {what}; {ends}"))
    console.print(Text("surprise: credit per token against the verdict (negative in right rollouts, positive in wrong ones)"))
    there = {step.rule for r in view.rollouts for step in r.steps}
    console.print(Text("a step ends with: " + "; ".join(f"{sign} {why}" for rule, (sign, why) in RULES.items() if rule in there)))
    for note in view.notes:
        console.print(Text(f"note: {visible(note)}"))
    chosen = view.groups[: groups or None]
    if len(view.groups) > len(chosen):
        console.print()
        console.print(_overview(view, console.width))
    for group in chosen:
        console.print()
        _group(group, console, shade, scale, rollouts, [m for m in view.measures if m[0] != shade] if figures else [])


def _overview(view: View, width: int) -> Table:
    names = min(max(7, *(cell_len(visible(g.problem)) for g in view.groups)), 32)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("problem", width=names, overflow="fold")
    for name, wide in (("right", 7), ("surprise", 8), ("tokens", 6)):
        table.add_column(name, width=wide, justify="right", no_wrap=True)
    table.add_column("question", width=max(10, width - names - 31), no_wrap=True, overflow="ellipsis")
    for group in view.groups:
        right = sum(r.outcome is not None and r.outcome > 0.5 for r in group.rollouts)
        question = " ".join(visible(group.prompt).split())
        mean = sum(r.tokens for r in group.rollouts) / max(1, len(group.rollouts))
        cells = (visible(group.problem), f"{right}/{len(group.rollouts)}", number(group.surprise, False), f"{mean:.0f}", question)
        table.add_row(*map(Text, cells))
    return table


def _group(group: Group, console: Console, shade: str, scale: float, rollouts: int, figures: list[tuple]) -> None:
    console.rule(Text(f"problem {visible(group.problem)}", "bold"), align="left", style="default")
    console.print(Text(visible(group.prompt)))
    if group.answer:
        console.print(Text.assemble("answer ", (visible(group.answer), "bold")))
    shown = group.rollouts[: rollouts or None]
    if len(shown) < len(group.rollouts):
        console.print(Text(f"the first {len(shown)} of {plural(len(group.rollouts), 'rollout')}"))
    twins = group.twins
    across = max(1, min(len(shown), (console.width + 2) // (NARROWEST + 2)))
    width = (console.width + 2) // across - 2
    for first in range(0, len(shown), across):
        console.print()
        table = Table.grid(padding=(0, 2, 0, 0))
        for _ in range(across):
            table.add_column(width=width, vertical="top", overflow="fold")
        table.add_row(*(_rollout(r, shade, scale, figures, width, twins.get(r.number)) for r in shown[first : first + across]))
        console.print(table)


def _rollout(rollout: Rollout, shade: str, scale: float, figures: list[tuple], width: int, twin: int | None) -> Lines:
    side = "" if rollout.outcome is None else "green" if rollout.outcome > 0.5 else "red" if rollout.outcome < 0.5 else ""
    mark = {"green": "✓", "red": "✗"}.get(side, "○")
    same = f"= #{twin} " if twin else ""
    head = Text.assemble((f"#{rollout.number} {same}", "bold"), (f"{mark} {rollout.verdict}", f"bold {side}".strip()))
    if rollout.given is not None:
        head.append(f"  read {visible(rollout.given)}")
    facts = [f"surprise {number(rollout.surprise, False)}", plural(rollout.tokens, "token")]
    if rollout.advantage is not None:
        facts.insert(0, f"A {number(rollout.advantage, True)}")
    if rollout.source is not None:
        facts.append(f"{rollout.source} {number(rollout.reliability, False)}")
    if not rollout.finished:
        facts.append("cut off")
    lines = [head, Text(" · ".join(facts))]
    for k, step in enumerate(rollout.steps, 1):
        lines += _step(rollout, k, step, shade, scale, figures, width)
    if not rollout.steps:
        lines.append(Text("(an empty response)"))
    return Lines(*lines)


def _step(rollout: Rollout, k: int, step: Step, shade: str, scale: float, figures: list[tuple], width: int) -> list[Text]:
    value = getattr(step, shade)
    much = min(1.0, abs(value) / scale) if value is not None and scale else 0.0
    style = _style(value, much, SIGNED[shade])
    sign, _ = RULES[step.rule]
    head = Text(f"{k:>3} {sign} {number(value, SIGNED[shade]):>6} ", style="bold")
    head.append(f"{bar(much, 8):8} ", style="default")
    if step.answer:
        head.append("answer ")
    text = Text(visible(rollout.text[step.start : step.end]).rstrip("\n").expandtabs(4) or " ", style=style)
    fits = "\n" not in text.plain and cell_len(head.plain) + cell_len(text.plain) <= width
    lines = [head + text] if fits else [head, text]
    if figures:
        found = [(short, getattr(step, name), signed) for name, _, short, signed, *_ in figures]
        lines.append(Text(" ".join(f"{short}\u00a0{number(x, signed)}" for short, x, signed in found if x is not None), style="dim"))
    return lines


def _style(value: float | None, much: float, signed: bool) -> Style:
    """Black on a shade between the two ends. Below an eighth there is none: a pale one would be the brightest thing in a dark terminal."""
    if value is None or much < 0.125:
        return Style()
    low, high = SIZE if not signed else FOR if value > 0 else AGAINST
    red, green, blue = (round(a + (b - a) * much) for a, b in zip(low, high, strict=True))
    return Style.parse(f"#16181d on #{red:02x}{green:02x}{blue:02x}")


def bar(share: float, width: int) -> str:
    """A bar of the share of width, in eighths of a cell."""
    eighths = round(share * width * 8)
    return "█" * (eighths // 8) + (BLOCKS[eighths % 8] if eighths % 8 else "")


def number(value: float | None, signed: bool) -> str:
    """Two decimals, fewer from 10 on; with a + where signs count, without a sign for 0.00."""
    if value is None:
        return "-"
    size = abs(value)
    digits = f"{size:.0f}" if size >= 100 else f"{size:.1f}" if size >= 10 else f"{size:.2f}"
    sign = "" if float(digits) == 0 else "-" if value < 0 else "+" if signed else ""
    return sign + digits
