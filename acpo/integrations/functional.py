"""Step-level credit for any training loop: padded (B,T) tensors in, (B,T) advantages out.

`StepCredit` is one generation batch of the method (segment, attribute, credit, and the weights of the entropy bonus) with its state between
batches, made of the same modules as our own loop. It runs on the host, where the segmenter does and where every rank of a distributed run comes to
the same numbers; results are on the device of `ids`.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from acpo_kernels import Segments

from .. import credit
from ..attribution import Attribution, Evidence, answer_copies, entropy_evidence, hindsight_evidence, tree_evidence, zero_variance
from ..config import method_settings
from ..curriculum import refuse_curriculum
from ..entropy import EntropyController
from ..panel import Panel
from ..problems import HINT, filled
from ..segmentation import ForkThreshold, segmenter_of
from ..stages import Stages
from ..tree import prefixes_of, sharing
from . import arguments
from .arguments import ROUNDING, Packed

# What the loop itself has to do for it stays off until it is asked for.
LOOPS_OWN = {"entropy.controller": "none", "stages.two": False, "curriculum.sampler": "uniform"}
SUCCESS_DECAY = 0.9
TAUGHT = ("panel", "forks", "entropy", "stages", "success", "batches")  # what a batch changes


@dataclass
class Credited:
    """What a batch was given, in the caller's order of rows.

    advantages [B,T], 0 where the policy did not write; entropy_weight [B,T] of the bonus sum_t w_t H_t / (all written tokens), None without one;
    step [B,T] numbers each rollout's reasoning steps from 0, -1 at padding; stage under which it was credited; metrics by name.
    """

    advantages: Tensor
    entropy_weight: Tensor | None
    step: Tensor
    stage: int
    metrics: dict[str, float]


class StepCredit:
    """Credit for the rollouts of one loop.

    settings are those of the method in our configuration files (segmenter, attribution, credit, entropy, stages), nested or dotted. The entropy
    bonus and the second stage need the loop's help and are off by default; total_steps is how long training goes on, which stages.two and the
    controllers `target` and `step` need. tokenizer is a Hugging Face fast tokenizer, vocab_size the model's. Errors: TypeError for settings that
    are no mapping, ConfigError (a ValueError) for a setting, ValueError for the rest.
    """

    def __init__(
        self,
        tokenizer,
        *,
        group_size: int,
        vocab_size: int | None = None,
        settings: Mapping[str, Any] | None = None,
        total_steps: int | None = None,
        where: str = "settings",
    ):
        if not isinstance(group_size, int) or group_size < 2:
            raise ValueError(f"group_size must be an integer of at least 2, the rollouts of one prompt, got {group_size!r}")
        self.settings = config = method_settings(arguments.layered(LOOPS_OWN, settings, where), where)
        refuse_curriculum(config.curriculum, where)
        names = config.attribution.sources
        for name in ("probe", "head"):
            if name in names:
                raise ValueError(f"{where}: attribution.source {name!r} needs the policy itself and is our own loop's; leave it out, got {names}")
        if config.entropy.covariance == "always":
            raise ValueError(f"{where}: entropy.covariance = 'always' is our own loop's; wanted 'fallback' or 'never', which both leave it off here")
        if config.segmenter.fixed or config.attribution.control != "none" or config.credit.mask == "filler":
            raise ValueError(f"{where}: segmenter.fixed, attribution.control and credit.mask = 'filler' are experiments of our own loop")
        paced = ["stages.two = True"] * config.stages.two
        paced += [f"entropy.controller = {config.entropy.controller!r}"] * (config.entropy.controller in ("target", "step"))
        if total_steps is None and paced:
            raise ValueError(f"{where}: total_steps, how long training goes on, must be given with {' and '.join(paced)}")
        self.tokenizer, self.group_size = tokenizer, group_size
        self.segmenter = segmenter_of(tokenizer, config.segmenter, vocab_size)
        self.panel = Panel(config.attribution, config.credit, group_size)
        self.forks = ForkThreshold(config.segmenter.forking_share)
        self.entropy = EntropyController(config.entropy)
        self.stages = Stages(config.stages, 0 if total_steps is None else arguments.whole("total_steps", total_steps))
        self.success: float | None = None  # running mean outcome: what is known of a problem that nobody kept a record of
        self.batches = 0
        self.fresh = self.state()

    # --- what the loop has to bring -----------------------------------------------------------------------------------------------

    @property
    def stage(self) -> int:
        """1, or 2 from the batch after the switch on: then the loop clips at the lower stages.clip_high."""
        return self.stages.stage

    @property
    def exploration(self) -> float:
        """What to multiply the sampling temperature of the next batch by, where the loop can change it: then rollouts, log-probs, ratios and KL of
        that batch are all at that temperature. 1 in stage 2, before the first batch, and without stages.two and an entropy controller, which
        measure what it follows."""
        return self.entropy.exploration(self.settings.rollout.exploration, self.stages)

    @property
    def total_steps(self) -> int:
        """How many steps training takes, 0 where nobody said."""
        return self.stages.total_steps

    @total_steps.setter
    def total_steps(self, steps: int) -> None:
        self.stages.total_steps = arguments.whole("total_steps", steps)

    @property
    def needs_entropy(self) -> bool:
        config = self.settings
        return config.entropy.controller != "none" or config.credit.token == "entropy" or "entropy" in self.panel.by_name

    @property
    def needs_hindsight(self) -> bool:
        return "hindsight" in self.panel.by_name

    @property
    def needs_logp(self) -> bool:
        """Whether the next batch needs the log-probs of the policy that sampled it: for the confidence of stage 2."""
        return self.stage == 2 and self.settings.stages.confidence > 0

    def looks(self, outcome: Tensor, *, groups: Sequence[Hashable] | None = None) -> Tensor:
        """Which rollouts [B] the next batch's hindsight stream is wanted for: log_ratio and kl of the others are not read."""
        order = self._order(groups, arguments.count(outcome))
        judged = arguments.outcomes(arguments.rows("outcome", outcome, order), order)
        out = torch.empty(len(order), dtype=torch.bool)
        out[order] = self.panel.looks("hindsight", judged)
        return out.to(outcome.device)

    # --- the batch ----------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def __call__(
        self,
        ids: Tensor,
        mask: Tensor,
        outcome: Tensor,
        *,
        advantages: Tensor | None = None,
        normalise: Callable[[Tensor], Tensor] | None = None,
        groups: Sequence[Hashable] | None = None,
        written: Tensor | None = None,
        entropy: Tensor | None = None,
        log_ratio: Tensor | None = None,
        kl: Tensor | None = None,
        logp: Tensor | None = None,
        answers: Sequence[str] | None = None,
        prior: Tensor | None = None,
        answer_start: Tensor | None = None,
        finished: Tensor | None = None,
        step: int | None = None,
    ) -> Credited:
        """Advantages of a batch, and what it teaches the calibrators and controllers.

        Shapes
            ids, mask, written, entropy, log_ratio, kl, logp [B,T], left- or right-padded; outcome, advantages, prior, answer_start, finished [B];
            answers and groups of length B.
        Units
            mask: the tokens of the responses, written: those of them that the policy wrote (tool output is not; default: all). outcome: the
            verifier's R in [0, 1], NaN where there is none. advantages: of the rollouts, default those of credit.advantage. groups: a name for each
            rollout's prompt (default: group_size neighbours); every group has group_size rollouts. entropy: of the next-token distribution (the fork
            rule of the segmenter uses it where it is given). log_ratio, kl: of the hindsight stream (`acpo_kernels.hindsight_information`), and
            answers the reference answers, whose literal copies carry no credit. prior: probability of success known before. step: the training step
            that this batch is for, from 1 (default: counts the calls). answer_start: the response token at which the final answer begins, -1 for
            none, where the loop knows it better than the segmenter. finished: False where a rollout was cut off: its outcome advantage is for all
            of it (default: none was). In stage 2 logp are the log-probs of the policy that sampled, and normalise
            makes advantages [B] of rewards [B] where the loop gives its own.
        Errors
            ValueError or TypeError that names the argument. A call that fails has taught nothing.
        """
        step = None if step is None else arguments.whole("step", step)
        order = self._order(groups, arguments.count(outcome))
        judged = arguments.outcomes(arguments.rows("outcome", outcome, order), order)
        batch = Packed(ids, mask, written, order, self.segmenter.vocab_size)
        values = {"entropy": entropy, "log_ratio": log_ratio, "kl": kl, "logp": logp}
        tokens = {name: batch.pack(name, value) for name, value in values.items() if value is not None}
        self._check(tokens, batch.written, advantages, normalise, answers, len(order))
        stage, config, size = self.stage, self.settings, self.group_size
        known = torch.full_like(judged, 0.5 if self.success is None else self.success)
        known = known if prior is None else arguments.probabilities("prior", prior, order)
        ended = None if finished is None else arguments.truth("finished", arguments.rows("finished", finished, order), order)
        starts = None if answer_start is None else arguments.answer_starts(answer_start, order, batch.lengths)
        if advantages is None:
            own = credit.outcome_advantages(judged, size, config.credit.advantage)
        else:
            own = arguments.finite("advantages", advantages, order)
        metrics: dict[str, float] = {}
        with self._whole_or_not_at_all():
            segments = self._segments(batch, tokens.get("entropy"), starts)
            evidence = self._evidence(batch, tokens, segments, judged, answers, order, metrics)
            attribution, reliabilities = self.panel.attribute(evidence, judged, known, segments, ended)
            if stage == 2 and config.stages.confidence > 0:
                own = self._confident(own, judged, tokens["logp"], segments, batch.written, normalise, order, metrics)
            counts = credit.group_weights(judged, attribution, size, config.credit)
            assigned, weights = credit.assign(
                own, judged, attribution, segments, size, config.credit, ids=batch.ids, log_ratio=tokens.get("log_ratio"),
                entropy=tokens.get("entropy"), mask=batch.written, counts=counts,
            )  # fmt: skip
            own = own * counts.to(own.dtype)
            bonus = self.entropy.token_weights(segments, attribution, batch.written)
            metrics |= {f"acpo/{name.removeprefix('attribution/')}": value for name, value in reliabilities.items()}
            metrics |= self._figures(batch, segments, attribution, judged, assigned - own[segments.sequence_ids()], weights)
            self._learn(judged[~judged.isnan()], tokens.get("entropy"), batch.written, step, metrics)
        first = segments.sequence_offsets[:-1][segments.sequence_ids()]
        weight = None if bonus is None else batch.unpack(bonus)
        return Credited(batch.unpack(assigned), weight, batch.unpack(segments.segment_ids() - first, fill=-1), stage, metrics)

    def _order(self, groups: Sequence[Hashable] | None, count: int) -> Tensor:
        """Rows so that the rollouts of one prompt stand side by side, [B]."""
        size = self.group_size
        if groups is None:
            if count % size:
                raise ValueError(f"outcome must hold whole groups of {size} neighbours, or groups must be given, got {count} rollouts")
            return torch.arange(count)
        names = groups.tolist() if hasattr(groups, "tolist") else groups
        if not isinstance(names, Iterable):
            raise TypeError(f"groups must be a sequence with the name of each rollout's prompt, got {type(groups).__name__}")
        names = list(names)
        if not all(isinstance(name, Hashable) for name in names):
            raise TypeError("groups must hold a hashable name a rollout: a string, a number, a tuple")
        if len(names) != count:
            raise ValueError(f"groups must name the prompt of each of the {count} rollouts, got {len(names)} names")
        rows: dict[Hashable, list[int]] = {}
        for row, name in enumerate(names):
            rows.setdefault(name, []).append(row)
        for name, own in rows.items():
            if len(own) != size:
                raise ValueError(f"groups must hold group_size = {size} rollouts of every prompt, got {len(own)} of {name!r}")
        return torch.tensor([row for own in rows.values() for row in own], dtype=torch.int64)

    def _check(self, tokens: dict[str, Tensor], written: Tensor, advantages, normalise, answers, count: int) -> None:
        source = self.settings.attribution.source
        # It would stay in the fork threshold, and make a rollout one that has no outcome. A log-prob may be -inf: of a confidence of 0.
        for name, wanted, got, wrong in (
            ("entropy", "finite", "NaN or inf", lambda x: ~x.isfinite()),
            ("logp", "at most 0", "NaN or more", lambda x: ~(x <= ROUNDING)),
        ):
            missing = int(wrong(tokens[name][written]).sum()) if name in tokens else 0
            if missing:
                raise ValueError(f"{name} must be {wanted} at every token that the policy wrote, got {got} at {missing}")
        if self.needs_hindsight and not {"log_ratio", "kl"} <= tokens.keys():
            raise ValueError(f"log_ratio and kl must be given with attribution.source = {source!r} ('tree' alone needs neither), got None")
        if self.needs_hindsight and self.settings.attribution.mask_answer_copies and answers is None:
            raise ValueError("answers must be given with the hindsight source while attribution.mask_answer_copies is True, got None")
        if answers is not None and len(answers) != count:
            raise ValueError(f"answers must hold one text a rollout, {count}, got {len(answers)}")
        for answer in answers or ():
            if not isinstance(answer, str):
                raise TypeError(f"answers must hold one text a rollout, got {answer!r}")
        if self.needs_entropy and "entropy" not in tokens:
            raise ValueError("entropy must be given with an entropy.controller, credit.token = 'entropy' or the entropy source, got None")
        if self.needs_logp and "logp" not in tokens:
            raise ValueError("logp must be given in stage 2 with stages.confidence > 0, got None")
        if self.needs_logp and advantages is not None and normalise is None:
            raise ValueError("normalise must be given beside advantages in stage 2 with stages.confidence > 0, got None")

    @contextlib.contextmanager
    def _whole_or_not_at_all(self) -> Iterator[None]:
        """What fails half way, and be it in the loop's own `normalise`, leaves what it found."""
        before = copy.deepcopy({name: getattr(self, name) for name in TAUGHT})
        try:
            yield
        except BaseException:
            vars(self).update(before)
            raise

    def _segments(self, batch: Packed, entropy: Tensor | None, answer_start: Tensor | None) -> Segments:
        forks: dict[str, Any] = {}
        if self.settings.segmenter.entropy and entropy is not None:
            seen = torch.where(batch.written, entropy, 0.0)  # what a tool wrote was not uncertain
            threshold = self.forks.update(entropy[batch.written])
            forks = {} if threshold is None else {"entropy": seen, "entropy_threshold": threshold}
        return self.segmenter(batch.ids, batch.cu_seqlens, answer_start=answer_start, **forks)

    def _evidence(
        self, batch: Packed, tokens, segments: Segments, outcome: Tensor, answers, order: Tensor, metrics
    ) -> Callable[[str, Tensor], Evidence]:
        settings, size = self.settings.attribution, self.group_size

        def of(name: str, base: Tensor) -> Evidence:
            acts = self.panel.acts(name, outcome)
            if name == "entropy":
                return entropy_evidence(tokens["entropy"], outcome, size, segments, acts, batch.written)
            if name == "hindsight":
                rows, keep = self.panel.looks(name, outcome), batch.written
                if settings.mask_answer_copies:
                    spelled = {text: self._spellings(text) for text in set(answers)}
                    keep = keep & answer_copies(batch.responses(), [spelled[answers[b]] for b in order.tolist()])
                log_ratio, kl = tokens["log_ratio"], tokens["kl"]
                looked_at = rows[segments.sequence_ids()]
                metrics["acpo/not_finite"] = float((looked_at & ~torch.isfinite(log_ratio + kl)).sum())
                metrics["acpo/hindsight_rows"] = float(rows.float().mean())
                log_ratio, kl = (torch.where(looked_at, value, 0.0) for value in (log_ratio, kl))
                return replace(hindsight_evidence(log_ratio, kl, segments, keep, rows, settings.clamp), acts=acts & rows)
            prefixes = prefixes_of(batch.ids, segments, settings.keys, self.segmenter.tokens)
            metrics["acpo/shared"] = sharing(prefixes, segments, size)
            return tree_evidence(prefixes, outcome, size, segments, settings.kappa, settings.keys == "numbers", acts, settings.drawn_to == "before")

        return of

    def _spellings(self, answer: str) -> list[list[int]]:
        return [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (answer, " " + answer)]

    def _confident(
        self, plain: Tensor, outcome: Tensor, logp: Tensor, segments: Segments, written: Tensor, normalise, order: Tensor, metrics
    ) -> Tensor:
        """Advantages of the confidence-weighted rewards of stage 2, on the side of the plain ones."""
        settings, size = self.settings.stages, self.group_size
        confidence = credit.answer_confidence(logp.clamp(max=0.0), segments, written)
        metrics["acpo/confidence"] = float(confidence.mean())
        rewards = credit.confident_rewards(outcome, confidence, size, settings.confidence, settings.confidence_form)
        if normalise is None:
            weighted = credit.outcome_advantages(rewards, size, self.settings.credit.advantage)
        else:
            back = torch.empty_like(rewards)
            back[order] = rewards
            weighted = arguments.finite("the result of normalise", normalise(back), order)
        return credit.keep_side(weighted, plain)

    def _learn(self, outcome: Tensor, entropy: Tensor | None, written: Tensor, step: int | None, metrics: dict[str, float]) -> None:
        self.batches += 1
        step = self.batches if step is None else step
        progress = step / self.total_steps if self.total_steps else 0.0
        mean = float(entropy[written].mean()) if entropy is not None and bool(written.any()) else math.nan
        metrics |= {"acpo/stage": float(self.stage)}
        if self.settings.entropy.controller != "none":
            metrics |= {"acpo/entropy_weight": self.entropy.weight, "acpo/entropy_target": self.entropy.target(progress, self.stage)}
            self.entropy.update(mean, progress, self.stage)
        if len(outcome):
            success = float(outcome.mean())
            self.success = success if self.success is None else SUCCESS_DECAY * self.success + (1 - SUCCESS_DECAY) * success
            self.stages.update(step, success)

    def _figures(
        self, batch: Packed, segments: Segments, attribution: Attribution | None, outcome: Tensor, shaping: Tensor, weights: Tensor
    ) -> dict[str, float]:
        count = max(1, segments.num_sequences)
        out = {
            "acpo/segments": segments.num_segments / count,
            "acpo/segment_length": float(segments.lengths.float().mean()) if segments.num_segments else 0.0,
            "acpo/answers": float(segments.is_terminal().sum()) / count,
            "acpo/zero_variance": float(zero_variance(outcome, self.group_size).float().mean()) if len(outcome) else 0.0,
            "acpo/weight_std": float(weights.std(correction=0)) if len(weights) else 0.0,
            "acpo/shaping": float(shaping[batch.written].abs().mean()) if bool(batch.written.any()) else 0.0,
        }
        if attribution is not None and len(outcome):
            out["acpo/credited"] = float((attribution.reliability > 0).float().mean())
        return out

    # --- state --------------------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Everything that a batch teaches, as plain numbers and lists (JSON)."""
        return {
            "panel": self.panel.state(), "forks": self.forks.value, "entropy": self.entropy.state(), "stages": self.stages.state(),
            "success": self.success, "batches": self.batches,
        }  # fmt: skip

    def load(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state` gave; ValueError for anything else."""
        if not isinstance(state, Mapping) or state.keys() != self.fresh.keys():
            held = sorted(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
            raise ValueError(f"state must be what StepCredit.state() gave, with {', '.join(self.fresh)}, got {held}")
        panel = state["panel"]
        if isinstance(panel, Mapping) and panel.keys() != self.panel.by_name.keys():
            wanted, got = ", ".join(self.panel.by_name) or "none", ", ".join(map(str, panel)) or "none"
            raise ValueError(f"state must be of attribution.source = {wanted!r}, got one of {got!r}")
        arguments.same_kinds("state", state, self.fresh)
        with self._whole_or_not_at_all():
            self.panel.load(panel)
            self.forks.value, self.success, self.batches = state["forks"], state["success"], state["batches"]
            self.entropy.load(state["entropy"])
            self.stages.load(state["stages"])


def hinted_prompt(prompt: str | list[dict], answer: str, hint: str = HINT) -> str | list[dict]:
    """The prompt of the hindsight stream: {prompt} and {answer} of the template filled in, for messages in the last one of the user."""
    if isinstance(prompt, str):
        return filled(hint, prompt=prompt, answer=answer)
    at = max((i for i, message in enumerate(prompt) if message["role"] == "user"), default=None)
    if at is None or not isinstance(prompt[at]["content"], str):
        raise ValueError("prompt must hold a user message whose content is text, to put the answer in, got " + repr(prompt)[:200])
    return [*prompt[:at], {**prompt[at], "content": hinted_prompt(prompt[at]["content"], answer, hint)}, *prompt[at + 1 :]]
