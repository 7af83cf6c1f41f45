"""`acpo report`: what is drawn is what was written, whatever state a run is in, and nothing of a run becomes markup."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from loop import records

from acpo import report
from acpo.cli import main
from acpo.report import figure, page, panels
from acpo.report.records import interval, summary

ALL = [panel for _, section in panels.SECTIONS for panel in section]


def write_run(folder: Path, steps: list[dict], method: str = "acpo", seed: int = 0, **settings) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"name": "made", "method": method, "seed": seed, **settings}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in steps))
    return folder


def step(number: int, phase: str = "stage1", **values) -> dict:
    return {"phase": phase, "step": number, "tokens/generated": 100 * number, **values}


def panel_of(title: str) -> panels.Panel:
    return next(p for p in ALL if p.title == title)


class Page(HTMLParser):
    """Tags, attributes and text of a page; checks that what is opened is closed."""

    VOID = ("meta", "br", "use", "path")

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.attributes, self.text, self.open = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        if tag in self.VOID:
            return
        while self.open and self.open[-1] in ("i", "p", "html") and self.open[-1] != tag:
            self.open.pop()
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data):
        self.text.append(data)


def test_a_run_by_its_own_numbers(finished_run):
    found = report.read(finished_run)
    written = records(finished_run)
    assert [r["step"] for r in found.steps] == list(range(9)) and found.warmup
    assert found.stage2 == next(r["step"] for r in written if r["phase"] == "stage2")
    groups = report.load([finished_run])
    (line,) = panels.lines(panel_of("Reward"), groups)
    assert dict(zip(line.x, line.mean, strict=True)) == {r["step"]: r["reward"] for r in written if r["phase"].startswith("stage")}
    for title in ("pass@k of the rollouts", "Information budget", "Difficulty of the problems", "Throughput", "Time of a step", "Warm-up loss"):
        assert panels.lines(panel_of(title), groups), f"{title} has no numbers in a fresh run"
    shares = [line for line in panels.lines(panel_of("Difficulty of the problems"), groups) if line.series == 0]
    assert sum(shares[0].mean) == pytest.approx(1.0)
    budget = {line.name: line for line in panels.lines(panel_of("Information budget"), groups)}
    assert all(0 <= v <= math.log(2) for v in budget["h_b(V)"].mean)


def test_the_phases_add_up(finished_run):
    (line,) = panels.lines(panel_of("Time of a step"), report.load([finished_run]))
    steps = [r for r in records(finished_run) if "step_time" in r]
    assert sum(line.mean) == pytest.approx(sum(r["step_time"] for r in steps) / len(steps))


def test_mean_and_interval_over_seeds(tmp_path):
    rewards = {0: [0.1, 0.4], 1: [0.2, 0.5], 2: [0.6, 0.6]}
    runs = [write_run(tmp_path / f"r-{s}", [step(i + 1, reward=v) for i, v in enumerate(values)], seed=s) for s, values in rewards.items()]
    (group,) = report.load(runs)
    (line,) = panels.lines(panel_of("Reward"), [group])
    assert line.runs == 3 and line.mean == pytest.approx([0.3, 0.5])
    half = 4.303 * math.sqrt((0.2**2 + 0.1**2 + 0.3**2) / 2) / math.sqrt(3)  # t at 97.5 %, two degrees of freedom
    assert line.low[0] == pytest.approx(0.3 - half) and line.high[0] == pytest.approx(0.3 + half)
    assert interval([0.1, 0.9]) is None


def test_groups_are_settings(tmp_path):
    runs = [
        write_run(tmp_path / "a-0", [step(1, reward=0.1)], seed=0),
        write_run(tmp_path / "a-1", [step(1, reward=0.2)], seed=1),
        write_run(tmp_path / "b-0", [step(1, reward=0.3)], method="grpo"),
        write_run(tmp_path / "c-0", [step(1, reward=0.4)], credit={"gain": 0.9}),
    ]
    groups = report.load([*runs, runs[0]])  # given twice: once
    assert [(g.label, len(g.runs)) for g in groups] == [("acpo", 2), ("grpo", 1), ("acpo, credit.gain=0.9", 1)]


def test_two_models_are_two_groups(tmp_path):
    """Seeds with a policy of their own (warm starts) are one group; where a seed is there twice the policies are held apart, and named."""
    starts = [write_run(tmp_path / f"s-{s}", [step(1, reward=0.1)], seed=s, policy={"path": f"warm-{s}"}) for s in range(2)]
    models = [write_run(tmp_path / f"m-{n}", [step(1, reward=v)], seed=0, policy={"path": n}) for n, v in (("small", 0.2), ("large", 0.9))]
    assert [len(g.runs) for g in report.load(starts)] == [2]
    assert [(g.label, len(g.runs)) for g in report.load(models)] == [("acpo, policy.path=small", 1), ("acpo, policy.path=large", 1)]


def test_held_out_figures_are_no_rollouts_figures(tmp_path):
    """Without samples an evaluation has no pass@k: the table has none either, though the rollouts of that step have."""
    found = {"pass@1": 0.9, "pass@8": 1.0}
    run = write_run(tmp_path / "a-0", [step(0, "start", **{"eval/accuracy": 0.1}), step(1, **found, **{"eval/accuracy": 0.2})])
    (group,) = report.load([run])
    assert not [key for key in summary(group.runs[0]) if "pass@" in key]
    (tmp_path / "a-0" / "metrics.jsonl").write_text(json.dumps(step(1, **found, **{"eval/accuracy": 0.2, "eval/pass@1": 0.3})) + "\n")
    (group,) = report.load([run])
    assert {k: v for k, v in summary(group.runs[0]).items() if "pass@" in k} == {"pass@1 before": 0.3, "pass@1 after": 0.3}


def test_a_curve_of_many_steps_is_means_of_pieces(tmp_path):
    run = write_run(tmp_path / "r", [step(i, reward=float(i)) for i in range(1, 101)])
    (line,) = panels.lines(panel_of("Reward"), report.load([run]))
    assert len(line.x) == 25 and line.mean == pytest.approx(line.x)  # the mean of i over a piece is its middle


@pytest.mark.parametrize(
    ("name", "steps", "tail"),
    [
        ("nothing yet", [], ""),
        ("warm-up only", [{"phase": "warmup", "step": 50, "warmup/loss": 1.0, "seconds": 1.0}], ""),
        ("before the first step", [step(0, "start", **{"eval/accuracy": 0.5})], ""),
        ("one step", [step(0, "start", **{"eval/accuracy": 0.5}), step(1, reward=0.5, entropy=0.1, step_time=1.0, **{"time/rollout": 1.0})], ""),
        ("being written", [step(1, reward=0.5)], '{"phase": "stage1", "step": 2, "rew'),
        ("broken off and not resumed", [step(1, reward=0.1), step(2, reward=0.2), step(2, reward=0.3)], ""),
        ("not a number", [step(1, reward=math.nan, entropy=0.1), step(2, reward=0.5, entropy=math.inf)], ""),
        ("no tokens", [step(0, **{"eval/accuracy": 0.5}), {"phase": "stage1", "step": 1, "eval/accuracy": 0.6}], ""),
        ("words", [step(0, **{"eval/accuracy": "half"}), step(1, **{"eval/accuracy": 0.6, "tokens/generated": None, "entropy": "x"})], ""),
    ],
)
def test_whatever_state_a_run_is_in(tmp_path, name, steps, tail):
    run = write_run(tmp_path / "run", steps)
    with open(run / "metrics.jsonl", "a") as file:
        file.write(tail)
    groups = report.load([run])
    Page(page.html(groups))
    assert report.summary(groups[0].runs[0])["run"] == "run"
    for row in csv.DictReader(io.StringIO(report.numbers(groups))):
        assert math.isfinite(float(row["mean"]))
    if name.startswith("broken"):
        assert panels.lines(panel_of("Reward"), groups)[0].mean == [0.1, 0.3]


def test_a_metric_that_a_run_does_not_have_is_a_named_empty_panel(tmp_path):
    run = write_run(tmp_path / "run", [step(1, reward=0.5)])
    text = page.html(report.load([run]))
    assert text.count("not in these runs") == len(ALL) - 1
    for panel in ALL:
        assert panel.title in text
    figure.picture(report.load([run]), tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_of_a_run_is_markup(tmp_path):
    evil = "<script>alert(1)</script><img src=x onerror=alert(2)>'\"$\\frac{$"
    keys = {f"time/{evil}": 1.0, f"attribution/reliability/{evil}": 0.5}
    runs = [
        write_run(tmp_path / "<b>run", [step(1, reward=0.5, step_time=1.0, **keys)], evil),
        write_run(tmp_path / "other", [step(1, reward=0.5)], name=evil),
    ]
    groups = report.load(runs)
    text = page.html(groups)
    parsed = Page(text)
    assert "script" not in parsed.tags and "img" not in parsed.tags and "b" in parsed.tags
    assert not any(name.startswith("on") for name, _ in parsed.attributes)
    assert evil in "".join(parsed.text) and "<b>run" not in text
    figure.picture(groups, tmp_path / "x.svg")  # a name that is broken mathematics is a name
    ElementTree.parse(tmp_path / "x.svg")


@pytest.fixture(scope="module")
def its_page(finished_run) -> str:
    return page.html(report.load([finished_run]))


def test_the_page_needs_nothing_beside_it_and_its_figures_are_whole(its_page):
    text = its_page
    assert not re.search(r"(?:src|href)=['\"](?!#)", text) and "url(http" not in text and "@import" not in text
    assert "default-src 'none'" in text and "prefers-color-scheme:dark" in text
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids)), "figures on one page share an id"
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', text)) <= set(ids)
    for found in re.findall(r"<svg.*?</svg>", text, flags=re.S):
        ElementTree.fromstring(found)
        assert not re.search(rf"{figure.INK}|{figure.MUTED}|{'|'.join(figure.PALETTE)}", found), "a colour that does not follow the page"


def test_the_table_says_what_the_figure_shows(finished_run, its_page):
    rows = list(csv.DictReader(io.StringIO(report.numbers(report.load([finished_run])))))
    for row in rows:
        if row["panel"] == "Held-out accuracy":
            assert f"<td>{row['x']}</td><td>{float(row['mean']):.3f}</td>" in its_page
    assert {r["panel"] for r in rows} >= {"Reward", "Entropy", "Time of a step", "Difficulty of the problems"}


def test_where_it_is_written(tmp_path, finished_run, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["report", str(finished_run), "--out", "here", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["files"] == ["here/curves.png", "here/report.html", "here/report.csv"]
    assert sorted(p.name for p in Path("here").iterdir()) == ["curves.png", "report.csv", "report.html"]
    assert found["runs"][0]["after"] == records(finished_run)[-1]["eval/accuracy"]
    a, b = (write_run(tmp_path / "runs" / f"r-{s}", [step(1, reward=math.nan)], seed=s) for s in (0, 1))
    assert main(["report", str(a), str(b)]) == 0
    assert sorted(p.name for p in Path("runs").iterdir()) == ["r-0", "r-1", "report.csv", "report.html", "report.png"]


def test_runs_of_unrelated_folders_are_written_into_the_current_one(tmp_path, capsys, monkeypatch):
    """Not into the folder that holds all of their folders: that may be /."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    a, b = (write_run(tmp_path / name / "runs" / "r", [step(1, reward=0.5)], seed=s) for s, name in enumerate("ab"))
    assert main(["report", str(a), str(b)]) == 0
    assert capsys.readouterr().out.split()[-3:] == ["report.png", "report.html", "report.csv"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "here"] and len(list((tmp_path / "here").iterdir())) == 3


