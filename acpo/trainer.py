"""The training loop. `Trainer.step` is the whole step, top to bottom:

    problems -> rollout -> verify -> score -> segment -> attribute -> credit -> policy loss -> optimizer -> controllers

Everything with a decision in it is a module of its own; here they are called in order.

Simplifications, with their reasons: rollouts are scored by the training forward again although the engine returns log-probs, so that the first
ratio is exactly 1; the reference is a second copy of the weights on the same device; of several processes (ranks.py) each does the warm-up whole,
and one alone the evaluations.
"""

from __future__ import annotations

import hashlib
import json
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from acpo_kernels.segmenter import Reading

from . import checkpoint, credit, first_step, state, trackers, verify
from .attribution import Attribution, answer_copies
from .attributors import Attributors
from .batch import Batch, on_host
from .clock import Clock, peak_memory
from .config import Config, to_dict
from .controls import control
from .curriculum import Curriculum
from .entropy import EntropyController, covariant_tokens
from .evaluation import Evaluation, evaluate
from .guard import STANDS, Guard, Interrupted, TrainingError
from .metrics import rollout_rows, step_metrics
from .policy import Policy, build, eos_ids
from .problems import Problem
from .prompts import Prompts
from .ranks import RankLost, Ranks
from .rollout import Engine, RolloutError
from .rollout import build as build_engine
from .rollout.kept import Kept
from .run import Run, Stopped
from .sampling import Group, assembled
from .segmentation import ForkThreshold, answer_starts, fixed_length, segmenter_of
from .sources import load_problems
from .stages import Stages
from .update import update
from .warmup import warm_up


