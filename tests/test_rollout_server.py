"""The HTTP engine against a stand-in for vLLM on 127.0.0.1: what it asks, what it believes, and what is left when the server fails.
Whole runs with a server: test_rollout_server_run.py."""

from __future__ import annotations

import base64
import json
import pickle
import threading
import time

import pytest
import torch
from fake_vllm import FakeVLLM

from acpo import config
from acpo.config import ConfigError
from acpo.policy import Policy, build
from acpo.rollout import RolloutError, checked_sample, request_seeds
from acpo.rollout.client import Client, NoAnswer, Refused
from acpo.rollout.server import ServerEngine

EOS = [1, 2, 3]
PROMPTS = [[3, 4, 5], [6], [7, 8, 9, 10], [13, 14], [3, 4, 5], [3, 4, 5]]


@pytest.fixture(autouse=True)
def one_thread(deterministic):
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def policy() -> Policy:
    torch.manual_seed(3)
    built, _ = build(config.load(None, ["problems.task=chain", "policy.from_config=tiny", "policy.device=cpu"]))
    with torch.no_grad():
        built.model.model.norm.weight.normal_(0.0, 3.2)
    return built


@pytest.fixture
def fake(policy):
    server = FakeVLLM(policy, EOS)
    yield server
    server.close()


@pytest.fixture
def engine(policy, fake, tmp_path):
    yield (made := engine_on(fake, policy, tmp_path))
    made.close()


def engine_on(fake: FakeVLLM, policy: Policy, tmp_path, *overrides: str) -> ServerEngine:
    base = "problems.task=chain", "policy.from_config=tiny", "rollout.engine=vllm_server", f"rollout.server.url={fake.url}"
    made = ServerEngine(policy, EOS, config.load(None, [*base, "rollout.server.timeout=60", *overrides]).rollout, tmp_path)
    made.first_wait = 0.01
    return made


def generate(engine, *, new=12, temperature=1.0, seed=0, done=None, prompts=PROMPTS):
    return engine.generate(prompts, max_new_tokens=new, temperature=temperature, generator=torch.Generator().manual_seed(seed), done=done)


def only(*paths: str, when=lambda count, payload: True):
    """misbehave on these paths alone."""
    return lambda how: lambda path, payload, count: how if path.partition("?")[0] in paths and when(count, payload) else None


COMPLETIONS = only("/v1/completions")
FIRST = only("/v1/completions", when=lambda count, _: count == 1)


# --- what is asked ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_rollouts_are_those_of_the_policy(engine, policy, fake, temperature):
    samples = generate(engine, temperature=temperature)
    assert {s.finished for s in samples} == {True, False} or temperature == 0
    for prompt, sample in zip(PROMPTS, samples, strict=True):
        scored = policy.score(policy.hidden([prompt], [sample.ids]), sample.ids, temperature or 1.0).logp
        torch.testing.assert_close(sample.logp, scored.detach(), rtol=0, atol=1e-5)
        assert sample.finished == (sample.ids[-1].item() in EOS)


def test_a_request_says_everything(engine, fake):
    generate(engine, new=7, temperature=0.6, seed=4)
    seeds = request_seeds(len(PROMPTS), torch.Generator().manual_seed(4))
    by_seed = {payload["seed"]: payload for payload in fake.asked("/v1/completions")}
    assert set(by_seed) == set(seeds) and len(seeds) == len(PROMPTS)
    for prompt, seed in zip(PROMPTS, seeds, strict=True):
        assert by_seed[seed] == {
            "model": "policy", "prompt": prompt, "max_tokens": 7, "temperature": 0.6, "seed": seed, "logprobs": 0, "return_token_ids": True,
            "return_tokens_as_token_ids": True, "stop_token_ids": EOS, "ignore_eos": True, "top_p": 1.0, "top_k": 0, "min_p": 0.0,
            "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
        }  # fmt: skip


def test_same_generator_same_rollouts_and_one_prompt_has_several(engine):
    one, two, other = (generate(engine, seed=seed) for seed in (5, 5, 6))
    assert all(torch.equal(a.ids, b.ids) and torch.equal(a.logp, b.logp) for a, b in zip(one, two, strict=True))
    assert any(not torch.equal(a.ids, b.ids) for a, b in zip(one, other, strict=True))
    assert len({tuple(one[i].ids.tolist()) for i in (0, 4, 5)}) == 3


