"""Adapters: training changes them alone, checkpoints hold them alone, and what leaves the run is one model again."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch
from loop import records, steps, train, trainer_of, without_times
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from acpo import memory, state
from acpo.checkpoint import latest
from acpo.config import ConfigError
from acpo.policy import Policy

pytest.importorskip("peft", reason="needs the extra `peft`")


@pytest.fixture(scope="module")
def base(finished_run) -> Path:
    """A trained policy as a folder."""
    return finished_run / "policy"


def lora(base: Path, *overrides: str) -> list[str]:
    return [f"policy.path={base}", "policy.from_config=", "policy.lora_rank=4", "optimizer.learning_rate=0.003", *overrides]


def is_adapter(name: str) -> bool:
    return ".lora_A." in name or ".lora_B." in name


def scores(policy: Policy) -> torch.Tensor:
    response = [torch.tensor([3, 4, 5, 6, 7, 8])]
    with torch.no_grad():
        return policy.score(policy.hidden([[2, 3, 4]], response), torch.cat(response), 1.0).logp


class HeadGradients(TorchDispatchMode):
    """Elements of the head's gradient that each call of the loss made."""

    def __init__(self):
        super().__init__()
        self.found: list[int] = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        if operation.name() == "acpo_kernels::linear_policy_loss":
            self.found.append(result[5].numel())
        return result


def test_a_step_changes_the_adapters_alone_and_the_head_has_no_gradient(tmp_path, base):
    plain, own = trainer_of(tmp_path / "plain", *lora(base, "policy.lora_rank=0")), trainer_of(tmp_path / "own", *lora(base))
    assert torch.equal(scores(own.policy), scores(plain.policy)), "an adapter that has learned nothing says nothing"
    before = {name: value.clone() for name, value in own.policy.named_parameters()}
    assert set(own.policy.trained()) == {name for name in before if is_adapter(name)} and len(own.policy.trained()) == 2 * 7 * 2
    with HeadGradients() as head:
        losses = steps(own, 2)
    assert head.found and set(head.found) == {0}, "a frozen head costs two products a row forward and two for the hidden states: 4 N H V"
    assert losses[1]["grad_norm"] > 0
    for name, value in own.policy.named_parameters():
        assert torch.equal(value, before[name]) != is_adapter(name), name
    assert not torch.equal(scores(own.policy), scores(plain.policy))


def test_what_leaves_the_run_is_one_model(tmp_path, base):
    own = trainer_of(tmp_path, *lora(base))
    steps(own, 2)
    state.export(own)
    whole, found = AutoModelForCausalLM.from_pretrained(base), AutoModelForCausalLM.from_pretrained(own.run.directory / "policy")
    assert dict(whole.named_parameters()).keys() == dict(found.named_parameters()).keys() == dict(own.policy.weights()).keys()
    for name, value in own.policy.weights():
        assert torch.equal(value, found.get_parameter(name)), name
        assert torch.equal(value, whole.get_parameter(name)) == ("proj" not in name or name.endswith("bias")), name
    torch.testing.assert_close(scores(Policy(found, 0)), scores(own.policy), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_checkpoints_hold_adapters_and_resume_to_the_same_numbers(tmp_path, base):
    settings = lora(base, "warmup.steps=0", "trainer.steps=4", "stages.switch_share=0.4", "stages.switch_success=1")
    assert train(tmp_path / "whole", *settings) == 0
    run = tmp_path / "whole" / "run"
    tensors, _ = latest(run / "checkpoints")
    assert all(map(is_adapter, tensors["policy"])) and tensors["reference"].keys() == tensors["policy"].keys()
    before = {name: (run / "checkpoints" / "step-4" / name).read_bytes() for name in ("policy.safetensors", "reference.safetensors")}
    wanted = [without_times(r) for r in records(run)]
    shutil.rmtree(run / "checkpoints" / "step-4")
    assert train(tmp_path / "whole", *settings) == 0
    assert [without_times(r) for r in records(run)] == wanted
    assert before == {name: (run / "checkpoints" / "step-4" / name).read_bytes() for name in before}


def test_the_reference_shares_what_is_not_trained(tmp_path, base):
    own = trainer_of(tmp_path, *lora(base))
    reference = dict(own.policy.frozen_copy().named_parameters())
    for name, value in own.policy.named_parameters():
        assert (reference[name].data_ptr() == value.data_ptr()) != is_adapter(name) and not (is_adapter(name) and reference[name].requires_grad)


def test_the_estimate_counts_the_reference_as_it_is_held(tmp_path, base):
    own = trainer_of(tmp_path, *lora(base))
    term = next(t for t in memory.estimate(own.config, own.policy, 10, 4) if t.name == "reference")
    assert own.config.loss.kl_weight > 0
    assert term.bytes == sum(4 * p.numel() for name, p in own.policy.frozen_copy().named_parameters() if is_adapter(name))


def test_what_cannot_be(tmp_path, base, monkeypatch):
    for override, message in (
        ("policy.lora_targets=q_proj,lm_head", "policy.lora_targets must leave the head 'lm_head' out"),
        ("policy.lora_targets=q_proj,embed_tokens", "policy.lora_targets must leave 'model.embed_tokens' out: it is tied to the head"),
        ("policy.lora_targets=model.embed_tokens", "policy.lora_targets must leave 'model.embed_tokens' out: it is tied to the head"),
        ("policy.lora_targets=nothing", "policy.lora_targets: .*nothing"),
    ):
        with pytest.raises(ConfigError, match=message):
            trainer_of(tmp_path, *lora(base, override))
    with pytest.raises(ConfigError, match=r"policy\.lora_rank needs policy\.path"):
        trainer_of(tmp_path, "policy.lora_rank=2")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"policy\.lora_rank = 4 needs peft: pip install"):
        trainer_of(tmp_path, *lora(base))
