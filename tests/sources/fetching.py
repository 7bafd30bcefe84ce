"""Fetch in this process, as a child of the fetch process would."""

from __future__ import annotations

from pathlib import Path

from lora_serve.adapter_sources import parse_source
from lora_serve.sources.fetch import fetch
from lora_serve.sources.fetch_messages import FetchDone, FetchJob


class Fetching:
    """Fetches adapters of one source into a folder.

    Attributes:
        files: what is in the folder after the last fetch.
        received: bytes reported by it.
    """

    def __init__(self, source: str, folder: Path, *, most: int = 1 << 30, seconds: float = 30.0) -> None:
        self._source, self._folder, self._most, self._seconds = source, folder, most, seconds
        self.received: list[int] = []

    def get(self, path: str = "poet") -> FetchDone:
        folder = self._folder / f"fetch-{len(list(self._folder.iterdir())) if self._folder.exists() else 0}"
        folder.mkdir(parents=True)
        self._last = folder
        self.received = []
        job = FetchJob(1, parse_source(self._source).locate(path), str(folder), self._most, self._seconds)
        return fetch(job, lambda received, expected: self.received.append(received))

    @property
    def files(self) -> dict[str, bytes]:
        return {
            path.relative_to(self._last).as_posix(): path.read_bytes()
            for path in self._last.rglob("*")
            if path.is_file()
        }
