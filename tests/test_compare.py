"""`acpo compare`: the same warm start for every arm, nothing run twice, a kill changes nothing, and figures that can be checked by hand."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from acpo import comparison, evidence
from acpo.cli import main
from acpo.compare import Comparer
from acpo.config import ConfigError
from acpo.guard import Interrupted
from acpo.methods import ARMS
from acpo.rollout import RolloutError
from acpo.run import Run
from acpo.trainer import Trainer
from acpo.warmup import warm_up

ROOT = Path(__file__).resolve().parents[1]
TINY = """
settings:
  problems: {task: chain, steps: 2, modulus: 4, train: 40, held_out: 16, hard: 0.8, wrong_low: 0.5, wrong_high: 0.7}
  policy: {from_config: tiny, device: cpu}
  warmup: {steps: 60, batch: 32}
  rollout: {prompts: 2, group_size: 4, max_new_tokens: 14}
  verify: {extract: line}
  segmenter: {min_tokens: 2, max_tokens: 32, max_segments: 16, target_tokens: 4, entropy: false}
  trainer: {steps: 4, checkpoint_every: 1, eval_every: 2}
  eval: {samples: 2}
seeds: 0-1
tuning: {seeds: [90], learning_rates: [3.0e-4, 3.0e-3]}
against: grpo
arms:
  grpo: {rate: 3.0e-4}
  rloo:
  gentle: {method: acpo, credit.gain: 0.1, rate: rloo}
