"""The training step and the run around it: what must not change, does not, and what must, does."""

from __future__ import annotations

import copy
import itertools
import re
import threading

import numpy as np
import pytest
import torch
from loop import MANY, TREE, parameters, records, rolled_out, steps, trainer_of, without_times

from acpo.batch import Batch
from acpo.credit import answer_confidence
from acpo.metrics import step_metrics
from acpo.policy import Policy


@pytest.fixture(autouse=True)
def one_thread(deterministic):
    torch.set_num_threads(1)


# --- the step in its parts ----------------------------------------------------------------------------------------------------------


def test_a_step_as_the_parts_say(tmp_path, warmed):
    trainer = trainer_of(tmp_path, "attribution.reliability=1", "credit.scope=all", weights=warmed)
    batch, outcome, attribution, advantages, _ = rolled_out(trainer)
    size = trainer.config.rollout.group_size
    assert len(batch) == 16 and 0 < outcome.mean() < 1, "a policy that is right at times, or this says nothing"
    texts = trainer.tokenizer.batch_decode(batch.responses(), skip_special_tokens=True)
    for b, (prompt, text) in enumerate(zip(batch.prompts, texts, strict=True)):
        assert prompt == batch.prompts[b // size * size]
        problem = next(p for p in trainer.train_problems if trainer.prompts.prompt(p.prompt) == prompt)
        assert outcome[b] == (re.findall("^A(.*)$", text, re.M)[-1:] == [problem.answer])
    torch.testing.assert_close(batch.token["old_logp"], batch.token["rollout_logp"], rtol=0, atol=1e-5)
    # Lines are steps, the answer is the terminal segment and nothing else is.
    ends = batch.segments.token_offsets.tolist()
    ids = trainer.tokenizer.batch_decode([batch.token["ids"][a:b] for a, b in itertools.pairwise(ends)], skip_special_tokens=True)
    terminal = batch.segments.is_terminal().tolist()
    assert sum(terminal) > 8
    assert all(re.match("A.*(\n(?!A).*)*$", text) for text, last in zip(ids, terminal, strict=True) if last)
    for text, marked in zip(texts, batch.segments.terminal.tolist(), strict=True):
        assert marked == bool(re.search("^A", text, re.M))
    assert torch.isfinite(batch.token["advantages"]).all() and batch.token["advantages"].shape == batch.token["ids"].shape
    assert attribution.rows.all() and not torch.equal(batch.token["advantages"], advantages[batch.segments.sequence_ids()])


@pytest.mark.parametrize(
    ("ids", "start"),
    [
        (lambda e: [*e("a31\n"), 0, 0, *e("b02\nA2"), 1], 10),
        (lambda e: [0, *e("A2\n"), 1], 1),
        (lambda e: [*e("a31\nA1\nb02\nA2"), 1], 11),
        (lambda e: [*e("a31\nbA2\n"), 1], None),
    ],
    ids=["behind tokens without text", "first line", "last of two", "none"],
)
def test_the_place_of_the_answer_line(tmp_path, ids, start):
    """Counted in tokens: a policy may sample the padding token, which a decoder leaves out."""
    trainer = trainer_of(tmp_path)
    batch = trainer_batch(torch.tensor(ids(trainer.prompts.encode)))
    trainer._segment(batch)
    assert batch.segments.terminal.tolist() == [start is not None]
    assert start is None or batch.segments.token_offsets[-2].item() == start


def trainer_batch(ids: torch.Tensor) -> Batch:
    return Batch.from_responses([[3]], [ids], entropy=[torch.zeros(len(ids))])


def test_hindsight_acts_on_groups_without_variance_and_is_measured_on_the_others(tmp_path, warmed):
    """All rollouts until there is a first measure, then one right and one wrong of each other group; behind a shut gate these alone, in one batch of
    four; the price is counted."""
    common = "attribution.source=hindsight", "credit.mask=none", "loss.kl_weight=0"
    trainer = trainer_of(tmp_path, *common, "rollout.prompts=16", weights=warmed)
    source = trainer.attributors.by_name["hindsight"]
    for gate, batches, boundaries, m1 in (("first", 0, 0, 0.0), ("open", 1, 1000, 0.5), ("shut", 4, 1000, 1.0), ("shut", 5, 1000, 1.0)):
        source.batches, source.reliability.boundaries, source.reliability.m0, source.reliability.m1 = batches, boundaries, 1.0, m1
        before = trainer.counters["tokens/forward_extra"]
        batch, outcome, attribution, _, _ = rolled_out(trainer)
        assert source.batches == batches + 1
        same = torch.tensor([len(set(g)) == 1 for g in outcome.view(-1, 4).tolist()]).repeat_interleave(4)
        assert same.any() and not same.all()
        assert torch.equal(attribution.rows, same & (gate != "shut")) and attribution.reliability[same].any() == (gate == "open")
        assert not attribution.reliability[~same].any()
        looks = batch.sequence["hindsight"]
        assert torch.equal(looks[same], torch.full_like(looks[same], gate != "shut"))
        measured = {"first": int((~same).sum()), "open": int((~same).sum()) // 2, "shut": int((~same).sum()) // 2 * (batches % 4 == 0)}[gate]
        assert int(looks[~same].sum()) == measured
        touched = (batch.token["kl"] != 0) & ~looks[batch.segments.sequence_ids()]
        assert not touched.any()
        extra = sum(batch.lengths[b] + len(trainer.prompts.hinted(problem_of(trainer, batch, b))) for b in looks.nonzero().flatten().tolist())
        assert trainer.counters["tokens/forward_extra"] - before == extra
    fixed = trainer_of(tmp_path / "fixed", *common, "attribution.reliability=1", weights=warmed)
    batch, _, attribution, _, _ = rolled_out(fixed)
    assert torch.equal(batch.sequence["hindsight"], attribution.rows), "nothing to measure: nothing more to look at"
    ungated = trainer_of(tmp_path / "ratio", *common, "credit.form=ratio", weights=warmed)
    source = ungated.attributors.by_name["hindsight"]
    source.batches, source.reliability.boundaries = 5, 1000
    assert rolled_out(ungated)[0].sequence["hindsight"].all(), "RLSD's form takes every token's ratio, whatever the gate"


def test_budget_and_iota_are_of_the_same_rollouts(tmp_path, warmed):
    """A source measures more rollouts than its credit is for: those count neither in the budget nor in what the steps were credited with."""
    trainer = trainer_of(tmp_path, "attribution.source=hindsight", *MANY, weights=warmed)
    batch, outcome, attribution, advantages, weights = rolled_out(trainer)
    assert 0 < attribution.rows.sum() < batch.sequence["hindsight"].sum()
    metrics = step_metrics(batch, outcome, attribution, advantages, weights, 8, None)
    parts = attribution.iota.split(batch.segments.sequence_offsets.diff().tolist())
    own = [float(part.sum()) for part, mine in zip(parts, attribution.rows.tolist(), strict=True) if mine]
    assert metrics["attribution/iota_sum"] == pytest.approx(np.mean(own)) != pytest.approx(float(attribution.iota.sum()) / len(own))


def test_which_rollouts_hindsight_looks_at_changes_no_score(tmp_path, warmed):
    """Their old_logp and entropy come from the pass over the head that reads both streams: to the bit those of the plain one."""
    trainer = trainer_of(tmp_path, "attribution.source=hindsight", *MANY, weights=warmed)
    trainer.step_number += 1
    indices, batch, outcome = trainer._rollout()
    found = {}
    for name, looks in (("none", torch.zeros(64)), ("some", torch.arange(64) % 3 == 0), ("all", torch.ones(64))):
        trainer.attributors.looks = lambda *_, looks=looks: looks.bool()
        trainer._score(batch, outcome, indices)
        found[name] = batch.token["old_logp"].clone(), batch.token["entropy"].clone()
        assert (batch.token.get("kl", torch.zeros(1)) != 0).any() == looks.any()
        batch.token = {name: value for name, value in batch.token.items() if name in ("ids", "rollout_logp")}
    for name in ("some", "all"):
        assert all(torch.equal(x, y) for x, y in zip(found["none"], found[name], strict=True)), name


def problem_of(trainer, batch, b):
    return next(p for p in trainer.train_problems if trainer.prompts.prompt(p.prompt) == batch.prompts[b])


# --- (a) micro-batches --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("denominator", ["tokens", "sequences", "constant"])
@pytest.mark.parametrize("ratio", ["token", "segment", "sequence"])
def test_micro_batches_change_no_gradient(tmp_path, warmed, ratio, denominator):
    trainer = trainer_of(
        tmp_path, f"loss.ratio={ratio}", f"loss.denominator={denominator}", "loss.minibatches=1", "optimizer.max_grad_norm=1e9",
        "attribution.reliability=1", "credit.scope=all", "stages.switch_share=0", "trainer.steps=4", "optimizer.learning_rate=1e-9", weights=warmed,
    )  # fmt: skip
    steps(trainer, 1)  # stage 2 from here on: reference, KL and confidence take part
    batch, *_ = rolled_out(trainer)
    assert {"ref_logp", "entropy_weight"} <= set(batch.token)
    torch.manual_seed(5)
    # Off-policy, in the tokens and in whole rollouts: some are clipped.
    drift = 0.15 * torch.randn(len(batch.token["ids"])) + 0.5 * torch.randn(16)[batch.segments.sequence_ids()]
    batch.token["old_logp"] = batch.token["old_logp"] + drift
    found = []
    for budget in (1, 60, 100_000):
        trainer.config.trainer.micro_batch_tokens = budget
        assert len(list(batch.micro_batches(list(range(16)), budget))) == {1: 16, 100_000: 1}.get(budget, pytest.approx(5, abs=3))
        before = parameters(trainer)
        metrics = trainer._update(batch)
        found.append(({n: p.grad.clone() for n, p in trainer.policy.named_parameters()}, metrics))
        trainer.policy.load_state_dict(before, strict=False)
    (whole, metrics) = found[-1]
    assert max(g.abs().max() for g in whole.values()) > 1e-2 and metrics["clip_ratio/low_mean"] + metrics["clip_ratio/high_mean"] > 0
    for gradients, other in found[:-1]:
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, whole[name], rtol=0, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")
        for key in ("loss", "clip_ratio/low_mean", "kl/ref", "kl/old", "ratio/ess", "grad_norm"):
            assert other[key] == pytest.approx(metrics[key], rel=1e-4, abs=1e-6), key


# --- (b) reliability 0 --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("advantage", ["grpo", "rloo"])
@pytest.mark.parametrize(
    "credit",
    [
        ("attribution.source=hindsight", "credit.form=additive", "credit.scope=zero_variance"),
        ("attribution.source=hindsight", "credit.form=weights", "credit.scope=all"),
        (*TREE, "credit.form=additive"),
        (*TREE, "credit.form=weights"),
    ],
    ids=["hindsight-additive", "hindsight-weights", "tree-additive", "tree-weights"],
)
def test_reliability_zero_is_the_plain_update_bitwise(tmp_path, warmed, credit, advantage):
    """All else equal: the same entropy bonus, curriculum and stages, the switch among the steps."""
    common = f"credit.advantage={advantage}", "trainer.steps=4", "stages.switch_share=0.5", *MANY
    trainers = {
        "plain": trainer_of(tmp_path / "a", *common, "attribution.source=none", "credit.form=none", weights=warmed),
        "zero": trainer_of(tmp_path / "b", *common, *credit, "attribution.reliability=0", weights=warmed),
        "full": trainer_of(tmp_path / "c", *common, *credit, "attribution.reliability=1", weights=warmed),
    }
    found = {name: (steps(trainer, 3), parameters(trainer)) for name, trainer in trainers.items()}
    assert trainers["plain"].stages.stage == 2
    plain = found["plain"][1]
    assert any(not torch.equal(warmed[n], p) for n, p in plain.items()), "the update moved the policy"
    for name, parameter in plain.items():
        assert torch.equal(parameter, found["zero"][1][name]), name
    assert any(not torch.equal(parameter, found["full"][1][name]) for name, parameter in plain.items()), "with reliability it is another update"
    for one, other in zip(found["plain"][0], found["zero"][0], strict=True):
        assert one["reward"] == other["reward"] and one["loss"] == other["loss"] and one["entropy/weight"] == other["entropy/weight"]


def test_a_rollout_that_was_cut_off_keeps_its_outcome_advantage(tmp_path, warmed, monkeypatch):
    """Attribution sees its steps, which count for the others; its own tokens get the outcome advantage, those of unchanged steps too."""
    trainer = trainer_of(tmp_path, "attribution.source=tree", "credit.scope=all", "attribution.reliability=1", *MANY, weights=warmed)
    rollout = trainer._rollout

    def every_other_cut():
        indices, batch, outcome = rollout()
        batch.sequence["finished"] = torch.arange(len(batch)) % 2 == 0
        return indices, batch, outcome

    monkeypatch.setattr(trainer, "_rollout", every_other_cut)
    batch, _, attribution, advantages, _ = rolled_out(trainer)
    ended = batch.sequence["finished"]
    assert attribution.rows.all() and torch.equal(attribution.reliability > 0, ended)
    sequence = batch.segments.sequence_ids()
    given, plain, of_ended = batch.token["advantages"], advantages[sequence], ended[sequence]
    assert torch.equal(given[~of_ended], plain[~of_ended]) and not torch.equal(given[of_ended], plain[of_ended])


# --- (c) conservation ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["tree", "hindsight"])
def test_weights_conserve_each_rollouts_credit(tmp_path, warmed, source):
    trainer = trainer_of(
        tmp_path, f"attribution.source={source}", "credit.scope=all", "credit.form=weights", "attribution.reliability=1", *MANY, weights=warmed
    )
    batch, _, _, advantages, weights = rolled_out(trainer)
    assert weights.max() > 1.05 > 0.95 > weights.min()
    totals = torch.stack([part.double().sum() for part in batch.token["advantages"].split(batch.lengths)])
    torch.testing.assert_close(totals, advantages.double() * torch.tensor(batch.lengths), rtol=1e-5, atol=1e-6)
    token_weights = weights[batch.segments.segment_ids()]
    for length, part in zip(batch.lengths, token_weights.split(batch.lengths), strict=True):
        assert part.sum().item() == pytest.approx(length, rel=1e-5)


# --- (d) stages ---------------------------------------------------------------------------------------------------------------------


def test_the_reference_is_the_policy_of_the_start_and_the_switch_narrows_the_clip(tmp_path, warmed, monkeypatch):
    trainer = trainer_of(tmp_path, "trainer.steps=5", "stages.switch_share=0.6", "rollout.exploration=1", weights=warmed)
    clips = []
    forward = Policy.forward
    monkeypatch.setattr(Policy, "forward", lambda self, *a, **k: (clips.append((k["clip"], k["kl_weight"])), forward(self, *a, **k))[1])
    start = parameters(trainer)
    first = steps(trainer, 2)
    reference = dict(trainer.reference.named_parameters())
    assert all(torch.equal(start[n], reference[n]) and not reference[n].requires_grad for n in start)
    assert all("confidence" not in m and m["stage"] == 1 for m in first)
    assert 0 < first[0]["kl/ref"] < first[1]["kl/ref"], "the policy leaves its reference with its first optimiser step"
    assert set(clips) == {((0.2, 0.28), 0.2)}
    third = steps(trainer, 1)[0]
    assert trainer.stages.stage == 2 and trainer.stages.switched_at == 3 and third["stage"] == 1
    clips.clear()
    later = steps(trainer, 2)
    assert set(clips) == {((0.2, 0.2), 0.2)}
    assert all(m["stage"] == 2 and 0 < m["confidence"] < 1 for m in later)
    assert later[0]["entropy/target"] < 0.6 * third["entropy/target"]
    assert trainer.stages.switched_at == 3, "once"
    assert all(torch.equal(start[n], p) for n, p in trainer.reference.named_parameters()), "the reference stays where it was"
    trainer.config.loss.clip_high = 0.1
    clips.clear()
    steps(trainer, 1)
    assert set(clips) == {((0.2, 0.1), 0.2)}, "no stage widens the clip"


@pytest.mark.parametrize("source", ["hindsight,tree", "probe"])
def test_one_temperature_samples_scores_attributes_and_trains(tmp_path, warmed, monkeypatch, source):
    """In stage 1 up to 1.3 times the configured one, as success and entropy allow; the first ratio is 1 and the KL to the start begins at 0."""
    extra = ("attribution.source=probe", "credit.scope=all") if source == "probe" else ()
    trainer = trainer_of(tmp_path, "rollout.temperature=0.9", "loss.minibatches=1", *MANY, *extra, weights=warmed)
    assert trainer.temperature == 0.9, "nothing is known of success before the first step"
    trainer.stages.success, trainer.entropy.running, trainer.entropy.batches = 0.3, 0.05, 1
    assert trainer.temperature == pytest.approx(0.9 * 1.15)
    trainer.stages.success = 0.8
    asked: dict[str, list[float]] = {"sampled": [], "scored": [], "probed": [], "trained": []}

    def watched(name: str, of: object, method: str, at: int | None):
        original = getattr(of, method)

        def call(*args, **named):
            asked[name].append(named["temperature"] if at is None else args[at])
            return original(*args, **named)

        monkeypatch.setattr(of, method, call)

    watched("sampled", trainer.engine, "generate", None)
    watched("scored", Policy, "score", 3)
    watched("scored", Policy, "hindsight", 4)
    watched("probed", Policy, "branch_logp", 3)
    watched("trained", Policy, "forward", None)
    metrics = steps(trainer, 1)[0]
    assert metrics["rollout/temperature"] == pytest.approx(0.9 * 1.3) and metrics["ratio/first_off"] < 1e-5 and abs(metrics["kl/ref"]) < 1e-8
    assert bool(asked["probed"]) == (source == "probe") and all(values for name, values in asked.items() if name != "probed")
    assert {value for values in asked.values() for value in values} == {metrics["rollout/temperature"]}
    trainer.stages.stage = 2
    assert trainer.temperature == 0.9


def test_without_exploration_the_temperature_stays(tmp_path, warmed):
    trainer = trainer_of(tmp_path, "method=grpo", "stages.two=true", weights=warmed)
    trainer.stages.success, trainer.entropy.running, trainer.entropy.batches = 0.8, 0.05, 1
    assert trainer.temperature == trainer.config.rollout.temperature == 1.0


def test_confidence_is_that_of_the_answer(tmp_path, warmed):
    trainer = trainer_of(tmp_path, weights=warmed)
    batch, *_ = rolled_out(trainer)
    confidence = answer_confidence(batch.token["rollout_logp"], batch.segments)
    ends, terminal = batch.segments.token_offsets.tolist(), batch.segments.terminal.tolist()
    assert any(terminal)
    for b, last in enumerate(batch.segments.sequence_offsets.tolist()[1:]):
        wanted = batch.token["rollout_logp"][ends[last - 1] : ends[last]].mean().exp().item() if terminal[b] else 0.0
        assert confidence[b].item() == pytest.approx(wanted, rel=1e-5)


def test_one_switch_in_a_whole_run(finished_run):
    phases = [r["phase"] for r in records(finished_run)]
    assert phases == ["warmup"] * 3 + ["start"] + ["stage1"] * 5 + ["stage2"] * 3
    found = records(finished_run)
    assert [r["step"] for r in found if "eval/accuracy" in r] == [0, 4, 8]
    assert [r["tokens/generated"] for r in found[3:]] == sorted(r["tokens/generated"] for r in found[3:]) and found[-1]["tokens/generated"] > 0
    assert {"eval/pass@1", "eval/pass@2"} <= set(found[3]) and "eval/pass@2" not in found[7] and "eval/pass@2" in found[-1]


# --- what a step may not depend on --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [20260101123456, 2**63 - 1])
def test_a_large_seed_is_a_seed(tmp_path, warmed, seed):
    """Through every generator that is drawn from it: problems, rollouts, head, control, evaluation."""
    trainer = trainer_of(tmp_path, f"seed={seed}", "attribution.source=tree,head", "credit.scope=all", "attribution.control=random", weights=warmed)
    steps(trainer, 1)
    assert 0 <= trainer.evaluate(trainer.held_out, 1, samples=0).values["eval/accuracy"] <= 1


def test_same_seed_same_steps_other_seed_others(tmp_path, warmed):
    one, two, other = (steps(trainer_of(tmp_path / str(i), f"seed={seed}", weights=warmed), 2) for i, seed in enumerate((0, 0, 1)))
    assert [without_times(m) for m in one] == [without_times(m) for m in two]
    assert [without_times(m) for m in one] != [without_times(m) for m in other]


def test_evaluation_leaves_training_alone(tmp_path, warmed):
    one, other = trainer_of(tmp_path / "a", weights=warmed), trainer_of(tmp_path / "b", weights=warmed)
    first = [*steps(one, 1), *steps(one, 1)]
    second = steps(other, 1)
    evaluation = other._evaluate(0)
    assert evaluation == other._evaluate(0) and 0 < evaluation["eval/pass@1"] <= evaluation["eval/pass@2"] < 1
    second += steps(other, 1)
    assert [without_times(m) for m in first] == [without_times(m) for m in second]


def test_the_curriculum_learns_from_every_group(tmp_path, warmed):
    trainer = trainer_of(tmp_path, weights=warmed)
    trainer.step_number += 1
    indices, _, outcome = trainer._rollout()
    expected = copy.deepcopy(trainer.curriculum)
    for i, wins in zip(indices, outcome.view(-1, 4).sum(1).tolist(), strict=True):
        expected.update(np.array([i]), np.array([wins]), 4)
    trainer._control(1.0)
    assert np.array_equal(trainer.curriculum.a, expected.a) and np.array_equal(trainer.curriculum.b, expected.b)


def test_success_is_that_of_all_rollouts(tmp_path, warmed):
    """Dynamic sampling keeps groups with both outcomes: their mean outcome is no measure of success, and what was thrown away counts."""
    trainer = trainer_of(tmp_path, "curriculum.dynamic_sampling=true", "curriculum.max_rounds=4", "rollout.group_size=2", weights=warmed)
    trainer.step_number += 1
    _, _, outcome = trainer._rollout()
    tried = np.concatenate([group.rewards for group in trainer.tried])
    assert len(tried) > len(outcome) and float(outcome.mean()) != pytest.approx(tried.mean())
    trainer._control(1.0)
    assert trainer.stages.success == pytest.approx(tried.mean())


def test_the_text_is_read_beside_the_scoring_forward(tmp_path, warmed, monkeypatch):
    """Another thread reads, the same steps come out, bitwise; its failure is the step's own error."""
    beside, inline = trainer_of(tmp_path / "beside", weights=warmed), trainer_of(tmp_path / "inline", weights=warmed)
    names = []
    read = beside.segmenter.read
    monkeypatch.setattr(beside.segmenter, "read", lambda *a: names.append(threading.current_thread().name) or read(*a))
    cut = inline._segment
    monkeypatch.setattr(inline, "_segment", lambda batch, _: cut(batch))
    a, b = steps(beside, 2), steps(inline, 2)
    assert [without_times(x) for x in a] == [without_times(x) for x in b]
    assert all(torch.equal(x, y) for x, y in zip(parameters(beside).values(), parameters(inline).values(), strict=True))
    assert len(names) == 2 and all(name.startswith("segmenter") for name in names)
    assert all(0 < record["time/segment_share"] < 1 for record in a)

    def broken(*_):
        raise ValueError("ids must lie in [0, vocab_size)")

    monkeypatch.setattr(beside.segmenter, "read", broken)
    with pytest.raises(ValueError, match="ids must lie in"):
        steps(beside, 1)
