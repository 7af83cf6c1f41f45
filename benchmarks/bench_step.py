"""One step of the whole loop: ACPO, GRPO of the same loop, and TRL's GRPOTrainer, in turn on one policy and the same rollouts.

All three begin with the same weights and learn at a rate of nothing, so every step of all three sees the rollouts that ours sampled; outcomes
are dealt, not verified, so that the groups are what the row says: `mixed`, half of each group right (hindsight reads one right and one wrong
rollout of each); `equal`, nobody right (hindsight reads every rollout: the most that it costs, in a batch that teaches GRPO nothing, and whose
rows without a gradient our loss skips). Seconds are the trainer's own (`time/*` of its metrics), lower quartile over the steps; what no part holds
(metrics, controllers) is `rest`. Rollouts and optimiser are the same work for ACPO and GRPO and are pooled.

The policy is a random Qwen2, of width 64 on the CPU (256: --shapes large) and of the size of Qwen2.5-0.5B on a GPU; problems and Qwen2's
tokenizer (V = 151,936) from ../shared/data where they are, else the twenty problems of tests/fixtures and bytes. TRL samples nothing here, and
its clipping is in no part.

A step that is not timed gives the memory that it holds behind its rollouts: of ours one more, of TRL the first, whose optimiser makes its two
moments. Errors are the largest difference over the largest value, against the same weights and rollouts in float64: of the scored log-probs and,
of ours, of the gradient of an optimiser step.
"""

from __future__ import annotations

import contextlib
import copy
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers.models.qwen2 import modeling_qwen2

import acpo.update
from acpo import config, policy, verify
from acpo.attribution import MIN_BOUNDARIES
from acpo.run import Run
from acpo.trainer import Trainer

from .clocks import Peak, quartile
from .peers import trl

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data"
PARTS = {
    "rollout": "sampling and verifying", "score": "scoring forward: log-prob, entropy", "hindsight": "hindsight forward, the body (the extra one)",
    "information": "information kernel: both streams through the head, their log-prob and entropy", "segment": "segmentation",
    "reference": "reference forward: log-prob",
    "attribute": "calibrator, tree, values, reliability", "credit": "token advantages, bonus weights", "update": "loss and backward",
    "optimizer": "clipping and AdamW", "rest": "metrics, controllers",
}  # fmt: skip
SAME = ("rollout", "optimizer")  # in ACPO and GRPO
# (prompts, rollouts a prompt, tokens a rollout, measured steps)
SHAPES = {
    ("small", "cpu"): (2, 2, 16, 2), ("default", "cpu"): (4, 4, 16, 4), ("large", "cpu"): (4, 4, 64, 4),
    ("small", "cuda"): (2, 2, 16, 2), ("default", "cuda"): (8, 8, 256, 3), ("large", "cuda"): (8, 8, 256, 3),
}  # fmt: skip
# (hidden, intermediate, layers, heads), where it is not the tiny one of acpo.policy: a head as wide as a real one costs what it costs there
SIZES = {("large", "cpu"): (256, 688, 4, 4), ("default", "cuda"): (896, 4864, 24, 14), ("large", "cuda"): (896, 4864, 24, 14)}


def trainer(method: str, folder: Path, device: torch.device, shapes: str) -> Trainer:
    prompts, group, tokens, _ = SHAPES[shapes, device.type]
    real = (DATA / "gsm8k" / "dev.jsonl").exists() and shapes != "small"
    problems, tokenizer = (
        (DATA / "gsm8k" / "dev.jsonl", DATA / "tokenizer_qwen2") if real else (ROOT / "tests" / "fixtures" / "problems.jsonl", "bytes")
    )
    settings = config.load(ROOT / "configs" / "gsm8k.yaml", [
        f"method={method}", f"run_dir={folder / method}", f"problems.path={problems}", f"policy.tokenizer={tokenizer}", "problems.held_out=4",
        "policy.from_config=tiny", f"policy.device={device.type}", f"rollout.prompts={prompts}", f"rollout.group_size={group}",
        f"policy.dtype={'bfloat16' if device.type == 'cuda' else 'float32'}", f"rollout.max_new_tokens={tokens}", "curriculum.sampler=uniform",
        "optimizer.learning_rate=1e-12", f"trainer.threads={torch.get_num_threads()}", "trainer.keep_rollouts=false",
    ])  # fmt: skip
    one = Trainer(settings, Run(settings))
    for attributor in one.attributors.by_name.values():
        # Past the first steps, in which hindsight reads everything to be measured at all; and believed: of a shut gate one batch of four is read.
        reliability = attributor.reliability
        reliability.boundaries, reliability.m0, reliability.m1 = MIN_BOUNDARIES, 1.0, 0.5
    return one


