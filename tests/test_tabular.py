"""Where each credit rule points, on chains small enough to enumerate: the expected gradient against the true one, in float64.

T1 with m = 5 values: y_k = (y_{k-1} + x_k) mod m written step by step by a table pi(y | y_{k-1}, x_k) that is right with probability p, then
the answer, a copy. An error can be made good by a later one, so success near 1/m is chance.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from acpo.attribution import Attributor, Evidence, hindsight_evidence, leave_one_out, tree_evidence, zero_variance
from acpo.config import AttributionConfig, CreditConfig
from acpo.credit import assign, outcome_advantages, token_advantages
from acpo.panel import Panel
from acpo.tree import Prefixes, tree_values
from acpo_kernels import Segments, segment_credit

M, K = 5, 4
X = (1, 3, 0, 2)


@pytest.fixture(autouse=True)
def one_thread(deterministic):
    torch.set_num_threads(1)


class Chain:
    """Every rollout y_1..y_K from value 0, its probability, its outcome, V at every boundary (question, K steps, answer)."""

    def __init__(self, p: float, operands: tuple[int, ...] = X):
        self.operands = operands
        generator = torch.Generator().manual_seed(3)
        wrong = (1 - p) / (M - 1) * (1 + 0.3 * (2 * torch.rand(M, M, M, generator=generator, dtype=torch.float64) - 1))  # not all alike
        self.policy = wrong.clone()
        for v, x in itertools.product(range(M), range(M)):
            right = (v + x) % M
            self.policy[v, x, right] = 0.0
            self.policy[v, x, right] = 1.0 - self.policy[v, x].sum()
        self.answer = sum(operands) % M
        after = torch.zeros(M, dtype=torch.float64)
        after[self.answer] = 1.0
        tables = [after]
        for x in reversed(operands):
            tables.append(self.policy[:, x] @ tables[-1])
        tables.reverse()
        self.rollouts = list(itertools.product(range(M), repeat=K))
        self.states = torch.tensor([(0, *r) for r in self.rollouts])
        self.probability = torch.stack([self.policy[self.states[:, k], operands[k], self.states[:, k + 1]] for k in range(K)]).prod(0)
        self.outcome = (self.states[:, -1] == self.answer).double()
        self.values = torch.stack([tables[k][self.states[:, k]] for k in range(K + 1)] + [self.outcome], 1)  # [rollouts, K+2]
        self.start = float(tables[0][0])

    def gradient(self, weight: torch.Tensor) -> torch.Tensor:
        """E[sum_k weight_k grad log pi(y_k)] over the table's logits; weight [rollouts, K]."""
        out = torch.zeros_like(self.policy)
        for k, x in enumerate(self.operands):
            mass = self.probability * weight[:, k]
            v, y = self.states[:, k], self.states[:, k + 1]
            out.index_put_((v, torch.full_like(v, x), y), mass, accumulate=True)
            out[:, x] -= torch.zeros(M, dtype=torch.float64).index_add(0, v, mass).unsqueeze(1) * self.policy[:, x]
        return out.flatten()

    def segments(self, count: int | None = None) -> Segments:
        """One token a step, K steps and the answer."""
        count = len(self.rollouts) if count is None else count
        n = count * (K + 1)
        return Segments(torch.arange(n + 1), torch.arange(0, n + 1, K + 1), terminal=torch.ones(count, dtype=torch.bool))

    def hindsight(self) -> tuple[torch.Tensor, torch.Tensor]:
        """l and KL of every token under the exact hindsight policy P(y | s, right), [rollouts, K+1]; the answer token is the state's copy: 0."""
        log_ratio, kl = torch.zeros(2, len(self.rollouts), K + 1, dtype=torch.float64)
        after = torch.zeros(M, dtype=torch.float64)
        after[self.answer] = 1.0
        for k in reversed(range(K)):
            ahead = self.policy[:, self.operands[k]]  # [value, next value]
            if k < K - 1:
                ratio = (after / (ahead @ after).unsqueeze(1)).log()
                log_ratio[:, k] = ratio[self.states[:, k], self.states[:, k + 1]]
                kl[:, k] = -(ahead * ratio).sum(1)[self.states[:, k]]
            after = ahead @ after
        return log_ratio, kl

    def truth(self) -> torch.Tensor:
        return self.gradient(self.values[:, 1 : K + 1] - self.values[:, :K])


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(a @ b / a.norm() / b.norm())


@pytest.fixture(scope="module", params=[0.5, 0.7, 0.9], ids=["at chance", "above chance", "good"])
def chain(request) -> Chain:
    return Chain(request.param)


