"""The Triton kernels in the interpreter: TRITON_INTERPRET=1 must be set before a kernel is decorated, so they run in a process
of their own, on the same tests as every other implementation."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.mark.skipif(INTERPRETED, reason="this is the process that it starts")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("file", ["test_logprob_entropy.py", "interpreter_linear.py"])
def test_kernels_in_the_interpreter(file):
    here = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-q", "-k", "interpreter", str(here / file), "-p", "no:cacheprovider"]
    result = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}, cwd=here.parent, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    assert " passed" in result.stdout
