"""An HTTP server in front of another one, that counts what passes and disturbs some of it.

For tests and benchmarks of object stores: requests are forwarded as they are (the Host header too, which signatures
cover), bytes and requests are counted per object, and a share of the reads fails: with a status such as 503, by a
connection that is reset in the middle of the answer, or by one that goes silent there. Which reads fail follows from
the seed, the object, the range and how often it was asked for, not from the order in which requests arrive.
"""

from __future__ import annotations

import http.client
import random
import socket
import struct
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding"}
CONDITIONS = {"if-match", "if-none-match"}
KINDS = ("503", "reset", "stall")


class FaultyProxy(ThreadingHTTPServer):
    """A proxy in threads of this process.

    Attributes
    ----------
    url : str
        Where it listens.
    share : float
        Of the reads of objects, how many fail; may be changed at any time.
    kinds : sequence of str
        How they fail: "reset", "stall" or a status, "503".
    stall_s : float
        How long a connection that goes silent stays open.
    heeds_conditions : bool
        Whether If-Match and If-None-Match are passed on; may be changed at any time.
    sent_bytes, requests, faults : Counter
        Bytes of bodies sent and requests, by object; faults by kind.
    """

    daemon_threads = True

    def __init__(
        self, target: str, *, share: float = 0.0, kinds: Sequence[str] = KINDS, stall_s: float = 60.0, seed: int = 1
    ) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.target = urlsplit(target).netloc
        self.share, self.kinds, self.stall_s, self.seed = share, tuple(kinds), stall_s, seed
        self.heeds_conditions = True
        self.sent_bytes: Counter[str] = Counter()
        self.requests: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.ending = threading.Event()
        self._asked: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._writing: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)  # by object

    def reset_counts(self) -> None:
        """Begin counting anew."""
        with self._lock:
            for counter in (self.sent_bytes, self.requests, self.faults):
                counter.clear()

    def draw(self, path: str, wanted: str) -> str | None:
        """How this request fails; None if it does not."""
        with self._lock:
            self.requests[path] += 1
            request = f"{path} {wanted}"
            self._asked[request] += 1
            chance = random.Random(f"{self.seed} {request} {self._asked[request]}")
            if chance.random() >= self.share:
                return None
            kind = chance.choice(self.kinds)
            self.faults[kind] += 1
            return kind

    def count(self, path: str, n_bytes: int) -> None:
        """Count bytes that were sent."""
        with self._lock:
            self.sent_bytes[path] += n_bytes

    def alone(self, command: str, path: str) -> AbstractContextManager[object]:
        """Writes to one object follow each other: moto looks at a condition first and writes later."""
        with self._lock:
            return nullcontext() if command in ("GET", "HEAD") else self._writing[path]

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing: clients that hang up are part of the game."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or an answer's body waits 40 ms for the client to acknowledge its headers
    server: FaultyProxy

    def _forward(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path, _, query = self.path.partition("?")
        path = unquote(path)
        reads_object = self.command in ("GET", "HEAD") and "list-type" not in query
        fault = self.server.draw(path, self.command + self.headers.get("Range", "")) if reads_object else None
        if fault is not None and fault.isdigit():
            self._answer(int(fault), [], b"<Error>no chance</Error>")
            return
        upstream = http.client.HTTPConnection(self.server.target, timeout=60)
        try:
            headers = {name: value for name, value in self.headers.items() if name.lower() not in HOP_BY_HOP}
            generation = headers.pop("x-goog-if-generation-match", None)  # Google's; 0: if there is none yet
            if generation is not None:
                headers |= {"If-None-Match": "*"} if generation == "0" else {"If-Match": generation}
            if not self.server.heeds_conditions:
                headers = {name: value for name, value in headers.items() if name.lower() not in CONDITIONS}
            with self.server.alone(self.command, path):
                upstream.request(self.command, self.path, body or None, headers)
                response = upstream.getresponse()
                content = response.read()
        finally:
            upstream.close()
        kept = [(name, value) for name, value in response.getheaders() if name.lower() not in HOP_BY_HOP]
        kept += [("x-goog-generation", value) for name, value in kept if name.lower() == "etag"]
        if reads_object and self.command == "GET":
            self.server.count(path, len(content) if fault is None else len(content) // 2)
        self._answer(response.status, kept, content, fault)

    def _answer(
        self, status: int, headers: Sequence[tuple[str, str]], content: bytes, fault: str | None = None
    ) -> None:
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        if not any(name.lower() == "content-length" for name, _ in headers):
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "HEAD":  # has no body that could fail
            return
        if fault is None:
            self.wfile.write(content)
            return
        self.wfile.write(content[: len(content) // 2])
        self.wfile.flush()
        self.close_connection = True
        if fault == "stall":
            self.server.ending.wait(self.server.stall_s)
        else:
            time.sleep(0.01)  # so that the first half arrives before the reset discards it
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _forward

    def log_message(self, *_: object) -> None:
        """Log nothing."""


@contextmanager
def faulty_proxy(target: str, **options: object) -> Iterator[FaultyProxy]:
    """A proxy in front of the server at the URL `target`, for the duration of the block."""
    proxy = FaultyProxy(target, **options)  # type: ignore[arg-type]
    thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.ending.set()
        proxy.shutdown()
        thread.join()
        proxy.server_close()
