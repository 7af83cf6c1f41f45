"""The console script where something from outside ends it: a signal, Ctrl-C, a reader that stops reading."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from loop import one_line, records, write_config

from acpo.cli import main
from acpo.trainer import Trainer

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def one_thread(deterministic):
    torch.set_num_threads(1)


@pytest.fixture
def interruptible():
    """A shell's background jobs inherit that Ctrl-C is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_run_that_a_signal_ends_says_so_as_json_too(tmp_path, monkeypatch, capfd, interruptible, number, code):
    monkeypatch.chdir(tmp_path)
    step = Trainer.step

    def signalled(self):
        os.kill(os.getpid(), number)
        return step(self)

    monkeypatch.setattr(Trainer, "step", signalled)
    assert main(["train", str(write_config(tmp_path)), "warmup.steps=0", "eval.samples=0", "--json"]) == code
    said = capfd.readouterr()
    assert json.loads(said.out) == {"stopped": "step 1", "run": "runs/mini-acpo-0"}
    assert ("interrupted: the step under way is the last one" in said.err) == (number == signal.SIGINT)


def test_ctrl_c_in_the_warm_up_saves_and_a_second_one_ends_at_once(tmp_path, monkeypatch, capfd, interruptible):
    from acpo import warmup

    run, loss, calls = tmp_path / "run", warmup.imitation_loss, []
    arguments = ["train", str(write_config(tmp_path)), f"run_dir={run}", "warmup.steps=9", "trainer.steps=1", "eval.samples=0"]

    def interrupted(*a):
        calls.append(1)
        for _ in range({3: 1, 6: 2}.get(len(calls), 0)):
            os.kill(os.getpid(), signal.SIGINT)
        return loss(*a)

    monkeypatch.setattr(warmup, "imitation_loss", interrupted)
    assert main(arguments) == 130
    assert "ended by SIGINT at warm-up step 3, saved: the same command continues" in capfd.readouterr().out
    assert (main(arguments), len(calls)) == (130, 6)
    assert capfd.readouterr().err.splitlines()[-1] == "acpo: interrupted; the same command continues from the last checkpoint"
    assert main(arguments) == 0 and "resumed from warm-up step 3" in capfd.readouterr().out


def test_interrupted(tmp_path, monkeypatch, capsys):
    from acpo.trainer import Trainer

    def interrupt(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "step", interrupt)
    code, error = one_line(capsys, ["train", str(write_config(tmp_path)), f"run_dir={tmp_path / 'run'}", "warmup.steps=0", "eval.samples=0"])
    assert code == 130 and "the same command continues" in error


@pytest.mark.parametrize("verb", ["train", "doctor"])
def test_interrupted_while_torch_is_imported(tmp_path, verb):
    (tmp_path / "torch").mkdir()
    handled = "signal.signal(signal.SIGINT, signal.default_int_handler)"  # a shell's background jobs inherit that it is ignored
    code = f"import os, signal, time\n{handled}\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)\n"
    (tmp_path / "torch" / "__init__.py").write_text(code)
    done = subprocess.run(
        [sys.executable, "-m", "acpo.cli", verb, *([str(write_config(tmp_path))] if verb == "train" else [])],
        capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}, timeout=60,
    )  # fmt: skip
    again = "; the same command continues from the last checkpoint" if verb == "train" else ""
    assert (done.returncode, done.stderr) == (130, f"acpo: interrupted{again}\n")


@contextlib.contextmanager
def no_reader():
    """A standard output whose reader is gone, as behind `| head`; nothing is left in it that could fail at exit. No fixture: pytest puts its own
    in place between those and the test."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as file, contextlib.redirect_stdout(file):
        yield
        file.flush()


def test_training_goes_on_without_a_reader(tmp_path, capfd):
    arguments = ["train", str(write_config(tmp_path)), f"run_dir={tmp_path / 'run'}", "warmup.steps=0", "trainer.steps=2", "eval.samples=0"]
    with no_reader():
        assert main(arguments) == 0
    assert records(tmp_path / "run")[-1]["step"] == 2 and (tmp_path / "run" / "policy").is_dir() and not capfd.readouterr().err


@pytest.mark.parametrize("as_json", [[], ["--json"]])
@pytest.mark.parametrize("verb", ["eval", "report", "doctor", "completion"])
def test_a_reader_that_stops_reading_is_no_error(tmp_path, monkeypatch, finished_run, capfd, verb, as_json):
    from acpo import selfcheck

    monkeypatch.setattr(selfcheck, "checks", lambda: [])
    run = str(finished_run)
    words = {"eval": [run, "--samples", "0"], "report": [run, "--out", str(tmp_path / "x.csv")], "doctor": [], "completion": ["fish"]}[verb]
    with no_reader():
        assert main([verb, *words, *([] if verb == "completion" else as_json)]) == 0
    assert not capfd.readouterr().err