def step(one: Trainer) -> dict[str, float]:
    before = one.counters["tokens/generated"]
    begin = time.perf_counter()
    one.step_number += 1
    metrics = one.step()
    metrics["time/rest"] = time.perf_counter() - begin - metrics["step_time"]
    read = float(one.taken.sequence["hindsight"].repeat_interleave(torch.tensor(one.taken.lengths, device=one.policy.device)).float().mean())
    return metrics | {"read": read, "generated": one.counters["tokens/generated"] - before, "batch": one.taken}


def keep_batches(one: Trainer) -> None:
    """one.taken is the batch of the last step; one.peak, where it is set, begins behind its rollouts."""
    rollout, one.peak = one._rollout, None

    def kept():
        indices, one.taken, outcome = rollout()
        if one.peak is not None:
            one.peak.begin()
        return indices, one.taken, outcome

    one._rollout = kept


def held(one: Trainer) -> int | None:
    """The memory of one more step, behind its rollouts."""
    one.peak = Peak(one.policy.device)
    step(one)
    taken, one.peak = one.peak, None
    return taken.bytes()


def gradient_error(one: Trainer, patch: pytest.MonkeyPatch) -> float:
    """Of the last optimiser step of one more step, which goes through the fused loss; in float64 the same call goes through the reference."""
    inner, seen = acpo.update.gradients, {}

    def kept(batch, rows, policy, *rest):
        sums = inner(batch, rows, policy, *rest)
        seen.update(batch=batch, arguments=(rows, *rest), gradient={n: p.grad.clone() for n, p in policy.trained().items() if p.grad is not None})
        return sums

    with patch.context() as changed:
        changed.setattr(acpo.update, "gradients", kept)
        step(one)
    batch = copy.copy(seen["batch"])
    batch.token = {name: x.double() if x.is_floating_point() else x for name, x in batch.token.items()}
    # Weights that learn nothing are those that sampled and the reference's: their log-probs are float64's too, or the gradient of the KL, which is
    # 0, would be one of float32's roundings.
    own = exact_logp(one, batch, patch)
    batch.token |= {name: own for name in ("old_logp", "ref_logp") if name in batch.token}
    rows, *rest = seen["arguments"]
    with in_float64(one.policy, patch) as exact:
        inner(batch, rows, exact, *rest)
    wanted = {name: p.grad for name, p in exact.trained().items() if p.grad is not None}
    assert wanted.keys() == seen["gradient"].keys()
    largest = max(x.abs().max().item() for x in wanted.values())
    return max((seen["gradient"][name] - x).abs().max().item() for name, x in wanted.items()) / max(largest, 1e-300)


def exact_logp(one: Trainer, batch, patch: pytest.MonkeyPatch) -> torch.Tensor:
    with in_float64(one.policy, patch) as exact, torch.no_grad():
        return exact.score(exact.hidden(batch.prompts, batch.responses()), batch.token["ids"], batch.temperature).logp


@contextlib.contextmanager
def in_float64(policy, patch: pytest.MonkeyPatch):
    """A copy of the policy that computes in float64 throughout: Qwen2's normalisation would compute in float32 whatever it is given."""

    def forward(norm, x):
        return norm.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.variance_epsilon))

    exact = copy.deepcopy(policy).double()
    exact.dtype = torch.float32  # as it is written: no autocast
    exact.zero_grad(set_to_none=True)
    with patch.context() as changed:
        changed.setattr(modeling_qwen2.Qwen2RMSNorm, "forward", forward)
        yield exact


def relative(got: torch.Tensor, exact: torch.Tensor) -> float:
    return ((got.double() - exact).abs().max() / exact.abs().max()).item()


