"""Worker processes that may hang, crash or be killed, at the price of their deadline and of nothing else.

Each worker is a fresh interpreter (no fork: nothing of the run's memory, threads or GPU is in it) with one socket of its own. A job's deadline runs
from the moment it is handed over; who misses it is killed with everything it started, and a new worker takes its place. A worker that dies by
itself, or from outside, costs the job one more try within what is left of its time. The workers end with the run however it ends: they read end of
file when idle, and the kernel kills them with their parent when busy (worker.py).
"""

from __future__ import annotations

import asyncio
import atexit
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from typing import Any

START_SECONDS = 120.0  # for the imports of a worker on a busy machine
START_TRIES = 3
KILLED_SECONDS = 10.0  # for the kernel to reap what was killed


class VerifyError(RuntimeError):
    """Verification cannot go on: the message says why."""


class Worker:
    """One process and its socket."""

    def __init__(self, setup: dict[str, Any]):
        self.setup = setup
        self.process: subprocess.Popen | None = None
        self.news: dict[str, Any] = {}  # what it said when it was ready

    @property
    def pid(self) -> int | None:
        return None if self.process is None else self.process.pid

    async def start(self) -> None:
        """A new process, ready for jobs; a VerifyError with its own words where it cannot be."""
        ours, theirs = socket.socketpair()
        code = f"import sys; sys.path[:] = {[*sys.path, os.getcwd()]!r}; from acpo.verify.worker import main; main({theirs.fileno()})"
        quiet = None if self.setup["talks"] else subprocess.DEVNULL
        threads = {name: os.environ.get(name, "1") for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
        with theirs:  # a session of its own: Ctrl-C is the run's, and what a worker starts can be killed with it
            self.process = subprocess.Popen(
                [sys.executable, "-c", code], pass_fds=[theirs.fileno()], start_new_session=True, env={**os.environ, **threads},
                stdin=subprocess.DEVNULL, stdout=quiet if quiet else 2, stderr=quiet,
            )  # fmt: skip
        self.reader, self.writer = await asyncio.open_connection(sock=ours)
        self.news = await self._within(self._exchange(pickle.dumps({**self.setup, "parent": os.getpid()})), START_SECONDS) or {}
        if "ready" not in self.news:
            await self.kill()
            raise VerifyError(self.news.get("why") or f"a worker did not start within {START_SECONDS:.0f} s")

    async def ask(self, job: bytes, seconds: float) -> dict[str, Any] | None:
        """The worker's reply within so many seconds; {} where it is dead, None where the time is over."""
        return await self._within(self._exchange(job), seconds)

    async def _exchange(self, data: bytes) -> dict[str, Any]:
        try:
            self.writer.write(len(data).to_bytes(8, "little") + data)
            await self.writer.drain()
            found = json.loads(await self.reader.readline())  # never unpickled: what comes back was made from a model's text
            return found if isinstance(found, dict) else {}
        except (OSError, ValueError):  # end of file, a broken pipe, a reply that is none
            return {}

    @staticmethod
    async def _within(work, seconds: float) -> dict[str, Any] | None:
        """asyncio.wait_for throws away a reply that came while this process was busy beyond the deadline; this looks first."""
        task = asyncio.ensure_future(work)
        await asyncio.wait({task}, timeout=seconds)
        if task.done():
            return task.result()
        task.cancel()
        return None

    async def kill(self) -> None:
        process, self.process = self.process, None
        if process is None:
            return
        self.writer.transport.abort()
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            process.kill()
        until = time.monotonic() + KILLED_SECONDS
        while process.poll() is None and time.monotonic() < until:
            await asyncio.sleep(0.005)


class Pool:
    """`workers` processes and a thread that speaks with them. submit() may be called from any thread."""

    def __init__(self, setup: dict[str, Any], workers: int, seconds: float):
        self.seconds = seconds
        self.kills = 0  # workers that were killed at a deadline or found dead
        self.workers = [Worker(setup) for _ in range(workers)]
        self.owner = os.getpid()
        self.closed = False
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, name="verifier", daemon=True)
        self.thread.start()
        atexit.register(self.close)
        try:
            asyncio.run_coroutine_threadsafe(self._start(), self.loop).result()
        except BaseException:
            self.close()
            raise

    def submit(self, jobs: list[tuple]) -> list[Future]:
        """One future a job, in order: what the worker replied, or {"status": "timeout"}, or {"status": "died"} where two workers died of it."""
        if self.closed:
            raise VerifyError("the verifier is closed")
        futures: list[Future] = [Future() for _ in jobs]
        self.loop.call_soon_threadsafe(self._put, list(zip(jobs, futures, strict=True)))
        return futures

    def close(self) -> None:
        """Kills the workers. Jobs under way fail; a second call does nothing."""
        if self.closed or os.getpid() != self.owner:  # a forked child has neither the thread nor the right
            return
        self.closed = True
        atexit.unregister(self.close)
        asyncio.run_coroutine_threadsafe(self._stop(), self.loop).result()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()

    # --- in the loop's thread -----------------------------------------------------------------------------------------------------

    def _put(self, jobs: list[tuple[tuple, Future]]) -> None:
        for job in jobs:
            self.queue.put_nowait(job)

    async def _start(self) -> None:
        """The first worker is waited for: whatever is wrong with the setup is said before the run begins. The others come up beside it."""
        self.queue: asyncio.Queue[tuple[tuple, Future]] = asyncio.Queue()
        await self.workers[0].start()
        self.tasks = [asyncio.ensure_future(self._serve(worker)) for worker in self.workers]

    async def _stop(self) -> None:
        tasks = getattr(self, "tasks", [])
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(worker.kill() for worker in self.workers))
        while hasattr(self, "queue") and not self.queue.empty():
            self.queue.get_nowait()[1].set_exception(VerifyError("the verifier is closed"))

    async def _serve(self, worker: Worker) -> None:
        """Jobs in turn, for ever; after a kill the next worker starts before the next job comes."""
        while True:
            if worker.process is None:
                await self._restart(worker)
            job, future = await self.queue.get()
            try:
                future.set_result(await self._judge(worker, job))
            except asyncio.CancelledError:
                future.set_exception(VerifyError("the verifier is closed"))
                raise
            except Exception as error:  # whoever waits is told, and the next job is served
                future.set_exception(error)

    async def _judge(self, worker: Worker, job: tuple) -> dict[str, Any]:
        try:
            data = pickle.dumps(job)
        except Exception as failure:  # a row of data that nests too deep, or holds what is no data
            return {
                "status": "error",
                "why": f"the problem cannot be handed to a worker: {type(failure).__name__}: {' '.join(str(failure).split())[:300]}",
            }
        left = self.seconds
        for _ in range(2):
            if worker.process is None:
                error = await self._restart(worker)
                if error is not None:
                    raise error
            begin = time.monotonic()
            reply = await worker.ask(data, left)
            if reply and reply.get("status") != "memory":
                return reply
            self.kills += 1  # dead, late, or out of memory, and then nobody knows what it has forgotten
            await worker.kill()
            if reply is None:
                return {"status": "timeout"}
            if reply:
                return reply
            left -= time.monotonic() - begin
            if left <= 0:
                return {"status": "timeout"}
        return {"status": "died"}

    async def _restart(self, worker: Worker) -> VerifyError | None:
        for attempt in range(START_TRIES):
            try:
                await worker.start()
                return None
            except (VerifyError, OSError) as error:
                failure = error
                await asyncio.sleep(0.5 * attempt)
        return VerifyError(f"the verifier's worker cannot be started: {failure}")
