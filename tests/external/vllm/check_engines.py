"""Both engines against vLLM itself: log-probs of plain transformers forwards behind every weight update, whole training runs, a server that dies.
Run by run.sh."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from acpo import config
from acpo.policy import Policy
from acpo.rollout import RolloutError
from acpo.rollout.server import ServerEngine
from acpo.synthetic import tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from fake_vllm import FakeVLLM

EOS = [1, 2]
LONG = [3 + i % 40 for i in range(300)]  # longer than a block of the prefix cache
PROMPTS = [[3, 4, 5, 6]] * 3 + [[7, 8, 9]] * 3 + [LONG] * 4
BASE = "problems.task=chain", "policy.from_config=tiny"
VLLM = "rollout.vllm.gpu_memory_utilization=0.1", "rollout.vllm.max_model_len=512", "rollout.vllm.enforce_eager=true"
MINI = """
name: mini
problems: {task: chain, steps: 2, modulus: 4, train: 40, held_out: 16, hard: 0.8, wrong_low: 0.5, wrong_high: 0.7}
warmup: {steps: 60, batch: 32}
rollout: {prompts: 4, group_size: 4, max_new_tokens: 14, vllm: {gpu_memory_utilization: 0.1, max_model_len: 512, enforce_eager: true}}
verify: {extract: line}
segmenter: {min_tokens: 2, max_tokens: 32, max_segments: 16, target_tokens: 4, entropy: false}
optimizer: {learning_rate: 3.0e-4}
trainer: {steps: 3, threads: 1, checkpoint_every: 1, eval_every: 2}
eval: {samples: 2}
"""


def small_model() -> Qwen2ForCausalLM:
    """vLLM's attention on CPU wants heads of 64 and no fewer."""
    characters = tokenizer()
    torch.manual_seed(0)
    shape = Qwen2Config(
        vocab_size=len(characters), hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=512, tie_word_embeddings=True, initializer_range=0.1, bos_token_id=None,
        eos_token_id=characters.eos_token_id, pad_token_id=characters.pad_token_id,
    )  # fmt: skip
    return Qwen2ForCausalLM(shape)


@pytest.fixture
def policy() -> Policy:
    return Policy(small_model(), 0)


def settings(*overrides: str):
    return config.load(None, [*BASE, *VLLM, "rollout.engine=vllm_server", "rollout.server.start_timeout=1800", *overrides]).rollout


@pytest.fixture(params=["vllm", "vllm_server"])
def engine(request, policy, tmp_path):
    if request.param == "vllm":
        from acpo.rollout.vllm import VLLMEngine

        made = VLLMEngine(policy, EOS, settings().vllm, tmp_path)
    else:
        made = ServerEngine(policy, EOS, settings(), tmp_path)
    yield made
    made.close()


