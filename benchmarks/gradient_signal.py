"""How much of one batch's gradient is signal? Credit forms on the synthetic tasks, whose V is exactly known.

    python -m benchmarks.gradient_signal configs/compare/t2.yaml runs/compare/t2/warm/policy [KEY=VALUE ...] [--batches 120] [--out DIR]

The policy samples batches as in training and stays as it is; each form gives its advantages, and the loop's own loss the gradient. A column each:

    cosine    mean over batches of the cosine between the form's gradient and the true direction: the sum, over the OTHER batches, of the gradient
              whose advantage is the exact V behind each line minus that before it, in all groups. In Adam's metric, <g, h> = sum_i g_i h_i /
              sqrt(v_i), v the second moment of GRPO's gradient: what a step along g gains along h
    share     squared norm of the form's own mean gradient (without its noise) / mean squared norm of a batch's, in the same metric

Exact V is that of the process that wrote the warm-up traces, which the policy of the warm start is close to. Sources are given reliability 1.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

from acpo import comparison, credit
from acpo.attribution import group_std, zero_variance
from acpo.batch import Batch
from acpo.config import ConfigError
from acpo.trainer import Trainer
from acpo.update import gradients

from . import outputs
from .attribution_quality import overrides, trainer_of


def exact_differences(trainer: Trainer, batch: Batch, indices) -> Tensor:
    """Exact V behind the token's line minus V before it, [N]; 0 on filler, on the answer line, and from the first line on that is not of the form."""
    size, out = trainer.config.rollout.group_size, []
    for b, text in enumerate(trainer.tokenizer.batch_decode(batch.responses(), skip_special_tokens=True)):
        values = trainer.task.exact_values(trainer.train_problems[indices[b // size]], text)
        lines = torch.tensor([0, *(c == "\n" for c in text)], dtype=torch.int64).cumsum(0)[: len(text)]
        steps = torch.tensor(values, dtype=torch.float64).diff().nan_to_num()
        own = torch.where(lines < len(steps), steps[lines.clamp(max=len(steps) - 1)], 0.0)
        out.append(torch.nn.functional.pad(own, (0, batch.lengths[b] - len(own))))
    found = torch.cat(out)
    return found if trainer.filler is None else torch.where(torch.isin(batch.token["ids"], trainer.filler), 0.0, found)


def forms_of(trainer: Trainer, batch: Batch, outcome: Tensor, indices) -> dict[str, Tensor]:
    """Advantages [N] of every form."""
    config, size, segments = trainer.config, trainer.config.rollout.group_size, batch.segments
    sequence = segments.sequence_ids()
    plain = credit.outcome_advantages(outcome, size, "grpo")
    attribution = trainer._attribute(batch, outcome, indices)

    def assigned(form: str, mask: str, difficulty: float = 0.0) -> Tensor:
        settings = credit.CreditConfig(form=form, mask=mask, scope=config.credit.scope, difficulty=difficulty)
        return credit.assign(
            plain, outcome, attribution, segments, size, settings, ids=batch.token["ids"], entropy=batch.token["entropy"], filler=trainer.filler
        ).token_advantages

    exact = exact_differences(trainer, batch, indices)
    spread = group_std(outcome.double(), size).clamp(min=0.25).repeat_interleave(size)[sequence]
    mixed = ~zero_variance(outcome, size)[sequence]
    out = {
        "GRPO": plain[sequence], "GRPO, difficulty": assigned("none", "none", config.credit.difficulty), "GRPO, mask": assigned("none", "unchanged"),
    }  # fmt: skip
    if trainer.filler is not None:
        out["GRPO, filler known"] = assigned("none", "filler")
    out |= {
        "credit": assigned("additive", "none"), "credit, mask": assigned("additive", "unchanged"),
        "credit, mask, difficulty": assigned("additive", "unchanged", config.credit.difficulty),
        "exact V, groups with both outcomes": exact / spread * mixed, "exact V": exact / spread, "GRPO + exact V": plain[sequence] + exact / spread,
    }  # fmt: skip
    return {"true direction": exact, **{name: value.float() for name, value in out.items()}}


def gradient(trainer: Trainer, batch: Batch, advantages: Tensor) -> Tensor:
    batch.token["advantages"] = advantages.float()
    trainer.optimizer.zero_grad(set_to_none=True)
    loss = trainer.config.loss
    gradients(batch, list(range(len(batch))), trainer.policy, trainer.config, (loss.clip_low, loss.clip_high), trainer.ranks)
    found = trainer.policy.trained().values()
    return torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.flatten().cpu() for p in found]).double()


def collect(trainer: Trainer, batches: int) -> dict[str, Tensor]:
    """Gradients [batches, parameters] of every form."""
    found: dict[str, list[Tensor]] = {}
    for _ in range(batches):
        trainer.step_number += 1
        indices, batch, outcome = trainer._rollout()
        trainer._score(batch, outcome, indices)
        trainer._segment(batch)
        for name, advantages in forms_of(trainer, batch, outcome, indices).items():
            found.setdefault(name, []).append(gradient(trainer, batch, advantages))
    return {name: torch.stack(rows) for name, rows in found.items()}


def table(found: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    scale = found["GRPO"].square().mean(0).clamp(min=1e-24) ** 0.25
    truth = found["true direction"] / scale
    others = truth.sum(0) - truth  # of the other batches
    out = {}
    for name, rows in found.items():
        if name == "true direction":
            continue
        scaled = rows / scale
        norm, n = scaled.norm(dim=1), len(rows)
        some = norm > 0
        cosine = ((scaled * others).sum(1)[some] / norm[some] / others.norm(dim=1)[some]).mean()
        total = scaled.sum(0)
        signal = (total @ total - scaled.square().sum()) / (n * (n - 1))
        out[name] = {"cosine": float(cosine), "share": float(signal / scaled.square().sum(1).mean()), "batches": int(some.sum())}
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparison", type=Path)
    parser.add_argument("policy", type=Path)
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--batches", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=outputs.folder, default="runs/gradient_signal")
    chosen = parser.parse_args()
    more = overrides(parser, chosen.settings)
    try:
        common = comparison.load(chosen.comparison).settings
    except ConfigError as error:
        parser.error(str(error))
    own = {
        "attribution.source": "hindsight,tree", "attribution.reliability": 1.0, "credit.scope": "own", "credit.mask": "unchanged",
        "entropy.controller": "none", "loss.kl_weight": 0.0,
        **{key: value for key, value in common.items() if key == "rollout.prompts" or key.startswith("segmenter.")},
    }  # fmt: skip
    trainer = trainer_of(chosen.comparison, chosen.policy, chosen.seed, {**own, **more})
    try:
        found = table(collect(trainer, chosen.batches))
    finally:
        trainer.close()
    path = chosen.out / f"{chosen.comparison.stem}.json"
    results = {"comparison": chosen.comparison.stem, "settings": more, "seed": chosen.seed, "batches": chosen.batches, "forms": found}
    path.write_text(json.dumps(results, indent=1), encoding="utf-8")
    print(f"{path}\n\n| advantage | cosine | share |\n|---|---|---|")
    for name, row in found.items():
        print(f"| {name} | {row['cosine']:.3f} | {row['share']:.4f} |")


if __name__ == "__main__":
    main()