def test_the_outcome_and_the_exact_differences_are_the_gradient(chain):
    advantage = (chain.outcome - chain.start).unsqueeze(1).expand(-1, K)
    torch.testing.assert_close(chain.gradient(advantage), chain.truth(), rtol=1e-10, atol=1e-12)
    table = chain.policy.log().requires_grad_()
    value = torch.zeros(M, dtype=torch.float64)
    value[chain.answer] = 1.0
    for x in reversed(X):
        value = table[:, x].softmax(1) @ value
    (exact,) = torch.autograd.grad(value[0], table)
    torch.testing.assert_close(chain.truth(), exact.flatten(), rtol=1e-10, atol=1e-12)


def test_telescoping_and_budget(chain):
    steps = chain.values[:, 1:] - chain.values[:, :-1]
    torch.testing.assert_close(steps.sum(1), chain.outcome - chain.start, rtol=1e-10, atol=1e-12)
    h = lambda v: -(torch.xlogy(v, v) + torch.xlogy(1 - v, 1 - v))  # noqa: E731
    spent = [(chain.probability * (h(chain.values[:, k]) - h(chain.values[:, k + 1]))).sum() for k in range(K)]
    assert sum(spent).item() == pytest.approx(float(h(torch.tensor(chain.start, dtype=torch.float64))), rel=1e-10)
    assert min(s.item() for s in spent) > -1e-12


def averaged(p: float, steps: int) -> dict[str, float]:
    """The same task averaged over ALL its questions, with wrong values equally likely: only how far a value is from the right one matters, so the
    expected gradient over the shared table has one direction, that of the right entries, and this is its length under each rule."""
    off = torch.cartesian_prod(*[torch.arange(M)] * steps)  # how far each written value is from what it should be, given the one before
    probability = torch.where(off == 0, p, (1 - p) / (M - 1) + torch.zeros(off.shape, dtype=torch.float64)).prod(1)
    error = torch.cat([torch.zeros(len(off), 1, dtype=torch.int64), off.cumsum(1) % M], 1)
    remains = ((M * p - 1) / (M - 1)) ** torch.arange(steps, -1, -1).double()
    values = torch.where(error == 0, 1 / M + (1 - 1 / M) * remains, 1 / M - remains / M)
    outcome = (error[:, -1] == 0).double()
    advantage = outcome - values[0, 0]

    def length(weight: torch.Tensor) -> float:
        return float((probability.unsqueeze(1) * weight * ((off == 0).double() - p)).sum())

    pmi = (values[:, 1:].clamp(min=1e-6) / values[:, :-1]).log().abs()
    floored = torch.cat([values.clamp(min=1 / M), outcome.unsqueeze(1)], 1)
    phi = floored.diff(dim=1)
    n = len(off) * (steps + 1)
    segments = Segments(torch.arange(n + 1), torch.arange(0, n + 1, steps + 1), terminal=torch.ones(len(off), dtype=torch.bool))
    scale = float((phi[:, :steps].abs() * probability.unsqueeze(1)).sum() / steps)
    weights = segment_credit(phi.flatten(), segments, advantage, form="weights", scale=scale).token_advantages.view(-1, steps + 1)[:, :steps]
    return {
        "success": float(values[0, 0]),
        "true": length(values.diff(dim=1)),
        "outcome": length(advantage.unsqueeze(1).expand(-1, steps)),
        "unbounded": length(steps * pmi / pmi.sum(1, keepdim=True) * advantage.unsqueeze(1)),
        "weights": length(weights),
    }


def test_unbounded_information_shares_reverse_near_chance_and_the_shipped_weights_do_not():
    """|pmi_k| / sum |pmi| times the advantage, with EXACT V: the last step and lucky recoveries own the weight, and the expected gradient points the
    wrong way. Far from chance the same shares are harmless."""
    near, far = averaged(0.7, 7), averaged(0.9, 7)
    for found in (near, far):
        assert found["outcome"] == pytest.approx(found["true"], rel=1e-10)
        assert found["weights"] > 1.4 * found["true"] > 0
    assert near["success"] < 0.24 and near["unbounded"] < -near["true"] < 0
    assert far["success"] > 0.5 and far["unbounded"] > 0


def shipped(chain: Chain, form: str, mask: str = "none", phi: torch.Tensor | None = None) -> torch.Tensor:
    """The package's own credit from exact V, floored at chance, under full reliability."""
    count, segments = len(chain.rollouts), chain.segments()
    values = chain.values.clamp(min=1 / M)
    phi = (values[:, 1:] - values[:, :-1]).flatten() if phi is None else phi
    advantage = chain.outcome - chain.start
    if form == "weights":
        weighed = chain.probability.repeat_interleave(K + 1) * ~segments.is_terminal()
        scale = float((phi.abs() * weighed).sum() / weighed.sum()) + 1e-6
        credit = segment_credit(phi, segments, advantage, form="weights", scale=scale).token_advantages
    else:
        credit = segment_credit(phi, segments, advantage, form="additive", gain=1.0, scale=max((chain.start * (1 - chain.start)) ** 0.5, 0.25))
        credit = credit.token_advantages
    return credit.view(count, K + 1)