def test_requests_run_beside_one_another_and_no_more_than_allowed(fake, policy, tmp_path):
    engine = engine_on(fake, policy, tmp_path, "rollout.server.concurrency=3")
    generate(engine, prompts=PROMPTS * 5)
    assert fake.busiest == 3
    engine.close()


# --- weights ------------------------------------------------------------------------------------------------------------------------


def weight_calls(fake: FakeVLLM) -> list[str]:
    return [path for path, _ in fake.calls if path.partition("?")[0] not in ("/v1/models", "/server_info", "/v1/completions", "/weight_info")]


def test_weights_are_sent_once_a_change_in_the_servers_own_protocol(engine, policy, fake, tmp_path):
    update = ["/pause?mode=abort", "/start_weight_update", "/update_weights", "/finish_weight_update", "/reset_prefix_cache", "/resume"]
    generate(engine)
    generate(engine)
    assert weight_calls(fake) == ["/init_weight_transfer_engine", *update]
    before = {name: value.clone() for name, value in policy.weights()}
    try:
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.add_(0.01)
        policy.changed()
        engine.sync()
        generate(engine)
        assert weight_calls(fake) == ["/init_weight_transfer_engine", *update, *update]
        for name, value in policy.weights():
            assert torch.equal(dict(fake.policy.weights())[name], value)
    finally:
        policy.model.load_state_dict(before, strict=False)
        policy.changed()
    assert not list((tmp_path / "vllm").iterdir()), "the file is gone when it is loaded"


def test_weights_go_in_pieces(engine, policy, fake, monkeypatch):
    monkeypatch.setattr("acpo.rollout.transfer.SHARD_BYTES", 40_000)
    engine.sync()
    sizes = [p["update_info"]["path"] for p in fake.asked("/update_weights")]
    assert len(sizes) > 3
    for name, value in policy.weights():
        assert torch.equal(dict(fake.policy.weights())[name], value)


def test_two_processes_do_not_load_each_others_weights(fake, policy, tmp_path):
    """The second one's whole update, and the first half of another, between the first one's writing and its server's reading."""
    first, second = (engine_on(fake, policy, tmp_path) for _ in range(2))
    asked, loaded = fake.answer, []

    def answer(path, payload):
        if path == "/update_weights":
            file = payload["update_info"]["path"]
            loaded.append(file)
            if len(loaded) == 1:
                second.sync()
                (tmp_path / "vllm" / "update.safetensors").write_bytes(b"half of another's")
                assert loaded[1] != file
        return asked(path, payload)

    fake.answer = answer
    first.sync()
    assert len(loaded) == 2 and [p.name for p in (tmp_path / "vllm").iterdir()] == ["update.safetensors"], "each removes its own file alone"
    for name, value in policy.weights():
        assert torch.equal(dict(fake.policy.weights())[name], value)
    first.close(), second.close()


