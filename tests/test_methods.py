"""The methods and the settings that they differ in, in whole steps."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from loop import MANY, TREE, parameters, rolled_out, steps, trainer_of, without_times

from acpo import state
from acpo.config import METHODS, AttributionConfig, CreditConfig, value_of
from acpo.panel import Panel
from acpo.policy import Policy
from acpo.update import covariance_penalty


@pytest.fixture(autouse=True)
def one_thread(deterministic):
    torch.set_num_threads(1)


def test_without_a_credit_form_each_source_acts_where_it_did():
    """What the mask and the weights of groups go by is the same source as in the whole method: hindsight in groups without variance alone."""
    outcome = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0, math.nan, 0.0, 0.0, 0.0])
    for name in ("hindsight", "tree"):
        one, other = (Panel(AttributionConfig(), CreditConfig(form=form), 4).acts(name, outcome) for form in ("none", "additive"))
        assert torch.equal(one, other) and one.any() and not one.all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("source", ["own", "tree"])
def test_methods_run_with_their_settings(tmp_path, warmed, method, source, monkeypatch):
    extra = (*TREE, "credit.form=additive") if source == "tree" else ()
    trainer = trainer_of(tmp_path, f"method={method}", "trainer.steps=4", *MANY, *extra, weights=warmed)
    calls = []
    forward = Policy.forward
    monkeypatch.setattr(Policy, "forward", lambda self, *a, **k: (calls.append(k), forward(self, *a, **k))[1])
    for key, wanted in METHODS[method].items():
        if source == "own" or key not in ("attribution.source", "credit.form", "credit.scope"):
            assert value_of(trainer.config, key) == wanted, key
    found = steps(trainer, 2)
    for metrics in found:
        assert all(np.isfinite(v) for v in metrics.values())
        assert metrics["grad_norm"] > 0 and metrics["tokens/generated"] > 0
        assert ("attribution/rows" in metrics) == (method == "acpo" or source == "tree")
    ratio, low, high = {"gspo": ("sequence", 3e-4, 4e-4)}.get(method, ("token", 0.2, 0.28))
    assert {(k["ratio"], k["clip"]) for k in calls} == {(ratio, (low, high))}
    assert all((k["entropy_weight"] is not None) == (method == "acpo") for k in calls)
    denominators = [k["denominator"] for k in calls]
    if method == "dr_grpo":
        assert set(denominators) == {14.0 * 32}, "a constant: new tokens at most, times rollouts"
    elif method == "gspo":
        assert all(torch.is_tensor(d) for d in denominators)
    else:
        assert all(isinstance(d, float) and 0 < d < 14 * 32 for d in denominators)
    assert any(not torch.equal(warmed[n], p) for n, p in trainer.policy.named_parameters())


@pytest.mark.parametrize(
    "own",
    [
        ("attribution.source=hindsight,probe,tree,head", "credit.scope=own"),
        ("attribution.source=entropy", "credit.form=weights", "credit.scope=all"),
        ("attribution.source=tree", "attribution.keys=numbers", "segmenter.fixed=3", "credit.token=entropy"),
        ("attribution.source=none", "credit.form=branch"),
        ("attribution.source=hindsight", "credit.form=ratio", "credit.mask=none", "credit.scope=all"),
        ("attribution.control=shuffled", "entropy.controller=step", "stages.confidence_form=product"),
        ("attribution.control=position", "entropy.covariance=always", "entropy.covariance_share=0.05"),
        ("attribution.control=random", "credit.mask=filler"),
        ("attribution.control=everywhere", "attribution.source=hindsight,tree"),
    ],
    ids=lambda own: own[0].partition("=")[2] + "-" + own[-1].partition("=")[2],
)
def test_every_source_form_and_control_resumes_to_the_same_numbers(tmp_path, warmed, own):
    """Four steps, the stage switch among them, against two, a checkpoint, and two more by another trainer."""
    gate = () if {"credit.form=branch", "credit.form=ratio"} & {*own} else ("attribution.reliability=0.7",)  # those have none
    common = ("rollout.group_size=8", "trainer.steps=4", "stages.switch_share=0.5", *gate, *own)
    whole, broken = trainer_of(tmp_path / "a", *common, weights=warmed), trainer_of(tmp_path / "b", *common, weights=warmed)
    first, second = steps(whole, 4), steps(broken, 2)
    state.save(broken, "step-2")
    again = trainer_of(tmp_path / "b", *common)
    state.resume(again)
    second += steps(again, 2)
    assert [without_times(m) for m in first] == [without_times(m) for m in second]
    assert all(torch.equal(parameters(whole)[n], p) for n, p in again.policy.named_parameters())
    plain = trainer_of(
        tmp_path / "c", *common, "attribution.source=none", "credit.form=none", "credit.mask=none", "credit.token=none", weights=warmed
    )
    steps(plain, 1)
    one = trainer_of(tmp_path / "d", *common, weights=warmed)
    steps(one, 1)
    assert any(not torch.equal(parameters(one)[n], p) for n, p in plain.policy.named_parameters()), "it does something"


def test_the_covariance_penalty_draws_its_tokens_back(tmp_path, warmed):
    """KL-Cov: nothing at the policy that sampled, nothing without a chosen token; away from it the gradient leads the chosen tokens back."""
    trainer = trainer_of(tmp_path, "entropy.covariance=always", "entropy.covariance_share=0.1", weights=warmed)
    batch, *_ = rolled_out(trainer)
    chosen = batch.token["covariant"]
    assert 0 < int(chosen.sum()) < len(chosen)

    def gradient() -> dict[str, torch.Tensor]:
        trainer.optimizer.zero_grad(set_to_none=True)
        read = covariance_penalty(batch, trainer.policy, trainer.config, float(len(chosen)))
        few = torch.unique(batch.segments.sequence_ids()[batch.token["covariant"]]).tolist()
        assert read == sum(len(batch.prompts[b]) + batch.lengths[b] for b in few), "what it reads more than GRPO"
        return {n: p.grad.clone() for n, p in trainer.policy.named_parameters() if p.grad is not None}

    def penalty() -> float:
        with torch.no_grad():
            logp = trainer.policy.score(trainer.policy.hidden(batch.prompts, batch.responses()), batch.token["ids"], 1.0).logp
        back = (batch.token["old_logp"] - logp)[chosen]
        return float((torch.exp(-back) * (back.exp() - back - 1)).sum()) / len(chosen)  # k3 times the ratio

    assert all(g.abs().max() < 1e-6 for g in gradient().values())
    torch.manual_seed(0)
    with torch.no_grad():
        for p in trainer.policy.parameters():
            p += 0.02 * torch.randn_like(p)
    trainer.policy.changed()
    moved, before = penalty(), gradient()
    assert moved > 1e-4
    step = 0.2 * moved / sum(float(g.square().sum()) for g in before.values())  # a fifth less, to first order
    with torch.no_grad():
        for n, p in trainer.policy.named_parameters():
            p -= step * before[n]
    trainer.policy.changed()
    assert penalty() < 0.9 * moved
    batch.token["covariant"] = torch.zeros_like(chosen)
    assert gradient() == {}


def test_denominators_add_up_to_their_means(tmp_path, warmed):
    """tokens: each token the same; sequences: each rollout the same, its tokens sharing; checked on the gradient of a loss that is
    minus the sum of the advantages over the denominators."""
    wanted = {
        "tokens": lambda lengths, sums: sum(sums) / sum(lengths),
        "sequences": lambda lengths, sums: sum(s / n for s, n in zip(sums, lengths, strict=True)) / len(lengths),
        "constant": lambda lengths, sums: sum(sums) / (14 * len(lengths)),
    }
    for name, mean in wanted.items():
        trainer = trainer_of(
            tmp_path / name, f"loss.denominator={name}", "loss.minibatches=1", "entropy.controller=none", "trainer.micro_batch_tokens=50",
            "credit.advantage=rloo", weights=warmed,
        )  # fmt: skip
        batch, *_ = rolled_out(trainer)
        torch.manual_seed(0)
        batch.token["advantages"] = torch.randn_like(batch.token["advantages"])
        sums = [part.sum().item() for part in batch.token["advantages"].split(batch.lengths)]
        assert trainer._update(batch)["loss"] == pytest.approx(-mean(batch.lengths, sums), rel=1e-4, abs=1e-6), name


def test_dynamic_sampling_counts_what_it_throws_away(tmp_path, warmed):
    trainer = trainer_of(tmp_path, "method=dapo", "curriculum.max_rounds=12", weights=warmed)
    generated = []
    generate = trainer._generate

    def counting(prompts, round_):
        samples = generate(prompts, round_)
        generated.append((len(prompts), sum(len(s.ids) for s in samples)))
        return samples

    trainer._generate = counting
    mixed = again = 0
    for _ in range(3):
        generated.clear()
        before = trainer.counters["tokens/generated"]
        trainer.step_number += 1
        _, batch, outcome = trainer._rollout()
        assert trainer.counters["tokens/generated"] - before == sum(n for _, n in generated)
        assert len(batch) == 16 and len(trainer.tried) == sum(n for n, _ in generated) // 4
        spread = outcome.view(4, 4).std(1)
        mixed += int((spread > 0).sum())
        again += len(generated) > 1
        wanted = 16
        for (count, _), following in itertools.pairwise(generated):
            assert count == wanted and following[0] <= count  # equal: a round without a mixed group
            wanted = following[0]
    assert mixed == 12, "twelve rounds find four groups with both outcomes from a policy that is right one time in four"
    assert again, "none of these batches needed a second round"


def test_dynamic_sampling_gives_up_in_the_end(tmp_path):
    """An untrained policy is never right: the rounds end, the batch is full, and everything was paid for."""
    trainer = trainer_of(tmp_path, "method=dapo", "curriculum.max_rounds=3")
    metrics = steps(trainer, 1)[0]
    assert metrics["frac_reward_zero_std"] == 1.0
    assert len(trainer.tried) == 12 and metrics["tokens/generated"] > 2.5 * 16 * metrics["completions/mean_length"]
