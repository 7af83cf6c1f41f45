"""Worker processes: whatever a rollout does to one costs at most its deadline, is counted, and never ends the run."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from acpo.config import ConfigError, VerifyConfig
from acpo.problems import Problem
from acpo.verify import Verdict, Verifier, VerifyError

ROOT = Path(__file__).resolve().parents[1]
RIGHT, WRONG = Verdict(1.0, "judged"), Verdict(0.0, "judged")
PROBLEM = Problem("x", "p", "yes", data={"right": "yes"})
START = 60.0  # for a worker that starts anew on a busy machine


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"  # dead, nobody has asked for it yet
    except OSError:
        return True


def wait_until(condition, seconds: float = 30.0) -> bool:
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.02)
    return condition()


class Asked:
    """A verifier that says how long each call took."""

    def __init__(self, name: str = "moody", **settings):
        self.verifier = Verifier(VerifyConfig(**{"workers": 1, "timeout": 2.0, **settings}), f"verifiers:{name}")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.verifier.close()

    def __call__(self, *texts: str) -> list[Verdict]:
        begin = time.monotonic()
        found = self.verifier([PROBLEM] * len(texts), list(texts))
        self.seconds = time.monotonic() - begin
        return found

    @property
    def pid(self) -> int:
        return self.verifier.pool.workers[0].pid


def test_a_callable_and_what_it_may_give():
    with Asked() as ask:
        assert ask("yes", "no", "skip", "give 0.25", "give True", "give 1") == [
            RIGHT,
            WRONG,
            Verdict(None, "skipped"),
            (0.25, "judged"),
            RIGHT,
            RIGHT,
        ]
        bad = ask("yes", "give 2", "give -0.5", "give float('nan')", "give 'x'", "raise", "exit")
        assert bad == [RIGHT] + [Verdict(None, "error")] * 6
        counted = ask.verifier.metrics()
        assert counted["verify/errors"] == 6 and counted["verify/skipped"] == 7 and counted["verify/kills"] == 0
        assert ask("print", "close") == [WRONG] * 2, "what it prints is not its reply"


def test_a_callable_that_raises_for_all_ends_the_run_and_one_bad_problem_does_not():
    """All of several problems: the callable's fault. All of one: the data's, unless it comes three times in a row."""
    said = r"verify\.kind: 'verifiers:moody' raised for every rollout: RuntimeError: no reason"
    with Asked() as ask:
        for _ in range(2):
            assert [*ask("raise", "raise"), *ask("raise")] == [Verdict(None, "error")] * 3
            assert ask("raise", "yes") == [Verdict(None, "error"), RIGHT], "and the count begins anew"
        ask("raise")
        ask("raise")
        with pytest.raises(VerifyError, match=said):
            ask("raise")
        ask("yes")
        with pytest.raises(VerifyError, match=said):
            ask.verifier([PROBLEM, replace(PROBLEM, id="y")], ["raise", "raise"])
        ask.verifier.whole([], [])


@pytest.mark.parametrize("row", [{"deep": [[]]}, {"lock": threading.Lock()}], ids=["nests too deep", "no data"])
def test_a_problem_that_cannot_be_sent_is_an_error_of_its_own(row):
    """No rollout waits for it for ever, and the worker goes on."""
    if "deep" in row:
        for _ in range(100_000):
            row["deep"] = [row["deep"]]
    with Asked() as ask:
        begin = time.monotonic()
        pending = ask.verifier.submit([replace(PROBLEM, data=row), PROBLEM], ["yes", "yes"])
        assert [future.result(START)["status"] for future in pending.known] == ["error", "judged"] and time.monotonic() - begin < START
        assert pending.result() == [Verdict(None, "error"), RIGHT] and "cannot be handed to a worker" in ask.verifier.said
        assert ask.verifier.metrics()["verify/kills"] == 0
        while row.get("deep"):  # taken apart level by level: freed at once it would overflow the stack as well
            row["deep"] = row["deep"][0]


def test_a_callable_that_forks_or_closes_what_is_not_its_own(capfd):
    """A child that comes back must not answer: its reply would be the next rollout's verdict."""
    with Asked(timeout=60.0) as ask:
        assert ask("fork", "no", "yes", "fork-and-raise", "no", "no") == [RIGHT, WRONG, RIGHT, RIGHT, WRONG, WRONG]
        assert ask.verifier.metrics()["verify/kills"] == 0
        assert ask("close-all", "yes") == [Verdict(0.0, "crash"), RIGHT]


@pytest.mark.parametrize(("path", "text", "verdict"), [
    ("verifiers:later", "yes", RIGHT), ("verifiers.later", "no", WRONG), ("verifiers:later", "skip", Verdict(None, "skipped")),
    ("verifiers:Scorer.half", "", Verdict(0.5, "judged")),
])  # fmt: skip
def test_plain_async_and_nested_callables(path, text, verdict):
    verifier = Verifier(VerifyConfig(workers=1), path)
    try:
        assert verifier([PROBLEM], [text]) == [verdict]
    finally:
        verifier.close()