def test_weights_travel_in_the_dtype_of_the_engine(fake, policy, tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr("fake_vllm.load_file", lambda path: (w := real(path), seen.update(w))[0])
    from safetensors.torch import load_file as real

    engine = engine_on(fake, policy, tmp_path, "rollout.vllm.dtype=bfloat16")
    engine.sync()
    assert {v.dtype for v in seen.values()} == {torch.bfloat16}
    engine.close()


@pytest.mark.parametrize("path", ["/start_weight_update", "/update_weights", "/finish_weight_update", "/pause", "/resume"])
def test_an_update_that_fails_is_an_error_and_is_made_again(engine, policy, fake, path):
    fake.misbehave = only(path)("status 500")
    with pytest.raises(RolloutError, match=rf"the vLLM server at http://127.0.0.1:\d+: {path}\S* answered 500: .*as asked for"):
        generate(engine)
    assert not fake.asked("/v1/completions")
    fake.misbehave = lambda *_: None
    before = len(fake.asked("/update_weights"))
    generate(engine)
    assert len(fake.asked("/update_weights")) == before + 1


def test_a_prefix_cache_that_outlives_its_weights_is_an_error(engine, fake):
    fake.misbehave = only("/reset_prefix_cache")('body {"success": false}')
    with pytest.raises(RolloutError, match="kept its prefix cache over a weight update"):
        generate(engine)


def test_a_server_that_lost_the_weights_is_found_out(engine, fake):
    """Restarted by somebody, it answers as if nothing had happened."""
    done = {}
    engine.sync()
    fake.version = "default"
    with pytest.raises(RolloutError, match=r"the server's weights are 'default' and not '\w+-\d+' that were sent to it: was it restarted\?"):
        generate(engine, done=done)
    assert done == {}, "rollouts of unknown weights are not kept"


def test_ipc_handles_are_pickled_for_json():
    from acpo.rollout.transfer import json_safe

    update = {"names": ["w"], "ipc_handles": {"GPU-1": (1, (2, 3))}, "tensor_sizes": [4]}
    (sent,) = json_safe([update])
    assert json.loads(json.dumps(sent)) == sent and "ipc_handles" not in sent and sent["names"] == ["w"]
    assert pickle.loads(base64.b64decode(sent["ipc_handles_pickled"])) == update["ipc_handles"]
    assert json_safe({"names": []}) == {"names": []}


# --- what is believed ---------------------------------------------------------------------------------------------------------------

GOOD = dict(ids=[5, 6, 1], logp=[-0.5, -1e-9, 0.0], reason="stop")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": [5, 90, 1]}, r"integers in \[0, 90\), got 90"), ({"ids": [5, -1, 1]}, "got -1"), ({"ids": [5, 1.0, 1]}, "got 1.0"),
        ({"ids": [5, True, 1]}, "got True"), ({"ids": ["5", 6, 1]}, "got '5'"), ({"ids": "561"}, "must be lists, got str and list"),
        ({"ids": None}, "must be lists, got NoneType"), ({"ids": [], "logp": []}, "1 to max_new_tokens = 3 tokens, got 0"),
        ({"ids": [5, 6, 7, 1], "logp": [-1.0] * 4}, "1 to max_new_tokens = 3 tokens, got 4"),
        ({"logp": [-0.5, -0.5]}, "a log-prob for each of the 3 tokens, got 2"),
        ({"logp": [-0.5, float("nan"), 0.0]}, "finite and at most 0, got nan"),
        ({"logp": [-0.5, -float("inf"), 0.0]}, "got -inf"), ({"logp": [-0.5, 1e-6, 0.0]}, "got 1e-06"), ({"logp": [-0.5, None, 0.0]}, "got None"),
        ({"logp": [-0.5, True, 0.0]}, "got True"), ({"logp": [-0.5, "-1", 0.0]}, "got '-1'"),
        ({"reason": "abort"}, "finish reason must be 'stop' or 'length', got 'abort'"), ({"reason": None}, "got None"),
        ({"reason": ["stop"]}, r"got \['stop'\]"),
        ({"ids": [5, 6, 7]}, "must hold one end token, its last"), ({"ids": [5, 1, 1]}, "must hold one end token, its last"),
        ({"reason": "length"}, "no end token, got 3"), ({"ids": [5, 6], "logp": [-1.0, -1.0], "reason": "length"}, "must have max_new_tokens = 3"),
    ],
)  # fmt: skip
def test_what_no_rollout_is(change, message):
    limits = {"vocab_size": 90, "eos_ids": EOS, "max_new_tokens": 3, "device": torch.device("cpu")}
    ids, logp, reason = {**GOOD, **change}.values()
    with pytest.raises(ValueError, match=message):
        checked_sample(ids, logp, reason, **limits)
    sample = checked_sample(*GOOD.values(), **limits)
    assert sample.ids.tolist() == GOOD["ids"] and sample.logp.dtype == torch.float32 and sample.finished
    assert not checked_sample([5, 6, 7], [-1.0] * 3, "length", **limits).finished


BAD = [
    "status 500", "status 503", "status 429", "drop", "truncate", "lie", "body ", "body null", "body []", "body {", 'body {"choices": []}',
    'body {"choices": [{}, {}]}', "body " + "[" * 2000, "body " + "9" * 5000, 'choice {"token_ids": [100000]}', 'choice {"token_ids": null}',
    'choice {"logprobs": null}', 'choice {"logprobs": {"token_logprobs": [NaN]}}', 'choice {"finish_reason": "abort"}',
    'choice {"prompt_token_ids": [3, 4]}',
]  # fmt: skip


