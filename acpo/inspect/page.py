"""One HTML file that needs nothing else: no network, and a Content-Security-Policy that lets run the one script and the one style in it, by their
hashes. What comes from a rollout is data for that script (JSON in a data block, where no < stands), and is shown as text."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from pathlib import Path

from .data import MEASURES, RULES, Group, Rollout, View
from .shown import ROLLOUT, SURPRISE, summary, visible

HERE = Path(__file__).parent


def page(view: View, order: str = "surprise") -> str:
    """The view as HTML, its groups and rollouts in the given order at first."""
    style, script = ((HERE / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    csp = f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; base-uri 'none'; form-action 'none'"
    filled = {
        "csp": csp,
        "title": html.escape(visible(f"{view.title} · acpo inspect")),
        "style": style,
        "data": _json(_data(view, order)),
        "script": script,
    }
    text = (HERE / "page.html").read_text(encoding="utf-8")
    parts = [text]
    for name, value in filled.items():  # in the template's order, each in what is left of it: a value is never searched for a name
        before, found, after = parts.pop().partition(f"{{{name}}}")
        assert found, name
        parts += [before, value, after]
    return "".join(parts)


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _json(value: object) -> str:
    """JSON in which no tag, comment or entity can begin or end."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _data(view: View, order: str) -> dict:
    measures = view.measures or MEASURES[:1]
    scales = {name: _short(view.scale(name)) for name, *_ in measures}
    return {
        "title": view.title, "summary": summary(view), "order": order, "notes": view.notes, "surprise": SURPRISE, "rollout": ROLLOUT,
        "measures": measures, "rules": RULES, "scale": scales, "groups": [_group(g, [name for name, *_ in measures]) for g in view.groups],
    }  # fmt: skip


def _group(group: Group, names: list[str]) -> dict:
    twins = group.twins
    return {
        "number": group.number, "problem": group.problem, "prompt": group.prompt, "answer": group.answer, "rate": group.pass_rate,
        "rollouts": [_rollout(r, names) | {"twin": twins.get(r.number)} for r in group.rollouts],
    }  # fmt: skip


def _rollout(rollout: Rollout, names: list[str]) -> dict:
    steps = {name: [_short(getattr(s, name)) for s in rollout.steps] for name in names}
    # JavaScript counts a character beyond the first 65,536 as two.
    wide = [i for i, c in enumerate(rollout.text) if c > "\uffff"]
    ends, at = [], 0
    for step in rollout.steps:
        while at < len(wide) and wide[at] < step.end:
            at += 1
        ends.append(step.end + at)
    return {
        "number": rollout.number, "text": rollout.text, "outcome": rollout.outcome, "verdict": rollout.verdict, "given": rollout.given,
        "finished": rollout.finished, "advantage": _short(rollout.advantage), "reliability": _short(rollout.reliability), "source": rollout.source,
        "surprise": _short(rollout.surprise), "tokens": rollout.tokens, "answered": bool(rollout.steps) and rollout.steps[-1].answer, "ends": ends,
        "counts": [s.tokens for s in rollout.steps], "rules": [s.rule for s in rollout.steps],
        "steps": {name: values for name, values in steps.items() if any(v is not None for v in values)},
    }  # fmt: skip


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")
