"""verl's registration, the trainer's advantages over a stand-in for its queue, and the loss; Ray is never started."""

from __future__ import annotations

import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
import torch
import verl
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from tensordict import TensorDict
from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY
from verl.trainer.ppo.v1 import get_trainer_cls
from verl.workers.config import ActorConfig, OptimizerConfig, PolicyLossConfig

from acpo.integrations import verl as ours
from acpo.integrations.functional import StepCredit
from acpo.methods import METHODS
from acpo.policy import byte_tokenizer

TOKENIZER = byte_tokenizer()
TEXTS = ("2+3=5.\nThe answer is 5", "2+3=5.\nThe answer is 6", "2+3=6.\nSo 6.", "5", "1.\nThe answer is 1", "1.\nThe answer is 2", "1.\n3.", "4")
OUTCOME = torch.tensor([1.0, 0, 0, 1, 1, 0, 0, 0])
UID = ["a"] * 4 + ["b"] * 4
SETTINGS = {"segmenter": {"min_tokens": 2, "max_tokens": 64, "target_tokens": 8}, "attribution.reliability": 0.8}


def batch() -> dict[str, torch.Tensor]:
    rows = [torch.tensor(TOKENIZER(t)["input_ids"]) for t in TEXTS]
    lengths = torch.tensor([len(r) for r in rows])
    responses = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = (torch.arange(responses.shape[1]) < lengths.unsqueeze(1)).long()
    own = torch.tensor([1.0, -1, -1, 1, 1.5, -0.5, -0.5, -0.5])
    return {"responses": responses, "lengths": lengths, "response_mask": mask, "advantages": own.unsqueeze(1) * mask}


def test_the_plug_in_registers_the_trainer_without_starting_ray():
    cls = get_trainer_cls("acpo_sync")
    assert cls.__name__ == "ACPOTrainer" and not ray.is_initialized()
    ours.check_version(verl.__version__)
    with pytest.raises(ImportError, match=r"was tested with verl 0\.9, and this is 0\.10\.1"):
        ours.check_version("0.10.1")


def test_the_credit_is_that_of_the_padded_tensors():
    credit = ours.make_credit(TOKENIZER, SETTINGS, 4, 10)
    tensors = batch()
    advantages, weight, metrics = ours.assign(credit, **tensors, outcome=OUTCOME, uid=UID, entropy=None, step=1)
    plain = StepCredit(TOKENIZER, group_size=4, settings={**SETTINGS, "attribution.source": "tree"})
    wanted = plain(tensors["responses"], tensors["response_mask"], OUTCOME, advantages=tensors["advantages"][:, 0])
    assert torch.equal(advantages, wanted.advantages) and weight is None and metrics["acpo/left_out"] == 0
    assert not torch.equal(advantages, tensors["advantages"])


def test_padding_rows_and_broken_groups_keep_verls_advantages():
    credit, tensors = ours.make_credit(TOKENIZER, SETTINGS, 4, 10), batch()
    left_out = torch.tensor([True] + [False] * 7)
    advantages, _, metrics = ours.assign(credit, **tensors, outcome=OUTCOME, uid=UID, entropy=None, step=1, left_out=left_out)
    assert torch.equal(advantages[:4], tensors["advantages"][:4]) and metrics["acpo/left_out"] == 0.5


def test_a_rollout_that_was_cut_off_keeps_verls_advantage():
    """As its group counts: here every group alike."""
    settings = {**SETTINGS, "credit.difficulty": 0.0}
    eos, (responses, lengths) = TOKENIZER.eos_token_id, (batch()["responses"], batch()["lengths"])
    limit, cut = int(lengths[1]), torch.arange(8) == 1
    assert int(lengths.max()) == limit and torch.equal(ours.not_cut_off(responses, lengths, limit + 1, eos), torch.ones(8, dtype=torch.bool))
    assert torch.equal(ours.not_cut_off(responses, lengths, limit, eos), lengths < limit)
    responses[0, lengths[0] - 1] = eos
    finished = ours.not_cut_off(responses, lengths, limit, eos)
    assert torch.equal(finished, ~cut), "the first ends at the limit by itself"
    credited, kept = (
        ours.assign(ours.make_credit(TOKENIZER, settings, 4, 10), **batch(), outcome=OUTCOME, uid=UID, entropy=None, step=1, finished=given)[0]
        for given in (None, finished)
    )
    assert torch.equal(kept[~cut], credited[~cut]) and torch.equal(kept[1], batch()["advantages"][1]) and not torch.equal(kept[1], credited[1])