class Trainer:
    def __init__(self, config: Config, run: Run, problems: list[Problem] | None = None):
        """problems: these instead of those that the configuration names, all of them held out (an evaluation)."""
        self.config, self.run = config, run
        self.ranks = Ranks(config)
        torch.manual_seed(config.seed)
        if config.trainer.threads:
            torch.set_num_threads(config.trainer.threads)
        self.rng = np.random.default_rng(config.seed)
        self.task, self.train_problems, self.held_out = load_problems(config) if problems is None else (None, problems, problems)
        self.verifier = verify.Verifier(config.verify, verify.kind_of(config))
        self.policy, self.tokenizer = build(config)
        self.prompts = Prompts(config.problems, self.tokenizer)
        self.rules: list[str] = []  # behind the end of each segment, where rollouts are kept
        self.kept: list[Kept] = []  # the rollouts of the step under way, where the engine is another program
        self.segmenter = segmenter_of(self.tokenizer, config.segmenter, self.policy.vocab_size)
        self.reader = ThreadPoolExecutor(1, thread_name_prefix="segmenter")
        self.attributors = Attributors(config, self.policy, self.tokenizer, self.segmenter.tokens)
        filler = self.prompts.encode(getattr(self.task, "filler", ""))
        self.filler = torch.tensor(filler, device=self.policy.device) if filler else None
        self.entropy = EntropyController(config.entropy)
        self.curriculum = Curriculum(self.train_problems, config.curriculum)
        self.stages = Stages(config.stages, config.trainer.steps)
        self.reference: Policy | None = None
        self.forks = ForkThreshold(config.segmenter.forking_share)
        self.counters = {"tokens/generated": 0, "tokens/forward_extra": 0, "seconds": 0.0}
        self.clock = Clock(self.policy.device)
        self.warmup_step = self.step_number = 0
        self.guard = Guard(run.directory / "diagnosis.json", writes=self.ranks.leads)
        self.stopping = ""  # by which signal, set from outside: the step under way is the last one, and Stopped comes behind its checkpoint
        if config.trainer.sharding == "full" and self.ranks.size > 1:
            self.ranks.shard(self.policy)
        self.optimizer = self.new_optimizer(config.warmup.learning_rate if config.warmup.steps else config.optimizer.learning_rate)

    @cached_property
    def engine(self) -> Engine:
        """Begun where it is first used: a run that is refused starts no server and leaves no trace."""
        return build_engine(self.config, self.policy, eos_ids(self.policy, self.tokenizer), self.run.directory, self.ranks)

    # --- the main line ------------------------------------------------------------------------------------------------------------

    def train(self, export: bool = False) -> dict[str, float]:
        """Warm-up, stage 1, stage 2, evaluation; continues from the newest checkpoint of the run. With export the policy is written at the end, while
        the run's directory is still this process's alone. Returns the last evaluation."""
        try:
            last = self._train()
            if export:
                state.export(self)
            return last
        except (RolloutError, RankLost) as error:
            self.run.finish()
            stands = checkpoint.newest(self.run.checkpoints)
            raise Interrupted(f"{error}; checkpoint {stands or 'none'} stands: the same command continues from it") from None
        finally:
            self.close()

    def _train(self) -> dict[str, float]:
        trackers.check(self.config)
        state.resume(self)
        self.run.track(self.step_number, self.warmup_step)
        self.engine.sync()  # before the warm-up: an engine that cannot start is known at once
        warm_up(self)
        steps = self.config.trainer.steps
        if self.step_number == 0 and self.ranks.of_leader(lambda: not self.run.has_step(0)):
            self.run.log({"phase": "start", "step": 0, **self._evaluate(0), **self.counters})
        if any(self.ranks.gather(self.stopping)):
            raise Stopped("the start")
        self.run.start_phase(f"stage {self.stages.stage}", steps, self.step_number)
        while self.step_number < steps:
            self.step_number += 1
            stage = self.stages.stage
            metrics = self.step()
            due = self.step_number % self.config.trainer.eval_every == 0 or self.step_number == steps
            evaluation = self._evaluate(self.step_number) if due else {}
            self.run.log({"phase": f"stage{stage}", "step": self.step_number, **metrics, **evaluation})
            if self.step_number == 1:
                self.run.say(first_step.line(metrics, self.config))
                for text in first_step.warnings(metrics, self.config, self.verifier.said):
                    self.run.warn(text)
            if self.stages.stage != stage:
                self.run.say(f"stage 2 from step {self.step_number + 1}: {self.stages.reason}")
                self.run.start_phase("stage 2", steps, self.step_number)
            stopping = any(self.ranks.gather(self.stopping))
            if stopping or self.step_number % self.config.trainer.checkpoint_every == 0 or self.step_number == steps:
                state.save(self, f"step-{self.step_number}")
            if stopping and self.step_number < steps:
                raise Stopped(f"step {self.step_number}")
        self.run.finish()
        return self.run.last_evaluation()

    @property
    def temperature(self) -> float:
        """Of the next rollouts; their batch keeps it, for all that its rollouts are scored, attributed and trained by."""
        settings = self.config.rollout
        return settings.temperature * self.entropy.exploration(settings.exploration, self.stages)

    def step(self) -> dict[str, float]:
        """One training step: the picture of the module docstring."""
        clock = self.clock = Clock(self.policy.device)
        cpu, before = time.process_time(), self.counters["tokens/generated"]
        with clock("sync"):
            self.engine.sync()
        with clock("rollout"), self.ranks.whole(self.policy):
            indices, batch, outcome = self._rollout()
        with clock("score"), self.ranks.whole(self.policy):
            # The text is read beside the forward; where to cut also depends on that forward's entropy.
            reading = self.reader.submit(self.segmenter.read, batch.token["ids"].cpu(), batch.segments.cu_seqlens.cpu())
            self._score(batch, outcome, indices)
        with clock("segment"):
            self._segment(batch, reading.result())
        with clock("attribute"), self.ranks.whole(self.policy):
            attribution = self._attribute(batch, outcome, indices)
        with clock("credit"), self.ranks.whole(self.policy):
            advantages, weights = self._credit(batch, outcome, attribution)
        with clock("update"):
            losses = self._update(batch)
        target = self.entropy.target(self.step_number / self.config.trainer.steps, self.stages.stage)
        metrics = {
            **step_metrics(batch, outcome, attribution, advantages, weights, self.config.rollout.group_size, self.filler),
            **self.source_metrics, "entropy/target": target, "entropy/weight": self.entropy.weight, "rollout/temperature": batch.temperature,
            "stage": self.stages.stage, "rollout/sampled": sum(len(group.samples) for group in self.tried),
        }  # fmt: skip
        if self.run.keeps_rollouts:
            problems = [self.train_problems[i] for i in indices for _ in range(self.config.rollout.group_size)]
            rows = rollout_rows(
                batch, outcome, attribution, list(self.attributors.by_name), advantages, weights, self.rules, problems,
                self.config.rollout.group_size, self.tokenizer,
            )  # fmt: skip
            self.run.save_rollouts(self.step_number, rows)
        self._control(metrics["entropy"])
        while self.kept:
            self.kept.pop().remove()
        taken = sum(clock.seconds.values())
        self.counters["seconds"] += taken
        timing = {f"time/{name}": value for name, value in clock.seconds.items()} | {"time/cpu": time.process_time() - cpu}
        timing["time/segment_share"] = clock.seconds["segment"] / taken
        timing["tokens/per_second"] = (self.counters["tokens/generated"] - before) / taken
        return {
            **metrics, **self.curriculum.metrics(), **self.ranks.added(self.verifier.metrics()), **losses, **self.counters, **timing,
            "step_time": taken, **peak_memory(self.policy.device),
        }  # fmt: skip

    # --- its parts ----------------------------------------------------------------------------------------------------------------

    def _rollout(self) -> tuple[np.ndarray, Batch, Tensor]:
        """Problems from the curriculum, `group_size` rollouts of each, and the verifier's outcomes [B], NaN for what it left out. With dynamic
        sampling, groups without both outcomes are sampled again; every token counts in the budget."""
        wanted, size = self.config.rollout.prompts, self.config.rollout.group_size
        rounds = self.config.curriculum.max_rounds if self.config.curriculum.dynamic_sampling else 1
        kept: list[Group] = []
        spare: list[Group] = []
        self.tried: list[Group] = []
        for round_ in range(rounds):
            indices = self.curriculum.sample(wanted - len(kept), self.rng).tolist()
            chosen = [(index, self.prompts.prompt(self.train_problems[index].prompt)) for index in indices]
            problems = [self.train_problems[i] for i in indices for _ in range(size)]
            samples = self._generate(self.ranks.share([prompt for _, prompt in chosen for _ in range(size)]), round_)
            # Of no rollout (a process's share of a few that are sampled again) transformers makes one empty text.
            texts = self.tokenizer.batch_decode(on_host([s.ids for s in samples]), skip_special_tokens=True) if samples else []
            pending = self.verifier.submit(self.ranks.share(problems), texts)
            with self.clock("verify"):
                verdicts = self.ranks.concat(pending.result())
            samples = self.ranks.concat(samples, self.policy.device)
            rewards = np.array(verify.rewards(problems, verdicts, self.rng))
            self.counters["tokens/generated"] += sum(len(s.ids) for s in samples)
            for g, (index, prompt) in enumerate(chosen):
                part = slice(g * size, (g + 1) * size)
                group = Group(index, prompt, samples[part], rewards[part], [v.status for v in verdicts[part]])
                self.tried.append(group)
                (kept if group.mixed or rounds == 1 else spare).append(group)
            if len(kept) == wanted:
                break
        self.verifier.whole([self.train_problems[g.problem] for g in self.tried], [status for g in self.tried for status in g.statuses])
        kept += spare[-(wanted - len(kept)) :] if len(kept) < wanted else []
        return assembled(kept, self.temperature, self.policy.device)

    def _generate(self, prompts: list[list[int]], round_: int):
        """Rollouts of this round of this step: their seeds follow from the run's, the step and their place, so that a resumed run repeats them."""
        settings = self.config.rollout
        seed = int(np.random.SeedSequence((self.config.seed, self.step_number, round_, *self.ranks.seed)).generate_state(1, np.uint64)[0] >> 1)
        if settings.engine != "local":
            # The settings as well: they say which policy it is that has no checkpoint yet.
            made_by = [state.lasting(to_dict(self.config)), seed, prompts, settings.max_new_tokens, self.temperature]
            key = hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()
            name = "-".join(map(str, ("pending", self.step_number, round_, *self.ranks.seed)))
            self.kept.append(Kept(self.run.directory / "rollouts" / f"{name}.jsonl", key, self.policy.device))
        samples = self.engine.generate(
            prompts, max_new_tokens=settings.max_new_tokens, temperature=self.temperature,
            generator=torch.Generator(self.policy.device).manual_seed(seed), done=self.kept[-1] if self.kept else None,
        )  # fmt: skip
        if samples and not torch.cat([s.logp for s in samples]).isfinite().all():
            raise TrainingError(f"the policy's log-probs are not finite at step {self.step_number}: {STANDS}")
        return samples

    @torch.no_grad()
    def _score(self, batch: Batch, outcome: Tensor, indices: np.ndarray) -> None:
        """old_logp and entropy of every token; on the rollouts that the attribution looks at the hindsight stream as well: one more forward, on
        those rows alone, whose pass over the head gives their old_logp and entropy too. On the CPU these are `score`'s to the bit, so that which
        rows are looked at changes neither; the CUDA kernels cut the head into other tiles and agree to the rounding of float32."""
        size = self.config.rollout.group_size
        rows = batch.sequence["hindsight"] = self.attributors.looks("hindsight", outcome)
        extra = 0
        looked_at, own = set(rows.nonzero().flatten().tolist()), self.ranks.share(range(len(batch)))
        for part in batch.micro_batches(own, self.config.trainer.micro_batch_tokens, self.policy.packed):
            hidden = self.policy.hidden([batch.prompts[b] for b in part], batch.responses(part))
            if self.attributors.head is not None:
                batch.put(part, hidden=hidden)
            plain = dict(zip(part, hidden.split([batch.lengths[b] for b in part]), strict=True))
            chosen, others = [b for b in part if b in looked_at], [b for b in part if b not in looked_at]
            if others:
                logp, entropy = self.policy.score(torch.cat([plain[b] for b in others]), torch.cat(batch.responses(others)), batch.temperature)
                batch.put(others, old_logp=logp, entropy=entropy)
            if chosen:
                hinted_prompts = {group: self.prompts.hinted(self.train_problems[indices[group]]) for group in {b // size for b in chosen}}
                prompts = [hinted_prompts[b // size] for b in chosen]
                with self.clock("hindsight"):  # the one extra forward
                    hinted = self.policy.hidden(prompts, batch.responses(chosen))
                with self.clock("information"):
                    ids = torch.cat(batch.responses(chosen))
                    both = self.policy.hindsight(torch.cat([plain[b] for b in chosen]), hinted, ids, batch.temperature)
                batch.put(chosen, old_logp=both.logp, entropy=both.entropy, log_ratio=both.log_ratio, kl=both.kl)
                extra += sum(map(len, prompts)) + sum(batch.lengths[b] for b in chosen)
        self.counters["tokens/forward_extra"] += sum(self.ranks.gather(extra))
        self.ranks.exchange(batch, own, "old_logp", "entropy", "log_ratio", "kl", "hidden")

    def _segment(self, batch: Batch, reading: Reading | None = None) -> None:
        """Reasoning steps from token ids, the behaviour policy's entropy and, for the synthetic tasks, the place of the answer line."""
        entropy = batch.token["entropy"]
        forks = {"entropy": entropy, "entropy_threshold": self.forks.update(entropy)} if self.config.segmenter.entropy else {}
        start = answer_starts(batch.responses(), self.segmenter.tokens) if self.config.problems.task else None
        settings = {"answer_start": start, "scores": reading, **forks}
        packed = batch.token["ids"], batch.segments.cu_seqlens
        segments = self.segmenter(*packed, **settings).to(self.policy.device)
        if self.run.keeps_rollouts and not self.config.segmenter.fixed:
            self.rules = self.segmenter.explain(*packed, **settings)
        batch.segments = fixed_length(segments, self.config.segmenter.fixed) if self.config.segmenter.fixed else segments

    def _attribute(self, batch: Batch, outcome: Tensor, indices: np.ndarray) -> Attribution | None:
        size, keep = self.config.rollout.group_size, None
        looked_at = batch.sequence["hindsight"].nonzero().flatten().tolist()
        if self.config.attribution.mask_answer_copies and looked_at:
            spellings = [self.prompts.spellings(self.train_problems[i].answer) for i in indices]
            kept = answer_copies(batch.responses(looked_at), [spellings[b // size] for b in looked_at])
            keep = torch.ones_like(batch.token["ids"], dtype=torch.bool)
            keep[batch.tokens_of(looked_at)] = kept
        if "kl" not in batch.token:  # no rollout for the hindsight stream to look at in this step
            batch.put([], log_ratio=batch.token["old_logp"][:0], kl=batch.token["old_logp"][:0])
        prior = torch.tensor(self.curriculum.prior(indices), device=outcome.device).repeat_interleave(size)
        probed = "probe" in self.attributors.by_name
        answers = [ids for i in indices for ids in [self.prompts.encode(self.train_problems[i].answer)] * size] if probed else []
        attribution, self.source_metrics = self.attributors(batch, outcome, prior, keep, answers)
        self.counters["tokens/forward_extra"] += self.attributors.extra_tokens
        batch.token.pop("hidden", None)
        if attribution is None or self.config.attribution.control == "none":
            return attribution
        generator = torch.Generator(self.policy.device).manual_seed((self.config.seed * 1_000_003 + self.step_number) % 2**63)
        return control(self.config.attribution.control, attribution, batch.segments, outcome, size, generator)

    def _credit(self, batch: Batch, outcome: Tensor, attribution: Attribution | None) -> tuple[Tensor, Tensor]:
        """Token advantages, bonus weights and the reference's log-probs, all into batch.token; returns the rollouts' advantages, as their groups
        count, and the segments' weights."""
        config, size, segments = self.config, self.config.rollout.group_size, batch.segments
        advantages = plain = credit.outcome_advantages(outcome, size, config.credit.advantage)
        if self.stages.stage == 2:
            confidence = credit.answer_confidence(batch.token["rollout_logp"], segments)
            batch.sequence["confidence"] = confidence
            rewards = credit.confident_rewards(outcome, confidence, size, config.stages.confidence, config.stages.confidence_form)
            advantages = credit.keep_side(credit.outcome_advantages(rewards, size, config.credit.advantage), plain)
        counts = credit.group_weights(outcome, attribution, size, config.credit)
        batch.token["advantages"], weights = credit.assign(
            advantages, outcome, attribution, segments, size, config.credit, ids=batch.token["ids"], log_ratio=batch.token.get("log_ratio"),
            entropy=batch.token["entropy"], filler=self.filler, counts=counts,
        )  # fmt: skip
        bonus = self.entropy.token_weights(segments, attribution)
        if bonus is not None:
            batch.token["entropy_weight"] = bonus
        if self.entropy.covariance:
            batch.token["covariant"] = covariant_tokens(batch.token["advantages"], batch.token["old_logp"], config.entropy.covariance_share)
        if config.loss.kl_weight > 0:
            with self.clock("reference"):
                self._reference_logp(batch)
        return advantages * counts.to(advantages.dtype), weights

    @torch.no_grad()
    def _reference_logp(self, batch: Batch) -> None:
        if self.reference is None:  # before the first update: the policy that the run began with, warm-up behind it
            self.reference = self.policy.frozen_copy()
        own = self.ranks.share(range(len(batch)))
        for part in batch.micro_batches(own, self.config.trainer.micro_batch_tokens, self.policy.packed):
            hidden = self.reference.hidden([batch.prompts[b] for b in part], batch.responses(part))
            batch.put(part, ref_logp=self.reference.score(hidden, torch.cat(batch.responses(part)), batch.temperature).logp)
        self.ranks.exchange(batch, own, "ref_logp")
        self.counters["tokens/forward_extra"] += batch.segments.num_tokens + sum(map(len, batch.prompts))

    def _update(self, batch: Batch) -> dict[str, float]:
        order = self.rng.permutation(len(batch))
        losses, again = update(
            batch, self.policy, self.optimizer, self.config, order=order, step=self.step_number, stage=self.stages.stage,
            clock=self.clock, guard=self.guard, ranks=self.ranks,
        )  # fmt: skip
        self.counters["tokens/forward_extra"] += again
        return losses

    def _control(self, entropy: float) -> None:
        """What this step taught the controllers, from every rollout that was sampled: those that dynamic sampling kept are no measure of success."""
        for group in self.tried:
            known = group.rewards[~np.isnan(group.rewards)]
            if len(known):
                self.curriculum.update(np.array([group.problem]), np.array([known.sum()]), len(known))
        self.entropy.update(entropy, self.step_number / self.config.trainer.steps, self.stages.stage)
        success = float(torch.tensor(np.concatenate([group.rewards for group in self.tried]), dtype=torch.float32).nanmean())
        if success == success:
            self.stages.update(self.step_number, success)

    # --- evaluation, the rest -----------------------------------------------------------------------------------------------------

    def _evaluate(self, step: int) -> dict[str, float]:
        """Accuracy, at both ends pass@k as well, and what the verifier counted that is not 0."""
        ends = (step == 0 and self.config.eval.start) or step == self.config.trainer.steps
        with self.ranks.whole(self.policy):
            found = self.ranks.of_leader(lambda: self.evaluate(self.held_out, step, samples=self.config.eval.samples if ends else 0))
        values = {k: v for k, v in found.values.items() if "majority" not in k}
        return {**values, **{f"eval/{k}": v for k, v in found.verify.items() if v and k != "verify/seconds"}}

    def evaluate(self, problems: list[Problem], step: int, **settings) -> Evaluation:
        """The evaluation of the policy as it is on the first `eval.max_problems` problems; settings are further keywords of `evaluate`."""
        config, problems = self.config, problems[: self.config.eval.max_problems or None]
        return evaluate(
            self.engine, self.tokenizer, problems, [self.prompts.prompt(p.prompt) for p in problems], self.verifier,
            max_new_tokens=config.rollout.max_new_tokens, temperature=config.eval.temperature,
            generator=torch.Generator(self.policy.device).manual_seed((config.seed * 1_000_003 + step) % 2**63), **settings,
        )  # fmt: skip

    def close(self) -> None:
        """Ends what runs beside the loop: the verifier's workers, what the rollout engine started, and the tracker."""
        self.verifier.close()
        self.run.close()
        self.run.unlock()
        if "engine" in self.__dict__:
            self.engine.close()

    def new_optimizer(self, rate: float) -> torch.optim.Optimizer:
        config = self.config.optimizer
        optimizer = torch.optim.AdamW(self.policy.trained().values(), lr=rate, betas=(config.beta1, config.beta2), weight_decay=config.weight_decay)
        optimizer.register_step_post_hook(lambda *_: self.policy.changed())
        return optimizer
