"""docs/metrics.md names what runs write, and nothing that none writes."""

from __future__ import annotations

import re
from fnmatch import fnmatch
from pathlib import Path

import pyarrow.parquet
import pytest
from loop import MANY, records, train

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "metrics.md").read_text(encoding="utf-8")
ELSEWHERE = {"memory_gpu_gb"}  # on a GPU alone


def named(part: str) -> set[str]:
    """The names in the first column of the page's tables behind that heading."""
    rows = re.findall(r"^\| (`.*?) \|", PAGE.partition(part)[2].partition("\n## ")[0], flags=re.M)
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row)}


@pytest.fixture(scope="module")
def every_source(finished_run, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    sources = "attribution.source=hindsight,probe,head,entropy,tree"
    assert train(folder, *MANY, sources, "loss.kl_weight=0.1", "problems.distractors=1", "warmup.steps=50", "trainer.steps=2") == 0
    return folder / "run"


def test_metrics(finished_run, every_source):
    written = {key for run in (finished_run, every_source) for record in records(run) for key in record}
    names = named("# What a run writes down")
    assert {key for key in written if not any(fnmatch(key, name) for name in names)} == set()
    assert {name for name in names if not any(fnmatch(key, name) for key in written)} == ELSEWHERE


def test_columns(finished_run):
    file = max((finished_run / "rollouts").glob("step-*.parquet"))
    assert set(pyarrow.parquet.read_schema(file).names) == named("## Rollouts")
