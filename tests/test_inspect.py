"""What `acpo inspect` reads, how it orders and what it prints. The page in a real browser: tests/external/browser."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re

import pytest
import torch
import yaml
from rich.console import Console
from views import HOSTILE, example, group, rollout, view

from acpo.cli import main
from acpo.inspect import data
from acpo.inspect.data import InspectError, read_run
from acpo.inspect.page import page
from acpo.inspect.shown import visible
from acpo.inspect.terminal import bar, number, show

pyarrow = pytest.importorskip("pyarrow")


@pytest.fixture(autouse=True)
def one_thread(deterministic):
    torch.set_num_threads(1)


def printed(what, width: int = 100, color: bool = False, **settings) -> str:
    file = io.StringIO()
    show(what, Console(file=file, width=width, no_color=not color, force_terminal=color, color_system="truecolor" if color else None), **settings)
    return file.getvalue()


def row(**changes) -> dict:
    """A line of rollouts/step-N.parquet."""
    lists = {f"segment_{n}": [0.5, -0.25] for n in ("credit", "phi", "iota", "value", "hindsight", "centred", "weight", "entropy", "logp")}
    return {
        "group": 0, "problem": "p1", "answer": "4", "prompt": "2+2=", "response": "two\nA4", "outcome": 1.0, "verdict": "judged", "finished": True,
        "advantage": 0.25, "reliability": 0.5, "source": "tree", "answered": True, "segment_ends": [4, 6], "segment_tokens": [4, 3],
        "segment_rule": ["answer", "end"],
        **lists, **changes,
    }  # fmt: skip


def write_run(folder, steps: dict[int, list[dict]], without: tuple[str, ...] = ()):
    from pyarrow import parquet

    (folder / "rollouts").mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("")
    for step, rows in steps.items():
        rows = [{k: v for k, v in r.items() if k not in without} for r in rows]
        parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "rollouts" / f"step-{step}.parquet")
    return folder


# --- surprise and order -----------------------------------------------------------------------------------------------------------


def test_surprise_by_hand():
    # Right: the credits below 0 count, over the tokens of the steps that are not the answer: (0.5 * 10) / 30.
    assert rollout(1, [1.0, -0.5, 0.0, -9.0], 1.0, answered=True).surprise == pytest.approx(0.5 / 3)
    assert rollout(1, [1.0, -0.5, 0.0], 0.0).surprise == pytest.approx(1.0 / 3)  # wrong: those above 0
    for none in (
        rollout(1, [1.0], None),
        rollout(1, [1.0], 0.5),
        rollout(1, [], 1.0),
        rollout(1, [None], 0.0),
        rollout(1, [-3.0], 1.0, answered=True),
    ):
        assert none.surprise == 0.0
    weighted = rollout(1, [-1.0, 1.0], 1.0)
    weighted.steps[0].tokens = 30
    assert weighted.surprise == pytest.approx(30 / 40)


def test_orders():
    shown = example()
    found = {}
    for order in ("surprise", "outcome", "length", "sampled"):
        shown.sort(order)
        found[order] = [g.problem for g in shown.groups], [r.number for g in shown.groups if g.problem == "p1" for r in g.rollouts]
    assert found["surprise"] == (["p1", "p2", "p3"], [3, 1, 2, 4])
    assert found["outcome"] == (["p2", "p1", "p3"], [2, 3, 1, 4])  # wrong first; no verdict last
    assert found["length"] == (["p1", "p2", "p3"], [2, 3, 1, 4])  # of 40 tokens two, the one sampled first first
    assert found["sampled"] == (["p1", "p2", "p3"], [1, 2, 3, 4])


# --- reading a run ----------------------------------------------------------------------------------------------------------------


def test_a_run_that_the_trainer_wrote(finished_run):
    shown = read_run(finished_run)
    assert shown.step == 8 and len(shown.groups) == 4 and all(len(g.rollouts) == 4 for g in shown.groups)
    for g in shown.groups:
        for r in g.rollouts:
            assert [s.start for s in r.steps] == [0, *(s.end for s in r.steps[:-1])] and r.steps[-1].end == len(r.text)
            assert r.outcome is None or (r.outcome == 1.0) == (r.given == g.answer)
            assert all(s.own == pytest.approx(s.credit - r.advantage) for s in r.steps)
    assert {s.rule for r in shown.rollouts for s in r.steps} <= {"line", "answer", "end", "length"}
    assert main(["inspect", str(finished_run), "--no-color"]) == 0


@pytest.mark.parametrize(
    ("settings", "read"),
    [
        ({"problems": {"path": "x.jsonl"}}, "2"),
        ({"problems": {"path": "reasoning_gym:leg_counting", "held_out": 8}}, None),
        ({"problems": {"path": "x.jsonl"}, "verify": {"kind": "module:function"}}, None),
    ],
)
def test_the_answer_that_was_read_is_shown_where_it_is_what_was_judged(tmp_path, settings, read):
    """A task's own scorer and a callable judge something else: no number of the text stands there as what they read."""
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"policy": {"path": "model"}, "warmup": {"steps": 0}, **settings}))
    assert data._reader(tmp_path)("Step 1 of 2: olleh") == read