def test_what_cannot_be():
    tensors = batch()
    tensors["advantages"] = tensors["advantages"].clone()
    tensors["advantages"][0, 1] = 9.0
    with pytest.raises(ValueError, match=r"algorithm\.adv_estimator must give one advantage a rollout"):
        ours.assign(ours.make_credit(TOKENIZER, SETTINGS, 4, 10), **tensors, outcome=OUTCOME, uid=UID, entropy=None, step=1)
    for settings, message in (({"attribution.source": "hindsight"}, "'hindsight' needs a forward"), ({"stages.two": True}, r"stages\.two changes"),
                              ({"credit.from": 1}, r"algorithm\.acpo: unknown setting")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            ours.make_credit(TOKENIZER, settings, 4, 10)


def verls_config(*overrides: str):
    with initialize_config_dir(str(Path(verl.__file__).parent / "trainer/config"), version_base=None):
        return compose("ppo_trainer", list(overrides))


def test_the_trainer_is_verls_synchronous_one():
    """verl asks for its modes by name: under another its buffer throws away a prompt with a failed session and generates another one, and each
    checkpoint holds the queue."""
    from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer

    own = get_trainer_cls("acpo_sync")(verls_config("trainer.v1.trainer_mode=acpo_sync", "actor_rollout_ref.rollout.n=4"))
    plain = get_trainer_cls("sync")(verls_config("trainer.v1.trainer_mode=sync", "actor_rollout_ref.rollout.n=4"))
    assert type(own.replay_buffer) is type(plain.replay_buffer) is ReplayBuffer
    assert own.trainer_mode == plain.trainer_mode == "sync" and own.parameter_sync_step == plain.parameter_sync_step


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["actor_rollout_ref.actor.calculate_entropy=False"], r"actor\.calculate_entropy must be True"),
        (["distillation.enabled=True"], r"distillation\.enabled must be False with algorithm\.acpo\.entropy\.controller"),
        (["algorithm.rollout_correction.bypass_mode=True"], r"bypass_mode must be False with algorithm\.acpo\.entropy\.controller"),
        (["actor_rollout_ref.actor.policy_loss.loss_mode=geo_mean"], r"loss_mode=geo_mean averages the advantages of a sequence"),
    ],
)
def test_settings_of_verl_that_cannot_be_with_credit_or_the_bonus(monkeypatch, model, overrides, message):
    cls = get_trainer_cls("acpo_sync")
    trainer = object.__new__(cls)
    trainer.tokenizer, trainer.total_training_steps = TOKENIZER, 10
    trainer.config = verls_config(
        "+algorithm.acpo.entropy.controller=constant", f"actor_rollout_ref.model.path={model}", "actor_rollout_ref.rollout.n=4",
        "actor_rollout_ref.actor.calculate_entropy=True", *overrides,
    )  # fmt: skip
    monkeypatch.setattr(cls.__mro__[1], "on_init_end", lambda self: None)
    with pytest.raises(ValueError, match=message):
        trainer.on_init_end()


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """A folder with a model whose vocabulary is padded beyond its tokenizer's, as most are."""
    from transformers import Qwen2Config

    folder = tmp_path_factory.mktemp("model")
    TOKENIZER.save_pretrained(folder)
    shape = {"vocab_size": len(TOKENIZER) + 6, "hidden_size": 8, "num_attention_heads": 1, "num_key_value_heads": 1}
    Qwen2Config(architectures=["Qwen2ForCausalLM"], **shape).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("bypass", [False, True])
