"""Whether the first step changed anything, and for the right reason: what usually goes wrong shows here, before hours are spent."""

from __future__ import annotations

import math

from .config import Config

RATIO_OFF = {"float32": 1e-3, "bfloat16": 0.1}  # of the first ratio, which compares a forward with itself


def line(record: dict, config: Config) -> str:
    """One line about the first step's record."""
    rollouts = config.rollout.prompts * config.rollout.group_size
    low, high = (math.log(max(record.get(k, 1.0), 1e-30)) for k in ("ratio/min", "ratio/max"))
    return (
        f"first update: {record['credit/nonzero_ratio']:.0%} of the tokens have an advantage, gradient norm {record['grad_norm']:.3g}, "
        f"log-ratio {low:.2g} to {high:.2g} (first minibatch off by {record.get('ratio/first_off', 0.0):.1e}); of {rollouts} rollouts "
        f"mean reward {record['reward']:.2f}, {int(record['verify/unparseable'])} unreadable, {_failed(record)} lost by the verifier"
        + (f", {_raised(record)} left out because it raised" if _raised(record) else "")
    )


def _failed(record: dict) -> int:
    return int(record["verify/timeouts"] + record["verify/crashes"])


def _raised(record: dict) -> int:
    return int(record.get("verify/errors", 0))


def warnings(record: dict, config: Config, said: str = "") -> list[str]:
    """What is wrong with the first step, each with the way out; empty where nothing is. said: the last words of a verifier that raised."""
    out = []
    rollouts = int(record["rollout/sampled"])  # with dynamic sampling more than the batch holds
    if _failed(record) >= 0.5 * rollouts:
        how = f"{int(record['verify/timeouts'])} timeouts, {int(record['verify/kills'])} workers killed"
        out.append(
            f"the verifier lost {_failed(record)} of {rollouts} rollouts ({how}): their reward says nothing. Raise verify.timeout (now "
            f"{config.verify.timeout:g} s) or verify.memory_gb, or see what verify.kind does"
        )
    elif record["verify/unparseable"] >= 0.9 * rollouts:
        cut = f"{record['completions/clipped_ratio']:.0%} were cut at rollout.max_new_tokens = {config.rollout.max_new_tokens}"
        out.append(
            f"no answer could be read from {int(record['verify/unparseable'])} of {rollouts} rollouts, {cut}: let them be longer, or see whether "
            f"verify.extract = {config.verify.extract!r} is how this policy marks an answer"
        )
    if _raised(record):
        out.append(
            f"verify.kind = {config.verify.kind!r} raised for {_raised(record)} of {rollouts} rollouts, which are left out{': ' * bool(said)}{said}"
        )
    if record["credit/nonzero_ratio"] == 0:
        equal = f"all {config.rollout.group_size} outcomes of every problem are equal (mean reward {record['reward']:.2f})"
        which = "easier problems or a warm-up" if record["reward"] < 0.5 else "harder problems"
        out.append(
            f"every advantage is 0: {equal}. Nothing is learned from such a step: {which}, a larger rollout.group_size, or "
            "curriculum.dynamic_sampling=true are the ways out"
        )
    elif record["grad_norm"] == 0:
        out.append("the gradient is 0 although advantages are not: is every weight of the policy frozen?")
    off, most = record.get("ratio/first_off", 0.0), RATIO_OFF[config.policy.dtype]
    if off > most:
        out.append(
            f"the first ratio is off 1 by {off:.2g}: the forward that scores and the one that trains differ (dropout, another dtype, an attention "
            "that sees the padding); policy.attention=eager or policy.dtype=float32 tells which"
        )
    if config.rollout.engine != "local" and record["sampling/kl"] > 0.05:
        out.append(
            f"the engine samples from another policy: KL {record['sampling/kl']:.2g} nats a token. rollout.vllm.dtype must be the trainer's, "
            "temperature and logits processors too (docs/rollouts.md)"
        )
    return out
