"""One dataclass tree, from the defaults below, a YAML file and `key=value` overrides, in that order.

`method` is shorthand for the settings in METHODS: it is expanded in the layer where it stands (the file, or the command line),
under that layer's own keys. So `method=grpo` on the command line turns a configuration file for ACPO into plain GRPO.
"""

from __future__ import annotations

import dataclasses
import re
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from . import limits
from .layers import ConfigError, flatten, keys, read_yaml, typed, unknown, value_of
from .methods import METHODS
from .rollout.settings import ServerConfig, VLLMConfig


@dataclass
class ProblemsConfig:
    task: Literal["multiplication", "chain", ""] = ""  # a synthetic task; empty: read `path`
    # A JSON-lines or parquet file; a folder that `datasets` reads or has saved; hub:OWNER/NAME; reasoning_gym:TASK,TASK
    path: str = ""
    subset: str = ""  # hub:, folders: the configuration of the data set
    split: str = "train"  # hub:, folders: its split
    options: str = ""  # reasoning_gym: a YAML mapping of the tasks' own settings, e.g. {min_digits: 2}
    question: str = "problem"  # the field with the question; several names separated by |: the first that a row has
    answer: str = "answer"  # the field with the answer
    answer_after: str = ""  # the answer is what stands behind the last of these in its field, where it holds one, e.g. ####
    cell: str = ""  # the field with the difficulty: problems of one cell share a curriculum posterior; empty: there are no cells
    template: str = "{problem}"  # the prompt around the question
    # Put the prompt through the tokenizer's chat template as a user message; false: the text itself, behind the special tokens (<bos>) that the
    # tokenizer puts in front of a text.
    chat: bool = False
    system: str = ""  # with chat: the system message in front of it
    hint: str = ""  # the prompt of the hindsight stream, with {answer} and {prompt}; empty: a default
    # Problems kept apart for evaluation, by the hash of their question. Below 1: the share of all hashes; adding problems moves none. From 1: at most
    # so many, the smallest hashes of the lowest fifth; adding problems never moves one from training into the held-out set.
    held_out: float = 256
    train: int = 4096  # problems of a synthetic or reasoning-gym task to train on
    seed: int = 0  # which problems, which are held out, and the synthetic task's table of facts
    digits: int = 6  # multiplication: columns
    steps: int = 8  # chain: length
    modulus: int = 10  # chain
    distractors: int = 0  # chain: characters without meaning a line
    decoys: int = 0  # chain: operands of the prompt that no step uses
    luck: float = 1.0  # chain: probability that a right answer is rewarded
    hard: float = 0.4  # share of elementary facts that the warm-up traces get wrong at times
    wrong_low: float = 0.2  # a hard fact is wrong with a probability drawn from [wrong_low, wrong_high]
    wrong_high: float = 0.7


@dataclass
class PolicyConfig:
    path: str = ""  # a local causal language model with its tokenizer
    from_config: Literal["medium", "small", "tiny", ""] = ""  # a randomly initialised Qwen2 of that size instead
    tokenizer: str = ""  # a folder or tokenizer.json, or "bytes"; empty: that of `path`, or the characters of the synthetic task
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the computation; weights and optimizer state are float32
    device: str = "auto"  # auto: CUDA where there is a device, else the CPU
    attention: Literal["sdpa", "flash_attention_2", "eager"] = "sdpa"
    packing: Literal["auto", "packed", "padded"] = "auto"  # of rollouts in a forward pass; auto: packed with flash_attention_2, else padded
    gradient_checkpointing: bool = False  # compute activations again in the backward: less memory, about a third more time
    lora_rank: int = 0  # above 0: train adapters of this rank (peft) and leave the weights of policy.path as they are
    lora_alpha: float = 0.0  # adapters are scaled by lora_alpha / lora_rank; 0: twice the rank
    lora_targets: str = "all-linear"  # every linear layer of the body, or names like q_proj,v_proj


@dataclass
class WarmupConfig:
    steps: int = 0  # supervised steps on the synthetic task's own traces
    batch: int = 64
    learning_rate: float = 4e-3
    probed: float = 0.0  # share of examples that answer behind probe_suffix after some of the steps: what the source `probe` needs to have seen
    hinted: float = 0.3  # share of examples whose prompt holds the trace's own final answer, right or wrong


