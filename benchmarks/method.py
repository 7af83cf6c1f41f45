"""Does the method help? The table of comparisons that were run, and what it says about the bars that were fixed before.

    python -m benchmarks.method [--summary | --over ARM | --figure PNG | --clocks FILE ...] [benchmarks/results/method/*.json]

The files are the results.json of `acpo compare`, one a task. Every arm that was run is in the table. Areas are interquartile means over seeds of
the mean held-out greedy accuracy over GRPO's budget; a difference is paired by seed, with its 95 % bootstrap interval where there are 8 seeds or
more (none where there are fewer), and the seeds that it wins. Seconds are CPU seconds of the process: wall seconds of a shared machine would be
the doing of others (on a GPU they are wall seconds, of runs side by side). --summary: one row a task. --over ARM: one row an arm, the mean of its
paired differences to that arm and their standard error. --figure PNG: one file's, every seed as a dot. --clocks FILE (again for another task): the
method over each arm in equal seconds where a step takes what it took in that comparison of the same task; its accuracies are not used.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path

import numpy as np

from acpo import evidence, exhibit

from . import outputs

RESULTS = Path(__file__).parent / "results" / "method"
LEAST = {"t2": 0.05, "multiplication": 0.02, "no_attribution": -0.02}  # area over the best baseline, in equal tokens
ENTROPY = 1.5  # times GRPO's at the end of stage 1
NEAR = "grpo-kl"  # the method's loop without credit: what credit adds is over this one, whichever baseline is best


LEFT_OUT = ("area, seconds", "reliability", "zero-variance groups", "at its end")  # of the README's table; they stand in the files and the page


def table(head: list[str], body: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *body))


def markdown(results: dict) -> str:
    head, body = exhibit.rows(results)
    keep = [i for i, title in enumerate(head) if title not in LEFT_OUT and any(row[i] for row in body)]
    head, body = [head[i] for i in keep], [[row[i].replace(" [too few seeds]", "") for i in keep] for row in body]
    return table(head, body)


def bars(results: dict, default: str = "acpo") -> list[str]:
    """One line a bar: what was wanted, what was found, and whether that is met, not met, or not known from these runs."""
    ours, theirs = results["arms"].get(default), results["arms"][results["against"]]
    if ours is None:
        return [f"{default} was not run"]
    best = results["best_baseline"]
    task = next((name for name in LEAST if results["name"].endswith(name)), "")
    lines = []
    for axis, least in (("tokens", LEAST.get(task)), ("seconds", LEAST.get(task) and min(LEAST[task], 0.0))):
        if least is None:
            continue
        found = ours[f"best_baseline_{axis}"]
        words = f"area against {best} in equal {axis}, at least {least:+.2f}"
        if found is None or found["low"] is None:
            lines.append(f"not known: {words}: {'too few seeds' if found else 'not run side by side'}")
            continue
        met = found["iqm"] >= least and (found["low"] > 0 if least > 0 else True)
        lines.append(f"{verdict(met)}: {words}{' and its interval above 0' if least > 0 else ''}: {cell(found)}")
    others = list(dict.fromkeys((results["against"], best, *((NEAR,) if NEAR in results["arms"] else ()))))
    if NEAR in results["arms"] and best != NEAR:
        for axis in ("tokens", "seconds"):
            found = paired(results, default, NEAR, axis)
            if found:
                lines.append(f"beside it: over {NEAR} in equal {axis}: {cell(found)}")
    # Inside a rollout alone the control keeps what attribution says of whole rollouts and groups; the other keeps nothing.
    for name, words in (("shuffled", "the shuffled control"), ("everywhere", "the control shuffled over rollouts and groups as well")):
        for other in others:
            found = paired(results, f"{default}-{name}", other, "tokens")
            if not found:
                continue
            if other == results["against"]:
                lines.append(f"{verdict(found['low'] <= 0)}: no gain of {words} over {other} is shown: {cell(found)}")
            else:  # what credit in the wrong places adds to a loop that is held near its start
                lines.append(f"beside it: over {other}: {cell(found)}")
        if found := paired(results, default, f"{default}-{name}", "tokens"):
            lines.append(f"beside it: {default} over {words}: {cell(found)}")
    for key, other in (("against", results["against"]), ("best_baseline", best)):
        if (found := ours.get(f"{key}_by_start")) and found["half_width"] is not None:  # of as many starts as seeds the interval says it
            means = ", ".join(f"{mean:+.3f}" for mean in found["means"].values())
            another = f"{found['mean']:+.3f} +- {found['half_width']:.3f} (t, 95 %)"
            lines.append(f"beside it: over {other} by warm start: {means}; of another one {another}")
    for name, words in (("entropy_stage1_end", "entropy"), ("decisions_stage1_end", "entropy without filler")):
        if ours[name] and theirs[name]:
            ratio = ours[name] / theirs[name]
            bar = f"{verdict(ratio >= ENTROPY and ours['at_budget'] >= theirs['at_budget'])}: " if words == "entropy" else "beside it: "
            lines.append(f"{bar}{words} at the end of stage 1, at least {ENTROPY} times {results['against']}'s: {ratio:.2f} times")
    ratio = entropy_behind_the_switch(results, default)
    if ratio is not None:
        lines.append(f"beside it: entropy at the start of stage 2, at the configured temperature: {ratio:.2f} times")
    before = results["warm_start"].get("pass@8")
    if before and "pass@8 after" in ours:
        lines.append(f"{verdict(ours['pass@8 after'] >= before)}: pass@8 not below the warm start's: {ours['pass@8 after']:.3f} after {before:.3f}")
    return lines


def paired(results: dict, arm: str, other: str, axis: str) -> dict | None:
    """The paired difference of two arms' areas; None where one was not run, or on too few seeds for an interval."""
    known = {"against": results["against"], "best_baseline": results["best_baseline"]}
    entry = results["arms"].get(arm, {})
    found = next((entry[f"{key}_{axis}"] for key, name in known.items() if name == other and f"{key}_{axis}" in entry), None)
    if found is None and axis == "seconds":
        if results.get("curves"):
            found = evidence.seconds_difference(evidence.clocks(runs_of(results), results["against"]), arm, other, results["against"])
    elif found is None:
        areas = [results["arms"].get(name, {}).get(f"area_{axis}_by_seed", {}) for name in (arm, other)]
        found = evidence.difference(*areas)
    return found if found and found["low"] is not None else None


