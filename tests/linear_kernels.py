"""Hidden states and a head for the Triton kernels in the interpreter (interpreter_linear*.py)."""

from __future__ import annotations

import pytest
import torch

from acpo_kernels._triton import linear_gradients

# The interpreter multiplies float32 by float32; a product of bfloat16 or float16 numbers is exact in that.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMES = ("logp", "entropy", "gradient of hidden", "gradient of weight", "gradient of bias")


def inputs(rows, vocab, width, dtype=torch.float32, scale=1.0):
    hidden, weight = (torch.randn(rows, width) * scale).to(dtype), torch.randn(vocab, width).to(dtype)
    return hidden, weight, torch.randint(vocab, (rows,)), torch.randn(vocab).to(dtype)


@pytest.fixture(name="narrow")
def narrow_slices(monkeypatch):
    """Slices of 512 columns: a small vocabulary takes several."""
    monkeypatch.setattr(linear_gradients, "SLICE", 512)
