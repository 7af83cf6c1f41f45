"""The file of a comparison: arms x paired seeds.

    settings:             # of every run, as for `acpo train`, warm-up included; or another comparison, named from here, whose settings they are
      ...
    seeds: 0-15           # one run an arm and seed; the same seed draws the same problems for every arm (*)
    warm_starts: 0-3      # seeds of the warm starts that the runs' seeds go round by turns (default: one, by the settings' own seed)
    tuning:               # each arm's learning rate, from one grid, on seeds that are used for nothing else
      seeds: 900-903
      learning_rates: [1.0e-4, 2.0e-4, 3.0e-4]
    against: grpo         # the arm whose tokens and seconds are the budget
    baselines: [grpo, rloo]
    arms:
      grpo:               # an arm of acpo/methods.py, or of your own: the settings in which it differs
      acpo:
      acpo-shuffled: {rate: acpo}        # takes acpo's learning rate instead of a choice of its own; a number fixes it
      tempo: {seeds: 0-5}                # fewer of the seeds than the others
      gentle: {method: acpo, credit.gain: 0.25}

(*) as long as nothing else of the same generator depends on the policy: luck that pays right answers (T3) and groups that are sampled again (DAPO)
do, and from the first such draw on the problems are others.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import config as configuration
from .config import ConfigError
from .layers import shown, typed
from .limits import AT_MOST
from .methods import ARMS

MOST_SEEDS = 100_000  # of a range: more is a slip of the keyboard
ARM = re.compile(r"(?!warm(?:-[0-9]+)?$)\w[\w.-]*")  # a folder beside those of the warm starts
OF_THE_COMPARISON = {  # what every run has from the comparison: an arm's own would be overwritten
    "optimizer.learning_rate": "rate", "seed": "seeds", "run_dir": "--dir", "policy.path": "warm_starts", "policy.from_config": "warm_starts",
    "warmup.steps": "settings", "eval.start": "the comparison", "trainer.threads": "the comparison", "trainer.keep_rollouts": "the comparison",
}  # fmt: skip
KEYS = ("name", "settings", "seeds", "warm_starts", "tuning", "against", "baselines", "arms")


@dataclass
class Comparison:
    name: str
    settings: dict[str, Any]
    arms: dict[str, dict[str, Any]]
    seeds: list[int]
    against: str
    baselines: list[str]
    tuning_seeds: list[int] = field(default_factory=list)
    learning_rates: list[float] = field(default_factory=list)
    rates: dict[str, str | float] = field(default_factory=dict)  # arm -> a fixed learning rate, or the arm whose choice it takes
    fewer: dict[str, list[int]] = field(default_factory=dict)  # arm -> its seeds, where they are not all of them
    warm_starts: list[int] = field(default_factory=list)  # their seeds; none: one, by the settings' own


def load(path: str | Path) -> Comparison:
    """The comparison of a YAML file; a ConfigError names the key at fault."""
    path = Path(path)
    tree = configuration.read_yaml(path)
    if unknown := [k for k in tree if k not in KEYS]:
        raise ConfigError(f"{path}: unknown key {unknown[0]!r}; a comparison has {', '.join(KEYS)}")
    if missing := [k for k in ("settings", "seeds", "arms") if tree.get(k) in (None, {}, [])]:
        raise ConfigError(f"{path}: {missing[0]} must be given")
    settings = configuration.flatten(_settings(path, tree["settings"]))
    arms, rates, fewer = {}, {}, {}
    for name, own in _mapping(path, "arms", tree["arms"]).items():
        if not isinstance(name, str) or not ARM.fullmatch(name):
            raise ConfigError(
                f"{path}: an arm's name must be letters, digits, '-', '_' or '.', not warm or warm-SEED (the folders of warm starts), got {name!r}"
            )
        own = configuration.flatten(_mapping(path, f"arms.{name}", own or {}))
        if "rate" in own:
            rates[name] = _arm_or_rate(path, f"arms.{name}.rate", own.pop("rate"))
        if "seeds" in own:
            fewer[name] = _seeds(path, f"arms.{name}.seeds", own.pop("seeds"))
        if taken := [key for key in own if key in OF_THE_COMPARISON]:
            raise ConfigError(f"{path}: arms.{name}.{taken[0]} is no setting of an arm: every run has it from {OF_THE_COMPARISON[taken[0]]}")
        if name not in ARMS and not own:
            raise ConfigError(f"{path}: arms.{name} is not known; the known arms are {', '.join(ARMS)}; one of your own needs its settings")
        arms[name] = {**ARMS.get(name, {}), **own}
    tuning = _mapping(path, "tuning", tree.get("tuning") or {})
    if unknown := [k for k in tuning if k not in ("seeds", "learning_rates")]:
        raise ConfigError(f"{path}: unknown key tuning.{unknown[0]}; wanted seeds and learning_rates")
    out = Comparison(
        name=str(tree.get("name") or path.stem), settings=settings, arms=arms, seeds=_seeds(path, "seeds", tree["seeds"]),
        against=tree.get("against") or next(iter(arms)), baselines=_list(path, "baselines", tree.get("baselines") or [next(iter(arms))], "arms"),
        tuning_seeds=_seeds(path, "tuning.seeds", tuning["seeds"]) if "seeds" in tuning else [],
        learning_rates=_rates(path, "tuning.learning_rates", tuning["learning_rates"]) if "learning_rates" in tuning else [],
        rates=rates, fewer=fewer, warm_starts=_seeds(path, "warm_starts", tree["warm_starts"]) if "warm_starts" in tree else [],
    )  # fmt: skip
    _check(path, out)
    return out


def _settings(path: Path, given: Any) -> dict:
    """The settings as a file gives them: its own, or those of another comparison, named from where it lies."""
    if isinstance(given, str):
        path = path.parent / given
        given = configuration.read_yaml(path).get("settings")
    return _mapping(path, "settings", given)


def _arm_or_rate(path: Path, key: str, value: Any) -> str | float:
    if isinstance(value, str):
        with contextlib.suppress(ValueError):  # YAML 1.1 reads 5e-4 as a string
            value = float(value)
    return value if isinstance(value, str) else _rate(path, key, value)


def _rate(path: Path, key: str, value: Any) -> float:
    rate = typed(key, value, float, str(path))
    if rate <= 0:
        raise ConfigError(f"{path}: {key} must be greater than 0, got {rate}")
    return rate


def _rates(path: Path, key: str, value: Any) -> list[float]:
    rates = [_rate(path, key, v) for v in _list(path, key, value, "numbers")]
    _once(path, key, [f"{rate:g}" for rate in rates])  # as the runs' folders are named
    return rates


def _list(path: Path, key: str, value: Any, of: str) -> list:
    if not isinstance(value, list):
        raise ConfigError(f"{path}: {key} must be a list of {of}, got {shown(value)}")
    return value


def _once(path: Path, key: str, values: list) -> None:
    if twice := [value for value, times in Counter(values).items() if times > 1]:
        raise ConfigError(f"{path}: {key} names {twice[0]} twice")


def _mapping(path: Path, key: str, value: Any) -> dict:
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: {key} must be a mapping, got {value!r}")
    return value


def _seeds(path: Path, key: str, value: Any) -> list[int]:
    """`0-15`, one number, or a list of numbers."""
    span = re.fullmatch(r"\s*([0-9]{1,19})\s*(?:-\s*([0-9]{1,19})\s*)?", value) if isinstance(value, str) else None
    if span:
        low, high = int(span[1]), int(span[2] or span[1])
        if high - low >= MOST_SEEDS:
            raise ConfigError(f"{path}: {key} must name at most {MOST_SEEDS:,} seeds, got {value!r}")
        seeds = list(range(low, high + 1))
    else:
        seeds = value if isinstance(value, list) else [value]
    if not seeds:
        raise ConfigError(f"{path}: {key} must name at least one seed, got {value!r}")
    if not all(isinstance(seed, int) and not isinstance(seed, bool) for seed in seeds):
        raise ConfigError(f"{path}: {key} must be a range such as 0-15, a number or a list, got {shown(value)}")
    if wrong := [seed for seed in seeds if not 0 <= seed <= AT_MOST["seed"]]:
        raise ConfigError(f"{path}: {key} must lie in [0, 2^63), got {wrong[0]}")
    _once(path, key, seeds)
    return seeds


def _check(path: Path, chosen: Comparison) -> None:
    for key, names in (("against", [chosen.against]), ("baselines", chosen.baselines)):
        if missing := [n for n in names if n not in list(chosen.arms)]:
            raise ConfigError(f"{path}: {key} names {missing[0]!r}, which is none of the arms {', '.join(chosen.arms)}")
        _once(path, key, names)
    if both := set(chosen.seeds) & set(chosen.tuning_seeds):
        raise ConfigError(
            f"{path}: seed {min(both)} is in seeds and in tuning.seeds: a learning rate must not be chosen on the runs that it is judged by"
        )
    for arm, own in chosen.fewer.items():
        if arm == chosen.against and (other := set(chosen.seeds) - set(own)):
            raise ConfigError(f"{path}: arms.{arm} must have all seeds, for `against` names it: without seed {min(other)} no arm's has a budget")
        if other := set(own) - set(chosen.seeds):
            raise ConfigError(f"{path}: arms.{arm}.seeds must be among seeds, which lack {min(other)}")
    if bool(chosen.learning_rates) != bool(chosen.tuning_seeds):
        raise ConfigError(f"{path}: tuning needs both seeds and learning_rates")
    for arm, rate in chosen.rates.items():
        if isinstance(rate, str) and (rate not in chosen.arms or rate in chosen.rates):
            raise ConfigError(f"{path}: arms.{arm}.rate must be a number or an arm that has its own choice, got {rate!r}")
    for arm in chosen.arms:  # every arm's settings are read before the first run begins
        configuration.from_layers((str(path), chosen.settings), (f"{path}, arms.{arm}", chosen.arms[arm]))
