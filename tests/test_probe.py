"""The packed probe against separate forwards, its candidates, and its evidence."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loop import rolled_out, settings, trainer_of
from transformers import AutoModelForCausalLM, Gemma2Config, GptOssConfig, MistralConfig, Qwen2Config

from acpo import attributors
from acpo.config import ConfigError
from acpo.policy import byte_tokenizer
from acpo.probe import MAX_BOUNDARIES, chosen_boundaries, group_candidates, pack_branches, posterior_evidence, targets


@pytest.fixture(autouse=True)
def one_thread(deterministic):
    torch.set_num_threads(1)


@pytest.mark.parametrize("suffix", [[7, 3], []], ids=["suffix", "no suffix"])
def test_packed_branches_are_separate_forwards(tmp_path, warmed, suffix):
    """Two rollouts of different length in one padded batch, three boundaries, candidates of different length."""
    policy = trainer_of(tmp_path, weights=warmed).policy
    rollouts = [([2, 5, 6], torch.tensor([8, 9, 10, 11, 12]), [0, 2, 5]), ([4, 4], torch.tensor([9, 8, 7]), [1, 2, 3])]
    candidates = [[6], [5, 4, 3], [5, 9]]
    packed = [pack_branches(prompt, response, ends, suffix, candidates) for prompt, response, ends in rollouts]
    found = policy.branch_logp(packed, [targets(p, candidates) for p in packed], 0.7)
    for (prompt, response, ends), logp in zip(rollouts, found, strict=True):
        wanted = []
        for end in ends:
            for answer in candidates:
                before = [*prompt, *response[:end].tolist(), *suffix]
                hidden = policy.hidden([before], [torch.tensor(answer)])
                wanted.append(policy.score(hidden, torch.tensor(answer), 0.7).logp.sum())
        torch.testing.assert_close(logp, torch.stack(wanted).detach(), rtol=1e-5, atol=1e-5)


@given(st.integers(1, 200))
def test_boundaries_are_few_spread_and_end_at_the_last(count):
    found = chosen_boundaries(count)
    assert found == sorted(set(found)) and len(found) == min(count, MAX_BOUNDARIES) and found[-1] == count - 1
    steps = [b - a for a, b in zip([-1, *found], found, strict=False)]
    assert max(steps) - min(steps) <= 1


def test_candidates_are_the_right_answer_and_the_frequent_ones():
    answers = [[1], [2], [2], [3], [], [4], [5], [3], [3]]
    assert group_candidates([1], answers) == [[1], [3], [2], [4]]
    assert group_candidates([9, 9], [[9, 9]] * 4) == [[9, 9]], "nothing to tell apart"


def test_one_answer_in_two_spellings_is_one_candidate(tmp_path, warmed, monkeypatch):
    """The right one in the problem's spelling: a rival that means the same would make the right answer doubtful."""
    trainer = trainer_of(tmp_path, "attribution.source=probe", "credit.scope=all", "credit.mask=none", "rollout.group_size=4", weights=warmed)
    batch, _, attribution, _, _ = rolled_out(trainer)
    given = iter(["2", " 2.", "3", "3.0"] * (len(batch) // 4))
    monkeypatch.setattr(attributors, "extract_answer", lambda text, how: next(given))
    seen = []
    monkeypatch.setattr(attributors, "group_candidates", lambda right, own: seen.append((right, own)) or group_candidates(right, own))
    right = trainer.prompts.encode("2")
    outcome, every = torch.zeros(len(batch)), torch.ones_like(attribution.rows)
    trainer.attributors._probe(batch, outcome, every, [right] * len(batch))
    assert len(seen) == len(batch) and all(group_candidates(*one) == [right, trainer.prompts.encode("3")] for one in seen)
    seen.clear()
    given = iter(["1/2", "\\frac12", "3", "4"] * (len(batch) // 4))
    outcome[[i for i in range(len(batch)) if i % 4 < 2]] = 1.0  # what only the verifier knows to be the right answer is no rival of it
    trainer.attributors._probe(batch, outcome, every, [right] * len(batch))
    assert all(group_candidates(*one) == [right, trainer.prompts.encode("3"), trainer.prompts.encode("4")] for one in seen)
    seen.clear()
    trainer.config.verify.after = "</think>"  # which no rollout has: none gives an answer
    trainer.attributors._probe(batch, torch.zeros(len(batch)), every, [right] * len(batch))
    assert all(group_candidates(*one) == [right] for one in seen)


def test_no_branch_stands_beyond_the_last_position(tmp_path, warmed, monkeypatch):
    """Boundaries so near a policy's end that an answer does not fit behind them take the value of the one before; without any nothing is read."""
    trainer = trainer_of(tmp_path, "attribution.source=probe", "credit.scope=all", "credit.mask=none", "rollout.group_size=4", weights=warmed)
    batch, *_ = rolled_out(trainer)
    every, answers = torch.ones(len(batch), dtype=torch.bool), [trainer.prompts.encode("2")] * len(batch)
    outcome = torch.zeros(len(batch))
    packed = []
    read = type(trainer.policy).branch_logp
    monkeypatch.setattr(type(trainer.policy), "branch_logp", lambda self, found, *a: packed.extend(found) or read(self, found, *a))
    whole = trainer.attributors._probe(batch, outcome, every, answers)
    furthest = max(int(p.positions.max()) for p in packed)
    most = furthest  # one less than what the longest needs
    monkeypatch.setattr(type(trainer.policy), "positions", property(lambda self: most))
    packed.clear()
    fewer = trainer.attributors._probe(batch, outcome, every, answers)
    assert packed and max(int(p.positions.max()) for p in packed) < most
    assert not torch.equal(whole.evidence, fewer.evidence) and torch.equal(whole.rows, fewer.rows)
    same = [b for b in range(len(batch)) if torch.equal(*(e.evidence[slice(*batch.segments.sequence_offsets[b : b + 2])] for e in (whole, fewer)))]
    assert len(same) > 0, "the shorter ones are read as before"
    most = 3
    nothing = trainer.attributors._probe(batch, outcome, every, answers)
    assert not nothing.rows.any() and not nothing.evidence.any()


def test_posterior_by_hand():
    logp = torch.tensor([[0.2, 0.2, 0.6], [0.5, 0.25, 0.25], [0.01, 0.01, 0.02]]).log()
    wanted = [math.log(0.5 / 0.5) - math.log(0.2 / 0.8), math.log(0.01 / 0.03) - math.log(0.2 / 0.8)]
    assert posterior_evidence(logp).tolist() == pytest.approx(wanted, abs=1e-6)
    torch.testing.assert_close(posterior_evidence(logp + 3.0), posterior_evidence(logp))


def test_the_probe_in_the_loop(tmp_path, warmed):
    """The answers of a group are its candidates; its price is counted; what it says is what separate forwards say."""
    settings = "attribution.source=probe", "credit.scope=all", "credit.mask=none", "attribution.probe_suffix=A", "rollout.group_size=8"
    trainer = trainer_of(tmp_path, *settings, "loss.kl_weight=0", weights=warmed)
    batch, _, attribution, _, _ = rolled_out(trainer)
    assert attribution.rows.any() and trainer.counters["tokens/forward_extra"] == trainer.attributors.extra_tokens > 0
    problem = {tuple(trainer.prompts.prompt(p.prompt)): p for p in trainer.train_problems}
    answers = [trainer.prompts.encode(problem[tuple(p)].answer) for p in batch.prompts]
    evidence = trainer.attributors._probe(batch, torch.zeros(len(batch)), attribution.rows, answers)
    b = int(attribution.rows.nonzero()[0])
    first, last = batch.segments.sequence_offsets[b], batch.segments.sequence_offsets[b + 1] - 1
    right, values = trainer.prompts.encode(problem[tuple(batch.prompts[b])].answer), []
    texts = trainer.tokenizer.batch_decode(batch.responses()[b // 8 * 8 : b // 8 * 8 + 8], skip_special_tokens=True)
    others = group_candidates(right, [trainer.prompts.encode(t.rpartition("\nA")[2]) for t in texts])
    for end in (0, int(batch.segments.token_offsets[last + 1] - batch.segments.token_offsets[first])):
        prompt = [*batch.prompts[b], *batch.responses()[b][:end].tolist(), *trainer.prompts.encode("A")]
        logp = [trainer.policy.score(trainer.policy.hidden([prompt], [torch.tensor(a)]), torch.tensor(a), 1.0).logp.sum().item() for a in others]
        values.append(logp[0] - math.log(sum(map(math.exp, logp[1:]))))
    assert evidence.evidence[last].item() == pytest.approx(values[1] - values[0], abs=1e-4)


# --- refused ------------------------------------------------------------------------------------------------------------------------


def test_flash_attention_takes_no_mask_of_branches(tmp_path):
    with pytest.raises(ConfigError, match=r"attribution.source = 'probe' needs policy.attention = 'sdpa' or 'eager'"):
        settings(tmp_path, "attribution.source=tree,probe", "policy.attention=flash_attention_2")
    settings(tmp_path, "attribution.source=tree", "policy.attention=flash_attention_2")


SHAPE = dict(
    vocab_size=258, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
    pad_token_id=0, eos_token_id=1, bos_token_id=None,
)  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "window"),
    [
        (MistralConfig(**SHAPE, sliding_window=8), r"sliding_window = 8"),
        (Gemma2Config(**SHAPE, head_dim=8, sliding_window=8), "layer_types hold 'sliding_attention'"),
        (GptOssConfig(**SHAPE, head_dim=8, num_local_experts=2, num_experts_per_tok=1), "layer_types hold 'sliding_attention'"),
        (Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=8, max_window_layers=1), "layer_types hold 'sliding_attention'"),
        (Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=8, max_window_layers=2), ""),
        (Qwen2Config(**SHAPE, sliding_window=8), ""),
        (MistralConfig(**SHAPE, sliding_window=None), ""),
    ],
    ids=["Mistral", "Gemma2", "gpt-oss", "Qwen2 above a layer", "Qwen2 above its last layer", "Qwen2 unused", "Mistral without"],
)
def test_a_sliding_window_is_refused_where_it_is_active(tmp_path, shape, window):
    AutoModelForCausalLM.from_config(shape).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    model = "policy.from_config=", f"policy.path={tmp_path / 'model'}", "policy.attention=eager"  # gpt-oss has no other
    if window:
        with pytest.raises(ConfigError, match=rf"'probe' cannot be used with .*ForCausalLM: its attention has a window \({window}\)"):
            trainer_of(tmp_path, *model, "attribution.source=tree,probe")
        trainer_of(tmp_path, *model, "attribution.source=tree").close()
    else:
        trainer_of(tmp_path, *model, "attribution.source=tree,probe").close()
