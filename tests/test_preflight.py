"""Before, during and at the first step of a run: what is said, what is checked, what a dry run leaves behind (nothing)."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from loop import settings, trainer_of, write_config
from rich.console import Console

from acpo import first_step, memory, preflight, trackers
from acpo.cli import main
from acpo.config import ConfigError
from acpo.display import Display
from acpo.policy import byte_tokenizer

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    torch.manual_seed(0)
    out = trainer_of(tmp_path_factory.mktemp("preflight"), "trainer.steps=1")
    yield out
    out.close()


# --- before -------------------------------------------------------------------------------------------------------------------------


def test_the_start_says_what_will_run(trainer):
    said = "\n".join(f"{name} {text}" for name, text in preflight.summary(trainer))
    parameters = sum(p.numel() for p in trainer.policy.parameters())
    for word in (
        f"{parameters:,} parameters",
        "vocabulary 57",
        "4 problems x 4 = 16 rollouts",
        "engine local",
        "40 to train on, 16 held out",
        "exact match",
    ):
        assert word in said, word
    assert preflight.kernels(trainer.policy.device) in said
    trainer.run.keeps_rollouts = False
    assert "pip install -e '.[report]'" in "\n".join(f"{name} {text}" for name, text in preflight.summary(trainer))


def test_the_memory_estimate_is_its_formula(trainer):
    found = memory.estimate(trainer.config, trainer.policy, 10, 16)
    terms = {t.name: t.bytes for t in found}
    parameters = sum(p.numel() for p in trainer.policy.parameters())
    assert terms["weights"] == terms["gradients"] == terms["reference"] == 4 * parameters and terms["optimizer"] == 8 * parameters
    assert terms["activations"] == 16 * 24 * 2 * (10 * 64 + 4 * 128) * 4  # 16 rollouts of 10 + 14 tokens, 2 layers, float32
    assert terms["workspace"] == 5 * 4 * max(p.numel() for p in trainer.policy.parameters())
    assert terms["cache"] == 32 * 24 * 2 * 2 * 64 * 4  # an evaluation's 16 problems, two rollouts of each
    assert terms["logits"] == 32 * 57 * 4 * 3
    at_a_time = [terms["cache"] + terms["logits"], terms["gradients"] + terms["activations"] + terms["workspace"]]
    assert memory.total(found) == sum(terms.values()) - min(at_a_time)
    more = memory.estimate(trainer.config, trainer.policy, 10, 1000)
    assert {t.name: t.bytes for t in more}["cache"] == 256 * 24 * 2 * 2 * 64 * 4, "of more problems 256 rollouts at a time"


@pytest.mark.parametrize("tokenizer", ["bytes", pytest.param("wide", marks=pytest.mark.slow)])
def test_the_memory_estimate_is_near_the_peak_of_a_run(tmp_path, tokenizer):
    """Of a process of its own, whose high-water mark the kernel keeps; with a vocabulary of bytes, and with one that makes the head the largest."""
    if tokenizer == "wide":
        wide = byte_tokenizer()
        wide.add_tokens([f"<{i}>" for i in range(120_000)])
        wide.save_pretrained(tmp_path / "wide")
    code = "import sys; from acpo.cli import main; code = main(sys.argv[1:]); print(open('/proc/self/status').read()); sys.exit(code)"
    words = [
        "train", str(ROOT / "configs" / "gsm8k.yaml"), f"problems.path={ROOT / 'tests/fixtures/problems.jsonl'}", "problems.held_out=0.2",
        "policy.from_config=tiny", f"policy.tokenizer={tmp_path / 'wide' if tokenizer == 'wide' else tokenizer}", "trainer.threads=1",
        "trainer.steps=1", "rollout.max_new_tokens=24", "eval.samples=0", f"run_dir={tmp_path / 'run'}",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    number, unit = re.search(r"estimate ([\d.]+) ([MG])B", done.stdout).groups()
    estimate = float(number) * {"M": 2**20, "G": 2**30}[unit]
    peak = 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", done.stdout)[1])
    assert 0.75 * peak < estimate < 1.25 * peak, (estimate / 2**20, peak / 2**20, done.stdout)


def test_a_dry_run_checks_everything_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = write_config(tmp_path)
    assert main(["train", str(config), "--dry-run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    names = [c["name"] for c in found["checks"]]
    assert found["ok"] and names == ["settings", "problems", "policy", "batch", "lengths", "verifier", "engine", "memory", "log", "directory"]
    assert [p.name for p in tmp_path.iterdir()] == ["mini.yaml"]


@pytest.mark.parametrize(
    ("overrides", "code", "said"),
    [
        (["rollout.max_new_tokens=40000"], 1, "has 10 tokens, with rollout.max_new_tokens = 40000 that is 40010, and "),
        (["rollout.batch_tokens=16"], 1, "FAIL lengths    rollout.batch_tokens = 16 holds no single rollout"),
        (["rollout.engine=vllm_server", "rollout.server.url=http://127.0.0.1:9"], 1, "FAIL engine     no server answers at rollout.server.url"),
        (["run_dir=mini.yaml/run"], 1, "FAIL directory  mini.yaml/run: "),
        (["trainer.log=wandb"], 1, "FAIL log        trainer.log = 'wandb' needs wandb: pip install -e '.[wandb]'"),
        (["verify.kind=no_such_module:f"], 2, "no_such_module"),
        (["verify.kind=math:sqrt"], 1, "TypeError: math.sqrt() takes exactly one argument (2 given)"),
        (["trainer.stepz=3"], 2, "unknown setting"),
    ],
)
def test_what_a_dry_run_finds(tmp_path, monkeypatch, capsys, overrides, code, said):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a, _real=importlib.util.find_spec: None if name == "wandb" else _real(name, *a))
    assert main(["train", str(write_config(tmp_path)), "--dry-run", *overrides]) == code
    shown = capsys.readouterr()
    assert said in shown.out + shown.err
    assert [p.name for p in tmp_path.iterdir()] == ["mini.yaml"]


def test_a_dry_run_over_a_run_with_other_settings(finished_run, capsys, tmp_path):
    arguments = ["train", str(write_config(tmp_path)), f"run_dir={finished_run}", "--dry-run"]
    assert main(arguments) == 0 and "continues from step-8" in capsys.readouterr().out
    assert main([*arguments, "optimizer.learning_rate=0.1"]) == 1
    said = capsys.readouterr().out
    assert "other settings (optimizer.learning_rate" in said
    on = re.search(r"another run goes on from its policy with (.*)", said).group(1).split()
    assert main([*arguments[:2], f"run_dir={tmp_path / 'on'}", "trainer.steps=1", "optimizer.learning_rate=0.1", *on]) == 0, capsys.readouterr()
    capsys.readouterr()
    assert main([*arguments, "trainer.log=tensorboard"]) == (0 if importlib.util.find_spec("tensorboard") else 1)
    assert "other settings" not in capsys.readouterr().out, "who is told of the numbers changes none"


# --- during -------------------------------------------------------------------------------------------------------------------------


def recorded(**values) -> dict:
    return {"phase": "stage1", "step": 1, "reward": 0.5, "entropy": 0.25, "attribution/reliability": 0.75, "tokens/per_second": 1234.5, **values}


def test_one_bar_a_phase_fits_into_eighty_columns():
    display = Display()
    display.console = Console(file=io.StringIO(), force_terminal=True, width=80, color_system=None)
    display.start_phase("stage 1", 1000, 0)
    display.show(recorded(**{"eval/accuracy": 0.123, "step": 321}))
    display.finish()
    last = [line for line in display.console.file.getvalue().replace("\r", "\n").split("\n") if "reward" in line][-1]
    for word in ("stage 1", "321/1000", "reward 0.50", "acc 0.123", "H 0.250", "rel 0.75", "tok/s 1234"):
        assert word in last, last


def test_the_start_stands_in_two_columns(capsys):
    display, rows = Display(), [("run", "runs/x"), ("memory", "[bold]one two three four five six seven eight nine ten[/bold]")]
    display.console = Console(file=io.StringIO(), force_terminal=True, width=40, color_system=None)
    display.facts(rows)
    lines = display.console.file.getvalue().splitlines()
    assert lines[0].rstrip() == "run     runs/x" and lines[1].startswith("memory  [bold]one") and all(len(line) <= 40 for line in lines)
    assert len(lines) > 2 and all(line.startswith(" " * 8) for line in lines[2:]), "what is long stays in its column"
    Display().facts(rows)
    assert capsys.readouterr().out == "run       runs/x\nmemory    [bold]one two three four five six seven eight nine ten[/bold]\n"
    Display(quiet=True).facts(rows)
    assert capsys.readouterr().out == ""


def test_the_first_evaluation_does_not_set_the_warm_up_back():
    display = Display()
    display.console = Console(file=io.StringIO(), force_terminal=True, width=80, color_system=None)
    display.start_phase("warm-up", 50, 0)
    display.show({"phase": "warmup", "step": 50, "warmup/loss": 1.0})
    display.show({"phase": "start", "step": 0, "eval/accuracy": 0.5})
    assert display.progress.tasks[0].completed == 50
    display.finish()


def test_plain_lines_where_nobody_watches(capsys):
    display = Display()
    display.start_phase("stage 1", 100, 0)
    display.show(recorded())
    display.show(recorded(**{"eval/accuracy": 0.1}))
    display.said -= 60
    display.show(recorded(step=50))
    display.finish()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2, "an evaluation, and what is due after a while"
    assert (
        lines[0].startswith("stage1 step 1 of 100, ") and "left: reward 0.50 acc 0.100" in lines[0] and lines[1].startswith("stage1 step 50 of 100")
    )


def test_quiet(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = ["train", str(write_config(tmp_path)), "warmup.steps=0", "trainer.steps=1", "eval.samples=0", "problems.held_out=4"]
    monkeypatch.setattr(first_step, "warnings", lambda *_: ["[bold]made up[/bold]"])
    assert main([*arguments, "--json"]) == 0
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    assert shown.err == "acpo: warning: [bold]made up[/bold]\n"
    assert found["step"] == 1 and Path(found["policy"]).is_dir() and all(Path(f).is_file() for f in found["files"])


# --- the first step -----------------------------------------------------------------------------------------------------------------

GOOD = {
    "credit/nonzero_ratio": 0.8, "grad_norm": 0.5, "ratio/min": 0.98, "ratio/max": 1.02, "ratio/first_off": 1e-7, "reward": 0.4, "sampling/kl": 1e-4,
    "rollout/sampled": 16, "verify/unparseable": 1, "verify/timeouts": 0, "verify/crashes": 0, "verify/kills": 0, "completions/clipped_ratio": 0.1,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, None),
        ({"credit/nonzero_ratio": 0.0, "reward": 0.0}, "every advantage is 0: all 4 outcomes of every problem are equal.*easier problems"),
        ({"credit/nonzero_ratio": 0.0, "reward": 1.0}, "harder problems"),
        ({"grad_norm": 0.0}, "the gradient is 0 although advantages are not"),
        ({"ratio/first_off": 0.01}, "the first ratio is off 1 by 0.01"),
        (
            {"verify/timeouts": 9, "verify/kills": 9},
            r"the verifier lost 9 of 16 rollouts \(9 timeouts, 9 workers killed\).*Raise verify.timeout \(now 5 s\)",
        ),
        ({"verify/unparseable": 16, "completions/clipped_ratio": 1.0}, "no answer could be read from 16 of 16 rollouts, 100% were cut"),
        ({"verify/errors": 1}, "verify.kind = 'auto' raised for 1 of 16 rollouts, which are left out: KeyError: 'gold'"),
        ({"verify/unparseable": 16, "rollout/sampled": 48}, None),  # of three rounds of dynamic sampling
    ],
)
def test_what_is_wrong_with_a_first_step(tmp_path, change, said):
    found = first_step.warnings({**GOOD, **change}, settings(tmp_path), said="KeyError: 'gold'")
    if said is None:
        assert found == []
    else:
        assert len(found) == 1 and re.search(said, found[0]), found


def test_what_raised_is_in_the_first_line(tmp_path):
    config = settings(tmp_path)
    assert first_step.line(GOOD, config).endswith("0 lost by the verifier")
    assert first_step.line({**GOOD, "verify/errors": 7}, config).endswith("0 lost by the verifier, 7 left out because it raised")


def test_the_first_step_of_a_policy_that_is_never_right(tmp_path, capsys):
    """A random policy: all outcomes equal, and without attribution no advantage anywhere."""
    trainer = trainer_of(tmp_path, "method=grpo", "trainer.steps=1", "eval.samples=0", "problems.held_out=2", "problems.modulus=10")
    trainer.train()
    shown = capsys.readouterr().out
    assert "first update: 0% of the tokens have an advantage, gradient norm 0" in shown
    assert "warning: every advantage is 0" in shown or "warning: no answer could be read" in shown


# --- trackers -----------------------------------------------------------------------------------------------------------------------


def test_trackers_are_told_the_numbers(tmp_path, monkeypatch):
    """wandb's language, spoken to a stand-in; the real packages: tests/external/loggers/run.sh."""
    told: list = []
    run = types.SimpleNamespace(define_metric=lambda *a, **k: told.append(("define", a, k)))
    fake = types.SimpleNamespace(
        __name__="wandb",
        init=lambda **k: told.append(("init", k)) or run,
        log=lambda values: told.append(("log", values)),
        finish=lambda: told.append(("finish",)),
    )
    monkeypatch.setitem(__import__("sys").modules, "wandb", fake)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: fake)
    tracker = trackers.build(settings(tmp_path, "trainer.log=wandb"), tmp_path / "run", 0, 0)
    tracker.log({"phase": "warmup", "step": 50, "warmup/loss": 1.0})
    tracker.log(recorded(reason="words are no number"))
    tracker.close()
    assert told[0][1]["project"] == "mini" and told[0][1]["config"]["method"] == "acpo" and told[0][1]["resume"] == "allow"
    assert ("log", {"warmup/loss": 1.0, "warmup/step": 50}) in told and told[-1] == ("finish",)
    assert told[-2] == ("log", {k: v for k, v in recorded().items() if k != "phase"})


