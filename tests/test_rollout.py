"""The local engine: its log-probs are the scoring forward's, and neither padding nor company changes a rollout."""

from __future__ import annotations

import pytest
import torch

from acpo import config
from acpo.layers import ConfigError
from acpo.policy import Policy, build
from acpo.rollout import decode, local
from acpo.rollout.local import LocalEngine, sample

EOS = 1
PROMPTS = [[3, 4, 5], [6], [7, 8, 9, 10, 11, 12], [13, 14]]


@pytest.fixture(scope="module")
def policy() -> Policy:
    torch.manual_seed(3)
    tiny, _ = build(config.load(None, ["problems.task=chain", "policy.from_config=tiny", "policy.device=cpu"]))
    with torch.no_grad():  # the initial policy is all but uniform: sharpen it, so that rollouts have likely and unlikely tokens
        tiny.model.model.norm.weight.normal_(0.0, 3.2)
    return tiny


@pytest.fixture(autouse=True)
def one_thread(deterministic):
    torch.set_num_threads(1)


def generate(policy, prompts, *, eos=(EOS,), new=24, temperature=1.0, seed=0, batch_tokens=10_000):
    engine = LocalEngine(policy, list(eos), batch_tokens)
    return engine.generate(prompts, max_new_tokens=new, temperature=temperature, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def rescored(policy, prompt, ids, temperature) -> torch.Tensor:
    """The log-probs from one plain forward of one sequence, in float64 after the logits."""
    logits = policy.model(torch.tensor([[*prompt, *ids.tolist()]])).logits[0, len(prompt) - 1 : -1].double()
    return torch.log_softmax(logits / temperature, -1).gather(1, ids.unsqueeze(1)).squeeze(1)


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
@pytest.mark.parametrize("prompts", [PROMPTS * 4, [[3, 4, 5]] * 32], ids=["ragged", "one length"])
def test_log_probs_are_those_of_the_scoring_forward(policy, prompts, temperature):
    eos = range(1, 6)  # rows end at different times and leave the batch
    samples = generate(policy, prompts, eos=eos, temperature=temperature)
    assert len({len(s.ids) for s in samples}) > 2
    for prompt, found in zip(prompts, samples, strict=True):
        torch.testing.assert_close(found.logp.double(), rescored(policy, prompt, found.ids, temperature), rtol=0, atol=1e-5)
        hidden = policy.hidden([prompt], [found.ids])
        torch.testing.assert_close(found.logp, policy.score(hidden, found.ids, temperature).logp.detach(), rtol=0, atol=1e-5)


def test_ends(policy):
    samples = generate(policy, PROMPTS * 8, eos=(1, 2), new=12)
    ended, cut = [s for s in samples if s.finished], [s for s in samples if not s.finished]
    assert ended and cut
    for found in ended:
        assert found.ids[-1] in (1, 2) and not torch.isin(found.ids[:-1], torch.tensor([1, 2])).any() and len(found.ids) <= 12
    for found in cut:
        assert len(found.ids) == 12 and not torch.isin(found.ids, torch.tensor([1, 2])).any()
    assert all(len(s.ids) == len(s.logp) > 0 for s in samples)


def test_greedy_takes_the_likeliest_token_and_ragged_prompts_change_nothing(policy):
    together = generate(policy, PROMPTS, temperature=0.0, eos=())
    for prompt, found in zip(PROMPTS, together, strict=True):
        alone = generate(policy, [prompt], temperature=0.0, eos=(), seed=9)[0]
        assert torch.equal(found.ids, alone.ids), "left padding and the company of other prompts change nothing"
        torch.testing.assert_close(found.logp, alone.logp, rtol=0, atol=1e-5)
        torch.testing.assert_close(found.logp.double(), rescored(policy, prompt, found.ids, 1.0), rtol=0, atol=1e-5)
        with torch.no_grad():
            logits = policy.model(torch.tensor([[*prompt, *found.ids.tolist()]])).logits[0, len(prompt) - 1 : -1]
        assert torch.equal(logits.argmax(-1), found.ids)


def test_rows_that_leave_do_not_change_the_others(policy):
    """Greedy rollouts with ends are the beginnings of those without."""
    eos = (1, 2, 3, 7, 9)
    for long, short in zip(
        generate(policy, PROMPTS * 2, temperature=0.0, eos=()), generate(policy, PROMPTS * 2, temperature=0.0, eos=eos), strict=True
    ):
        assert torch.equal(long.ids[: len(short.ids)], short.ids)
        torch.testing.assert_close(long.logp[: len(short.ids)], short.logp, rtol=0, atol=1e-5)


def test_same_seed_same_rollouts(policy):
    one, two, other = (generate(policy, PROMPTS, seed=seed) for seed in (5, 5, 6))
    assert all(torch.equal(a.ids, b.ids) and torch.equal(a.logp, b.logp) for a, b in zip(one, two, strict=True))
    assert any(not torch.equal(a.ids, b.ids) for a, b in zip(one, other, strict=True))


def test_the_global_generator_is_left_alone(policy):
    torch.manual_seed(11)
    before = torch.get_rng_state()
    generate(policy, PROMPTS)
    assert torch.equal(torch.get_rng_state(), before)


def test_token_budget_only_cuts_the_batch(policy):
    whole = generate(policy, PROMPTS, temperature=0.0)
    for budget in (1, 40, 70):
        for a, b in zip(whole, generate(policy, PROMPTS, temperature=0.0, batch_tokens=budget), strict=True):
            assert torch.equal(a.ids, b.ids)
    seen = []
    engine = LocalEngine(policy, [EOS], 70)
    inner = engine._generate
    engine._generate = lambda prompts, *rest: (seen.append(len(prompts)), inner(prompts, *rest))[1]
    engine.generate(PROMPTS * 3, max_new_tokens=24, temperature=1.0, generator=torch.Generator())
    assert seen == [2] * 6, "6 + 24 tokens a row, 70 at a time"


def test_no_prompt_no_rollout_and_the_mode_comes_back(policy):
    assert generate(policy, []) == []
    policy.train()
    generate(policy, PROMPTS, new=1)
    assert policy.training
    policy.eval()
    generate(policy, PROMPTS, new=1)
    assert not policy.training


def test_samples_follow_the_distribution():
    logits = torch.tensor([[2.0, 0.0, -1.0, -torch.inf]]).expand(20_000, 4)
    for temperature in (1.0, 0.5):
        chosen = sample(logits, temperature, torch.Generator().manual_seed(0))
        p = torch.softmax(logits[0] / temperature, -1)
        frequency = torch.bincount(chosen, minlength=4) / len(chosen)
        assert ((frequency - p).abs() <= 4 * (p * (1 - p) / len(chosen)).sqrt()).all() and frequency[3] == 0
    assert sample(logits[:3], 0, torch.Generator()).tolist() == [0, 0, 0]


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("long", [[3, 4, 5] * 30, [6, 7] * 40], ids=["ragged", "one length"])
def test_a_long_prompt_is_read_once_for_all_of_its_rollouts(policy, monkeypatch, long, dense):
    if not dense:
        monkeypatch.setattr(decode, "dense", lambda _: False)
    prompts = [long] * 5 + [[8, 9] * 40] * 4 + [long]  # the other one has 80 tokens
    read, forward = [], type(policy.model).forward
    monkeypatch.setattr(type(policy.model), "forward", lambda self, input_ids, **k: (read.append(input_ids.shape), forward(self, input_ids, **k))[1])
    ours = generate(policy, prompts, eos=(1, 2, 3), temperature=1.3)
    assert read[0] == (2, len(long)), "two prompts, ten rollouts"
    assert len({tuple(s.ids.tolist()) for s in ours}) == 10, "each goes its own way"
    monkeypatch.setattr(local, "SHARED", 1000)
    read.clear()
    for a, b in zip(ours, generate(policy, prompts, eos=(1, 2, 3), temperature=1.3), strict=True):
        assert torch.equal(a.ids, b.ids) and a.finished == b.finished
        torch.testing.assert_close(a.logp, b.logp, rtol=0, atol=1e-5)
    assert read[0] == (10, len(long))


@pytest.mark.parametrize("other", [[6, 7] * 40, [6, 7] * 45], ids=["ragged", "one length"])
def test_states_of_a_hybrid_model_go_with_their_rows(other):
    """Convolutions beside attention: rows that share a prompt, and rows that leave, take what every kind of layer remembers with them."""
    layers = {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2}
    policy = built("Lfm2", **layers, num_key_value_heads=2, block_multiple_of=8)
    prompts = [[3, 4, 5] * 30] * 6 + [other] * 6
    samples = generate(policy, prompts, eos=(1, 2, 5), new=40)
    assert len({len(s.ids) for s in samples}) > 3, "rows leave the batch"
    for prompt, found in zip(prompts, samples, strict=True):
        torch.testing.assert_close(found.logp.double(), rescored(policy, prompt, found.ids, 1.0), rtol=0, atol=1e-4)


def test_a_model_without_such_a_cache_is_refused():
    import transformers

    torch.manual_seed(0)
    model = transformers.MambaForCausalLM(transformers.MambaConfig(hidden_size=16, state_size=4, num_hidden_layers=1, vocab_size=50))
    with pytest.raises(ConfigError, match=r"rollout.engine = 'local' needs a policy whose forward returns past_key_values, and MambaForCausalLM's"):
        generate(Policy(model, 0), PROMPTS)


# --- the decoder of dense Qwen2 and Llama models ------------------------------------------------------------------------------------


LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip


def built(family: str = "Qwen2", **changes) -> Policy:
    import transformers

    shape = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 6, "vocab_size": 50}
    torch.manual_seed(1)
    shape = getattr(transformers, f"{family}Config")(**{**shape, "attn_implementation": "sdpa", "initializer_range": 0.2, **changes})
    model = getattr(transformers, f"{family}ForCausalLM")(shape)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:  # biases and norms as a trained model has them
                p.add_(0.3 * torch.randn_like(p))
    return Policy(model, 0)