@pytest.mark.parametrize(("path", "message"), [
    ("no_such_module:f", "verify.kind: 'no_such_module:f' cannot be used: ModuleNotFoundError: No module named 'no_such_module'"),
    ("verifiers:absent", "AttributeError: module 'verifiers' has no attribute 'absent'"),
    ("verifiers.not_callable", "TypeError: verifiers.not_callable is not callable: int"),
])  # fmt: skip
def test_a_callable_that_is_not_there(path, message):
    with pytest.raises(ConfigError, match=message) as caught:
        Verifier(VerifyConfig(workers=1), path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("word", ["hang", "compute"])
def test_a_deadline_kills_and_the_next_call_is_fine(word):
    with Asked() as ask:
        assert ask(word) == [Verdict(0.0, "timeout")] and 2.0 <= ask.seconds < 2.0 + 5.0
        assert ask("yes") == [RIGHT] and ask.seconds < START
        counted = ask.verifier.metrics()
        assert counted["verify/timeouts"] == counted["verify/kills"] == 1 and counted["verify/skipped"] == 0
        ask.verifier.config.on_timeout = "skip"
        assert ask(word, "yes") == [Verdict(None, "timeout"), RIGHT]


def test_others_go_on_beside_one_that_hangs():
    with Asked(workers=2, timeout=4.0) as ask:
        assert wait_until(lambda: ask.verifier.pool.workers[1].news.get("ready"))
        pending = ask.verifier.submit([PROBLEM], ["hang"])
        begin = time.monotonic()
        assert ask(*["yes"] * 50) == [RIGHT] * 50 and time.monotonic() - begin < 4.0
        assert pending.result() == [Verdict(0.0, "timeout")]


def test_a_worker_killed_from_outside_costs_one_more_try():
    with Asked(timeout=30.0) as ask:
        threading.Timer(0.5, os.kill, (ask.pid, signal.SIGKILL)).start()
        assert ask("wait 1.5") == [RIGHT]
        os.kill(ask.pid, signal.SIGKILL)  # idle
        assert wait_until(lambda: gone(ask.pid)) and ask("yes") == [RIGHT]
        counted = ask.verifier.metrics()
        assert counted["verify/kills"] == 2 and counted["verify/timeouts"] == counted["verify/crashes"] == 0


def test_a_stopped_worker_is_late_even_before_it_has_read_the_job():
    with Asked() as ask:
        os.kill(ask.pid, signal.SIGSTOP)
        assert ask("yes" * 10_000_000) == [Verdict(0.0, "timeout")]
        assert ask("yes") == [RIGHT]


def test_what_kills_two_workers_is_a_crash(tmp_path):
    with Asked(timeout=60.0) as ask:
        assert ask("die") == [Verdict(0.0, "crash")]
        assert ask(f"die-once {tmp_path / 'mark'}") == [RIGHT]
        counted = ask.verifier.metrics()
        assert counted["verify/crashes"] == 1 and counted["verify/kills"] == 3 and counted["verify/timeouts"] == 0
        ask.verifier.config.on_timeout = "skip"
        assert ask("die") == [Verdict(None, "crash")]


def test_memory_limit():
    with Asked(memory_gb=1.0, timeout=60.0) as ask:
        assert ask("fill") == [Verdict(0.0, "crash")] and ask("yes") == [RIGHT]
        assert ask.verifier.metrics()["verify/kills"] == 1, "nobody knows what a worker without memory has forgotten"


def test_strange_texts_arrive_as_they_are():
    texts = ["yes", "\x00", "\ud800", "\u2028", "x" * 1_000_000, ""]
    with Asked(timeout=60.0) as ask:
        for text in texts:
            found = ask.verifier([Problem("x", "p", text, data={"row": text})], [text])
            assert found == [RIGHT]


def test_workers_hold_no_torch():
    assert "torch" in sys.modules
    with Asked("torchless") as ask:
        assert ask("") == [RIGHT]


def test_network():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        with Asked("connects", timeout=30.0) as ask:
            assert ask(port) == [WRONG] and ask.verifier.pool.workers[0].news["network"] in ("namespace", "guard")
            assert "no network" in ask.verifier.describe()
        with Asked("connects", timeout=30.0, network=True) as ask:
            assert ask(port) == [RIGHT] and "network allowed" in ask.verifier.describe()


def test_the_guard_where_no_namespace_is_allowed():
    code = (
        "import socket, sys; from acpo.verify import worker; server = socket.create_server(('127.0.0.1', 0)); sys.platform = 'other'\n"
        "print(worker.close_network())\n"
        "try: socket.create_connection(server.getsockname())\n"
        "except PermissionError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=60)
    assert done.stdout.splitlines()[0] == "guard" and "the verifier's workers have no network" in done.stdout, done


def test_close_ends_the_workers_and_what_they_started(tmp_path):
    ask = Asked("starts_a_process", workers=2)
    file = tmp_path / "child"
    pending = ask.verifier.submit([PROBLEM], [str(file)])
    assert wait_until(lambda: file.exists() and file.read_text())
    pids = [w.pid for w in ask.verifier.pool.workers if w.pid] + [int(file.read_text())]
    ask.verifier.close()
    ask.verifier.close()
    assert wait_until(lambda: all(map(gone, pids)))
    with pytest.raises(VerifyError, match="the verifier is closed"):
        pending.result()
    with pytest.raises(VerifyError, match="the verifier is closed"):
        ask("x")


@pytest.mark.parametrize("word", ["yes", "hang", "compute"])
def test_a_run_that_is_killed_leaves_no_worker(tmp_path, word):
    """SIGKILL: nothing of the run gets to say anything. Idle workers read end of file, busy ones are killed by the kernel."""
    code = (
        "import sys, time; from acpo.config import VerifyConfig; from acpo.problems import Problem; from acpo.verify import Verifier\n"
        "verifier = Verifier(VerifyConfig(workers=2, timeout=600.0), 'verifiers:moody')\n"
        "while not all(w.news.get('ready') for w in verifier.pool.workers): time.sleep(0.01)\n"
        f"pending = verifier.submit([Problem('x', 'p', 'yes')], [{word!r}]); time.sleep(0.5)\n"
        "print(*(w.pid for w in verifier.pool.workers), flush=True); time.sleep(600)"
    )
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    run = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path})
    pids = [int(p) for p in run.stdout.readline().split()]
    assert len(pids) == 2 and not any(map(gone, pids))
    run.kill()
    run.wait()
    assert wait_until(lambda: all(map(gone, pids)))


