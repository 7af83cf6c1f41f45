"""How well does an attribution find what a step did? Transformers on the synthetic tasks, whose V is exactly known.

    python -m benchmarks.attribution_quality configs/compare/multiplication.yaml [KEY=VALUE ...] [--seeds 0-5] [--dir DIR] [--out DIR]

A seed is a warm start (trained as `acpo compare` does, where DIR does not hold it yet) and prompts and samples of its own; the task's table of facts
is one. The policy samples groups as in training; every source attributes every rollout, reliability as it would gate it, calibrated on earlier
batches only, literal copies of the answer left out as in training. One table, one figure, and a JSON with every seed's table:

    spearman       mean over rollouts of the rank correlation of the score with the exact change of V, line by line (rollouts where V changes)
    first error    share of wrong rollouts whose lowest line is the first wrong one (lines that tie for the lowest share it); F1: harmonic mean of
                   that with a threshold ("no error" if nothing is below it) and of the share of flawless rollouts that are called flawless; the
                   threshold is fitted on the other half of the groups
    captured       (log-loss of what is known before the steps - log-loss of Vhat at the last line) / entropy of the outcome
    calibration    expected calibration error of Vhat at the lines, ten bins
    planted        share of planted systematic errors found; cancelling: share of two errors that undo each other whose first has a negative and whose
                   second a positive score (chains; chance for two signs is 1/4); filler: |score| of lines of filler / of the others
    leak, repeat   |score| of a planted line that states the right answer before it is derived, and of one that repeats the line before it, / of the
                   other lines of that rollout: neither changes V under a policy that goes on from its own last value, so 0 is right and a source
                   that copies the answer from the text is far above 1. `leak unmasked`: without leaving out copies of the answer

Every source is judged by its SCORE, which training adds to the advantage. Hindsight's is centred and not its phi: `hindsight phi` is a row of its
own; the score of the others is phi over one number a group. Beside them surprisal (lowest mean log-prob), entropy (highest), position (the most
frequent place of the first error, fitted on the other half of the groups), always the first line, and chance. Exact V is that of the process that
wrote the warm-up traces: the policy after warm-up is close to it, not the same.

A cell is the mean over seeds and its standard error, n - 1 in the denominator. The seed is the unit: rollouts of one seed share their weights and
eight at a time their prompt, and say nothing about the next warm start. Differences from a baseline are paired within a seed; in brackets the 95 %
interval of Student's t over seeds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import yaml

from acpo import config as configuration
from acpo.attribution import Attribution, answer_copies
from acpo.batch import Batch
from acpo.compare import Comparer
from acpo.comparison import load
from acpo.run import Run
from acpo.trainer import Trainer
from acpo_kernels import segment_reduce

from . import outputs

SOURCES = ("hindsight", "tree", "probe", "head")
JUDGED = ("hindsight", "hindsight phi", "tree", "probe", "head")
BASELINES = ("surprisal", "entropy", "position", "first", "random")
COMPARED = ("spearman", "first error", "F1", "planted")  # what every row has: the figure's panels and the paired differences
STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)  # 97.5 % quantile of t for 1, 2, ... degrees of freedom


def warm_starts(path: Path, seeds: list[int], directory: Path) -> dict[int, Path]:
    """The policies that a comparison's runs would begin with, one a seed; what `directory` does not hold is trained."""
    comparer = Comparer(path, directory)
    comparer.chosen = replace(comparer.chosen, seeds=list(range(len(seeds))), warm_starts=seeds, tuning_seeds=[], fewer={})
    for job in comparer.warm_starts:
        if comparer.finished(job) is None:
            comparer.one(job.key)
    return {seed: directory / job.key / "policy" for seed, job in zip(seeds, comparer.warm_starts, strict=True)}


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


def look_at_all(trainer: Trainer) -> None:
    """A source is judged on every rollout. Training spares its forward where its gate is shut, and a source that was not asked says 0."""
    trainer.attributors.looks = lambda name, outcome: ~outcome.isnan()


def each_alone(
    trainer: Trainer, indices: np.ndarray, batch: Batch, outcome: torch.Tensor, masked: bool = True, learn: bool = True
) -> dict[str, Attribution]:
    """What each source says by itself (the pick among them would show the most reliable one alone), tokens that spell the answer left out or not.
    Not to learn: calibration and reliability stay those of the batches before."""
    size, original = trainer.config.rollout.group_size, trainer.attributors.by_name
    prior = torch.tensor(trainer.curriculum.prior(indices)).repeat_interleave(size)
    answers = [trainer.prompts.encode(trainer.train_problems[i].answer) for i in indices for _ in range(size)]
    keep = answer_copies(batch.responses(), [[ids] for ids in answers]) if masked else None
    found, before = {}, {name: original[name].state() for name in SOURCES}
    for name in SOURCES:
        trainer.attributors.by_name = {name: original[name]}
        found[name], _ = trainer.attributors(batch, outcome, prior, keep, answers)
    trainer.attributors.by_name = original
    if not learn:
        for name in SOURCES:
            original[name].load(before[name])
    return found


