"""A pytest plugin (-p resume): what has passed for the same code, as the file ACPO_PASSED lists it, is not run again, so that a run of hours may be
broken off and go on. The controller of pytest-xdist writes, its workers read."""

from __future__ import annotations

import os
from pathlib import Path

PASSED = Path(os.environ["ACPO_PASSED"])


def pytest_collection_modifyitems(config, items):
    before = set(PASSED.read_text(encoding="utf-8").splitlines()) if PASSED.exists() else set()
    done = [item for item in items if item.nodeid in before]
    if done:
        config.hook.pytest_deselected(items=done)
        items[:] = [item for item in items if item.nodeid not in before]


def pytest_runtest_logreport(report):
    if "PYTEST_XDIST_WORKER" not in os.environ and report.when == "call" and report.passed:
        with open(PASSED, "a", encoding="utf-8") as file:
            file.write(report.nodeid + "\n")
