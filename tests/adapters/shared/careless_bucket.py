"""A small server with S3's API that ignores some of the conditions of a request, as several real ones do."""

from __future__ import annotations

import hashlib
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType


class CarelessBucket:
    """Serves one bucket; use as a context manager.

    Args:
        honours: the conditions that it looks at.
    """

    def __init__(self, *honours: str) -> None:
        objects: dict[str, bytes] = {}

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_PUT(self) -> None:
                data = self.rfile.read(int(self.headers["Content-Length"]))
                before = objects.get(self.path)
                exists = before is not None
                if ("If-None-Match" in honours and self.headers.get("If-None-Match") == "*" and exists) or (
                    "If-Match" in honours and self.headers.get("If-Match", _tag(before)) != _tag(before)
                ):
                    self._answer(412)
                    return
                objects[self.path] = data
                self._answer(200)

            def do_GET(self) -> None:
                data = objects.get(self.path)
                if data is None:
                    self._answer(404)
                elif self.headers.get("If-None-Match") == _tag(data):
                    self._answer(304)
                else:
                    self._answer(200, data)

            def do_POST(self) -> None:
                """DeleteObjects."""
                body = self.rfile.read(int(self.headers["Content-Length"])).decode()
                bucket = self.path.partition("?")[0].rstrip("/")
                for key in re.findall("<Key>(.*?)</Key>", body):
                    objects.pop(f"{bucket}/{key}", None)
                self._answer(200, b"<DeleteResult/>")

            def _answer(self, status: int, data: bytes = b"") -> None:
                self.send_response(status)
                self.send_header("ETag", _tag(objects.get(self.path)))
                self.send_header("Last-Modified", "Thu, 26 Nov 2026 10:00:00 GMT")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *given: object) -> None:
                pass

        self.objects = objects
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> CarelessBucket:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _tag(data: bytes | None) -> str:
    return "" if data is None else f'"{hashlib.md5(data).hexdigest()}"'
