"""docs/kernels.md: both sides of every "instead of this, write that" are executed and agree, in results and in gradients."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import torch

TEXT = (Path(__file__).resolve().parents[1] / "docs" / "kernels.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"<!-- (setup|instead|write|run)(?:: ([\w, ]+))?(?:; needs: ([\w, ]+))? -->\n```python\n(.*?)```", TEXT, flags=re.S)
COMPARED = ("logp", "entropy", "loss", "mean_logp")


def pairs():
    """(peer, its code, the leaf to differentiate, ours) for each `write` and the nearest `instead` of each peer that it names."""
    latest, out = {}, []
    for kind, about, needs, code in BLOCKS:
        if kind == "instead":
            latest[about] = code
        elif kind == "write":
            out += [pytest.param(peer, latest[peer], about, code, id=f"{len(out)}-{peer}") for peer in needs.split(", ")]
    return out


def executed(code: str) -> dict:
    names: dict = {}
    exec(next(c for kind, _, _, c in BLOCKS if kind == "setup"), names)
    exec(code, names)
    return names


def gradient(names: dict, leaf: str) -> torch.Tensor:
    total = sum((names[n] * torch.linspace(0.5, 1.5, names[n].numel()).view_as(names[n])).sum() for n in COMPARED if n in names)
    return torch.autograd.grad(total, names[leaf])[0]


@pytest.mark.parametrize(("peer", "theirs", "leaf", "ours"), pairs())
def test_instead_of_this_write_that(peer, theirs, leaf, ours):
    if peer != "own" and importlib.util.find_spec(peer) is None:
        pytest.skip(f"{peer} is not installed: pip install -c constraints.txt -e '.[bench]'")
    torch.use_deterministic_algorithms(False)  # the peers' own operations
    with torch.compiler.set_stance("force_eager"):  # what a peer compiles takes a minute, and computes the same
        before, after = executed(theirs), executed(ours)
    shared = [n for n in COMPARED if n in before]
    assert shared and shared == [n for n in COMPARED if n in after]
    for name in shared:
        torch.testing.assert_close(after[name], before[name], rtol=2e-5, atol=2e-5)
    if leaf != "none":
        torch.testing.assert_close(gradient(after, leaf), gradient(before, leaf), rtol=1e-4, atol=2e-5)


def test_the_rest_runs_in_its_order():
    code = "\n".join(c for kind, _, needs, c in BLOCKS if kind == "run" or (kind == "write" and "own" in needs))
    assert executed(code)["padded"].shape == (3, 12)


def test_no_block_is_forgotten():
    assert len(BLOCKS) == TEXT.count("```python") and {kind for kind, *_ in BLOCKS} == {"setup", "instead", "write", "run"}