def entropy_behind_the_switch(results: dict, arm: str) -> float | None:
    """Mean entropy of the arm over that of the arm `against`, over seeds, between the first two evaluations that both lie in the arm's second stage,
    where all rollouts are sampled at the configured temperature. None without a second stage."""
    curves, switch = results.get("curves", {}), results["arms"][arm].get("stage2_from")
    if switch is None or not curves.get(arm) or not curves.get(results["against"]):
        return None
    steps = max(([p["step"] for p in c] for c in curves[arm].values()), key=len)
    at = next((b for a, b in itertools.pairwise(steps) if a >= switch - 1), None)
    ours, theirs = (
        [p["entropy"] for c in curves[name].values() for p in c if p["step"] == at and "entropy" in p] for name in (arm, results["against"])
    )
    return float(np.mean(ours) / np.mean(theirs)) if ours and theirs else None


def retimed(results: dict, timed: dict, ours: str = "acpo") -> list[list[str]]:
    """Rows of the method over each arm that both know: in equal seconds as it was, with the clocks of `timed`, and seconds of a whole run there."""
    curves, clock = runs_of(results), runs_of(timed)
    arms = {arm: evidence.Clock(curves[arm], clock[arm]) for arm in clock if arm in curves}
    rows = []
    for other in arms:
        if other != ours and (now := evidence.seconds_difference(arms, ours, other, results["against"])):
            then = paired(results, ours, other, "seconds")
            taken = [f"{arms[arm].elapsed()[0, -1]:.1f}" for arm in (ours, other)]
            rows.append([results["name"], other, cell(then) if then else "", cell(now), *taken, str(len(arms[ours].timed))])
    return rows


SUMMARY = (("grpo", "GRPO"), ("grpo-kl", "GRPO with the KL"), ("acpo", "ACPO"))  # whose areas stand in a task's row


