"""A small HTTP server of metrics, in place of a whole server."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from lora_serve.metrics import CONTENT_TYPE


@contextmanager
def served_metrics(render: Callable[[], bytes]) -> Iterator[int]:
    """A port at which what `render` returns is served under /metrics."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:  # the base's name
            self.send_response(200 if self.path == "/metrics" else 404)
            self.send_header("Content-Type", CONTENT_TYPE)
            self.end_headers()
            self.wfile.write(render())

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()
