"""A GRPO run small enough for a test: a random Qwen2 of 40 thousand parameters on bytes, rewards that depend on chance alone."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from transformers import Qwen2Config, Qwen2ForCausalLM
from trl import GRPOConfig, GRPOTrainer

from acpo.integrations.trl import ACPOConfig, ACPOTrainer
from acpo.policy import byte_tokenizer

CHAT = "{% for m in messages %}{{ m['role'][0] + ':' + m['content'] + '\n' }}{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
# Steps of a few random bytes, so that a completion has several.
STEPS = {"segmenter.min_tokens": 2, "segmenter.max_tokens": 8, "segmenter.target_tokens": 4}
ENDS = range(128, 140)  # these end a completion too: with them two in three are not cut off
# What is left of the method is GRPO.
OFF = {"acpo_reliability": 0.0, "acpo_entropy": "none", "acpo_two_stages": False, "use_acpo_kernels": False, "beta": 0.0}

_KEPT: list[tempfile.TemporaryDirectory] = []  # models, removed as the process ends


def tokenizer():
    own = byte_tokenizer()
    own.chat_template = CHAT
    own.padding_side = "left"
    return own


@functools.cache
def model_path(**changes) -> str:
    """A folder with the model and its tokenizer."""
    own = tokenizer()
    shape = {
        "vocab_size": len(own), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 256, "tie_word_embeddings": True, "bos_token_id": None,
        "pad_token_id": own.pad_token_id, "eos_token_id": own.eos_token_id, "initializer_range": 0.1, **changes,
    }  # fmt: skip
    kept = tempfile.TemporaryDirectory(prefix="acpo-tiny-")
    _KEPT.append(kept)
    folder = kept.name
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(Qwen2Config(**shape))
    model.generation_config.eos_token_id = [own.eos_token_id, *ENDS]
    model.save_pretrained(folder)
    own.save_pretrained(folder)
    return folder


def chance(completions, completion_ids, **_):
    """Right or wrong by the parity of the ids: in groups of 4 one in eight has no variance."""
    return [float(sum(ids) % 2) for ids in completion_ids]


def length(completions, completion_ids, **_):
    return [0.1 * len(ids) for ids in completion_ids]


def problems(count: int = 16, chat: bool = True) -> Dataset:
    rows = [(f"{i}+{i % 3}=", str(i + i % 3)) for i in range(count)]
    prompts = [[{"role": "user", "content": q}] if chat else q for q, _ in rows]
    return Dataset.from_dict({"prompt": prompts, "answer": [a for _, a in rows], "level": [i % 4 for i in range(count)]})


def arguments(kind: type[GRPOConfig], folder: Path, **changes) -> GRPOConfig:
    settings = {
        "output_dir": str(folder), "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": [], "disable_tqdm": True,
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_generations": 4, "max_completion_length": 12, "max_steps": 3,
        "logging_steps": 1, "save_strategy": "no", "learning_rate": 1e-3, "lr_scheduler_type": "constant", **changes,
    }  # fmt: skip
    if kind is ACPOConfig:
        settings["acpo_settings"] = {**STEPS, **settings.get("acpo_settings", {})}
    return kind(**settings)


def trainer(kind: type[GRPOTrainer], folder: Path, *, model=None, reward_funcs=chance, dataset=None, options=None, **changes) -> GRPOTrainer:
    """Of GRPOTrainer the options of ACPOConfig are left out."""
    if kind is not ACPOTrainer:
        changes = {name: value for name, value in changes.items() if "acpo" not in name}
    return kind(
        model=model_path() if model is None else model, reward_funcs=reward_funcs, train_dataset=problems() if dataset is None else dataset,
        args=arguments(ACPOConfig if kind is ACPOTrainer else GRPOConfig, folder, **changes), processing_class=tokenizer(), **(options or {}),
    )  # fmt: skip


def weights(own: GRPOTrainer) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in own.model.named_parameters()}


def trained(kind: type[GRPOTrainer], folder: Path, **changes) -> tuple[GRPOTrainer, dict[str, torch.Tensor]]:
    """The trainer after its run, and the weights before it. The random state is set where a trainer is made: one is made and run at a time."""
    own = trainer(kind, folder, **changes)
    start = weights(own)
    own.train()
    return own, start


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def logged(own: GRPOTrainer, name: str) -> list[float]:
    return [entry[name] for entry in own.state.log_history if name in entry]