def summary(found: list[dict]) -> str:
    """One row a task: areas of SUMMARY, gains over GRPO and the best baseline, and what is left over GRPO with the credit shuffled: inside
    rollouts, everywhere."""
    gains = ["ACPO over GRPO", "over the best baseline", "in equal seconds", "shuffled over GRPO", "everywhere"]
    head = ["task", *(title for _, title in SUMMARY), *gains]
    body = []
    for results in found:
        arms, best = results["arms"], results["best_baseline"]
        ours, inside, everywhere = (arms.get(f"acpo{control}", {}) for control in ("", "-shuffled", "-everywhere"))
        areas = [f"{arms[arm]['area_tokens']:.3f}" if arm in arms else "" for arm, _ in SUMMARY]
        over = [ours.get("against_tokens"), ours.get("best_baseline_tokens"), ours.get("best_baseline_seconds")]
        over += [inside.get("against_tokens"), everywhere.get("against_tokens")]
        told = [exhibit.cell(x) for x in over]
        told[1] = f"{best}: {told[1]}" if told[1] else ""
        body.append([results["name"], *areas, *told])
    return table(head, body)


def over(found: list[dict], other: str) -> str:
    """One row an arm, one column a comparison: mean and standard error of the arm's area over that of the arm `other`, in equal tokens, paired."""
    areas = [{arm: entry["area_tokens_by_seed"] for arm, entry in results["arms"].items()} for results in found]
    body = []
    for arm in dict.fromkeys(arm for of in areas for arm in of if arm != other):
        pairs = [evidence.difference(of[arm], of[other]) if arm in of and other in of else None for of in areas]
        body.append([arm, *(f"{d['mean']:+.3f} +- {d['standard_error']:.3f} ({d['wins']}/{d['seeds']})" if d else "" for d in pairs)])
    head = [f"over {other}", *(results["name"] for results in found)]
    return table(head, body)


def verdict(met: bool) -> str:
    return "met" if met else "NOT met"


def cell(found: dict) -> str:
    return f"{found['iqm']:+.3f} [{found['low']:+.3f}, {found['high']:+.3f}], {found['wins']} of {found['seeds']} seeds"


def runs_of(results: dict) -> dict[str, dict[int, dict]]:
    """The records behind a table, by arm and seed, as far as its file keeps them: the points, whether the run broke down and, of newer files, how it
    ended. In older ones arms that were not timed beside the reference are of other code."""

    def ends(arm: str, seed: str) -> dict:
        if "ends" in results:
            return results["ends"][arm][seed]
        failure = next((f for f in results["arms"][arm]["failures"] if f.startswith(f"seed {seed}:")), "")
        return {"code": results["code"][0] if results["arms"][arm]["seconds"] is not None else "other", "failure": failure}

    return {
        arm: {int(seed): {"points": points, **ends(arm, seed)} for seed, points in curves.items()}
        for arm, curves in results["curves"].items()
        if arm in results["arms"]
    }


def load(path: Path) -> dict:
    """A results.json of `acpo compare`."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SystemExit(f"{path} cannot be read: {error}") from None
    if not isinstance(found, dict) or not {"name", "arms", "against", "code", "curves"} <= set(found):
        raise SystemExit(f"{path} must be a results.json of acpo compare")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, default=sorted(RESULTS.glob("*.json")))
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--summary", action="store_true")
    kind.add_argument("--over", metavar="ARM", default="")
    kind.add_argument("--figure", metavar="PNG", type=outputs.file)
    kind.add_argument("--clocks", metavar="FILE", type=Path, action="append")
    options = parser.parse_args()
    found = [load(path) for path in options.files]
    if options.figure:
        if len(found) != 1:
            parser.error(f"--figure draws one file, got {len(found)}")
        exhibit.draw(found[0], runs_of(found[0]), options.figure)
        return
    if options.summary:
        print(summary(found))
        return
    if options.clocks:
        rows = []
        for timed in map(load, options.clocks):
            task = timed["name"].removeprefix("clocks_")
            if not any(own := [results for results in found if results["name"].removeprefix("again_") == task]):
                parser.error(f"--clocks {timed['name']} is of none of the tasks {', '.join(results['name'] for results in found)}")
            rows += [row for results in own for row in retimed(results, timed)]
        head = ["task", "over", "in equal seconds, as timed then", "with these clocks", "seconds of ACPO", "of the other", "timed runs"]
        print(table(head, rows))
        return
    if options.over:
        if not any(options.over in results["arms"] for results in found):
            parser.error(f"--over names {options.over!r}, which is none of the arms {', '.join(found[0]['arms'] if found else ())}")
        print(over(found, options.over))
        return
    for results in found:
        print(f"**{results['name']}** (code {', '.join(results['code'])})\n\n{markdown(results)}\n")
        print("\n".join(f"* {line}" for line in bars(results)), end="\n\n")


if __name__ == "__main__":
    main()
