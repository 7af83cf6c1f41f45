"""Where a run's problems come from: a synthetic task, a reasoning-gym task, or data; and which of them are kept apart."""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import unicodedata

import yaml

from .config import Config, ConfigError, ProblemsConfig
from .problems import HINT, Problem, load
from .synthetic import TASKS, Chain, Multiplication, problems

FIFTH = 0.2  # of the hashes: no more are held out where a number is wanted


def load_problems(config: Config) -> tuple[Chain | Multiplication | None, list[Problem], list[Problem]]:
    """(synthetic task or None, training problems, held-out problems); no question stands in both."""
    settings = config.problems
    if settings.task:
        kinds = {
            "multiplication": {"digits": settings.digits},
            "chain": {name: getattr(settings, name) for name in ("steps", "modulus", "distractors", "luck", "decoys")},
        }
        try:
            task = TASKS[settings.task](
                **kinds[settings.task], hard=settings.hard, q=(settings.wrong_low, settings.wrong_high), table_seed=settings.seed
            )
            if settings.held_out > task.different:
                raise ValueError(f"problems.held_out must be at most the task's {task.different} different problems, got {settings.held_out:.0f}")
            # Streams that no other seed has: those of one seed are held out from no training problems but its own.
            held_out = problems(task, int(settings.held_out), 2 * settings.seed + 1)
            train = problems(task, settings.train, 2 * settings.seed + 2, frozenset(p.id for p in held_out))
        except ValueError as error:
            raise ConfigError(str(error)) from None
        return task, train, held_out
    if settings.path.startswith("reasoning_gym:"):
        held_out = gym_problems(settings, int(settings.held_out), stream=0)
        return None, gym_problems(settings, settings.train, stream=1, exclude={question_key(p) for p in held_out}), held_out
    found = read(settings)
    if len(found) < 5:
        raise ConfigError(f"problems.path: {settings.path} holds {len(found)} problems: at least 5 are needed to keep one apart")
    train, held_out = split(found, settings.held_out, settings.seed)
    if len({question_key(p) for p in found}) == 1:
        raise ConfigError(f"problems.path: {settings.path} holds one question {len(found)} times: it cannot be trained on and held out as well")
    if not train or not held_out:
        raise ConfigError(f"problems.held_out = {settings.held_out:g} keeps {len(held_out)} of {len(found)} problems apart: give another share")
    return None, train, held_out


def read(settings: ProblemsConfig) -> list[Problem]:
    """Every problem of a file, folder or hub data set."""
    names = ("question", "answer", "answer_after", "cell", "template", "hint", "subset", "split")
    return load(settings.path, **{name: getattr(settings, name) for name in names})


# --- the held-out set -----------------------------------------------------------------------------------------------------------------


def question_key(problem: Problem) -> str:
    """What makes two problems one: the question, whatever its letter case, spacing and Unicode form, template or answer."""
    return " ".join(unicodedata.normalize("NFKC", problem.question or problem.prompt).casefold().split())


def place(problem: Problem, seed: int) -> float:
    """A number in [0, 1) that depends on the question and the seed alone."""
    digest = hashlib.blake2b(f"{seed}:{question_key(problem)}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def split(found: list[Problem], held_out: float, seed: int) -> tuple[list[Problem], list[Problem]]:
    """(training, held out), in the order of the data. A share holds out the places below it. A number n holds out at most n problems (more only where
    the last question stands there several times): the smallest places below a fifth, and the very smallest in any case."""
    places = [place(p, seed) for p in found]
    if held_out < 1:
        limit = held_out
    else:
        ordered = sorted(places)
        below = [x for x in ordered[: int(held_out)] if x < FIFTH] or ordered[:1]
        limit = math.nextafter(below[-1], 1.0)
    return [p for p, x in zip(found, places, strict=True) if x >= limit], [p for p, x in zip(found, places, strict=True) if x < limit]


# --- reasoning-gym ----------------------------------------------------------------------------------------------------------------------


def gym_problems(settings: ProblemsConfig, count: int, stream: int, exclude: frozenset[str] | set[str] = frozenset()) -> list[Problem]:
    """`count` different problems of the tasks in `problems.path`, in turn; a stream's first problems stay the same when more are asked for. Each task
    is a difficulty cell. The scorer gets the task's own entry (verify/judges.py)."""
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError:
        raise ConfigError(f"problems.path = {settings.path!r} needs reasoning-gym: pip install -e '.[reasoning-gym]'") from None
    names = [name.strip() for name in settings.path.removeprefix("reasoning_gym:").split(",")]
    try:
        options = yaml.safe_load(settings.options or "{}")
        if not isinstance(options, dict):
            raise yaml.YAMLError
    except yaml.YAMLError:
        raise ConfigError(f"problems.options must be a YAML mapping such as {{min_digits: 2}}, got {settings.options!r}") from None
    makers, text = [], json.dumps(options, sort_keys=True)
    for name in names:
        if name not in DATASETS:
            near = difflib.get_close_matches(name, DATASETS, n=1)
            raise ConfigError(f"problems.path: reasoning-gym has no task {name!r}" + (f"; the nearest is {near[0]!r}" if near else ""))
        seed = (2 * settings.seed + stream) * 10**9  # a task's item i is drawn from seed + i: streams must lie far apart
        try:
            makers.append(reasoning_gym.create_dataset(name, **{**options, "seed": seed, "size": 4 * count + 100}))
        except (TypeError, AssertionError, ValueError) as error:
            raise ConfigError(f"problems.options: the task {name!r} refuses {settings.options!r}: {error}") from None
    out: list[Problem] = []
    seen = set(exclude)
    for i in range(4 * count + 100):
        for name, maker in zip(names, makers, strict=True):
            if len(out) == count:
                return out
            entry = maker[i]
            problem = Problem(
                f"{name}-{stream}-{i}", settings.template.replace("{problem}", entry["question"]), str(entry["answer"]), cell=name,
                data={"task": name, "options": text, "entry": entry}, question=entry["question"],
                hint=settings.hint or HINT,
            )  # fmt: skip
            if question_key(problem) not in seen:
                seen.add(question_key(problem))
                out.append(problem)
    raise ConfigError(f"problems.path: {settings.path!r} has too few different problems: wanted {count}, found {len(out)}")
