"""The packed forward: the padded one's numbers without its padding, on several architectures, with all that training switches on."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loop import parameters, rolled_out, trainer_of
from ragged import segments_of
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    Lfm2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3NextConfig,
)
from transformers import modeling_flash_attention_utils as flash

from acpo import config, packing
from acpo.batch import Batch
from acpo.config import ConfigError
from acpo.policy import Policy, build
from acpo_kernels import linear_policy_loss

PROMPTS = [[3, 4, 5], [6], [7, 8, 9, 10, 11, 12], [13, 14], [15]]
RESPONSES = [torch.tensor(r) for r in ([15, 16], [17, 18, 19, 20, 21], [22], [23, 24, 0, 25], [26] * 9)]
IDS = torch.cat(RESPONSES)
SHAPE = dict(vocab_size=60, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=64)
CONFIGS = {
    "qwen2": Qwen2Config(**SHAPE, num_key_value_heads=2, tie_word_embeddings=True),
    "llama": LlamaConfig(**SHAPE, num_key_value_heads=2, tie_word_embeddings=False),
    "gemma2": Gemma2Config(**SHAPE, num_key_value_heads=2, head_dim=16, sliding_window=4, query_pre_attn_scalar=16),  # a window, soft caps
    "gpt_neox": GPTNeoXConfig(**SHAPE),  # positions on a part of each head, biases
    "mistral": MistralConfig(**SHAPE, num_key_value_heads=2, sliding_window=4),  # a window shorter than the rollouts, in every layer
    "gpt2": GPT2Config(vocab_size=60, n_embd=64, n_layer=2, n_head=4, n_positions=64, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0),  # learned positions
}
CANNOT = {
    "a convolution over tokens": Lfm2Config(**SHAPE, num_key_value_heads=2, layer_types=["conv", "full_attention", "conv"]),
    "a recurrent state": Qwen3NextConfig(
        **SHAPE, num_key_value_heads=2, head_dim=16, layer_types=["linear_attention", "full_attention", "linear_attention"], num_experts=2,
        num_experts_per_tok=1, moe_intermediate_size=16, shared_expert_intermediate_size=16, linear_num_value_heads=2, linear_num_key_heads=2,
        linear_key_head_dim=8, linear_value_head_dim=8,
    ),
    "a bias that takes no positions": BloomConfig(vocab_size=60, hidden_size=64, n_layer=1, n_head=4),
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread(deterministic):
    torch.set_num_threads(1)


def pair(name: str, attention: str = "sdpa") -> tuple[Policy, Policy]:
    """The same model padded and packed."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name], attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return Policy(model, 0), Policy(model, 0, packed=True)


def test_log_probs_are_those_of_the_padded_forward_and_of_each_rollout_alone():
    for name in CONFIGS:
        for attention in ("sdpa", "eager"):
            padded, packed = pair(name, attention)
            a, b = (p.score(p.hidden(PROMPTS, RESPONSES), IDS, 1.0) for p in (padded, packed))
            torch.testing.assert_close(b.logp, a.logp, rtol=0, atol=1e-5, msg=lambda m, at=(name, attention): f"{at}: {m}")
            torch.testing.assert_close(b.entropy, a.entropy, rtol=0, atol=1e-5)
            alone = torch.cat([packed.score(packed.hidden([p], [r]), r, 1.0).logp for p, r in zip(PROMPTS, RESPONSES, strict=True)])
            torch.testing.assert_close(b.logp, alone, rtol=0, atol=1e-5)
            assert (a.logp.max() - a.logp.min()) > 0.5, "a policy of one opinion would show nothing"


@pytest.mark.parametrize("name", CONFIGS)
def test_no_rollout_sees_another(name):
    _, packed = pair(name)
    hidden = packed.hidden(PROMPTS, RESPONSES).split([len(r) for r in RESPONSES])
    other = [r if i != 1 else torch.tensor([30, 31, 32, 33, 34]) for i, r in enumerate(RESPONSES)]
    changed = packed.hidden([p if i != 1 else [9] for i, p in enumerate(PROMPTS)], other).split([len(r) for r in RESPONSES])
    for i, (a, b) in enumerate(zip(hidden, changed, strict=True)):
        assert torch.equal(a, b) == (i != 1)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_that_keeps_them_apart_may_be_packed(name):
    _, packed = pair(name)
    packed.model.train()
    packing.check(packed.model, packed.precision())
    packed.dtype = torch.bfloat16
    packing.check(packed.model, packed.precision())
    assert packed.model.training


@pytest.mark.parametrize("name", CANNOT)
def test_one_that_cannot_is_refused(name):
    model = AutoModelForCausalLM.from_config(CANNOT[name])
    with pytest.raises(ConfigError, match=rf"policy.packing: {type(model).__name__} does not keep .* it needs policy.packing = 'padded'"):
        packing.check(model, Policy(model, 0).precision())


