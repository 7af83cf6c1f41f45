"""Collected by run.sh alone, which makes the environment."""

import os

import pytest

collect_ignore_glob = [] if os.environ.get("ACPO_EXTERNAL") == "browser" else ["*.py"]


@pytest.fixture(scope="session")
def browser():
    pytest.importorskip("playwright", reason="playwright is not installed: tests/external/browser/run.sh makes an environment with it")
    from chromium import PATH, chromium

    if PATH is None:
        pytest.skip("there is no Chromium: apt-get install chromium, or name one in ACPO_CHROMIUM")
    with chromium() as found:
        yield found
