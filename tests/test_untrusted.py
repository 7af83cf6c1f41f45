"""What comes from outside is data: a server's headers, a rollout in a report. (Redirects, floods, drips and bad JSON: test_rollout_server.py; the
verifier's workers: test_verify_pool.py; YAML and checkpoints: test_bad_files.py.)"""

from __future__ import annotations

import ast
import html.parser
import json
import pickle
import socket
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import Qwen2Config

from acpo import config, policy, preflight, report
from acpo.rollout.client import Client, NoAnswer

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = "<script>alert(1)</script><img src=x onerror=alert(2)>'\"&"


@pytest.fixture
def server():
    """answer(bytes): what the next connections are told, word for word; .url."""
    listening = socket.create_server(("127.0.0.1", 0))

    class Server:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        reply = b""

    def serve() -> None:
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            with connection:
                try:
                    connection.recv(65536)
                    connection.sendall(Server.reply)
                except OSError:  # the client has hung up
                    pass

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield Server
    listening.shutdown(socket.SHUT_RDWR)
    listening.close()
    thread.join()


@pytest.mark.parametrize(
    ("reply", "found"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n[1]", [1]),
        (b"HTTP/1.1 200 OK\r\nContent-Length: abc\r\n\r\n[1]", [1]),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999999999999999\r\n\r\n[1]", None),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[1]", None),  # cut short
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\n[1]", None),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n[1]", None),
        (b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\n[1]", [1]),  # nothing is unpacked: no bomb
        (b"HTTP/1.1 200 OK\r\nSet-Cookie: a=b\r\nLocation: http://127.0.0.1:1/\r\nRefresh: 0\r\n\r\n[1]", [1]),
        (b"HTTP/1.1 200 OK\r\nX: " + b"x" * 100_000 + b"\r\n\r\n[1]", None),
        (b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 2000 + b"\r\n[1]", None),
        (b"HTTP/1.1 99999 OK\r\n\r\n[1]", None), (b"SSH-2.0-x\r\n", None), (b"\0" * 100, None), (b"", None),
        (b"HTTP/1.1 200 OK\r\n\r\n\xff\xfe", None), (b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 100_000, None),
    ],
)  # fmt: skip
def test_no_header_is_trusted(server, reply, found):
    server.reply = reply
    client = Client(server.url)
    if found is not None:
        assert client.call("/x", seconds=10, most_bytes=1000) == found
        return
    with pytest.raises(NoAnswer, match="/x"):
        client.call("/x", {"a": 1}, seconds=10, most_bytes=1000)


def test_a_dry_run_follows_no_redirect_either(server):
    server.reply = b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n"
    rollout = SimpleNamespace(engine="vllm_server", server=SimpleNamespace(url=server.url))
    with pytest.raises(ValueError, match="/health answered 302: redirects are not followed"):
        preflight._engine(SimpleNamespace(config=SimpleNamespace(rollout=rollout)))


@pytest.mark.parametrize("kind", ["code", "pickle"])
def test_a_model_folder_is_data(tmp_path, kind):
    """Its Python files are not run and nobody is asked whether they may be; weights in a pickle are not read."""
    hit, folder = tmp_path / "HIT", tmp_path / "model"
    tokenizer = policy.byte_tokenizer()
    shape = Qwen2Config(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1)
    shape.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if kind == "code":
        (folder / "own.py").write_text(f"open({str(hit)!r}, 'w')")
        for name, classes in (("config.json", ("AutoConfig", "AutoModelForCausalLM")), ("tokenizer_config.json", ("AutoTokenizer",))):
            settings = json.loads((folder / name).read_text())
            changes = {"model_type": "own", "architectures": ["Own"], "tokenizer_class": "Own", "auto_map": dict.fromkeys(classes, "own.Own")}
            (folder / name).write_text(json.dumps({**settings, **changes}))
    else:
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Touches(str(hit))))
    chosen = config.load(None, ["problems.path=unused.jsonl", f"policy.path={folder}", "policy.device=cpu"])
    with pytest.raises(config.ConfigError, match="cannot load"):
        policy.build(chosen)
    assert not hit.exists()
    if kind == "pickle":
        pickle.loads((folder / "pytorch_model.bin").read_bytes())
        assert hit.exists(), "it would have"


class Touches:
    def __init__(self, path: str):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


class Tags(html.parser.HTMLParser):
    def __init__(self, page: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


def test_reports_show_what_looks_like_html_as_text(tmp_path):
    run = tmp_path / SCRIPT.replace("/", "")
    run.mkdir()
    record = {"step": 1, "tokens/generated": 5, "eval/accuracy": 0.5, "entropy": 1.0, "reward": 0.5, "frac_reward_zero_std": 0.1, "step_time": 1.0}
    lines = [{**record, "phase": SCRIPT, f"eval/{SCRIPT}": 0.5, "step": step} for step in (0, 1)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    (run / "config.yaml").write_text(f"name: {SCRIPT}\n")
    report.write([run])
    page = Tags((run / "report.html").read_text())
    assert SCRIPT in page.text
    assert not any(tag == "script" or "onerror" in attributes for tag, attributes in page.tags)


RUNS_WHAT_IT_READS = {
    "pickle.loads", "pickle.load", "torch.load", "yaml.load", "yaml.unsafe_load", "eval", "exec", "marshal.loads", "joblib.load", "os.system",
}  # fmt: skip


def test_nothing_read_from_a_file_can_run():
    """The verifier's worker unpickles the run's own jobs, from a socketpair. Callables are found by the name that the configuration gives."""
    found = []
    for path in sorted([*ROOT.glob("acpo/**/*.py"), *ROOT.glob("acpo_kernels/**/*.py")]):
        calls = {ast.unparse(n.func) for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)}
        found += [(path.relative_to(ROOT).as_posix(), name) for name in sorted(calls & RUNS_WHAT_IT_READS)]
    assert found == [("acpo/verify/worker.py", "pickle.loads")]
