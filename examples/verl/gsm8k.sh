#!/usr/bin/env bash
# GRPO with step-level credit in verl 0.9, one machine:   examples/verl/gsm8k.sh MODEL TRAIN.parquet TEST.parquet [KEY=VALUE ...]
# Needs CUDA GPUs, verl 0.9 with Ray and vLLM, a model and the data: not run in CI, where tests/external/verl tries the plug-in on the CPU.
# The parquet files are verl's (its examples/data_preprocess/gsm8k.py writes them); acpo must be installed where driver and workers run.
set -euo pipefail
model=$1 train=$2 test=$3
shift 3
python -m verl.trainer.main_ppo \
    trainer.v1.trainer_mode=acpo_sync \
    algorithm.adv_estimator=grpo \
    +algorithm.acpo.segmenter.target_tokens=32 \
    +algorithm.acpo.entropy.controller=target \
    actor_rollout_ref.actor.calculate_entropy=True \
    actor_rollout_ref.model.path="$model" \
    data.train_files="$train" \
    data.val_files="$test" \
    data.train_batch_size=128 \
    data.max_prompt_length=512 \
    data.max_response_length=1024 \
    actor_rollout_ref.rollout.name=vllm \
    actor_rollout_ref.rollout.n=8 \
    actor_rollout_ref.rollout.tensor_model_parallel_size=1 \
    actor_rollout_ref.rollout.gpu_memory_utilization=0.5 \
    actor_rollout_ref.actor.optim.lr=1e-6 \
    actor_rollout_ref.actor.ppo_mini_batch_size=64 \
    actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=8 \
    actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=8 \
    actor_rollout_ref.actor.use_kl_loss=True \
    actor_rollout_ref.actor.kl_loss_coef=0.2 \
    actor_rollout_ref.actor.kl_loss_type=low_var_kl+ \
    actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=8 \
    trainer.n_gpus_per_node=1 \
    trainer.nnodes=1 \
    trainer.total_training_steps=200 \
    trainer.project_name=acpo \
    trainer.experiment_name=gsm8k \
    trainer.logger='["console"]' \
    "$@"
