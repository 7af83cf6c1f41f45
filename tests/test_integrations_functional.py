"""Credit for any loop: the numbers of our own loop, whatever the padding and the order of rows; what it refuses; state that goes on."""

from __future__ import annotations

import json
import math
import re
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loop import trainer_of

from acpo.config import METHOD, flatten, to_dict
from acpo.credit import outcome_advantages
from acpo.integrations.functional import StepCredit, hinted_prompt
from acpo.policy import byte_tokenizer
from acpo.segmentation import answer_starts

TOKENIZER = byte_tokenizer()
TEXTS = (
    "First 2+3=5.\nThen 5*2=10.\nThe answer is 10", "First 2+3=5.\nThen 5*2=11.\nThe answer is 11", "First 2+3=6.\nThen 6*2=12.", "12",
    "Add 1 and 1.\nThat is 2.\nSo 2.\nThe answer is 2", "Add 1 and 1.\nThat is 2.\nThe answer is 2", "No idea at all.\nThe answer is 3", "2",
)  # fmt: skip
OUTCOME = torch.tensor([1.0, 0, 0, 0, 1, 1, 1, 1])
ANSWERS = ["10"] * 4 + ["2"] * 4
SMALL = {"segmenter": {"min_tokens": 2, "max_tokens": 64, "target_tokens": 8}}
FIXED = {**SMALL, "attribution.reliability": 0.8}


def batch(seed: int = 0, side: str = "right", extra: int = 0) -> dict[str, torch.Tensor]:
    """The texts as padded tensors, with entropies and a hindsight stream drawn at random."""
    rows = [torch.tensor(TOKENIZER(text)["input_ids"]) for text in TEXTS]
    width = max(map(len, rows)) + extra
    generator = torch.Generator().manual_seed(seed)
    ids, mask = torch.zeros(len(rows), width, dtype=torch.int64), torch.zeros(len(rows), width, dtype=torch.bool)
    drawn = [torch.randn(4, len(row), generator=generator) for row in rows]
    values = torch.full((4, len(rows), width), math.nan)  # nothing at padding may be read
    for b, row in enumerate(rows):
        at = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[b, at], mask[b, at], values[:, b, at] = row, True, drawn[b]
    log_ratio, kl, entropy, logp = values
    return {"ids": ids, "mask": mask, "entropy": entropy.abs(), "log_ratio": 0.1 * log_ratio, "kl": 0.01 * kl.abs(), "logp": -logp.abs()}


def credit_of(settings: dict | None = None, **options) -> StepCredit:
    return StepCredit(TOKENIZER, group_size=4, settings=FIXED if settings is None else settings, **options)


def assigned(credit: StepCredit, tensors: dict | None = None, outcome: torch.Tensor = OUTCOME, **more):
    tensors = batch() if tensors is None else tensors
    return credit(**{**tensors, "outcome": outcome, "answers": ANSWERS, **more})


# --- the same numbers as our own loop ---------------------------------------------------------------------------------------------------


def test_the_weight_of_a_group_is_no_shaping():
    """Without a credit form and a mask only the weights of groups are left: they move advantages, and no step adds anything of its own."""
    outcome = torch.tensor([1.0, 0, 0, 0, 1, 1, 1, 0])
    own = {**FIXED, "attribution.source": "tree", "credit.form": "none", "credit.mask": "none"}
    plain, weighed = (assigned(credit_of({**own, "credit.difficulty": d}, total_steps=9), outcome=outcome) for d in (0.0, 0.25))
    assert plain.metrics["acpo/shaping"] == weighed.metrics["acpo/shaping"] == 0.0
    rare, often = (
        weighed.advantages[:4].abs().sum() / plain.advantages[:4].abs().sum(),
        weighed.advantages[4:].abs().sum() / plain.advantages[4:].abs().sum(),
    )
    assert rare > 1 > often


