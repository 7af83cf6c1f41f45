"""A stand-in for a vLLM server, on 127.0.0.1: the routes that the engine calls, honestly answered from a model of its own, and on demand every
way of answering that a client must survive."""

from __future__ import annotations

import contextlib
import copy
import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch
from safetensors.torch import load_file

from acpo.config import Config
from acpo.policy import Policy, build
from acpo.rollout.local import LocalEngine


@contextlib.contextmanager
def serving(chosen: Config):
    """A stand-in for the server of this configuration's model, and the settings that name it."""
    torch.manual_seed(chosen.seed)
    policy, tokenizer = build(chosen)
    fake = FakeVLLM(policy, [tokenizer.eos_token_id])
    yield fake, ("rollout.engine=vllm_server", f"rollout.server.url={fake.url}", "rollout.server.retries=0", "eval.samples=0", "eval.max_problems=4")
    fake.close()


class FakeVLLM:
    """Loads what the weight updates bring and samples from it. calls: (path, payload) in order.

    misbehave(path, payload, count) may name, for the count-th call of a path, one of the ways in `Handler.bad`; None: answer honestly.
    """

    def __init__(self, policy: Policy, eos_ids: list[int], port: int = 0):
        self.policy = copy.deepcopy(policy)
        with torch.no_grad():  # a server that nobody sent weights to has others
            for parameter in self.policy.parameters():
                parameter.mul_(0.5)
        self.engine = LocalEngine(self.policy, eos_ids, 1 << 20)
        self.calls: list[tuple[str, object]] = []
        self.misbehave: Callable[[str, object, int], str | None] = lambda *_: None
        self.version, self.most, self.mode, self.paused = "default", 4096, "processed_logprobs", False
        self.lock = threading.Lock()
        self.busy = self.busiest = 0
        self.server = Listener(("127.0.0.1", port), type("Bound", (Handler,), {"fake": self}))
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def asked(self, path: str) -> list:
        return [payload for called, payload in self.calls if called.partition("?")[0] == path]

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def answer(self, path: str, payload) -> object:
        if path == "/v1/models":
            return {"data": [{"id": "policy", "max_model_len": self.most}]}
        if path == "/server_info?config_format=json":
            return {"vllm_config": {"model_config": {"logprobs_mode": self.mode}}}
        if path == "/weight_info":
            return {"weight_version": self.version}
        if path == "/update_weights":
            weights = load_file(payload["update_info"]["path"])
            self.policy.model.load_state_dict(weights, strict=False)
        if path == "/finish_weight_update":
            self.version = payload["weight_version"]
        if path == "/v1/completions":
            return self.complete(payload)
        return {"success": True} if path == "/reset_prefix_cache" else {"message": "done"}

    def complete(self, payload) -> dict:
        with self.lock:
            self.busy += 1
            self.busiest = max(self.busiest, self.busy)
        time.sleep(0.005)
        with self.lock:
            self.busy -= 1
            (sample,) = self.engine.generate(
                [payload["prompt"]], max_new_tokens=payload["max_tokens"], temperature=payload["temperature"],
                generator=torch.Generator().manual_seed(payload["seed"]),
            )  # fmt: skip
        return {
            "choices": [
                {
                    "prompt_token_ids": payload["prompt"], "token_ids": sample.ids.tolist(), "logprobs": {"token_logprobs": sample.logp.tolist()},
                    "finish_reason": "stop" if sample.finished else "length",
                }
            ]
        }  # fmt: skip


class Listener(ThreadingHTTPServer):
    daemon_threads, request_queue_size = True, 256  # the default of 5 resets connections that come together


class Handler(BaseHTTPRequestHandler):
    fake: FakeVLLM
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._handle(None)

    def do_POST(self) -> None:
        self._handle(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def _handle(self, payload) -> None:
        fake = self.fake
        with fake.lock:
            fake.calls.append((self.path, payload))
            count = len(fake.asked(self.path))
        how = fake.misbehave(self.path, payload, count)
        if how is None:
            self._send(200, json.dumps(fake.answer(self.path, payload)).encode())
        else:
            self.bad(how, payload)
        self.close_connection = True

    def _send(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def bad(self, how: str, payload) -> None:
        kind, _, detail = how.partition(" ")
        honest = self.fake.answer(self.path, payload)
        if kind == "status":
            self._send(int(detail), b'{"error": "as asked for"}')
        elif kind == "redirect":
            self._send(int(detail), b"", Location=self.fake.url + "/elsewhere")
        elif kind == "drop":  # the connection ends without a word
            pass
        elif kind == "truncate":
            body = json.dumps(honest).encode()
            self._send(200, body[: len(body) // 2])
        elif kind == "lie":  # fewer bytes than announced
            self._send(200, json.dumps(honest).encode()[:-1], Content_Length="100000")
        elif kind == "hang":
            time.sleep(float(detail))
        elif kind == "drip":  # a byte at a time, each in time, for ever
            self.wfile.write(b"HTTP/1.1 200 OK\r\n")
            for _ in range(int(float(detail) / 0.05)):
                self.wfile.write(b"X")
                self.wfile.flush()
                time.sleep(0.05)
        elif kind == "huge":  # without a length, until the other side has enough
            self.send_response(200)
            self.end_headers()
            for _ in range(int(detail)):
                self.wfile.write(b"[" * 65536)
        elif kind == "body":
            self._send(200, detail.encode())
        elif kind == "choice":  # an honest answer with these fields changed
            honest["choices"][0].update(json.loads(detail))
            self._send(200, json.dumps(honest).encode())
        else:
            raise AssertionError(how)

    def handle(self) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the client hung up, as it should
            super().handle()

    def log_message(self, *_) -> None:
        pass
