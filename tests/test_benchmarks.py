"""The benchmark frame: it skips without its option, measures with it, refuses what is wrong, and its figures are what it says."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from acpo_kernels import logprob_entropy, reference
from benchmarks import accuracy, common, peers, report

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


def run_pytest(*options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pytest", "benchmarks", "-p", "no:cacheprovider", "-q", *options]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)


def case_of(providers: dict, n: int = 6, v: int = 500, **options) -> common.Case:
    """`logprob_entropy` at a small size with the given functions (logits, ids) -> (logp, entropy) as providers."""
    logits, ids = torch.randn(n, v) * 2, torch.randint(v, (n,))
    exact, single = (reference.logprob_entropy(logits.to(d), ids) for d in (torch.float64, torch.float32))
    wanted = {name: common.Expected(getattr(exact, name), getattr(single, name)) for name in exact._fields}

    def call(function):
        return common.Provider(lambda: dict(zip(("logp", "entropy"), function(logits, ids), strict=True)))

    return common.Case(
        "logprob_entropy", "forward", {"N": n, "V": v}, torch.float32, CPU, {name: call(f) for name, f in providers.items()}, lambda of: wanted,
        bytes=logits.numel() * 4, ceilings={"copy": common.copy_ceiling(logits)}, **options,
    )  # fmt: skip


def rounded(logits, ids):
    return reference.logprob_entropy(logits.bfloat16().float(), ids)


def wrong(logits, ids):
    return reference.logprob_entropy(logits, (ids + 1) % logits.shape[-1])


def not_a_number(logits, ids):
    logp, entropy = reference.logprob_entropy(logits, ids)
    return logp, torch.full_like(entropy, torch.nan)


def test_without_the_option_all_is_skipped_with_the_reason():
    result = run_pytest("-rs")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "measures only with --benchmark" in result.stdout
    assert "passed" not in result.stdout and "skipped" in result.stdout.splitlines()[-1]


def test_with_the_option_it_measures_and_the_json_holds_everything(tmp_path):
    out = tmp_path / "bench.json"
    result = run_pytest("--benchmark", "--shapes", "small", "--threads", "1", "-k", "segment_credit and weights and 0", f"--benchmark-json={out}")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "| segment_credit weights forward | N=2,048 S=128 B=8 | float32 | ours |" in result.stdout
    data = json.loads(out.read_text(), parse_constant=lambda c: pytest.fail(f"{c} is not JSON"))
    assert {"commit", "torch", "triton", "cpu", "gpu", "threads", "peers", "loadavg"} <= data["acpo"].keys()
    (bench,) = data["benchmarks"]
    rows = {row["provider"]: row for row in bench["extra_info"]["rows"]}
    assert list(rows) == ["ours", "eager", "copy"]
    for name, row in rows.items():
        assert row["correct"] is True and row["rounds"] == common.ROUNDS and row["seconds"] > 0 and row["spread"] >= 0
        assert row["threads"] == 1 and len(row["load"]) == 2 and row["clock"] == "perf_counter"
        assert row["gb_s"] == pytest.approx(row["bytes"] / row["seconds"] / 1e9)
        assert row["ratio"] == pytest.approx(row["seconds"] / rows["ours"]["seconds"])
        assert ("error" in row) == (name != "copy")
    # pytest-benchmark's own statistics are the rounds of ours
    assert bench["stats"]["rounds"] == common.ROUNDS
    assert bench["stats"]["min"] <= rows["ours"]["seconds"] <= bench["stats"]["median"]
    assert report.main([str(out), "--out", str(tmp_path)]) == 0
    assert (tmp_path / "ratios.png").stat().st_size > 10_000


@pytest.mark.parametrize("function", [rounded, wrong, not_a_number])
def test_ours_is_held_to_the_error_budget_before_anything_is_timed(function, monkeypatch):
    monkeypatch.setattr(common, "interleave", lambda *_, **__: pytest.fail("a wrong result was timed"))
    with pytest.raises(AssertionError, match="ours is wrong, nothing was timed"):
        common.measure(case_of({"ours": function}))


def test_a_peer_is_refused_where_it_computes_something_else(monkeypatch):
    monkeypatch.setattr(common, "ROUNDS", 5)

    def refuses(logits, ids):
        raise TypeError("float32 is not supported")

    providers = {"ours": logprob_entropy, "rounded": rounded, "wrong": wrong, "nan": not_a_number, "refuses": refuses}
    rows, seconds = common.measure(case_of(providers, absent={"elsewhere": "no module elsewhere"}))
    by_name = {row["provider"]: row for row in rows}
    assert len(seconds) == 5
    assert {name for name, row in by_name.items() if "seconds" in row} == {"ours", "rounded", "copy"}
    assert 1e-4 < by_name["rounded"]["error"] < 0.01 and by_name["ours"]["error"] < 1e-6
    assert by_name["nan"]["error"] is None and by_name["refuses"]["why"] == "TypeError: float32 is not supported"
    text = report.table(rows)
    assert "refused: logprob_entropy forward N=6 V=500 float32 wrong" in text and "| wrong |" not in text
    assert "absent: elsewhere: no module elsewhere" in text


def test_the_report_refuses_rows_without_a_passed_check(tmp_path):
    rows, _ = common.measure(case_of({"ours": logprob_entropy, "reference": reference.logprob_entropy}))
    for broken in ({"correct": False}, {"correct": None}):
        changed = [row | broken if row["provider"] == "reference" else row for row in rows]
        path = tmp_path / "changed.json"
        path.write_text(json.dumps({"benchmarks": [{"extra_info": {"rows": changed}}]}))
        assert report.main([str(path)]) == 1
        assert "| reference |" not in report.table(changed) and "refused: " in report.table(changed)
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(SystemExit, match="must be what --benchmark-json wrote"):
        report.main([str(tmp_path / "other.json")])


def test_rounds_interleave_and_the_lower_quartile_is_one_of_them(monkeypatch):
    order = []

    def call(name, seconds):
        def run():
            order.append(name)
            time.sleep(seconds)

        return run

    monkeypatch.setattr(common, "SECONDS", 0.3)
    timed = common.interleave({"short": call("short", 1e-3), "long": call("long", 0.05)}, CPU)
    assert len(timed["short"][0]) == common.ROUNDS and common.LEAST_ROUNDS <= len(timed["long"][0]) <= 6
    rounds = order[order.index("long") + 1 :]  # after one call of warm-up each
    gaps = [i for i, name in enumerate(rounds) if name == "long"]
    assert all(5 <= b - a <= 11 for a, b in itertools.pairwise(gaps))  # spread over the rounds, not at their end
    assert all(s >= 0.05 for s in timed["long"][0])
    assert common.quartile([4.0, 1.0, 3.0, 2.0, 5.0]) == 2.0


def test_peak_memory_is_what_a_call_holds():
    peak = common.peak_bytes(lambda: torch.ones(16 << 20).add(1).sum(), CPU)  # 64 MiB and its successor
    if peak is None:
        pytest.skip("this system has no /proc/self/clear_refs")
    assert 120 << 20 < peak < 160 << 20


def test_peers_that_are_absent_are_named():
    found, absent = peers.find("linear_logprob_entropy", CPU)
    assert {"eager", "torch.compile"} <= found.keys()
    assert absent["verl"] == "its Triton kernels run on CUDA alone"
    with pytest.raises(peers.Absent, match=r"no module no_such_package \(pip install no-such-package==1\)"):
        peers.require("no_such_package", "no-such-package==1")


def test_accuracy_measures_what_it_says():
    """A provider that rounds to bfloat16 is off by about 0.03 at logits near 20; a lost confident token is off by 1."""
    inputs = accuracy.logit_inputs()
    logits, ids = inputs["ordinary"]
    logits, ids = logits[:2, :5000] * 4, ids[:2] % 5000
    plain = accuracy.logit_errors(accuracy.by_autograd(reference.logprob_entropy), logits, ids)
    off = accuracy.logit_errors(accuracy.by_autograd(rounded), logits, ids)
    exact, got = reference.logprob_entropy(logits.double(), ids).logp, rounded(logits, ids).logp
    assert off["logp"] == pytest.approx(((got - exact) / exact).abs().max().item())
    assert 1e-3 < (got - exact).abs().max() < 0.1 and all(off[name] > 100 * plain[name] for name in off)
    assert plain["logp"] < 1e-6 and plain["entropy"] < 1e-6 and plain["gradient"] < 1e-5

    logits, ids = (x[:2] for x in inputs["margin 40"])
    naive = accuracy.by_autograd(lambda z, ids: (torch.log_softmax(z, -1).gather(-1, ids.unsqueeze(-1)).squeeze(-1), (z * 0).sum(-1)))
    assert accuracy.logit_errors(naive, logits, ids)["logp"] == 1.0
    assert accuracy.logit_errors(accuracy.by_autograd(logprob_entropy), logits, ids)["logp"] < 1e-6
    assert accuracy.relative(torch.tensor([torch.nan]), torch.ones(1), 0) != accuracy.relative(torch.ones(1), torch.ones(1), 0) == 0
    assert accuracy.number(float("nan")) == "NaN" and accuracy.number(0.031) == "3e-2"


def test_accuracy_says_where_ours_is_behind():
    values = {"ours, avx2": 1e-3, "reference, float32": 0.0, "eager": 1.0, "TRL": 1e-7}
    line = "margin 40, logp: ours, avx2 1.0e-03, TRL 1.0e-07"

    def verdict(**changed):
        return accuracy.not_best({"margin 40": {"logp": {**values, **changed}}})

    assert verdict() == ([line], [])
    assert verdict(**{"reference, float32": 8e-4}) == ([], [line])
    assert verdict(**{"ours, avx2": 2e-7}) == ([], [])
    assert len(verdict(**{"ours, avx2": float("nan")})[0]) == 1
