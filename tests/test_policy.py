"""The policy: padding changes nothing, and what cannot be a policy is refused in one line."""

from __future__ import annotations

import json

import pytest
import torch
from ragged import segments_of
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Cohere2Config,
    CohereConfig,
    FalconConfig,
    Gemma2Config,
    GenerationConfig,
    GPTBigCodeConfig,
    GraniteConfig,
    OPTConfig,
    Qwen2Config,
    RecurrentGemmaConfig,
    Starcoder2Config,
)

import acpo_kernels
from acpo import config
from acpo.config import ConfigError
from acpo.policy import SIZES, Policy, build, load_tokenizer

BASE = "problems.task=chain", "policy.from_config=tiny", "policy.device=cpu"
PROMPTS = [[3, 4, 5], [6], [7, 8, 9, 10, 11, 12], [13, 14]]
RESPONSES = [torch.tensor(r) for r in ([15, 16], [17, 18, 19, 20, 21], [22], [23, 24, 0, 25])]


@pytest.fixture(scope="module")
def policy() -> Policy:
    torch.manual_seed(3)
    built, _ = build(config.load(None, BASE))
    with torch.no_grad():  # the initial policy is all but uniform
        built.model.model.norm.weight.normal_(0.0, 3.2)
    return built


def test_the_padded_forward_is_that_of_each_sequence_alone(policy):
    hidden = policy.hidden(PROMPTS, RESPONSES)
    at = 0
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        ids = torch.tensor([[*prompt, *response.tolist()]])
        alone = policy.model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0, len(prompt) - 1 : -1]
        torch.testing.assert_close(hidden[at : at + len(response)], alone, rtol=0, atol=1e-5)
        at += len(response)
    assert hidden.shape == (at, SIZES["tiny"][0])


def test_score_is_log_softmax_at_the_temperature(policy):
    hidden = policy.hidden(PROMPTS, RESPONSES)
    found = policy.score(hidden, torch.cat(RESPONSES), 0.7)
    at = 0
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        logits = policy.model(torch.tensor([[*prompt, *response.tolist()]])).logits[0, len(prompt) - 1 : -1].double() / 0.7
        logp = torch.log_softmax(logits, -1)
        part = slice(at, at + len(response))
        torch.testing.assert_close(found.logp[part].double(), logp.gather(1, response.unsqueeze(1)).squeeze(1), rtol=0, atol=1e-5)
        torch.testing.assert_close(found.entropy[part].double(), -(logp.exp() * logp).sum(1), rtol=0, atol=1e-5)
        at += len(response)


def test_hindsight_compares_the_two_prompts(policy):
    ids = torch.cat(RESPONSES)
    hinted = [[30, *p] for p in PROMPTS]
    found = policy.hindsight(policy.hidden(PROMPTS, RESPONSES), policy.hidden(hinted, RESPONSES), ids, 1.0)
    plain, informed = (policy.score(policy.hidden(p, RESPONSES), ids, 1.0).logp for p in (PROMPTS, hinted))
    torch.testing.assert_close(found.log_ratio, informed - plain, rtol=0, atol=1e-5)
    assert (found.kl > 0).all()
    same = policy.hindsight(policy.hidden(PROMPTS, RESPONSES), policy.hidden(PROMPTS, RESPONSES), ids, 1.0)
    assert not same.log_ratio.any() and same.kl.abs().max() < 1e-6