def test_positions_that_are_counted_through_are_refused():
    class Counting(torch.nn.Module):  # sees nothing of its neighbours, but knows where in the row it stands
        config = type("config", (), {"_attn_implementation": "sdpa"})
        device = torch.device("cpu")

        def get_input_embeddings(self):
            return torch.nn.Embedding(60, 4)

        def base_model(self, input_ids, **_):
            return type("out", (), {"last_hidden_state": torch.arange(input_ids.numel()).float().add(1).view(1, -1, 1)})

    with pytest.raises(ConfigError, match=r"does not keep packed rollouts apart .*move by 0\.0e"):
        packing.check(Counting(), Policy.precision(type("p", (), {"device": torch.device("cpu"), "dtype": torch.float32})))


@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradients_are_those_of_the_padded_forward(checkpointed):
    segments = segments_of(tuple((len(r),) for r in RESPONSES))
    advantages = torch.linspace(-1, 1, len(IDS))
    found = []
    for policy in pair("qwen2"):
        policy.zero_grad()
        if checkpointed:
            policy.train()
            policy.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        policy(PROMPTS, RESPONSES, None, advantages, segments, entropy_weight=0.01).loss.backward()
        found.append({n: p.grad.clone() for n, p in policy.named_parameters()})
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


def test_bfloat16():
    padded, packed = pair("qwen2")
    exact = padded.score(padded.hidden(PROMPTS, RESPONSES), IDS, 1.0).logp
    for policy in (padded, packed):
        policy.dtype = torch.bfloat16
    a, b = (p.score(p.hidden(PROMPTS, RESPONSES), IDS, 1.0).logp for p in (padded, packed))
    assert (b - a).abs().max() < 0.1 and 1e-4 < (b - exact).abs().max() < 0.2


def test_the_body_sees_no_padding():
    _, packed = pair("qwen2")
    seen = {}
    packed.model.base_model.register_forward_pre_hook(lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True)
    packed.hidden(PROMPTS, RESPONSES)
    lengths = [len(p) + len(r) for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    assert seen["input_ids"].shape == (1, sum(lengths)) and seen["position_ids"].tolist() == [[t for n in lengths for t in range(n)]]
    assert "cu_seq_lens_q" not in seen


@pytest.mark.parametrize("name", ["qwen2", "llama", "mistral"])
def test_flash_attention_is_asked_for_these_very_sequences(name, monkeypatch):
    """The kernel needs a GPU: a loop over the sequences answers in its place, called by transformers itself with the arguments that it takes."""
    _, packed = pair(name)
    wanted = packed.hidden(PROMPTS, RESPONSES)
    calls = []

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1),
        softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False, block_table=None,
    ):  # fmt: skip
        """That of flash-attn 2.8: [tokens, heads, width] packed, grouped keys and values."""
        assert causal and dropout_p == 0.0 and q.shape[0] == k.shape[0] == int(cu_seqlens_q[-1])
        calls.append((cu_seqlens_q.tolist(), cu_seqlens_k.tolist(), max_seqlen_q, max_seqlen_k, cu_seqlens_q.dtype))
        parts = []
        for begin, end in itertools.pairwise(cu_seqlens_q.tolist()):
            at = torch.arange(end - begin)
            seen = (at <= at[:, None]) & ((at >= at[:, None] - window_size[0]) if window_size[0] >= 0 else True)
            part = (x[begin:end].transpose(0, 1) for x in (q, k, v))
            parts.append(scaled_dot_product_attention(*part, attn_mask=seen, scale=softmax_scale, enable_gqa=True).transpose(0, 1))
        return torch.cat(parts)

    def unused(*_, **__):
        raise AssertionError("the padded kernel has no place here")

    monkeypatch.setattr(flash, "_lazy_imports", lambda *_, **__: (unused, flash_attn_varlen_func, unused, unused, unused))
    monkeypatch.setattr(flash, "_loaded_implementation", None)
    packed.model.config._attn_implementation_internal = "flash_attention_2"
    torch.testing.assert_close(packed.hidden(PROMPTS, RESPONSES), wanted, rtol=0, atol=1e-5)
    offsets = [0, 5, 11, 18, 24, 34]
    assert calls == [(offsets, offsets, 10, 10, torch.int32)] * 3


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 30)), min_size=1, max_size=20), st.integers(1, 80), st.data())
def test_packed_micro_batches_hold_the_budget_of_real_tokens(sizes, budget, data):
    batch = Batch([[0] * prompt for prompt, _ in sizes], [length for _, length in sizes], None)
    rows = data.draw(st.lists(st.sampled_from(range(len(sizes))), unique=True))
    parts = list(batch.micro_batches(rows, budget, packed=True))
    assert sorted(b for part in parts for b in part) == sorted(rows)
    size = [prompt + length for prompt, length in sizes]
    for part in parts:
        assert len(part) == 1 or sum(size[b] for b in part) <= budget
    for one, following in itertools.pairwise(parts):
        assert sum(size[b] for b in one) + max(size[b] for b in following) > budget, "no micro-batch closes while the next rollout fits"
    assert len(parts) <= len(list(batch.micro_batches(rows, budget)))