@pytest.mark.parametrize("how", BAD)
def test_a_bad_answer_is_asked_again_and_the_rollouts_are_the_same(engine, fake, how):
    wanted = generate(engine)
    fake.calls.clear()
    fake.misbehave = FIRST(how)
    for a, b in zip(wanted, generate(engine), strict=True):
        assert torch.equal(a.ids, b.ids) and torch.equal(a.logp, b.logp) and a.finished == b.finished
    assert len(fake.asked("/v1/completions")) == len(PROMPTS) + 1


@pytest.mark.parametrize("how", BAD)
def test_bad_answers_without_end_are_an_error(fake, policy, tmp_path, how):
    engine = engine_on(fake, policy, tmp_path, "rollout.server.retries=1")
    engine.first_wait = 0.01
    fake.misbehave = COMPLETIONS(how)
    with pytest.raises(RolloutError, match=r"/v1/completions.*, asked 2 times; 0 of 6 rollouts are finished and kept$") as caught:
        generate(engine)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700
    engine.close()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("status 400", "answered 400: .*as asked for"),
        ("status 404", "answered 404"),
        ("status 401", "answered 401"),
        ("redirect 302", "answered 302: redirects are not followed"),
        ("redirect 307", "answered 307: redirects are not followed"),
        ("redirect 308", "answered 308: redirects are not followed"),
    ],
)
def test_refusals_and_redirects_are_not_asked_again(engine, fake, how, message):
    engine.sync()
    fake.misbehave = FIRST(how)
    done = {}
    with pytest.raises(RolloutError, match=message):
        generate(engine, done=done)
    assert 0 < len(done) < len(PROMPTS), "those under way were finished"
    assert not fake.asked("/elsewhere") and len(fake.asked("/v1/completions")) <= len(PROMPTS)


@pytest.mark.parametrize("how", ["hang 30", "drip 30"])
def test_an_answer_has_a_limit_of_time(fake, policy, tmp_path, how):
    engine = engine_on(fake, policy, tmp_path, "rollout.server.timeout=2", "rollout.server.retries=0")
    fake.misbehave = FIRST(how)
    begin = time.monotonic()
    with pytest.raises(RolloutError, match=r"/v1/completions was not answered within 2 seconds, asked 1 times; 5 of 6"):
        generate(engine)
    assert time.monotonic() - begin < 15, "the whole answer, however its bytes drip in"
    engine.close()


def test_an_answer_has_a_limit_of_bytes(fake, policy, tmp_path):
    engine = engine_on(fake, policy, tmp_path, "rollout.server.retries=0")
    fake.misbehave = FIRST("huge 4000")  # 262 MB
    begin = time.monotonic()
    with pytest.raises(RolloutError, match=r"/v1/completions answered more than 7\d,\d{3} bytes"):
        generate(engine)
    assert time.monotonic() - begin < 5
    engine.close()


@pytest.mark.parametrize("url", ["127.0.0.1:80", "ftp://127.0.0.1", "http://", "http://h:port", "http://u:p@h", "http://h/?a=1", "http://h:99999"])
def test_what_no_url_is(url):
    with pytest.raises(ConfigError, match=r"rollout.server.url must be http://host:port, got ") as caught:
        Client(url)
    assert "\n" not in str(caught.value)


