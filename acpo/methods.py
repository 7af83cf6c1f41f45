"""The methods, and the arms that `acpo compare` can hold against each other: each is a few settings of one loop, never a fork of it."""

from __future__ import annotations

from typing import Any

# What makes a method: everything that is not named here (clip range, batch, learning rate) is the same for all of them.
_OUTCOME_ONLY = {
    "attribution.source": "none", "credit.form": "none", "credit.mask": "none", "credit.difficulty": 0.0, "entropy.controller": "none",
    "rollout.exploration": 1.0, "curriculum.sampler": "uniform", "curriculum.dynamic_sampling": False, "stages.two": False, "loss.kl_weight": 0.0,
    "loss.ratio": "token", "loss.denominator": "tokens",
}  # fmt: skip
METHODS: dict[str, dict[str, Any]] = {
    "acpo": {
        "attribution.source": "hindsight,tree", "credit.form": "additive", "credit.scope": "own", "credit.advantage": "grpo",
        "credit.mask": "unchanged", "credit.difficulty": 0.25, "entropy.controller": "target", "rollout.exploration": 1.3,
        "curriculum.sampler": "thompson", "curriculum.dynamic_sampling": False, "stages.two": True, "loss.kl_weight": 0.2,
        "loss.ratio": "token", "loss.denominator": "tokens",
    },
    "grpo": {**_OUTCOME_ONLY, "credit.advantage": "grpo"},
    "rloo": {**_OUTCOME_ONLY, "credit.advantage": "rloo"},
    "dr_grpo": {**_OUTCOME_ONLY, "credit.advantage": "centred", "loss.denominator": "constant"},
    "dapo": {**_OUTCOME_ONLY, "credit.advantage": "grpo", "curriculum.dynamic_sampling": True},
    "gspo": {
        **_OUTCOME_ONLY, "credit.advantage": "grpo", "loss.ratio": "sequence", "loss.denominator": "sequences",
        "loss.clip_low": 3e-4, "loss.clip_high": 4e-4,
    },
}  # fmt: skip

# The outcome-level baselines are METHODS of the configuration. The forms of others are written in our loop from their published formulas.
_ACPO: dict[str, Any] = {"method": "acpo"}
_OUTCOME: dict[str, Any] = {"method": "grpo"}
_NEAR: dict[str, Any] = {"loss.kl_weight": METHODS["acpo"]["loss.kl_weight"]}  # held near its start, as the method is
_HEAT: dict[str, Any] = {  # its temperature of stage 1, and nothing else of its stages
    "rollout.exploration": METHODS["acpo"]["rollout.exploration"], "stages.two": True, "stages.confidence": 0.0, "stages.clip_high": 0.28,
}  # fmt: skip
_RATIO: dict[str, Any] = {"credit.form": "ratio", "credit.bound": 0.2, "attribution.source": "hindsight", "credit.scope": "all"}
ARMS: dict[str, dict[str, Any]] = {
    "grpo": _OUTCOME,
    "grpo-kl": {**_OUTCOME, **_NEAR},
    "rloo": {"method": "rloo"},
    "dr_grpo": {"method": "dr_grpo"},
    "dapo": {"method": "dapo"},
    "gspo": {"method": "gspo"},
    # GRPO that is told which tokens mean nothing (synthetic tasks): how much of a gain is noise on filler
    "grpo-oracle-mask": {**_OUTCOME, "credit.mask": "filler"},
    # the value differences of the group's token prefix tree added to the outcome advantage (TEMPO, arXiv 2509.18314)
    "tempo": {**_OUTCOME, "credit.form": "branch"},
    # the answer-conditioned ratio as a bounded weight of every token (RLSD, arXiv 2604.03128; without its schedule towards uniform weights)
    "rlsd": {**_OUTCOME, **_RATIO},
    # those that were best without it, and the nearest to step credit, held near their start as well
    "rloo-kl": {"method": "rloo", **_NEAR},
    "dapo-kl": {"method": "dapo", **_NEAR},
    "tempo-kl": {**_OUTCOME, **_NEAR, "credit.form": "branch"},
    "rlsd-kl": {**_OUTCOME, **_NEAR, **_RATIO},
    # GRPO with the method's KL and, in stage 1, its temperature: what exploration is worth without credit
    "grpo-kl-heat": {**_OUTCOME, **_NEAR, **_HEAT},
    "acpo": _ACPO,
    # what each part does: the method without it, or with a plain one in its place
    "acpo-before": {**_ACPO, "attribution.drawn_to": "before"},
    "acpo-fixed-length": {**_ACPO, "segmenter.fixed": 8},
    "acpo-no-attribution": {**_ACPO, "attribution.source": "none", "credit.form": "none", "credit.mask": "none"},
    "acpo-no-mask": {**_ACPO, "credit.mask": "none"},
    "acpo-mask-alone": {**_ACPO, "credit.form": "none"},
    "acpo-no-difficulty": {**_ACPO, "credit.difficulty": 0.0},
    "acpo-difficulty-alone": {**_ACPO, "credit.form": "none", "credit.mask": "none"},
    "acpo-no-exploration": {**_ACPO, "rollout.exploration": 1.0},
    "acpo-no-entropy": {**_ACPO, "entropy.controller": "none", "rollout.exploration": 1.0},
    "acpo-step-entropy": {**_ACPO, "entropy.controller": "step", "rollout.exploration": 1.0},
    "acpo-no-curriculum": {**_ACPO, "curriculum.sampler": "uniform"},  # the method itself, where problems have no difficulty cells
    "acpo-curriculum": {**_ACPO, "curriculum.cells": "problems"},
    "acpo-no-reference": {**_ACPO, "loss.kl_weight": 0.0},
    "acpo-no-stage2": {**_ACPO, "stages.two": False},
    "acpo-no-confidence": {**_ACPO, "stages.confidence": 0.0},
    "acpo-naive-confidence": {**_ACPO, "stages.confidence_form": "product"},
    "acpo-token-factor": {**_ACPO, "credit.token": "entropy"},
    # controls: the same with an attribution that says nothing
    "acpo-shuffled": {**_ACPO, "attribution.control": "shuffled"},
    "acpo-everywhere": {**_ACPO, "attribution.control": "everywhere"},  # shuffled over rollouts as well, and the weights of groups over groups
    "acpo-position": {**_ACPO, "attribution.control": "position"},
    "acpo-random": {**_ACPO, "attribution.control": "random"},
}