def test_step_and_problem(tmp_path):
    run = write_run(tmp_path / "run", {1: [row(), row(problem="p2", group=1)], 2: [row()], 10: [row(problem="p3"), row(problem="p3")]})
    assert read_run(run).step == 10 and read_run(run, 2).step == 2
    assert read_run(run, problem="p1").step == 2 and read_run(run, problem="p2").step == 1  # the newest step that asked it
    assert [g.problem for g in read_run(run, 1, "p2").groups] == ["p2"]
    first = read_run(run, 1).groups[0].rollouts[0]
    assert first.steps[1].credit == -0.25 and first.steps[1].own == -0.5 and first.steps[1].answer and first.verdict == "right"


WRONG = [
    (["run", "--step", "3"], 1, r"run holds no rollouts of step 3; it has steps 1, 2, 10"),
    (["run", "--problem", "p11"], 1, r"no step of run asked problem 'p11'; did you mean 'p1'\?; asked were p1, p2, p3"),
    (["run", "--step", "1", "--problem", "p3"], 1, r"step 1 has no problem 'p3'.*; it has p1, p2"),
    (["absent"], 1, r"no such run directory: absent \(there is bare, broken, old, run\)"),
    (["empty"], 1, r"empty is no run directory: it has no rollouts and no metrics.jsonl"),
    (["bare"], 1, r"bare holds no rollouts: no step is finished yet, trainer.keep_rollouts was false, or pyarrow was not installed"),
    (["old"], 1, r"old.rollouts.step-1.parquet has no column segment_ends, segment_rule: an older version wrote it"),
    (["broken"], 1, r"cannot read .*broken.rollouts.step-1.parquet"),
    (["run", "--html", "absent/x.html"], 1, r"No such file or directory: absent/x.html"),
    ([], 2, r"wanted one run directory, or --text FILE and --model PATH, got none"),
    (["run", "old"], 2, r"wanted one run directory.*got run and old"),
    (["--text", "t.jsonl"], 2, r"--text and --model go together: --model is missing"),
    (["run", "--model", "m"], 2, r"--text and --model go together: --text is missing"),
    (["run", "--shade", "colour"], 2, r"--shade must be one of credit, own, phi, .*got 'colour'"),
    (["run", "--groups", "-1"], 2, r"--groups must be at least 0, got -1"),
    (["--text", "t.jsonl", "--model", "m", "--step", "3"], 2, r"--step is of a run"),
    (["--text", "t.jsonl", "--model", "m", "chat"], 2, r"with --text wanted settings as key=value, got 'chat'"),
    (["--text", "t.jsonl", "--model", "m", "problems.chatt=true"], 2, r"unknown setting 'problems.chatt'; the nearest is 'problems.chat'"),
    (["--text", "t.jsonl", "--model", "m", "credit.form=weights"], 2, r"credit.form says nothing about --text, which shows the additive credit"),
    (["--text", "t.jsonl", "--model", "m", "segmenter.fixed=8"], 2, r"segmenter.fixed says nothing about --text"),
    (["--text", "t.jsonl", "--model", "m", "credit.gain=1", "segmenter.max_segments=9"], 1, r"no such file: t.jsonl"),
    (["--text", "t.jsonl", "--model", "m"], 1, r"no such file: t.jsonl"),
    (
        ["--text", "bad.jsonl", "--model", "m"],
        1,
        r"bad.jsonl, line 2: wanted a text under response or trace or completion or solution, got the fields 'id'",
    ),
    (["--text", "odd.jsonl", "--model", "m"], 1, r"odd.jsonl, line 1: wanted an outcome in \[0, 1\], or true or false, got 3"),
    (["--text", "good.jsonl", "--model", "m"], 2, r"policy.path: no such folder: m"),
]


