"""A vLLM server of our own: started beside the training process, ended with it, whichever way that ends."""

from __future__ import annotations

import atexit
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from ..config import ConfigError
from ..policy import Policy
from . import RolloutError
from .client import Client, NoAnswer, Refused
from .settings import ServerConfig, VLLMConfig
from .transfer import BACKEND
from .vllm import COMMON, QUIET, dtype_of

# Asks the kernel to end the server when the training process is gone, were it killed, and becomes the server.
GUARD = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM)
if os.getppid() != int(sys.argv[1]):
    sys.exit(1)
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


class Process:
    def __init__(self, policy: Policy, settings: VLLMConfig, server: ServerConfig, directory: Path):
        if importlib.util.find_spec("vllm") is None:
            raise ConfigError(
                "rollout.engine = 'vllm_server' without rollout.server.url starts a server and needs vLLM in this environment; "
                "docs/rollouts.md says how to install it"
            )
        self.log = directory / "vllm" / "server.log"
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        command = arguments(policy, settings, server, directory, port)
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", GUARD, str(os.getpid()), *command],
                env=environment(server), stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        atexit.register(self.close)
        try:
            self._wait(server.start_timeout)
        except BaseException:
            self.close()
            raise

    def _wait(self, seconds: float) -> None:
        client, end = Client(self.url), time.monotonic() + seconds
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise RolloutError(f"the vLLM server did not start: {self.ended()}")
            try:
                client.call("/health", seconds=5.0)
                return
            except NoAnswer:
                time.sleep(0.5)
            except Refused as error:
                raise RolloutError(f"the vLLM server did not start: {error}") from None
        raise RolloutError(f"the vLLM server did not answer within rollout.server.start_timeout = {seconds:g} seconds; its log is {self.log}")

    def ended(self) -> str:
        """How the server ended, where it has; else nothing."""
        if self.process.poll() is None:
            return ""
        lines = self.log.read_bytes()[-20000:].decode("utf-8", "replace").splitlines()
        # vLLM's own last words are that its engine failed, "See root cause above".
        errors = [line.strip() for line in lines if "Error" in line and "raise " not in line and "root cause above" not in line] or [""]
        return f"it ended with exit code {self.process.returncode}; the last error in {self.log} is {errors[-1][:300]!r}"

    def close(self) -> None:
        atexit.unregister(self.close)
        for how in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self.process.pid, how)  # its workers too
            except ProcessLookupError:
                break
            try:
                self.process.wait(15)
            except subprocess.TimeoutExpired:
                continue
        self.process.wait()


def arguments(policy: Policy, settings: VLLMConfig, server: ServerConfig, directory: Path, port: int) -> list[str]:
    transfer = {"backend": BACKEND if server.transfer == "files" else server.transfer}
    options = {
        **COMMON, "model": str(policy.save_shape(directory / "vllm")), "served_model_name": "policy", "host": "127.0.0.1", "port": port,
        "dtype": dtype_of(settings, policy), "seed": settings.seed, "tensor_parallel_size": settings.tensor_parallel_size,
        "gpu_memory_utilization": settings.gpu_memory_utilization, "weight_transfer_config": json.dumps(transfer),
        "enforce_eager": settings.enforce_eager, "uvicorn_log_level": "warning",
    }  # fmt: skip
    if settings.max_model_len:
        options["max_model_len"] = settings.max_model_len
    flags = [(f"--{name.replace('_', '-')}", value) for name, value in options.items() if value is not False]
    return [
        "-m",
        "vllm.entrypoints.openai.api_server",
        *(part for flag, value in flags for part in ([flag] if value is True else [flag, str(value)])),
    ]


def environment(server: ServerConfig) -> dict[str, str]:
    root = str(Path(__file__).resolve().parents[2])  # the workers import acpo.rollout.worker
    out = {**QUIET, **os.environ, "VLLM_SERVER_DEV_MODE": "1", "PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])}
    if server.devices:
        out["CUDA_VISIBLE_DEVICES"] = server.devices
    if server.transfer == "ipc":
        out["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # the handles are pickled; the server listens on this machine alone
    return out


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
