r"""Outcome rewards: what a rollout is worth, from its text alone.

Kinds (`verify.kind`): exact match after a normal form, in this process; math-verify, a reasoning-gym task's own scorer or the user's own
`module:function` in worker processes (pool.py, worker.py, judges.py). Every rollout gets a Verdict; only "judged" says right or wrong:

    status        reward                  because
    judged        in [0, 1]               the answer was compared
    malformed     0                       verify.format is not met
    unparseable   0                       there is no answer, or none that can be read (skipping these would pay for hiding a wrong answer)
    timeout       verify.on_timeout       the deadline was over and the worker was killed
    crash         verify.on_timeout       the worker's memory did not suffice, or two workers died of it
    gold          left out                the problem's own answer cannot be read
    error         left out                the user's callable raised; where it does for all of a step or an evaluation, the run ends with its words
    skipped       left out                the user's callable gave None

What is left out (reward None) takes no part in its group's baseline nor in the loss. All of them are counted in the metrics.
"""

from __future__ import annotations

import importlib.util
import math
import os
import time
from collections import Counter
from concurrent.futures import Future
from importlib import metadata
from typing import TYPE_CHECKING, NamedTuple

from ..config import Config, ConfigError, VerifyConfig
from ..limits import VERIFIERS
from ..problems import Problem
from .answers import behind, extract_answer, last_boxed, last_boxes, last_number, marked_answer, normalise, same, well_formed
from .pool import Pool, VerifyError

if TYPE_CHECKING:
    import numpy as np

__all__ = ["Pending", "Verdict", "Verifier", "VerifyError", "kind_of", "rewards"]

TAIL = 8192  # characters at the end of a rollout without a marked answer that math-verify looks through
LIMIT = 3  # steps of one problem each whose rollouts all raised: one such problem is the data's fault, three in a row are the callable's
STATUSES = ("judged", "malformed", "unparseable", "timeout", "crash", "gold", "error", "skipped")
COUNTED = {"timeout": "timeouts", "crash": "crashes", "unparseable": "unparseable", "malformed": "malformed", "gold": "gold", "error": "errors"}


class Verdict(NamedTuple):
    reward: float | None  # None: left out
    status: str


class Pending:
    """Verdicts that are being made: `result()` waits for them."""

    def __init__(self, verifier: Verifier, known: list[Verdict | Future]):
        self.verifier, self.known, self.begin = verifier, known, time.perf_counter()

    def result(self) -> list[Verdict]:
        verdicts = []
        for one in self.known:
            if isinstance(one, Future):
                reply = one.result()
                status = {"memory": "crash", "died": "crash"}.get(reply["status"], reply["status"])
                self.verifier.said = reply.get("why", self.verifier.said)
                one = Verdict(self.verifier.worth(status, reply.get("reward")), status)
            verdicts.append(one)
        self.verifier.count(verdicts, time.perf_counter() - self.begin)
        return verdicts


