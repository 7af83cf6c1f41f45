"""The method inside GRPOTrainer: where credit comes from, the bonus in the loss, stage 2, and runs that are broken off."""

from __future__ import annotations

import json

import pytest
import torch
from tiny import OFF, chance, equal, length, logged, model_path, problems, tokenizer, trained, trainer, weights
from transformers import AutoModelForCausalLM
from trl import GRPOTrainer

from acpo.integrations.trl import ACPOTrainer
from acpo.integrations.trl.rewards import group_advantages

ON = {"acpo_reliability": 0.8, "acpo_two_stages": False, "acpo_settings": {"credit.scope": "all"}}


def spied(own: GRPOTrainer) -> list[dict]:
    """The generation batches of a trainer, as they leave `_generate_and_score_completions`."""
    seen, original = [], own._generate_and_score_completions

    def generate(inputs):
        seen.append(original(inputs))
        return seen[-1]

    own._generate_and_score_completions = generate
    return seen


KINDS = ("whole", "new adapter", "given adapter")  # whose reference is a second model, the model without its adapter, a copy of the adapter


def of_kind(kind: str) -> dict:
    if kind == "whole":
        return {}
    from peft import LoraConfig, get_peft_model

    shape = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
    if kind == "new adapter":
        return {"options": {"peft_config": LoraConfig(**shape)}}
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32)
    return {"model": get_peft_model(base, LoraConfig(**shape, init_lora_weights=False, task_type="CAUSAL_LM"))}


def test_three_steps_of_the_method_with_everything_on(tmp_path):
    own = trainer(ACPOTrainer, tmp_path, num_iterations=2, steps_per_generation=4, max_steps=4, log_completions=True)
    start, seen = weights(own), spied(own)
    own.train()
    assert not equal(start, weights(own)) and all(value.isfinite().all() for value in weights(own).values())
    assert seen[0]["advantages"].shape == seen[0]["completion_ids"].shape == seen[0]["acpo_entropy_weight"].shape
    names = (
        "reliability/hindsight",
        "reliability/tree",
        "segments",
        "weight_std",
        "shaping",
        "entropy_bonus",
        "entropy_weight",
        "stage",
        "zero_variance",
    )
    assert all(logged(own, f"acpo/{name}") for name in names)
    bonus, entropy = (
        sum(logged(own, name)[:2]) for name in ("acpo/entropy_bonus", "entropy")
    )  # one generation batch, over whose tokens it is a mean
    assert 0 < bonus == pytest.approx(1e-3 * entropy, rel=0.05)
    assert (tmp_path / "completions").is_dir()


def test_credit_is_one_value_a_step_and_moves_the_weights(tmp_path):
    own = trainer(ACPOTrainer, tmp_path, **{**OFF, **ON}, max_steps=2)
    seen = spied(own)
    own.train()
    for batch in seen:
        mask = batch["completion_mask"].bool()
        assert (batch["advantages"][~mask] == 0).all()
    assert max(logged(own, "acpo/shaping")) > 0
    plain, _ = trained(ACPOTrainer, tmp_path / "plain", **OFF, max_steps=2)
    assert not equal(weights(own), weights(plain))


def test_a_rollout_that_was_cut_off_keeps_its_outcome_advantage(tmp_path):
    own = trainer(ACPOTrainer, tmp_path, **{**OFF, **ON}, max_steps=2)
    seen = spied(own)
    own.train()
    values = {True: [], False: []}  # how many different ones a rollout has, by whether it ended
    for batch in seen:
        for ids, mask, advantages in zip(batch["completion_ids"], batch["completion_mask"].bool(), batch["advantages"], strict=True):
            values[int(ids[mask][-1]) in own.eos_token_ids].append(advantages[mask].unique().numel())
    assert max(values[True]) > 1 and set(values[False]) == {1} and len(values[False]) > 3


