"""The console script: whatever a user gets wrong is one line on stderr and a non-zero exit, and a run can be looked at afterwards."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from loop import one_line, records, write_config
from tokenizers import Regex, models, pre_tokenizers

from acpo import display
from acpo.cli import main
from acpo.commands import print_table
from acpo.policy import Policy, byte_tokenizer
from acpo.synthetic import tokenizer

ROOT = Path(__file__).resolve().parents[1]
GOOD = "".join(f'{{"problem": "{i}+1", "answer": "{i + 1}"}}\n' for i in range(10))


@pytest.fixture(autouse=True)
def one_thread(deterministic):
    torch.set_num_threads(1)


def tokenizer_without(folder: Path, *missing: str) -> Path:
    tokens = tokenizer()
    tokens.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    kept = {k: v for k, v in json.loads(path.read_text()).items() if k not in missing}
    path.write_text(json.dumps(kept))
    return folder


BAD = [
    ("missing configuration", ["absent.yaml"], 2, "no such configuration file: absent.yaml"),
    ("unknown key", ["mini.yaml", "trainer.stepz=3"], 2, "unknown setting 'trainer.stepz'; the nearest is 'trainer.steps'"),
    ("ill-typed", ["mini.yaml", "trainer.steps=three"], 2, "trainer.steps must be an int, got 'three'"),
    ("not an override", ["mini.yaml", "fast"], 2, "an override must be key=value, got 'fast'"),
    ("group of one", ["mini.yaml", "method=grpo", "rollout.group_size=1"], 2, "rollout.group_size must be at least 2"),
    ("missing problems", ["mini.yaml", "problems.task=", "problems.path=absent.jsonl"], 1, "problems.path: no such file: absent.jsonl"),
    ("malformed problems", ["mini.yaml", "problems.task=", "problems.path=malformed.jsonl"], 1, "malformed.jsonl, line 11: not valid JSON"),
    ("no problems", ["mini.yaml", "problems.task=", "problems.path=empty.jsonl"], 1, "empty.jsonl holds no problem"),
    ("one question", ["mini.yaml", "problems.task=", "problems.path=one.jsonl"], 2, "one.jsonl holds one question 10 times"),
    ("too few problems", ["mini.yaml", "problems.task=", "problems.path=few.jsonl"], 2, "at least 5 are needed"),
    (
        "field missing", ["mini.yaml", "problems.task=", "problems.path=good.jsonl", "problems.answer=solution"], 1,
        "good.jsonl, line 1: wanted a non-empty field 'solution'",
    ),
    (
        "too long", ["mini.yaml", "problems.task=", "problems.path=long.jsonl", "policy.tokenizer=bytes"], 2,
        "the prompt of problem '400' has 40017 tokens, with rollout.max_new_tokens = 14 that is 40031, and the policy's max_position_embeddings is",
    ),
    ("too many digits", ["mini.yaml", "problems.modulus=1"], 2, "problems.modulus must lie in [2, 10], got 1"),
    ("no tokenizer", ["mini.yaml", "problems.task=", "problems.path=good.jsonl"], 2, "policy.tokenizer must name a tokenizer folder"),
    ("tokenizer missing", ["mini.yaml", "policy.tokenizer=absent"], 2, "policy.tokenizer: no such file or folder: absent"),
    ("tokenizer without pad", ["mini.yaml", "policy.tokenizer=no_pad"], 2, "no_pad has no pad token"),
    ("tokenizer without eos", ["mini.yaml", "policy.tokenizer=no_eos"], 2, "no_eos has no eos token"),
    ("bare tokenizer", ["mini.yaml", "policy.tokenizer=no_eos/tokenizer.json"], 2, "tokenizer.json has no eos token"),
    (
        "tokenizer of text", ["mini.yaml", "policy.tokenizer=text"], 2,
        "problems.task = 'chain' needs a tokenizer with one token for each of its characters, and that of policy.tokenizer, text, has not: 'st'",
    ),
    ("tokenizer without the characters", ["mini.yaml", "policy.tokenizer=digits"], 2, "policy.tokenizer, digits, has not: '\\n'"),
    ("policy missing", ["mini.yaml", "policy.from_config=", "policy.path=absent"], 2, "policy.path: no such folder: absent"),
    ("no chat template", ["mini.yaml", "problems.chat=true"], 2, "problems.chat = true needs a tokenizer with a chat template"),
    ("device", ["mini.yaml", "policy.device=gpu"], 2, "policy.device: 'gpu' cannot be used"),
    ("device without values", ["mini.yaml", "policy.device=meta"], 2, "policy.device: 'meta' cannot be used: wanted auto, cpu or cuda"),
    ("device of others", ["mini.yaml", "policy.device=mps:0"], 2, "policy.device: 'mps:0' cannot be used: wanted auto, cpu or cuda"),
    ("too many held out", ["mini.yaml", "problems.held_out=65"], 2, "problems.held_out must be at most the task's 64 different problems, got 65"),
    ("too many to train on", ["mini.yaml", "problems.train=9999999"], 2, "wanted 9999999 outside the held-out ones, found 48"),
    ("not a number", ["mini.yaml", "trainer.steps=3", "optimizer.learning_rate=1e30", "optimizer.warmup_steps=0"], 1, "not finite at step 2"),
    ("run directory is a file", ["mini.yaml", "run_dir=good.jsonl"], 1, "File exists: good.jsonl"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "code", "message"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys, arguments, code, message):
    monkeypatch.chdir(tmp_path)
    write_config(tmp_path)
    (tmp_path / "good.jsonl").write_text(GOOD)
    (tmp_path / "malformed.jsonl").write_text(GOOD + '{"problem": "2+2", "answer" "4"}\n')
    long = [json.dumps({"problem": "1" * (40_000 if i == 400 else i), "answer": "1"}) for i in range(1, 401)]  # none but the last is too long
    (tmp_path / "long.jsonl").write_text("\n".join(long))
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "few.jsonl").write_text(GOOD[: len(GOOD) // 10 * 4])
    (tmp_path / "one.jsonl").write_text('{"problem": "1+1", "answer": "2"}\n' * 10)
    tokenizer_without(tmp_path / "no_pad", "pad_token"), tokenizer_without(tmp_path / "no_eos", "eos_token", "pad_token")
    text = byte_tokenizer()
    text.backend_tokenizer.model = models.BPE({**text.get_vocab(), "st": len(text)}, [("s", "t")])
    text.save_pretrained(tmp_path / "text")
    digits = models.WordLevel({"<pad>": 0, "<eos>": 1, **{d: int(d) + 2 for d in "0123456789"}}, unk_token="<pad>")
    text.backend_tokenizer.model, text.backend_tokenizer.pre_tokenizer = digits, pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    text.save_pretrained(tmp_path / "digits")
    small = ["warmup.steps=0", "trainer.steps=1", "eval.samples=0"]
    overrides = arguments[1:]
    found, error = one_line(capsys, ["train", arguments[0], *small, *overrides])
    assert found == code and message in error
    left = {p.name for p in tmp_path.iterdir()}
    if code == 2 or "problem" in error:
        assert "runs" not in left, "a run that did not begin leaves nothing behind"


def test_a_real_process_says_one_line(tmp_path):
    """The same from outside: no warning of a library's on stderr, no traceback, the exit code."""
    done = subprocess.run(
        [sys.executable, "-m", "acpo.cli", "train", str(write_config(tmp_path)), "problems.task=", "problems.path=absent.jsonl", "warmup.steps=0"],
        capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.splitlines() == ["acpo: problems.path: no such file: absent.jsonl"]


def test_not_a_number_keeps_the_checkpoints_and_the_run_goes_on(tmp_path, monkeypatch, capsys):
    arguments = ["train", str(write_config(tmp_path)), f"run_dir={tmp_path / 'run'}", "warmup.steps=0", "trainer.steps=4", "eval.samples=0"]
    forward, calls = Policy.forward, []

    def broken(self, *a, **k):
        calls.append(1)
        found = forward(self, *a, **k)
        return found._replace(loss=found.loss * float("nan")) if len(calls) > 5 else found

    with monkeypatch.context() as patch:
        patch.setattr(Policy, "forward", broken)
        code, error = one_line(capsys, arguments)
    assert code == 1 and "the loss is nan at step 4, 3 times in a row" in error and "the last checkpoint stands" in error
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-2"]
    assert main(arguments) == 0
    assert "resumed from step 2" in capsys.readouterr().out and [r["step"] for r in records(tmp_path / "run")] == [0, 1, 2, 3, 4]


def test_other_settings_under_the_same_directory(tmp_path, finished_run, capsys):
    shutil.copytree(finished_run, tmp_path / "run")
    before = (tmp_path / "run" / "config.yaml").read_bytes()
    code, error = one_line(capsys, ["train", str(write_config(tmp_path)), f"run_dir={tmp_path / 'run'}", "optimizer.learning_rate=0.01"])
    assert code == 2 and "holds a run with other settings" in error and "optimizer.learning_rate: 0.0003 -> 0.01" in error
    assert (tmp_path / "run" / "config.yaml").read_bytes() == before


def test_a_full_disk_is_one_line(tmp_path, monkeypatch, capsys):
    from acpo import checkpoint

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    code, error = one_line(
        capsys, ["train", str(write_config(tmp_path)), f"run_dir={tmp_path / 'run'}", "warmup.steps=0", "trainer.steps=2", "eval.samples=0"]
    )
    assert code == 1 and "cannot write the checkpoint" in error and "No space left on device" in error


def test_train_leaves_a_run_to_look_at(finished_run):
    names = {p.name for p in finished_run.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "checkpoints", "curves.png", "report.html", "policy"} <= names
    assert (finished_run / "curves.png").read_bytes().startswith(b"\x89PNG")
    page = (finished_run / "report.html").read_text()
    last = records(finished_run)[-1]
    assert f"{last['eval/accuracy']:.3f}" in page and "stage 2" in page and "learning_rate: 0.0003" in page


def test_rollouts_are_kept_as_parquet(finished_run):
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = parquet.read_table(finished_run / "rollouts" / "step-1.parquet").to_pylist()
    first = next(r for r in records(finished_run) if r["phase"] == "stage1")
    assert sum(r["outcome"] for r in rows) / len(rows) == pytest.approx(first["reward"])
    for row in rows:
        assert len(row["segment_tokens"]) == len(row["segment_credit"]) == len(row["segment_phi"]) > 0
        assert sum(row["segment_tokens"]) == len(row["response"]) + row["finished"]  # one character a token, and the end
        ends = row["segment_ends"]
        assert (
            ends == sorted(ends)
            and ends[-1] == len(row["response"])
            and [b - a for a, b in zip([0, *ends], ends, strict=False)][:-1] == row["segment_tokens"][:-1]
        )
        assert row["segment_rule"][-1] == "end" and (row["segment_rule"][-2:-1] == ["answer"]) == (row["answered"] and len(ends) > 1)
        assert row["verdict"] in ("judged", "unparseable") and all(w == 1 for w in row["segment_weight"])
        alike = len({r["outcome"] for r in rows if r["group"] == row["group"]}) == 1
        assert row["source"] == ("hindsight" if alike else "tree") and row["segment_phi"] is not None  # each where its credit is for
        raw, centred = row["segment_hindsight"] or [], row["segment_centred"] or []
        assert all(c >= h - 1e-5 for h, c in zip(raw, centred, strict=True)) and len(raw) in (0, len(ends))  # by a KL
        assert (
            all(0 < v < 1 for v in row["segment_value"] or [])
            and all(h >= 0 for h in row["segment_entropy"])
            and all(p <= 0 for p in row["segment_logp"])
        )
    for group in range(4):  # advantages of a group sum to 0, and a step without attribution carries its rollout's
        members = [row for row in rows if row["group"] == group]
        assert len(members) == 4 and len({row["problem"] for row in members}) == 1
        assert sum(row["advantage"] for row in members) == pytest.approx(0, abs=1e-5)
        assert all(c == pytest.approx(row["advantage"], abs=1e-5) for row in members if row["reliability"] == 0 for c in row["segment_credit"])


def test_the_exported_policy_is_the_trained_one(finished_run, warmed):
    from acpo import config
    from acpo.policy import build

    folder = finished_run / "policy"
    policy, tokens = build(config.load(None, ["problems.task=chain", f"policy.path={folder}", "policy.device=cpu"]))
    assert all(torch.equal(warmed[n], p) for n, p in policy.named_parameters())
    text = "a31\nb02\nA2"
    assert tokens(text)["input_ids"] == tokenizer()(text)["input_ids"] and tokens.decode(tokens(text)["input_ids"]) == text


def test_a_run_is_nobody_elses_until_its_policy_is_written(tmp_path, monkeypatch):
    from acpo import state
    from acpo.trainer import Trainer

    seen, train, export = [], Trainer.train, state.export
    monkeypatch.setattr(Trainer, "train", lambda self, **how: (seen.append(self), train(self, **how))[1])
    monkeypatch.setattr(state, "export", lambda trainer: (seen.append(trainer.run.locked is not None), export(trainer))[1])
    assert main(["train", str(write_config(tmp_path)), f"run_dir={tmp_path / 'run'}", "warmup.steps=2", "trainer.steps=1", "eval.samples=0"]) == 0
    assert seen[1] is True and seen[0].run.locked is None and (tmp_path / "run" / "policy" / "model.safetensors").exists()


def test_eval(finished_run, capsys):
    last = records(finished_run)[-1]
    assert main(["eval", str(finished_run), "--samples", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["step"] == 8 and found["eval/accuracy"] == last["eval/accuracy"] and found["problems"] == 16 and found["verifier"] == "exact match"
    assert (
        set(found["intervals"])
        == {k for k in found if k.startswith("eval/")}
        == {f"eval/{k}" for k in ("accuracy", "pass@1", "pass@2", "majority@2")}
    )
    for name, (low, high) in found["intervals"].items():
        assert 0 <= low <= found[name] <= high <= 1
    assert main(["eval", str(finished_run), "--samples", "0"]) == 0
    shown = capsys.readouterr().out
    assert "16 problems of chain, step 8" in shown and f"{last['eval/accuracy']:.4f}" in shown and "pass@" not in shown
    assert "bootstrap over problems; verifier: exact match" in shown


def test_eval_says_how_far_it_is_where_there_is_no_bar(finished_run, capsys, monkeypatch):
    monkeypatch.setattr(display, "EVERY", 0.0)
    assert main(["eval", str(finished_run), "--samples", "1"]) == 0
    assert capsys.readouterr().err.splitlines()[-1] == "acpo: 32 of 32 rollouts"
    assert main(["eval", str(finished_run), "--samples", "1", "--json"]) == 0 and capsys.readouterr().err == ""


def test_eval_writes_nothing(tmp_path, finished_run, capsys):
    shutil.copytree(finished_run, tmp_path / "moved: run")
    before = {p: p.read_bytes() for p in sorted(tmp_path.rglob("*")) if p.is_file()}
    assert main(["eval", str(tmp_path / "moved: run"), "--samples", "0"]) == 0
    assert {p: p.read_bytes() for p in sorted(tmp_path.rglob("*")) if p.is_file()} == before


def test_report(tmp_path, finished_run, capsys):
    out = tmp_path / "two.png"
    assert main(["report", str(finished_run), str(finished_run), "--out", str(out)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG") and str(out) in capsys.readouterr().out


def test_report_of_a_run_that_is_still_writing(tmp_path, finished_run):
    shutil.copytree(finished_run, tmp_path / "run")
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"phase": "stage2", "st')
    assert main(["report", str(tmp_path / "run")]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval"], "a run directory or --model must be given: what is to be evaluated"),
        (["eval", "problems.task=chain"], "a run directory or --model must be given"),
        (["eval", "absent"], "no such configuration file: absent/config.yaml"),
        (["eval", "no_checkpoint"], "no_checkpoint/checkpoints holds no checkpoint"),
        (["eval", "no_checkpoint", "--samples", "-1"], "eval.samples must be at least 0, got -1"),
        (["eval", "no_checkpoint", "absent"], "one run directory or --model must be given, got no_checkpoint and absent"),
        (["eval", "no_checkpoint", "--model", "absent"], "one run directory or --model must be given, got no_checkpoint and absent"),
        (["eval", "--model", "absent", "problems.path=absent.jsonl"], "problems.path: no such file: absent.jsonl"),
        (["eval", "--model", "absent"], "one of problems.task and problems.path must be given, got neither"),
        (["eval", "--preset", "gsm8k"], "--preset gsm8k needs --path: the file with the problems"),
        (["eval", "--preset", "gsm9k", "--path", "x.jsonl"], "--preset must be one of aime, amc, math500, gsm8k, got 'gsm9k'"),
        (["eval", "no_checkpoint", "--samples", "2", "--k", "1,3"], "--k must be numbers from 1 to --samples = 2, separated by commas, got '1,3'"),
        (["eval", "no_checkpoint", "--k", "x"], "--k must be numbers from 1 to --samples = 8"),
        (["eval", "no_checkpoint", "problems.pth=x"], "unknown setting 'problems.pth'; the nearest is 'problems.path'"),
        (["report", "absent"], "absent is no run directory: it has no metrics.jsonl"),
        (["report", "damaged"], r"damaged/metrics.jsonl, line \d+: this line is not JSON"),
        (["report", "no_checkpoint", "--out", "absent/x.png"], "No such file or directory"),
        (["report", "no_checkpoint", "--out", "x.xyz"], "--out: no picture can be written as x.xyz"),
    ],
)
def test_bad_input_of_the_other_verbs(tmp_path, monkeypatch, finished_run, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    for name in ("no_checkpoint", "damaged"):
        (tmp_path / name).mkdir()
        for file in ("config.yaml", "metrics.jsonl"):
            shutil.copy(finished_run / file, tmp_path / name)
    with open(tmp_path / "damaged" / "metrics.jsonl", "a") as file:
        file.write('{"phase": \n{"phase": "stage2", "step": 9}\n')
    code, error = one_line(capsys, arguments)
    assert code in (1, 2) and re.search(message, error), error


@pytest.mark.parametrize("verb", ["train", "eval", "report", "inspect", "segment", "compare", "doctor", "completion"])
def test_every_verb_has_an_example(verb, capsys):
    with pytest.raises(SystemExit) as caught:
        main([verb, "--help"])
    shown = capsys.readouterr().out
    assert caught.value.code == 0 and f"examples:\n  acpo {verb} " in shown


def test_a_narrow_terminal_turns_a_wide_table_and_loses_nothing(capsys, monkeypatch):
    monkeypatch.setattr(display, "Paper", functools.partial(display.Paper, force_terminal=True, color_system=None))
    head, rows = ["run", *(f"figure-{i}" for i in range(9))], [[f"run-{r}", *(f"{r}.{i}000" for i in range(9))] for r in range(6)]
    words = {word for row in (head, *rows) for word in row}
    for width, tables, first in ((200, 1, head), (60, 2, ["run", "run-0", "run-1", "run-2", "run-3"]), (24, 6, ["run", "run-0"])):
        monkeypatch.setenv("COLUMNS", str(width))
        print_table(head, rows)
        shown = capsys.readouterr().out
        lines = shown.splitlines()
        assert max(map(len, lines)) <= width and shown.count("┏") == tables and re.sub("[┃ ]+", " ", lines[1]).split()[: len(first)] == first
        assert words <= set(re.sub("[┃│]", " ", shown).split())


def test_usage_is_exit_code_2(capsys):
    for wrong in (["trian"], ["report"], ["doctor", "--jsno"], ["train", "x.yaml", "--quite"], ["completion", "powershell"]):
        with pytest.raises(SystemExit) as caught:
            main(wrong)
        assert caught.value.code == 2 and "usage: acpo" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["train", "x.yaml", "--trainer.steps=3"])
    assert "unrecognized arguments: --trainer.steps=3 (a setting has no dashes: trainer.steps=3)" in capsys.readouterr().err


def test_completion(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "shtab", None)
    code, error = one_line(capsys, ["completion", "bash"])
    assert code == 1 and error == "acpo: completion needs shtab: pip install -e '.[completion]'"
    assert main(["completion", "fish"]) == 0  # needs nothing; tests/external/shells tries it and the others in real shells
    lines = capsys.readouterr().out.splitlines()
    assert "complete -c acpo -n '__fish_seen_subcommand_from doctor' -l json -d 'print one JSON object and nothing else'" in lines
    assert any("from train" in line and "trainer.steps=" in line for line in lines)


def test_the_front_door_is_light():
    """Help and completion read the parsers alone: no torch, no policy."""
    script = "import sys, acpo.cli; acpo.cli.parser().format_help(); print([m for m in ('torch', 'rich', 'yaml') if m in sys.modules])"
    run = {"capture_output": True, "text": True, "env": {**os.environ, "PYTHONPATH": str(ROOT)}, "timeout": 60}
    heavy = subprocess.run([sys.executable, "-c", script], **run)
    assert heavy.stdout == "[]\n", heavy.stderr


def test_help_and_no_verb(capsys):
    with pytest.raises(SystemExit) as caught:
        main([])
    assert caught.value.code == 2
    with pytest.raises(SystemExit) as caught:
        main(["train", "--help"])
    assert caught.value.code == 0 and "key=value" in capsys.readouterr().out
