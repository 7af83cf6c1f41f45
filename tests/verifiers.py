"""Callables for `verify.kind=verifiers:NAME`: they run in the worker processes, which import this file and nothing of the tests."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import time


def moody(response, problem):
    """What the response asks for."""
    word, _, rest = response.partition(" ")
    if word == "hang":
        while True:
            time.sleep(1)
    if word == "compute":
        return len(str(9 ** (9**9))) > 0  # C code that looks at no signal and no pipe
    if word == "die":
        os._exit(3)
    if word == "die-once":
        open(rest, "x").close() or os._exit(3) if not os.path.exists(rest) else None
        return True
    if word == "wait":
        time.sleep(float(rest))
        return True
    if word == "fill":
        return len(bytearray(8 << 30)) > 0
    if word == "raise":
        raise RuntimeError("no\nreason")
    if word == "exit":
        sys.exit("bye")
    if word == "print":
        print('{"status": "judged", "reward": 1.0}')
        print("noise", file=sys.stderr)
    if word == "fork":
        os.fork()
        return True
    if word == "fork-and-raise":
        if os.fork() == 0:
            raise OSError("as of an exec that failed")
        return True
    if word == "close":
        sys.stdout.flush()  # what "print" left in the buffer of the same worker could not leave it later
        os.close(1)
        sys.stdout.close()
    if word == "close-all":
        os.closerange(0, 256)
    if word == "skip":
        return None
    if word == "give":
        return eval(rest)
    return response == problem.answer


async def later(response, problem):
    await asyncio.sleep(0.01)
    return None if response == "skip" else response == problem.data["right"]


class Scorer:
    @staticmethod
    def half(response, problem):
        return 0.5


def torchless(response, problem):
    return "torch" not in sys.modules


def connects(response, problem):
    """Whether a TCP connection to the port in the response can be made."""
    try:
        socket.create_connection(("127.0.0.1", int(response)), timeout=5).close()
    except OSError:
        return False
    return True


def starts_a_process(response, problem):
    """Leaves a child behind, writes its process id to the file that the response names, and hangs."""
    import subprocess

    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    with open(response, "w") as file:
        file.write(str(child.pid))
    time.sleep(600)


not_callable = 3


def mostly(response, problem):
    """Leaves out a third of the rollouts of the synthetic tasks, by their text."""
    if sum(response.encode()) % 3 == 0:
        return None
    return response.rpartition("A")[2] == problem.answer


def nothing(response, problem):
    return None


def late(response, problem):
    time.sleep(60 if sum(response.encode()) % 3 == 0 else 0)
    return response.rpartition("A")[2] == problem.answer