@pytest.mark.parametrize(("kernels", "kind"), [(True, "whole"), (False, "whole"), (True, "given adapter")])
def test_the_hindsight_stream_is_that_of_separate_forwards(tmp_path, kernels, kind):
    """log_ratio and kl against logits of the plain and of the hinted prompt, each rollout alone and without padding; with a reference, whose adapter
    was in place of the policy's just before."""
    own = trainer(ACPOTrainer, tmp_path, **{**OFF, **ON, "use_acpo_kernels": kernels, "beta": 0.2}, **of_kind(kind), temperature=0.7, max_steps=1)
    kept = {}
    credit = own._acpo.__class__.__call__

    def call(self, ids, mask, outcome, **values):
        kept.update(values, ids=ids, mask=mask)
        return credit(self, ids, mask, outcome, **values)

    own._acpo.__class__ = type("Kept", (own._acpo.__class__,), {"__call__": call})
    seen = spied(own)
    own.train()
    model = of_kind(kind).get("model", AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32)).eval()
    words, batch = tokenizer(), seen[0]
    asked = {row["prompt"][0]["content"]: row["answer"] for row in problems()}
    for b in range(len(kept["ids"])):
        response = kept["ids"][b][kept["mask"][b]]
        prompt = batch["prompt_ids"][b][batch["prompt_mask"][b].bool()]
        question = words.decode(prompt)[2:-3]
        assert kept["answers"][b] == asked[question]
        hinted = torch.tensor(words(f"u:The answer is {asked[question]}.\n{question}\na:")["input_ids"])

        def logprobs(start, response=response):
            with torch.no_grad():
                logits = model(torch.cat([start, response]).unsqueeze(0)).logits[0, len(start) - 1 : -1] / 0.7
            return logits.double().log_softmax(-1)

        policy, with_answer = logprobs(prompt), logprobs(hinted)
        at = response.unsqueeze(1)
        got = {name: kept[name][b][kept["mask"][b]].double() for name in ("logp", "entropy", "log_ratio", "kl")}
        wanted = {
            "logp": policy.gather(1, at)[:, 0], "entropy": -(policy.exp() * policy).sum(1),
            "log_ratio": (with_answer - policy).gather(1, at)[:, 0], "kl": (policy.exp() * (policy - with_answer)).sum(1),
        }  # fmt: skip
        for name, value in wanted.items():
            torch.testing.assert_close(got[name], value, rtol=1e-4, atol=2e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_the_bonus_is_in_the_loss_as_written(tmp_path):
    """sum_t w_t H_t over the written tokens of the optimizer step, beside the same loss without it."""
    settings = {**OFF, "max_steps": 1, "optim": "sgd", "max_grad_norm": 0.0, "learning_rate": 1.0}
    bonus = {"acpo_entropy": "constant", "acpo_settings": {"entropy.weight": 0.01, "entropy.max_weight": 0.1}}
    plain, start = trained(ACPOTrainer, tmp_path / "plain", **settings)
    own = trainer(ACPOTrainer, tmp_path / "bonus", **{**settings, **bonus})
    seen = spied(own)
    own.train()
    batch, model = seen[0], AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32).eval()
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    logits = model(ids, attention_mask=attention).logits[:, batch["prompt_ids"].size(1) - 1 : -1]
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    mask = batch["completion_mask"].bool()
    total = (0.01 * entropy * mask).sum() / mask.sum()
    total.backward()
    difference = {name: weights(own)[name] - weights(plain)[name] for name in start}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(difference[name], parameter.grad, rtol=2e-2, atol=2e-6)
    assert logged(own, "acpo/entropy_bonus")[0] == pytest.approx(total.item(), rel=1e-4)


# --- stage 2 ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_our_advantages_are_those_of_grpo(tmp_path, scale):
    def sometimes(completion_ids, **_):
        return [None if sum(ids) % 5 == 0 else float(sum(ids) % 2) for ids in completion_ids]

    own = trainer(ACPOTrainer, tmp_path, reward_funcs=[sometimes, length], scale_rewards=scale, reward_weights=[1.0, 0.3], acpo_outcome="sometimes",
                  **OFF, max_steps=2)  # fmt: skip
    compared, original = [], own._acpo_assign

    def assign(inputs, output, *rest):
        wanted = group_advantages(own._acpo_rewards, own.reward_weights, 4, own.scale_rewards)
        compared.append(torch.equal(wanted, output["advantages"]))
        return original(inputs, output, *rest)

    own._acpo_assign = assign
    own.train()
    assert compared == [True, True]