def test_what_is_no_run_among_several_is_passed_over(tmp_path, capsys):
    runs = [str(write_run(tmp_path / f"r-{s}", [step(1, reward=0.5)], seed=s)) for s in (0, 1)]
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("no folder at all")
    wrong = [str(tmp_path / "empty"), str(tmp_path / "notes.txt")]
    assert main(["report", runs[0], wrong[0], runs[1], wrong[1], "--json"]) == 0
    found = capsys.readouterr()
    assert [row["run"] for row in json.loads(found.out)["runs"]] == ["r-0", "r-1"]
    assert found.err == "".join(f"acpo: {path} is no run directory: it has no metrics.jsonl; passed over\n" for path in wrong)
    assert (tmp_path / "report.csv").exists()
    assert main(["report", *wrong]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(f"{path} is no run directory" in error for path in wrong)


def test_lines_that_are_no_records_are_passed_over(tmp_path, capsys):
    run = write_run(tmp_path / "run", [step(1, reward=0.25)])
    with open(run / "metrics.jsonl", "a") as file:
        file.write('\n{"phase": "stage1", "st\n[1]\n' + json.dumps(step(2, reward=0.75)) + "\n  \n")
    assert main(["report", str(run)]) == 1, "written, and the data was at fault"
    assert (run / "report.html").exists()
    error = capsys.readouterr().err
    assert re.fullmatch(r"acpo: \S+/metrics.jsonl, line 3: this line is not JSON: [^\n]*, and 1 more like it; left out\n", error)
    assert panels.lines(panel_of("Reward"), report.load([run]))[0].mean == [0.25, 0.75]
    blank = write_run(tmp_path / "blank", [step(1, reward=0.25)])
    with open(blank / "metrics.jsonl", "a") as file:
        file.write("\n" + json.dumps(step(2, reward=0.75)) + "\n")
    assert main(["report", str(blank)]) == 0 and not capsys.readouterr().err


def test_some_of_the_panels(tmp_path, capsys):
    run = write_run(tmp_path / "run", [step(n, reward=0.5, **{"eval/accuracy": 0.25}) for n in (1, 2)])
    assert main(["report", str(run), "--out", str(tmp_path / "n.csv"), "--panels", "ACCURACY,reward"]) == 0
    rows = list(csv.DictReader(io.StringIO((tmp_path / "n.csv").read_text())))
    assert list(dict.fromkeys(row["panel"] for row in rows)) == ["Held-out accuracy", "Reward"], "in the order of the names"
    some = panels.chosen(["accuracy", "reward"])
    groups = report.load([run])
    assert Page(page.html(groups, some)).tags.count("figure") == 2
    figure.picture(groups, tmp_path / "one.png", panels.chosen(["accuracy"]))  # one axis is no array of axes
    assert main(["report", str(run), "--panels", "acuracy"]) == 2
    assert "--panels: no panel is named 'acuracy'; there are Reward, pass@k" in capsys.readouterr().err