def test_the_trainer_reads_and_writes_the_queue(monkeypatch, model, bypass):
    """An id of the model's that the tokenizer does not know among the responses; with bypass_mode no entropy in the queue."""
    import transfer_queue as tq

    nested = lambda rows: torch.nested.as_nested_tensor(rows, layout=torch.jagged)  # noqa: E731
    tensors = batch()
    rows = [tensors["responses"][b, :n] for b, n in enumerate(tensors["lengths"].tolist())]
    rows[3][0] = len(TOKENIZER)
    scores = [torch.cat([torch.zeros(len(r) - 1), OUTCOME[b : b + 1]]) for b, r in enumerate(rows)]
    store = {
        "responses": nested(rows), "response_mask": nested([torch.ones_like(r) for r in rows]), "rm_scores": nested(scores),
        "old_log_probs": nested([torch.zeros(len(r)) for r in rows]),
    }  # fmt: skip
    if not bypass:
        store["entropy"] = nested([torch.full((len(r),), 0.5) for r in rows])

    def get(keys, partition_id, select_fields):
        found = TensorDict({name: store[name] for name in select_fields if name in store}, batch_size=8)
        if "uid" in select_fields:
            from tensordict import NonTensorStack

            found["uid"] = NonTensorStack(*UID)
        return found

    monkeypatch.setattr(tq, "kv_batch_get", get)
    monkeypatch.setattr(tq, "kv_batch_put", lambda keys, partition_id, fields: store.update(dict(fields.items())) or meta)
    cls = get_trainer_cls("acpo_sync")
    trainer = object.__new__(cls)
    trainer.tokenizer, trainer.total_training_steps, trainer.global_steps = TOKENIZER, 10, 1
    trainer.config = verls_config(
        "algorithm.adv_estimator=grpo", f"algorithm.rollout_correction.bypass_mode={bypass}", "actor_rollout_ref.rollout.n=4",
        "data.max_response_length=64", f"actor_rollout_ref.model.path={model}", "actor_rollout_ref.actor.calculate_entropy=True",
        "+algorithm.acpo.attribution.reliability=0.8", f"+algorithm.acpo.entropy.controller={'none' if bypass else 'constant'}",
        *(f"+algorithm.acpo.segmenter.{name}={value}" for name, value in SETTINGS["segmenter"].items()),
    )  # fmt: skip

    class Meta:
        keys = [f"{UID[b]}_{b}_0" for b in range(8)]  # noqa: RUF012
        partition_id, tags = "train", [{}] * 8

        def __len__(self):
            return 8

    meta, metrics = Meta(), {}
    cls._compute_advantage(trainer, meta, metrics)
    advantages = store["advantages"].to_padded_tensor(0.0)
    assert advantages.shape == tensors["responses"].shape and metrics["acpo/segments"] > 1
    assert advantages[1][: tensors["lengths"][1]].unique().numel() > 1
    if not bypass:
        weights = store[ours.WEIGHT].to_padded_tensor(0.0)
        assert weights.shape == advantages.shape and weights.sum() > 0


def test_the_loss_takes_the_bonus_token_by_token():
    lengths, prompt = [3, 2], 2
    generator = torch.Generator().manual_seed(0)
    nested = lambda rows: torch.nested.as_nested_tensor(rows, layout=torch.jagged)  # noqa: E731
    total = sum(n + prompt for n in lengths)
    entropy = torch.rand(total, generator=generator, requires_grad=True)
    logp = -torch.rand(total, generator=generator)
    weight = [torch.tensor([0.1, 0.0, 0.3]), torch.tensor([0.2, 0.4])]
    fields = {
        "prompts": nested([torch.ones(prompt, dtype=torch.long)] * 2), "responses": nested([torch.ones(n, dtype=torch.long) for n in lengths]),
        "response_mask": nested([torch.ones(n, dtype=torch.long) for n in lengths]), "old_log_probs": nested([torch.zeros(n) for n in lengths]),
        "advantages": nested([torch.ones(n) for n in lengths]), ours.WEIGHT: nested(weight),
    }  # fmt: skip
    from verl.utils import tensordict_utils as tu

    config = ActorConfig(strategy="fsdp", rollout_n=2, ppo_micro_batch_size_per_gpu=1, optim=OptimizerConfig(lr=1e-6))

    def loss(names):
        data = TensorDict({name: fields[name] for name in names}, batch_size=2)
        tu.assign_non_tensor(data, dp_size=1, batch_num_tokens=5, global_batch_size=2)
        return ours.ppo_loss(config, {"log_probs": logp, "entropy": entropy}, data)

    plain, _ = loss([name for name in fields if name != ours.WEIGHT])
    with_bonus, metrics = loss(list(fields))
    rows = [entropy[1:4], entropy[6:8]]  # row t - 1 predicts token t
    wanted = sum((h * w).sum() for h, w in zip(rows, weight, strict=True)) / 5
    torch.testing.assert_close(plain - with_bonus, wanted)
    assert "actor/acpo_entropy_bonus" in metrics
    (gradient,) = torch.autograd.grad(plain - with_bonus, entropy)
    torch.testing.assert_close(gradient[1:4], weight[0] / 5)


@pytest.mark.parametrize("mode", POLICY_LOSS_REGISTRY)
def test_the_losses_in_which_credit_cancels_are_those_refused(mode):
    """Two steps of one rollout, with credit and with its mean: in a loss that is refused the gradient is the same."""
    actor = ActorConfig(
        strategy="fsdp", rollout_n=4, ppo_micro_batch_size_per_gpu=1, optim=OptimizerConfig(lr=1e-6),
        policy_loss=PolicyLossConfig(loss_mode=mode, dro_beta=0.1),
    )  # fmt: skip
    old, mask = torch.full((1, 4), -1.0), torch.ones(1, 4)

    def gradient(advantages):
        logp = old.clone().requires_grad_()
        loss, _ = POLICY_LOSS_REGISTRY[mode](
            old_log_prob=old, log_prob=logp, advantages=torch.tensor([advantages]), response_mask=mask, loss_agg_mode="token-mean", config=actor,
        )  # fmt: skip
        return torch.autograd.grad(loss, logp)[0]

    cancels = torch.allclose(gradient([1.5, 1.5, 0.5, 0.5]), gradient([1.0] * 4))
    try:
        ours.check_loss(ours.make_credit(TOKENIZER, SETTINGS, 4, 10), mode)
    except ValueError:
        assert cancels
    else:
        assert not cancels