def test_proxies_of_the_environment_are_not_used(engine, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert len(generate(engine)) == len(PROMPTS)


def test_meeting_a_server(fake, policy, tmp_path):
    cases = [
        ("/v1/models", "body {}", RolloutError, "does not name a model and its max_model_len: is this a vLLM server"),
        ("/v1/models", 'body {"data": [{"id": 3, "max_model_len": 9}]}', RolloutError, "does not name a model"),
        ("/server_info", "status 404", RolloutError, "answered 404: .*VLLM_SERVER_DEV_MODE=1"),
        ("/server_info", "body {}", RolloutError, "does not tell logprobs_mode: .*VLLM_SERVER_DEV_MODE=1"),
        ("/init_weight_transfer_engine", "status 500", RolloutError, "/init_weight_transfer_engine answered 500"),
    ]
    for path, how, error, message in cases:
        fake.misbehave = only(path)(how)
        with pytest.raises(error, match=message):
            engine_on(fake, policy, tmp_path)
    fake.misbehave = lambda *_: None
    fake.mode = "raw_logprobs"
    with pytest.raises(ConfigError, match="must run with --logprobs-mode processed_logprobs, got 'raw_logprobs'"):
        engine_on(fake, policy, tmp_path)


def test_a_prompt_too_long_for_the_server(engine, fake):
    engine.most = 15
    with pytest.raises(RolloutError, match=r"max_model_len = 15, and a prompt of 4 tokens with rollout\.max_new_tokens = 12 needs 16"):
        generate(engine)
    assert not fake.asked("/v1/completions")


# --- what is kept -------------------------------------------------------------------------------------------------------------------


def test_only_the_missing_ones_are_asked_for(engine, fake):
    wanted = generate(engine, seed=3)
    fake.calls.clear()
    done = {i: wanted[i] for i in (0, 3, 5)}
    found = generate(engine, seed=3, done=done)
    seeds = request_seeds(len(PROMPTS), torch.Generator().manual_seed(3))
    assert {p["seed"] for p in fake.asked("/v1/completions")} == {seeds[i] for i in (1, 2, 4)}
    assert all(torch.equal(a.ids, b.ids) for a, b in zip(wanted, found, strict=True)) and set(done) == set(range(6))


def test_a_server_that_dies_in_the_middle(fake, policy, tmp_path):
    engine = engine_on(fake, policy, tmp_path, "rollout.server.concurrency=2", "rollout.server.retries=2")
    prompts = PROMPTS * 4
    dying = threading.Event()

    def die(path, payload, count):
        if path == "/v1/completions" and count > 7:
            dying.set()
        return "drop" if dying.is_set() else None

    fake.misbehave = die
    done = {}
    with pytest.raises(RolloutError, match=r"asked 3 times; 7 of 24 rollouts are finished and kept"):
        generate(engine, prompts=prompts, done=done)
    assert len(done) == 7
    fake.close()
    begin = time.monotonic()
    with pytest.raises(RolloutError, match=r"ConnectionRefusedError.*7 of 24 rollouts are finished and kept"):
        generate(engine, prompts=prompts, done=done)
    assert time.monotonic() - begin < 3, "a dead server fails all requests together, not one after the other"
    engine.close()


def test_an_interrupt_does_not_wait_for_the_server(fake, policy, tmp_path, monkeypatch):
    engine = engine_on(fake, policy, tmp_path, "rollout.server.timeout=60")
    engine.sync()
    fake.misbehave = COMPLETIONS("hang 30")

    def interrupted(*_, **__):
        time.sleep(0.3)
        raise KeyboardInterrupt

    monkeypatch.setattr("acpo.rollout.server.wait", interrupted)
    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        generate(engine)
    assert time.monotonic() - begin < 5
    engine.close()


def test_what_is_no_failure_of_the_server_is_raised_as_it_is(fake, policy, tmp_path):
    class FullDisk(dict):
        def __setitem__(self, place, sample):
            raise OSError(28, "No space left on device")

    engine = engine_on(fake, policy, tmp_path, "rollout.server.concurrency=1")
    with pytest.raises(OSError, match="No space left on device"):
        generate(engine, done=FullDisk())
    assert len(fake.asked("/v1/completions")) < len(PROMPTS), "the others were stopped"
    assert len(generate(engine)) == len(PROMPTS), "and the engine goes on"
    engine.close()


# --- without a server, and kinds of failure ------------------------------------------------------------------------------------------


def test_a_server_of_our_own_needs_vllm(tmp_path, policy):
    chosen = config.load(None, ["problems.task=chain", "policy.from_config=tiny", "rollout.engine=vllm_server"])
    with pytest.raises(ConfigError, match=r"starts a server and needs vLLM in this environment; docs/rollouts\.md"):
        ServerEngine(policy, EOS, chosen.rollout, tmp_path)
    assert not list(tmp_path.iterdir())


def test_calls_have_kinds_of_failure(fake):
    client = Client(fake.url)
    assert client.call("/weight_info", seconds=5.0) == {"weight_version": "default"}
    fake.misbehave = only("/weight_info")("status 404")
    with pytest.raises(Refused, match="answered 404"):
        client.call("/weight_info", seconds=5.0)
    fake.misbehave = only("/weight_info")("status 502")
    with pytest.raises(NoAnswer, match="answered 502"):
        client.call("/weight_info", seconds=5.0)