def generate(engine, *, new=30, temperature=1.0, seed=0, prompts=PROMPTS):
    return engine.generate(prompts, max_new_tokens=new, temperature=temperature, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def worst(policy, prompts, samples, temperature) -> float:
    """The largest difference from one plain transformers forward a rollout, in float64 behind the logits."""
    out = 0.0
    for prompt, sample in zip(prompts, samples, strict=True):
        logits = policy.model(torch.tensor([[*prompt, *sample.ids.tolist()]])).logits[0, len(prompt) - 1 : -1].double()
        logp = torch.log_softmax(logits / (temperature or 1.0), -1).gather(1, sample.ids.unsqueeze(1)).squeeze(1)
        out = max(out, float((logp - sample.logp).abs().max()))
    return out


def shake(policy) -> None:
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    policy.changed()


def test_log_probs_behind_every_weight_update(engine, policy):
    name = type(engine).__name__
    for update in range(4):
        for temperature in (1.0, 0.7, 0.0):
            samples = generate(engine, temperature=temperature, seed=update)
            found = worst(policy, PROMPTS, samples, temperature)
            print(f"\n{name}: {update} updates, temperature {temperature}: largest |log-prob - transformers| {found:.1e}", end="")
            assert found < 1e-4
            if temperature == 0:
                assert len({tuple(s.ids.tolist()) for s in samples}) <= 3, "greedy rollouts of one prompt are one"
            else:
                again = generate(engine, temperature=temperature, seed=update)
                assert all(torch.equal(a.ids, b.ids) for a, b in zip(samples, again, strict=True)), "the seeds decide"
                longer = [tuple(s.ids.tolist()) for s in samples if len(s.ids) > 3]  # two may both end at once
                assert len(set(longer)) == len(longer) > 1, "each rollout has its own"
        assert {s.finished for s in generate(engine, temperature=1.0)} == {True, False}
        before = {n: p.clone() for n, p in policy.named_parameters()}
        shake(policy)
        assert worst(policy, PROMPTS, samples, 0.0) > 1e-2, "an update that changes nothing would show nothing"
        assert any(not torch.equal(before[n], p) for n, p in policy.named_parameters())


def test_samples_of_one_prompt_share_its_prefix_until_the_weights_change(policy, tmp_path):
    from acpo.rollout.vllm import VLLMEngine

    engine = VLLMEngine(policy, EOS, settings().vllm, tmp_path)
    cached: list[int] = []
    step = engine.llm.llm_engine.step

    def watching():
        outputs = step()
        cached.extend(output.num_cached_tokens for output in outputs)
        return outputs

    engine.llm.llm_engine.step = watching
    for _ in range(2):
        cached.clear()
        generate(engine, prompts=[LONG] * 4)
        block = max(cached)
        print(f"\nprompt tokens from the prefix cache, of {len(LONG)}: {sorted(cached)}", end="")
        assert sorted(cached) == [0, block, block, block] and block >= 128, "computed once a group, and anew behind an update"
        shake(policy)
    engine.close()


def test_a_bfloat16_engine_and_the_metric_that_tells(policy, tmp_path):
    from acpo.rollout.vllm import VLLMEngine

    chosen = settings("rollout.vllm.dtype=bfloat16").vllm
    engine = VLLMEngine(policy, EOS, chosen, tmp_path)
    found = worst(policy, PROMPTS, generate(engine), 1.0)
    print(f"\nbfloat16 engine, float32 policy: largest difference {found:.1e}", end="")
    assert 1e-4 < found < 0.5
    engine.close()


def test_a_server_given_by_url_and_one_that_is_killed(policy, tmp_path):
    first = ServerEngine(policy, EOS, settings("rollout.server.retries=1", "rollout.server.concurrency=2"), tmp_path)
    second = ServerEngine(policy, EOS, settings(f"rollout.server.url={first.client.url}"), tmp_path / "second")
    samples = generate(second, seed=3)
    assert worst(policy, PROMPTS, samples, 1.0) < 1e-4
    with pytest.raises(RolloutError, match=r"and not '\w+-0' that were sent to it"):
        first.loaded = policy.version  # it believes that the server still holds its own weights
        generate(first)
    first.loaded = None
    generate(first)
    done = {}
    many = PROMPTS * 20

    class Killing(dict):
        def __setitem__(self, place, sample):
            super().__setitem__(place, sample)
            done[place] = sample
            if len(done) == 10:
                os.killpg(first.process.process.pid, signal.SIGKILL)
                first.process.process.wait()

    with pytest.raises(RolloutError, match=r"ended with exit code -9; .*rollouts are finished and kept"):
        first.generate(many, max_new_tokens=30, temperature=1.0, generator=torch.Generator().manual_seed(0), done=Killing())
    assert 10 <= len(done) < len(many)
    assert worst(policy, [many[i] for i in done], list(done.values()), 1.0) < 1e-4
    first.close()


def test_no_server_outlives_its_trainer(tmp_path):
    """Not even one that was killed."""
    program = textwrap.dedent(
        """
        import sys, time
        sys.path.insert(0, sys.argv[2])
        from pathlib import Path
        import check_engines as c
        from acpo.policy import Policy
        made = c.ServerEngine(Policy(c.small_model(), 0), c.EOS, c.settings(), Path(sys.argv[1]))
        print(made.process.process.pid, flush=True)
        time.sleep(600)
        """
    )
    parent = subprocess.Popen([sys.executable, "-c", program, str(tmp_path), str(Path(__file__).parent)], stdout=subprocess.PIPE, text=True)
    server = int(parent.stdout.readline())
    group = [int(p) for p in subprocess.check_output(["ps", "-o", "pid=", "-g", str(server)], text=True).split()]
    assert server in group and len(group) > 1, "the server and its worker"
    parent.kill()
    parent.wait()
    end = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in group) and time.monotonic() < end:
        time.sleep(0.5)
    assert not [pid for pid in group if Path(f"/proc/{pid}").exists()]


