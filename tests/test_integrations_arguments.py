"""What `StepCredit` refuses: settings, batches and states that cannot be, by name and before anything is learned."""

from __future__ import annotations

import math

import pytest
import torch
from test_integrations_functional import ANSWERS, FIXED, OUTCOME, SMALL, TOKENIZER, assigned, batch, credit_of

from acpo.config import ConfigError
from acpo.integrations.functional import StepCredit


@pytest.mark.parametrize(
    ("settings", "options", "message"),
    [
        ({"credit.form": "wieghts"}, {}, "settings: credit.form must be one of"),
        ({"attribution.source": "tree,probe"}, {}, "attribution.source 'probe' needs the policy itself"),
        ({"entropy.covariance": "always"}, {}, "entropy.covariance = 'always' is our own loop's"),
        ({"segmenter.fixed": 4}, {}, "segmenter.fixed, attribution.control"),
        ({"stages.two": True}, {}, "total_steps, how long training goes on, must be given with stages.two = True$"),
        ({"entropy": {"controller": "target"}}, {}, "must be given with entropy.controller = 'target'$"),
        ({"curriculum.sampler": "thompson"}, {}, "curriculum.sampler must be left out, got 'thompson': the loop draws the prompts itself"),
        ({"attribution": None}, {}, "settings: 'attribution' is a section and must hold a mapping of its settings"),
        ({}, {"group_size": 1}, "group_size must be an integer of at least 2"),
        *(({"stages.two": True}, {"total_steps": n}, f"total_steps must be an integer of at least 1, got {n}") for n in (0, True, 1.5)),
    ],
)
def test_settings_that_cannot_be(settings, options, message):
    with pytest.raises(ValueError, match=message):
        StepCredit(TOKENIZER, **{"group_size": 4, "settings": settings, **options})
    assert issubclass(ConfigError, ValueError)
    with pytest.raises(TypeError, match="settings must be a mapping of the method's settings, got str"):
        StepCredit(TOKENIZER, group_size=4, settings="tree")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"outcome": OUTCOME * 2}, r"outcome must lie in \[0, 1\], or be NaN where there is none, got 2.0 for rollout 0"),
        ({"outcome": OUTCOME[:6]}, "outcome must hold whole groups of 4 neighbours"),
        ({"groups": [0, 0, 0, 1, 1, 1, 1, 1]}, "groups must hold group_size = 4 rollouts of every prompt, got 3 of 0"),
        ({"groups": [0]}, "groups must name the prompt of each of the 8 rollouts, got 1 names"),
        ({"log_ratio": None}, "log_ratio and kl must be given with attribution.source = 'hindsight,tree'"),
        ({"answers": None}, "answers must be given with the hindsight source"),
        ({"answers": ["1"]}, "answers must hold one text a rollout, 8, got 1"),
        ({"entropy": torch.zeros(8, 2)}, r"entropy must be \[B,T\]"),
        ({"mask": torch.zeros(8, 2)}, r"mask must be \[B,T\]"),
        ({"ids": torch.zeros(7, 2, dtype=torch.int64)}, r"ids must be \[B,T\] with B = 8"),
        ({"advantages": torch.zeros(7)}, r"advantages must be \[B\] = \(8,\)"),
        ({"prior": torch.zeros(8, 1)}, r"prior must be \[B\]"),
        ({"prior": torch.full((8,), 1.5)}, r"prior must lie in \[0, 1\], got 1.5 for rollout 0"),
        ({"answers": [10] * 8}, "answers must hold one text a rollout, got 10"),
        ({"prior": [0.5] * 8}, r"prior must be a torch\.Tensor, got list"),
        ({"outcome": OUTCOME.tolist()}, r"outcome must be a torch\.Tensor, got list"),
        ({"mask": [[True]]}, r"mask must be a torch\.Tensor, got list"),
        ({"groups": [[0]] * 8}, "groups must hold a hashable name a rollout"),
        ({"entropy": batch()["entropy"] * math.nan}, "entropy must be finite at every token that the policy wrote, got NaN or inf at 227"),
        ({"entropy": batch()["entropy"] * math.inf}, "entropy must be finite at every token that the policy wrote, got NaN or inf at 227"),
        ({"outcome": None}, r"outcome must be a torch\.Tensor, got NoneType"),
        ({"outcome": torch.tensor(1.0)}, r"outcome must be \[B\], got \(\)"),
        ({"advantages": torch.tensor([math.nan, *[1.0] * 6, math.inf])}, "advantages must be finite, got NaN or infinity for 2 of 8 rollouts"),
        ({"logp": batch()["logp"] * math.nan}, "logp must be at most 0 at every token that the policy wrote, got NaN or more at 227"),
        ({"logp": -batch()["logp"]}, "logp must be at most 0 at every token that the policy wrote, got NaN or more at 22"),
        *(({"step": step}, f"step must be an integer of at least 1, got {step!r}") for step in ("a", 0, -1, 1.5, True)),
        ({"groups": 3}, "groups must be a sequence with the name of each rollout's prompt, got int"),
        *(
            ({name: batch()["mask"] * value}, f"{name} must hold True and False, or 1 and 0, got {value} for rollout 0")
            for name in ("mask", "written")
            for value in (0.5, math.nan)
        ),
        ({"finished": torch.tensor([1.0, math.nan] * 4)}, "finished must hold True and False, or 1 and 0, got nan for rollout 1"),
        *(
            ({"answer_start": torch.tensor([-1.0] * 7 + [place])}, f"answer_start must be -1 or the place of a token in its response, .* got {place}")
            for place in (0.5, 1.0, -2.0, math.nan, math.inf)
        ),
    ],
)
def test_batches_that_cannot_be(change, message):
    credit = credit_of()
    before = credit.state()
    with pytest.raises((ValueError, TypeError), match=message):
        credit(**{**batch(), "outcome": OUTCOME, "answers": ANSWERS, **change})
    assert credit.state() == before, "a batch that is refused teaches nothing"