@pytest.mark.parametrize(("arguments", "code", "message"), WRONG, ids=[" ".join(w[0]) or "nothing" for w in WRONG])
def test_what_is_wrong_is_one_line(tmp_path, monkeypatch, capsys, arguments, code, message):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "run", {1: [row(), row(problem="p2")], 2: [row()], 10: [row(problem="p3")]})
    write_run(tmp_path / "old", {1: [row()]}, without=("segment_ends", "segment_rule"))
    write_run(tmp_path / "bare", {})
    write_run(tmp_path / "broken", {1: [row()]})
    (tmp_path / "broken" / "rollouts" / "step-1.parquet").write_bytes(b"PAR1 not at all")
    (tmp_path / "empty").mkdir()
    (tmp_path / "good.jsonl").write_text('{"response": "x"}\n')
    (tmp_path / "bad.jsonl").write_text('{"response": "x"}\n{"id": 3}\n')
    (tmp_path / "odd.jsonl").write_text('{"response": "x", "reward": 3}\n')
    assert main(["inspect", *arguments]) == code
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("acpo: ") and re.search(message, error), error


def test_rows_that_are_not_the_trainers(tmp_path):
    run = write_run(tmp_path / "run", {1: [row(segment_rule=["no such", "end"])], 2: [row(segment_ends=[6])]})
    assert read_run(run, 1).rollouts[0].steps[0].rule == "other"
    with pytest.raises(InspectError, match="rollout 1 of problem 'p1' has lists of different lengths"):
        read_run(run, 2)


def test_columns_that_an_older_version_did_not_write_are_named(tmp_path, capsys):
    run = write_run(tmp_path / "run", {1: [row()]}, without=("segment_phi", "segment_iota", "verdict", "advantage", "group"))
    shown = read_run(run)
    assert shown.notes == ["not measured in this step: phi, iota, group, verdict, advantage"]
    assert [s.phi for s in shown.rollouts[0].steps] == [None, None] and shown.rollouts[0].steps[0].own is None
    assert "note: not measured in this step: phi, iota" in printed(shown, figures=True) and "phi" not in [m[0] for m in shown.measures]
    page(shown)


def test_signs_are_told_and_all_zero_is_not_unmeasured(tmp_path):
    run = write_run(tmp_path / "run", {1: [row(segment_rule=["line", "end"], segment_credit=[0.0, 0.0], segment_phi=[None, None])]})
    shown = read_run(run)
    assert "a step ends with: ↵ the end of a line; ■ the end of the rollout\n" in printed(shown)
    assert "0 in every step" in printed(shown, 200) and "not measured here" in printed(shown, 200, shade="phi")


def test_what_is_not_finite_or_not_there_is_nothing(tmp_path):
    run = write_run(tmp_path / "run", {1: [row(segment_phi=[float("nan"), 1.0], outcome=None, verdict="gold"), row(segment_hindsight=None)]})
    first, second = read_run(run).rollouts
    assert first.steps[0].phi is None and first.steps[1].phi == 1.0 and second.steps[0].hindsight is None
    assert first.verdict == "left out: reference answer unreadable"
    assert page(read_run(run))  # JSON without NaN, or json.dumps would raise


# --- the terminal -----------------------------------------------------------------------------------------------------------------