def test_a_server_that_cannot_start(policy, tmp_path):
    broken = settings("rollout.vllm.gpu_memory_utilization=0.0001")
    with pytest.raises(
        RolloutError, match=r"the vLLM server did not start: it ended with exit code \d+; the last error in .*server\.log is .*Error: .*memory"
    ) as caught:
        ServerEngine(policy, EOS, broken, tmp_path)
    print(f"\n{caught.value}", end="")


@pytest.mark.parametrize("engine_name", ["vllm", "vllm_server"])
def test_three_whole_steps(tmp_path, engine_name):
    model, characters = small_model(), tokenizer()
    for part in (model, characters):
        part.save_pretrained(tmp_path / "policy")
    (tmp_path / "mini.yaml").write_text(MINI)
    command = [
        sys.executable, "-m", "acpo.cli", "train", str(tmp_path / "mini.yaml"), f"policy.path={tmp_path / 'policy'}", "policy.device=cpu",
        f"run_dir={tmp_path / 'run'}", f"rollout.engine={engine_name}",
    ]  # fmt: skip
    finished = subprocess.run(command, capture_output=True, text=True, timeout=3600)
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-3000:]
    found = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [r for r in found if r["phase"].startswith("stage")]
    assert [r["step"] for r in steps] == [1, 2, 3]
    for r in steps:
        print(
            f"\n{engine_name} step {r['step']}: |log-prob difference| mean {r['sampling/logp_difference']:.1e}"
            f" max {r['sampling/logp_difference_max']:.1e}"
            f" KL {r['sampling/kl']:.1e} ESS {r['sampling/ess']:.6f}; sync {r['time/sync']:.3f} s, rollout {r['time/rollout']:.3f} s",
            end="",
        )
        assert r["sampling/logp_difference_max"] < 1e-4 and r["sampling/ess"] > 0.9999
        assert r["grad_norm"] > 0
    assert not subprocess.run(["pgrep", "-f", f"--model {tmp_path}"], capture_output=True).stdout, "the server ended with the run"


def test_nccl_calls_of_vllms_own_sender(policy, tmp_path, monkeypatch):
    """The transfer between GPUs cannot run here. Its control calls can: vLLM's sender, its endpoint and its broadcast replaced, against a
    server that records."""
    from vllm.distributed.weight_transfer import nccl_engine

    fake = FakeVLLM(policy, EOS)
    answer = fake.answer
    fake.answer = lambda path, payload: {"world_size": 2} if path == "/get_world_size" else {} if path == "/update_weights" else answer(path, payload)
    opened, sent = [], []
    monkeypatch.setattr(nccl_engine, "open_trainer_endpoint", lambda info: opened.append(info))
    monkeypatch.setattr(
        nccl_engine.NCCLTrainerWeightTransferEngine, "_broadcast",
        lambda self, source, meta: sent.extend((m.name, t) for m, (_, t) in zip(meta, self._checked_iter(source, meta), strict=True)),
    )  # fmt: skip
    engine = ServerEngine(
        policy, EOS, settings(f"rollout.server.url={fake.url}", "rollout.server.transfer=nccl", "rollout.vllm.dtype=bfloat16"), tmp_path
    )
    engine.sync()
    (info,) = opened
    assert info.world_size == 3 and info.rank == 0 and info.master_address == "127.0.0.1"
    (init,) = fake.asked("/init_weight_transfer_engine")
    wanted = {"world_size": 3, "rank_offset": 1, "master_address": "127.0.0.1", "master_port": info.master_port, "packed": True}
    assert {name: init["init_info"][name] for name in wanted} == wanted
    calls = [path for path, _ in fake.calls if "/v1" not in path and "info" not in path and path != "/get_world_size"]
    update = ["/pause?mode=abort", "/start_weight_update", "/update_weights", "/finish_weight_update", "/reset_prefix_cache", "/resume"]
    assert calls == ["/init_weight_transfer_engine", *update]
    (told,) = (p["update_info"] for p in fake.asked("/update_weights"))
    expected = dict(policy.weights())
    assert told["names"] == list(expected) == [name for name, _ in sent] and set(told["dtype_names"]) == {"bfloat16"}
    assert told["shapes"] == [list(v.shape) for v in expected.values()]
    assert all(torch.equal(tensor, expected[name].bfloat16()) for name, tensor in sent)
    engine.close()
    fake.close()
