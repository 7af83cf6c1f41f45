"""Rollouts to look at, made by hand: no torch, so that the browser's environment can make them too."""

from __future__ import annotations

import random
from pathlib import Path

from acpo.inspect.data import Group, Rollout, Step, View

# Everything that a rollout might try: tags, the end of a script, quotes, entities, NUL, an ANSI escape, bidirectional overrides, invisible
# characters, markup of the terminal library, a wide character.
HOSTILE = (
    "<script>window.hit = 1</script></script><img src=x onerror='window.hit=1'> \"quoted\" 'so' &lt;b&gt; <!-- ]]> \x00 \x1b[31mred\x1b[0m \x07"
    " \u202eright to left\u202c \u2066 \u200bhidden \u2028 [bold]not bold[/bold] \x9b2J {data} {script} \U000e0041 \U0001f600 end"
)

WORDS = "the sum of two numbers is then so we take it again wait let me check that step by step first because here x equals 3 and y 42"


def rollout(number: int, credits: list[float | None], outcome: float | None, advantage: float | None = 0.0, tokens: int = 10, **more) -> Rollout:
    """A rollout whose steps have the given credits; the text of step k is "step k." and an end of line."""
    texts = more.pop("texts", None) or [f"step {k}.\n" for k in range(1, len(credits) + 1)]
    answered, numbers = more.pop("answered", False), more.pop("numbers", {})
    steps, at = [], 0
    for k, (text, credit) in enumerate(zip(texts, credits, strict=True)):
        last = k == len(credits) - 1
        own = None if credit is None or advantage is None else credit - advantage
        steps.append(Step(at, at + len(text), tokens, "end" if last else "line", answered and last, credit=credit, own=own, **numbers))
        at += len(text)
    fields = {"status": "judged", "given": "7", "finished": True, "reliability": None, **more}
    return Rollout(number, "".join(texts), steps, outcome, advantage=advantage, **fields)


def group(rollouts: list[Rollout], number: int = 1, problem: str = "p1", prompt: str = "How many?", answer: str = "7") -> Group:
    return Group(number, problem, prompt, answer, rollouts)


def view(*groups: Group, title: str = "run", step: int | None = 3, notes: tuple[str, ...] = ()) -> View:
    return View(title, step, list(groups), list(notes))


def example() -> View:
    """Three problems: mixed, all wrong, one rollout without credit."""
    numbers = {"phi": 0.25, "iota": -0.5, "hindsight": 1.5, "value": 0.75, "entropy": 0.33, "logp": -0.44, "weight": 1.0}
    mixed = [
        rollout(1, [1.0, -0.5, 1.0], 1.0, 1.0, answered=True, numbers=numbers, source="tree", reliability=0.5),
        rollout(2, [-1.0, -1.0], 0.0, -1.0, tokens=20, given=None, status="unparseable"),
        rollout(3, [2.0, -1.0, 0.25, -1.0], 0.0, -1.0),
        rollout(4, [0.0], None, None, status="timeout", finished=False),
    ]
    wrong = [rollout(n, [0.0, 0.1], 0.0, numbers={"entropy": 1.0}) for n in (1, 2)]
    return view(group(mixed), group(wrong, 2, "p2", HOSTILE, "<b>8</b>"), group([rollout(1, [None], 1.0, None)], 3, "p3"))


def many(rollouts: int = 64, tokens: int = 4096, each: int = 64) -> View:
    """One group of long rollouts, English of about 4.5 characters a token, for measuring the page."""
    chance = random.Random(0)
    words = WORDS.split()
    out = []
    for number in range(1, rollouts + 1):
        right = chance.random() < 0.4
        advantage, steps = (1.2, []) if right else (-0.8, [])
        for _ in range(tokens // each):
            steps.append(" ".join(chance.choice(words) for _ in range(each)) + "\n\n")
        credits = [advantage + chance.gauss(0, 0.7) for _ in steps]
        made = rollout(number, credits, float(right), advantage, each, texts=steps)
        for step in made.steps:
            step.rule, step.phi, step.iota, step.hindsight = "paragraph", chance.gauss(0, 0.1), chance.gauss(0, 0.2), chance.gauss(0, 2)
            step.value, step.entropy, step.logp = chance.random(), chance.random(), -chance.random()
        out.append(made)
    return view(group(out, prompt="A question of two lines.\nWhat is x + y?"), title="many")


def write(view: View, folder: Path) -> Path:
    """page.html of the view in the folder."""
    from acpo.inspect.page import page

    view.sort("surprise")
    path = folder / "page.html"
    path.write_text(page(view), encoding="utf-8")
    return path
