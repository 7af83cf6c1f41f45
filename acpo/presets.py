"""Evaluations by name, for `acpo eval --preset NAME --path FILE`: which fields hold question and answer, the prompt, where the answer stands, who
verifies it, and how many tokens it takes. Every setting can be overridden."""

from __future__ import annotations

from typing import Any

from .config import ConfigError

BOXED = "{problem}\nReason step by step, and put the final answer within \\boxed{}."
COMMON = {"problems.question": "problem|question", "problems.answer": "answer", "problems.template": BOXED, "verify.extract": "auto"}

PRESETS: dict[str, dict[str, Any]] = {
    # Integers below 1000, in some copies with leading zeros: 033 is 33.
    "aime": {**COMMON, "verify.kind": "math", "rollout.max_new_tokens": 8192},
    "amc": {**COMMON, "verify.kind": "math", "rollout.max_new_tokens": 4096},
    "math500": {**COMMON, "verify.kind": "math", "rollout.max_new_tokens": 2048},
    # Numbers: exact match is enough and needs no extra. The original files hold the solution, with the answer behind ####.
    "gsm8k": {**COMMON, "problems.answer_after": "####", "verify.kind": "exact", "rollout.max_new_tokens": 512},
}


def preset(name: str) -> dict[str, Any]:
    if name not in PRESETS:
        raise ConfigError(f"--preset must be one of {', '.join(PRESETS)}, got {name!r}")
    return PRESETS[name]
