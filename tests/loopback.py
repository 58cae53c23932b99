"""An S3 server on loopback: moto's, in a thread of this process, with credentials that nothing may repeat."""

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
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
        if self.writes_left is not None and method in WRITES:
            self.writes_left -= 1
            if self.writes_left < 0:
                environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
                start_response("503 Slow Down", [("Content-Type", "application/xml")])
                return [b"<Error><Code>SlowDown</Code></Error>"]
        answer: Iterable[bytes] = self._moto(environ, start_response)
        return answer
