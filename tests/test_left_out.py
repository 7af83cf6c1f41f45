"""Rollouts that the verifier leaves out: no part in the loss, in the controllers or in what is reported, and a run that goes on."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from loop import parameters, records, steps, train, trainer_of

from acpo.verify import Verdict

SMALL = "warmup.steps=0", "trainer.steps=2", "eval.samples=2", "trainer.eval_every=2", "verify.workers=1"


@pytest.fixture(autouse=True)
def one_thread(deterministic):
    torch.set_num_threads(1)


def leave_out(trainer, rows: list[int]):
    """Makes the verifier leave out these rollouts of every call."""
    real = trainer.verifier.submit

    def submit(problems, texts):
        pending = real(problems, texts)
        pending.known = [Verdict(None, "skipped") if b in rows else v for b, v in enumerate(pending.known)]
        return pending

    trainer.verifier.submit = submit


@pytest.mark.parametrize(
    "settings", [("method=grpo",), ("method=grpo", "loss.denominator=sequences", "credit.advantage=rloo"), ("method=gspo", "loss.minibatches=1")]
)
def test_the_update_does_not_see_them(tmp_path, warmed, settings):
    """Other tokens in the rollouts that are left out: bitwise the same weights after the update; in one that is not: others."""
    after, counted = [], None
    for changed in (None, 1, 5, "counted"):
        changed = counted if changed == "counted" else changed
        trainer = trainer_of(tmp_path / str(changed), *settings, "rollout.prompts=8", "rollout.group_size=8", weights=warmed)
        leave_out(trainer, [1, 5, 6])
        trainer.step_number += 1
        indices, batch, outcome = trainer._rollout()
        assert outcome.isnan().nonzero().flatten().tolist() == [1, 5, 6]
        if changed is not None:
            batch.token["ids"][batch.tokens_of([changed])] = 7
        trainer._score(batch, outcome, indices)
        trainer._segment(batch)
        advantages, _ = trainer._credit(batch, outcome, trainer._attribute(batch, outcome, indices))
        assert (advantages[[1, 5, 6]] == 0).all() and batch.token["advantages"].isfinite().all()
        counted = int(advantages.nonzero()[0]) if counted is None else counted
        losses = trainer._update(batch)
        assert math.isfinite(losses["loss"])
        after.append(parameters(trainer))
    same = [all(torch.equal(after[0][n], other[n]) for n in other) for other in after[1:]]
    assert same == [True, True, False]


@pytest.mark.parametrize("source", ["hindsight,tree", "hindsight,tree,head", "entropy", "probe,tree"])
@pytest.mark.parametrize("scope", ["own", "all"])
def test_no_source_is_confused_by_them(tmp_path, warmed, source, scope):
    scope = "own" if "tree" in source else scope
    trainer = trainer_of(tmp_path, f"attribution.source={source}", f"credit.scope={scope}", "rollout.prompts=6", weights=warmed)
    leave_out(trainer, [0, 1, 2, 3, 4, 9, 14])  # the whole first group, one of two others
    for metrics in steps(trainer, 3):
        assert all(math.isfinite(v) for v in metrics.values() if isinstance(v, float)), {k: v for k, v in metrics.items() if v != v}
        assert metrics["verify/skipped"] == 7
    assert all(p.isfinite().all() for p in trainer.policy.parameters())
    assert all(math.isfinite(x) for b in trainer.attributors.by_name.values() for x in b.calibrator.with_evidence)


def test_the_curriculum_counts_trials_without_them(tmp_path, warmed):
    trainer = trainer_of(tmp_path, weights=warmed)
    leave_out(trainer, [0, 1, 2, 3, 5])
    trainer.step_number += 1
    indices, _, outcome = trainer._rollout()
    expected = copy.deepcopy(trainer.curriculum)
    trainer._control(1.0)
    for g in range(1, 4):  # the first group has no trial at all
        known = outcome[4 * g : 4 * g + 4]
        known = known[~known.isnan()]
        expected.update(indices[g : g + 1], known.sum(0, keepdim=True).numpy(), len(known))
    assert trainer.curriculum.state() == expected.state()


def test_a_run_whose_callable_leaves_some_out(tmp_path):
    assert train(tmp_path, *SMALL, "verify.kind=verifiers:mostly") == 0
    found = [r for r in records(tmp_path / "run") if r["step"] > 0]
    assert sum(r["verify/skipped"] for r in found) > 0 and all(r["verify/kills"] == 0 for r in found)
    assert all(math.isfinite(v) for r in found for v in r.values() if isinstance(v, float))
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = parquet.read_table(tmp_path / "run" / "rollouts" / "step-1.parquet").to_pylist()
    assert sum(r["outcome"] is None for r in rows) == found[0]["verify/skipped"]
    for row in rows:
        assert (row["outcome"] is None) == (sum(row["response"].encode()) % 3 == 0)


def test_a_run_whose_callable_leaves_all_out_changes_nothing(tmp_path, warmed):
    trainer = trainer_of(tmp_path, "verify.kind=verifiers:nothing", "verify.workers=1", weights=warmed)
    before = parameters(trainer)
    (metrics,) = steps(trainer, 1)
    trainer.close()
    assert metrics["verify/skipped"] == 16 and metrics["reward"] == 0.0 and metrics["grad_norm"] == 0.0
    assert all(torch.equal(before[n], p) for n, p in parameters(trainer).items())


@pytest.mark.parametrize("worth", ["zero", "skip"])
def test_a_run_whose_verifier_hangs_at_times(tmp_path, worth):
    few = "eval.samples=0", "problems.held_out=6", "verify.kind=verifiers:late", "verify.timeout=0.5", "rollout.prompts=2"
    assert train(tmp_path, *SMALL, *few, f"verify.on_timeout={worth}") == 0
    found = [r for r in records(tmp_path / "run") if r["step"] > 0]
    hung = sum(r["verify/timeouts"] for r in found)
    assert hung > 0 and sum(r["verify/kills"] for r in found) == hung and sum(r["verify/skipped"] for r in found) == (hung if worth == "skip" else 0)
    assert found[-1]["eval/verify/timeouts"] > 0 and "time/verify" in found[0]


def test_a_callable_that_always_raises_is_one_line(tmp_path, capsys):
    assert train(tmp_path, *SMALL, "verify.kind=verifiers:Scorer") == 1
    error = capsys.readouterr().err.strip()
    assert error == "acpo: verify.kind: 'verifiers:Scorer' raised for every rollout: TypeError: Scorer() takes no arguments"


def test_a_callable_that_is_missing_is_one_line_before_anything_is_written(tmp_path, capsys):
    assert train(tmp_path, *SMALL, "verify.kind=verifiers:absent") == 2
    error = capsys.readouterr().err.strip()
    assert error == "acpo: verify.kind: 'verifiers:absent' cannot be used: AttributeError: module 'verifiers' has no attribute 'absent'"
    assert not (tmp_path / "run").exists()
