"""Collected by run.sh alone, which makes the environment and the model."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
collect_ignore_glob = [] if os.environ.get("ACPO_EXTERNAL") == "language_model" else ["*.py"]


@pytest.fixture(scope="session")
def folder() -> Path:
    return Path(os.environ["ACPO_LANGUAGE_MODEL"])
