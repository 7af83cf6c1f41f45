"""Collected by run.sh alone, which makes the environment: the base test set has neither peft nor a launcher's processes."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

collect_ignore_glob = [] if os.environ.get("ACPO_EXTERNAL") == "trl" else ["*.py"]


import pytest  # noqa: E402


@pytest.fixture(autouse=True)
def one_thread(deterministic):
    """Threads cost a model of this size more than they save."""
    import torch

    torch.set_num_threads(1)
