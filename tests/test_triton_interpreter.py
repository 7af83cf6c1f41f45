"""The Triton kernels in the interpreter: TRITON_INTERPRET=1 must be set before a kernel is decorated, so they run in a process
of their own, on the same tests as every other implementation."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

# float64 runs on PyTorch there as on CUDA, so of the dtypes float32 (dtype1) and bfloat16 (dtype2) are taken. Left out are registration,
# and many programs or wide rows, which the interpreter takes one after the other. Without -k a file runs whole:
# TRITON_INTERPRET=1 pytest tests/test_segment_credit.py
SELECTED = {
    "test_chunks.py": "test",
    "test_segment_reduce.py": "(against_the_reference and dtype2) or by_hand or nan_in_masked or maxima_of",
    "test_segment_credit.py": "(against_the_reference and dtype1) or bitwise or conserve or fewer_than or not_finite or tiny_scale or empty_calls",
    "test_policy_loss.py": "against_the_reference and dtype2",
    "test_policy_loss_edges.py": "(masked_tokens and None) or (empty_calls and None) or border or (impossible and dtype0)",
    "test_hindsight_information.py": "(against_the_reference and -33- and (dtype1 or dtype2)) or ((impossible or underflows or broken or margins)"
    " and None) or not_negative or change_places",
}
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def interpreted(files: list[str], selection: str) -> None:
    here = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-q", "-k", selection, *(str(here / file) for file in files), "-p", "no:cacheprovider"]
    result = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}, cwd=here.parent, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    assert " passed" in result.stdout


@pytest.mark.skipif(INTERPRETED, reason="this is the process that it starts")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
class TestKernelsInTheInterpreter:
    def test_logprob_entropy(self):
        interpreted(["test_logprob_entropy.py", "test_logprob_entropy_edges.py", "test_logprob_entropy_backward.py"], "interpreter")

    def test_hindsight_information(self):
        interpreted(["interpreter_hindsight.py", "interpreter_itself.py"], "test")

    def test_operations_from_hidden_states(self):
        interpreted(["interpreter_linear.py", "interpreter_linear_hindsight.py", "interpreter_linear_policy_loss.py"], "interpreter")

    def test_operations_behind_the_dispatcher(self):
        interpreted(list(SELECTED), " or ".join(f"({file} and ({names}))" for file, names in SELECTED.items()))
