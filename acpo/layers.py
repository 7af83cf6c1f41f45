"""Settings as layers: YAML files and dotted keys, each value checked against the type of its field."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import math
import reprlib
import types
import typing
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml


class ConfigError(ValueError):
    """A setting that cannot be used: the message names the key, what was wanted and what came."""


DEEPEST = 4


def shown(value: Any) -> str:
    """A value in a message: short, whatever a file nests in itself."""
    return repr(value) if isinstance(value, (str, float, bool)) else reprlib.repr(value)


def read_yaml(path: Path) -> dict:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"no such configuration file: {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a date or a number that there is not, a thousand brackets
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold a mapping of settings, got {type(tree).__name__}")
    return tree


def flatten(tree: dict, prefix: str = "") -> dict[str, Any]:
    """Nested settings as dotted ones; no deeper than any setting lies, for YAML can nest a mapping in itself."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and prefix.count(".") < DEEPEST:
            flat.update(flatten(value, name + "."))
        else:
            flat[name] = value
    return flat


@functools.cache  # a class does not change, and evaluating its annotations is what most of loading a configuration would be
def keys(cls: type, prefix: str = "") -> Mapping[str, Any]:
    """Every setting's dotted name and type, of a dataclass of dataclasses."""
    hints = typing.get_type_hints(cls)
    out: dict[str, Any] = {}
    for item in dataclasses.fields(cls):
        kind = hints[item.name]
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            out.update(keys(kind, f"{prefix}{item.name}."))
        else:
            out[f"{prefix}{item.name}"] = kind
    return types.MappingProxyType(out)


# What TRL, verl and transformers call it.
CALLED = {
    "lr": "optimizer.learning_rate", "num_generations": "rollout.group_size", "max_completion_length": "rollout.max_new_tokens",
    "max_response_length": "rollout.max_new_tokens", "max_steps": "trainer.steps", "num_iterations": "loss.minibatches", "beta": "loss.kl_weight",
    "kl_coef": "loss.kl_weight", "kl_loss_coef": "loss.kl_weight", "epsilon": "loss.clip_low", "clip_ratio_low": "loss.clip_low",
    "epsilon_high": "loss.clip_high", "clip_ratio_high": "loss.clip_high", "entropy_coeff": "entropy.weight", "scale_rewards": "credit.advantage",
    "adv_estimator": "credit.advantage", "model": "policy.path", "model_name_or_path": "policy.path", "dataset": "problems.path",
    "dataset_name": "problems.path", "output_dir": "run_dir", "report_to": "trainer.log", "eval_steps": "trainer.eval_every",
    "save_steps": "trainer.checkpoint_every", "use_vllm": "rollout.engine", "lora_r": "policy.lora_rank", "reward_funcs": "verify.kind",
    "bf16": "policy.dtype", "attn_implementation": "policy.attention", "per_device_train_batch_size": "trainer.micro_batch_tokens",
}  # fmt: skip


def unknown(key: str, known: Collection[str]) -> str:
    """What is said of a setting that there is not: a whole section, what it is called here, or what it is nearest to, if there is such a thing."""
    if any(name.startswith(f"{key}.") for name in known):
        return f"{key!r} is a section and must hold a mapping of its settings"
    leaf = str(key).rpartition(".")[2]
    if CALLED.get(leaf) in known:
        return f"unknown setting {key!r}; here it is {CALLED[leaf]!r}"
    leaves: dict[str, list[str]] = {}
    for name in known:
        leaves.setdefault(name.rpartition(".")[2], []).append(name)
    near = leaves.get(leaf) or difflib.get_close_matches(str(key), known, n=1)
    near = near or [name for close in difflib.get_close_matches(leaf, leaves, n=1) for name in leaves[close]]
    return f"unknown setting {key!r}; " + (f"the nearest is {' or '.join(map(repr, near))}" if near else "docs/configuration.md lists all of them")


def value_of(config: Any, key: str) -> Any:
    target: Any = config
    for part in key.split("."):
        target = getattr(target, part)
    return target


def typed(key: str, value: Any, kind: Any, where: str) -> Any:
    """The value as its setting's type; a ConfigError names the setting, what was wanted and what came."""
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        if value not in choices:
            wanted = ", ".join(repr(c) for c in choices)
            near = difflib.get_close_matches(shown(value).strip("'"), [str(c) for c in choices], n=1)
            raise ConfigError(f"{where}: {key} must be one of {wanted}, got {shown(value)}" + (f"; did you mean {near[0]!r}?" if near else ""))
        return value
    if kind is float and isinstance(value, str):  # YAML 1.1 reads 2e-4 as a string
        with contextlib.suppress(ValueError):
            value = float(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):
            value = float(value)
    if kind is str and isinstance(value, (int, float)) and not isinstance(value, bool):
        with contextlib.suppress(ValueError):  # an integer of thousands of digits
            value = str(value)
    if isinstance(kind, types.UnionType) or not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ConfigError(f"{where}: {key} must be {'an' if kind is int else 'a'} {kind.__name__}, got {shown(value)}")
    if kind is float and not math.isfinite(value):
        raise ConfigError(f"{where}: {key} must be finite, got {value}")
    return value


def differences(a: dict, b: dict, prefix: str = "") -> list[str]:
    """Settings that differ between two configurations, as `key: a -> b`."""
    out = []
    for key in sorted({*a, *b}):
        left, right = a.get(key), b.get(key)
        if isinstance(left, dict) and isinstance(right, dict):
            out += differences(left, right, f"{prefix}{key}.")
        elif left != right:
            out.append(f"{prefix}{key}: {left!r} -> {right!r}")
    return out