@dataclass
class RolloutConfig:
    engine: Literal["local", "vllm", "vllm_server"] = "local"  # local: the policy itself; docs/rollouts.md has the others
    prompts: int = 12  # prompts a step
    group_size: int = 8  # rollouts a prompt
    max_new_tokens: int = 256  # a rollout is cut there
    temperature: float = 1.0
    exploration: float = 1.3  # in stage 1 of two the temperature is raised up to this many times, as success and entropy allow; 1: never
    batch_tokens: int = 262144  # engine `local`: most prompt and response tokens in the key-value cache at a time
    vllm: VLLMConfig = field(default_factory=VLLMConfig)
    server: ServerConfig = field(default_factory=ServerConfig)


@dataclass
class VerifyConfig:
    # exact: after a normal form.  math: math-verify (the extra `math`).  module:function or module.function: your own f(response, problem), plain or
    # async, that gives True, False, a number in [0, 1], or None to leave the rollout out.  auto: a reasoning-gym task's own scorer, else exact.
    kind: str = "auto"
    # Where the answer stands: the last \boxed{}, <answer></answer>, number, or line that begins with A; text: math-verify looks for it in all of the
    # text.  auto: boxed, else the tag, else behind ####, else the last number (math: what math-verify finds in the last 8,192 characters).
    extract: Literal["auto", "line", "boxed", "tag", "number", "text"] = "auto"
    after: str = ""  # look only behind the last of these, e.g. </think>: a rollout without it has no answer
    format: Literal["none", "boxed", "think"] = "none"  # else the reward is 0: a \boxed{} that closes, or <think>...</think> at the start
    timeout: float = 5.0  # seconds a rollout from the hand-over to a worker, which is killed then
    on_timeout: Literal["zero", "skip"] = "zero"  # a rollout that ran into its deadline or memory limit: reward 0, or left out of baseline and loss
    workers: int = 0  # processes; 0: one a processor, eight at most
    memory_gb: float = 4.0  # address space of a worker; 0: no limit
    network: bool = False  # let the workers reach the network (a judge behind HTTP)


@dataclass
class SegmenterConfig:
    min_tokens: int = 8  # of a step
    max_tokens: int = 256  # of a step
    max_segments: int = 64  # steps a rollout
    target_tokens: int = 64  # of a step: what a cut costs follows from it
    entropy: bool = True  # cut at forking tokens as well
    forking_share: float = 0.1  # share of tokens whose entropy makes them forks
    fixed: int = 0  # an ablation: steps of so many tokens whatever stands there; 0: steps


@dataclass
class AttributionConfig:
    # Some of hindsight, probe, tree, head, entropy, separated by commas: where several look at a rollout the most reliable one speaks. Or "none".
    source: str = "hindsight,tree"
    keys: Literal["tokens", "numbers"] = "tokens"  # tree: what a step is recognised by, its tokens or the numbers in it
    probe_suffix: str = ""  # probe: what stands between a step and an answer given at once; empty: a default
    slope: float = 3.0  # reliability = slope times the measured skill, at most 1
    control: Literal["none", "shuffled", "everywhere", "position", "random"] = "none"  # put an attribution without information in its place
    clamp: float = 5.0  # nats: bound of a segment's centred information before it becomes credit
    kappa: float = 2.0  # tree: pseudo-counts of what a prefix is drawn to
    drawn_to: Literal["mean", "before"] = "mean"  # tree: the leave-one-out group mean, or the value one step before: nothing where nobody shares
    mask_answer_copies: bool = True  # tokens that spell the answer carry no information about reaching it
    reliability: float = -1.0  # in [0, 1]: fixed instead of measured; 0 is exactly the update without attribution

    @property
    def sources(self) -> list[str]:
        return [] if self.source == "none" else self.source.split(",")


@dataclass
class CreditConfig:
    form: Literal["additive", "weights", "branch", "ratio", "none"] = "additive"  # branch: TEMPO's, ratio: RLSD's
    # Which groups a source looks at: those without variance, all, or its own (hindsight: those without variance, the others: the rest).
    scope: Literal["own", "zero_variance", "all"] = "own"
    gain: float = 0.5  # of hindsight's additive credit and of the weights
    value_gain: float = 1.0  # of value differences, in the additive form
    bound: float = 0.5  # of the weights and of the ratio form: within [1 - bound, 1 + bound]
    # No advantage on what was chosen in segments that leave the state as it was (the tree says which; without it none); on known filler (an oracle).
    mask: Literal["none", "unchanged", "filler"] = "unchanged"
    difficulty: float = 0.25  # tilt towards groups that seldom succeed, by ((1 - p) / p)^(difficulty reliability); 1/2: the gradient of log p
    token: Literal["none", "entropy"] = "none"  # inside a step: all tokens alike, or more where the policy had a choice
    advantage: Literal["grpo", "rloo", "centred"] = "grpo"  # (R - mean)/std, R - mean of the others, R - mean


