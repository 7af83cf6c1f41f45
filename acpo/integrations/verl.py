"""Step-level credit inside verl 0.9: a trainer (`trainer.v1.trainer_mode=acpo_sync`) and a loss with per-token entropy weights.

The entry point `verl.plugins` registers it (verl_plugin.py), in the driver and in every worker. verl computes its advantages as always;
the trainer then reads them back with the responses and gives each reasoning step its own, and hands the workers a loss that takes the entropy bonus
per token. Settings of the method stand under `+algorithm.acpo`. See docs/integrations/verl.md.
"""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import put_text
from .arguments import layered
from .functional import Credited, StepCredit

logger = logging.getLogger(__name__)

TESTED = ("0.9",)
SETTINGS = {"attribution.source": "tree"}
WEIGHT = "acpo_entropy_weight"  # the field that carries the bonus's weights to the workers
STATE = "acpo_state.json"


def check_version(version: str) -> None:
    if not any(version == tested or version.startswith(f"{tested}.") for tested in TESTED):
        raise ImportError(f"acpo.integrations.verl was tested with verl {', '.join(TESTED)}, and this is {version}")


# --- on tensors alone -------------------------------------------------------------------------------------------------------------------


def make_credit(tokenizer, settings: dict[str, Any] | None, group_size: int, total_steps: int, vocab_size: int | None = None) -> StepCredit:
    credit = StepCredit(
        tokenizer, group_size=group_size, vocab_size=vocab_size, settings=layered(SETTINGS, settings, "algorithm.acpo"), total_steps=total_steps,
        where="algorithm.acpo",
    )  # fmt: skip
    if credit.needs_hindsight:
        raise ValueError(
            "algorithm.acpo: attribution.source 'hindsight' needs a forward of its own in the workers, which verl does not offer; use 'tree'"
        )
    if credit.settings.stages.two:
        raise ValueError("algorithm.acpo: stages.two changes the clip range in the middle of a run, which verl's workers do not offer")
    return credit


def check_loss(credit: StepCredit, mode: str | None) -> None:
    """ValueError for a loss of the policy in which the credit of steps cancels."""
    if mode == "geo_mean" and credit.settings.attribution.sources and credit.settings.credit.form != "none":
        raise ValueError(
            "actor_rollout_ref.actor.policy_loss.loss_mode=geo_mean averages the advantages of a sequence, and the credit of its steps cancels; use "
            "another loss, or algorithm.acpo.credit.form=none"
        )


