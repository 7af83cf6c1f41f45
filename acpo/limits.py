"""Which values the settings may have; a ConfigError names the setting, what was wanted and what came."""

from __future__ import annotations

import dataclasses
import difflib
import re
from typing import TYPE_CHECKING

from .layers import ConfigError, value_of

if TYPE_CHECKING:
    from .config import Config

VERIFIERS = ("auto", "exact", "math", "reasoning_gym")
SOURCES = ("hindsight", "probe", "tree", "head", "entropy")

POSITIVE = (
    "rollout.prompts", "rollout.group_size", "rollout.max_new_tokens", "rollout.temperature", "rollout.batch_tokens", "loss.minibatches",
    "trainer.micro_batch_tokens", "trainer.eval_every", "trainer.checkpoint_every", "trainer.keep_checkpoints", "optimizer.learning_rate",
    "optimizer.max_grad_norm", "warmup.batch", "warmup.learning_rate", "segmenter.min_tokens", "segmenter.max_segments",
    "segmenter.target_tokens", "attribution.clamp", "verify.timeout", "eval.temperature", "problems.train", "problems.held_out",
    "curriculum.max_rounds", "curriculum.candidates", "trainer.rank_timeout",
    "rollout.vllm.tensor_parallel_size", "rollout.server.concurrency", "rollout.server.timeout", "rollout.server.start_timeout",
    "stages.switch_window", "entropy.min_weight", "entropy.start", "entropy.end",
)  # fmt: skip
SHARES = (
    "warmup.hinted", "segmenter.forking_share", "curriculum.centre", "curriculum.band", "curriculum.decay", "curriculum.uniform_share",
    "curriculum.mastered_share", "stages.switch_success", "stages.switch_share", "problems.hard", "problems.wrong_low",
    "problems.wrong_high", "problems.luck",
    "loss.clip_low", "credit.difficulty", "entropy.covariance_share", "warmup.probed", "rollout.vllm.gpu_memory_utilization",
)  # fmt: skip
NOT_NEGATIVE = (
    "warmup.steps", "trainer.steps", "trainer.threads", "eval.samples", "eval.max_problems", "verify.workers", "verify.memory_gb",
    "attribution.kappa", "credit.gain", "loss.clip_high", "loss.kl_weight",
    "stages.clip_high", "entropy.weight", "entropy.rate", "entropy.dead_band", "optimizer.warmup_steps", "optimizer.weight_decay", "seed",
    "problems.seed", "problems.distractors", "problems.decoys", "attribution.slope", "credit.value_gain", "segmenter.fixed",
    "entropy.covariance_weight", "policy.lora_rank", "policy.lora_alpha", "loss.rollout_cap", "rollout.vllm.max_model_len", "rollout.server.retries",
)  # fmt: skip

AT_MOST = {
    "seed": 2**63 - 1,  # what a generator of torch takes
    "problems.train": 10**7,  # some kilobytes each
    "trainer.threads": 1024,  # of very many OpenMP ends the process
    **{f"segmenter.{name}": 2**30 - 1 for name in ("min_tokens", "max_tokens", "max_segments", "target_tokens")},  # what the segmenter takes
}

# Settings `problems.*` of data; a synthetic task writes its own prompts and hints, and a wish there would be heard by nobody.
OF_DATA = ("question", "answer", "answer_after", "cell", "template", "hint", "subset", "split", "options")