"""


@pytest.fixture(autouse=True)
def one_thread(deterministic):
    torch.set_num_threads(1)


def written(folder: Path, text: str = TINY) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tiny.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A comparison run to its end in this process, at a place that the other runs of this file use as well: settings name it."""
    folder = tmp_path_factory.mktemp("compare")
    comparer = Comparer(written(folder), folder / "out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Comparer, "_launch", lambda self, job, launch: self.one(job.key))
        torch.set_num_threads(1)
        comparer.run()
    return comparer


def curve(record: dict) -> list:
    """What a run's record says, without its clock."""
    return [{k: v for k, v in p.items() if k != "seconds"} for p in record["points"]] + record["passes"]


def test_every_run_is_there_once_and_nothing_is_left(compared):
    keys = sorted(p.parent.relative_to(compared.directory).as_posix() for p in compared.directory.rglob("finished.json"))
    rate = f"lr-{compared.rate('rloo'):g}"
    wanted = {"warm", *(f"grpo/lr-0.0003/seed-{s}" for s in (0, 1)), *(f"rloo/lr-{r:g}/seed-90" for r in (3e-4, 3e-3))}
    wanted |= {f"{arm}/{rate}/seed-{s}" for arm in ("rloo", "gentle") for s in (0, 1)}
    assert keys == sorted(wanted)
    assert compared.outstanding() == []
    assert not list(compared.directory.rglob("checkpoints")), "a finished run keeps no checkpoint"


def test_the_rate_is_the_better_one_of_the_grid(compared):
    areas = {r: evidence.mean_area(compared.finished(compared.job("rloo", r, 90))) for r in (3e-4, 3e-3)}
    assert areas[3e-4] != areas[3e-3]
    assert compared.rate("rloo") == max(areas, key=areas.get) == compared.rate("gentle")
    assert compared.rate("grpo") == 3e-4 and compared.tuning("grpo") == []


def test_an_arm_may_take_fewer_seeds(tmp_path):
    """They are the first ones run of all arms' where seeds go in order, and no other of its seeds is ever outstanding."""
    comparer = Comparer(written(tmp_path, TINY.replace("rate: rloo}", "rate: 1.0e-3, seeds: 1}")), tmp_path / "out")
    comparer.finished = lambda job: None if "seed-90" not in job.key and job.key != "warm" else {"points": [{"tokens": 1, "accuracy": 0.5}]}
    assert [j.key for j in comparer.outstanding(["grpo", "gentle"])] == ["grpo/lr-0.0003/seed-0", "grpo/lr-0.0003/seed-1", "gentle/lr-0.001/seed-1"]


def test_all_begin_with_the_weights_of_the_warm_start(compared, monkeypatch):
    chosen = compared.settings(compared.warm(0))
    warm = Trainer(chosen, Run(chosen))
    # Its checkpoint is gone, the exported policy is what remains: so the warm-up is repeated here.
    warm.run.log = lambda record: None
    monkeypatch.setattr("acpo.state.save", lambda trainer, label: None)
    warm_up(warm)
    for arm, seed in (("grpo", 0), ("gentle", 1)):
        settings = compared.settings(compared.job(arm, 3e-4, seed))
        trainer = Trainer(settings, Run(settings))
        weights = dict(trainer.policy.named_parameters())
        assert all(torch.equal(weights[name], p) for name, p in warm.policy.named_parameters())
        assert trainer.tokenizer.get_vocab() == warm.tokenizer.get_vocab()
        assert [p.id for p in trainer.train_problems] == [p.id for p in warm.train_problems]
    first = {arm: compared.finished(compared.job(arm, compared.rate(arm), 0))["points"][0]["accuracy"] for arm in compared.chosen.arms}
    assert set(first.values()) == {compared.finished(compared.warm(0))["points"][0]["accuracy"]}


def test_several_warm_starts(tmp_path, monkeypatch):
    """Seeds go round the warm starts by turns, every arm with its seed; the table tells what they say together."""
    text = TINY.replace("  rloo:\n", "").replace(", rate: rloo", ", rate: 1.0e-3").replace("seeds: 0-1", "seeds: 0-2\nwarm_starts: [5, 6]")
    comparer, order = Comparer(written(tmp_path, text.replace("steps: 4", "steps: 2")), tmp_path / "out"), []

    def launch(job, words):
        order.append(job.key)
        comparer.one(job.key)

    monkeypatch.setattr(comparer, "_launch", launch)
    comparer.run(most=1)
    cold, ready = comparer.outstanding()[:1], comparer.outstanding()[1:]
    assert [job.key for job in cold] == ["warm-6"] and {job.settings["seed"] for job in ready} == {0, 2}, "what begins with a finished one can go on"
    comparer.run()
    assert order[:2] == ["warm-5", "warm-6"] and len(order) == len(set(order)) == 2 + 2 * 3
    starts = [comparer.finished(comparer.warm(seed))["points"][0]["accuracy"] for seed in (0, 1)]
    weights = [(comparer.directory / f"warm-{start}" / "policy" / "model.safetensors").read_bytes() for start in (5, 6)]
    assert weights[0] != weights[1] and starts[0] != starts[1]
    for arm, rate in (("grpo", 3e-4), ("gentle", 1e-3)):
        for seed in (0, 1, 2):
            record = comparer.finished(comparer.job(arm, rate, seed))
            assert record["points"][0]["accuracy"] == starts[seed % 2] and record["config"]["policy"]["path"].endswith(f"warm-{5 + seed % 2}/policy")
    assert comparer.results()[0]["warm_start"]["accuracy"] == sum(starts) / 2


@pytest.mark.parametrize("who", ["the driver and its run", "the driver alone"])
def test_killed_and_continued_says_the_same(tmp_path, compared, monkeypatch, who):
    """SIGKILL while a run is between its checkpoints; what was finished stays untouched, and a run that lives on is waited for."""
    again = Comparer(written(tmp_path), tmp_path / "out")
    monkeypatch.setattr(Comparer, "_launch", lambda self, job, launch: self.one(job.key))
    again.run(most=1)
    before = (tmp_path / "out" / "warm" / "finished.json").stat().st_mtime_ns
    command = [sys.executable, "-m", "acpo.cli", "compare", str(again.path), "--dir", str(again.directory), "--arms", "grpo"]
    process = subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": str(ROOT)}, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 600
    while process.poll() is None and time.monotonic() < deadline and not list(again.directory.glob("grpo/*/*/checkpoints/step-*")):
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGSTOP)  # nothing ends between the kill and the command again
    os.killpg(process.pid, signal.SIGKILL) if who.endswith("run") else process.kill()
    process.wait(timeout=600)
    broken = [p.parent for p in again.directory.glob("grpo/*/*/checkpoints") if not (p.parent / "finished.json").exists()]
    assert broken, "the kill came between the first checkpoint and the end of a run"
    goes_on = threading.Timer(2.0, os.killpg, (process.pid, signal.SIGCONT))
    if who.endswith("alone"):
        goes_on.start()
    again.run(arms=["grpo"])
    goes_on.cancel()
    if who.endswith("alone"):
        assert "resumed" not in "".join((p / "log.txt").read_text() for p in broken)
        assert f"process {os.getpid()} " not in "".join((p / ".lock").read_text() for p in broken), "the run that lived on did it all"
    assert (tmp_path / "out" / "warm" / "finished.json").stat().st_mtime_ns == before
    for seed in (0, 1):
        assert curve(again.finished(again.job("grpo", 3e-4, seed))) == curve(compared.finished(compared.job("grpo", 3e-4, seed)))


