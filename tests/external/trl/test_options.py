"""Every option of GRPOConfig is accounted for: run beside GRPOTrainer (test_bitwise.py), refused by name, another program's, or transformers' own."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from test_bitwise import VARIANTS
from tiny import OFF, arguments, equal, tokenizer, trained, trainer, weights
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM, Trainer, TrainingArguments
from trl import GRPOConfig, GRPOTrainer

from acpo.integrations.trl import ACPOConfig, ACPOTrainer
from acpo.methods import METHODS

COLOCATE = {  # run in tests/external/vllm/check_trl.py, with vLLM itself
    "use_vllm", "vllm_mode", "vllm_gpu_memory_utilization", "vllm_max_model_length", "vllm_importance_sampling_correction",
    "vllm_importance_sampling_mode", "vllm_importance_sampling_clip_max", "vllm_importance_sampling_clip_min",
}  # fmt: skip
NOT_RUN = {  # read by TRL's own code alone, which nothing here overrides
    "a GPU": {"vllm_enable_sleep_mode", "vllm_tensor_parallel_size", "ds3_gather_for_generation"},
    "a server with nccl": {"vllm_server_base_url", "vllm_server_host", "vllm_server_port", "vllm_server_timeout", "vllm_group_port"},
    "another model in vLLM": {"vllm_model_impl"},
    "paged attention": {"use_transformers_continuous_batching", "transformers_continuous_batching_config", "use_transformers_paged"},
    "images": {"log_multimodal"},
    "the hub": {"log_completions_hub_repo"},
    "tools": {"max_tool_calling_iterations"},
    "deprecated: vllm_importance_sampling_clip_max": {"vllm_importance_sampling_cap"},
}
# With what ACPOConfig has by default unless said otherwise.
REFUSED = {
    "importance_sampling_level": ({"importance_sampling_level": "sequence"}, r"importance_sampling_level='sequence' with loss_type='dapo'"),
    "top_p": ({"top_p": 0.9}, r"top_p=0\.9 samples from another distribution"),
    "top_k": ({"top_k": 5}, r"top_k=5 samples from another"),
    "min_p": ({"min_p": 0.1}, r"min_p=0\.1 samples from another"),
    "repetition_penalty": ({"repetition_penalty": 1.2}, r"repetition_penalty=1\.2 samples from another"),
    "vllm_structured_outputs_regex": ({"vllm_structured_outputs_regex": "a*"}, r"vllm_structured_outputs_regex='a\*' samples from another"),
    "generation_kwargs": ({"generation_kwargs": {"typical_p": 0.9}}, r"generation_kwargs\['typical_p'\] samples from another"),
    "entropy_coef": ({"entropy_coef": 0.01}, "entropy_coef and use_adaptive_entropy would be a second entropy bonus"),
    "use_adaptive_entropy": ({"use_adaptive_entropy": True}, "entropy_coef and use_adaptive_entropy would be a second entropy bonus"),
    "multi_objective_aggregation": (
        {"multi_objective_aggregation": "normalize_then_sum"}, "multi_objective_aggregation='normalize_then_sum': the confidence of stage 2"
    ),
    "remove_unused_columns": ({"remove_unused_columns": True}, "remove_unused_columns=True drops the answers"),
}  # fmt: skip


def names(kind: type) -> set[str]:
    return {field.name for field in dataclasses.fields(kind)}


def test_every_option_is_accounted_for_once():
    """Fails on an option that another TRL brings."""
    own = names(GRPOConfig) - names(TrainingArguments)
    run = (set().union(*VARIANTS.values()) | {"router_aux_loss_coef", "num_generations", "max_completion_length"}) & own
    elsewhere = set().union(*NOT_RUN.values())
    assert own - run - COLOCATE - set(REFUSED) - elsewhere == set()
    assert COLOCATE | set(REFUSED) | elsewhere <= names(GRPOConfig) and not elsewhere & (run | COLOCATE | set(REFUSED))


def test_options_keep_their_defaults_but_for_beta():
    theirs, ours = GRPOConfig("out", use_cpu=True, bf16=False), ACPOConfig("out", use_cpu=True, bf16=False)
    differing = {name for name in names(GRPOConfig) if repr(getattr(theirs, name)) != repr(getattr(ours, name))}
    assert differing - {"logging_dir", "run_name"} == {"beta"}
    assert ours.beta == METHODS["acpo"]["loss.kl_weight"] == 0.2


def test_transformers_options_meet_transformers_own_code():
    """Those of TrainingArguments: of Trainer's methods ACPOTrainer has these three, and calls them."""
    own = {name for name, value in vars(ACPOTrainer).items() if callable(value) and not name.startswith(("_acpo", "__"))}
    assert own & set(dir(Trainer)) == {"_get_train_sampler", "_save_checkpoint", "_load_optimizer_and_scheduler"}
    assert own - set(dir(Trainer)) == {
        "_calculate_rewards", "_get_per_token_logps_and_entropies", "_generate_and_score_completions", "_compute_loss"
    }  # fmt: skip


@pytest.mark.parametrize("option", REFUSED)
def test_what_cannot_be_is_refused_by_name(tmp_path, option):
    settings, message = REFUSED[option]
    arguments(GRPOConfig, tmp_path, **settings)
    with pytest.raises(ValueError, match=message):
        arguments(ACPOConfig, tmp_path, **settings)


def test_the_auxiliary_loss_of_mixtures_of_experts(tmp_path):
    words = tokenizer()
    torch.manual_seed(0)
    shape = Qwen3MoeConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, head_dim=8, max_position_embeddings=256, pad_token_id=words.pad_token_id,
        eos_token_id=words.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    Qwen3MoeForCausalLM(shape).save_pretrained(tmp_path / "model")
    words.save_pretrained(tmp_path / "model")
    settings = {**OFF, "model": str(tmp_path / "model"), "router_aux_loss_coef": 0.1, "max_steps": 2}
    theirs, ours = (trained(kind, tmp_path / kind.__name__, **settings)[0] for kind in (GRPOTrainer, ACPOTrainer))
    assert equal(weights(theirs), weights(ours))
    with pytest.raises(ValueError, match="use_acpo_kernels=True does not compute the auxiliary loss of mixture-of-experts models"):
        trainer(ACPOTrainer, tmp_path, **{**settings, "use_acpo_kernels": True})


def test_kernels_under_zero_3(monkeypatch, tmp_path):
    """The weight is whole in the forward alone, and our backward reads it again."""
    monkeypatch.setattr("acpo.integrations.trl.head.is_deepspeed_zero3_enabled", lambda: True, raising=False)
    with pytest.raises(ValueError, match=r"use_acpo_kernels=True .* ZeRO-3.* set use_acpo_kernels=False"):
        trainer(ACPOTrainer, tmp_path, **{**OFF, "use_acpo_kernels": True})
    trainer(ACPOTrainer, tmp_path, **OFF)
