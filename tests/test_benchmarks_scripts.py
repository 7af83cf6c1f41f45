"""Scripts that measure for hours: paths are the caller's, what they write to is there before they begin, and what they select exists."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import accuracy, attribution_quality, attribution_traces, gradient_signal, method, step_clocks, variants

ROOT = Path(__file__).parents[1]


# --- shell scripts ------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def caller(tmp_path, monkeypatch):
    """A folder to call from, beside a checkout of scripts alone, with a Python that only writes down where it is and what it is told."""
    for name in ("benchmarks/gpu.sh", "benchmarks/method_gpu.sh", "tests/external/environment.sh"):
        (tmp_path / "checkout" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / "checkout" / name)
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$PWD: $*" >>"$CALLS"\n')
    python.chmod(0o755)
    monkeypatch.setenv("PYTHON", str(python))
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    (folder := tmp_path / "caller").mkdir()
    monkeypatch.chdir(folder)
    return folder


def run(*command: str) -> subprocess.CompletedProcess:
    return subprocess.run(["bash", *command], capture_output=True, text=True)


def calls(folder: Path) -> str:
    """What Python was told; it ran in the checkout, which the scripts left as it was."""
    checkout, found = folder.parent / "checkout", (folder.parent / "calls").read_text()
    assert {line.split(": ")[0] for line in found.splitlines()} == {str(checkout)}
    assert sorted(path.name for path in checkout.iterdir()) == ["benchmarks", "tests"]
    return found


def test_the_gpu_script_takes_paths_from_where_it_is_called(caller):
    (caller / "peers").mkdir()
    (caller / "peers" / "peer.whl").touch()
    result = run("../checkout/benchmarks/gpu.sh", "--out", "results/new", "--wheels", "peers", "--dry-run", "--no-tests")
    assert "nothing was measured" in result.stdout, result.stderr
    found = calls(caller)
    assert f"{caller}/peers/peer.whl" in found and f"--rows {caller}/results/new/benchmarks.json" in found
    assert (caller / "results" / "new" / "benchmarks.log").exists()
    wrong = run("../checkout/benchmarks/gpu.sh", "--wrong")
    assert wrong.returncode == 2 and "--dry-run" in wrong.stderr, "its own head, which a relative path found no longer"


def test_the_method_script_takes_paths_from_where_it_is_called(caller):
    (caller / "own.yaml").write_text("seeds: 0-3\n")
    result = run("../checkout/benchmarks/method_gpu.sh", "--out", "out", "--config", "own.yaml")
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"compare {caller}/own.yaml --dir {caller}/out/runs" in calls(caller)
    (caller.parent / "calls").unlink()
    assert run("../checkout/benchmarks/method_gpu.sh", "--out", "out", "--config", "own.yaml", "--dry-run").returncode == 0
    assert f"compare {caller}/out/dry.yaml --dir {caller}/out/runs" in calls(caller)
    assert "seeds: 0-0" in (caller / "out" / "dry.yaml").read_text()
    wrong = run("../checkout/benchmarks/method_gpu.sh", "--out", "out", "--config", "none.yaml")
    assert wrong.returncode == 2 and "--config none.yaml: no such file" in wrong.stderr


def test_an_environment_is_found_where_the_caller_has_it(caller):
    (caller / "kept" / "bin").mkdir(parents=True)
    shutil.copy(caller.parent / "python", caller / "kept" / "bin" / "python")
    (caller / "kept" / "bin" / "activate").write_text('PATH="$folder/bin:$PATH"\n')
    result = run("-euc", '. ../checkout/tests/external/environment.sh; echo "$folder"; pwd', "run.sh", "kept")
    assert result.stdout.splitlines() == [str(caller / "kept"), str(caller.parent / "checkout")], result.stderr
    assert "sysconfig" in calls(caller)


def test_the_gpu_script_selects_words_that_tests_have():
    """An expression of pytest's -k that no test answers to selects nothing or everything, and says so nowhere."""
    parts = re.findall(r'^ *part [0-9]+ "([^"]+)" (?:\\\n)?(.+)', (ROOT / "benchmarks" / "gpu.sh").read_text(), re.M)
    command = [sys.executable, "-m", "pytest", "benchmarks", "--collect-only", "-q", "-p", "no:cacheprovider"]
    collected = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    assert len(parts) >= 4
    for expression, files in parts:
        own = [line for line in collected if line.split("::")[0] in files.split()]
        assert own
        for word in set(expression.split()) - {"and", "or", "not"}:
            assert any(word in line.partition("::")[2] for line in own), f"{word} of {expression!r}"


# --- what they write to -------------------------------------------------------------------------------------------------------------

WRITERS = {  # the module, and its words before the path
    "step_clocks": (step_clocks, ["none.yaml", "--arms", "grpo", "--out"]),
    "attribution_traces": (attribution_traces, ["model", "none.jsonl", "none.jsonl", "--out"]),
    "attribution_quality": (attribution_quality, ["none.yaml", "--out"]),
    "gradient_signal": (gradient_signal, ["none.yaml", "none", "--out"]),
    "accuracy": (accuracy, ["--out"]),
    "method": (method, ["none.json", "--figure"]),
    "variants": (variants, []),
}


@pytest.mark.parametrize("name", WRITERS)
def test_where_the_results_go_is_made_first(name, tmp_path, monkeypatch, capsys):
    """Before the first thing that they are asked for turns out to be missing; and what cannot be made is named before any work."""
    module, words = WRITERS[name]

    def no_work(worker: str) -> dict:
        raise FileNotFoundError(worker)

    monkeypatch.setattr(accuracy, "errors", no_work)

    def call(path: Path):
        monkeypatch.setattr(sys, "argv", [name, *words, str(path), *(["X:"] if module is variants else [])])
        with pytest.raises((SystemExit, OSError, ValueError)) as ended:
            module.main()
        return ended.value

    call(tmp_path / "a" / "b" / "out")
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").touch()
    error = call(tmp_path / "file" / "b" / "out")
    assert isinstance(error, SystemExit) and error.code == 2
    assert f"the folder {tmp_path / 'file' / 'b'}" in capsys.readouterr().err


def test_a_folder_is_no_file_to_write(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        accuracy.main(["--out", str(tmp_path)])
    assert f"{tmp_path} is a folder, wanted a file" in capsys.readouterr().err


def test_accuracy_writes_where_the_committed_file_lies(monkeypatch):
    written = []
    monkeypatch.setattr(accuracy, "errors", lambda worker: {"logits": {}, "linear": {}, "absent": {}})
    monkeypatch.setattr(accuracy, "spawn", accuracy.errors)
    monkeypatch.setattr(Path, "write_text", lambda self, *_, **__: written.append(self))
    assert accuracy.main([]) == 0
    assert written == [ROOT / "benchmarks" / "results" / "cpu" / "accuracy.json"] and written[0].exists()
