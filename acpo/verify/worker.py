"""What a worker process does: shuts itself in, then answers jobs until end of file. Imports nothing of torch.

Shut in means: dies with its parent, an address space of its own limit, no core dumps, and no network: a network namespace without any interface
where the kernel allows one (as root, or where unprivileged user namespaces are on), else a guard inside Python, which a C library could get around.
A namespace leaves sockets that are files; nothing else of the file system is hidden.
"""

from __future__ import annotations

import ctypes
import json
import os
import pickle
import resource
import signal
import socket
import sys
from typing import Any

PR_SET_PDEATHSIG = 1
CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
REFUSED = ("socket.connect", "socket.bind", "socket.sendto", "socket.sendmsg", "socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr")


def main(descriptor: int) -> None:
    connection = socket.socket(fileno=descriptor)
    setup = receive(connection)
    if setup is None:
        return
    die_with(setup["parent"])
    network = "allowed" if setup["network"] else close_network()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if setup["memory_gb"]:
        limit = int(setup["memory_gb"] * 2**30)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    try:
        from . import judges

        judge = judges.make(setup["kind"])
    except BaseException as error:
        send(connection, {"why": judges_error(setup["kind"], error)})
        return
    send(connection, {"ready": True, "network": network})
    own = os.getpid()
    while (job := receive(connection)) is not None:
        try:
            reply = judge(*job)
        except MemoryError:
            reply = {"status": "memory"}
        except BaseException as error:  # SystemExit too: the worker is the run's, not the callable's
            reply = {"status": "error", "why": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        if os.getpid() != own:  # a child that the callable forked and that came back: its reply would be taken for the next job's
            os._exit(0)
        send(connection, reply)
    os._exit(0)


def judges_error(kind: str, error: BaseException) -> str:
    return f"verify.kind: {kind!r} cannot be used: {type(error).__name__}: {' '.join(str(error).split())[:300]}"


def receive(connection: socket.socket) -> Any:
    """The next message of the run; None at end of file. Unpickled: it comes from the run itself."""
    head = read(connection, 8)
    data = None if head is None else read(connection, int.from_bytes(head, "little"))
    return None if data is None else pickle.loads(data)


def read(connection: socket.socket, count: int) -> bytes | None:
    parts = []
    while count:
        part = connection.recv(min(count, 1 << 20))
        if not part:
            return None
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def send(connection: socket.socket, reply: dict[str, Any]) -> None:
    connection.sendall(json.dumps(reply).encode() + b"\n")


def die_with(parent: int) -> None:
    """SIGKILL when the parent is gone, even inside C code that never comes back to read end of file."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it was gone before
        os._exit(0)


def close_network() -> str:
    """Which of the two ways it was: "namespace" or "guard"."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if any(libc.unshare(flags) == 0 for flags in (CLONE_NEWNET, CLONE_NEWUSER | CLONE_NEWNET)):
            return "namespace"
    sys.addaudithook(refuse)
    return "guard"


def refuse(event: str, _: tuple) -> None:
    if event in REFUSED:
        raise PermissionError(f"{event}: the verifier's workers have no network; verify.network = true gives it to them")