@pytest.mark.parametrize("temperature", [1.0, 0.0, 0.7])
@pytest.mark.parametrize("prompts", [PROMPTS * 4, [[3, 4, 5]] * 17], ids=["ragged", "one length"])
@pytest.mark.parametrize(
    "changes",
    [
        {}, {"tie_word_embeddings": True}, {"num_key_value_heads": 2}, {"num_attention_heads": 1, "num_key_value_heads": 1},
        {"family": "Llama", "num_key_value_heads": 2}, {"family": "Llama", "attention_bias": True, "mlp_bias": True, "head_dim": 12},
        {"family": "Llama", "rope_parameters": LLAMA3},
    ],
)  # fmt: skip
def test_the_dense_decoder_is_transformers_own_to_the_bit(monkeypatch, changes, prompts, temperature):
    policy = built(**changes)
    assert decode.dense(policy)
    ours = generate(policy, prompts, eos=(1, 2, 5), new=40, temperature=temperature)
    monkeypatch.setattr(decode, "dense", lambda _: False)
    theirs = generate(policy, prompts, eos=(1, 2, 5), new=40, temperature=temperature)
    assert temperature == 0 or len({len(s.ids) for s in ours}) > 2, "rows leave the batch"
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.ids, b.ids) and torch.equal(a.logp, b.logp) and a.finished == b.finished


