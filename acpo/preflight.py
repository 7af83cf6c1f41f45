"""Before the first step: what will run, on what, with how much memory (`summary`), and whether all of it can (`checks`, acpo train --dry-run)."""

from __future__ import annotations

import heapq
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from . import checkpoint, environment, memory, trackers
from .config import ConfigError
from .rollout.client import Client, NoAnswer, Refused
from .state import other_settings, settings_changed

if TYPE_CHECKING:
    from .trainer import Trainer


class Check(NamedTuple):
    name: str
    ok: bool
    text: str


# --- what will run ------------------------------------------------------------------------------------------------------------------


def summary(trainer: Trainer) -> list[tuple[str, str]]:
    """What is said at the start of a run: (of what, what)."""
    config, policy = trainer.config, trainer.policy
    per_step = config.rollout.prompts * config.rollout.group_size
    stages = f"{config.trainer.steps} steps" + (f" after {config.warmup.steps} of warm-up" if config.warmup.steps else "")
    rows = [
        ("run", f"{config.directory}   method {config.method}, seed {config.seed}"),
        ("policy", _policy(trainer)),
        ("problems", f"{len(trainer.train_problems):,} to train on, {len(trainer.held_out):,} held out; verifier: {trainer.verifier.describe()}"),
        ("a step", f"{config.rollout.prompts} problems x {config.rollout.group_size} = {per_step} rollouts of at most "
                   f"{config.rollout.max_new_tokens} tokens from the engine {config.rollout.engine}, {config.loss.minibatches} updates; {stages}"),
        ("kernels", kernels(policy.device)),
        ("memory", _memory(trainer)),
    ]  # fmt: skip
    rows += [("missing", text) for text in missing(trainer)]
    if config.trainer.log:
        rows.append(("log", config.trainer.log))
    return rows


def _policy(trainer: Trainer) -> str:
    policy = trainer.policy
    count = sum(p.numel() for p in policy.parameters())
    threads = torch.get_num_threads()
    where = f"{policy.device}" + (f", {threads} thread{'s' * (threads > 1)}" if policy.device.type == "cpu" else "")
    name = type(policy.model).__name__.removesuffix("ForCausalLM")
    return f"{name}, {count:,} parameters, vocabulary {policy.vocab_size:,}, computes in {trainer.config.policy.dtype} on {where}"


def kernels(device: torch.device) -> str:
    """What the operations run on for tensors there, and why."""
    found = environment.cuda_kernels() if device.type == "cuda" else None
    name, why = found or environment.cpu_kernels()
    return f"{name} ({why})"


def missing(trainer: Trainer) -> list[str]:
    """Optional packages that this run would use."""
    out = []
    if trainer.config.trainer.keep_rollouts and not trainer.run.keeps_rollouts:
        out.append("pyarrow: rollouts are not kept, so nobody can read them later; pip install -e '.[report]'")
    if trainer.policy.device.type == "cuda" and trainer.config.policy.attention == "sdpa" and environment.version("flash-attn") is None:
        out.append(
            "flash-attn: attention by torch's sdpa; pip install --no-build-isolation -e '.[flash-attn]' and policy.attention=flash_attention_2"
        )
    return out


def _longest_prompt(trainer: Trainer, most: int = 256) -> tuple[int, str]:
    """Tokens, and the problem's id; with the hint where a source reads one. Of so many problems to train on and as many held out, those whose text is
    longest in bytes: no byte-level tokenizer makes more tokens than those."""
    prompts, hinted = trainer.prompts, "hindsight" in trainer.config.attribution.sources
    size = lambda problem: len(problem.prompt.encode(errors="replace"))  # noqa: E731
    found = [
        (len(encode(problem)), problem.id)
        for problems, encode in (
            (trainer.train_problems, prompts.hinted if hinted else lambda p: prompts.prompt(p.prompt)),
            (trainer.held_out[: trainer.config.eval.max_problems or None], lambda p: prompts.prompt(p.prompt)),
        )
        for problem in heapq.nlargest(most, problems, key=size)
    ]
    return max(found, key=lambda pair: pair[0])


def _needed(trainer: Trainer) -> tuple[int, str]:
    asked = len(trainer.held_out[: trainer.config.eval.max_problems or None])
    terms = memory.estimate(trainer.config, trainer.policy, _longest_prompt(trainer)[0], asked)
    text = ", ".join(f"{t.name} {memory.human(t.bytes)}" for t in terms if t.bytes >= 2**20 or t.name == "weights")
    # The weights are there already, and on the host with them what Python, torch and the tokenizer take.
    return memory.total([t for t in terms if t.name != "weights"]), text


def _memory(trainer: Trainer) -> str:
    more, text = _needed(trainer)
    device = trainer.policy.device
    have = torch.cuda.memory_allocated(device) if device.type == "cuda" else _resident()
    free = environment.memory_free(str(device))
    room = "" if free is None else f"; {memory.human(free)} free"
    return f"estimate {memory.human(have + more)}: {memory.human(have)} held now, {memory.human(more)} to come{room} ({text})"


def _resident() -> int:
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


# --- whether it can -----------------------------------------------------------------------------------------------------------------


def checks(trainer: Trainer) -> Iterator[Check]:
    """That the trainer exists says that settings, problems, policy and tokenizer are sound and that the verifier's workers have started. Nothing is
    written, no step is taken."""
    config = trainer.config
    yield Check("settings", True, f"method {config.method}, seed {config.seed}, {config.trainer.steps} steps")
    yield Check("problems", True, f"{len(trainer.train_problems):,} to train on, {len(trainer.held_out):,} held out")
    yield Check("policy", True, _policy(trainer))
    for check in (_batch, lengths, _verifier, _engine, _memory_fits, _log, _directory):
        name = check.__name__.lstrip("_").split("_")[0]
        yield _checked(name, check, trainer)


