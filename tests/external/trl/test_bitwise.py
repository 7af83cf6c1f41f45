"""Without attribution, bonus, curriculum and second stage, and with the same beta, ACPOTrainer is GRPOTrainer, to the bit; with our kernels, to
rounding."""

from __future__ import annotations

import pytest
import torch
from tiny import OFF, chance, equal, length, logged, model_path, trained, weights
from trl import GRPOTrainer

from acpo.integrations.trl import ACPOTrainer

LOSSES = ("grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo")
VARIANTS = {
    "plain": {},
    **{f"loss {name}": {"loss_type": name} for name in LOSSES},
    "num_iterations": {"num_iterations": 2},
    "steps_per_generation": {"steps_per_generation": 4},
    "old log-probs": {"steps_per_generation": 1},
    "reference": {"beta": 0.2},
    "batch scale": {"scale_rewards": "batch"},
    "no scale": {"scale_rewards": "none"},
    "entropy quantile": {"top_entropy_quantile": 0.2},
    "off-policy mask": {"off_policy_mask_threshold": 0.5, "num_iterations": 2},
    "truncated masked": {"mask_truncated_completions": True},
    "two-sided clip": {"delta": 1.5, "epsilon_high": 0.28, "num_iterations": 2},
    "TRL's entropy bonus": {"entropy_coef": 0.01},
    "adaptive entropy": {
        "use_adaptive_entropy": True, "entropy_target": 9.0, "entropy_coef": 0.01, "entropy_coef_min": 0.001, "entropy_coef_max": 0.012,
        "entropy_coef_delta": 0.001,
    },
    "soft clips": {"loss_type": "sapo", "sapo_temperature_neg": 1.3, "sapo_temperature_pos": 0.8, "num_iterations": 2, "epsilon": 0.1},
    "vespo": {
        "loss_type": "vespo", "vespo_k_pos": 1.5, "vespo_lambda_pos": 2.0, "vespo_k_neg": 2.0, "vespo_lambda_neg": 1.5, "num_iterations": 2
    },
    "reference that moves": {
        "beta": 0.04, "sync_ref_model": True, "ref_model_mixup_alpha": 0.5, "ref_model_sync_steps": 1, "use_bias_correction_kl": False,
    },
    "sampling": {
        "temperature": 0.7, "top_p": 0.9, "top_k": 50, "min_p": 0.001, "repetition_penalty": 1.1, "generation_kwargs": {"typical_p": 0.95},
        "acpo_source": "tree", "cache_implementation": "dynamic",
    },
    "model and head": {
        "cast_lm_head_to_fp32": True, "disable_dropout": True, "bf16": True, "trust_remote_code": True,
        "model_init_kwargs": {"attn_implementation": "eager"},
    },
    "data": {
        "shuffle_dataset": False, "generation_batch_size": 16, "chat_template_kwargs": {"enable_thinking": False}, "num_generations_eval": 2,
    },
    "logs": {"log_completions": True, "num_completions_to_print": 1, "log_unique_prompts": True},
    "two rewards": {
        "reward_funcs": [chance, length], "reward_weights": [1.0, 0.3], "multi_objective_aggregation": "normalize_then_sum",
        "acpo_outcome": "chance",
    },
    "gradient checkpointing": {"gradient_checkpointing": True},
    "bfloat16": {"bf16": True},
    "padding": {"pad_to_multiple_of": 8},
    "sequence level": {"importance_sampling_level": "sequence", "loss_type": "cispo"},
    "hindsight everywhere": {"acpo_settings": {"credit.scope": "all"}},
    "weights": {"acpo_form": "weights"},
    "no attribution": {"acpo_source": "none", "acpo_form": "none", "importance_sampling_level": "sequence", "acpo_reliability": None},
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_reliability_0_is_grpo_to_the_bit(tmp_path, variant):
    settings = {**OFF, **VARIANTS[variant]}
    theirs, _ = trained(GRPOTrainer, tmp_path / "theirs", **settings)
    ours, start = trained(ACPOTrainer, tmp_path / "ours", **settings)
    assert equal(weights(theirs), weights(ours)) and not equal(start, weights(ours))
    assert logged(theirs, "loss") == logged(ours, "loss") and logged(theirs, "reward") == logged(ours, "reward")
    least = 0.0 if variant == "truncated masked" else 1.5  # few of these rollouts end, and the others have no tokens then
    assert logged(ours, "acpo/segments")[0] > least and set(logged(ours, "acpo/shaping")) == {0.0}


def test_the_passes_of_attribution_leave_dropout_where_it_was(tmp_path):
    model = model_path(attention_dropout=0.3)
    theirs, ours = (trained(kind, tmp_path / kind.__name__, model=model, **OFF)[0] for kind in (GRPOTrainer, ACPOTrainer))
    assert equal(weights(theirs), weights(ours))


@pytest.mark.parametrize("variant", ["plain", "num_iterations", "reference", "entropy quantile", "loss cispo"])
def test_our_kernels_agree_to_rounding(tmp_path, variant):
    settings = {**OFF, **VARIANTS[variant], "max_steps": 1, "max_grad_norm": 0.0, "optim": "sgd"}
    theirs, start = trained(GRPOTrainer, tmp_path / "theirs", **settings)
    ours, _ = trained(ACPOTrainer, tmp_path / "ours", **{**settings, "use_acpo_kernels": True})
    assert abs(logged(theirs, "loss")[0] - logged(ours, "loss")[0]) < 1e-5
    assert abs(logged(theirs, "entropy")[0] - logged(ours, "entropy")[0]) < 1e-5
    moved = {name: value - start[name] for name, value in weights(theirs).items()}
    assert max(float(value.abs().max()) for value in moved.values()) > 1e-6
    for name, value in weights(ours).items():
        torch.testing.assert_close(value - start[name], moved[name], rtol=1e-3, atol=1e-7)
