"""How well does an attribution find what a step did? Transformers on the synthetic tasks, whose V is exactly known.

    python -m benchmarks.attribution_quality configs/compare/multiplication.yaml runs/compare/multiplication/warm/policy [KEY=VALUE ...] [--out DIR]

The policy samples groups as in training; every source attributes every rollout (reliability as it would gate it, calibrated on earlier batches
only). One table, one figure:

    spearman       mean over rollouts of the rank correlation of phi with the exact change of V, line by line (rollouts where V changes)
    first error    share of wrong rollouts whose lowest line is the first wrong one; F1: harmonic mean of that with a threshold ("no error" if
                   nothing is below it) and of the share of flawless rollouts that are called flawless; the threshold is fitted on the other half
    captured       (log-loss of what is known before the steps - log-loss of Vhat at the last line) / entropy of the outcome
    calibration    expected calibration error of Vhat at the lines, ten bins
    planted        share of planted systematic errors found; sign of both of two cancelling errors (chains); |phi| of lines of filler / of the others
    leak, repeat   |phi| of a planted line that states the right answer before it is derived, and of one that repeats the line before it, / of the
                   other lines of that rollout: neither changes V under a policy that goes on from its own last value, so 0 is right and a source
                   that copies the answer from the text is far above 1. `leak masked`: with literal copies of the answer left out, as in training

against surprisal (lowest mean log-prob), entropy (highest), position (the mean of the place), always the first line, and chance. Exact V is that of
the process that wrote the warm-up traces: the policy after warm-up is close to it, not the same. Every source is judged by its phi; literal copies of
the answer are masked in `leak masked` alone.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path

import numpy as np
import torch
import yaml

from acpo import config as configuration
from acpo.attribution import answer_copies
from acpo.batch import Batch
from acpo.compare import load
from acpo.run import Run
from acpo.trainer import Trainer
from acpo_kernels import segment_reduce

SOURCES = ("hindsight", "tree", "probe", "head")
BASELINES = ("surprisal", "entropy", "position", "first", "random")


def trainer_of(path: Path, policy: Path, seed: int, more: dict) -> Trainer:
    common = load(path).settings
    own = {
        "method": "acpo", "attribution.source": ",".join(SOURCES), "credit.scope": "all", "credit.mask": "none", "policy.path": str(policy),
        "policy.from_config": "", "warmup.steps": 0, "trainer.threads": 1, "trainer.keep_rollouts": False, "run_dir": "unused", "seed": seed,
        "segmenter.entropy": False, "segmenter.target_tokens": 8, "rollout.prompts": 8, "curriculum.sampler": "uniform", **more,
    }  # fmt: skip
    settings = configuration.from_layers((str(path), common), ("attribution_quality", own))
    return Trainer(settings, Run(settings))


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    ranks = [np.argsort(np.argsort(x, kind="stable"), kind="stable").astype(float) for x in (a, b)]
    for r, x in zip(ranks, (a, b), strict=True):  # ties share their mean rank
        for value in np.unique(x):
            r[x == value] = r[x == value].mean()
    return float(np.corrcoef(*ranks)[0, 1]) if all(r.std() > 0 for r in ranks) else float("nan")


class Collector:
    """Runs the loop's own rollout, scoring, segmentation and attribution, and keeps what each source said about each line."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.rollouts: list[dict] = []
        self.masked = False  # leave out tokens that spell the answer

    def step(self, planted=None) -> None:
        trainer = self.trainer
        trainer.step_number += 1
        indices, batch, outcome = trainer._rollout()
        kinds = [None] * len(batch)
        if planted is not None:
            batch, outcome, kinds = planted(trainer, indices, batch, outcome)
        trainer._score(batch, outcome, indices)
        trainer._segment(batch)
        segments, size = batch.segments, trainer.config.rollout.group_size
        prior = torch.tensor(trainer.curriculum.prior(indices)).repeat_interleave(size)
        answers = [trainer.prompts.encode(trainer.train_problems[i].answer) for i in indices for _ in range(size)]
        keep = answer_copies(batch.responses(), [[ids] for ids in answers]) if self.masked else None
        found = {}
        original = trainer.attributors.by_name
        for name in SOURCES:  # each for itself: the pick would show the most reliable one alone
            trainer.attributors.by_name = {name: original[name]}
            found[name], _ = trainer.attributors(batch, outcome, prior, keep, answers)
        trainer.attributors.by_name = original
        logp, entropy = segment_reduce(torch.stack([batch.token["old_logp"], batch.token["entropy"]]), segments, reduce="mean")
        texts = trainer.tokenizer.batch_decode(batch.responses(), skip_special_tokens=True)
        offsets, terminal = segments.sequence_offsets.tolist(), segments.is_terminal().tolist()
        for b, text in enumerate(texts):
            problem = trainer.train_problems[indices[b // size]]
            lines = [s for s in range(offsets[b], offsets[b + 1]) if not terminal[s]]
            if isinstance(kinds[b], tuple):
                if len(lines) == text.count("\n"):  # as many steps as lines: the planted one is a step of its own
                    kind, at = kinds[b]
                    self.rollouts.append({"kind": kind, "at": at, "scores": {name: found[name].phi[lines].numpy() for name in SOURCES}})
                continue
            errors = trainer.task.errors(problem, text)
            if errors is None or len(errors) != len(lines):
                continue
            exact = np.diff(trainer.task.exact_values(problem, text))
            row = {"exact": exact, "errors": errors, "right": bool(outcome[b] > 0), "kind": kinds[b], "scores": {}, "values": {}, "before": {}}
            for name in SOURCES:
                a = found[name]
                row["scores"][name] = a.phi[lines].numpy()
                row["values"][name], row["before"][name] = a.values[lines].numpy(), float(a.previous[lines[0]])
                row.setdefault("reliability", {})[name] = float(a.reliability[b])
            row["scores"]["surprisal"], row["scores"]["entropy"] = logp[lines].numpy(), -entropy[lines].numpy()
            row["scores"]["first"] = np.arange(len(lines), dtype=float)
            row["scores"]["random"] = np.random.default_rng(len(self.rollouts)).random(len(lines))
            self.rollouts.append(row)


def plant(trainer: Trainer, indices: np.ndarray, batch: Batch, outcome: torch.Tensor):
    """Writes into the first rollout of each group a trace with ONE wrong line, always the fact's own wrong value, on chains into the second a trace
    with two that cancel, and into the third and fourth a trace with a line more, that states the right answer or repeats the line before it; all go
    on consistently. The group around them is the policy's."""
    rng, size, task = np.random.default_rng(trainer.step_number), trainer.config.rollout.group_size, trainer.task
    responses, kinds, outcome = batch.responses(), [None] * len(batch), outcome.clone()
    for g, index in enumerate(indices.tolist()):
        problem = trainer.train_problems[index]
        for b, kind in ((g * size, "systematic"), (g * size + 1, "cancelling")):
            text = planted_text(task, problem, kind, rng)
            if text is not None:
                responses[b] = torch.tensor([*trainer.prompts.encode(text), trainer.tokenizer.eos_token_id])
                kinds[b], outcome[b] = kind, float(kind == "cancelling")
        for b, kind in ((g * size + 2, "leak"), (g * size + 3, "repeat")):
            trace = task.trace(problem, rng)
            text, at = with_a_line_more(trace.text, problem.answer, kind, rng)
            responses[b] = torch.tensor([*trainer.prompts.encode(text), trainer.tokenizer.eos_token_id])
            kinds[b], outcome[b] = (kind, at), float(trace.answer == problem.answer)
    new = Batch.from_responses(batch.prompts, responses, batch.temperature, rollout_logp=[torch.zeros(len(r)) for r in responses])
    new.sequence["finished"] = torch.ones(len(new), dtype=torch.bool)
    return new, outcome, kinds


def with_a_line_more(text: str, answer: str, kind: str, rng: np.random.Generator) -> tuple[str, int]:
    """The trace with a line in its first half that changes nothing, and that line's place. leak states the answer, repeat is the line before."""
    lines = text.split("\n")
    at = int(rng.integers(1, max(2, len(lines) // 2 + 1)))
    return "\n".join([*lines[:at], f"={answer}" if kind == "leak" else lines[at - 1], *lines[at:]]), at


def share_of_planted(rows: list[dict], name: str) -> float:
    """Mean |phi| of the planted line over mean |phi| of the other lines, over all rollouts."""
    planted = np.mean([abs(r["scores"][name][r["at"]]) for r in rows])
    others = np.mean(np.concatenate([np.abs(np.delete(r["scores"][name], r["at"])) for r in rows]))
    return float(planted / others) if others > 0 else float("inf" if planted > 0 else "nan")


def planted_text(task, problem, kind: str, rng: np.random.Generator) -> str | None:
    """The right trace but for the planted lines, drawn again until it has just those; None where the task cannot hold it."""
    chain = hasattr(task, "modulus")
    if kind == "cancelling" and not chain:
        return None
    for _ in range(400):
        text = task.trace(problem, rng).text
        errors = task.errors(problem, text)
        values = task.exact_values(problem, text)
        if kind == "systematic" and sum(errors) == 1 and values[-1] == 0:
            return text
        if kind == "cancelling" and sum(errors) == 2 and values[-1] > 0:
            return text
    return None


def first_error_threshold(rows: list[dict], name: str) -> float:
    """The threshold of the best F1 on the given rollouts."""
    lowest = np.array([r["scores"][name].min() for r in rows])
    candidates = np.quantile(lowest, np.linspace(0, 1, 41))
    return float(max(candidates, key=lambda t: f1(rows, name, t)))


def f1(rows: list[dict], name: str, threshold: float) -> float:
    wrong = [r for r in rows if any(r["errors"])]
    right = [r for r in rows if not any(r["errors"])]
    if not wrong or not right:
        return float("nan")
    hit = np.mean([r["scores"][name].min() <= threshold and r["scores"][name].argmin() == r["errors"].index(True) for r in wrong])
    clean = np.mean([r["scores"][name].min() > threshold for r in right])
    return float(2 * hit * clean / (hit + clean)) if hit + clean > 0 else 0.0


def log_loss(values: np.ndarray, outcome: np.ndarray) -> float:
    return float(-np.mean(outcome * np.log(values) + (1 - outcome) * np.log(1 - values)))


def quality(rows: list[dict], planted: list[dict]) -> dict[str, dict[str, float]]:
    mean_at = np.mean([r["exact"] for r in rows], 0)
    for r in rows + planted:
        r["scores"]["position"] = mean_at
    planted, more = [r for r in planted if "at" not in r], [r for r in planted if "at" in r]
    out = {}
    wrong = [r for r in rows if not r["right"] and any(r["errors"])]
    halves = rows[::2], rows[1::2]
    for name in (*SOURCES, *BASELINES):
        moving = [r for r in rows if r["exact"].std() > 1e-9]
        correlations = [spearman(r["scores"][name], r["exact"]) for r in moving]
        table = {
            "spearman": float(np.nanmean([c if np.isfinite(c) else 0.0 for c in correlations])),  # a flat score has no rank: it earns 0
            "first error": float(np.mean([r["scores"][name].argmin() == r["errors"].index(True) for r in wrong])),
            "F1": float(np.mean([f1(b, name, first_error_threshold(a, name)) for a, b in (halves, halves[::-1])])),
        }
        if name in SOURCES:
            outcome = np.array([r["right"] for r in rows], dtype=float)
            p = outcome.mean()
            h = float(-(p * np.log(p) + (1 - p) * np.log(1 - p)))
            last, before = np.array([r["values"][name][-1] for r in rows]), np.array([r["before"][name] for r in rows])
            table["captured"] = (log_loss(before, outcome) - log_loss(last, outcome)) / h
            every = np.concatenate([r["values"][name] for r in rows])
            truth = np.concatenate([np.full(len(r["values"][name]), float(r["right"])) for r in rows])
            bins = np.minimum((every * 10).astype(int), 9)
            table["calibration"] = float(sum((bins == i).mean() * abs(every[bins == i].mean() - truth[bins == i].mean()) for i in set(bins)))
            table["reliability"] = float(np.mean([r["reliability"][name] for r in rows]))
            for kind in ("leak", "leak masked", "repeat"):
                if chosen := [r for r in more if r["kind"] == kind]:
                    table[kind] = share_of_planted(chosen, name)
        for kind in ("systematic", "cancelling"):
            chosen = [r for r in planted if r["kind"] == kind]
            if not chosen:
                continue
            if kind == "systematic":
                table["planted"] = float(np.mean([r["scores"][name].argmin() == r["errors"].index(True) for r in chosen]))
            elif name in SOURCES:
                pairs = [np.flatnonzero(r["errors"]) for r in chosen]
                table["cancelling"] = float(
                    np.mean([r["scores"][name][i] < 0 < r["scores"][name][j] for r, (i, j) in zip(chosen, pairs, strict=True)])
                )
        out[name] = table
    return out


def filler_share(trainer: Trainer, batches: int) -> dict[str, float]:
    """Mean |phi| of steps of filler alone over that of the others, steps cut where the policy forks."""
    sums = {name: [[], []] for name in SOURCES}
    for _ in range(batches):
        trainer.step_number += 1
        indices, batch, outcome = trainer._rollout()
        trainer._score(batch, outcome, indices)
        trainer._segment(batch)
        filler = torch.isin(batch.token["ids"], torch.cat([trainer.filler, torch.tensor(trainer.prompts.encode("\n"))]))
        alone = segment_reduce(filler.float(), batch.segments, reduce="mean") == 1
        ordinary = ~batch.segments.is_terminal()
        prior = torch.full((len(batch),), 0.5)
        answers = [trainer.prompts.encode(trainer.train_problems[i].answer) for i in indices for _ in range(trainer.config.rollout.group_size)]
        original = trainer.attributors.by_name
        for name in SOURCES:
            trainer.attributors.by_name = {name: original[name]}
            phi = trainer.attributors(batch, outcome, prior, None, answers)[0].phi.abs()
            sums[name][0].append(phi[alone & ordinary])
            sums[name][1].append(phi[~alone & ordinary])
        trainer.attributors.by_name = original
    return {name: float(torch.cat(a).mean() / torch.cat(b).mean()) for name, (a, b) in sums.items()}


def draw(results: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = ("spearman", "first error", "F1", "planted")
    figure, axes = pyplot.subplots(1, len(panels), figsize=(14, 3.4), layout="constrained")
    names = list(results["table"])
    for axis, panel in zip(axes, panels, strict=True):
        values = [results["table"][n].get(panel, float("nan")) for n in names]
        axis.barh(names[::-1], values[::-1], color=["C0" if n in SOURCES else "0.7" for n in names[::-1]])
        axis.set_title(panel, fontsize=10)
        axis.grid(alpha=0.3, axis="x")
    figure.suptitle(results["task"])
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="a comparison, such as configs/compare/multiplication.yaml")
    parser.add_argument("policy", type=Path, help="its warm start: DIR/warm/policy")
    parser.add_argument("settings", nargs="*", help="KEY=VALUE, other settings than the comparison's, such as attribution.drawn_to=before")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/attribution"))
    parser.add_argument("--batches", type=int, default=16, help="of 64 rollouts; the first quarter only calibrates")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    more = {key: yaml.safe_load(value) for key, _, value in (text.partition("=") for text in options.settings)}
    collector = Collector(trainer_of(options.config, options.policy, options.seed, more))
    for _ in range(options.batches // 4):
        collector.step()
    collector.rollouts.clear()
    for _ in range(options.batches - options.batches // 4):
        collector.step()
    rows, collector.rollouts = collector.rollouts, []
    for _ in range(max(2, options.batches // 4)):
        collector.step(plant)
    planted, collector.rollouts, collector.masked = [r for r in collector.rollouts if r["kind"]], [], True
    for _ in range(max(2, options.batches // 4)):
        collector.step(plant)
    planted += [{**r, "kind": "leak masked"} for r in collector.rollouts if r["kind"] == "leak"]
    table = quality(rows, planted)
    trainer = collector.trainer
    if trainer.filler is not None:
        forked = {"segmenter.entropy": True, "segmenter.forking_share": 0.5, "segmenter.target_tokens": 4}
        forked = trainer_of(options.config, options.policy, options.seed, {**more, **forked})
        for name, share in filler_share(forked, max(6, options.batches // 2)).items():
            table[name]["filler"] = share
    results = {
        "task": options.config.stem, "settings": more, "seed": options.seed, "rollouts": len(rows),
        "success": float(np.mean([r["right"] for r in rows])), "lines": len(rows[0]["exact"]), "table": table,
    }  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"{options.config.stem}.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    draw(results, options.out / f"{options.config.stem}.png")
    columns = list(dict.fromkeys(itertools.chain.from_iterable(table.values())))
    print(f"{results['task']}: {results['rollouts']} rollouts, success {results['success']:.2f}, {results['lines']} lines")
    print(f"{'':12}" + "".join(f"{c:>13}" for c in columns))
    for name, found in table.items():
        print(f"{name:12}" + "".join(f"{found[c]:13.3f}" if c in found else " " * 13 for c in columns))


if __name__ == "__main__":
    main()