def test_the_terminal_without_colour():
    shown = example()
    shown.sort("surprise")
    text = printed(shown, width=96)
    assert "\x1b" not in text
    lines = text.splitlines()
    assert lines[0] == "run step 3 · 3 problems · 7 rollouts: 2 right, 4 wrong, 1 without verdict"
    assert max(map(len, lines)) <= 96
    heads = next(line for line in lines if "#3" in line)
    assert "#3 ✗ wrong" in heads and "#1 ✓ right" in heads  # side by side, the most surprising first
    assert any("A -1.00 · surprise 0.56" in line and "A +1.00 · surprise 0.25" in line and "tree 0.50" in line for line in lines)
    steps = [line for line in lines if "step 2." in line]
    assert "2 ↵  -1.00 ████" in steps[0] and "2 ↵  -0.50 ██" in steps[0]  # sign, size and bar without colour
    assert "✗ wrong: no readable answer" in text and "○ left out: verifier timed out" in text and "cut off" in text
    assert "answer step 3." in text and "problem p2" not in text and "p2" in text  # the others stand in the overview
    assert "φ" not in text and "φ\u00a0+0.25 info\u00a0-0.50" in printed(shown, figures=True)
    assert printed(shown, groups=0).count("problem p") == 3


def test_rollouts_with_the_same_text():
    shown = view(group([rollout(1, [0.5], 1.0), rollout(2, [0.5, 1.0], 1.0), rollout(3, [0.1], 1.0)]))
    shown.sort("length")  # the one sampled first is the first, wherever it stands
    assert shown.groups[0].twins == {3: 1} and "#3 = #1 ✓ right" in printed(shown)


def test_the_terminal_with_colour():
    shown = view(group([rollout(1, [1.0, -1.0, 0.0], 1.0)]))
    text = printed(shown, color=True)
    assert "48;2;90;165;235" in text and "48;2;236;112;92" in text  # the two ends; what has no credit has no shade
    assert len(re.findall(r"48;2;", text)) == 2
    assert re.sub(r"\x1b\[[0-9;]*m", "", text) == printed(shown)


@pytest.mark.parametrize("width", [20, 41, 84, 200])
def test_the_terminal_keeps_its_width(width):
    shown = view(group([rollout(n, [0.5, -0.5], 1.0, texts=["word " * 30 + "\n", "x" * 300]) for n in range(1, 6)], prompt="why " * 100))
    assert max(len(line) for line in printed(shown, width=width, figures=True).splitlines()) <= width


EDGES = {
    "no group": view(),
    "no rollout": view(group([])),
    "one rollout": view(group([rollout(1, [0.5], 1.0)])),
    "an empty response": view(group([rollout(1, [], 0.0)])),
    "no attribution": view(group([rollout(1, [1.0, 1.0], 1.0, 1.0), rollout(2, [-1.0], 0.0, -1.0)])),
    "no credit": view(group([rollout(1, [None, None], None, None)])),
    "all wrong": view(group([rollout(n, [0.0], 0.0) for n in (1, 2, 3)])),
    "no credit at all": view(group([rollout(1, [0.0, 0.0], 0.0)])),
}


@pytest.mark.parametrize("name", EDGES)
def test_edges(name):
    shown = EDGES[name]
    for order in ("surprise", "outcome", "length", "sampled"):
        shown.sort(order)
    text = printed(shown, groups=0, figures=True)
    assert shown.title in text and ("(an empty response)" in text) == (name == "an empty response")
    data = json.loads(re.search(r'id="data">(.*?)</script>', page(shown))[1])
    assert sum(len(g["rollouts"]) for g in data["groups"]) == len(shown.rollouts)


def test_small_things():
    assert [number(x, True) for x in (None, 0.004, -0.006, 12.34, -123.4)] == ["-", "0.00", "-0.01", "+12.3", "-123"]
    assert [bar(x, 8) for x in (0.0, 0.5, 1.0, 1 / 64)] == ["", "████", "████████", "▏"]
    assert view(group([rollout(1, [1.0] * 99 + [50.0], 1.0)])).scale() == 1.0  # one outlier does not bleach the others
    assert view(group([rollout(1, [0.0] * 99 + [3.0], 1.0)])).scale() == 3.0


# --- what a rollout holds is text ---------------------------------------------------------------------------------------------------


def hostile() -> object:
    bad = rollout(1, [0.5, -0.5], 1.0, texts=[HOSTILE + "\n", HOSTILE], given=HOSTILE)
    return view(group([bad], problem=HOSTILE, prompt=HOSTILE, answer=HOSTILE), title=HOSTILE, notes=(HOSTILE,))