@pytest.mark.parametrize("form", ["additive", "weights"])
def test_it_is_the_credit_of_our_own_loop(tmp_path, warmed, form):
    overrides = ["credit.scope=all", "segmenter.entropy=true", "attribution.mask_answer_copies=false", "entropy.weight=1e-2", f"credit.form={form}"]
    trainer = trainer_of(tmp_path, *overrides, "attribution.source=tree,hindsight,entropy", "stages.switch_share=0.4", weights=warmed)
    config = trainer.config
    settings = {key: value for key, value in flatten(to_dict(config)).items() if key.partition(".")[0] in METHOD and key != "curriculum.sampler"}
    mine = StepCredit(trainer.tokenizer, group_size=4, vocab_size=trainer.policy.vocab_size, settings=settings, total_steps=config.trainer.steps)
    stages = []
    for step in range(1, 7):
        trainer.step_number = step
        stage = trainer.stages.stage
        indices, own, outcome = trainer._rollout()
        trainer._score(own, outcome, indices)
        looked_at = own.sequence["hindsight"]
        assert torch.equal(mine.looks(outcome), looked_at)
        trainer._segment(own)
        prior = torch.tensor(trainer.curriculum.prior(indices)).repeat_interleave(4)
        attribution = trainer._attribute(own, outcome, indices)
        trainer._credit(own, outcome, attribution)
        width = max(own.lengths)
        mask = torch.arange(width) < torch.tensor(own.lengths).unsqueeze(1)

        def padded(values, mask=mask):
            return torch.zeros(mask.shape, dtype=values.dtype).masked_scatter(mask, values)

        found = mine(
            padded(own.token["ids"]), mask, outcome, entropy=padded(own.token["entropy"]), log_ratio=padded(own.token["log_ratio"]),
            kl=padded(own.token["kl"]), logp=padded(own.token["rollout_logp"]), prior=prior, step=step,
            answer_start=answer_starts(own.responses(), trainer.segmenter.tokens), finished=own.sequence["finished"],
        )  # fmt: skip
        assert torch.equal(found.advantages[mask], own.token["advantages"]) and (found.advantages[~mask] == 0).all()
        assert torch.equal(found.entropy_weight[mask], own.token["entropy_weight"]) and found.stage == stage
        assert found.metrics["acpo/segments"] == own.segments.num_segments / len(own)
        trainer._control(float(own.token["entropy"].mean()))
        stages.append(stage)
    assert stages == [1, 1, 1, 1, 2, 2], "both stages were compared"
    assert mine.panel.state() == trainer.attributors.state() and mine.entropy.state() == trainer.entropy.state()
    assert any(a.reliability.boundaries for a in mine.panel.by_name.values())


# --- layout -----------------------------------------------------------------------------------------------------------------------------