def of_reference(own: GRPOTrainer) -> dict[str, torch.Tensor]:
    """Its weights, under the names of the policy's."""
    if own.ref_model is not None:
        return {name: value.clone() for name, value in own.accelerator.unwrap_model(own.ref_model).named_parameters()}
    return {name.replace(".ref.", ".default."): value for name, value in weights(own).items() if ".ref." in name or "lora" not in name}


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_is_the_policy_that_the_run_began_with(tmp_path, kind, bf16):
    """And stays it through both stages, and in a run that goes on from a checkpoint."""
    settings = {"acpo_settings": {"stages.switch_share": 0.4}, "max_steps": 5, "epsilon_high": 0.28, "bf16": bf16}
    own = trainer(ACPOTrainer, tmp_path, **of_kind(kind), **settings, save_strategy="steps", save_steps=4)
    assert own.beta == 0.2
    start, reference = weights(own), of_reference(own)
    assert reference and all(torch.equal(value, start[name]) for name, value in reference.items())
    own.train()
    kl = logged(own, "kl")
    assert len(kl) == 5 and abs(kl[0]) < 1e-6 < 1e-5 < kl[1] < kl[4], "nothing before the first update, more with the others"
    assert equal(of_reference(own), reference) and not equal(start, weights(own))
    again = trainer(ACPOTrainer, tmp_path, **of_kind(kind), **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert equal(weights(again), weights(own)) and logged(again, "kl")[-1] == kl[-1], "resumed in stage 2"


def test_stage_2_lowers_clip_high_and_weighs_by_confidence(tmp_path):
    own = trainer(ACPOTrainer, tmp_path, acpo_settings={"stages.switch_share": 0.4}, max_steps=5, epsilon_high=0.28)
    clips, original = [], own._compute_loss

    def loss(model, inputs):
        clips.append(own.epsilon_high)
        return original(model, inputs)

    own._compute_loss = loss
    own.train()
    assert logged(own, "acpo/stage") == [1, 1, 2, 2, 2] and clips == [0.28] * 4 + [0.2] * 6, "two micro-batches a step"
    assert own.beta == 0.2 and len(logged(own, "acpo/confidence")) == 3


# --- broken off and continued --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("windows", [{}, {"steps_per_generation": 8}, {"num_iterations": 2}], ids=["aligned", "inside a generation batch", "reused"])
def test_a_resumed_run_is_the_unbroken_one(tmp_path, windows):
    settings = {**ON, **windows, "acpo_reliability": None, "max_steps": 4}
    whole, _ = trained(ACPOTrainer, tmp_path / "whole", **{**settings, "save_strategy": "steps", "save_steps": 3})
    assert json.loads((tmp_path / "whole/checkpoint-3/acpo_state.json").read_text())["step"] == 6
    again = trainer(ACPOTrainer, tmp_path / "again", **settings)
    start = weights(again)
    again.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-3"))
    assert equal(weights(again), weights(whole)) and not equal(start, weights(whole))
    assert logged(again, "loss")[-1] == logged(whole, "loss")[-1]


def test_the_curriculum_chooses_and_resumes(tmp_path):
    settings = {**ON, "acpo_curriculum": True, "acpo_difficulty_column": "level", "max_steps": 6}
    whole = trainer(ACPOTrainer, tmp_path / "whole", **settings)
    whole.train()
    assert whole._acpo_curriculum.a.sum() > 4 and "acpo_row" not in whole._logs["extra"]
    trained(ACPOTrainer, tmp_path / "broken", **{**settings, "save_strategy": "steps", "save_steps": 3})
    again = trainer(ACPOTrainer, tmp_path / "again", **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "broken/checkpoint-3"))
    assert equal(weights(again), weights(whole))


# --- data and options -----------------------------------------------------------------------------------------------------------------


def rollouts(prompts, own):
    """Fixed completions: what a prompt says decides them, so that any split of a batch sees the same."""
    ids = [own.processing_class(p if isinstance(p, str) else "u:" + p[0]["content"] + "\na:")["input_ids"] for p in prompts]
    count: dict[tuple, int] = {}
    completions = []
    for prompt in ids:
        nth = count[tuple(prompt)] = count.get(tuple(prompt), 0) + 1
        generator = torch.Generator().manual_seed(1000 * sum(prompt) + nth)
        completions.append([*torch.randint(2, 120, (4 + nth,), generator=generator).tolist(), own._tokenizer.eos_token_id])
    return {"prompt_ids": ids, "completion_ids": completions, "logprobs": [[0.0] * len(c) for c in completions],
            "env_mask": [[0 if 2 <= t < 4 else 1 for t in range(len(c))] for c in completions]}  # fmt: skip


