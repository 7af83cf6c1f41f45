"""Scripts that measure for hours: paths are the caller's, what they write to is there before they begin, and what they select exists."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks import accuracy, attribution_quality, attribution_traces, gradient_signal, method, step_clocks, variants

ROOT = Path(__file__).parents[1]


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