def test_training_has_no_dropout_whoever_samples(tmp_path):
    from acpo.synthetic import tokenizer

    shape = dict(vocab_size=len(tokenizer()), n_embd=64, n_layer=1, n_head=4, n_positions=64)  # GPT-2 drops one in ten by default
    AutoModelForCausalLM.from_config(GPT2Config(**shape)).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    policy, _ = build(config.load(None, ["problems.task=chain", f"policy.path={tmp_path}", "policy.gradient_checkpointing=true"]))
    assert all(module.training for module in policy.modules())
    assert torch.equal(policy.hidden(PROMPTS, RESPONSES), policy.hidden(PROMPTS, RESPONSES))


def test_a_step_packed_is_a_step_padded(tmp_path, warmed):
    found = []
    for way in ("padded", "packed"):
        trainer = trainer_of(
            tmp_path / way, f"policy.packing={way}", "trainer.micro_batch_tokens=100", "attribution.reliability=1", "credit.scope=all",
            "loss.minibatches=1", weights=warmed,
        )  # fmt: skip
        assert trainer.policy.packed == (way == "packed")
        batch, *_ = rolled_out(trainer)
        trainer._update(batch)
        found.append((batch, {n: p.grad.clone() for n, p in trainer.policy.named_parameters()}, parameters(trainer)))
    (a, grads, _), (b, other, _) = found
    assert torch.equal(a.token["ids"], b.token["ids"])
    for name in ("old_logp", "entropy", "log_ratio", "kl"):
        torch.testing.assert_close(b.token[name], a.token[name], rtol=0, atol=2e-5)
    for name, grad in grads.items():
        torch.testing.assert_close(other[name], grad, rtol=1e-3, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_flash_attention_is_packed_and_sdpa_padded_unless_said(monkeypatch):
    base = "problems.task=chain", "policy.from_config=tiny", "policy.device=cpu"
    assert not build(config.load(None, base))[0].packed
    assert build(config.load(None, [*base, "policy.packing=packed"]))[0].packed
    monkeypatch.setattr(PreTrainedModel, "_flash_attn_can_dispatch", lambda *_, **__: True)  # as where it is installed, and a GPU
    monkeypatch.setattr(flash, "_lazy_imports", lambda *_, **__: (None, lambda q, **_: None, None, None, None))
    monkeypatch.setattr(flash, "_loaded_implementation", None)
    monkeypatch.setattr(packing, "check", lambda *_: None)  # which would run it
    found = build(config.load(None, [*base, "policy.attention=flash_attention_2"]))[0]
    assert found.packed and found.model.config._attn_implementation == "flash_attention_2"
    assert not build(config.load(None, [*base, "policy.attention=flash_attention_2", "policy.packing=padded"]))[0].packed


class Largest(TorchDispatchMode):
    """The most elements that the result of any one operation has; views make nothing."""

    def __init__(self):
        super().__init__()
        self.numel, self.operation = 0, ""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.numel() > self.numel and not operation.is_view:
                self.numel, self.operation = x.numel(), str(operation)
        return result


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A policy whose vocabulary is far wider than anything else in it, as a folder."""
    from acpo.synthetic import tokenizer

    folder, characters = tmp_path_factory.mktemp("wide"), tokenizer()
    torch.manual_seed(0)
    shape = dict(SHAPE, vocab_size=32768, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)
    shape |= dict(eos_token_id=characters.eos_token_id, pad_token_id=characters.pad_token_id, bos_token_id=None)
    AutoModelForCausalLM.from_config(Qwen2Config(**shape)).save_pretrained(folder)
    characters.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("way", ["padded", "packed"])
@pytest.mark.parametrize("stage", [1, 2])
def test_no_tensor_of_tokens_by_vocabulary_in_a_step(tmp_path, wide, way, stage, monkeypatch):
    trainer = trainer_of(
        tmp_path, f"policy.path={wide}", "policy.from_config=", f"policy.packing={way}", "policy.gradient_checkpointing=true",
        "attribution.reliability=1", "credit.scope=all", "attribution.source=hindsight,tree,head", "rollout.max_new_tokens=40", "rollout.prompts=2",
    )  # fmt: skip
    trainer.step_number = 1
    if stage == 2:
        trainer.stages.stage = 2
    before = parameters(trainer)

    def step() -> tuple[int, str]:
        with Largest() as largest:
            trainer.step()
        return largest.numel, largest.operation

    rollouts, tokens, vocabulary = 8, 8 * 38, trainer.policy.vocab_size  # almost no rollout ends before its 40th token
    found, operation = step()
    assert any(not torch.equal(p, before[n]) for n, p in trainer.policy.named_parameters()), "the step must have learned something"
    assert vocabulary * 16 <= found < tokens * vocabulary / 10, f"{operation}: {found} elements, N V = {tokens * vocabulary}"
    assert found <= max(vocabulary * 16, rollouts * vocabulary)  # the head itself, and the logits of one sampling step

    monkeypatch.setattr("acpo.policy.linear_policy_loss", functools.partial(linear_policy_loss, impl="reference"))
    assert step()[0] > tokens * vocabulary / 10, "the test must see such a tensor where there is one"
