"""Collected by run.sh alone, which makes the environment: verl pins an older transformers than the base test set."""

import os

collect_ignore_glob = [] if os.environ.get("ACPO_EXTERNAL") == "verl" else ["*.py"]
