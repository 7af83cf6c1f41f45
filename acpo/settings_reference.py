"""docs/configuration.md from the dataclasses: every setting with its type, its default, what the methods set, and the comment beside it.

python -m acpo.settings_reference            writes docs/configuration.md
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import typing
from pathlib import Path
from typing import Any, Literal

from .config import Config
from .methods import METHODS

TARGET = Path(__file__).resolve().parents[1] / "docs" / "configuration.md"
HEAD = """# Configuration

Made by `python -m acpo.settings_reference` from the dataclasses of `acpo/config.py` and `acpo/rollout/settings.py`; not edited by hand.

A run's settings are the defaults below, under those of its YAML file (nested, or with dots), under `key=value` words of the command line:

```
acpo train configs/arithmetic.yaml rollout.group_size=16 optimizer.learning_rate=2e-4
```

`method` is shorthand for the settings in the last section, expanded in the layer where it stands, under that layer's own keys. An unknown
key or a value of another type is an error that names the nearest. `acpo train CONFIG --dry-run` checks all of it; a run directory's `config.yaml`
holds every setting that it ran with.
"""


def comments(cls: type) -> dict[str, str]:
    """The comment of each field: the lines above it that hold nothing else, and what stands behind it."""
    source = inspect.getsource(cls)
    lines, out = source.splitlines(), {}
    for node in ast.parse(source).body[0].body:  # type: ignore[attr-defined]
        if isinstance(node, ast.AnnAssign):
            above, at = [], node.lineno - 2
            while lines[at].strip().startswith("#"):
                above.insert(0, lines[at].strip().lstrip("# "))
                at -= 1
            behind = lines[node.end_lineno - 1][node.end_col_offset :].partition("#")[2].strip()
            out[node.target.id] = " ".join([*above, *([behind] if behind else [])])
    return out


def kind(hint: Any) -> str:
    return "one of " + ", ".join(f"`{_value(c)}`" for c in typing.get_args(hint)) if typing.get_origin(hint) is Literal else hint.__name__


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    return '""' if value == "" else str(value).replace("\n", "\\n")


def section(cls: type, prefix: str, title: str) -> list[str]:
    """A table of one dataclass, and those inside it behind it."""
    hints, said, rows, inner = typing.get_type_hints(cls), comments(cls), [], []
    for item in dataclasses.fields(cls):
        hint = hints[item.name]
        if dataclasses.is_dataclass(hint):
            inner += section(hint, f"{prefix}{item.name}.", f"{prefix}{item.name}")
            continue
        what = said.get(item.name, "").replace("|", "\\|")
        rows.append(f"| `{prefix}{item.name}` | {kind(hint)} | `{_value(item.default)}` | {what} |")
    return ["", f"## {title}", "", "| setting | value | default | |", "|---|---|---|---|", *rows, *inner]


def methods() -> list[str]:
    keys = list(dict.fromkeys(key for settings in METHODS.values() for key in settings))
    out = ["", "## What `method` sets", "", f"| setting | {' | '.join(METHODS)} |", "|---" * (len(METHODS) + 1) + "|"]
    for key in keys:
        out.append(f"| `{key}` | " + " | ".join(f"`{_value(s[key])}`" if key in s else "" for s in METHODS.values()) + " |")
    return out


def text() -> str:
    return HEAD + "\n".join([*section(Config, "", "The run"), *methods()]) + "\n"


if __name__ == "__main__":
    TARGET.write_text(text(), encoding="utf-8")
    print(TARGET)