def hooked(policy):
    policy.model.model.layers[0].register_forward_hook(lambda *_: None)


def replaced(policy):
    class Doubled(torch.nn.Linear):
        pass

    policy.model.model.layers[1].mlp.up_proj = Doubled(48, 80, bias=False)


def shadowed(policy):
    policy.model.model.norm.forward = lambda x: x


@pytest.mark.parametrize("change", [hooked, replaced, shadowed, lambda p: setattr(p, "dtype", torch.bfloat16), lambda p: p.model.double()])
def test_a_model_that_does_something_else_keeps_its_own_forward(change):
    policy = built()
    change(policy)
    assert not decode.dense(policy)


def test_windows_and_other_attention_keep_their_own_forward():
    assert not decode.dense(built(use_sliding_window=True, sliding_window=4, max_window_layers=1))
    assert not decode.dense(built(attn_implementation="eager"))
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    assert not any(decode.dense(built(family, rope_parameters=dynamic, max_position_embeddings=16)) for family in ("Qwen2", "Llama"))


def test_log_probs_do_not_depend_on_how_many_steps_are_scored_together(policy, monkeypatch):
    whole = generate(policy, PROMPTS)
    monkeypatch.setattr(local, "UNSCORED", 1)
    assert all(torch.equal(a.ids, b.ids) and torch.equal(a.logp, b.logp) for a, b in zip(whole, generate(policy, PROMPTS), strict=True))
