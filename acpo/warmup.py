"""The warm-up on a synthetic task: its own traces, some behind a prompt that holds the answer."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from . import state
from .guard import NotFinite, finite
from .probe import suffix_of
from .problems import Problem
from .run import Stopped
from .synthetic import Chain, Multiplication
from .update import optimizer_step

if TYPE_CHECKING:
    from .policy import Policy
    from .prompts import Prompts
    from .trainer import Trainer


@dataclass(frozen=True)
class Example:
    prompt: str
    response: str
    weights: tuple[float, ...]  # loss weight a character of the response, the end token excluded


def examples(
    task: Multiplication | Chain, problems: list[Problem], count: int, hinted: float, rng: np.random.Generator, probed: float = 0.0, suffix: str = ""
) -> list[Example]:
    """The hint is the trace's OWN final answer, right or wrong: so the hinted policy learns the true conditional of what the policy
    itself would write, not the answer key. A share `probed` breaks off after some of the lines and gives that answer behind the suffix; the loss is
    on the answer alone, so that sampling never learns to break off."""
    out = []
    for index in rng.integers(len(problems), size=count).tolist():
        problem = problems[index]
        trace = task.trace(problem, rng)
        prompt = problem.hinted_prompt(trace.answer) if rng.random() < hinted else problem.prompt
        if probed and prompt is problem.prompt and rng.random() < probed / max(1.0 - hinted, 1e-9):
            lines = trace.text.splitlines(keepends=True)[:-1]
            head = "".join(lines[: int(rng.integers(len(lines) + 1))]) + suffix
            out.append(Example(prompt, head + trace.answer, (0.0,) * len(head) + (1.0,) * len(trace.answer)))
        else:
            out.append(Example(prompt, trace.text, trace.weights))
    return out


def imitation_loss(policy: Policy, prompts: Prompts, drawn: list[Example]) -> Tensor:
    """-sum w log pi / sum w over the tokens of the examples, their end tokens with weight 1."""
    responses = [torch.tensor([*prompts.encode(e.response), prompts.tokenizer.eos_token_id], device=policy.device) for e in drawn]
    weights = torch.tensor([w for e in drawn for w in (*e.weights, 1.0)], device=policy.device)
    hidden = policy.hidden([prompts.prompt(e.prompt) for e in drawn], responses)
    logp, _ = policy.score(hidden, torch.cat(responses), 1.0)
    return -(logp * weights).sum() / weights.sum()


def warm_up(trainer: Trainer) -> None:
    """Supervised steps on the task's own traces: a fixed number, cosine schedule, no look at the held-out problems."""
    config = trainer.config.warmup
    if trainer.warmup_step < config.steps:
        trainer.run.start_phase("warm-up", config.steps, trainer.warmup_step)
    while trainer.warmup_step < config.steps:
        assert trainer.task is not None  # a setting of the configuration's check
        begin = time.perf_counter()
        trainer.warmup_step += 1
        share = trainer.warmup_step / config.steps
        for group in trainer.optimizer.param_groups:
            group["lr"] = config.learning_rate * min(1.0, trainer.warmup_step / 50) * max(0.02, 0.5 * (1 + math.cos(math.pi * share)))
        drawn = examples(trainer.task, trainer.train_problems, config.batch, config.hinted, trainer.rng, config.probed, suffix_of(trainer.config))
        loss = imitation_loss(trainer.policy, trainer.prompts, drawn)
        trainer.optimizer.zero_grad(set_to_none=True)
        try:
            metrics = {"warmup/loss": finite("warm-up loss", loss)}
            loss.backward()
            optimizer_step(trainer.policy, trainer.optimizer, 1.0)
            trainer.guard.taken()
        except NotFinite as error:
            metrics = {"optimizer/left_out": trainer.guard.left_out + 1}
            trainer.guard.leave_out(error, f"warm-up step {trainer.warmup_step}", trainer.policy, {})
        trainer.counters["seconds"] += time.perf_counter() - begin
        last = trainer.warmup_step == config.steps
        if last or trainer.warmup_step % 50 == 0:
            trainer.run.log({"phase": "warmup", "step": trainer.warmup_step, **metrics, "seconds": trainer.counters["seconds"]})
        if last:
            trainer.optimizer = trainer.new_optimizer(trainer.config.optimizer.learning_rate)
            trainer.counters["seconds"] = 0.0  # the curves' clock starts with the first rollout
        stopping = any(trainer.ranks.gather(trainer.stopping))
        if stopping or last or trainer.warmup_step % (50 * trainer.config.trainer.checkpoint_every) == 0:
            state.save(trainer, f"warmup-{trainer.warmup_step}")
        if stopping:
            raise Stopped(f"warm-up step {trainer.warmup_step}")