def test_the_gradient_of_the_loss_reaches_every_parameter(policy):
    ids = torch.cat(RESPONSES)
    segments = segments_of(tuple((len(r),) for r in RESPONSES))
    old = policy.score(policy.hidden(PROMPTS, RESPONSES), ids, 1.0).logp.detach()
    advantages = torch.linspace(-1, 1, len(ids))
    result = policy(PROMPTS, RESPONSES, old, advantages, segments, temperature=1.0)
    policy.zero_grad()
    result.loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in policy.parameters())
    # The same loss from logits, by the equation: on-policy the ratio is 1 and the gradient is that of -mean(A logp).
    fused = {n: p.grad.clone() for n, p in policy.named_parameters()}
    policy.zero_grad()
    plain = torch.cat([
        torch.log_softmax(policy.model(torch.tensor([[*p, *r.tolist()]])).logits[0, len(p) - 1 : -1], -1).gather(1, r.unsqueeze(1)).squeeze(1)
        for p, r in zip(PROMPTS, RESPONSES, strict=True)
    ])  # fmt: skip
    (-(advantages * plain).mean()).backward()
    for name, parameter in policy.named_parameters():
        torch.testing.assert_close(fused[name], parameter.grad, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_build_is_the_seeds():
    settings = config.load(None, BASE)
    weights = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        weights.append(build(settings)[0].model.get_output_embeddings().weight)
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("size", SIZES)
def test_sizes(size):
    built, tokenizer = build(config.load(None, [*BASE, f"policy.from_config={size}"]))
    assert built.vocab_size == len(tokenizer), "a character vocabulary is not padded"
    assert built.model.config.hidden_size == SIZES[size][0] and built.model.config.tie_word_embeddings
    count = sum(p.numel() for p in built.parameters())
    low, high = {"tiny": (80_000, 90_000), "small": (240_000, 260_000), "medium": (18_500_000, 19_500_000)}[size]
    assert low < count < high


def test_a_saved_policy_is_read_back(tmp_path, policy):
    _, tokenizer = build(config.load(None, BASE))
    policy.model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    other, _ = build(config.load(None, [*BASE, "policy.from_config=", f"policy.path={tmp_path / 'saved'}"]))
    torch.testing.assert_close(other.hidden(PROMPTS, RESPONSES), policy.hidden(PROMPTS, RESPONSES), rtol=0, atol=0)
    assert other.pad_id == policy.pad_id
    half, _ = build(config.load(None, [*BASE, "policy.from_config=", f"policy.path={tmp_path / 'saved'}", "policy.dtype=bfloat16"]))
    assert {p.dtype for p in half.parameters()} == {torch.float32}, "small steps would be lost in bfloat16 weights"
    ids, segments = torch.cat(RESPONSES), segments_of(tuple((len(r),) for r in RESPONSES))
    logp, wanted = (p.score(p.hidden(PROMPTS, RESPONSES), ids, 1.0).logp for p in (half, policy))
    assert 1e-4 < (logp - wanted).abs().max() < 0.2, "computed in bfloat16, and nothing else"
    half(PROMPTS, RESPONSES, None, torch.ones(len(ids)), segments).loss.backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in half.parameters())


def test_weights_are_memory_of_its_own(tmp_path, policy):
    """Mapped, they would lie off the cache lines, and the file could be cut short under them."""
    again, _ = build(config.load(None, folder_of(policy.model, tmp_path)))
    assert all(p.data_ptr() % 64 == 0 for p in again.parameters())
    (tmp_path / "model.safetensors").write_bytes(b"")
    for name, value in policy.named_parameters():
        assert torch.equal(again.get_parameter(name), value)


def test_gradient_checkpointing_changes_no_gradient():
    ids, segments = torch.cat(RESPONSES), segments_of(tuple((len(r),) for r in RESPONSES))
    gradients = []
    for switch in ("false", "true"):
        torch.manual_seed(0)
        built, _ = build(config.load(None, [*BASE, f"policy.gradient_checkpointing={switch}"]))
        built.train()
        built(PROMPTS, RESPONSES, None, torch.ones(len(ids)), segments, temperature=1.0).loss.backward()
        gradients.append({n: p.grad for n, p in built.named_parameters()})
    assert all(torch.equal(gradients[0][n], gradients[1][n]) for n in gradients[0])


NARROW = dict(vocab_size=57, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, pad_token_id=0, eos_token_id=1, bos_token_id=None)
SHAPE = {**NARROW, "intermediate_size": 32, "num_key_value_heads": 2}
DROPPED = {  # what each passes to functions, not to a module of its own
    "Starcoder2": Starcoder2Config(**SHAPE, residual_dropout=0.3, embedding_dropout=0.3, attention_dropout=0.3),
    "Bloom": BloomConfig(**NARROW, hidden_dropout=0.3, attention_dropout=0.3),
    "Falcon": FalconConfig(**NARROW, hidden_dropout=0.3, attention_dropout=0.3),
    "GPTBigCode": GPTBigCodeConfig(
        vocab_size=57, n_embd=16, n_layer=2, n_head=2, pad_token_id=0, eos_token_id=1, bos_token_id=None,
        attn_pdrop=0.3, resid_pdrop=0.3, embd_pdrop=0.3,
    ),
    "OPT": OPTConfig(**NARROW, ffn_dim=32, word_embed_proj_dim=16, dropout=0.3, layerdrop=0.5),
}  # fmt: skip


