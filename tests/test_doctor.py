"""`acpo doctor`: it says what runs, and a kernel that computes something else is found."""

from __future__ import annotations

import json
import types

import pytest
import torch

import acpo_kernels
from acpo import environment, selfcheck
from acpo.cli import main


@pytest.fixture(scope="module")
def checks() -> list[selfcheck.Check]:
    return selfcheck.checks(seconds=600.0)  # a busy machine


def test_every_operation_is_checked_and_is_right(checks):
    assert {c.operation for c in checks if "cpu" in c.device} == {*environment.OPERATIONS, "Segmenter"}
    bad = [c for c in checks if not c.ok]
    assert not bad, bad
    assert all(c.budget > 0 for c in checks if c.operation != "Segmenter")
    assert {"dlogits", "dhidden", "dweight", "dvalues", "dlogp"} <= {c.result for c in checks}


def test_broken_kernels_are_found(monkeypatch, capsys):
    right = acpo_kernels.segment_reduce
    monkeypatch.setattr(acpo_kernels, "segment_reduce", lambda *a, **k: right(*a, **k) * (1 + 1e-6))
    monkeypatch.setattr(acpo_kernels, "segment_credit", lambda *a, **k: 1 / 0)
    monkeypatch.setattr(acpo_kernels, "logprob_entropy", lambda x, ids: [x.sum(-1) * torch.nan, x.sum(-1)])
    monkeypatch.setattr(selfcheck, "SECONDS", {"cpu": 600.0, "cuda": 600.0})
    assert main(["doctor", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    failed = {c["operation"]: c for c in found["checks"] if c["ok"] is False}
    assert set(failed) == {"segment_reduce", "segment_credit", "logprob_entropy"} and not found["ok"]
    assert failed["logprob_entropy"]["error"] is None, "not a number is no success"
    assert failed["segment_credit"]["note"].startswith("ZeroDivisionError") and failed["segment_reduce"]["error"] > failed["segment_reduce"]["budget"]


def test_time_is_kept(monkeypatch):
    left = [c for c in selfcheck.checks(seconds=0.0) if c.operation != "Segmenter"]
    assert left and all(c.ok is None and "no time left" in c.note for c in left)


def test_in_words(monkeypatch, capsys, checks):
    monkeypatch.setattr(selfcheck, "checks", lambda: checks)
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    for word in ("torch", "linear_policy_loss", "reasoning-gym", "self-check passed", *environment.cpu_kernels()):
        assert word in shown


def test_why_a_kernel_runs(monkeypatch):
    from acpo_kernels import _cpu

    monkeypatch.setenv("ACPO_CPU_ISA", "avx2")
    assert environment.cpu_kernels()[1] == "ACPO_CPU_ISA=avx2 asks for it" or not _cpu.available
    if _cpu.available:
        monkeypatch.setattr(_cpu, "_C", types.SimpleNamespace(cpu_isa=lambda: "amx"))
        found = {k.operation: k.implementation for k in environment.kernels()}
        assert found["linear_policy_loss"].endswith("C++, AMX for bfloat16, else AVX-512") and found["policy_loss"].endswith("C++, AVX-512")
    monkeypatch.setattr(_cpu, "available", False)
    name, why = environment.cpu_kernels()
    assert name == "PyTorch formulas" and "ACPO_NO_EXT" in why
    assert next(k for k in environment.kernels() if k.operation == "Segmenter").implementation == "missing"