STOPS = """
import os, signal, sys
from acpo import compare
record = compare.run_record
compare.run_record = lambda *a: (os.kill(os.getpid(), signal.SIGSTOP), record(*a))[1]
compare.Comparer(*sys.argv[1:]).one("warm")
"""


def test_a_run_is_anothers_until_its_record_stands(tmp_path):
    """Behind its last step, before finished.json: whoever comes then waits as well."""
    comparer = Comparer(written(tmp_path), tmp_path / "out")
    process = subprocess.Popen([sys.executable, "-c", STOPS, comparer.path, comparer.directory], env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert os.WIFSTOPPED(os.waitpid(process.pid, os.WUNTRACED)[1])
    threading.Timer(2.0, process.send_signal, (signal.SIGCONT,)).start()
    comparer.one("warm")
    assert process.wait(timeout=600) == 0
    assert f"process {process.pid} " in (comparer.directory / "warm" / ".lock").read_text(), "the other did it all"
    assert comparer.finished(comparer.warm(0)) is not None


def test_a_run_that_another_process_finished_is_left_alone(compared):
    """Between the look at what is outstanding and the run's own process."""
    path = compared.directory / "warm" / "finished.json"
    before = path.stat().st_mtime_ns
    compared.one("warm")
    assert path.stat().st_mtime_ns == before
    with pytest.raises(ConfigError, match="--one warm-9: no such run"):
        compared.one("warm-9")


def test_checkpoints_of_a_finished_run_go(compared):
    """A kill between the record and their removal leaves them."""
    left = compared.directory / compared.job("rloo", 3e-4, 90).key / "checkpoints"
    (left / "step-1").mkdir(parents=True)
    compared.run()
    assert not left.exists()


@pytest.mark.parametrize("damage", [b"", b"{", b"\xff", b"[]", b"5", b"{}", b'{"config": 3}'])
def test_a_record_that_is_damaged_is_named(compared, damage, capsys):
    path = compared.directory / "warm" / "finished.json"
    whole = path.read_bytes()
    path.write_bytes(damage)
    try:
        assert main(["compare", str(compared.path), "--dir", str(compared.directory), "--report"]) == 1
    finally:
        path.write_bytes(whole)
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"acpo: {path} is damaged: remove the folder {path.parent}, and the same command repeats the run"


def test_the_command_writes_table_figure_and_page(compared, capsys):
    assert main(["compare", str(compared.path), "--dir", str(compared.directory), "--report"]) == 0
    assert "gentle" in capsys.readouterr().out
    results = json.loads((compared.directory / "results.json").read_text())
    assert list(results["arms"]) == ["grpo", "rloo", "gentle"] and len(results["code"]) == 1
    for arm, found in results["arms"].items():
        assert found["seeds"] == [0, 1] and found["failures"] == [] and found["rate"] == compared.rate(arm)
        assert {
            "area_tokens",
            "area_all_tokens",
            "area_seconds",
            "pass@1 after",
            "pass@2 after",
            "entropy_stage1_end",
            "reliability",
            "zero_variance",
        } <= set(found)
        assert (found["against_tokens"] is not None and found["against_tokens"]["seeds"] == 2) if arm != "grpo" else "against_tokens" not in found
    assert (compared.directory / "results.png").stat().st_size > 10_000
    assert "[too few seeds]" in (compared.directory / "results.html").read_text()
    page = (compared.directory / "results.html").read_text()
    assert "data:image/png;base64," in page and "gentle" in page and "http" not in page
    assert results["tuning"]["runs"] == 2 and results["tuning"]["seconds"] > 0 and "2 runs, " in page
    assert f"pass@2 {results['warm_start']['pass@2']:.3f}" in page


def test_without_samples_for_pass_at_k_there_is_a_table_all_the_same(tmp_path, compared, capsys):
    text = TINY.replace("eval: {samples: 2}", "eval: {samples: 0}")
    text = text[: text.index("  rloo:")].replace("grpo: {rate: 3.0e-4}", "grpo: {rate: 3.0e-4, trainer.steps: 1}").replace("seeds: 0-1", "seeds: 0")
    comparer = Comparer(written(tmp_path, text), tmp_path / "out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Comparer, "_launch", lambda self, job, launch: self.one(job.key))
        comparer.run()
    assert main(["compare", str(comparer.path), "--dir", str(comparer.directory), "--report"]) == 0
    results = json.loads((comparer.directory / "results.json").read_text())
    assert results["arms"]["grpo"]["seeds"] == [0] and not [key for key in {**results["arms"]["grpo"], **results["warm_start"]} if "pass@" in key]


def test_a_run_that_breaks_down_is_a_result(tmp_path, monkeypatch):
    text = TINY.replace("grpo: {rate: 3.0e-4}", "grpo: {rate: 1.0e+30, optimizer.warmup_steps: 0}").replace("seeds: 0-1", "seeds: 0")
    comparer = Comparer(written(tmp_path, text), tmp_path / "out")
    monkeypatch.setattr(Comparer, "_launch", lambda self, job, launch: self.one(job.key))
    comparer.run(arms=["grpo"])
    record = comparer.finished(comparer.job("grpo", 1e30, 0))
    assert "not finite" in record["failure"] or "is nan" in record["failure"]
    assert record["points"][-1]["accuracy"] == 0 and record["points"][-1]["step"] == 4 and evidence.mean_area(record) < 0.5


def test_an_engine_that_fails_is_no_result(tmp_path, monkeypatch):
    """What stopped was not the policy: the run keeps its checkpoints, is outstanding as before, and goes on to the numbers of a whole one."""
    text = TINY.replace("seeds: 0-1", "seeds: 0")
    comparer = Comparer(written(tmp_path, text), tmp_path / "out")
    monkeypatch.setattr(Comparer, "_launch", lambda self, job, launch: self.one(job.key))
    sampled, rollout = [], Trainer._rollout

    def broken(self):
        sampled.append(self.step_number)
        if len(sampled) == 3:
            raise RolloutError("the server is gone")
        return rollout(self)

    monkeypatch.setattr(Trainer, "_rollout", broken)
    job = comparer.job("grpo", 3e-4, 0)
    with pytest.raises(Interrupted, match="the server is gone; checkpoint step-2 stands: the same command continues from it"):
        comparer.run(arms=["grpo"])
    assert comparer.finished(job) is None and job.key in [j.key for j in comparer.outstanding(["grpo"])]
    comparer.run(arms=["grpo"])
    assert sampled == [1, 2, 3, 3, 4] and comparer.finished(job)["failure"] == ""
    monkeypatch.chdir(tmp_path)
    again = Comparer("tiny.yaml", "out")  # the same folder by another name
    assert again.finished(job) == comparer.finished(job)


def test_other_settings_are_refused(tmp_path, compared):
    changed = Comparer(written(tmp_path, TINY.replace("max_new_tokens: 14", "max_new_tokens: 13")), compared.directory)
    with pytest.raises(ConfigError, match=r"holds a run with other settings .*rollout.max_new_tokens: 14 -> 13.* give another --dir"):
        changed.outstanding()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seeds: 0-1", "seeds: many", "seeds must be a range such as 0-15, a number or a list, got 'many'"),
        ("against: grpo", "against: gpro", "against names 'gpro', which is none of the arms grpo, rloo, gentle"),
        ("seeds: [90]", "seeds: [1]", "seed 1 is in seeds and in tuning.seeds"),
        ("rate: rloo", "rate: gentle", "arms.gentle.rate must be a number or an arm that has its own choice"),
        ("  rloo:", "  warm: {credit.gain: 0.5}\n  rloo:", r"an arm's name must be letters, .* not warm or warm-SEED .*, got 'warm'"),
        ("  rloo:", "  warm-1: {credit.gain: 0.5}\n  rloo:", "an arm's name .*, got 'warm-1'"),
        ("  rloo:", "  ../up: {credit.gain: 0.5}\n  rloo:", "an arm's name .*, got '../up'"),
        ("  rloo:", "  1: {credit.gain: 0.5}\n  rloo:", "an arm's name .*, got 1"),
        ("  rloo:", "  rllo:", "arms.rllo is not known; the known arms are grpo"),
        ("credit.gain", "credit.gian", "arms.gentle: unknown setting 'credit.gian'; the nearest is 'credit.gain'"),
        ("tuning:", "tunning:", "unknown key 'tunning'"),
        ("learning_rates: [3.0e-4, 3.0e-3]", "rates: [1]", "unknown key tuning.rates"),
        (", learning_rates: [3.0e-4, 3.0e-3]", "", "tuning needs both seeds and learning_rates"),
        ("settings:", "setup:", "unknown key 'setup'"),
        ("seeds: 0-1", "seeds: 0-1\nwarm_starts: []", "warm_starts must name at least one seed, got \\[\\]"),
        ("rate: rloo", "rate: rloo, seeds: 1-2", "arms.gentle.seeds must be among seeds, which lack 2"),
        ("grpo: {rate", "grpo: {seeds: 0, rate", r"arms\.grpo must have all seeds, for `against` names it: without seed 1 no arm"),
        ("rate: rloo", "optimizer.learning_rate: 0.5", r"arms\.gentle\.optimizer\.learning_rate is no setting of an arm: every run has it from rate"),
        ("rate: rloo", "seed: 3", r"arms\.gentle\.seed is no setting of an arm: every run has it from seeds"),
        ("seeds: 0-1", "seeds: 3-1", "seeds must name at least one seed, got '3-1'"),
        ("seeds: [90]", "seeds: []", r"tuning\.seeds must name at least one seed, got \[\]"),
        ("seeds: 0-1", "seeds: [[1]]", r"seeds must be a range such as 0-15, a number or a list, got \[\[1\]\]"),
        ("seeds: 0-1", "seeds: [null]", r"seeds must be a range .*, got \[None\]"),
        ("seeds: 0-1", "seeds: [0.5, 1.7]", r"seeds must be a range .*, got \[0\.5, 1\.7\]"),
        ("seeds: 0-1", "seeds: [true]", r"seeds must be a range .*, got \[True\]"),
        ("seeds: 0-1", "seeds: [-1]", r"seeds must lie in \[0, 2\^63\), got -1"),
        ("seeds: 0-1", "seeds: 99999999999999999999", r"seeds must lie in \[0, 2\^63\), got 99999999999999999999"),
        ("seeds: 0-1", "seeds: 0-99999999999999", "seeds must name at most 100,000 seeds, got '0-99999999999999'"),
        ("seeds: 0-1", "seeds: [0, 1, 0]", "seeds names 0 twice"),
        ("seeds: [90], ", "", "tuning needs both seeds and learning_rates"),
        ("[3.0e-4, 3.0e-3]", "0.001", r"tuning\.learning_rates must be a list of numbers, got 0\.001"),
        ("[3.0e-4, 3.0e-3]", "[a]", r"tuning\.learning_rates must be a float, got 'a'"),
        ("[3.0e-4, 3.0e-3]", "[[1]]", r"tuning\.learning_rates must be a float, got \[1\]"),
        ("[3.0e-4, 3.0e-3]", "[-1.0]", r"tuning\.learning_rates must be greater than 0, got -1\.0"),
        ("[3.0e-4, 3.0e-3]", "[.nan]", r"tuning\.learning_rates must be finite, got nan"),
        ("[3.0e-4, 3.0e-3]", "[3.0e-4, 3e-4]", r"tuning\.learning_rates names 0\.0003 twice"),
        ("rate: rloo", "rate: rllo", r"arms\.gentle\.rate must be a number or an arm that has its own choice, got 'rllo'"),
        ("rate: rloo", "rate: [1]", r"arms\.gentle\.rate must be a float, got \[1\]"),
        ("rate: rloo", "rate: true", r"arms\.gentle\.rate must be a float, got True"),
        ("rate: rloo", "rate: -1", r"arms\.gentle\.rate must be greater than 0, got -1\.0"),
        ("rate: rloo", "rate: inf", r"arms\.gentle\.rate must be finite, got inf"),
        ("against: grpo", "against: [grpo]", r"against names \['grpo'\], which is none of the arms"),
        ("against: grpo", "baselines: 5", "baselines must be a list of arms, got 5"),
        ("against: grpo", "baselines: grpo", "baselines must be a list of arms, got 'grpo'"),
        ("against: grpo", "baselines: [[grpo]]", r"baselines names \['grpo'\], which is none of the arms"),
        ("against: grpo", "baselines: [grpo, grpo]", "baselines names grpo twice"),
    ],
)
def test_bad_files(tmp_path, old, new, message):
    assert old in TINY
    with pytest.raises(ConfigError, match=r"tiny\.yaml.*" + message):
        comparison.load(written(tmp_path, TINY.replace(old, new)))


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "compare").rglob("*.yaml")), ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_comparisons_of_the_repository_load(path):
    chosen = comparison.load(path)
    fixed = all(isinstance(chosen.rates.get(arm), float) for arm in chosen.arms)
    assert bool(chosen.learning_rates) != fixed and not set(chosen.seeds) & set(chosen.tuning_seeds)
    for arm, settings in chosen.arms.items():  # an arm at another rate is called after it
        known = ARMS[arm.removesuffix("-anew")]
        assert arm in ARMS or settings == known, arm


