"""`ACPOConfig`: every option of GRPOConfig, and those of the method."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from trl import GRPOConfig

from ...config import Config, LossConfig, flatten, method_settings
from ...problems import HINT

# Fields of ACPOConfig that are settings of the method under names of their own.
NAMES = {
    "acpo_source": "attribution.source",
    "acpo_form": "credit.form",
    "acpo_reliability": "attribution.reliability",
    "acpo_entropy": "entropy.controller",
    "acpo_two_stages": "stages.two",
    "acpo_curriculum": "curriculum.sampler",
}
# Of generation_kwargs: what makes the sampled distribution another one than the one that is scored.
RESHAPING = (
    "temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "top_h", "repetition_penalty", "presence_penalty",
    "frequency_penalty", "no_repeat_ngram_size", "num_beams", "do_sample", "logits_processors", "logit_bias", "bad_words_ids",
    "sequence_bias", "guidance_scale", "suppress_tokens", "allowed_token_ids", "bad_words",
)  # fmt: skip
OWN_LOGP_LOSSES = ("cispo", "vespo")  # each token's own log-prob is in the loss, whatever the level of the ratio


@dataclass
class ACPOConfig(GRPOConfig):
    """Options of the method; those of GRPOConfig keep their meaning and, but for `beta`, their defaults.

    What cannot be combined is refused here by name, with the reason.
    """

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [*GRPOConfig._VALID_DICT_FIELDS, "acpo_settings"]

    beta: float = field(
        default=LossConfig.kl_weight,
        metadata={
            "help": "Weight of the KL to the reference, the policy that the run began with. GRPOConfig's default is 0.0, no reference; the method "
            "keeps near its start and was measured so. It costs the memory of a second model, beside a PEFT adapter none."
        },
    )
    use_acpo_kernels: bool = field(
        default=True,
        metadata={"help": "Log-probs and entropies of the loss from acpo_kernels instead of TRL's head."},
    )
    acpo_source: str = field(
        default="hindsight,tree",
        metadata={"help": "Attribution: 'hindsight' (one more forward), 'tree' (none), 'entropy', several separated by commas, or 'none'."},
    )
    acpo_form: str = field(default="additive", metadata={"help": "Credit: 'additive', 'weights', 'branch', 'ratio' or 'none'."})
    acpo_reliability: float | None = field(
        default=None, metadata={"help": "In [0, 1]: fixed instead of measured. 0 is exactly the update without attribution."}
    )
    acpo_outcome: str | None = field(
        default=None,
        metadata={"help": "The reward function, by its name in the logs, that is the outcome in [0, 1]. Needed with several."},
    )
    acpo_answer_column: str = field(default="answer", metadata={"help": "The dataset column with the reference answer, for the hindsight prompt."})
    acpo_hint: str = field(default=HINT, metadata={"help": "The hindsight prompt, with {prompt} (of messages: the last user message) and {answer}."})
    acpo_entropy: str = field(default="target", metadata={"help": "The entropy bonus's controller: 'target', 'constant', 'step' or 'none'."})
    acpo_two_stages: bool = field(
        default=True, metadata={"help": "Switch once, late or when success is high and flat, to a lower clip-high and confidence-weighted rewards."}
    )
    acpo_curriculum: bool = field(default=False, metadata={"help": "Choose prompts by difficulty instead of passing through the dataset in epochs."})
    acpo_difficulty_column: str | None = field(
        default=None,
        metadata={"help": "With acpo_curriculum: the column that names cells of one difficulty. By default each row is its own."},
    )
    acpo_settings: dict | str | None = field(
        default=None, metadata={"help": "Any other setting of segmenter, attribution, credit, entropy, curriculum and stages (acpo/config.py)."}
    )

    def __post_init__(self):
        super().__post_init__()
        method = self.method
        for name in ("{prompt}", "{answer}"):
            if name not in self.acpo_hint:
                raise ValueError(f"acpo_hint must hold {{prompt}} and {{answer}}, got {self.acpo_hint!r}")
        sources = method.attribution.sources
        if sources and method.credit.form != "none" and self.importance_sampling_level == "sequence" and self.loss_type not in OWN_LOGP_LOSSES:
            raise ValueError(
                f"importance_sampling_level='sequence' with loss_type={self.loss_type!r}: one ratio a sequence gives its tokens one gradient, in "
                "which the credit of its steps cancels; use 'token', or acpo_form='none'"
            )
        if "hindsight" in sources:
            self._check_sampling()
            if self.remove_unused_columns:
                raise ValueError("remove_unused_columns=True drops the answers that acpo_source='hindsight' needs; set it to False")
        if method.entropy.controller != "none" and (self.entropy_coef != 0 or self.use_adaptive_entropy):
            raise ValueError("entropy_coef and use_adaptive_entropy would be a second entropy bonus: leave them off, or set acpo_entropy='none'")
        if method.stages.two and method.stages.confidence > 0 and self.multi_objective_aggregation != "sum_then_normalize":
            raise ValueError(
                f"multi_objective_aggregation={self.multi_objective_aggregation!r}: the confidence of stage 2 belongs to the sum of the rewards; use "
                "'sum_then_normalize', acpo_settings={'stages.confidence': 0.0} or acpo_two_stages=False"
            )
        if self.acpo_curriculum and self.remove_unused_columns:
            raise ValueError("remove_unused_columns=True drops the row numbers that acpo_curriculum=True needs; set it to False")
        if self.acpo_difficulty_column is not None and not self.acpo_curriculum:
            raise ValueError("acpo_difficulty_column is of use with acpo_curriculum=True only")

    @property
    def method(self) -> Config:
        """The method's settings: fields, acpo_settings and defaults together. ConfigError (a ValueError) where one cannot be used."""
        return method_settings(self.method_layer(), "ACPOConfig")

    def method_layer(self) -> dict[str, Any]:
        more = flatten(dict(self.acpo_settings or {}))
        for name, key in NAMES.items():
            if key in more:
                raise ValueError(f"acpo_settings: {key!r} has a field of its own, {name}")
        return {
            **more,
            "attribution.source": self.acpo_source,
            "credit.form": self.acpo_form,
            "attribution.reliability": -1.0 if self.acpo_reliability is None else self.acpo_reliability,
            "entropy.controller": self.acpo_entropy,
            "stages.two": self.acpo_two_stages,
            "curriculum.sampler": "thompson" if self.acpo_curriculum else "uniform",
        }

    def _check_sampling(self) -> None:
        """The hindsight stream is centred under the distribution that rollouts were drawn from: it must be the one that is scored."""
        plain = {"top_p": 1.0, "top_k": (0, None, -1), "min_p": (None, 0.0), "repetition_penalty": 1.0, "vllm_structured_outputs_regex": None}
        for name, values in plain.items():
            if getattr(self, name) not in (values if isinstance(values, tuple) else (values,)):
                raise ValueError(
                    f"{name}={getattr(self, name)!r} samples from another distribution than acpo_source='hindsight' scores, whose credit would be "
                    "biased; leave it at its default, or use acpo_source='tree'"
                )
        for name in flatten(dict(self.generation_kwargs or {})):
            if name in RESHAPING:
                raise ValueError(
                    f"generation_kwargs[{name!r}] samples from another distribution than acpo_source='hindsight' scores; leave it out, or use "
                    "acpo_source='tree'"
                )