class Verifier:
    """Built once a run: the workers start with it and end with `close()`, or with the process."""

    def __init__(self, config: VerifyConfig, kind: str):
        self.config, self.kind, self.pool = config, kind, None
        self.counts: Counter[str] = Counter()
        self.seconds, self.kills_told = 0.0, 0
        self.said, self.raised = "", 0  # the last words of a callable that raised; steps in a row in which it did nothing else
        if kind == "exact":
            return
        for name, module, extra in (("math", "math_verify", "math"), ("reasoning_gym", "reasoning_gym", "reasoning-gym")):
            if kind == name and importlib.util.find_spec(module) is None:
                raise ConfigError(f"verify.kind = {kind!r} needs {module.replace('_', '-')}: pip install -e '.[{extra}]'")
        own = kind not in VERIFIERS
        setup = {"kind": kind, "memory_gb": config.memory_gb, "network": config.network, "talks": own}
        try:
            self.pool = Pool(setup, config.workers or min(8, os.cpu_count() or 1), config.timeout)
        except VerifyError as error:
            raise ConfigError(str(error)) from None

    def __call__(self, problems: list[Problem], responses: list[str]) -> list[Verdict]:
        verdicts = self.submit(problems, responses).result()
        self.whole(problems, [v.status for v in verdicts])
        return verdicts

    def whole(self, problems: list[Problem], statuses: list[str]) -> None:
        """Told of all rollouts of a step or an evaluation. A VerifyError where the callable raised for every one of several problems, or of one
        problem LIMIT times in a row: there is nothing to train on."""
        if not statuses or any(status != "error" for status in statuses):
            self.raised = 0
            return
        self.raised += 1
        if self.raised == LIMIT or len({(p.id, p.prompt) for p in problems}) > 1:
            raise VerifyError(f"verify.kind: {self.kind!r} raised for every rollout: {self.said}")

    def submit(self, problems: list[Problem], responses: list[str]) -> Pending:
        """Hands the rollouts over and comes back at once; what needs no worker is judged here. Equal questions are asked once."""
        found = [self._look(problem, response) for problem, response in zip(problems, responses, strict=True)]
        jobs: dict[tuple, tuple[tuple, list[int]]] = {}
        for i, job in enumerate(found):
            if not isinstance(job, Verdict):
                jobs.setdefault(job if self.kind == "math" else (i,), (job, []))[1].append(i)
        known: dict[int, Verdict | Future] = {i: one for i, one in enumerate(found) if isinstance(one, Verdict)}
        if jobs:
            assert self.pool is not None
            for (_, where), future in zip(jobs.values(), self.pool.submit([job for job, _ in jobs.values()]), strict=True):
                known.update(dict.fromkeys(where, future))
        return Pending(self, [known[i] for i in range(len(found))])

    def _look(self, problem: Problem, response: str) -> Verdict | tuple:
        """The verdict, or the job that a worker has to do for it."""
        if not well_formed(response, self.config.format):
            return Verdict(0.0, "malformed")
        if self.kind not in VERIFIERS:
            return response, problem
        text = behind(response, self.config.after)
        if text is None:
            return Verdict(0.0, "unparseable")
        if self.kind == "reasoning_gym":
            return problem.data["task"], problem.data["options"], problem.data["entry"], self._given(text)
        answer = self._answer(text)
        if answer is not None and self.kind == "math" and answer == last_boxed(text):
            answer = last_boxes(text) or answer  # the boxes of one answer together: the last one alone would be called right or not by its spelling
        if answer is not None:
            alike = same(answer, problem.answer)
            if self.kind == "exact" or (alike and not answer.startswith(".")):  # .5 is for math-verify to read
                return Verdict(float(alike), "judged")
            return boxed(problem.answer), boxed(answer)
        if self.kind == "exact" or self.config.extract not in ("auto", "text"):
            return Verdict(0.0, "unparseable")
        return boxed(problem.answer), text if self.config.extract == "text" else text[-TAIL:]

    def _answer(self, text: str) -> str | None:
        """What is compared: for exact match `extract_answer`; math-verify gets the marked answer, else (None) the text, to find one itself."""
        how = self.config.extract
        if self.kind == "exact":
            return extract_answer(text, how)
        return last_number(text) if how == "number" else marked_answer(text, how)

    def answer(self, response: str) -> str | None:
        """The answer of a rollout in its normal form, for a vote: the one that is judged. A callable of the user's judges the whole response: there
        it is what `verify.extract` finds, or all of it."""
        text = behind(response, self.config.after)
        if text is None:
            return None
        found = self._given(text) if self.kind == "reasoning_gym" else extract_answer(text, self.config.extract)
        if found is None and self.kind not in VERIFIERS:
            found = text
        return None if found is None else normalise(found)

    def _given(self, text: str) -> str:
        """What a reasoning-gym task's scorer is given."""
        return marked_answer(text, self.config.extract) or text.strip()

    def worth(self, status: str, reward: float | None) -> float | None:
        """The reward of a status (table above)."""
        if status == "judged":
            return reward
        if status == "unparseable" or (status in ("timeout", "crash") and self.config.on_timeout == "zero"):
            return 0.0
        return None

    def count(self, verdicts: list[Verdict], seconds: float) -> None:
        self.counts.update(COUNTED[v.status] for v in verdicts if v.status in COUNTED)
        self.counts["skipped"] += sum(v.reward is None for v in verdicts)
        self.seconds += seconds

    def metrics(self) -> dict[str, float]:
        """Rollouts of each kind, workers killed and seconds from hand-over to verdict, since the last call."""
        kills = self.pool.kills if self.pool else 0
        out: dict[str, float] = {f"verify/{name}": self.counts[name] for name in (*COUNTED.values(), "skipped")}
        out |= {"verify/kills": kills - self.kills_told, "verify/seconds": self.seconds}
        self.counts.clear()
        self.seconds, self.kills_told = 0.0, kills
        return out

    def describe(self) -> str:
        if self.pool is None:
            return "exact match"
        versions = {"math": "math-verify", "reasoning_gym": "reasoning-gym"}
        name = f"{versions[self.kind]} {metadata.version(versions[self.kind])}" if self.kind in versions else self.kind
        memory = f"{self.config.memory_gb:g} GB each" if self.config.memory_gb else "no memory limit"
        network = {"allowed": "network allowed", "namespace": "no network (namespace)", "guard": "no network (guard in Python)"}
        workers = len(self.pool.workers)
        return (
            f"{name} in {workers} worker{'s' * (workers > 1)}, {self.config.timeout:g} s a rollout, {memory}, "
            f"{network[self.pool.workers[0].news['network']]}"
        )

    def close(self) -> None:
        if self.pool is not None:
            self.pool.close()


def boxed(answer: str) -> str:
    r"""An answer as math-verify reads it: in \boxed{}, unless it brings an environment of its own."""
    text = answer.replace("\\$", "").strip()
    own = text.startswith(("$", "\\(", "\\[")) or text.endswith("$") or "\\boxed" in text
    return answer if own else f"\\boxed{{{answer}}}"


def kind_of(config: Config) -> str:
    """`verify.kind`, where "auto" is a reasoning-gym task's own scorer for its problems and exact match for all others."""
    if config.verify.kind != "auto":
        return config.verify.kind
    return "reasoning_gym" if config.problems.path.startswith("reasoning_gym:") else "exact"


def rewards(problems: list[Problem], verdicts: list[Verdict], rng: np.random.Generator) -> list[float]:
    """The rewards, NaN for what is left out; a problem with luck < 1 pays a right answer with that probability."""
    out = []
    for problem, verdict in zip(problems, verdicts, strict=True):
        reward = math.nan if verdict.reward is None else verdict.reward
        out.append(0.0 if reward > 0 and problem.luck < 1 and rng.random() >= problem.luck else reward)
    return out