@given(st.permutations(range(8)), st.sampled_from(["left", "right"]), st.integers(0, 5))
def test_neither_padding_nor_the_order_of_rows_matters(order, side, extra):
    plain = assigned(credit_of())
    rows = torch.tensor(order)
    tensors = {name: value[rows] for name, value in batch(side=side, extra=extra).items()}
    credit = credit_of()
    looked_at = credit.looks(OUTCOME[rows], groups=[b // 4 for b in order])
    assert torch.equal(looked_at, credit_of().looks(OUTCOME)[rows])
    found = credit(**tensors, outcome=OUTCOME[rows], answers=[ANSWERS[b] for b in order], groups=[f"p{b // 4}" for b in order])
    mask = batch()["mask"]
    for b, row in enumerate(order):
        got, wanted = (x.advantages[i][m[i]] for x, m, i in ((found, tensors["mask"], b), (plain, mask, row)))
        # groups and rows are summed in another order
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
        assert torch.equal(found.step[b][tensors["mask"][b]], plain.step[row][mask[row]])
    assert (found.step[~tensors["mask"]] == -1).all() and (found.advantages[~tensors["mask"]] == 0).all()


def test_steps_are_numbered_and_share_their_credit():
    found = assigned(credit_of())
    mask = batch()["mask"]
    for b, text in enumerate(TEXTS):
        steps, values = found.step[b][mask[b]], found.advantages[b][mask[b]]
        assert steps[0] == 0 and (steps.diff() >= 0).all() and set(steps.tolist()) == set(range(int(steps.max()) + 1))
        assert all(values[steps == k].unique().numel() == 1 for k in range(int(steps.max()) + 1)), text
    assert int(found.step[0].max()) == 2, "two lines and the answer"


def test_reliability_0_is_the_advantage_bitwise():
    for settings in ({**SMALL, "attribution.reliability": 0}, {**SMALL, "attribution.reliability": 0, "credit.form": "weights"}):
        own = torch.randn(8)
        found = assigned(credit_of(settings), advantages=own)
        mask = batch()["mask"]
        assert torch.equal(found.advantages[mask], own.unsqueeze(1).expand(mask.shape)[mask])
    default = assigned(credit_of({**SMALL, "attribution.reliability": 0}))
    assert torch.equal(default.advantages.abs().amax(1), outcome_advantages(OUTCOME, 4, "grpo").abs())


def test_hindsight_speaks_where_outcomes_say_nothing_and_the_tree_where_they_differ():
    found = assigned(credit_of())
    mask = batch()["mask"]
    mixed, same = found.advantages[:4], found.advantages[4:]
    assert mixed[1][mask[1]].unique().numel() > 1, "it shares its first line with a right one"
    assert same.count_nonzero() > 0, "GRPO has no gradient here"
    other = {**batch(), **{name: batch(seed=1)[name] for name in ("log_ratio", "kl")}}
    again = assigned(credit_of(), other)
    assert torch.equal(again.advantages[:4], mixed) and not torch.equal(again.advantages[4:], same)
    without = assigned(credit_of({**FIXED, "attribution.source": "tree"}), {n: v for n, v in batch().items() if n not in ("log_ratio", "kl")})
    assert torch.equal(without.advantages[:4], mixed) and without.advantages[4:].count_nonzero() == 0


def test_what_a_tool_wrote_gets_no_credit():
    tensors = batch()
    written = tensors["mask"].clone()
    written[:, 6:12] = False
    found = assigned(credit_of(), tensors, written=written)
    assert (found.advantages[:, 6:12] == 0).all() and found.advantages[:, :6].count_nonzero() > 0
    noisy = {**tensors, "entropy": tensors["entropy"].clone(), "log_ratio": tensors["log_ratio"].clone()}
    for name in ("entropy", "log_ratio"):
        noisy[name][:, 6:12] = 99.0
    settings = {**FIXED, "entropy.controller": "constant", "credit.token": "entropy", "attribution.source": "hindsight,tree,entropy"}
    clean, loud = (assigned(credit_of(settings), t, written=written) for t in (tensors, noisy))
    assert torch.equal(clean.advantages, loud.advantages) and torch.equal(clean.entropy_weight, loud.entropy_weight)
    assert (clean.entropy_weight[:, 6:12] == 0).all()
    assert clean.entropy_weight[written & tensors["mask"]].mean().item() == pytest.approx(1e-3, rel=1e-5)


def test_literal_copies_of_the_answer_carry_no_credit():
    tensors = batch()
    loud = {**tensors, "log_ratio": tensors["log_ratio"].clone()}
    at = TEXTS[4].index("2")
    loud["log_ratio"][4, at] += 1.0
    kept = [assigned(credit_of(), t).advantages for t in (tensors, loud)]
    assert torch.equal(*kept)
    counted = [assigned(credit_of({**FIXED, "attribution.mask_answer_copies": False}), t, answers=None).advantages for t in (tensors, loud)]
    assert not torch.equal(*counted)


def test_a_rollout_without_an_outcome_keeps_its_own_advantage_and_counts_nowhere():
    outcome, own = OUTCOME.clone(), torch.randn(8)
    outcome[1] = math.nan
    settings = {**FIXED, "credit.scope": "all"}
    credit = credit_of(settings)
    assert credit.looks(outcome).tolist() == [b != 1 for b in range(8)]
    tensors = batch()
    found = assigned(credit, tensors, outcome=outcome, advantages=own)
    plain = own.unsqueeze(1) * tensors["mask"]
    assert torch.equal(found.advantages[1], plain[1]) and not any(torch.equal(found.advantages[b], plain[b]) for b in (0, 2, 4))
    loud = {**tensors, "log_ratio": tensors["log_ratio"].clone(), "kl": tensors["kl"].clone()}
    loud["log_ratio"][1], loud["kl"][1] = 3.0, 1.0
    again = assigned(credit_of(settings), loud, outcome=outcome, advantages=own)
    assert torch.equal(again.advantages, found.advantages), "nothing of that rollout counts anywhere"
    assert credit.success == pytest.approx(float(outcome.nanmean()))


def test_empty_rollouts_and_an_empty_batch():
    tensors = batch()
    tensors["mask"][2] = False
    found = assigned(credit_of(), tensors)
    assert (found.advantages[2] == 0).all() and found.advantages.isfinite().all()
    none = {name: value[:0] for name, value in batch().items()}
    empty = credit_of()(**none, outcome=OUTCOME[:0], answers=[])
    assert empty.advantages.shape == (0, tensors["ids"].shape[1])


# --- stages, bonus, state -----------------------------------------------------------------------------------------------------------------


def test_stages_switch_once_and_confidence_needs_what_it_needs():
    credit = credit_of({**FIXED, "stages.two": True, "stages.switch_share": 0.5}, total_steps=4)
    assert [assigned(credit, step=step).stage for step in (1, 2)] == [1, 1] and credit.stage == 2 and credit.needs_logp
    without = {name: value for name, value in batch().items() if name != "logp"}
    with pytest.raises(ValueError, match="logp must be given in stage 2"):
        assigned(credit, without)
    own = outcome_advantages(OUTCOME, 4, "grpo")
    with pytest.raises(ValueError, match="normalise must be given beside advantages"):
        assigned(credit, advantages=own)
    seen = []

    def normalise(rewards):
        seen.append(rewards)
        return outcome_advantages(rewards, 4, "grpo")

    found, same = assigned(credit, advantages=own, normalise=normalise), assigned(credit)
    assert found.stage == 2 and found.metrics["acpo/confidence"] == same.metrics["acpo/confidence"] > 0
    with pytest.raises(ValueError, match="the result of normalise must be finite, got NaN or infinity for 8 of 8 rollouts"):
        assigned(credit, advantages=own, normalise=lambda rewards: rewards * math.nan)
    state = credit.state()
    with pytest.raises(ZeroDivisionError):
        assigned(credit, advantages=own, normalise=lambda rewards: 1 / 0)
    assert credit.state() == state, "neither the panel nor the fork threshold has learned from a call that failed half way"
    tensors = batch()
    certain = [assigned(credit, {**tensors, "logp": tensors["mask"] * above}).metrics["acpo/confidence"] for above in (0.0, 5e-4)]
    assert certain[0] == certain[1] <= 1.0, "a log-prob above 0 by rounding is 0"
    assert torch.equal(seen[0][4:], OUTCOME[4:]) and (seen[0][:4] <= OUTCOME[:4]).all() and not torch.equal(seen[0][:4], OUTCOME[:4])
    plain = assigned(credit_of({**FIXED, "stages.two": True, "stages.confidence": 0.0}, total_steps=4)).advantages
    assert not torch.equal(found.advantages[:4], plain[:4])


def test_the_bonus_follows_the_controller():
    credit = credit_of({**FIXED, "entropy.controller": "target"}, total_steps=100)
    weights = [assigned(credit).metrics["acpo/entropy_weight"] for _ in range(12)]
    assert weights[0] == 1e-3 and weights[-1] < weights[0], "entropy stays at its start, above the falling target"
    assert assigned(credit_of()).entropy_weight is None


def test_stage_1_asks_for_a_higher_temperature_where_success_affords_it():
    def after(entropy: float, outcome: torch.Tensor = OUTCOME, **settings) -> float:
        credit = credit_of({**FIXED, "stages.two": True, "entropy.controller": "target", **settings}, total_steps=100)
        assert credit.exploration == 1.0, "nothing is known before the first batch"
        tensors = batch()
        assigned(credit, tensors | {"entropy": entropy * tensors["entropy"] / tensors["entropy"].nanmean()}, outcome)
        return credit.exploration

    assert after(0.05) == 1.3, "five of eight are right and the policy has closed up"
    assert 1.0 < after(0.2) < 1.3 and after(0.5) == 1.0, "half way, and spread out already"
    assert after(0.05, torch.tensor([1.0, 0, 0, 0, 0, 0, 0, 0])) == 1.0, "nothing to spare"
    assert after(0.05, **{"stages.two": False}) == 1.0 and after(0.05, **{"entropy.controller": "none"}) == 1.0
    assert after(0.05, **{"stages.switch_share": 0.0}) == 1.0, "stage 2"


def test_state_goes_on_where_it_was():
    settings = {**SMALL, "entropy.controller": "target", "stages.two": True, "credit.scope": "all"}
    one, two = (credit_of(settings, total_steps=20) for _ in range(2))
    for seed in range(12):
        assigned(one, batch(seed=seed))
    assert one.panel.by_name["tree"].reliability.boundaries > 0
    two.load(json.loads(json.dumps(one.state())))
    for seed in (21, 22, 23):
        a, b = assigned(one, batch(seed=seed)), assigned(two, batch(seed=seed))
        assert torch.equal(a.advantages, b.advantages) and torch.equal(a.entropy_weight, b.entropy_weight) and a.metrics == b.metrics
    assert one.state() == two.state()


def test_the_hinted_prompt():
    assert hinted_prompt("1+1?", "2") == "The answer is 2.\n1+1?"
    assert hinted_prompt("a {answer} b", "{prompt}", "{prompt}/{answer}") == "a {answer} b/{prompt}"
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "1+1?"}]
    assert hinted_prompt(chat, "2") == [chat[0], {"role": "user", "content": "The answer is 2.\n1+1?"}] and chat[1]["content"] == "1+1?"
    for answer in (None, 4):  # of None the policy would read "The answer is ."
        with pytest.raises(TypeError, match=f"answer must be the text that stands in the prompt, got {answer}"):
            hinted_prompt(chat, answer)
    for wrong in ([{"role": "system", "content": "s"}], [{"role": "user", "content": [{"type": "text", "text": "t"}]}]):
        with pytest.raises(ValueError, match="prompt must hold a user message whose content is text"):
            hinted_prompt(wrong, "2")


