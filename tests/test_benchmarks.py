"""The benchmark frame: it skips without its option, measures with it, refuses what is wrong, and its figures are what it says."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import tarfile
import time
import types
import zipfile
from pathlib import Path

import pytest
import torch

from acpo_kernels import Segmenter, Segments, logprob_entropy, reference
from benchmarks import accuracy, bench_linear_logprob_entropy, bench_linear_policy_loss, bench_segmenter, clocks, common, peers, report, variants
from benchmarks.peers import fetch

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


def alone() -> dict[str, str]:
    """The environment without what pytest-xdist says of its workers: pytest-benchmark measures nothing in one."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}


def run_pytest(*options: str, where: str = "benchmarks/bench_segment_credit.py") -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pytest", where, "-p", "no:cacheprovider", "-q", *options]
    return subprocess.run(command, cwd=ROOT, env={**alone(), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)


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
    result = run_pytest("-rs", where="benchmarks")
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
        assert row["correct"] is True and row["rounds"] == clocks.ROUNDS and row["seconds"] > 0 and row["spread"] >= 0
        assert row["threads"] == 1 and len(row["load"]) == 2 and row["clock"] == "perf_counter, cold caches"
        assert row["gb_s"] == pytest.approx(row["bytes"] / row["seconds"] / 1e9)
        assert row["ratio"] == pytest.approx(row["seconds"] / rows["ours"]["seconds"])
        assert ("error" in row) == (name != "copy") and row["cold"] is True and row.get("warm_seconds", 1.0) > 0
    # pytest-benchmark's own statistics are the rounds of ours
    assert bench["stats"]["rounds"] == clocks.ROUNDS
    assert bench["stats"]["min"] <= rows["ours"]["seconds"] <= bench["stats"]["median"]
    assert report.main([str(out), "--out", str(tmp_path)]) == 0
    assert (tmp_path / "ratios.png").stat().st_size > 10_000


@pytest.mark.parametrize("function", [rounded, wrong, not_a_number])
def test_ours_is_held_to_the_error_budget_before_anything_is_timed(function, monkeypatch):
    monkeypatch.setattr(common, "interleave", lambda *_, **__: pytest.fail("a wrong result was timed"))
    with pytest.raises(AssertionError, match="ours is wrong, nothing was timed"):
        common.measure(case_of({"ours": function}))


def test_a_peer_is_refused_where_it_computes_something_else(monkeypatch):
    monkeypatch.setattr(clocks, "ROUNDS", 5)

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

    def no_part(*_):
        order.append("caches")

    monkeypatch.setattr(clocks, "SECONDS", 0.9)
    monkeypatch.setattr(clocks.Caches, "empty", no_part)
    timed = clocks.interleave({"short": call("short", 1e-3), "long": call("long", 0.15)}, CPU)
    short, long = timed["short"], timed["long"]
    assert len(short.seconds) == len(short.warm) == clocks.ROUNDS and clocks.LEAST_ROUNDS <= len(long.seconds) <= 6 and not long.warm
    rounds = order[order.index("caches") :]  # after the warm-up
    gaps = [i for i, name in enumerate(name for name in rounds if name != "caches") if name == "long"]
    assert all(10 <= b - a <= 22 for a, b in itertools.pairwise(gaps))  # spread over the rounds, not at their end
    before = [a for a, b in itertools.pairwise(rounds) if b == "short"]
    assert before == ["caches", "short"] * clocks.ROUNDS, "cold, then warm"
    assert all(a == "caches" for a, b in itertools.pairwise(rounds) if b == "long")
    assert all(s >= 0.15 for s in long.seconds)
    order.clear()
    timed = clocks.interleave({"short": call("short", 1e-3)}, CPU, cold=False)
    assert "caches" not in order and not timed["short"].warm and not timed["short"].cold
    assert clocks.quartile([4.0, 1.0, 3.0, 2.0, 5.0]) == 2.0


def test_peak_memory_is_what_a_call_holds():
    total, peak = clocks.with_peak(lambda: float(torch.ones(16 << 20).add(1).sum()), CPU)  # 64 MiB and its successor
    assert total == 2 << 24
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
    values = {"ours, avx2": 1e-3, "float32": 0.0, "eager": 1.0, "TRL": 1e-7, "reference, float32": 1e-3}

    def verdict(what="margin 40", quantity="logp", **changed):
        return accuracy.not_best({what: {quantity: {**values, **changed}}})

    assert verdict() == ["margin 40, logp: ours, avx2 1.0e-03, float32 0.0e+00"]
    assert verdict(**{"float32": 1e-7}) == ["margin 40, logp: ours, avx2 1.0e-03, float32 1.0e-07"], "the reference is no excuse"
    assert verdict(**{"ours, avx2": 2e-7}) == []
    assert verdict(**{"products alone": 4e-4}) != [] and verdict(**{"products alone": 6e-4}) == [], "twice what the products bring"
    assert verdict("bf16 logits", "gradient") == [] and verdict("bf16 logits", "logp") != [], "stored as bfloat16"
    assert len(verdict(**{"ours, avx2": float("nan"), "products alone": 1.0})) == 1


def test_accuracy_marks_every_column_by_the_same_rule():
    found = {"ours": 3e-5, "TRL": 1e-5, "eager": 1e-3, "products alone": 2e-5, "cce": float("nan")}
    header, _, row = accuracy.table({"far": {"logp": found}}).splitlines()
    assert header == "| input | | ours | products alone | TRL | eager | cce |"
    assert row == "| far | logp | **3e-5** | 2e-5 | **1e-5** | 1e-3 | NaN |"


def test_products_alone_are_the_least_that_float32_products_bring():
    torch.manual_seed(0)
    hidden, weight, ids = torch.randn(8, 64), torch.randn(500, 64) * 0.2, torch.randint(500, (8,))
    errors = accuracy.linear_errors(accuracy.ProductsAlone.apply, hidden, weight, ids)
    assert set(errors) == {"logp", "entropy", "dHidden", "dW"} and 0 < max(errors.values()) < 1e-5
    exact = accuracy.linear_errors(accuracy.ProductsAlone.apply, hidden.round(), weight.round(), ids)
    assert exact["logp"] < 1e-15, "products of small integers are exact, and all else is in float64"


# --- the whole step -----------------------------------------------------------------------------------------------------------------


def step_rows(**changed: float) -> list[dict]:
    acpo = {"rollout": 1.0, "score": 0.1, "hindsight": 0.05, "information": 0.17, "segment": 0.002, "attribute": 0.004, "credit": 0.0,
            "reference": 0.08, "update": 0.5, "optimizer": 0.3, "rest": 0.001}  # fmt: skip
    grpo = {**acpo, "score": 0.2, "hindsight": 0.0, "information": 0.0, "attribute": 0.0, "reference": 0.0} | changed
    common = {"op": "step", "shape": {"B": 4, "N": 100}, "outcomes": "mixed", "dtype": "float32", "device": "cpu", "threads": 2, "rounds": 5,
              "read": 0.5, "correct": True, "kind": "part"}  # fmt: skip
    modes = {"acpo": acpo, "grpo": grpo, "trl": {"score": 1.0, "update": 2.0}}
    return [{**common, "mode": m, "provider": part, "note": part, "part_seconds": s} for m, parts in modes.items() for part, s in parts.items()]


def test_the_step_table_by_hand():
    """GRPO's step is 2.003 s; the extra forward is half of its scoring, 0.1 s; scoring in all took 0.02 s more than both, the rest 0.004."""
    text = report.table(step_rows())
    assert "| information | information |  | 170 ms |  | 8.49 % | 16.95 % |" in text
    assert "| sum |  | 2 s | 2.21 s | 3 s | 10.18 % | 20.34 % |" in text
    assert (
        "at the price of the scoring forward a token: 100 ms, 5.0 % of the GRPO step, 10.0 % without rollouts; the reference's 80 ms, 4.0 %" in text
    )
    assert "All else that ACPO adds before the loss: 24 ms, 1.2 % and 2.4 %; of it the information kernel, beyond that forward, 20 ms." in text
    assert "TRL on the same rollouts, without them: 3 s (5 measured), 4.29x GRPO's same parts, 2.49x the whole ACPO step." in text


def test_parts_that_were_not_checked_are_refused(tmp_path):
    rows = step_rows()
    rows[3] |= {"correct": False, "why": "other rollouts"}
    text = report.table(rows)
    assert "| sum |" not in text and "refused: step acpo B=4 N=100 float32 information: other rollouts" in text
    (tmp_path / "step.json").write_text(json.dumps({"benchmarks": [{"extra_info": {"rows": rows}}]}))
    assert report.main([str(tmp_path / "step.json")]) == 1


# --- files and plots ----------------------------------------------------------------------------------------------------------------


def test_rows_are_kept_case_by_case_and_session_by_session(tmp_path):
    out = tmp_path / "rows.json"
    for expression in ("segment_credit and weights and size0", "segment_credit and additive and size0"):
        result = run_pytest("--benchmark", "--shapes", "small", "--threads", "1", "-k", expression, f"--rows={out}")
        assert result.returncode == 0, result.stdout + result.stderr
    environment, rows = report.load(out)
    assert {row["op"] for row in rows} == {"segment_credit weights", "segment_credit additive"}
    assert {"commit", "torch", "peers"} <= environment.keys() and not list(tmp_path.glob("*.writing"))


def test_a_rehearsal_calls_and_times_nothing(tmp_path):
    out = tmp_path / "rows.json"
    result = run_pytest("--benchmark", "--rehearse", "--shapes", "small", "-rs", "-k", "segment_credit and weights and size0", f"--rows={out}")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "--rehearse: 2 of 2 called once, nothing timed" in result.stdout and not out.exists()

    def refuses(logits, ids):
        raise MemoryError

    assert common.rehearse(case_of({"ours": logprob_entropy, "peer": refuses})) == "1 of 2 called once, nothing timed; peer: MemoryError"


def test_the_gpu_script_measures_a_case_and_names_a_wrong_option(tmp_path):
    script = ["bash", str(ROOT / "benchmarks" / "gpu.sh")]
    wrong = subprocess.run([*script, "--wrong"], capture_output=True, text=True)
    assert wrong.returncode == 2 and "--dry-run" in wrong.stderr
    environment = {**alone(), "PYTHON": sys.executable}
    command = [*script, "--dry-run", "--out", str(tmp_path / "out"), "--only", "segment_credit and weights and size0"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "| segment_credit weights forward |" in result.stdout
    assert {"benchmarks.json", "benchmarks.log", "table.md", "ratios.png", "roofline.png"} <= {p.name for p in (tmp_path / "out").iterdir()}


def test_why_a_peer_is_refused_is_short(tmp_path):
    """A result that is NaN everywhere names every place: a file of 16 MB, on the one occasion."""
    peer = lambda logits, ids: tuple(torch.full((len(ids),), torch.nan) for _ in range(2))  # noqa: E731
    rows, _ = common.measure(case_of({"ours": logprob_entropy, "peer": peer}, n=3000, v=20))
    (refused,) = report.refused(rows)
    assert refused["provider"] == "peer" and "NaN at" in refused["why"] and len(refused["why"]) < 500
    absent = {**rows[0], "provider": "nobody", "kind": "absent", "correct": True, "why": "not here"}
    assert "refused: " in report.table([*rows, absent]) and "absent: nobody: not here" in report.table([*rows, absent])


def test_variants_refuse_what_they_cannot_set(capsys):
    for case in ("X:", "F", "B:tile=", "F:tile"):
        with pytest.raises(SystemExit, match="wanted LF"):
            variants.main([os.devnull, case])
    for settings in ({"tile": "128x64"}, {"speed": "3"}):
        with pytest.raises(SystemExit, match="no such setting"):
            variants.change(settings)
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="no CUDA device"):
            variants.main([os.devnull, "F:group=8"])


def test_plots_leave_out_what_was_refused(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    drawn = []
    barh = Axes.barh
    monkeypatch.setattr(Axes, "barh", lambda self, labels, *a, **k: (drawn.extend(labels), barh(self, labels, *a, **k))[1])
    monkeypatch.setattr(clocks, "ROUNDS", 3)
    rows, _ = common.measure(case_of({"ours": logprob_entropy, "peer": reference.logprob_entropy, "other": reference.logprob_entropy}))
    for row in rows:
        row["curve"] = "N"
        row["correct"] = row["provider"] != "other"
    assert [p.name for p in report.draw(rows, tmp_path, "a title")] == ["ratios.png", "roofline.png", "scaling.png"]
    assert [label.rsplit(": ", 1)[1] for label in drawn] == ["peer"]
    assert all((tmp_path / f"{name}.png").stat().st_size > 5_000 for name in ("ratios", "roofline", "scaling"))


def test_percents_name_every_ceiling():
    rows = [
        {"provider": n, "kind": k, "seconds": s, "gb_s": 1 / s}
        for n, k, s in (("ours", "provider", 2.0), ("copy", "ceiling", 1.0), ("amax", "ceiling", 0.5))
    ]
    common._relate(rows)
    assert rows[0]["percents"] == {"copy": 50.0, "amax": 25.0} and rows[0]["percent"] == 25.0


def test_a_rate_is_of_what_its_provider_multiplies(monkeypatch):
    """A quarter of the FLOP in a quarter of the time is no more of a ceiling; of FLOP that nobody counted there is no rate at all."""
    monkeypatch.setattr(clocks, "ROUNDS", 3)
    providers = {"ours": logprob_entropy, "ours, a quarter": logprob_entropy, "skips": reference.logprob_entropy}
    case = case_of(providers)
    case.flop = 800
    case.providers["ours, a quarter"].flop, case.providers["skips"].flop = 200, 0
    case.ceilings["products"] = common.Ceiling(lambda: None, flop=600)
    rows = {row["provider"]: row for row in common.measure(case)[0]}
    assert {name: row["flop"] for name, row in rows.items()} == {"ours": 800, "ours, a quarter": 200, "skips": 0, "copy": 0, "products": 600}
    quarter = rows["ours, a quarter"]
    assert quarter["gflop_s"] == pytest.approx(200 / quarter["seconds"] / 1e9)
    assert quarter["percent"] == pytest.approx(100 * quarter["gflop_s"] / rows["products"]["gflop_s"])
    assert rows["skips"]["gb_s"] is None and rows["skips"]["gflop_s"] is None and "percent" not in rows["skips"]
    (line,) = [line for line in report.table(list(rows.values())).splitlines() if "| skips |" in line]
    assert [cell.strip() for cell in line.split("|")][9:11] == ["", ""]


def test_shares_and_kept_logits_have_flop_of_their_own():
    n, h, v = 16, 8, 100
    case = bench_linear_logprob_entropy.case(n, h, v, torch.float32, "forward+backward", CPU)
    own = {name: p.flop / (n * h * v) for name, p in case.providers.items() if p.flop is not None}
    assert case.flop == 8 * n * h * v and own.pop("cut-cross-entropy", 0) == 0
    assert own == {"ours, u=1 a=0.25": 3.5, "ours, u=0.25 a=0.25": 2, "ours, frozen weight": 6, "eager": 6, "torch.compile": 6}
    forward = bench_linear_logprob_entropy.case(n, h, v, torch.float32, "forward", CPU)
    assert all(p.flop is None for p in forward.providers.values())
    loss = bench_linear_policy_loss.case(n, h, v, torch.float32, CPU)
    own = {name: p.flop / (n * h * v) for name, p in loss.providers.items() if p.flop is not None}
    assert loss.flop == 6 * n * h * v
    assert own == {"ours, u=1 a=0.25": 3, "ours, u=0.25 a=0.25": 1.5, "linear_logprob_entropy + policy_loss": 8}


# --- peers by path ------------------------------------------------------------------------------------------------------------------


def test_a_peer_by_path_needs_its_folder_and_its_file(tmp_path, monkeypatch):
    monkeypatch.delenv("ACPO_PEER_FILES", raising=False)
    peers.by_path.cache_clear()
    with pytest.raises(peers.Absent, match=r"ACPO_PEER_FILES does not name a folder that holds a/b\.py"):
        peers.by_path("a/b.py")
    monkeypatch.setenv("ACPO_PEER_FILES", str(tmp_path))
    with pytest.raises(peers.Absent, match=r"no such file: .*a/b\.py"):
        peers.by_path("a/b.py")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.py").write_text("from no_such_package_there.part import value\n")
    with pytest.raises(peers.Absent, match=r"a/b\.py does not import: ModuleNotFoundError"):
        peers.by_path("a/b.py")
    (tmp_path / "a" / "b.py").write_text("from acpopeer.part import value\n")
    part = types.ModuleType("acpopeer.part")
    part.value = 7
    assert peers.by_path("a/b.py", acpopeer=types.ModuleType("acpopeer"), acpopeer_part=part).value == 7
    assert not {"acpopeer", "acpopeer.part"} & sys.modules.keys(), "stubs do not stay behind"
    peers.by_path.cache_clear()


def test_fetch_reads_one_file_of_a_wheel_and_of_a_source_package(tmp_path):
    with zipfile.ZipFile(tmp_path / "p-1.whl", "w") as wheel:
        wheel.writestr("p/q.py", "x = 1")
    (tmp_path / "q.py").write_text("x = 2")
    with tarfile.open(tmp_path / "p-1.tar.gz", "w:gz") as source:
        source.add(tmp_path / "q.py", "p-1/p/q.py")
    assert fetch.member(tmp_path / "p-1.whl", "p/q.py") == b"x = 1" and fetch.member(tmp_path / "p-1.tar.gz", "p/q.py") == b"x = 2"


def test_the_segmenter_benchmark_refuses_segments_that_differ_or_do_not_fit():
    def segments(tokens, sequences):
        return Segments(torch.tensor(tokens), torch.tensor(sequences))

    whole, cu = segments([0, 3, 5, 9], [0, 2, 3]), torch.tensor([0, 5, 9])
    assert bench_segmenter.why_wrong(whole, whole, cu) == ""
    assert "one thread" in bench_segmenter.why_wrong(whole, segments([0, 2, 5, 9], [0, 2, 3]), cu)
    assert "do not fill" in bench_segmenter.why_wrong(whole, whole, torch.tensor([0, 6, 9]))
    long = segments([0, 300], [0, 1])
    assert "300 tokens" in bench_segmenter.why_wrong(long, long, torch.tensor([0, 300]))


def test_the_segmenter_benchmark_holds_cuts_against_the_textbook_programme():
    segmenter = Segmenter([bytes([b]) for b in range(256)], threads=1)
    data = (ROOT / "README.md").read_bytes()[:6000]
    ids, cu = torch.tensor(list(data)), torch.tensor([0, 2500, 6000])
    judge, found = bench_segmenter.Judge(segmenter, ids, cu), bench_segmenter.cuts(segmenter, ids, cu).run()
    assert judge(found) == {"error": 0.0, "errors": {"cuts": 0.0}, "correct": True, "why": ""} and len(judge.cuts) > 20
    moved = found["token_offsets"].clone()
    moved[5] += 1
    judge.again = Segments(moved, found["sequence_offsets"])
    verdict = judge({**found, "token_offsets": moved})
    assert verdict["error"] == 2 / len(judge.cuts) and not verdict["correct"] and "2 boundaries differ" in verdict["why"]


# --- caches -------------------------------------------------------------------------------------------------------------------------


def test_the_caches_are_emptied_by_reading_to_the_last_byte():
    caches = clocks.Caches()
    size, sharers = clocks.last_level()
    assert caches.buffer.numel() >= 4 * size // sharers and size >= 1 << 20
    caches.empty()
    caches.buffer[-1] = 0
    with pytest.raises(RuntimeError, match="was not read to its end"):
        caches.empty()