def test_errors_name_the_callers_rollouts():
    tensors, groups = batch(), ["a", "b"] * 4  # taken in the order 0, 2, 4, 6, 1, 3, 5, 7
    ids = tensors["ids"].clone()
    ids[1, 3] = 10**6
    for change, got in (
        ({"answer_start": torch.tensor([-1, 99, *[-1] * 6])}, "answer_start .*, got 99"),
        ({"ids": ids}, "ids must lie in .* = 258, got 1000000"), ({"prior": torch.tensor([0.5, 2.0, *[0.5] * 6])}, "prior .*, got 2.0"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"{got} for rollout 1$"):
            assigned(credit_of(), {**tensors, **change}, groups=groups)


def test_what_a_tool_wrote_needs_no_entropy():
    tensors = batch()
    written = tensors["mask"].clone()
    written[:, 2:4] = False
    tensors["entropy"][:, 2:4] = tensors["logp"][:, 2:4] = math.nan
    credit = credit_of()
    assert assigned(credit, tensors, written=written).advantages.isfinite().all() and math.isfinite(credit.forks.value)


def test_entropy_is_asked_for_by_those_that_need_it():
    without = {name: value for name, value in batch().items() if name != "entropy"}
    assert assigned(credit_of(), without).advantages.count_nonzero() > 0
    for settings in ({"entropy.controller": "constant"}, {"credit.token": "entropy"}, {"attribution.source": "entropy"}):
        credit = credit_of({**FIXED, **settings})
        assert credit.needs_entropy
        with pytest.raises(ValueError, match=r"entropy must be given with an entropy\.controller"):
            assigned(credit, without)


def test_states_that_cannot_be():
    settings = {**SMALL, "entropy.controller": "target", "stages.two": True, "credit.scope": "all"}
    one, two = (credit_of(settings, total_steps=20) for _ in range(2))
    assigned(one)
    with pytest.raises(ValueError, match=r"state must be of attribution\.source = 'tree', got one of 'hindsight, tree'"):
        credit_of({**SMALL, "attribution.source": "tree"}).load(one.state())
    for broken, got in (({}, r"got \[\]"), (None, "got NoneType")):
        with pytest.raises(ValueError, match=rf"state must be what StepCredit\.state\(\) gave, with panel, .*, {got}"):
            one.load(broken)
    whole = one.state()
    tree = whole["panel"]["tree"]
    for change, message in (
        (dict.fromkeys(whole, 1), "state.panel must hold hindsight, tree, got int"),
        ({"entropy": {"bogus": 1}}, "state.entropy must hold weight, .*, got bogus"),
        ({"entropy": {**whole["entropy"], "weight": "1"}}, "state.entropy.weight must be of the kind of 0.001, got '1'"),
        ({"batches": True}, "state.batches must be of the kind of 0, got True"), ({"success": []}, r"state.success must be .* None, got \[\]"),
        ({"stages": {**whole["stages"], "history": ["a"]}}, "state.stages.history"),
        ({"panel": {**whole["panel"], "tree": {}}}, "state.panel.tree must hold calibrator, reliability, batches, got nothing"),
        ({"panel": {**whole["panel"], "tree": {**tree, "calibrator": {**tree["calibrator"], "batches": [[[1.0]]]}}}}, "shape|size"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            one.load({**whole, **change})
        assert one.state() == whole
    two.load({**whole, "panel": {name: {k: v for k, v in own.items() if k != "batches"} for name, own in whole["panel"].items()}})
    assert two.state()["entropy"] == whole["entropy"], "a state of an earlier release has no `batches` of a source"