@pytest.mark.parametrize("resume_mode", ["auto", "resume_path"])
def test_a_checkpoint_of_verls_holds_the_state_and_gives_it_back(monkeypatch, tmp_path, caplog, resume_mode):
    """verl's own writing and reading, over a stand-in for the workers; one that ends where they write leaves the state and nothing declared
    complete."""
    folder, done = tmp_path / "global_step_3", tmp_path / "latest_checkpointed_iteration.txt"

    def trainer():
        own = object.__new__(get_trainer_cls("acpo_sync"))
        own._acpo, own.global_steps, own.trainer_mode, own.use_critic = ours.make_credit(TOKENIZER, SETTINGS, 4, 10), 3, "sync", False
        own.config = verls_config(f"trainer.default_local_dir={tmp_path}", f"trainer.resume_mode={resume_mode}", f"trainer.resume_from_path={folder}")
        own.checkpoint_callback = SimpleNamespace(on_save=lambda **_: None)
        own.train_dataloader = SimpleNamespace(state_dict=dict, load_state_dict=lambda state: None)
        own.actor_rollout_wg = SimpleNamespace(save_checkpoint=lambda *_, **__: None, load_checkpoint=lambda **_: None)
        return own

    own = trainer()
    ours.assign(own.acpo, **batch(), outcome=OUTCOME, uid=UID, entropy=None, step=1)
    with monkeypatch.context() as broken:
        broken.setattr(own.actor_rollout_wg, "save_checkpoint", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            own._save_checkpoint()
    assert (folder / ours.STATE).exists() and not done.exists()
    own._save_checkpoint()
    again = trainer()
    assert done.read_text() == "3" and again.acpo.state() != own.acpo.state()
    again._load_checkpoint()
    assert again.global_steps == 3 and again.acpo.state() == own.acpo.state() and "anew" not in caplog.text
    (folder / ours.STATE).unlink()
    trainer()._load_checkpoint()
    assert f"{folder} has no {ours.STATE}: the calibrators and controllers start anew" in caplog.text


def test_the_kl_that_the_page_names_has_the_gradient_of_ours():
    from verl.trainer.ppo.core_algos import kl_penalty

    generator = torch.Generator().manual_seed(0)
    logp, ref = torch.randn(2, 6, generator=generator, dtype=torch.float64)
    logp.requires_grad_()
    d = ref - logp
    ours = (logp - logp.detach()).exp() * (d.exp() - d - 1)  # the ratio of a first update times k3
    wanted, named, default = (torch.autograd.grad(kl.sum(), logp)[0] for kl in (
        ours, kl_penalty(logp, ref, "low_var_kl+"), kl_penalty(logp, ref, "low_var_kl")
    ))  # fmt: skip
    torch.testing.assert_close(named, wanted)
    assert not torch.allclose(default, wanted), "that of the KL in the other direction"


def test_the_command_fits_verls_settings():
    """examples/verl/gsm8k.sh: each setting is one that verl's schema has, and the method's are ours."""
    root = Path(__file__).resolve().parents[3]
    text = (root / "examples/verl/gsm8k.sh").read_text(encoding="utf-8").replace("\\\n", " ")
    command = next(line for line in text.splitlines() if "verl.trainer.main_ppo" in line and not line.startswith("#"))
    overrides = [word for word in shlex.split(command) if "=" in word]
    assert len(overrides) > 15
    config = verls_config(*overrides)
    actor = config.actor_rollout_ref.actor
    assert actor.use_kl_loss and actor.kl_loss_coef == METHODS["acpo"]["loss.kl_weight"] and actor.kl_loss_type == "low_var_kl+"
    assert config.actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu == 8, "verl refuses a reference without one"
    assert config.trainer.use_v1 and get_trainer_cls(config.trainer.v1.trainer_mode).__name__ == "ACPOTrainer"
    settings = OmegaConf.to_container(config.algorithm.acpo)
    credit = ours.make_credit(TOKENIZER, settings, config.actor_rollout_ref.rollout.n, config.trainer.total_training_steps)
    assert credit.settings.entropy.controller == "target" and credit.settings.segmenter.target_tokens == 32 and credit.group_size == 8
    with pytest.raises(Exception, match="not_a_setting"):
        verls_config("actor_rollout_ref.not_a_setting=1")
