"""A server that speaks like Amazon's S3 on this machine (moto's), behind a proxy that counts
requests and makes some of them fail.
"""

from __future__ import annotations

import contextlib
import http.client
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal

from lca_posthoc.checkpoints.paths import path_of

SECRETS = ("AKIAOFTHETESTS", "a-secret-key-that-nobody-may-see")
_STARTS = 60.0  # seconds in which the server must answer

Fate = Literal["through", "refused", "lost", "twice", "silent", "unconditional"]
"""What becomes of a request: it is carried out; it is answered with 503 and not carried out; it is
carried out and the connection breaks before the answer; it is carried out twice and the second
answer is given; it is neither carried out nor answered, and the connection breaks; it is carried out
as if it named no condition.
"""


@dataclass(frozen=True)
class Request:
    """A request that came: GET, HEAD, PUT, POST or DELETE, of which path, with how many bytes."""

    method: str
    path: str
    size: int
    headers: frozenset[str]


@dataclass
class ObjectServer:
    """A server with one bucket.

    Attributes:
        address: of the proxy, as `http://127.0.0.1:PORT`.
        bucket: its name, which no other server's bucket has.
        fate: decides what becomes of each request.
        requests: that came, in order.
    """

    address: str
    bucket: str
    fate: Callable[[Request], Fate] = lambda request: "through"
    requests: list[Request] = field(default_factory=list)

    @property
    def environment(self) -> dict[str, str]:
        """The variables by which a driver finds the server, with credentials."""
        return {
            "AWS_ACCESS_KEY_ID": SECRETS[0],
            "AWS_SECRET_ACCESS_KEY": SECRETS[1],
            "AWS_ENDPOINT_URL": self.address,
            "AWS_ALLOW_HTTP": "true",
            "AWS_REGION": "us-east-1",
        }

    def place(self) -> Path:
        """Return the path of a directory that nobody else has."""
        return path_of(f"s3://{self.bucket}/{uuid.uuid4().hex}")

    def counted(self) -> dict[str, int]:
        """Return how many requests of each method came since the last call."""
        came, self.requests = self.requests, []
        return {method: sum(one.method == method for one in came) for method in _METHODS}


_METHODS = ("GET", "HEAD", "PUT", "POST", "DELETE")


@contextlib.contextmanager
def object_server() -> Iterator[ObjectServer]:
    """Start a server for the length of the context."""
    with plain_server() as port:
        bucket = f"lca-{uuid.uuid4().hex}"
        _create_bucket(port, bucket)
        proxy = _Proxy(("127.0.0.1", 0), port, bucket)
        thread = threading.Thread(target=proxy.serve_forever, daemon=True)
        thread.start()
        try:
            yield proxy.objects
        finally:
            proxy.shutdown()
            proxy.server_close()


@contextlib.contextmanager
def plain_server(host: str = "127.0.0.1", prefix: Sequence[str] = ()) -> Iterator[int]:
    """Start the server alone, without a bucket and without a proxy; its port.

    Args:
        host: the address on which it listens.
        prefix: what starts the process elsewhere, such as in a network namespace.
    """
    process = subprocess.Popen(
        [*prefix, sys.executable, "-c", _SERVE, host],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert process.stdout is not None
        with process.stdout:
            yield int(process.stdout.readline())
    finally:
        process.kill()
        process.wait()


# its own port, which nobody else can have taken meanwhile
_SERVE = """
import ctypes, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server
server = make_server(sys.argv[1], 0, DomainDispatcherApplication(create_backend_app), threaded=True)
print(server.port, flush=True)
server.serve_forever()
"""


def _create_bucket(port: int, bucket: str) -> None:
    deadline = time.monotonic() + _STARTS
    while True:
        try:
            with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port)) as connection:
                connection.request("PUT", f"/{bucket}")
                assert connection.getresponse().status == 200
                return
        except ConnectionError:
            assert time.monotonic() < deadline


class _Proxy(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], behind: int, bucket: str) -> None:
        super().__init__(address, _Handler)
        self.behind = behind
        self.objects = ObjectServer(f"http://127.0.0.1:{self.server_port}", bucket)
        self.one_at_a_time = threading.Lock()

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing: clients are killed, and connections broken, on purpose."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 2**16  # an answer in one packet
    disable_nagle_algorithm = True
    server: _Proxy

    def _pass(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        headers = frozenset(name.lower() for name in self.headers)
        request = Request(self.command, self.path, len(body), headers)
        with self.server.one_at_a_time:
            self.server.objects.requests.append(request)
            fate = self.server.objects.fate(request)
        if fate == "silent":
            self.close_connection = True
            return
        if fate == "refused":
            self._answer(503, {}, b"")
            return
        answer = self._carried_out(body, conditions=fate != "unconditional")
        if fate == "twice":
            answer = self._carried_out(body)
        if fate == "lost":
            self.close_connection = True
            return
        self._answer(*answer)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _pass  # noqa: N815 (as the library names them)

    def _carried_out(
        self, body: bytes, *, conditions: bool = True
    ) -> tuple[int, dict[str, str], bytes]:
        headers = {
            name: value
            for name, value in self.headers.items()
            if conditions or not name.lower().startswith("if-")
        }
        with contextlib.closing(
            http.client.HTTPConnection("127.0.0.1", self.server.behind)
        ) as connection:
            connection.request(self.command, self.path, body, headers)
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()

    def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response_only(status)
        length = headers.get("Content-Length") if self.command == "HEAD" else None
        for name, value in headers.items():
            if name.lower() not in ("content-length", "connection", "transfer-encoding"):
                self.send_header(name, value)
        self.send_header("Content-Length", length or str(len(body)))
        self.end_headers()
        self.wfile.write(body)