@pytest.mark.parametrize("chat", [True, False])
def test_accumulation_is_one_big_batch_and_tool_tokens_get_nothing(tmp_path, chat):
    settings = {**ON, "acpo_entropy": "constant", "max_steps": 2, "optim": "sgd", "max_grad_norm": 0.0, "learning_rate": 0.1}
    runs = {}
    for name, split in {"one": (8, 1), "four": (2, 4)}.items():
        own = trainer(ACPOTrainer, tmp_path / name, dataset=problems(chat=chat), options={"rollout_func": rollouts},
                      **{**settings, "per_device_train_batch_size": split[0], "gradient_accumulation_steps": split[1]})  # fmt: skip
        seen, start = spied(own), weights(own)
        own.train()
        assert (seen[0]["advantages"][:, 2:4] == 0).all() and (seen[0]["acpo_entropy_weight"][:, 2:4] == 0).all()
        runs[name] = weights(own)
    for name, value in runs["one"].items():
        torch.testing.assert_close(runs["four"][name], value, rtol=1e-4, atol=1e-6)
    assert not equal(start, runs["one"])


def test_a_rollout_func_with_other_prompts_is_refused_for_hindsight(tmp_path):
    def other(prompts, own):
        found = rollouts(prompts, own)
        return {**found, "prompt_ids": [[5, *ids] for ids in found["prompt_ids"]]}

    own = trainer(ACPOTrainer, tmp_path, options={"rollout_func": other}, **ON)
    with pytest.raises(ValueError, match="rollout_func made others"):
        own.train()


def test_rewards_that_are_no_outcome_and_columns_that_are_missing(tmp_path):
    def three(completions, **_):
        return [3.0] * len(completions)

    with pytest.raises(ValueError, match=r"three must give the verifier's outcome in \[0, 1\], got 3.0"):
        trainer(ACPOTrainer, tmp_path, reward_funcs=three).train()
    with pytest.raises(ValueError, match=r"acpo_outcome must name the one reward function .* of chance, length; got None"):
        trainer(ACPOTrainer, tmp_path, reward_funcs=[chance, length])
    with pytest.raises(ValueError, match="acpo_answer_column='gold' is no column of the dataset, which has 'prompt', 'answer', 'level'"):
        trainer(ACPOTrainer, tmp_path, acpo_answer_column="gold")
    for answer in (None, ["5"]):
        answers = [answer] * len(problems())
        with pytest.raises(ValueError, match=r"the column 'answer' \(acpo_answer_column\) must hold a text or a number in every row, got"):
            trainer(ACPOTrainer, tmp_path, dataset=problems().remove_columns("answer").add_column("answer", answers), **ON).train()
    with pytest.raises(ValueError, match="acpo_difficulty_column='hard' is no column"):
        trainer(ACPOTrainer, tmp_path, acpo_curriculum=True, acpo_difficulty_column="hard")
    with pytest.raises(TypeError, match="args must be an ACPOConfig, got GRPOConfig"):
        from tiny import arguments
        from trl import GRPOConfig

        ACPOTrainer(model_path(), chance, arguments(GRPOConfig, tmp_path))


def test_lora_and_evaluation(tmp_path):
    from peft import LoraConfig

    options = {"peft_config": LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.1), "eval_dataset": problems(4)}
    theirs, _ = trained(GRPOTrainer, tmp_path / "theirs", options=options, **{**OFF, "beta": 0.04})
    ours = trainer(ACPOTrainer, tmp_path / "ours", options=options, **{**OFF, "beta": 0.04})
    start = weights(ours)
    ours.train()
    assert equal(weights(theirs), weights(ours)) and not equal(start, weights(ours))
    state = ours._acpo.state()
    assert "eval_reward" in ours.evaluate() and ours._acpo.state() == state, "evaluation teaches nothing"
    with pytest.raises(ValueError, match=r"PEFT adapter to `lm_head` is not supported"):
        trainer(ACPOTrainer, tmp_path, options={"peft_config": LoraConfig(r=4, target_modules=["lm_head"])})