def scores_of(found: dict[str, Attribution]) -> dict[str, torch.Tensor]:
    """What is judged: the scores that training uses, and phi where it orders the lines of a rollout otherwise."""
    return {**{name: a.score for name, a in found.items()}, "hindsight phi": found["hindsight"].phi}


class Collector:
    """Runs the loop's own rollout, scoring, segmentation and attribution, and keeps what each source said about each line."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.rollouts: list[dict] = []
        look_at_all(trainer)

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
        found = each_alone(trainer, indices, batch, outcome, learn=planted is None)
        scores = scores_of(found)
        unmasked = None if planted is None else scores_of(each_alone(trainer, indices, batch, outcome, masked=False, learn=False))
        logp, entropy = segment_reduce(torch.stack([batch.token["old_logp"], batch.token["entropy"]]), segments, reduce="mean")
        texts = trainer.tokenizer.batch_decode(batch.responses(), skip_special_tokens=True)
        offsets, terminal = segments.sequence_offsets.tolist(), segments.is_terminal().tolist()
        for b, text in enumerate(texts):
            problem = trainer.train_problems[indices[b // size]]
            lines = [s for s in range(offsets[b], offsets[b + 1]) if not terminal[s]]
            of_lines = {name: score[lines].numpy() for name, score in scores.items()}
            if isinstance(kinds[b], tuple):
                if len(lines) == text.count("\n"):  # as many steps as lines: the planted one is a step of its own
                    kind, at = kinds[b]
                    self.rollouts.append({"kind": kind, "at": at, "scores": of_lines})
                    if kind == "leak":
                        of_lines = {name: score[lines].numpy() for name, score in unmasked.items()}
                        self.rollouts.append({"kind": "leak unmasked", "at": at, "scores": of_lines})
                continue
            errors = trainer.task.errors(problem, text)
            if errors is None or len(errors) != len(lines):
                continue
            exact = np.diff(trainer.task.exact_values(problem, text))
            row = {
                "exact": exact, "errors": errors, "right": bool(outcome[b] > 0), "kind": kinds[b], "half": b // size % 2, "scores": of_lines,
                "values": {name: a.values[lines].numpy() for name, a in found.items()},
                "before": {name: float(a.previous[lines[0]]) for name, a in found.items()},
                "reliability": {name: float(a.reliability[b]) for name, a in found.items()},
            }  # fmt: skip
            row["scores"]["surprisal"], row["scores"]["entropy"] = logp[lines].numpy(), -entropy[lines].numpy()
            row["scores"]["first"] = np.arange(len(lines), dtype=float)
            row["scores"]["random"] = np.random.default_rng((trainer.config.seed, len(self.rollouts))).random(len(lines))
            self.rollouts.append(row)


def plant(trainer: Trainer, indices: np.ndarray, batch: Batch, outcome: torch.Tensor):
    """Writes into the first rollout of each group a trace with ONE wrong line, always the fact's own wrong value, on chains into the second a trace
    with two that cancel, and into the third and fourth a trace with a line more, that states the right answer or repeats the line before it; all go
    on consistently. The group around them is the policy's."""
    rng = np.random.default_rng((trainer.config.seed, trainer.step_number))
    size, task = trainer.config.rollout.group_size, trainer.task
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
    """Mean |score| of the planted line over mean |score| of the other lines, over all rollouts."""
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


def hit(scores: np.ndarray, errors: list[bool]) -> float:
    """1 where the lowest line is the first wrong one, a share of it where lines tie: a flat score earns chance, not the first line's share."""
    lowest = scores == scores.min()
    return float(lowest[errors.index(True)] / lowest.sum())


def first_places(rows: list[dict], lines: int) -> np.ndarray:
    """A score that knows the place alone: minus the share of wrong rollouts whose first error stands there."""
    places = [r["errors"].index(True) for r in rows if not r["right"] and any(r["errors"])]
    return -np.bincount(places, minlength=lines) / max(1, len(places))


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
    found = np.mean([(r["scores"][name].min() <= threshold) * hit(r["scores"][name], r["errors"]) for r in wrong])
    clean = np.mean([r["scores"][name].min() > threshold for r in right])
    return float(2 * found * clean / (found + clean)) if found + clean > 0 else 0.0


def log_loss(values: np.ndarray, outcome: np.ndarray) -> float:
    return float(-np.mean(outcome * np.log(values) + (1 - outcome) * np.log(1 - values)))


