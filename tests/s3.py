"""A real S3 server (moto) in a process of its own, and a proxy before it that injects faults."""

from __future__ import annotations

import contextlib
import http.client
import re
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

STARTED_S = 60
PIECES = 100


@contextlib.contextmanager
def s3_server() -> Iterator[str]:
    """Runs while the block does; the endpoint's URL."""
    with tempfile.NamedTemporaryFile("w") as log:
        command = [sys.executable, "-m", "moto.server", "--host", "127.0.0.1", "--port", "0"]
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            deadline, said = time.monotonic() + STARTED_S, Path(log.name)
            while not (found := re.search(r"Running on (http://127\.0\.0\.1:\d+)", said.read_text())):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"the S3 server did not start:\n{said.read_text()}")
                time.sleep(0.05)
            yield found[1]
        finally:
            process.kill()
            process.wait()


@dataclass
class Fault:
    """What happens to some of the requests that match.

    Attributes:
        kind: "answer" (with `status` and S3's error `code`), "delay", "reset" before the request is passed on, "lost": the
            answer is, after the server did the work, "cut": half of the answer's body under its full Content-Length,
            "short": half of it under the length of that half and without
            checksum, "damaged": one bit of it is another, "upload cut": half of the request's body reaches the server,
            "stall": the proxy stops reading the request until `release` is set, "trickle": the answer's body comes in PIECES.
        method: of the request.
        key: pattern that is searched for in "/bucket/key?query".
        first: the first request that is affected, of those that match, from 0.
        count: how many are.
        delay_s: of "delay", and before each piece of "trickle".
        text: of "answer", instead of S3's error.
        seen: requests that matched.
        hit: set when the fault happens.
    """

    kind: str
    method: str
    key: str = ""
    first: int = 0
    count: int = 1
    status: int = 503
    code: str = "SlowDown"
    delay_s: float = 0.0
    text: str = ""
    seen: int = 0
    hit: threading.Event = field(default_factory=threading.Event)
    release: threading.Event = field(default_factory=threading.Event)

    def applies(self, method: str, target: str) -> bool:
        if method != self.method or not re.search(self.key, target):
            return False
        self.seen += 1
        return self.first < self.seen <= self.first + self.count


class Proxy:
    """Passes requests on to an S3 server, but for `faults`.

    Attributes:
        url: its endpoint.
        faults: the first that applies to a request is carried out.
        requests: (method, "/bucket/key?query") of all that arrived.
    """

    def __init__(self, endpoint: str) -> None:
        self.upstream = urlsplit(endpoint).netloc
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str]] = []
        self.lock = threading.Lock()
        proxy = self

        class Handler(_Handler):
            owner = proxy

        self.server = _Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def inject(self, kind: str, method: str, key: str = "", **details: float | str) -> Fault:
        self.faults.append(Fault(kind, method, key, **details))  # type: ignore[arg-type]
        return self.faults[-1]

    def count(self, method: str, key: str = "") -> int:
        """Requests that have arrived."""
        return sum(m == method and re.search(key, target) is not None for m, target in self.requests)

    def fault_of(self, method: str, target: str) -> Fault | None:
        with self.lock:
            self.requests.append((method, target))
            return next(iter([fault for fault in self.faults if fault.applies(method, target)]), None)

    def reset(self) -> None:
        """Forgets faults and requests."""
        for fault in self.faults:
            fault.release.set()
        self.faults, self.requests = [], []

    def close(self) -> None:
        self.reset()
        self.server.shutdown()
        self.server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """A client that was killed is no error here."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: Proxy

    def log_message(self, *_: object) -> None:
        pass

    def handle_one_request(self) -> None:
        self.raw_requestline = self.rfile.readline(65537)
        if not self.raw_requestline or not self.parse_request():
            self.close_connection = True
            return
        fault = self.owner.fault_of(self.command, unquote(self.path))
        kind = fault.kind if fault is not None else ""
        length = int(self.headers.get("Content-Length", 0))
        if fault is not None:
            fault.hit.set()
            if kind == "reset":
                return self.reset()
            if kind == "stall":
                fault.release.wait()
                return self.reset()
            if kind == "upload cut":
                self.forward(self.rfile.read(length // 2), whole=False)
                return self.reset()
            if kind == "delay":
                time.sleep(fault.delay_s)
        body = self.rfile.read(length)
        if fault is not None and kind == "answer":
            text = fault.text or f"<Error><Code>{fault.code}</Code><Message>injected</Message></Error>"
            return self.answer(fault.status, {"Content-Type": "application/xml"}, text.encode())
        status, headers, data = self.forward(body)
        if kind == "lost":
            return self.reset()
        sent = data[: len(data) // 2] if kind in ("cut", "short") else data
        if kind == "damaged":
            sent = bytes([data[0] ^ 1]) + data[1:]
        if kind == "short":
            headers = {name: value for name, value in headers.items() if "checksum" not in name.lower()}
        if fault is not None and kind == "trickle":
            self.answer(status, headers, b"", len(data))
            return self.trickle(fault, data)
        self.answer(status, headers, sent, None if kind == "short" else len(data))
        if kind == "cut":
            self.close_connection = True

    def forward(self, body: bytes, whole: bool = True) -> tuple[int, dict[str, str], bytes]:
        """The server's answer; a request that is not whole gets none."""
        connection = http.client.HTTPConnection(self.owner.upstream, timeout=30)
        try:
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() != "expect":
                    connection.putheader(name, value)
            connection.endheaders(body)
            if not whole:
                return 0, {}, b""
            response = connection.getresponse()
            dropped = ("transfer-encoding", "connection", "content-length")
            headers = {name: value for name, value in response.getheaders() if name.lower() not in dropped}
            if self.command == "HEAD":
                headers["Content-Length"] = response.getheader("Content-Length", "0")
            return response.status, headers, response.read()
        finally:
            connection.close()

    def answer(self, status: int, headers: dict[str, str], data: bytes, length: int | None = None) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if "Content-Length" not in headers:
            self.send_header("Content-Length", str(len(data) if length is None else length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
        self.wfile.flush()

    def trickle(self, fault: Fault, data: bytes) -> None:
        """Until the client leaves or `release` is set."""
        piece = -(-len(data) // PIECES)
        for start in range(0, len(data), piece):
            if fault.release.wait(fault.delay_s):
                return self.reset()
            self.wfile.write(data[start : start + piece])

    def reset(self) -> None:
        """Ends the connection with RST instead of FIN."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True
