"""What ACPO adds to a GRPO step: both methods in turn on one policy, one seed, uniform problems and a learning rate of nothing, so that both
see the same rollouts. The seconds are the trainer's own (`time/*` of its metrics), the lower quartile over the steps.

The tiny random policy is right nowhere, so every group is without variance and the hindsight forward reads EVERY rollout: the most
that it costs. Policy: configs/gsm8k.yaml with policy.from_config=tiny; problems and Qwen2's tokenizer (V = 151,936) from
../shared/data where they are, else the twenty problems of tests/fixtures and bytes.
"""

from __future__ import annotations

from pathlib import Path

import torch

from acpo import config
from acpo.run import Run
from acpo.trainer import Trainer

from .common import quartile

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data"
PARTS = {  # part: what it is, and whether GRPO has it too
    "rollout": "sampling and verifying", "score": "scoring forward: log-prob, entropy", "segment": "segmentation",
    "hindsight": "hindsight forward (the extra one)", "information": "information kernel", "attribute": "calibrator, values, reliability",
    "credit": "token advantages, bonus weights", "update": "loss and backward", "optimizer": "clipping and AdamW",
}  # fmt: skip
# (prompts, rollouts a prompt, tokens a rollout, measured steps)
SHAPES = {"small": (1, 2, 16, 2), "default": (2, 4, 96, 6), "large": (8, 8, 256, 6)}


def trainer(method: str, folder: Path, device: torch.device, shapes: str) -> Trainer:
    prompts, group, tokens, _ = SHAPES[shapes]
    real = (DATA / "gsm8k" / "dev.jsonl").exists() and shapes != "small"
    problems, tokenizer = (
        (DATA / "gsm8k" / "dev.jsonl", DATA / "tokenizer_qwen2") if real else (ROOT / "tests" / "fixtures" / "problems.jsonl", "bytes")
    )
    settings = config.load(ROOT / "configs" / "gsm8k.yaml", [
        f"method={method}", f"run_dir={folder / method}", f"problems.path={problems}", f"policy.tokenizer={tokenizer}", "problems.held_out=4",
        "policy.from_config=tiny", f"policy.device={device.type}", f"rollout.prompts={prompts}", f"rollout.group_size={group}",
        f"rollout.max_new_tokens={tokens}", "curriculum.sampler=uniform", "optimizer.learning_rate=1e-12",
        f"trainer.threads={torch.get_num_threads()}",
    ])  # fmt: skip
    return Trainer(settings, Run(settings))


def test_step(run, device, shapes, tmp_path):
    prompts, group, tokens, count = SHAPES[shapes]
    trainers = {method: trainer(method, tmp_path, device, shapes) for method in ("acpo", "grpo")}
    records: dict[str, list[dict]] = {method: [] for method in trainers}
    for step in range(count + 1):
        for method, one in trainers.items():
            one.step_number += 1
            metrics = one.step()
            if step:  # the first one warms up
                records[method].append(metrics)
    for a, b in zip(*records.values(), strict=True):  # the same rollouts: else the table compares nothing
        assert a["completions/mean_length"] == b["completions/mean_length"] and a["reward"] == b["reward"]
    seconds = {method: {part: quartile([r.get(f"time/{part}", 0.0) for r in rows]) for part in PARTS} for method, rows in records.items()}
    vocab = trainers["acpo"].policy.vocab_size
    shape = {"rollouts": prompts * group, "tokens": tokens, "V": vocab}
    rows = [
        {
            "op": "step", "mode": method, "shape": shape, "dtype": "float32", "device": device.type, "threads": torch.get_num_threads(),
            "kind": "part", "provider": part, "note": note, "correct": True, "part_seconds": seconds[method][part], "rounds": count,
        }
        for method in seconds for part, note in PARTS.items()
    ]  # fmt: skip
    run.record(rows, [r["step_time"] - r["time/rollout"] for r in records["acpo"]])
