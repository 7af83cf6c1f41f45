"""JSON over HTTP to a server that is not trusted: every answer has a limit of bytes and of seconds, no redirect is followed, no header is
read for more than where the body ends, and what is not JSON is an error."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
import urllib.parse
from typing import Any

from ..config import ConfigError


class NoAnswer(Exception):
    """Nothing usable came back, and asking again may help."""


class Refused(Exception):
    """The server answered that it will not; asking again will not help."""


RETRIED = {408, 425, 429, 500, 502, 503, 504}


class Client:
    def __init__(self, url: str):
        try:
            parts = urllib.parse.urlsplit(url)
            self.host, self.port = parts.hostname or "", parts.port
        except ValueError as error:
            raise ConfigError(f"rollout.server.url must be http://host:port, got {url!r}: {error}") from None
        if parts.scheme not in ("http", "https") or not self.host or parts.query or parts.fragment or parts.username:
            raise ConfigError(f"rollout.server.url must be http://host:port, got {url!r}")
        self.url, self.prefix = url.rstrip("/"), parts.path.rstrip("/")
        self.kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self.open: set[socket.socket] = set()
        self.lock = threading.Lock()

    def call(self, path: str, payload: Any = None, *, seconds: float, most_bytes: int = 1 << 20) -> Any:
        """The JSON that GET (payload None) or POST answers; None for an empty body."""
        body = None if payload is None else json.dumps(payload).encode()
        connection = self.kind(self.host, self.port, timeout=seconds)
        late = threading.Event()
        watch: threading.Timer | None = None
        own = None
        try:
            connection.connect()
            own = connection.sock
            with self.lock:
                self.open.add(own)

            def cut() -> None:  # a socket's own timeout starts anew with every byte that drips in
                late.set()
                _shut(own)

            watch = threading.Timer(seconds, cut)
            watch.daemon = True
            watch.start()
            headers = {"Content-Type": "application/json", "Accept-Encoding": "identity", "Connection": "close"}
            connection.request("GET" if body is None else "POST", self.prefix + path, body, headers)
            content = bytearray()
            with connection.getresponse() as response:
                status = response.status
                while piece := response.read(65536):
                    content += piece
                    if len(content) > most_bytes:
                        raise NoAnswer(f"{path} answered more than {most_bytes:,} bytes")
                if response.length:  # of the announced bytes; a number that is cut short is a number too
                    raise NoAnswer(f"{path} ended {response.length:,} bytes before its announced end")
        except (OSError, http.client.HTTPException) as error:
            if late.is_set() or isinstance(error, TimeoutError):
                raise NoAnswer(f"{path} was not answered within {seconds:g} seconds") from None
            raise NoAnswer(f"{path}: {type(error).__name__}: {error}") from None
        finally:
            if watch is not None:
                watch.cancel()
            with self.lock:
                self.open.discard(own)
            connection.close()
        if late.is_set():
            raise NoAnswer(f"{path} was not answered within {seconds:g} seconds")
        if status != 200:
            said = " ".join(content[:300].decode("utf-8", "replace").split())
            if 300 <= status < 400:
                raise Refused(f"{path} answered {status}: redirects are not followed, rollout.server.url must name the server itself")
            raise (NoAnswer if status in RETRIED else Refused)(f"{path} answered {status}: {said}")
        if not content:
            return None
        try:
            return json.loads(content)
        except (ValueError, RecursionError) as error:
            raise NoAnswer(f"{path} answered no JSON: {error!s:.200}") from None

    def own_address(self) -> str:
        """This machine's address, as the server sees it."""
        with socket.create_connection((self.host, self.port or self.kind.default_port), timeout=10.0) as probe:
            return probe.getsockname()[0]

    def hang_up(self) -> None:
        """Ends every call that is under way."""
        with self.lock:
            for own in self.open:
                _shut(own)


def _shut(own: socket.socket) -> None:
    with contextlib.suppress(OSError):  # closed already
        own.shutdown(socket.SHUT_RDWR)
