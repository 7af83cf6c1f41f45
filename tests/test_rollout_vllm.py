"""The engine `vllm` against a stand-in for the package: the order of its calls and what it believes. The package itself: tests/external/vllm."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from acpo import config
from acpo.config import ConfigError
from acpo.policy import Policy, build
from acpo.rollout import RolloutError, request_seeds
from acpo.rollout.local import LocalEngine
from acpo.rollout.settings import VLLMConfig

EOS = [1, 2, 3]
PROMPTS = [[3, 4, 5], [6], [3, 4, 5], [13, 14]]


@pytest.fixture(autouse=True)
def one_thread(deterministic):
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def policy() -> Policy:
    torch.manual_seed(3)
    return build(config.load(None, ["problems.task=chain", "policy.from_config=tiny", "policy.device=cpu"]))[0]


class FakeLLM:
    """vllm.LLM as far as the engine uses it; samples by the local engine, finishes one request a step, last one first."""

    policy: Policy
    spoil = staticmethod(lambda output: None)

    def __init__(self, **settings):
        self.settings, self.calls, self.queue, self.cleared = settings, [], {}, True
        torch.manual_seed(settings["seed"])  # as vLLM does
        self.model_config = SimpleNamespace(max_model_len=settings["max_model_len"] or 32768)
        self.renderer = SimpleNamespace(render_cmpl=lambda prompts: [p["prompt_token_ids"] for p in prompts])
        self.engine_core = SimpleNamespace(shutdown=lambda: self.calls.append("shutdown"))
        self.llm_engine = self

    def __getattr__(self, name):
        return lambda *a, **k: self.calls.append((name, *a, *k.values()))

    def update_weights(self, request):
        (weights,) = sys.modules["acpo.rollout.worker"].handed_over
        self.calls.append(("update_weights", sum(1 for _ in weights)))

    def reset_prefix_cache(self):
        self.calls.append(("reset_prefix_cache",))
        return self.cleared

    def add_request(self, name, prompt, params):
        self.queue[name] = prompt, params

    def has_unfinished_requests(self):
        return bool(self.queue)

    def step(self):
        name, (prompt, params) = self.queue.popitem()
        engine = LocalEngine(self.policy, params.stop_token_ids, 1 << 20)
        generator = torch.Generator().manual_seed(params.seed)
        (sample,) = engine.generate([prompt], max_new_tokens=params.max_tokens, temperature=params.temperature, generator=generator)
        ids = sample.ids.tolist()
        logprobs = [{i: SimpleNamespace(logprob=p)} for i, p in zip(ids, sample.logp.tolist(), strict=True)]
        output = SimpleNamespace(token_ids=ids, logprobs=logprobs, finish_reason="stop" if sample.finished else "length")
        self.spoil(output)
        return [SimpleNamespace(request_id=name, outputs=[output])]


@pytest.fixture
def make(policy, tmp_path, monkeypatch):
    vllm, parameters, worker = ModuleType("vllm"), ModuleType("vllm.sampling_params"), ModuleType("acpo.rollout.worker")
    vllm.LLM = type("LLM", (FakeLLM,), {"policy": policy})
    vllm.SamplingParams = lambda **settings: SimpleNamespace(**settings)
    parameters.RequestOutputKind = SimpleNamespace(FINAL_ONLY="final")
    worker.handed_over = []
    for module in (vllm, parameters, worker):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    import acpo.rollout

    monkeypatch.setattr(acpo.rollout, "worker", worker, raising=False)
    from acpo.rollout.vllm import VLLMEngine

    return lambda **settings: VLLMEngine(policy, EOS, VLLMConfig(**settings), tmp_path)


def generate(engine, *, new=8, temperature=1.0, seed=0, done=None):
    return engine.generate(PROMPTS, max_new_tokens=new, temperature=temperature, generator=torch.Generator().manual_seed(seed), done=done)


UPDATE = ["start_weight_update", "update_weights", "finish_weight_update", "reset_prefix_cache"]


def names(engine) -> list[str]:
    return [call[0] if isinstance(call, tuple) else call for call in engine.llm.calls if call[0] != "abort_request"]


def test_settings_reach_vllm(make, policy, tmp_path):
    before = torch.get_rng_state()
    engine = make(gpu_memory_utilization=0.4, max_model_len=64, tensor_parallel_size=1, enforce_eager=True, seed=9, dtype="bfloat16", sleep=True)
    assert torch.equal(torch.get_rng_state(), before), "the run's random numbers are its own"
    given = engine.llm.settings
    assert given["model"] == str(tmp_path / "vllm") and (tmp_path / "vllm" / "config.json").exists()
    wanted = dict(
        gpu_memory_utilization=0.4, max_model_len=64, tensor_parallel_size=1, enforce_eager=True, seed=9, dtype="bfloat16", enable_sleep_mode=True
    )
    assert {name: given[name] for name in wanted} == wanted
    assert given["logprobs_mode"] == "processed_logprobs" and given["enable_prefix_caching"] and given["generation_config"] == "vllm"
    assert make().llm.settings["dtype"] == "float32", "auto is the policy's"


def test_weights_are_loaded_when_they_have_changed_and_the_cache_is_emptied(make, policy):
    engine = make()
    generate(engine)
    generate(engine)
    assert names(engine) == ["init_weight_transfer_engine", *UPDATE]
    policy.changed()
    generate(engine)
    engine.sync()
    assert names(engine) == ["init_weight_transfer_engine", *UPDATE, *UPDATE]
    assert {call[1] for call in engine.llm.calls if call[0] == "update_weights"} == {sum(1 for _ in policy.weights())}
    policy.changed()
    engine.llm.cleared = False
    with pytest.raises(RolloutError, match="kept its prefix cache over a weight update"):
        generate(engine)


def test_sleep_gives_memory_back_and_takes_fresh_weights(make):
    engine = make(sleep=True)
    generate(engine)
    generate(engine)
    calls = [call for call in engine.llm.calls if call[0] in ("sleep", "wake_up", "update_weights", "reset_prefix_cache")]
    assert [c[0] for c in calls] == [
        "update_weights",
        "reset_prefix_cache",
        "sleep",
        "wake_up",
        "update_weights",
        "wake_up",
        "reset_prefix_cache",
        "sleep",
    ]
    assert calls[2] == ("sleep", 2), "level 1 would keep a copy of the weights on the host"
    assert calls[3] == ("wake_up", ["weights"]) and calls[5] == ("wake_up", ["kv_cache"])


def test_requests_and_their_order(make, policy):
    engine = make()
    asked = {}
    add = engine.llm.add_request
    engine.llm.add_request = lambda name, prompt, params: (asked.__setitem__(name, (prompt, params)), add(name, prompt, params))
    samples = generate(engine, new=9, temperature=0.7, seed=4)
    seeds = request_seeds(4, torch.Generator().manual_seed(4))
    for i, (prompt, sample) in enumerate(zip(PROMPTS, samples, strict=True)):
        given, params = asked[str(i)]
        assert given == prompt and vars(params) == dict(
            temperature=0.7, max_tokens=9, seed=seeds[i], logprobs=0, stop_token_ids=EOS, ignore_eos=True, detokenize=False, output_kind="final"
        )
        scored = policy.score(policy.hidden([prompt], [sample.ids]), sample.ids, 0.7).logp.detach()
        torch.testing.assert_close(sample.logp, scored, rtol=0, atol=1e-5)
    again = generate(engine, new=9, temperature=0.7, seed=4)
    assert all(torch.equal(a.ids, b.ids) for a, b in zip(samples, again, strict=True))


def test_finished_ones_are_kept_when_the_engine_fails(make):
    engine = make()
    wanted = generate(engine, seed=2)
    step, count, done = engine.llm.step, 0, {}

    def failing():
        nonlocal count
        count += 1
        if count > 2:
            raise RuntimeError("out of memory")
        return step()

    engine.llm.step = failing
    with pytest.raises(RuntimeError, match="out of memory"):
        generate(engine, seed=2, done=done)
    assert sorted(done) == [2, 3] and ("abort_request", ["0", "1"]) in engine.llm.calls
    engine.llm.step, engine.llm.queue = step, {}
    found = generate(engine, seed=2, done=done)
    assert all(torch.equal(a.ids, b.ids) for a, b in zip(wanted, found, strict=True))


def test_what_cannot_be_is_refused(make):
    engine = make()
    engine.llm.spoil = lambda output: setattr(output, "finish_reason", "abort")
    with pytest.raises(RolloutError, match="vLLM returned a rollout that cannot be: the finish reason must be 'stop' or 'length', got 'abort'"):
        generate(engine)


def test_a_prompt_too_long(make):
    with pytest.raises(RolloutError, match=r"rollout\.vllm\.max_model_len = 10, and a prompt of 3 tokens with rollout\.max_new_tokens = 8 needs 11"):
        generate(make(max_model_len=10))


def test_without_vllm(policy, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    from acpo.rollout.vllm import VLLMEngine

    with pytest.raises(ConfigError, match=r"rollout.engine = 'vllm' needs vLLM in this environment .*; docs/rollouts\.md says how to install it"):
        VLLMEngine(policy, EOS, VLLMConfig(), tmp_path)
    assert not list(tmp_path.iterdir())
