"""The exact theory (section 1 of the method) on policies small enough to enumerate, in float64.

T1: K digits are written, the verifier asks whether their sum is 0 modulo 3: the finished rollout decides C.
T3: the same, and success needs luck 0.3 beside it: C is still open when the rollout ends.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from acpo_kernels import hindsight_information, policy_loss, segment_credit, segment_reduce
from acpo_kernels.segments import Segments

VOCAB, LENGTH = 3, 5
EXACT = dict(rtol=1e-12, atol=1e-12)


class Chain:
    """An explicit policy pi(y | y_<t) for every prefix, and from it V, the distribution of each state, and every rollout."""

    def __init__(self, luck: float):
        generator = torch.Generator().manual_seed(7)
        self.luck = luck
        prefixes = [p for k in range(LENGTH + 1) for p in itertools.product(range(VOCAB), repeat=k)]
        self.logits = {p: 1.5 * torch.randn(VOCAB, generator=generator, dtype=torch.float64) for p in prefixes if len(p) < LENGTH}
        self.policy = {p: z.softmax(0).tolist() for p, z in self.logits.items()}
        self.value, self.reach = {}, {(): 1.0}
        for p in prefixes:  # forwards: the probability of each prefix
            for y in range(VOCAB) if len(p) < LENGTH else ():
                self.reach[(*p, y)] = self.reach[p] * self.policy[p][y]
        for p in reversed(prefixes):  # backwards: the probability of success from it
            after = (self.policy[p][y] * self.value[(*p, y)] for y in range(VOCAB)) if len(p) < LENGTH else [self.luck * (sum(p) % 3 == 0)]
            self.value[p] = math.fsum(after)
        self.states = [p for p in prefixes if len(p) < LENGTH]
        self.rollouts = [p for p in prefixes if len(p) == LENGTH]

    def success(self, rollout) -> float:
        """P(C = 1 | the finished rollout), from the definition and not from V."""
        return self.luck if sum(rollout) % 3 == 0 else 0.0

    def conditioned(self, state, outcome: int) -> list[float]:
        """P(Y | state, C = outcome) by enumerating every rollout through state: no use of Bayes or V."""
        mass = [0.0] * VOCAB
        for rollout in self.rollouts:
            if rollout[: len(state)] == state:
                win = self.success(rollout)
                mass[rollout[len(state)]] += self.reach[rollout] * (win if outcome else 1.0 - win)
        total = math.fsum(mass)
        return [m / total for m in mass]


@pytest.fixture(params=[1.0, 0.3], ids=["T1", "T3"], scope="module")
def chain(request) -> Chain:
    return Chain(request.param)


def open_states(chain):
    """States where both outcomes are possible: the others carry no information."""
    return [s for s in chain.states if 0.0 < chain.value[s] < 1.0]


def h(p: float) -> float:
    """Entropy of a coin in nats."""
    return -sum(x * math.log(x) for x in (p, 1.0 - p) if x > 0.0)


def close(a, b):
    assert a == pytest.approx(b, rel=1e-12, abs=1e-12)


def test_bayes_ratio_through_the_two_stream_operation(chain):
    """1. P(Y|s,C=1)/pi(Y|s) = V(sY)/V(s), with the outcome-conditioned policy as the hindsight stream."""
    states = open_states(chain)
    rows = [(s, y) for s in states for y in range(VOCAB)]
    logits = torch.stack([chain.logits[s] for s, _ in rows])
    hindsight = torch.tensor([chain.conditioned(s, 1) for s, _ in rows], dtype=torch.float64).log()
    result = hindsight_information(logits, hindsight, torch.tensor([y for _, y in rows]))
    ratio = torch.tensor([chain.value[(*s, y)] / chain.value[s] for s, y in rows], dtype=torch.float64)
    torch.testing.assert_close(result.log_ratio, ratio.log(), **EXACT)  # a hopeless continuation has -inf on both sides
    assert (result.kl >= 0).all()
    assert (result.information >= 0).all()
    # The centring: under the policy's own samples log_ratio has the mean -KL, which is infinite where success can be lost in one step.
    probability = torch.tensor([chain.policy[s][y] for s, y in rows], dtype=torch.float64)
    mean = (probability * result.log_ratio).reshape(-1, VOCAB).sum(1)
    torch.testing.assert_close(mean, -result.kl.reshape(-1, VOCAB)[:, 0], **EXACT)


def test_pointwise_information_telescopes_over_tokens_and_segments(chain):
    """1. pmi sums to log V(end) - log V(start) over every segment and rollout, through segment_reduce."""
    rollouts = [r for r in chain.rollouts if chain.success(r) > 0]
    pmi = torch.tensor([math.log(chain.value[r[: t + 1]] / chain.value[r[:t]]) for r in rollouts for t in range(LENGTH)], dtype=torch.float64)
    cuts = (0, 2, 3, LENGTH)
    offsets = [b * LENGTH + cut for b in range(len(rollouts)) for cut in cuts[:-1]] + [len(rollouts) * LENGTH]
    segments = Segments(torch.tensor(offsets), torch.arange(0, 3 * len(rollouts) + 1, 3))
    by_segment = [math.log(chain.value[r[:b]] / chain.value[r[:a]]) for r in rollouts for a, b in itertools.pairwise(cuts)]
    torch.testing.assert_close(segment_reduce(pmi, segments), torch.tensor(by_segment, dtype=torch.float64), **EXACT)
    whole = segment_reduce(pmi, segments, level="sequence")
    wanted = math.log(chain.luck / chain.value[()])  # the same for every successful rollout
    torch.testing.assert_close(whole, torch.full_like(whole, wanted), **EXACT)


def test_advantage_form(chain):
    """2. V(s') - V(s) = V(s) (exp(pmi) - 1), a martingale difference: mean zero under the policy."""
    for state in open_states(chain):
        v, q = chain.value[state], chain.conditioned(state, 1)
        differences = [v * (q[y] / chain.policy[state][y] - 1.0) for y in range(VOCAB)]
        for y in range(VOCAB):
            close(chain.value[(*state, y)] - v, differences[y])
        close(sum(p * d for p, d in zip(chain.policy[state], differences, strict=True)), 0.0)


def test_log_odds_form(chain):
    """2. logit V(s') = logit V(s) + log P(Y|s,C=1)/P(Y|s,C=0)."""
    checked = 0
    for state in open_states(chain):
        win, lose = chain.conditioned(state, 1), chain.conditioned(state, 0)
        for y in range(VOCAB):
            v, after = chain.value[state], chain.value[(*state, y)]
            if 0.0 < after < 1.0:
                close(math.log(after / (1 - after)), math.log(v / (1 - v)) + math.log(win[y] / lose[y]))
                checked += 1
    assert checked > VOCAB**3


def information(chain, state) -> float:
    """I(Y; C | state) from the joint distribution of token and outcome, as its definition says."""
    total = 0.0
    for outcome in (0, 1):
        p_outcome = chain.value[state] if outcome else 1.0 - chain.value[state]
        if p_outcome > 0.0:
            conditioned = chain.conditioned(state, outcome)
            total += sum(p_outcome * q * math.log(q / p) for q, p in zip(conditioned, chain.policy[state], strict=True) if q > 0.0)
    return total


def test_conditional_mutual_information(chain):
    """3. I(Y; C | s) = h(V(s)) - E h(V(s')) >= 0, at most the entropy of the token and of the outcome."""
    largest = 0.0
    for state in chain.states:
        policy, i = chain.policy[state], information(chain, state)
        close(i, h(chain.value[state]) - sum(p * h(chain.value[(*state, y)]) for y, p in enumerate(policy)))
        assert -1e-13 <= i <= min(h(chain.value[state]), -sum(p * math.log(p) for p in policy)) + 1e-13
        largest = max(largest, i)
    assert largest > 0.05


def test_budget(chain):
    """4. sum_t E I(Y_t; C | s_t) = h(V(q)) - E h(V(end)): the last term is 0 where the rollout decides, and luck's share where it does not."""
    spent = math.fsum(chain.reach[s] * information(chain, s) for s in chain.states)
    left = math.fsum(chain.reach[r] * h(chain.success(r)) for r in chain.rollouts)
    close(spent, h(chain.value[()]) - left)
    if chain.luck == 1.0:
        assert left == 0.0
    else:
        decided = math.fsum(chain.reach[r] for r in chain.rollouts if sum(r) % 3 == 0)
        close(left, decided * h(0.3))
        assert left > 0.1


def test_information_of_the_operation_is_the_mutual_information(chain):
    """Averaged over outcomes, KL(P(.|s,C) || pi) is I(Y; C | s), because pi is the mixture of the two conditioned policies."""
    states = open_states(chain)
    logits = torch.stack([chain.logits[s] for s in states])
    ids, total = torch.zeros(len(states), dtype=torch.int64), torch.zeros(len(states), dtype=torch.float64)
    for outcome in (0, 1):
        q = torch.tensor([chain.conditioned(s, outcome) for s in states], dtype=torch.float64).log()
        p = torch.tensor([chain.value[s] if outcome else 1 - chain.value[s] for s in states], dtype=torch.float64)
        total += p * hindsight_information(logits, q, ids).information
    torch.testing.assert_close(total, torch.tensor([information(chain, s) for s in states], dtype=torch.float64), **EXACT)


def test_value_differences_give_the_policy_gradient(chain):
    """E[sum_t (V(s_t+1) - V(s_t)) grad log pi(y_t)] = E[C sum_t grad log pi(y_t)] = grad V(q), with the credit and the loss of the package.

    The first is the additive form with exact V and advantage 0, the second plain REINFORCE; the third differentiates V itself.
    """
    n = len(chain.rollouts) * LENGTH
    states = {s: i for i, s in enumerate(chain.states)}
    table = torch.stack([chain.logits[s] for s in chain.states]).requires_grad_()
    log_policy = table.log_softmax(1)
    rows = torch.tensor([states[r[:t]] for r in chain.rollouts for t in range(LENGTH)])
    logp = log_policy[rows, torch.tensor([y for r in chain.rollouts for y in r])]
    probability = torch.tensor([chain.reach[r] for r in chain.rollouts], dtype=torch.float64)
    segments = Segments(torch.arange(n + 1), torch.arange(0, n + 1, LENGTH))  # each token a step

    delta = torch.tensor([chain.value[r[: t + 1]] - chain.value[r[:t]] for r in chain.rollouts for t in range(LENGTH)], dtype=torch.float64)
    nothing = torch.zeros(len(chain.rollouts), dtype=torch.float64)
    shaped, _ = segment_credit(delta, segments, nothing, form="additive", gain=1.0, scale=1.0)
    torch.testing.assert_close(shaped, delta, rtol=0, atol=0)  # |dV| <= 1 is inside the clip
    outcome = torch.tensor([chain.success(r) for r in chain.rollouts], dtype=torch.float64)
    uniform, _ = segment_credit(delta, segments, outcome, reliability=0.0)

    def gradient(advantages):
        """Enumerated expectation: each rollout counts with its probability, as a [B] denominator."""
        loss = policy_loss(logp, None, advantages, segments, denominator=1.0 / probability).loss
        return -torch.autograd.grad(loss, table, retain_graph=True)[0]

    value = (torch.stack([logp.reshape(-1, LENGTH)[b].sum() for b in range(len(chain.rollouts))]).exp() * outcome).sum()
    (exact,) = torch.autograd.grad(value, table, retain_graph=True)
    assert exact.abs().max() > 1e-3
    torch.testing.assert_close(gradient(shaped), exact, **EXACT)
    torch.testing.assert_close(gradient(uniform), exact, **EXACT)