def put_state(credit: StepCredit, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    put_text(folder / STATE, json.dumps(credit.state()))


def load_state(credit: StepCredit, folder: Path) -> None:
    path = folder / STATE
    if not path.exists():
        logger.warning(f"acpo: {folder} has no {STATE}: the calibrators and controllers start anew")
        return
    credit.load(json.loads(path.read_text(encoding="utf-8")))


def assign(credit: StepCredit, responses: Tensor, lengths: Tensor, response_mask: Tensor, advantages: Tensor, outcome: Tensor, uid: list,
           entropy: Tensor | None, step: int, left_out: Tensor | None = None,
           finished: Tensor | None = None, sessions: list[str] | None = None) -> tuple[Tensor, Tensor | None, dict[str, float]]:  # fmt: skip
    """Token advantages and bonus weights [B,T] for verl's batch: responses, response_mask (the policy's own tokens), verl's advantages and entropy
    [B,T], lengths and outcome [B], uid [B] names the prompts. sessions [B] the rollouts that rows are outputs of (None: each
    its own). Rows that are left out (padding) and prompts without group_size rollouts of one output each keep verl's advantages, and so do rollouts
    that are not finished [B] (None: all are)."""
    written = response_mask.bool()
    first = written.int().argmax(1)
    own = advantages.gather(1, first.unsqueeze(1)).squeeze(1) * written.any(1)
    if not torch.equal(torch.where(written, advantages, 0.0), torch.where(written, own.unsqueeze(1), 0.0)):
        raise ValueError("algorithm.adv_estimator must give one advantage a rollout (grpo, rloo, ...): this one differs between its tokens")
    use = torch.ones(len(uid), dtype=torch.bool) if left_out is None else ~left_out
    count = Counter(name for name, inside in zip(uid, use.tolist(), strict=True) if inside)
    several: set[str] = set()  # prompts of which a session has several outputs: their number says nothing of the rollouts
    if sessions is not None:
        outputs = Counter(name for name, inside in zip(sessions, use.tolist(), strict=True) if inside)
        several = {name for name, session in zip(uid, sessions, strict=True) if outputs[session] > 1}
    use &= torch.tensor([count[name] == credit.group_size and name not in several for name in uid], dtype=torch.bool)
    rows = use.nonzero().flatten()
    mask = torch.arange(responses.shape[1]) < lengths.unsqueeze(1)
    found: Credited = credit(
        responses[rows], mask[rows], outcome[rows].float(), advantages=own[rows].float(), groups=[uid[b] for b in rows.tolist()],
        written=written[rows], entropy=None if entropy is None else entropy[rows], step=step,
        finished=None if finished is None else finished[rows],
    )  # fmt: skip
    out = advantages.clone()
    out[rows] = found.advantages.to(out)
    weight = None
    if found.entropy_weight is not None:
        weight = torch.zeros(advantages.shape, dtype=torch.float32)
        weight[rows] = found.entropy_weight
    return out, weight, {**found.metrics, "acpo/left_out": 1.0 - float(use.float().mean())}


def sessions_of(keys: list[str]) -> list[str]:
    """Which rollout each row is an output of: verl's keys are uid_session_index."""
    return [key.rsplit("_", 1)[0] for key in keys]


def not_cut_off(responses: Tensor, lengths: Tensor, limit: int, eos: int) -> Tensor:
    """Which rollouts [B] ended by themselves: with eos, or short of the limit."""
    last = responses.gather(1, (lengths - 1).clamp(min=0).unsqueeze(1)).squeeze(1)
    return (lengths < limit) | (last == eos)


def ppo_loss(config, model_output, data, dp_group=None):
    """verl's loss minus the bonus sum_t w_t H_t, aggregated as token-mean over the global batch whatever actor.loss_agg_mode says."""
    from verl.trainer.ppo.core_algos import agg_loss
    from verl.utils.metric import AggregationType, Metric
    from verl.workers.utils.losses import ppo_loss as verls
    from verl.workers.utils.padding import no_padding_2_padding

    loss, metrics = verls(config, model_output, data, dp_group)
    if WEIGHT not in data:
        return loss, metrics
    if model_output.get("entropy") is None:
        raise ValueError("actor.calculate_entropy must be True with algorithm.acpo.entropy.controller: the workers computed no entropy")
    entropy = no_padding_2_padding(model_output["entropy"], data)
    padded = data.select("response_mask", WEIGHT).to_padded_tensor()
    bonus = agg_loss(
        loss_mat=entropy * padded[WEIGHT], loss_mask=padded["response_mask"].bool(), loss_agg_mode="token-mean", **config.global_batch_info
    )
    metrics["actor/acpo_entropy_bonus"] = Metric(value=bonus, aggregation=AggregationType.SUM)
    return loss - bonus, metrics


# --- the trainer ------------------------------------------------------------------------------------------------------------------------


def register() -> type:
    """Makes the trainer known to verl as `acpo_sync`."""
    import transfer_queue as tq
    import verl
    from omegaconf import OmegaConf, open_dict
    from tensordict import TensorDict
    from verl.trainer.distillation import is_distillation_enabled
    from verl.trainer.ppo.v1 import PPOTrainerSync, register_trainer
    from verl.utils.config import omega_conf_to_dataclass
    from verl.workers.utils.padding import response_to_nested

    check_version(verl.__version__)

    @register_trainer("acpo_sync")
    class ACPOTrainer(PPOTrainerSync):
        """PPOTrainerSync whose advantages are those of reasoning steps."""

        def __init__(self, config):
            with open_dict(config):  # verl asks for its synchronous mode by name, and under any other takes the asynchronous paths
                config.trainer.v1.trainer_mode = "sync"
            super().__init__(config)

        @property
        def acpo(self) -> StepCredit:
            if getattr(self, "_acpo", None) is None:
                settings = OmegaConf.select(self.config, "algorithm.acpo")
                settings = {} if settings is None else OmegaConf.to_container(settings, resolve=True)
                model = omega_conf_to_dataclass(self.config.actor_rollout_ref.model)
                self._acpo = make_credit(
                    self.tokenizer, settings, self.config.actor_rollout_ref.rollout.n, self.total_training_steps,
                    model.hf_config.get_text_config().vocab_size,
                )  # fmt: skip
            return self._acpo

        @property
        def acpo_has_entropy(self) -> bool:
            """verl computes entropies where it computes the old log-probs, which it leaves out in the bypass mode."""
            return not OmegaConf.select(self.config, "algorithm.rollout_correction.bypass_mode")

        def on_init_end(self):
            super().on_init_end()
            check_loss(self.acpo, OmegaConf.select(self.config, "actor_rollout_ref.actor.policy_loss.loss_mode"))
            if self.acpo.needs_entropy and not self.acpo_has_entropy:
                raise ValueError(
                    "algorithm.rollout_correction.bypass_mode must be False with algorithm.acpo.entropy.controller, credit.token = 'entropy' or "
                    "attribution.source = 'entropy': verl computes no entropy in it"
                )
            if self.acpo.settings.entropy.controller != "none":
                actor = self.config.actor_rollout_ref.actor
                if not actor.calculate_entropy:
                    raise ValueError("actor_rollout_ref.actor.calculate_entropy must be True with algorithm.acpo.entropy.controller")
                if is_distillation_enabled(self.config.get("distillation")):
                    raise ValueError("distillation.enabled must be False with algorithm.acpo.entropy.controller: both bring a loss of their own")
                self.actor_rollout_wg.set_loss_fn(partial(ppo_loss, config=omega_conf_to_dataclass(actor)))

        def _compute_advantage(self, batch, metrics):
            batch = super()._compute_advantage(batch, metrics)
            credit = self.acpo
            fields = ["uid", "responses", "response_mask", "rm_scores", "advantages"]
            if self.acpo_has_entropy and (credit.needs_entropy or credit.settings.segmenter.entropy):
                fields.append("entropy")
            data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=fields)
            nested, lengths = data["response_mask"], data["responses"].offsets().diff().cpu()
            uid = [str(name) for name in data.pop("uid").tolist()]
            padded = data.to_padded_tensor()
            responses, limit = padded["responses"].cpu(), self.config.actor_rollout_ref.rollout.response_length
            padding = torch.tensor([bool(tag.get("is_padding", False)) for tag in batch.tags])
            advantages, weight, figures = assign(
                credit, responses, lengths, padded["response_mask"].cpu(), padded["advantages"].cpu(),
                padded["rm_scores"].sum(-1).cpu(), uid, padded["entropy"].cpu() if "entropy" in fields else None, self.global_steps, padding,
                not_cut_off(responses, lengths, limit, self.tokenizer.eos_token_id), sessions_of(batch.keys),
            )  # fmt: skip
            metrics.update(figures)
            output = {"advantages": response_to_nested(advantages, nested)}
            if weight is not None:
                output[WEIGHT] = response_to_nested(weight, nested)
            return tq.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=TensorDict(output, batch_size=len(batch)))

        def _save_checkpoint(self):
            put_state(self.acpo, Path(self._acpo_folder()))  # first: a checkpoint that verl declares complete has it
            super()._save_checkpoint()

        def _load_checkpoint(self):
            super()._load_checkpoint()
            if self.global_steps > 0:
                load_state(self.acpo, Path(self._acpo_folder()))

        def _acpo_folder(self) -> str:
            if self.config.trainer.resume_mode == "resume_path" and self.config.trainer.resume_from_path.endswith(f"global_step_{self.global_steps}"):
                return self.config.trainer.resume_from_path
            return os.path.join(self.config.trainer.default_local_dir, f"global_step_{self.global_steps}")

    return ACPOTrainer
