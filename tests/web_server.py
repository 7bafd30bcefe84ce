"""A small web server that answers as a test wants, also wrongly, and remembers what it was asked."""

from __future__ import annotations

import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from urllib.parse import unquote

Answer = Callable[["Handler"], None]


class Handler(BaseHTTPRequestHandler):
    """One request; `send` and the like answer it."""

    protocol_version = "HTTP/1.1"
    server: WebServer

    def do_GET(self) -> None:
        self.server.asked.append((self.path, dict(self.headers)))
        answer = self.server.answers.get(unquote(self.path.partition("?")[0]), bytes)
        self.close_connection = True
        if callable(answer) and answer is not bytes:
            answer(self)
        else:
            self.send(answer if isinstance(answer, bytes) else b"", 200 if isinstance(answer, bytes) else 404)

    do_HEAD = do_POST = do_GET

    def send(self, content: bytes, status: int = 200, length: int | None = None, **headers: str) -> None:
        """Answer with a content, and with a length that may be another's."""
        self.send_response(status)
        self.send_header("Content-Length", str(len(content) if length is None else length))
        self.send_header("Connection", "close")
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        pass


class WebServer(ThreadingHTTPServer):
    """On a free port of 127.0.0.1; use as a context manager.

    Attributes:
        answers: path → content, or a function that answers; anything else is 404.
        asked: paths and headers of all requests.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: dict[str, bytes | Answer] = {}
        self.asked: list[tuple[str, dict[str, str]]] = []
        self._thread = threading.Thread(target=lambda: self.serve_forever(poll_interval=0.02), daemon=True)

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.server_port}"

    @property
    def paths(self) -> list[str]:
        return [path for path, _ in self.asked]

    def __enter__(self) -> WebServer:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # clients that leave in the middle are what is tested