def test_the_recipes_comparison_loads(tmp_path):
    """The file that docs/recipes.md shows for problems of one's own, as it stands there."""
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    block = next(text for text in re.findall(r"^```\n(.*?)^```$", page, flags=re.M | re.S) if text.startswith("# compare.yaml"))
    chosen = comparison.load(written(tmp_path, block))
    assert chosen.settings["policy.path"] == "Qwen2.5-0.5B" and chosen.arms["gentle"]["method"] == "acpo"
    spelled = comparison.load(written(tmp_path, block.replace("{rate: acpo}", "{rate: 5e-4}")))  # a string to YAML 1.1
    assert spelled.rates["acpo-everywhere"] == 5e-4
    assert chosen.rates == {"acpo-everywhere": "acpo", "gentle": "acpo"} and len(chosen.learning_rates) == 3


def test_settings_of_another_comparison(tmp_path):
    """short.yaml is the long multiplication; a file may name one in another folder, and what it names must be there."""
    own, other = (comparison.load(ROOT / "configs" / "compare" / f"{name}.yaml").settings for name in ("short", "multiplication"))
    assert own == other and own["problems.task"] == "multiplication"
    written(tmp_path / "there")
    text = "settings: there/tiny.yaml\n" + TINY[TINY.index("seeds:") :]
    assert comparison.load(written(tmp_path, text)).settings == comparison.load(tmp_path / "there" / "tiny.yaml").settings
    with pytest.raises(ConfigError, match=r"no such configuration file: .*elsewhere\.yaml"):
        comparison.load(written(tmp_path, text.replace("there/tiny", "there/elsewhere")))
    written(tmp_path / "there", "settings: tiny.yaml\n")
    with pytest.raises(ConfigError, match=r"there/tiny\.yaml: settings must be a mapping, got 'tiny.yaml'"):
        comparison.load(written(tmp_path, text))


def test_runs_go_side_by_side(tmp_path, monkeypatch):
    """With two jobs two runs are under way at once, each once, the warm start alone before them."""
    comparer = Comparer(written(tmp_path, TINY.replace("  rloo:\n", "").replace(", rate: rloo", ", rate: 1.0e-3")), tmp_path / "out")
    done, together, begun = set(), threading.Barrier(2, timeout=60), []

    def launch(job, words):
        begun.append(job.key)
        if job.key != "warm":
            together.wait()  # never passed by a run alone
        done.add(job.key)

    monkeypatch.setattr(comparer, "_launch", launch)
    monkeypatch.setattr(comparer, "finished", lambda job: {} if job.key in done else None)
    comparer.run(jobs=2)
    assert begun[0] == "warm" and sorted(begun[1:]) == sorted(f"{arm}/seed-{s}" for arm in ("grpo/lr-0.0003", "gentle/lr-0.001") for s in (0, 1))


def test_launch_that_is_no_words(tmp_path, capsys):
    assert main(["compare", str(written(tmp_path)), "--dir", str(tmp_path / "out"), "--launch", "nice 'n"]) == 2
    assert capsys.readouterr().err == 'acpo: --launch must be words as a shell reads them, got "nice \'n": No closing quotation\n'