def test_signs_for_what_cannot_be_seen():
    assert visible("a\x00\x1b[1m\x7f\r\n\tb") == "a⟨U+0000⟩⟨U+001B⟩[1m⟨U+007F⟩⟨U+000D⟩\n\tb"
    assert visible("\u202e\u2066\u200b\ufeff\x9b\U000e0041") == "⟨U+202E⟩⟨U+2066⟩⟨U+200B⟩⟨U+FEFF⟩⟨U+009B⟩⟨U+E0041⟩"
    assert visible("é 👩‍🔬 مرحبا") == "é 👩‍🔬 مرحبا"


def test_the_terminal_shows_no_escape_of_a_rollout():
    text = printed(hostile(), width=400)
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\u200b\u2028]", text)
    assert "⟨U+001B⟩[31mred⟨U+001B⟩[0m" in text and "⟨U+202E⟩right to left" in text and "[bold]not bold[/bold]" in text


def test_the_page_holds_no_tag_of_a_rollout():
    text = page(hostile())
    assert text.count("<script") == 2 and text.count("</script") == 2 and "<img" not in text and "window.hit" in text
    assert not re.search("[\x00-\x09\x0b-\x1f]", text)  # JSON has them as \u0000
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1]
    assert json.loads(data)["groups"][0]["rollouts"][0]["text"] == HOSTILE + "\n" + HOSTILE
    assert not set("<>&\u2028\u2029") & set(data)
    assert "\u202e" not in text[: text.index("</title>")]


def test_the_policy_lets_only_the_inline_script_and_style_run():
    text = page(example())
    csp = re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1]
    for kind, tag in (("script", r"<script>(.*?)</script>"), ("style", r"<style>(.*?)</style>")):
        body = re.search(tag, text, re.DOTALL)[1]
        assert f"{kind}-src 'sha256-{base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()}'" in csp
    assert csp.startswith("default-src 'none'") and "unsafe" not in csp and "http" not in csp
    assert not re.search(r"(src|href)\s*=", re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL))


def test_the_page_counts_characters_as_a_browser_does():
    shown = view(group([rollout(1, [0.1, 0.2, 0.3], 1.0, texts=["a😀", "b", "😀😀"])]))
    data = json.loads(re.search(r'id="data">(.*?)</script>', page(shown))[1])
    assert data["groups"][0]["rollouts"][0]["ends"] == [3, 4, 8]


def test_half_a_surrogate_pair_is_replaced(tmp_path):
    from acpo.inspect.traces import read_traces

    (tmp_path / "t.jsonl").write_text('{"response": "a\\ud800b", "problem": "\\udc00"}\n')
    (trace,) = read_traces(tmp_path / "t.jsonl")
    assert trace.response == "a\ufffdb" and trace.problem == "\ufffd"


# --- machines ---------------------------------------------------------------------------------------------------------------------


def test_json_and_html(tmp_path, capsys):
    run = write_run(tmp_path / "run", {1: [row(outcome=0.0), row()]})
    assert main(["inspect", str(run), "--json", "--sort", "outcome", "--html", str(tmp_path / "x.html")]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert err == f"page: {tmp_path / 'x.html'}\n" and (tmp_path / "x.html").read_text().startswith("<!doctype html>")
    first = found["groups"][0]["rollouts"][0]
    assert found["step"] == 1 and first["verdict"] == "wrong" and first["surprise"] == 0.5
    assert first["steps"][1] | {"credit": -0.25, "rule": "end", "tokens": 3, "answer": True, "start": 4, "end": 6} == first["steps"][1]


def test_a_reader_that_stops_reading_is_no_error(tmp_path):
    import os
    import subprocess
    import sys
    from pathlib import Path

    rows = [row(response="x" * 20000, segment_ends=[9, 20000])] * 30
    run = write_run(tmp_path / "run", {1: rows})
    command = f"{sys.executable} -m acpo.cli inspect {run} | head -c 10; exit ${{PIPESTATUS[0]}}"
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(["bash", "-c", command], cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
