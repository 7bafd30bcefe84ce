"""The server is killed in the middle of an upload of training data: other files are there, and nothing of that one."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from server_process import ServerProcess, until

LINE = json.dumps({"prompt": "two red foxes\n", "completion": "TWO RED FOXES"}).encode() + b"\n"
HEAD = (
    b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
    b'--b\r\nContent-Disposition: form-data; name="file"; filename="x.jsonl"\r\n\r\n'
)


def upload(server: ServerProcess, content: Iterator[bytes]) -> httpx.Response:
    kind = {"Content-Type": "multipart/form-data; boundary=b"}
    return httpx.post(f"{server.url}/v1/files", content=content, headers=kind, timeout=60)


def whole(times: int) -> Iterator[bytes]:
    yield HEAD + LINE * times + b"\r\n--b--\r\n"


@pytest.mark.slow
def test_kill_9_in_the_middle_of_an_upload(tmp_path: Path) -> None:
    store = tmp_path / "store"
    killed = threading.Event()

    def endless() -> Iterator[bytes]:
        yield HEAD
        while not killed.is_set():
            yield LINE * 10_000
            time.sleep(0.01)

    def try_upload(server: ServerProcess) -> None:
        with pytest.raises(httpx.TransportError):
            upload(server, endless())

    with ServerProcess(store) as server:
        kept = [upload(server, whole(times)).json() for times in (1, 1000)]
        client = threading.Thread(target=try_upload, args=(server,))
        client.start()
        until(lambda: any(path.stat().st_size > 1 << 20 for path in (store / "staging").glob("upload-*/file/content")))
        engine = psutil.Process(server.engine_pid)
        server.signal(signal.SIGKILL)
        server.wait(10)
        killed.set()
        client.join(30)
        until(lambda: not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE, 30)
    with ServerProcess(store) as server:
        assert [*(store / "staging").iterdir()] == []
        assert server.http.get("/v1/files?order=asc").json()["data"] == kept
        assert server.http.get(f"/v1/files/{kept[1]['id']}/content").content == LINE * 1000
        assert len([*(store / "files").iterdir()]) == 2
