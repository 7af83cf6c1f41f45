"""What runs inside the workers: each judge takes a job and gives {"status": ...} with "reward" where the status is "judged".

* math: math-verify, without its own time limits: they are alarms, which cancel other people's, end in a silent False, and do not reach C code.
  The pool's deadline is the limit. A parsed object is never turned into text: that alone can take for ever.
* reasoning_gym: the task's own scorer.
* module:function, the user's own: f(response, problem), plain or async, gives True, False, a number in [0, 1], or None to leave the sample out.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import json
import logging
import math
from collections.abc import Callable
from functools import lru_cache
from itertools import product
from typing import Any

Judge = Callable[..., dict[str, Any]]


def make(kind: str) -> Judge:
    """The judge of a kind. Imports what it needs; whatever that raises is the answer to the question why it cannot be used."""
    return {"math": mathematics, "reasoning_gym": reasoning_gym}.get(kind, lambda: of_user(kind))()


def judged(reward: float) -> dict[str, Any]:
    if not (math.isfinite(reward) and 0 <= reward <= 1):  # a NaN would leave the rollout out without being counted
        raise ValueError(f"a reward must be a number in [0, 1], got {reward!r}")
    return {"status": "judged", "reward": reward}


def mathematics() -> Judge:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify
    from sympy import Basic, MatrixBase

    logging.disable(logging.CRITICAL)  # math-verify logs the texts that it cannot read
    configs = {"latex": LatexExtractionConfig(), "expr": ExprExtractionConfig()}

    def read(text: str, types: tuple[str, ...]) -> list:
        try:
            return parse(text, [configs[t] for t in types], parsing_timeout=None, raise_on_error=True)
        except MemoryError:
            raise
        except Exception:
            return []

    @lru_cache(256)  # a group shares its gold answer
    def read_gold(text: str, types: tuple[str, ...]) -> list:
        return read(text, types)

    def judge(gold: str, answer: str, types: tuple[str, ...] = ("latex", "expr"), options: dict[str, Any] | None = None) -> dict[str, Any]:
        """gold and answer are texts as math-verify reads them: LaTeX in an environment, or bare expressions."""
        golds, answers = read_gold(gold, types), read(answer, types)
        if not golds:
            return {"status": "gold"}
        failed = not answers
        for one, other in product(golds, answers):
            try:
                if verify(one, other, timeout_seconds=None, raise_on_error=True, **(options or {})):
                    return judged(1.0)
            except MemoryError:
                raise
            except Exception:
                failed = True
        unread = not any(isinstance(a, (Basic, MatrixBase)) for a in answers) and any(isinstance(g, (Basic, MatrixBase)) for g in golds)
        return {"status": "unparseable"} if failed or unread else judged(0.0)

    judge(r"\boxed{\frac{1}{2}}", r"\boxed{0.5}")  # compiles the expressions that every call needs
    return judge


def reasoning_gym() -> Judge:
    import reasoning_gym as gym

    @lru_cache(64)
    def dataset(task: str, options: str):
        return gym.create_dataset(task, **json.loads(options))

    def judge(task: str, options: str, entry: dict[str, Any], answer: str) -> dict[str, Any]:
        return judged(float(dataset(task, options).score_answer(answer, entry)))

    return judge


def of_user(path: str) -> Judge:
    function = find(path)
    loop = asyncio.new_event_loop()

    async def awaited(found):
        return await found

    def judge(response: str, problem: Any) -> dict[str, Any]:
        found = function(response, problem)
        if inspect.isawaitable(found):
            found = loop.run_until_complete(awaited(found))
        if found is None:
            return {"status": "skipped"}
        reward = float(found)
        if not (math.isfinite(reward) and 0 <= reward <= 1):
            raise ValueError(f"{path} must give True, False, None or a number in [0, 1], got {found!r}")
        return judged(reward)

    return judge


def find(path: str) -> Callable:
    """module:function, or module.function."""
    module, _, name = path.partition(":") if ":" in path else path.rpartition(".")
    found = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    if not callable(found):
        raise TypeError(f"{path} is not callable: {type(found).__name__}")
    return found