def _checked(name: str, check: Callable[[Trainer], str], trainer: Trainer) -> Check:
    try:
        return Check(name, True, check(trainer))
    except (ValueError, ImportError, OSError, RuntimeError) as error:
        return Check(name, False, " ".join(str(error).split()))


def _batch(trainer: Trainer) -> str:
    """One batch of problems is encoded, its answers are cut into steps."""
    problems = trainer.train_problems[: trainer.config.rollout.prompts]
    prompts = [trainer.prompts.prompt(p.prompt) for p in problems]
    if not all(prompts):
        raise ValueError("a problem's prompt has no token: is problems.question the right field?")
    answers = [torch.tensor(trainer.prompts.spellings(p.answer)[-1] or [0]) for p in problems]
    offsets = torch.tensor([0, *(len(a) for a in answers)]).cumsum(0)
    segments = trainer.segmenter(torch.cat(answers), offsets, answer_start=None)
    lengths, end = [len(p) for p in prompts], trainer.tokenizer.batch_decode(prompts[:1])[0][-40:]
    first = trainer.tokenizer.convert_ids_to_tokens(trainer.prompts.prefix)
    begins = f"every prompt begins with {' '.join(first)}, " if first else ""
    return (
        f"{len(prompts)} prompts of {min(lengths)} to {max(lengths)} tokens, {segments.num_segments} segments; {begins}the first prompt ends {end!r}"
    )


def lengths(trainer: Trainer) -> str:
    """Whether the longest prompt and its response fit into the policy and the engine; ConfigError where they do not."""
    config, (longest, name_of_it) = trainer.config, _longest_prompt(trainer)
    needed = longest + config.rollout.max_new_tokens
    most = trainer.policy.positions
    limit = config.rollout.vllm.max_model_len if config.rollout.engine != "local" else 0
    for name, bound in (("the policy's max_position_embeddings", most), ("rollout.vllm.max_model_len", limit)):
        if bound and needed > bound:
            raise ConfigError(
                f"the prompt of problem {name_of_it!r} has {longest} tokens, with rollout.max_new_tokens = {config.rollout.max_new_tokens} that is "
                f"{needed}, and {name} is {bound}"
            )
    if needed > config.rollout.batch_tokens and config.rollout.engine == "local":
        raise ConfigError(f"rollout.batch_tokens = {config.rollout.batch_tokens} holds no single rollout of {needed} tokens")
    return f"longest prompt {longest}, with its response {needed} tokens" + (f" of {most:,}" if most else "")


def _verifier(trainer: Trainer) -> str:
    """It judges the reference answer of one problem, written as a response would write it."""
    problem = trainer.train_problems[0]
    text = f"<think>\n\n</think>\n\\boxed{{{problem.answer}}}" if trainer.config.problems.task == "" else f"A{problem.answer}"
    try:
        (verdict,) = trainer.verifier([problem], [text])
    finally:
        trainer.verifier.metrics()  # this rollout is nobody's
    if verdict.status in ("timeout", "crash", "error"):
        why = f": {trainer.verifier.said}" if trainer.verifier.said else ""
        raise ValueError(f"{trainer.verifier.describe()}: {verdict.status} on the first problem's own answer {problem.answer!r:.60}{why}")
    said = "left out" if verdict.reward is None else f"reward {verdict.reward:g}"
    return f"{trainer.verifier.describe()}; the first problem's own answer {problem.answer!r:.40}: {said}, {verdict.status}"


def _engine(trainer: Trainer) -> str:
    """Nothing is started: what can be known before that."""
    config = trainer.config.rollout
    if config.engine == "local":
        return f"local, {trainer.engine.__class__.__name__} on {trainer.policy.device}"
    if config.engine == "vllm_server" and config.server.url:
        try:
            Client(config.server.url).call("/health", seconds=5.0)
        except (NoAnswer, Refused) as error:
            raise ValueError(f"no server answers at rollout.server.url = {config.server.url!r}: {error}") from None
        return f"a server answers at {config.server.url}"
    found = environment.version("vllm")
    if found is None:
        raise ConfigError(f"rollout.engine = {config.engine!r} needs vLLM in this environment; docs/rollouts.md says how to install it")
    return f"{config.engine}, vLLM {found}; it starts with the run"


def _memory_fits(trainer: Trainer) -> str:
    more, _ = _needed(trainer)
    free = environment.memory_free(str(trainer.policy.device))
    if free is not None and more > free:
        raise ValueError(
            f"{_memory(trainer)}: more than is free. policy.gradient_checkpointing=true, a smaller trainer.micro_batch_tokens or a smaller "
            "rollout.batch_tokens are the ways out"
        )
    return _memory(trainer)


def _log(trainer: Trainer) -> str:
    trackers.check(trainer.config)
    return trainer.config.trainer.log or "metrics.jsonl alone"


def _directory(trainer: Trainer) -> str:
    directory = trainer.run.directory
    there = next(p for p in (directory.absolute(), *directory.absolute().parents) if p.exists())
    if not there.is_dir():
        raise ValueError(f"{directory}: {there} is a file")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"{directory}: {there} cannot be written to")
    label = checkpoint.newest(trainer.run.checkpoints)
    if label is None:
        return f"{directory}, new"
    changed = settings_changed(checkpoint.read(trainer.run.checkpoints / label)[1], trainer.config)
    if changed:
        raise other_settings(directory, changed)
    return f"{directory}, continues from {label}"