@pytest.mark.parametrize("form", ["additive", "weights"])
def test_the_shipped_rules_keep_the_direction(chain, form):
    assert cosine(chain.gradient(shipped(chain, form)[:, :K]), chain.truth()) >= 0.95


def test_the_additive_rule_moves_faster_along_the_gradient(chain):
    """It does not only keep the direction: with V exact and not floored it IS the gradient, (1 + 1/spread) times."""
    phi = (chain.values[:, 1:] - chain.values[:, :-1]).flatten()
    spread = max((chain.start * (1 - chain.start)) ** 0.5, 0.25)
    torch.testing.assert_close(chain.gradient(shipped(chain, "additive", phi=phi)[:, :K]), (1 + 1 / spread) * chain.truth(), rtol=1e-9, atol=1e-12)


def test_weights_conserve_exactly(chain):
    credit = shipped(chain, "weights")
    torch.testing.assert_close(credit.sum(1), (K + 1) * (chain.outcome - chain.start), rtol=1e-12, atol=1e-12)


def drawn(chain: Chain, groups: int, size: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    index = rng.choice(len(chain.rollouts), groups * size, p=(chain.probability / chain.probability.sum()).numpy())
    path = [[bytes(chain.rollouts[i][: k + 1]) for k in range(K)] + [b"end" + bytes(chain.rollouts[i])] for i in index]
    return torch.from_numpy(index), Prefixes(path, path, [[True] * (K + 1)] * len(index))


def test_the_tree_is_unbiased_where_prefixes_are_shared():
    """kappa = 0: over many groups the mean error at each boundary is 0 within four standard errors, and a biased estimate would be seen."""
    chain = Chain(0.7)
    index, prefixes = drawn(chain, 1500, 8)
    outcome = chain.outcome[index]
    values = tree_values(prefixes, outcome, 8, 0.0).view(-1, K + 1)
    for k in range(K - 1):
        first = [p[k] for p in prefixes.path]
        shared = torch.tensor([first[b // 8 * 8 : b // 8 * 8 + 8].count(first[b]) > 1 for b in range(len(first))])
        error = (values[:, k] - chain.values[index, k + 1])[shared].view(-1)
        assert len(error) > 1000
        by_group = torch.zeros(1500, dtype=torch.float64).index_add(0, shared.nonzero().flatten() // 8, error)
        assert abs(by_group.mean()) < 4 * by_group.std() / 1500**0.5
        own = (torch.where(outcome > 0, 1.0, 0.0) - chain.values[index, k + 1])[shared]
        assert own.abs().mean() > 3 * abs(error.mean()), "the measure would see an estimate that holds the rollout's own outcome"


@pytest.mark.parametrize("form", ["additive", "weights"])
def test_the_whole_method_with_the_tree_keeps_the_direction(form):
    """Groups of eight, leave-one-out tree, prequential calibration and measured reliability, GRPO advantages: the mean over batches."""
    chain = Chain(0.8)
    attributor, total, plain, gates = Attributor(), torch.zeros(M**3, dtype=torch.float64), torch.zeros(M**3, dtype=torch.float64), []
    for batch in range(40):
        index, prefixes = drawn(chain, 32, 8, seed=batch)
        outcome, segments = chain.outcome[index], chain.segments(len(index))
        rows = torch.ones(len(index), dtype=torch.bool)
        found = attributor(tree_evidence(prefixes, outcome, 8, segments, 2.0, False, rows), outcome, leave_one_out(outcome, 8), segments, 8)
        advantages = outcome_advantages(outcome, 8, "grpo")
        credit = token_advantages(advantages, found, segments, CreditConfig(form=form, mask="none")).token_advantages.view(-1, K + 1)[:, :K]
        gates.append(float(found.reliability.max()))
        for weight, into in ((credit, total), (advantages.unsqueeze(1).expand(-1, K), plain)):
            spread = torch.zeros(len(chain.rollouts), K, dtype=torch.float64).index_add(0, index, weight.double())
            into += chain.gradient(spread / chain.probability.unsqueeze(1))
    assert gates[0] == 0.0 and gates[-1] > 0.5
    assert cosine(total, chain.truth()) >= 0.95
    assert cosine(total, chain.truth()) > cosine(plain, chain.truth()) - 0.02


def test_the_shipped_default_and_the_forms_of_others_keep_the_direction():
    """Hindsight in groups without variance, the tree in the others, priors, gates, the pick and the weights of groups, as the default configuration
    has them, beside TEMPO's and RLSD's forms; the sum over batches of the sampled update. A tenth of the groups have no variance: the outcome alone
    leaves those without a gradient. The last step's hindsight ratio is infinite where it decides the outcome (a policy hinted with the answer
    cannot have it), so it carries none here."""
    chain, size, groups = Chain(0.62), 8, 32
    panel = Panel(AttributionConfig(), CreditConfig(), size)
    log_ratio, kl = chain.hindsight()
    total = {name: torch.zeros(M**3, dtype=torch.float64) for name in ("default", "silent", "weights", "branch", "ratio")}
    gates, without = [], []
    for batch in range(60):
        index, prefixes = drawn(chain, groups, size, seed=batch)
        outcome, segments = chain.outcome[index], chain.segments(len(index))

        def evidence(name: str, base: torch.Tensor) -> Evidence:
            acts = panel.acts(name, outcome)  # noqa: B023
            if name == "tree":
                return tree_evidence(prefixes, outcome, size, segments, 2.0, False, acts)  # noqa: B023
            found = hindsight_evidence(log_ratio[index].flatten(), kl[index].flatten(), segments, None, panel.looks(name, outcome), 5.0)  # noqa: B023
            return Evidence(found.evidence, found.shaping, found.rows, acts)

        prior = torch.full((len(index),), chain.start, dtype=torch.float64)
        found, metrics = panel.attribute(evidence, outcome, prior, segments)
        advantages = outcome_advantages(outcome, size, "grpo")
        gates.append((metrics["attribution/reliability/hindsight"], metrics["attribution/reliability/tree"]))
        same = zero_variance(outcome, size)
        without.append(float(same.double().mean()))
        tokens = {"ids": torch.cat([torch.tensor([*chain.rollouts[i], M]) for i in index.tolist()]), "log_ratio": log_ratio[index].flatten()}
        tokens["entropy"] = torch.ones(len(tokens["ids"]), dtype=torch.float64)

        def credit(attribution, **settings) -> torch.Tensor:
            config = CreditConfig(**settings)
            return assign(advantages, outcome, attribution, segments, size, config, **tokens).token_advantages.view(-1, K + 1)[:, :K]  # noqa: B023

        rules = {
            "default": credit(found), "silent": credit(found) * same.unsqueeze(1), "weights": credit(found, form="weights"),
            "branch": credit(None, form="branch", mask="none"), "ratio": credit(None, form="ratio", mask="none", bound=0.2),
        }  # fmt: skip
        for name, weight in rules.items():
            spread = torch.zeros(len(chain.rollouts), K, dtype=torch.float64).index_add(0, index, weight.double())
            total[name] += chain.gradient(spread / chain.probability.unsqueeze(1))
    assert np.mean(without) > 0.1 and min(gates[-1]) > 0.3, (np.mean(without), gates[-1])
    for name in ("default", "weights", "branch", "ratio"):
        assert cosine(total[name], chain.truth()) >= 0.95, name
    steps = chain.values.diff(dim=1)[:, :K] * (torch.arange(K) < K - 1)  # of what hindsight sees here
    assert cosine(total["silent"], chain.gradient(steps)) > 0.9, "the groups that say nothing to GRPO point the right way by themselves"
    assert cosine(total["silent"], chain.truth()) > 0.5, "and of the whole gradient, the last step in it, along more than half"


def test_noise_is_gated_to_the_plain_update():
    """The same loop with evidence that says nothing: reliability 0 and, bit for bit, GRPO."""
    chain, attributor = Chain(0.8), Attributor()
    for batch in range(20):
        index, _ = drawn(chain, 16, 8, seed=batch)
        outcome, segments = chain.outcome[index], chain.segments(len(index))
        noise = torch.randn(segments.num_segments, generator=torch.Generator().manual_seed(batch))
        evidence = Evidence(noise, None, torch.ones(len(index), dtype=torch.bool))
        found = attributor(evidence, outcome, leave_one_out(outcome, 8), segments, 8)
        advantages = outcome_advantages(outcome, 8, "grpo")
        for form in ("additive", "weights"):
            credit = token_advantages(advantages, found, segments, CreditConfig(form=form, mask="none")).token_advantages
            if found.reliability.max() == 0:
                assert torch.equal(credit, advantages[segments.sequence_ids()])
    assert found.reliability.max() == 0 and math.isfinite(attributor.reliability.m1)