@pytest.mark.parametrize("outcomes", ["mixed", "equal"])
def test_step(run, device, shapes, tmp_path, monkeypatch, outcomes):
    prompts, group, _, count = SHAPES[shapes, device.type]
    dealt = np.tile(np.arange(group) < (group // 2 if outcomes == "mixed" else 0), prompts).astype(np.float64)
    monkeypatch.setattr(verify, "rewards", lambda problems, *_: dealt.copy())
    monkeypatch.setitem(policy.SIZES, "tiny", SIZES.get((shapes, device.type), policy.SIZES["tiny"]))
    ours = {method: trainer(method, tmp_path, device, shapes) for method in ("acpo", "grpo")}
    records: dict[str, list[dict]] = {"acpo": [], "grpo": [], "trl": []}
    for one in ours.values():
        keep_batches(one)

    def turn() -> tuple[list[list[int]], list[list[int]], list[float]]:
        for method, one in ours.items():
            records[method].append(step(one))
        batch = ours["grpo"].taken
        return batch.prompts, [ids.tolist() for ids in batch.responses()], dealt.tolist()

    refusal = "compared where the groups are mixed"
    if outcomes == "mixed":
        try:
            records["trl"] = trl.grpo_steps(
                ours["grpo"], turn, (count if device.type == "cuda" else 1) + 1, Peak(device)
            )  # on the CPU one takes as long as ten of ours and more
        except Exception as error:  # absent, or a refusal: ours is measured all the same, and an error of ours comes again below
            refusal = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    while len(records["grpo"]) <= count:
        turn()
    peaks = {method: held(one) for method, one in ours.items()}
    if records["trl"]:
        peaks["trl"] = records["trl"][0]["peak_bytes"]
    records = {method: rows[1:] for method, rows in records.items()}  # the first one warms up
    for a, b in zip(records["acpo"], records["grpo"], strict=True):  # the same rollouts: else the table compares nothing
        assert a["generated"] == b["generated"] and a["entropy"] == pytest.approx(b["entropy"], rel=1e-3)
    scored = {method: rows[0]["batch"].token["old_logp"] for method, rows in records.items() if method in ours}
    if records["trl"]:
        scored["trl"] = records["trl"][0]["old_logp"]
    exact = exact_logp(ours["grpo"], records["grpo"][0]["batch"], monkeypatch)
    errors = {method: {"old_logp": relative(logp, exact)} for method, logp in scored.items()}
    limit = 1e-5 if device.type == "cpu" else 2e-2
    for method, one in ours.items():
        errors[method]["gradient"] = gradient_error(one, monkeypatch)
        assert max(errors[method].values()) < (limit if device.type == "cpu" else 0.1), f"{method} is wrong, no step is shown: {errors[method]}"
    if "trl" in errors and not errors["trl"]["old_logp"] < limit:
        records["trl"], refusal = [], f"scored log-probs that are {errors['trl']['old_logp']:.1e} from float64"
    seconds = {method: {part: quartile([r.get(f"time/{part}", 0.0) for r in rows]) for part in PARTS} for method, rows in records.items() if rows}
    for part in SAME:
        both = quartile([r[f"time/{part}"] for method in ours for r in records[method]])
        for method in ours:
            seconds[method][part] = both
    if records["trl"]:
        seconds["trl"] = {part: value for part, value in seconds["trl"].items() if value}
    shape = {"B": prompts * group, "N": int(records["grpo"][0]["generated"]), "V": ours["acpo"].policy.vocab_size}
    common = {
        "op": "step", "shape": shape, "outcomes": outcomes, "dtype": ours["acpo"].config.policy.dtype, "device": device.type,
        "threads": torch.get_num_threads(), "read": float(np.mean([r["read"] for r in records["acpo"]])), "correct": True,
    }  # fmt: skip
    rows = [
        {
            **common, "mode": method, "kind": "part", "provider": part, "note": PARTS[part], "part_seconds": value, "rounds": len(records[method]),
            "peak_bytes": peaks[method], "errors": errors[method],
        }
        for method in seconds for part, value in seconds[method].items()
    ]  # fmt: skip
    if "trl" not in seconds:
        rows.append({**common, "mode": "trl", "kind": "absent", "provider": "TRL GRPOTrainer", "why": refusal})
    run.record(rows, [r["step_time"] - r["time/rollout"] for r in records["acpo"]])