# --- the page -----------------------------------------------------------------------------------------------------------------------

BLOCKS = re.findall(
    r"```python\n(.*?)```", (Path(__file__).parents[1] / "docs" / "integrations" / "functional.md").read_text(encoding="utf-8"), re.DOTALL
)


def test_the_lines_of_the_page_run():
    tensors = batch()
    one = {"response_ids": tensors["ids"], "response_mask": tensors["mask"], "outcome": OUTCOME, "prompt_uid": ["same"] * 8}
    names = {"tokenizer": TOKENIZER, "loop": [one, dict(one)], "checkpoint": {}}
    exec(BLOCKS[0], names)
    assert one["advantages"].shape == tensors["mask"].shape and (one["advantages"][~tensors["mask"]] == 0).all()
    assert one["advantages"][tensors["mask"]].abs().min() > 0
    credit = StepCredit(TOKENIZER, group_size=8, settings={"attribution.source": "tree"})
    credit.load(json.loads(json.dumps(names["checkpoint"]["acpo"])))


def test_the_sketches_for_other_loops_run():
    """Against stand-ins of what those loops hand over; the loops themselves are not here."""
    tree = {**FIXED, "attribution.source": "tree"}
    tensors = batch()
    prompts = torch.arange(8).unsqueeze(1) // 4
    wanted = credit_of(tree)(tensors["ids"], tensors["mask"], OUTCOME).advantages
    experience = SimpleNamespace(sequences=torch.cat([prompts, tensors["ids"]], 1), action_mask=tensors["mask"], rewards=OUTCOME)
    maker = "class Own(Maker):\n" + textwrap.indent(BLOCKS[1], "    ")
    names = {"Maker": type("Maker", (), {"compute_advantages_and_returns": lambda self, experiences: experiences})}
    exec(maker, names)
    own = names["Own"]()
    own.credit = credit_of(tree)
    (found,) = own.compute_advantages_and_returns([experience])
    assert torch.equal(found.advantages, wanted)
    exec(BLOCKS[2], {"torch": torch}, names)
    # A question and its response a conversation, padded behind both; of each the tokens of the response are masked in.
    logs = [[{"role": "user", "token_ids": torch.tensor([7, 7])}, {"role": "assistant", "token_ids": torch.tensor(TOKENIZER(t)["input_ids"])}]
            for t in TEXTS]  # fmt: skip
    mask = torch.nn.functional.pad(tensors["mask"], (2, 3)).float()
    estimator = names["StepAdvantages"](credit_of(tree))
    found = estimator.compute_advantage(prompts, OUTCOME, mask, repeated_batch={"message_log": logs}, logprobs_policy=None)
    assert torch.equal(found[:, 2:-3], wanted) and not found[:, :2].any() and not found[:, -3:].any()