def folder_of(model, folder) -> list[str]:
    """A model and the characters of the task as a folder; the settings that read it."""
    model.save_pretrained(folder)
    build(config.load(None, BASE))[1].save_pretrained(folder)
    return [*BASE, "policy.from_config=", f"policy.path={folder}"]


@pytest.mark.parametrize("name", DROPPED)
def test_no_dropout_under_any_name(tmp_path, name):
    torch.manual_seed(0)
    built, _ = build(config.load(None, [*folder_of(AutoModelForCausalLM.from_config(DROPPED[name]), tmp_path), "policy.attention=eager"]))
    assert built.model.training
    with torch.no_grad():
        first, *others = (built.hidden(PROMPTS, RESPONSES) for _ in range(4))
        assert all(torch.equal(first, other) for other in others)
        torch.testing.assert_close(built.eval().hidden(PROMPTS, RESPONSES), first, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ({"do_sample": False, "temperature": 0.6, "top_p": 0.9, "eos_token_id": 1}, {"eos_token_id": 1}),
        ({"do_sample": True, "temperature": 0.6, "eos_token_id": [1, 5], "pad_token_id": -1}, {"eos_token_id": [1, 5], "pad_token_id": None}),
        ({"do_sample": True, "temperature": 0.6, "top_k": 20, "eos_token_id": 1}, {"temperature": 0.6, "top_k": 20, "eos_token_id": 1}),
    ],
    ids=["greedy with a temperature", "a negative pad id", "nothing wrong"],
)
def test_a_generation_config_that_contradicts_itself_does_not_stop_the_export(tmp_path, policy, said, kept):
    settings = folder_of(policy.model, tmp_path / "given")
    (tmp_path / "given" / "generation_config.json").write_text(json.dumps(said))
    built, _ = build(config.load(None, settings))
    built.save(tmp_path / "saved")
    found = GenerationConfig.from_pretrained(tmp_path / "saved")
    assert {name: getattr(found, name) for name in kept} == kept


# --- refused ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("policy.from_config= policy.path=/nowhere", "policy.path: no such folder: /nowhere$"),
        ("policy.from_config= policy.path=Qwen/Qwen3-0.6B", r"no such folder: Qwen/Qwen3-0.6B; .* hf download Qwen/Qwen3-0.6B --local-dir FOLDER"),
        ("policy.tokenizer=/nowhere", "policy.tokenizer: no such file or folder: /nowhere"),
        ("problems.task= problems.path=x.jsonl", "policy.tokenizer must name a tokenizer folder or tokenizer.json"),
        ("policy.device=gpu", "policy.device: .*gpu"),
        ("policy.attention=flash_attention_2", r"policy.attention = 'flash_attention_2': .*pip install"),
    ],
)
def test_refused(overrides, message):
    with pytest.raises(ConfigError, match=message) as caught:
        build(config.load(None, [*BASE, *overrides.split()]))
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_cuda_without_cuda():
    with pytest.raises(ConfigError, match=r"policy.device: 'cuda' cannot be used"):
        build(config.load(None, [*BASE, "policy.device=cuda"]))


def test_folder_that_is_no_model(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    tokenizer = build(config.load(None, BASE))[1]
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"policy.path: cannot load") as caught:
        build(config.load(None, [*BASE, "policy.from_config=", f"policy.path={tmp_path}"]))
    assert "\n" not in str(caught.value)


def test_malformed_tokenizer(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", ')
    for source in (tmp_path / "tokenizer.json", tmp_path):
        with pytest.raises(ConfigError, match=r"policy.tokenizer: cannot load") as caught:
            load_tokenizer(str(source))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("missing", "message"), [("eos_token", "has no eos token"), ("pad_token", "has no pad token")])
def test_tokenizer_without(tmp_path, missing, message):
    build(config.load(None, BASE))[1].save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    del settings[missing]
    path.write_text(json.dumps(settings))
    (tmp_path / "special_tokens_map.json").unlink(missing_ok=True)
    with pytest.raises(ConfigError, match=f"policy.tokenizer: .* {message}"):
        build(config.load(None, [*BASE, f"policy.tokenizer={tmp_path}"]))