@dataclass
class LossConfig:
    ratio: Literal["token", "segment", "sequence"] = "token"  # what one importance ratio stands for
    clip_low: float = 0.2  # the ratio counts down to 1 - clip_low
    clip_high: float = 0.28  # and up to 1 + clip_high in stage 1
    denominator: Literal["tokens", "sequences", "constant"] = "tokens"  # of the loss: mean over tokens, of rollout means, or by max_new_tokens
    kl_weight: float = 0.2  # of the KL to the reference, the policy that the run began with; 0: no reference
    rollout_cap: float = 2.0  # truncated importance weight of a rollout engine's tokens (`local` needs none); 0: no correction
    minibatches: int = 2  # optimiser steps a batch of rollouts


@dataclass
class EntropyConfig:
    controller: Literal["target", "constant", "step", "none"] = "target"  # step: Skywork-OR1's
    weight: float = 1e-3  # of the bonus: at the start, or constant
    rate: float = 0.05  # of the controller's step
    dead_band: float = 0.05  # relative distance to the target within which the weight stays
    start: float = 0.8  # target at the start and at the end, as shares of the entropy of the first batches
    end: float = 0.3
    min_weight: float = 1e-5
    max_weight: float = 1e-2
    gated: bool = True  # weight the bonus by how open the outcome still is
    covariance: Literal["fallback", "always", "never"] = "fallback"  # KL-Cov: where the bonus is at its most and entropy below half its target
    covariance_share: float = 2e-4  # of the tokens, those of highest covariance between advantage and log-prob
    covariance_weight: float = 1.0


@dataclass
class CurriculumConfig:
    sampler: Literal["thompson", "uniform"] = "thompson"  # by a Beta posterior of success, or all alike
    cells: Literal["named", "problems"] = "named"  # of the posteriors: those that the data names, else uniform draws; or each problem its own
    centre: float = 0.25  # success that is looked for
    band: float = 0.0  # around it: sampled successes within are equally good; 0: the nearest first
    candidates: int = 2  # problems drawn for each that is taken
    decay: float = 0.9  # of the posterior, a visit
    uniform_share: float = 0.1  # of the problems, drawn from all alike
    mastered_share: float = 0.1  # of the problems, from those with a posterior above 0.9: against forgetting
    dynamic_sampling: bool = False  # DAPO: sample again until every group has both outcomes
    max_rounds: int = 4  # of dynamic sampling


@dataclass
class StagesConfig:
    two: bool = True  # whether there is a second stage
    switch_success: float = 0.6  # running success from which on stage 2 may begin
    switch_slope: float = 0.01  # gain of success over switch_window steps below which it does
    switch_window: int = 50  # steps
    switch_share: float = 0.6  # of the steps, at the latest
    clip_high: float = 0.2  # in stage 2, where it is the lower one of it and loss.clip_high
    confidence: float = 0.3  # omega of the confidence-weighted reward in stage 2
    confidence_form: Literal["brier", "product"] = "brier"  # product: the naive R c, an ablation


@dataclass
class OptimizerConfig:
    learning_rate: float = 1e-6
    warmup_steps: int = 5  # of the learning rate, linear
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    max_grad_norm: float = 1.0  # gradients are scaled down to it


@dataclass
class TrainerConfig:
    steps: int = 100  # batches of rollouts
    micro_batch_tokens: int = 16384  # most tokens of a forward or backward pass, padding counted where there is any
    eval_every: int = 10  # steps; the last one too
    checkpoint_every: int = 10  # steps
    keep_checkpoints: int = 2  # the newest
    threads: int = 0  # 0: torch's own choice
    sharding: Literal["none", "full"] = "none"  # of weights, gradients and optimizer state between processes; full: FSDP2
    rank_timeout: float = 60.0  # minutes that a process waits for the others: at least the longest evaluation
    keep_rollouts: bool = True  # every rollout as parquet, where pyarrow is installed
    log: Literal["", "tensorboard", "wandb", "trackio"] = ""  # the metrics there as well; each is an extra of that name