def quality(rows: list[dict], planted: list[dict]) -> dict[str, dict[str, float]]:
    """One seed's table. Planted rollouts are no other half: the place is fitted on all of the policy's own."""
    planted, more = [r for r in planted if "at" not in r], [r for r in planted if "at" in r]
    lines, halves = len(rows[0]["exact"]), [[r for r in rows if r["half"] == half] for half in (0, 1)]
    for judged, fitted in ((halves[0], halves[1]), (halves[1], halves[0]), (planted, rows)):
        place = first_places(fitted, lines)
        for r in judged:
            r["scores"]["position"] = place
    out = {}
    wrong = [r for r in rows if not r["right"] and any(r["errors"])]
    moving = [r for r in rows if r["exact"].std() > 1e-9]
    for name in (*JUDGED, *BASELINES):
        correlations = [spearman(r["scores"][name], r["exact"]) for r in moving]
        table = {
            "spearman": float(np.nanmean([c if np.isfinite(c) else 0.0 for c in correlations])),  # a flat score has no rank: it earns 0
            "first error": float(np.mean([hit(r["scores"][name], r["errors"]) for r in wrong])),
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
        if name in JUDGED:
            for kind in ("leak", "leak unmasked", "repeat"):
                if chosen := [r for r in more if r["kind"] == kind]:
                    table[kind] = share_of_planted(chosen, name)
        for kind in ("systematic", "cancelling"):
            chosen = [r for r in planted if r["kind"] == kind]
            if not chosen:
                continue
            if kind == "systematic":
                table["planted"] = float(np.mean([hit(r["scores"][name], r["errors"]) for r in chosen]))
            elif name in JUDGED:
                pairs = [np.flatnonzero(r["errors"]) for r in chosen]
                table["cancelling"] = float(
                    np.mean([r["scores"][name][i] < 0 < r["scores"][name][j] for r, (i, j) in zip(chosen, pairs, strict=True)])
                )
        out[name] = table
    return out


def filler_share(trainer: Trainer, batches: int) -> dict[str, float]:
    """Mean |score| of steps of filler alone over that of the others, steps cut where the policy forks."""
    look_at_all(trainer)
    sums = {name: [[], []] for name in JUDGED}
    for _ in range(batches):
        trainer.step_number += 1
        indices, batch, outcome = trainer._rollout()
        trainer._score(batch, outcome, indices)
        trainer._segment(batch)
        filler = torch.isin(batch.token["ids"], torch.cat([trainer.filler, torch.tensor(trainer.prompts.encode("\n"))]))
        alone = segment_reduce(filler.float(), batch.segments, reduce="mean") == 1
        ordinary = ~batch.segments.is_terminal()
        for name, score in scores_of(each_alone(trainer, indices, batch, outcome)).items():
            sums[name][0].append(score.abs()[alone & ordinary])
            sums[name][1].append(score.abs()[~alone & ordinary])
    return {name: float(torch.cat(a).mean() / torch.cat(b).mean()) for name, (a, b) in sums.items()}


def of_seed(path: Path, policy: Path, seed: int, more: dict, batches: int) -> dict:
    """A seed's table, and how much it rests on."""
    collector = Collector(trainer_of(path, policy, seed, more))

    def steps(number: int, planted=None) -> list[dict]:
        collector.rollouts = []
        for _ in range(number):
            collector.step(planted)
        return collector.rollouts

    steps(batches // 4)
    rows = steps(batches - batches // 4)
    planted = [r for r in steps(max(2, batches // 2), plant) if r["kind"]]
    table = quality(rows, planted)
    if collector.trainer.filler is not None:
        forked = {"segmenter.entropy": True, "segmenter.forking_share": 0.5, "segmenter.target_tokens": 4}
        for name, share in filler_share(trainer_of(path, policy, seed, {**more, **forked}), max(6, batches // 2)).items():
            table[name]["filler"] = share
    kinds = [r["kind"] for r in planted]
    return {
        "rollouts": len(rows), "success": float(np.mean([r["right"] for r in rows])), "lines": len(rows[0]["exact"]),
        "planted": {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}, "table": table,
    }  # fmt: skip


def over_seeds(values: list[float]) -> dict[str, float]:
    return {"mean": float(np.mean(values)), "se": float(np.std(values, ddof=1) / len(values) ** 0.5)}


def summary(tables: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, dict[str, float]]]:
    """Mean and standard error over seeds, a cell that all of them have."""
    cells = {name: [column for column in found if all(column in t[name] for t in tables)] for name, found in tables[0].items()}
    return {name: {column: over_seeds([t[name][column] for t in tables]) for column in columns} for name, columns in cells.items()}


def differences(tables: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    """Of every source from every baseline, paired within a seed: mean, standard error and 95 % interval over seeds, by column."""
    t = STUDENT[min(len(tables) - 1, len(STUDENT)) - 1]  # of more seeds than it knows: a little too wide
    out: dict = {}
    for column, name, baseline in itertools.product(COMPARED, JUDGED, BASELINES):
        found = over_seeds([table[name][column] - table[baseline][column] for table in tables])
        found |= {"low": found["mean"] - t * found["se"], "high": found["mean"] + t * found["se"]}
        out.setdefault(column, {}).setdefault(name, {})[baseline] = found
    return out


def draw(results: dict, path: Path) -> None:
    """Means with their standard errors, every seed a dot."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(COMPARED), figsize=(14, 3.4), layout="constrained", sharey=True)
    names = list(results["table"])[::-1]
    for axis, panel in zip(axes, COMPARED, strict=True):
        means, errors = zip(*[(results["table"][n][panel]["mean"], results["table"][n][panel]["se"]) for n in names], strict=True)
        axis.barh(names, means, xerr=errors, color=["C0" if n in JUDGED else "0.7" for n in names], ecolor="0.3", alpha=0.7)
        for seed in results["seeds"].values():
            axis.plot([seed["table"][n][panel] for n in names], names, "k.", markersize=3)
        axis.set_title(panel, fontsize=10)
        axis.grid(alpha=0.3, axis="x")
    figure.suptitle(f"{results['task']}, {len(results['seeds'])} seeds")
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def show(results: dict) -> None:
    seeds, table = results["seeds"].values(), results["table"]
    columns = list(dict.fromkeys(itertools.chain.from_iterable(table.values())))
    rollouts, success = sum(s["rollouts"] for s in seeds), over_seeds([s["success"] for s in seeds])
    print(f"{results['task']}: {len(seeds)} seeds, {rollouts} rollouts, success {success['mean']:.2f} +- {success['se']:.2f}, mean +- standard error")
    print(f"{'':14}" + "".join(f"{c:>15}" for c in columns))
    for name, found in table.items():
        print(f"{name:14}" + "".join(f"{found[c]['mean']:7.3f} +-{found[c]['se']:.3f}".rjust(15) if c in found else " " * 15 for c in columns))
    for column, found in results["differences"].items():
        print(f"{column}, less" + "".join(f"{b:>24}" for b in BASELINES))
        for name, others in found.items():
            print(f"{name:14}" + "".join(f"{d['mean']:+.3f} [{d['low']:+.3f}, {d['high']:+.3f}]".rjust(24) for d in others.values()))


def seeds_of(text: str) -> list[int]:
    low, dash, high = text.partition("-")
    seeds = list(range(int(low), int(high) + 1)) if dash else [int(s) for s in text.split(",")]
    if len(set(seeds)) < max(2, len(seeds)):
        raise argparse.ArgumentTypeError(f"must name at least two, each once, got {text}: one has no standard error")
    return seeds


def overrides(parser: argparse.ArgumentParser, words: list[str]) -> dict:
    """The settings of KEY=VALUE words."""
    if wrong := [word for word in words if "=" not in word]:
        parser.error(f"{wrong[0]} is no KEY=VALUE")
    return {key: yaml.safe_load(value) for key, _, value in (word.partition("=") for word in words)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="a comparison, such as configs/compare/multiplication.yaml")
    parser.add_argument("settings", nargs="*", help="KEY=VALUE, other settings than the comparison's, such as attribution.drawn_to=before")
    parser.add_argument("--seeds", type=seeds_of, default="0-5", help="at least two: 0-5, or 0,1,2 (default 0-5)")
    parser.add_argument("--dir", type=Path, help="where the warm starts lie, or shall (default runs/attribution/NAME)")
    parser.add_argument("--out", type=outputs.folder, default="benchmarks/results/attribution")
    parser.add_argument("--batches", type=int, default=16, help="of 64 rollouts, a seed; the first quarter only calibrates")
    options = parser.parse_args()
    more = overrides(parser, options.settings)
    policies = warm_starts(options.config, options.seeds, options.dir or Path("runs/attribution") / options.config.stem)
    found = {str(seed): of_seed(options.config, policy, seed, more, options.batches) for seed, policy in policies.items()}
    tables = [seed["table"] for seed in found.values()]
    results = {
        "task": options.config.stem, "command": shlex.join(["python", "-m", "benchmarks.attribution_quality", *sys.argv[1:]]), "settings": more,
        "table": summary(tables), "differences": differences(tables), "seeds": found,
    }  # fmt: skip
    (options.out / f"{options.config.stem}.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    draw(results, options.out / f"{options.config.stem}.png")
    show(results)


if __name__ == "__main__":
    main()
