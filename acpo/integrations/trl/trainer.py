"""`ACPOTrainer`: GRPOTrainer with step-level credit.

Four methods carry the method: `_calculate_rewards` (keeps the rewards), `_generate_and_score_completions` (turns one advantage a rollout into one a
token), `_get_per_token_logps_and_entropies` (keeps the entropies) and `_compute_loss` (adds the weighted entropy bonus). The loss is TRL's. Three
more keep state and order: `_save_checkpoint`, `_load_optimizer_and_scheduler`, `_get_train_sampler`.

The credit of a generation batch is computed from what all processes gathered, on every one of them and on the host: so a group may lie across
processes, and calibrators and controllers are the same everywhere.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from accelerate.logging import get_logger
from accelerate.utils import gather_object, is_peft_model
from datasets import Dataset
from torch import Tensor
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import GRPOTrainer

from ...curriculum import Curriculum
from ...problems import Problem
from ..functional import StepCredit
from . import scoring, state
from .config import ACPOConfig
from .head import add_head, refuse_unsupported, refuse_zero3
from .rewards import group_advantages
from .sampler import CurriculumSampler

logger = get_logger(__name__)

ROW = "acpo_row"  # column of the row numbers that the curriculum goes by


class ACPOTrainer(GRPOTrainer):
    """GRPOTrainer that assigns credit to reasoning steps. Takes what GRPOTrainer takes, with an `ACPOConfig` as args.

    The dataset's column `args.acpo_answer_column` holds the reference answer for the hindsight prompt. One reward function, `args.acpo_outcome`, is
    the verifier's outcome in [0, 1] that steps are judged by; the others only enter the rollouts' advantages, which are TRL's.
    """

    _tag_names: ClassVar[list[str]] = ["trl", "grpo", "acpo"]
    _name = "ACPO"
    _paper: ClassVar[dict[str, str]] = {
        "title": "Pinpointing crucial steps: Attribution-based Credit Assignment for Verifiable Reinforcement Learning",
        "id": "2510.08899",
    }

    def __init__(
        self, model, reward_funcs=None, args: ACPOConfig | None = None, train_dataset=None, eval_dataset=None, processing_class=None, **options
    ):
        args = ACPOConfig("ACPO") if args is None else args
        if not isinstance(args, ACPOConfig):
            raise TypeError(f"args must be an ACPOConfig, got {type(args).__name__}")
        if args.use_vllm and args.vllm_mode == "colocate":
            from ...rollout import worker  # noqa: F401  on a CPU vLLM would keep the first weights, in silence
        self._acpo_curriculum: Curriculum | None = None
        self._acpo_sampler: CurriculumSampler | None = None
        if args.acpo_curriculum:
            train_dataset = self._acpo_numbered(train_dataset, args)
        super().__init__(model, reward_funcs, args, train_dataset, eval_dataset, processing_class, **options)
        base = self.model.get_base_model() if is_peft_model(self.model) else self.model
        settings = {**args.method_layer(), "curriculum.sampler": "uniform"}  # the curriculum is this trainer's
        self._acpo = StepCredit(
            self._tokenizer, group_size=self.num_generations, vocab_size=base.config.get_text_config().vocab_size, settings=settings,
            total_steps=max(1, args.max_steps), where="ACPOConfig",
        )  # fmt: skip
        self._acpo_check(base, train_dataset, options)
        add_head(base, self.temperature, args.cast_lm_head_to_fp32, args.use_acpo_kernels)
        if self.ref_model is not None:
            add_head(self.accelerator.unwrap_model(self.ref_model), self.temperature, args.cast_lm_head_to_fp32, args.use_acpo_kernels)
        self._acpo_outcome = self._acpo_outcome_column()
        self._acpo_in_stage_2 = False  # it begins with a generation batch: the buffered ones are of stage 1
        self._acpo_rewards: Tensor | None = None
        self._acpo_entropies: Tensor | None = None
        self._acpo_scored: list[tuple[Tensor, Tensor]] | None = None

    def _acpo_check(self, base, train_dataset, options: dict[str, Any]) -> None:
        """What cannot be together, by name."""
        args = self.args
        if args.use_acpo_kernels:
            refuse_zero3()
            refuse_unsupported(base, "use_acpo_kernels=True")
            if self.aux_loss_enabled:
                raise ValueError("use_acpo_kernels=True does not compute the auxiliary loss of mixture-of-experts models; set it to False")
        if self._acpo.needs_hindsight:
            refuse_unsupported(base, "acpo_source='hindsight'")
            if self._is_vlm:
                raise ValueError("acpo_source='hindsight' scores text alone and this processing_class is a processor; use acpo_source='tree'")
            if options.get("environment_factory") is not None:
                raise ValueError("acpo_source='hindsight' cannot put an answer into the prompts of an environment_factory; use acpo_source='tree'")
            columns = getattr(train_dataset, "column_names", None)
            if columns is not None and args.acpo_answer_column not in columns:
                raise ValueError(_no_column("acpo_answer_column", args.acpo_answer_column, columns))

    def _acpo_outcome_column(self) -> int:
        names, wanted = self.reward_func_names, self.args.acpo_outcome
        if wanted is None and len(names) == 1:
            return 0
        if names.count(wanted) != 1:
            raise ValueError(f"acpo_outcome must name the one reward function that is the outcome in [0, 1], of {', '.join(names)}; got {wanted!r}")
        return names.index(wanted)

    # --- curriculum ---------------------------------------------------------------------------------------------------------------

    def _acpo_numbered(self, dataset, args: ACPOConfig) -> Dataset:
        """The dataset with numbered rows, and the curriculum over it."""
        if not isinstance(dataset, Dataset):
            raise ValueError(f"acpo_curriculum=True needs a train_dataset with a length (datasets.Dataset), got {type(dataset).__name__}")
        column = args.acpo_difficulty_column
        if column is not None and column not in dataset.column_names:
            raise ValueError(_no_column("acpo_difficulty_column", column, dataset.column_names))
        cells = [""] * len(dataset) if column is None else [str(cell) for cell in dataset[column]]
        settings = args.method.curriculum if column is not None else replace(args.method.curriculum, cells="problems")
        self._acpo_curriculum = Curriculum([Problem(str(i), "", "", cell=cell) for i, cell in enumerate(cells)], settings)
        return dataset.add_column(ROW, list(range(len(dataset))))

    def _get_train_sampler(self, dataset=None):
        if self._acpo_curriculum is None:
            return super()._get_train_sampler(dataset)
        if self._acpo_sampler is None:
            self._acpo_sampler = CurriculumSampler(
                self._acpo_curriculum, prompts=self.args.generation_batch_size // self.num_generations,
                copies=self.num_generations, repeats=self.num_iterations * self.args.steps_per_generation, seed=self.args.seed,
            )  # fmt: skip
        return self._acpo_sampler

    def _acpo_prior(self, rows: list[int] | None, outcome: Tensor) -> Tensor | None:
        """The curriculum's probability of success of each rollout's prompt; and it learns what became of it."""
        if self._acpo_curriculum is None:
            return None
        index = np.array(gather_object(rows))[:: self.num_generations]
        prior = torch.tensor(self._acpo_curriculum.prior(index)).repeat_interleave(self.num_generations)
        for row, group in zip(index, outcome.view(-1, self.num_generations).cpu(), strict=True):
            known = group[~torch.isnan(group)]
            if len(known):
                self._acpo_curriculum.update(np.array([row]), np.array([float(known.sum())]), len(known))
        return prior

    # --- rollouts: from one advantage a rollout to one a token --------------------------------------------------------------------

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        self._acpo_rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        return self._acpo_rewards

    def _get_per_token_logps_and_entropies(self, model, *args, **kwargs):
        keep = self._acpo_scored is not None and model is self.model
        if keep:
            kwargs["compute_entropy"] = True  # the head computes it anyway
        result = super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        if keep:
            self._acpo_scored.append(result[:2])
        elif kwargs.get("compute_entropy") and torch.is_grad_enabled():
            self._acpo_entropies = result[1]
        return result

    def _generate_and_score_completions(self, inputs):
        if not self.model.training:
            output = super()._generate_and_score_completions(inputs)
            if self.log_completions:
                self._logs["extra"]["acpo_segments"].extend([None] * len(self._acpo_rewards))
            return output
        if self._acpo.stage == 2 and not self._acpo_in_stage_2:
            self._acpo_enter_stage_2()
        rows = None
        if self._acpo_curriculum is not None:
            rows = [example[ROW] for example in inputs]
            inputs = [{name: value for name, value in example.items() if name != ROW} for example in inputs]
        self._acpo_scored = []
        try:
            output = super()._generate_and_score_completions(inputs)
        finally:
            scored, self._acpo_scored = self._acpo_scored, None
        old = output.get("old_per_token_logps")
        entropy = next((entropy for logp, entropy in scored if logp is old), None)
        self._acpo_assign(inputs, output, rows, {} if entropy is None else {"logp": old, "entropy": entropy})
        return output

    @torch.no_grad()
    def _acpo_assign(self, inputs: list[dict], output: dict[str, Any], rows: list[int] | None, scored: dict[str, Tensor]) -> None:
        """Replaces output["advantages"] by those of the tokens, and adds the weights of the entropy bonus where there is one. scored is what TRL's
        own pass over the rollouts gave, if it made one."""
        credit, hindsight = self._acpo, self._acpo.needs_hindsight
        credit.total_steps = self.state.max_steps
        mask = output["completion_mask"].bool()
        written = mask if "tool_mask" not in output else mask & output["tool_mask"].bool()
        outcome = self._acpo_rewards[:, self._acpo_outcome].float()
        wrong = ~torch.isnan(outcome) & ((outcome < 0) | (outcome > 1))
        if wrong.any():
            name = self.reward_func_names[self._acpo_outcome]
            raise ValueError(f"acpo_outcome: the reward function {name} must give the verifier's outcome in [0, 1], got {float(outcome[wrong][0])}")
        here = slice(self.accelerator.process_index * len(inputs), (self.accelerator.process_index + 1) * len(inputs))
        answers = None
        if hindsight:
            column = self.args.acpo_answer_column
            if column not in inputs[0]:
                raise ValueError(_no_column("acpo_answer_column", column, inputs[0]))
            answers = [_answer(example[column], column) for example in inputs]
            values = scoring.with_hindsight(self, inputs, output, answers, credit.looks(outcome)[here].tolist(), scored)
        else:
            values = scored or scoring.plain(self, output)
        if output.get("sampling_per_token_logps") is not None:  # the policy that sampled, as the engine saw it
            values = {**values, "logp": torch.nan_to_num(output["sampling_per_token_logps"], nan=0.0)}
        own = self._acpo_gather(output["advantages"])
        found = credit(
            self._acpo_gather(output["completion_ids"]), self._acpo_gather(mask), outcome, advantages=own, written=self._acpo_gather(written),
            answers=None if answers is None else gather_object(answers), normalise=lambda outcome: self._acpo_normalise(outcome, own),
            prior=self._acpo_prior(rows, outcome), finished=self._acpo_gather(self._acpo_finished(output["completion_ids"], mask)),
            step=self.state.global_step + 1,
            **{name: self._acpo_gather(value) for name, value in values.items()},
        )  # fmt: skip
        width = mask.shape[1]
        tokens = found.advantages[here, :width]
        plain = torch.where(written, output["advantages"].unsqueeze(1), 0.0)
        if credit.settings.credit.form != "none" or not torch.equal(tokens, plain):  # else TRL's own, whose sums over tokens round otherwise
            output["advantages"] = tokens
        if found.entropy_weight is not None:
            output["acpo_entropy_weight"] = found.entropy_weight[here, :width]
        for name, value in found.metrics.items():
            self._metrics["train"][name].append(value)
        if self.log_completions:
            self._logs["extra"]["acpo_segments"].extend((found.step.amax(1) + 1).tolist())

    def _acpo_finished(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Which rollouts [B] were not cut off, as TRL decides it for its clipped_ratio."""
        last = ids.gather(1, (mask.sum(1, keepdim=True) - 1).clamp(min=0)).squeeze(1)
        return torch.isin(last, torch.tensor([*self.eos_token_ids, self._tokenizer.pad_token_id], device=ids.device))

    def _acpo_gather(self, value: Tensor) -> Tensor:
        """The rows of all processes, in their order."""
        if self.accelerator.num_processes == 1:
            return value
        if value.ndim == 2:
            value = self.accelerator.pad_across_processes(value, dim=1)
        return self.accelerator.gather(value.contiguous())

    def _acpo_normalise(self, outcome: Tensor, own: Tensor) -> Tensor:
        """Advantages with other outcomes in the place of the verifier's, by TRL's formula, which must give TRL's own from the plain ones."""
        settings = {"weights": self.reward_weights, "group_size": self.num_generations, "scale": self.scale_rewards}
        if not torch.allclose(group_advantages(self._acpo_rewards, **settings), own, rtol=1e-4, atol=1e-5):
            raise RuntimeError("GRPOTrainer's advantages are not those of its formula any more: stage 2 cannot weigh the rewards with this TRL")
        rewards = self._acpo_rewards.clone()
        rewards[:, self._acpo_outcome] = outcome.to(rewards)
        return group_advantages(rewards, **settings)

    # --- the loss -----------------------------------------------------------------------------------------------------------------

    def _compute_loss(self, model, inputs):
        loss = super()._compute_loss(model, inputs)
        entropies, self._acpo_entropies = self._acpo_entropies, None
        weight = inputs.get("acpo_entropy_weight")
        if weight is None or not self.model.training:
            return loss
        # A mean over the written tokens of one optimizer step, however it is split, as TRL's loss_type="dapo" counts them.
        accumulation = self.current_gradient_accumulation_steps
        tokens = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes * accumulation / self.args.steps_per_generation
        bonus = (entropies * weight).sum() / tokens
        self._metrics["train"]["acpo/entropy_bonus"].append(self.accelerator.gather(bonus.detach()).mean().item() * accumulation)
        return loss - bonus

    # --- stage 2, state -------------------------------------------------------------------------------------------------------------

    def _acpo_enter_stage_2(self) -> None:
        """From this generation batch on: clip-high of the second stage."""
        self._acpo_in_stage_2 = True
        logger.info(f"acpo: stage 2 from step {self.state.global_step + 1}: {self._acpo.stages.reason}")
        if self.loss_type != "cispo":  # whose epsilon_high bounds a weight
            self.epsilon_high = min(self.epsilon_high, self._acpo.settings.stages.clip_high)

    def _save_checkpoint(self, model, trial):
        super()._save_checkpoint(model, trial)
        state.save(self, Path(self._get_output_dir(trial=trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"))

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            state.load(self, Path(checkpoint))


def _answer(value, column: str) -> str:
    """The reference answer as text. What is none would be read out to the policy as its answer: "The answer is None."."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)) or value != value or value == "":
        raise ValueError(f"the column {column!r} (acpo_answer_column) must hold a text or a number in every row, got {value!r}")
    return str(value)


def _no_column(option: str, column: str, names) -> str:
    return f"{option}={column!r} is no column of the dataset, which has {', '.join(map(repr, names))}"
