"""Servers on loopback, in threads of this process: S3 (moto's), with credentials that nothing may repeat, and a web
server."""

import itertools
import logging
import re
import socket
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import Any

WRITES = ("PUT", "POST", "DELETE")
REFUSAL = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"


class S3:
    """Serves buckets until it is closed. `environment` is what a client of it needs; `requests` are all so far."""

    def __init__(self) -> None:
        from moto.server import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import make_server

        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self.requests: list[tuple[str, str]] = []
        self.refused: tuple[str, ...] = ()
        self.writes_left: int | None = None
        self._gone, self._gone_after = "", 0
        self._moto = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True)
        self.port = self._server.server_port
        Thread(target=self._server.serve_forever, daemon=True).start()
        self.environment = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_ACCESS_KEY_ID": "AKIDLOOPBACK00000000",
            "AWS_SECRET_ACCESS_KEY": "loopback-secret-0000000000000000",
            "AWS_SESSION_TOKEN": "loopback-token-00000000000000000",
            "AWS_REGION": "us-east-1",
        }
        self._numbers = itertools.count()
        self._bucket()
        self.cache = Path()  # set by the fixture

    def place(self) -> str:
        """The URL of an empty place that nobody else uses."""
        return f"s3://bucket/{next(self._numbers)}/rae"

    @contextmanager
    def read_only(self) -> Iterator[None]:
        """Refuses every request that would write."""
        self.refused = WRITES
        try:
            yield
        finally:
            self.refused = ()

    @contextmanager
    def failing(self, after: int) -> Iterator[None]:
        """Answers so many writes, and none after them."""
        self.writes_left = after
        try:
            yield
        finally:
            self.writes_left = None

    @contextmanager
    def without(self, part: str, after: int) -> Iterator[None]:
        """Answers so many requests for paths with `part` in them, and none after them."""
        self._gone, self._gone_after = part, after
        try:
            yield
        finally:
            self._gone = ""

    def close(self) -> None:
        self._server.shutdown()

    def _bucket(self) -> None:
        from urllib.request import Request, urlopen

        urlopen(Request(f"http://127.0.0.1:{self.port}/bucket", method="PUT")).close()

    def _answer(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        method = environ["REQUEST_METHOD"]
        self.requests.append((method, environ["PATH_INFO"]))
        if method in self.refused:
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start_response("403 Forbidden", [("Content-Type", "application/xml")])
            return [REFUSAL]
        if self._gone and self._gone in environ["PATH_INFO"]:
            self._gone_after -= 1
            if self._gone_after < 0:
                start_response("503 Slow Down", [("Content-Type", "application/xml")])
                return [b"<Error><Code>SlowDown</Code></Error>"]
        if self.writes_left is not None and method in WRITES:
            self.writes_left -= 1
            if self.writes_left < 0:
                environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
                start_response("503 Slow Down", [("Content-Type", "application/xml")])
                return [b"<Error><Code>SlowDown</Code></Error>"]
        answer: Iterable[bytes] = self._moto(environ, start_response)
        return answer


class WebServer:
    """Serves the files of a folder, and ranges of them unless `ranges` is false; `sent_bytes` counts what went out."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.ranges, self.sent_bytes = folder, True, 0
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                server.answer(self)

            do_GET = do_HEAD  # noqa: N815 (the library's name)

            def log_message(self, *words: object) -> None:
                """Nobody reads it."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path = self.folder / request.path.lstrip("/")
        if not path.is_file():
            request.send_response(404)
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        data, size = path.read_bytes(), path.stat().st_size
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers.get("Range", ""))
        if match and self.ranges:
            start, end = int(match[1]), min(int(match[2]) + 1, size)
            data = data[start:end]
            request.send_response(206)
            request.send_header("Content-Range", f"bytes {start}-{end - 1}/{size}")
        else:
            request.send_response(200)
        request.send_header("Content-Length", str(len(data)))
        request.send_header("ETag", f'"{path.stat().st_mtime_ns}"')
        request.end_headers()
        if request.command == "GET":
            request.wfile.write(data)
            self.sent_bytes += len(data)


class Proxy:
    """A TCP proxy in front of a server: `cut` breaks what is under way, `down` answers nobody until it is over."""

    def __init__(self, port: int) -> None:
        self._to = port
        self._pairs: set[tuple[socket.socket, socket.socket]] = set()
        self._is_down = False
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port = self._listener.getsockname()[1]
        self.cuts = 0
        Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Break every connection that is open."""
        for pair in list(self._pairs):
            self.cuts += 1
            for end in pair:
                with suppress(OSError):
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    end.shutdown(socket.SHUT_RDWR)

    @contextmanager
    def cutting(self, every_s: float) -> Iterator[None]:
        """Break every connection again and again."""
        over = Event()

        def work() -> None:
            while not over.wait(every_s):
                self.cut()

        thread = Thread(target=work, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    @contextmanager
    def down(self) -> Iterator[None]:
        self._is_down = True
        self.cut()
        try:
            yield
        finally:
            self._is_down = False

    def close(self) -> None:
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        with suppress(OSError):  # the listener is closed
            while True:
                client, _ = self._listener.accept()
                if self._is_down:
                    client.close()
                    continue
                pair = client, socket.create_connection(("127.0.0.1", self._to))
                self._pairs.add(pair)
                for one, other in (pair, pair[::-1]):
                    Thread(target=self._forward, args=(one, other, pair), daemon=True).start()

    def _forward(self, one: socket.socket, other: socket.socket, pair: Any) -> None:
        with suppress(OSError):
            while data := one.recv(1 << 16):
                other.sendall(data)
        for end in pair:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        self._pairs.discard(pair)
