"""The verl adapter where verl is not installed: what it does on tensors, settings and files; tests/external/verl has verl itself."""

from __future__ import annotations

import json
import logging
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from acpo.integrations import verl as ours
from acpo.policy import byte_tokenizer

TOKENIZER = byte_tokenizer()
TEXTS = ("2+3=5.\nThe answer is 5", "2+3=5.\nThe answer is 6", "2+3=6.\nSo 6.", "5")
OUTCOME = torch.tensor([1.0, 0, 0, 1])
SETTINGS = {"segmenter": {"min_tokens": 2, "max_tokens": 64, "target_tokens": 8}, "attribution.reliability": 0.8}


def batch() -> dict:
    rows = [torch.tensor(TOKENIZER(t)["input_ids"]) for t in TEXTS]
    lengths = torch.tensor([len(r) for r in rows])
    responses = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = (torch.arange(responses.shape[1]) < lengths.unsqueeze(1)).long()
    own = torch.tensor([1.0, -1, -1, 1]).unsqueeze(1) * mask
    return {
        "responses": responses, "lengths": lengths, "response_mask": mask, "advantages": own, "outcome": OUTCOME, "uid": ["a"] * 4, "entropy": None,
        "step": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("keys", "whole"),
    [
        (["a_0_0", "a_1_0", "a_2_0", "a_3_0"], True),
        (["a_3_0", "a_0_0", "a_2_0", "a_1_0"], True),
        (["a_0_0", "a_0_1", "a_1_0", "a_1_1"], False),
        (["a_0_0", "a_1_0", "a_2_0", "a_2_1"], False),
    ],
)
def test_outputs_of_one_session_are_no_rollouts_of_a_prompt(keys, whole):
    """verl's keys are uid_session_index: four outputs of two sessions are not a group of four."""
    credit, tensors = ours.make_credit(TOKENIZER, SETTINGS, 4, 10), batch()
    advantages, _, metrics = ours.assign(credit, **tensors, sessions=ours.sessions_of(keys))
    assert torch.equal(advantages, tensors["advantages"]) != whole and metrics["acpo/left_out"] == 1.0 - whole


def test_sessions_of_keys():
    assert ours.sessions_of(["a_b_0_1", "a_b_10_0"]) == ["a_b_0", "a_b_10"]


@pytest.mark.parametrize(("mode", "form", "refused"), [("geo_mean", "additive", True), ("geo_mean", "none", False), ("gspo", "additive", False),
                                                       ("vanilla", "additive", False), (None, "additive", False)])  # fmt: skip
def test_a_loss_of_one_advantage_a_sequence_is_refused_but_without_credit(mode, form, refused):
    credit = ours.make_credit(TOKENIZER, {**SETTINGS, "credit.form": form}, 4, 10)
    if refused:
        with pytest.raises(ValueError, match=r"policy_loss\.loss_mode=geo_mean averages the advantages of a sequence"):
            ours.check_loss(credit, mode)
    else:
        ours.check_loss(credit, mode)


def test_the_state_lies_in_the_folder_before_verl_declares_it_complete(tmp_path, caplog):
    folder = tmp_path / "checkpoints/global_step_3"
    credit = ours.make_credit(TOKENIZER, SETTINGS, 4, 10)
    ours.assign(credit, **batch())
    ours.put_state(credit, folder)
    assert json.loads((folder / ours.STATE).read_text(encoding="utf-8")) == credit.state()
    again = ours.make_credit(TOKENIZER, SETTINGS, 4, 10)
    with caplog.at_level(logging.WARNING):
        ours.load_state(again, folder)
        assert again.state() == credit.state() and not caplog.records
        ours.load_state(ours.make_credit(TOKENIZER, SETTINGS, 4, 10), tmp_path)
    assert f"{tmp_path} has no acpo_state.json: the calibrators and controllers start anew" in caplog.text


@pytest.fixture
def trainer(monkeypatch, tmp_path):
    """ACPOTrainer over a stand-in for verl's trainer, which notes whether the state lay there when it wrote its checkpoint."""

    class PPOTrainerSync:
        def on_init_end(self):
            pass

        def _save_checkpoint(self):
            self.there = (tmp_path / f"global_step_{self.global_steps}" / ours.STATE).exists()

        def _load_checkpoint(self):
            self.global_steps = 4

    values = {
        "transfer_queue": {}, "verl": {"__version__": "0.9.1"}, "tensordict": {"TensorDict": dict},
        "omegaconf": {"OmegaConf": SimpleNamespace(select=lambda config, key: config.chosen.get(key)), "open_dict": None},
        "verl.trainer.distillation": {"is_distillation_enabled": lambda config: False},
        "verl.trainer.ppo.v1": {"PPOTrainerSync": PPOTrainerSync, "register_trainer": lambda name: lambda cls: cls},
        "verl.utils.config": {"omega_conf_to_dataclass": None}, "verl.workers.utils.padding": {"response_to_nested": None},
    }  # fmt: skip
    for name in (*values, "verl.trainer", "verl.trainer.ppo", "verl.utils", "verl.workers", "verl.workers.utils"):
        module = ModuleType(name)
        module.__dict__.update(values.get(name, {}), __path__=[])
        monkeypatch.setitem(sys.modules, name, module)
    own = object.__new__(ours.register())
    own._acpo, own.global_steps = ours.make_credit(TOKENIZER, SETTINGS, 4, 10), 3
    folders = SimpleNamespace(resume_mode="auto", default_local_dir=str(tmp_path))
    own.config = SimpleNamespace(trainer=folders, chosen={})
    return own


@pytest.mark.parametrize(("setting", "value"), [("sampler", "thompson"), ("dynamic_sampling", True)])
def test_a_curriculum_is_refused_where_the_loop_draws_the_prompts(setting, value):
    with pytest.raises(ValueError, match=rf"algorithm\.acpo: curriculum\.{setting} must be left out, got {value!r}: the loop draws"):
        ours.make_credit(TOKENIZER, {**SETTINGS, f"curriculum.{setting}": value}, 4, 10)
    with pytest.raises(TypeError, match=r"algorithm\.acpo must be a mapping of the method's settings, got str"):
        ours.make_credit(TOKENIZER, "tree", 4, 10)


def test_the_trainer_writes_its_state_first(trainer, caplog):
    trainer._save_checkpoint()
    assert trainer.there
    with caplog.at_level(logging.WARNING):
        trainer._load_checkpoint()
    assert "global_step_4 has no acpo_state.json" in caplog.text


def test_the_trainer_refuses_geo_mean(trainer):
    trainer.config.chosen["actor_rollout_ref.actor.policy_loss.loss_mode"] = "geo_mean"
    with pytest.raises(ValueError, match=r"loss_mode=geo_mean"):
        trainer.on_init_end()