def test_a_run_that_ends_without_closing_leaves_no_worker():
    code = (
        "from acpo.config import VerifyConfig; from acpo.verify import Verifier\n"
        "verifier = Verifier(VerifyConfig(workers=1), 'verifiers:moody'); print(verifier.pool.workers[0].pid, flush=True)"
    )
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, timeout=60)
    assert run.returncode == 0 and run.stderr == "" and wait_until(lambda: gone(int(run.stdout)))


# --- math-verify --------------------------------------------------------------------------------------------------------------------------

TOWER = r"\boxed{\dfrac{5^{\left(5^{\left(5^{\left(5^5\right)}\right)} - 4\right)} - 5}{16}}"
HARD = {
    "tower": TOWER, "tower of nines": "$9^{9^{9}}$", "factorial": r"\boxed{1000000000!}", "power of ten": r"\boxed{10^{1000000000}}",
    "10,000 digits": r"\boxed{" + "7" * 10_000 + "}", "10,000 digits without a box": "7" * 10_000,
    "10,000 digits and a decimal": r"\boxed{0." + "7" * 10_000 + "}",
    "nested braces": r"\boxed{" + "{" * 50_000 + "1" + "}" * 50_000 + "}", "nested roots": r"\boxed{" + r"\sqrt{" * 3000 + "1" + "}" * 3001,
    "unclosed braces": r"\boxed{" + "{" * 100_000, "1 MB of text": "x " * 500_000 + r"\boxed{7}", "1 MB without a box": "let $x$ be " * 95_000,
    "1 MB in the box": r"\boxed{" + "x+" * 500_000 + "1}", "NUL": "\x00" * 1000, "NUL in the box": "\\boxed{\x001\x00}",
    "a million dollars": "$" * 1_000_000,
}  # fmt: skip


@pytest.fixture(scope="module")
def mathematics():
    pytest.importorskip("math_verify", reason="the extra `math` is not installed")
    verifier = Verifier(VerifyConfig(workers=2, timeout=2.0), "math")
    yield verifier
    verifier.close()


@pytest.mark.parametrize("name", HARD)
def test_hard_inputs_cost_at_most_their_deadline(mathematics, name):
    begin = time.monotonic()
    (found,) = mathematics([Problem("x", "p", "3")], [HARD[name]])
    assert time.monotonic() - begin < 2.0 + START
    assert found.reward == 0.0 and found.status in ("judged", "unparseable", "timeout", "crash")
    assert mathematics([Problem("x", "p", "0.5")], [r"\boxed{\frac{1}{2}}"]) == [RIGHT], "and the next one is judged"


def test_hard_and_unreadable_gold_answers(mathematics):
    mathematics.metrics()
    assert mathematics([Problem("x", "p", TOWER)], [r"\boxed{3}"]) == [Verdict(0.0, "timeout")]
    assert mathematics([Problem("x", "p", r"\boxed{}")], [r"\boxed{3}"]) == [Verdict(None, "gold")]
    assert mathematics.metrics()["verify/gold"] == 1


def test_many_pairs_are_all_judged(mathematics):
    mathematics.metrics()
    problems = [Problem("x", "p", rf"\frac{{{i}}}{{7}}") for i in range(1, 201)]
    assert mathematics(problems, [rf"thus \boxed{{{i}/7}}" for i in range(1, 201)]) == [RIGHT] * 200
    assert mathematics(problems, [rf"thus \boxed{{{i + 1}/7}}" for i in range(1, 201)]) == [WRONG] * 200
    assert mathematics.metrics()["verify/kills"] == 0
    found = mathematics(problems, [TOWER if i == 77 else rf"thus \boxed{{{i}/7}}" for i in range(1, 201)])
    assert found == [Verdict(0.0, "timeout") if i == 77 else RIGHT for i in range(1, 201)], "one that is hostile costs no other"