def check(config: Config) -> None:
    """What holds for the method wherever it runs."""
    for key in POSITIVE:
        if not value_of(config, key) > 0:
            raise ConfigError(f"{key} must be greater than 0, got {value_of(config, key)}")
    for key in SHARES:
        if not 0 <= value_of(config, key) <= 1:
            raise ConfigError(f"{key} must lie in [0, 1], got {value_of(config, key)}")
    for key in NOT_NEGATIVE:
        if not value_of(config, key) >= 0:
            raise ConfigError(f"{key} must be at least 0, got {value_of(config, key)}")
    for key, most in AT_MOST.items():
        if value_of(config, key) > most:
            raise ConfigError(f"{key} must be at most {most}, got {value_of(config, key)}")
    if config.rollout.group_size < 2:
        raise ConfigError(f"rollout.group_size must be at least 2: a group of one has no advantage over itself (method {config.method}), got 1")
    if config.segmenter.max_tokens < config.segmenter.min_tokens:
        raise ConfigError(
            f"segmenter.max_tokens must be at least segmenter.min_tokens = {config.segmenter.min_tokens}, got {config.segmenter.max_tokens}"
        )
    if config.rollout.exploration < 1:
        raise ConfigError(f"rollout.exploration must be at least 1, where it changes nothing, got {config.rollout.exploration}")
    for key in ("credit.bound", "optimizer.beta1", "optimizer.beta2"):
        if not 0 <= value_of(config, key) < 1:
            raise ConfigError(f"{key} must lie in [0, 1), got {value_of(config, key)}")
    for low, high in (("problems.wrong_low", "problems.wrong_high"), ("entropy.min_weight", "entropy.max_weight")):
        if value_of(config, high) < value_of(config, low):
            raise ConfigError(f"{high} must be at least {low} = {value_of(config, low)}, got {value_of(config, high)}")
    if not 0 <= config.stages.confidence < 1:
        raise ConfigError(f"stages.confidence must lie in [0, 1), where a right answer outranks a wrong one, got {config.stages.confidence}")
    if config.attribution.reliability != -1.0 and not 0 <= config.attribution.reliability <= 1:
        raise ConfigError(f"attribution.reliability must lie in [0, 1], or be -1 to measure it, got {config.attribution.reliability}")
    names = config.attribution.source.split(",")
    for name in names:
        if name not in (*SOURCES, "none") or names.count(name) > 1 or (name == "none" and len(names) > 1):
            near = difflib.get_close_matches(name, SOURCES, n=1)
            raise ConfigError(
                f"attribution.source must be 'none' or some of {', '.join(map(repr, SOURCES))}, each once, separated by commas, "
                f"got {config.attribution.source!r}" + (f"; did you mean {near[0]!r}?" if near and near[0] != name else "")
            )
    if config.credit.form == "ratio" and "hindsight" not in names:
        raise ConfigError(f"credit.form = 'ratio' needs attribution.source = 'hindsight', got {config.attribution.source!r}")
    if config.credit.form in ("ratio", "branch"):  # TEMPO's and RLSD's forms, token by token: no gate, and no steps to shuffle
        for key, plain in (("attribution.reliability", -1.0), ("attribution.control", "none")):
            if value_of(config, key) != plain:
                raise ConfigError(f"{key} must be {plain!r} with credit.form = {config.credit.form!r}, got {value_of(config, key)!r}")
    if config.credit.form == "ratio" and config.credit.mask == "unchanged":
        raise ConfigError("credit.mask = 'unchanged' does nothing with credit.form = 'ratio': it must be 'none' or 'filler'")
    if config.credit.form not in ("none", "branch") and config.attribution.source == "none":
        raise ConfigError(f"credit.form = {config.credit.form!r} needs an attribution.source, got 'none'")
    if "tree" in names and config.credit.form != "none" and config.credit.scope == "zero_variance":
        raise ConfigError("credit.scope must be 'own' or 'all' with 'tree' in attribution.source: where all outcomes are equal its values are too")
    if config.loss.minibatches > config.rollout.prompts * config.rollout.group_size:
        raise ConfigError(f"loss.minibatches must be at most the rollouts of a step, {config.rollout.prompts * config.rollout.group_size}")


def check_run(config: Config) -> None:
    """What our own loop needs besides."""
    if bool(config.problems.task) == bool(config.problems.path):
        raise ConfigError("one of problems.task and problems.path must be given, got " + ("both" if config.problems.task else "neither"))
    for item in dataclasses.fields(config.problems):
        value = getattr(config.problems, item.name)
        if config.problems.task and item.name in OF_DATA and value != item.default:
            raise ConfigError(
                f"problems.{item.name} does nothing with problems.task = {config.problems.task!r}: it must be {item.default!r}, got {value!r}"
            )
    if bool(config.policy.path) == bool(config.policy.from_config):
        raise ConfigError("one of policy.path and policy.from_config must be given, got " + ("both" if config.policy.path else "neither"))
    if config.policy.lora_rank and not config.policy.path:
        raise ConfigError("policy.lora_rank needs policy.path: adapters of weights that were never trained learn little")
    if "probe" in config.attribution.sources and config.policy.attention == "flash_attention_2":
        raise ConfigError(
            "attribution.source = 'probe' needs policy.attention = 'sdpa' or 'eager': its branches have a mask of their own, which "
            "flash_attention_2 cannot take"
        )
    if "{problem}" not in config.problems.template:
        raise ConfigError(f"problems.template must hold {{problem}}, got {config.problems.template!r}")
    if config.problems.held_out >= 1 and config.problems.held_out % 1:
        raise ConfigError(f"problems.held_out must be a share below 1 or a whole number, got {config.problems.held_out}")
    if config.problems.task or config.problems.path.startswith("reasoning_gym:"):
        held_out, most = config.problems.held_out, AT_MOST["problems.train"]
        if held_out < 1:
            raise ConfigError(f"problems.held_out must be a whole number for problems that are made, not read, got {held_out}")
        if held_out > most:
            raise ConfigError(f"problems.held_out must be at most {most} for problems that are made, not read, got {held_out:.0f}")
    if config.problems.system and not config.problems.chat:
        raise ConfigError("problems.system needs problems.chat = true")
    if config.verify.kind not in VERIFIERS and not re.fullmatch(r"[A-Za-z_][\w.]*[.:][A-Za-z_][\w.]*", config.verify.kind):
        near = difflib.get_close_matches(config.verify.kind, VERIFIERS, n=1)
        raise ConfigError(
            f"verify.kind must be one of {', '.join(map(repr, VERIFIERS))} or the dotted path module:function, got {config.verify.kind!r}"
            + (f"; did you mean {near[0]!r}?" if near else "")
        )
    if config.verify.kind == "reasoning_gym" and not config.problems.path.startswith("reasoning_gym:"):
        raise ConfigError(f"verify.kind = 'reasoning_gym' needs problems.path = 'reasoning_gym:TASK', got {config.problems.path!r}")
    if config.problems.hint and not ("{answer}" in config.problems.hint and "{prompt}" in config.problems.hint):
        raise ConfigError(f"problems.hint must hold {{answer}} and {{prompt}}, got {config.problems.hint!r}")
    if config.problems.path and config.warmup.steps:
        raise ConfigError("warmup.steps needs a synthetic task with traces of its own: set it to 0 with problems.path")
