"""TRL 1.16: its Triton kernel on CUDA, its torch path on the CPU, and the chunked head."""

from __future__ import annotations

from . import Absent, require

NAME = "TRL"
INSTALL = "'trl==1.16.*'"


def logprob_entropy(device):
    if device.type == "cuda":
        try:
            kernels = require("trl.kernels", INSTALL)
            return {"TRL": lambda logits, ids, temperature=1.0: kernels.selective_log_softmax_and_entropy(logits, ids, temperature, None)}
        except AttributeError:
            raise Absent("this TRL has no Triton log-prob kernel (1.16 has)") from None
    utils = require("trl.trainer.utils", INSTALL)

    def torch_path(logits, ids, temperature=1.0):
        scaled = logits if temperature == 1.0 else logits / temperature
        return utils.selective_log_softmax(scaled, ids), utils.entropy_from_logits(scaled)

    return {"TRL": torch_path}


def linear_logprob_entropy(device):
    function = getattr(require("trl.kernels", INSTALL), "ChunkedLogProbFunction", None)
    if function is None:
        raise Absent("this TRL has no ChunkedLogProbFunction (1.16 has)")

    def chunked(hidden, weight, ids, temperature=1.0):
        return function.apply(hidden, weight, None, ids, temperature, 32768, None, 1.0, ("entropy",))[:2]

    return {"TRL chunked": chunked}


def grpo_steps(ours, turn, count: int, peak) -> list[dict[str, float]]:
    """The seconds of each of `count` steps of TRL's GRPOTrainer on a copy of our trainer's policy, and the log-probs that it scored. A step is what
    ours is: one scoring pass, then an optimiser step a minibatch, with the settings of ours. turn() -> (prompt ids, response ids, outcomes) is
    called in each for its rollouts, and is no part of its seconds. `peak` (clocks.Peak) is begun behind the first one's rollouts: "peak_bytes"."""
    import contextlib
    import copy
    import io
    import time

    require("trl", INSTALL)
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    config, device = ours.config, ours.policy.device
    size, parts = config.rollout.prompts * config.rollout.group_size, config.loss.minibatches
    found, given = [], {}

    def rollouts(prompts, trainer):
        begin = time.perf_counter()
        given["prompts"], given["responses"], given["outcomes"] = turn()
        if not found:
            peak.begin()
        given["seconds"] = time.perf_counter() - begin
        return {"prompt_ids": given["prompts"], "completion_ids": given["responses"], "logprobs": None}

    class Timed(GRPOTrainer):
        def now(self) -> float:
            if device.type == "cuda":
                import torch

                torch.cuda.synchronize()
            return time.perf_counter()

        def _generate_and_score_completions(self, inputs):
            begin = self.now()
            out = super()._generate_and_score_completions(inputs)
            old_logp = out["old_per_token_logps"][out["completion_mask"].bool()]
            found.append({"time/score": self.now() - begin - given["seconds"], "time/update": 0.0, "time/optimizer": 0.0, "old_logp": old_logp})
            return out

        def training_step(self, *arguments):
            scored, begin = len(found), self.now()
            loss = super().training_step(*arguments)
            taken = self.now() - begin
            if len(found) > scored:
                taken -= found[-1]["time/score"] + given["seconds"]
            found[-1]["time/update"] += taken
            if len(found) == 1:
                found[-1]["peak_bytes"] = peak.bytes()
            return loss

    with contextlib.redirect_stdout(io.StringIO()):
        settings = GRPOConfig(
            output_dir=str(ours.run.directory / "trl"), per_device_train_batch_size=size // parts, steps_per_generation=parts,
            gradient_accumulation_steps=1, num_generations=config.rollout.group_size, max_completion_length=config.rollout.max_new_tokens,
            max_steps=count * parts, learning_rate=config.optimizer.learning_rate, max_grad_norm=config.optimizer.max_grad_norm,
            weight_decay=config.optimizer.weight_decay, temperature=config.rollout.temperature, beta=0.0, loss_type="bnpo",
            epsilon=config.loss.clip_low, epsilon_high=config.loss.clip_high, bf16=config.policy.dtype == "bfloat16",
            use_cpu=device.type == "cpu", gradient_checkpointing=False, report_to="none", save_strategy="no", logging_strategy="no",
            disable_tqdm=True, dataloader_pin_memory=False, seed=config.seed,
        )  # fmt: skip
        trainer = Timed(
            model=copy.deepcopy(ours.policy.model), args=settings, processing_class=ours.tokenizer, rollout_func=rollouts,
            reward_funcs=lambda completions, **_: given["outcomes"], train_dataset=Dataset.from_dict({"prompt": ["?"] * config.rollout.prompts}),
        )  # fmt: skip
        optimizer = trainer.create_optimizer()
        take = optimizer.step

        def timed_step(*arguments, **keywords):
            begin = trainer.now()
            result = take(*arguments, **keywords)
            found[-1]["time/optimizer"] += trainer.now() - begin
            return result

        optimizer.step = timed_step
        trainer.train()
    return found