@dataclass
class EvalConfig:
    samples: int = 8  # a problem, for pass@k, before the first step and after the last; 0: greedy accuracy alone
    max_problems: int = 256  # 0: all
    start: bool = True  # pass@k before the first step as well
    temperature: float = 1.0  # of the samples


@dataclass
class Config:
    name: str = "run"  # of the run; default: the configuration file's name
    method: Literal["acpo", "grpo", "rloo", "dr_grpo", "dapo", "gspo"] = "acpo"  # shorthand for the settings of METHODS
    seed: int = 0
    run_dir: str = ""  # empty: runs/{name}-{method}-{seed}
    problems: ProblemsConfig = field(default_factory=ProblemsConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    warmup: WarmupConfig = field(default_factory=WarmupConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    verify: VerifyConfig = field(default_factory=VerifyConfig)
    segmenter: SegmenterConfig = field(default_factory=SegmenterConfig)
    attribution: AttributionConfig = field(default_factory=AttributionConfig)
    credit: CreditConfig = field(default_factory=CreditConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    entropy: EntropyConfig = field(default_factory=EntropyConfig)
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)
    stages: StagesConfig = field(default_factory=StagesConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    @property
    def directory(self) -> Path:
        return Path(self.run_dir or f"runs/{self.name}-{self.method}-{self.seed}")


def load(path: str | Path | None, overrides: list[str] | tuple[str, ...] = (), *between: tuple[str, dict[str, Any]]) -> Config:
    """The configuration of a YAML file (None: the defaults) under further layers (where it stands, dotted settings) under `key=value` overrides."""
    command = dict(_override(text) for text in overrides)
    file = [] if path is None else [(str(path), flatten(read_yaml(Path(path))))]
    layers = [*file, *between, ("the command line", command)]
    config = from_layers(*layers)
    if path is not None and not any("name" in layer for _, layer in layers):
        config.name = Path(path).stem
    return config


def from_layers(*layers: tuple[str, dict[str, Any]]) -> Config:
    """The configuration of layers (where it stands, dotted settings), each over those before it; the last one's `method` is the one that counts."""
    config = Config()
    for i, (where, layer) in enumerate(layers):
        _apply(config, layer, where, expand=not any("method" in later for _, later in layers[i + 1 :]))
    limits.check(config)
    limits.check_run(config)
    return config


METHOD = ("segmenter", "attribution", "credit", "entropy", "curriculum", "stages")


def method_settings(layer: dict[str, Any], where: str) -> Config:
    """The method's settings, for a loop that is not ours: nested or dotted ones of METHOD over the defaults. The rest is that loop's."""
    flat = flatten(layer)
    for key in flat:
        if key in keys(Config) and key.partition(".")[0] not in METHOD:
            raise ConfigError(f"{where}: {key!r} belongs to our own loop; wanted settings of {', '.join(METHOD)}")
    config = Config()
    _apply(config, flat, where)
    limits.check(config)
    return config


NOT_DECIMAL = re.compile(r"[-+]?(?:0[0-7_]+|[0-9][0-9_.]*(?::[0-9_.]+)+)")  # to YAML 1.1 octal, or in base sixty: another number than was typed


def _override(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"an override must be key=value, got {text!r}")
    key = key.strip()
    kind = keys(Config).get(key)
    if value == "" or ((kind is str or typing.get_origin(kind) is Literal) and value[0] not in "'\""):
        return key, value  # text is what was typed, not the number or the truth value that YAML reads in it
    if kind in (int, float) and NOT_DECIMAL.fullmatch(value.strip()):
        raise ConfigError(f"the command line: {key} must be written in decimal digits, got {value!r}")
    try:
        return key, yaml.safe_load(value)
    except (yaml.YAMLError, ValueError, RecursionError):
        return key, value


def _apply(config: Config, layer: dict[str, Any], where: str, expand: bool = True) -> None:
    """Sets a layer's settings. expand=False: a later layer names another method, whose settings stand instead of this one's."""
    known = keys(Config)
    for key in layer:
        if key not in known:
            raise ConfigError(f"{where}: {unknown(key, known)}")
    if expand and isinstance(layer.get("method"), str):
        layer = {**METHODS.get(layer["method"], {}), **layer}
    for key, value in layer.items():
        parent, _, leaf = key.rpartition(".")
        setattr(value_of(config, parent) if parent else config, leaf, typed(key, value, known[key], where))


def to_dict(config: Config) -> dict:
    return dataclasses.asdict(config)