@pytest.mark.parametrize(("steps", "purged"), [((0, 0), (0, 0)), ((0, 50), (0, 51)), ((4, 100), (5, 101))])
def test_tensorboard_drops_later_steps_of_each_phase_by_itself(tmp_path, monkeypatch, steps, purged):
    """A stand-in for its writer; the real one, in a run that is continued: tests/external/loggers/run.sh."""
    told: dict[str, list] = {}

    class Writer:
        def __init__(self, folder, purge_step):
            self.told = told[Path(folder).name] = [purge_step]

        def add_scalar(self, name, value, step):
            self.told.append((name, step))

        def flush(self):
            pass

        close = flush

    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: name)
    tracker = trackers.build(settings(tmp_path, "trainer.log=tensorboard"), tmp_path / "run", *steps)
    tracker.log({"phase": "warmup", "step": 50, "warmup/loss": 1.0})
    tracker.log({"phase": "stage1", "step": 5, "grad_norm": 1.0})
    tracker.close()
    assert told == {"tensorboard": [purged[0], ("grad_norm", 5)], "warmup": [purged[1], ("warmup/loss", 50)]}


def test_a_tracker_that_is_not_installed_stops_the_run_before_it_begins(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a, _real=importlib.util.find_spec: None if name == "trackio" else _real(name, *a))
    trainer = trainer_of(tmp_path, "trainer.log=trackio")
    with pytest.raises(ConfigError, match=r"trainer.log = 'trackio' needs trackio: pip install -e '.\[trackio\]'"):
        trainer.train()
    assert not (tmp_path / "run").exists()
