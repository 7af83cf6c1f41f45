"""What a step of each arm takes, step beside step in one process: on a machine that others use a run is half as long again an hour later, or on the
other core, and that is no property of an arm.

    python -m benchmarks.step_clocks configs/compare/again/t2.yaml --arms grpo,grpo-kl,acpo --seeds 500,501 --out clocks_t2.json

Every arm trains from the comparison's warm start at the comparison's rate, as `acpo compare` does, without its evaluations; the arms take turns, a
step each, in another order every round. Seconds are CPU seconds of one thread. Prints, for each arm, the median of its rounds' ratios to the first
one's step, and writes what `python -m benchmarks.method --clocks FILE` lays under the curves of the same task.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np

from acpo import compare
from acpo.run import Run
from acpo.trainer import Trainer

from . import outputs

EVERY = 10  # steps between two points of a clock, as between two evaluations


def rounds(comparer: compare.Comparer, arms: list[str], seed: int) -> np.ndarray:
    """CPU seconds [steps, arms] of one seed's runs."""
    if comparer.finished(warm := comparer.warm(seed)) is None:
        comparer._train(warm)
    trainers = []
    for arm in arms:
        job = comparer.job(arm, comparer.rate(arm), seed)
        settings = comparer.settings(job)
        shutil.rmtree(settings.run_dir, ignore_errors=True)
        trainers.append(Trainer(settings, Run(settings)))
    rng, taken = np.random.default_rng(seed), []
    for _ in range(min(trainer.config.trainer.steps for trainer in trainers)):
        row = np.zeros(len(arms))
        for i in rng.permutation(len(arms)):
            begin = time.process_time()
            trainers[i].step_number += 1
            trainers[i].step()
            row[i] = time.process_time() - begin
        taken.append(row)
    for trainer in trainers:
        trainer.close()
    return np.array(taken)


def points(taken: np.ndarray) -> list[dict]:
    """One arm's seconds [steps] as a curve."""
    elapsed = np.concatenate([[0.0], np.cumsum(taken)])
    steps = [*range(0, len(taken), EVERY), len(taken)]
    return [{"step": s, "seconds": round(float(elapsed[s]), 5), "accuracy": 0.0} for s in steps]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparison", type=Path)
    parser.add_argument("--arms", required=True, type=lambda text: text.split(","))
    parser.add_argument("--seeds", default=[500], type=lambda text: [int(seed) for seed in text.split(",")])
    parser.add_argument("--out", required=True, type=outputs.file)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        comparer = compare.Comparer(options.comparison, folder)
        if unknown := [arm for arm in options.arms if arm not in comparer.chosen.arms]:
            parser.error(f"--arms names {', '.join(unknown)}, which {options.comparison} does not have: {', '.join(comparer.chosen.arms)}")
        if untold := [arm for arm in options.arms if comparer.rate(arm) is None]:
            parser.error(f"{options.comparison} must give each arm a rate, got none for {', '.join(untold)}")
        found = {seed: rounds(comparer, options.arms, seed) for seed in options.seeds}
    ratio = {arm: float(np.median(np.concatenate([x[:, i] / x[:, 0] for x in found.values()]))) for i, arm in enumerate(options.arms)}
    results = {
        "name": f"clocks_{comparer.chosen.name.removeprefix('again_')}", "against": options.arms[0], "best_baseline": options.arms[0],
        "code": [compare.code_hash()],
        "arms": {arm: {"ratio": round(ratio[arm], 4), "seconds": None, "failures": []} for arm in options.arms},
        "curves": {arm: {str(seed): points(x[:, i]) for seed, x in found.items()} for i, arm in enumerate(options.arms)},
    }  # fmt: skip
    options.out.write_text(json.dumps(results, indent=1), encoding="utf-8")
    for i, arm in enumerate(options.arms):
        took = 1000 * np.mean([x[:, i].mean() for x in found.values()])
        print(f"{arm:16s} {ratio[arm]:.3f} of a step of {options.arms[0]}; {took:.1f} ms")


if __name__ == "__main__":
    main()