def test_a_model_with_fewer_logits_than_the_tokenizer(tmp_path, policy):
    _, tokenizer = build(config.load(None, BASE))
    policy.model.save_pretrained(tmp_path)
    tokenizer.add_tokens([f"<{i}>" for i in range(9)])
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="the tokenizer has 66 entries and the model only 57 logits"):
        build(config.load(None, [*BASE, "policy.from_config=", f"policy.path={tmp_path}"]))


def test_a_head_that_is_not_a_plain_linear_layer(policy):
    class Strange:
        config = policy.model.config

        def get_output_embeddings(self):
            return torch.nn.Sequential(torch.nn.Linear(2, 2))

    with pytest.raises(ConfigError, match=r"the head must be a plain linear layer \(no LoRA, no fp8\), got Sequential"):
        Policy(Strange(), 0)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (
            GraniteConfig(**SHAPE, logits_scaling=8.0),
            r"GraniteForCausalLM cannot be trained: its config multiplies the logits \(logits_scaling = 8.0\)",
        ),
        (CohereConfig(**SHAPE), r"multiplies the logits \(logit_scale = 0.0625\)"),
        (Cohere2Config(**SHAPE, logit_scale=0.25), r"multiplies the logits \(logit_scale = 0.25\)"),
        (RecurrentGemmaConfig(**SHAPE, lru_width=16, logits_soft_cap=30.0), r"caps the logits \(logits_soft_cap = 30.0\)"),
    ],
    ids=["Granite", "Cohere", "Cohere2", "RecurrentGemma"],
)
def test_logits_that_are_not_the_heads(shape, message):
    """They are sampled by the model's own forward and would be trained by a head that knows nothing of it."""
    with pytest.raises(ConfigError, match=message):
        Policy(AutoModelForCausalLM.from_config(shape), 0)


@pytest.mark.parametrize(
    "shape",
    [GraniteConfig(**SHAPE, logits_scaling=1.0), Gemma2Config(**SHAPE, head_dim=8, final_logit_softcapping=0.5), Qwen2Config(**SHAPE)],
    ids=["a factor of one", "a cap", "plain"],
)
def test_logits_that_are_the_heads(shape):
    torch.manual_seed(0)
    built, ids = Policy(AutoModelForCausalLM.from_config(shape).eval(), 0), torch.tensor([4, 9, 16])
    with torch.no_grad():
        logits = built.model(torch.tensor([[2, 3, *ids.tolist()]])).logits[0, 1:-1]
        found = built.score(built.hidden([[2, 3]], [ids]), ids, 1.0).logp
    torch.testing.assert_close(found, logits.log_softmax(-1).gather(1, ids.unsqueeze(1)).squeeze(1), rtol=0, atol=1e-5)


def test_the_real_vocabulary(shared_data):
    """Qwen2's tokenizer has 151,646 entries and its model 151,936 logits; the 290 beyond are opaque tokens."""
    chosen = ["problems.path=unused.jsonl", "policy.from_config=tiny", "policy.device=cpu", f"policy.tokenizer={shared_data / 'tokenizer_qwen2'}"]
    built, tokenizer = build(config.load(None, chosen))
    assert built.vocab_size == 151_936 and len(tokenizer) <= 151_646
    ids = torch.tensor([5, 151_935, 151_700])
    found = built.score(built.hidden([[1, 2]], [ids]), ids, 1.0)
    assert found.logp.isfinite().all() and found.entropy.max() < 11.94


def test_the_byte_tokenizer_keeps_any_text():
    chosen = config.load(None, ["problems.path=unused.jsonl", "policy.from_config=tiny", "policy.tokenizer=bytes", "policy.device=cpu"])
    built, tokens = build(chosen)
    text = "Wait, 3 \u2264 \u03c0?\n\n\u7b54\u6848 <eos>x"
    ids = tokens(text, add_special_tokens=False)["input_ids"]
    assert tokens.decode(ids) == text and built.vocab_size == len(tokens) == 258
    assert len(tokens("abc \u03c0", add_special_tokens=False)["input_ids"]) == 6
    segmenter = acpo_kernels.Segmenter.from_tokenizer(tokens, min_tokens=2, max_tokens=64, target_tokens=8)
    ids = torch.tensor(tokens("First line.\n\nSecond line.\n\nThird.", add_special_tokens=False)["input_ids"])
    assert segmenter(ids, torch.tensor([0, len(ids)])).token_offsets.tolist() == [0, 13, 27, 33]
