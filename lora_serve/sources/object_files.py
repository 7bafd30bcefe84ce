"""Adapters in buckets of S3 and Google Cloud Storage, through fsspec's s3fs and gcsfs.

Credentials and options are the libraries' own, from the environment, and what `LORA_SERVE_SOURCE_OPTIONS_…` says.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lora_serve.adapter_sources import AdapterLocation
from lora_serve.names import ARCHIVE, CONFIG, POOLING
from lora_serve.sources.remote_files import BLOCK, CONNECT_SECONDS, READ_SECONDS, RemoteFile, read_options

REQUEST = 8 << 20  # bytes that are asked for at once


class ObjectFiles:
    """An adapter below a prefix of a bucket, or an archive in it."""

    revision = ""

    def __init__(self, location: AdapterLocation) -> None:
        self._location = location
        options = {"skip_instance_cache": True, "use_listings_cache": False} | read_options(location.source)
        self._bucket = _open_s3(options) if location.scheme == "s3" else _open_google(options)

    def list(self) -> dict[str, RemoteFile]:
        place = self._location.place
        self._bucket.invalidate_cache()
        # Asked for by its name: a library may look for a missing folder by listing the one above.
        known = self._bucket.info(place if self._location.is_archive else f"{place}/{CONFIG}")
        if known["type"] != "file":
            raise FileNotFoundError(place)
        if self._location.is_archive:
            return {ARCHIVE: _remote_file(known)}
        entries = self._list(place)
        pooling = POOLING.partition("/")[0]
        if entries.get(pooling, {}).get("type") == "directory":
            entries |= {f"{pooling}/{name}": entry for name, entry in self._list(f"{place}/{pooling}").items()}
        return {name: _remote_file(entry) for name, entry in entries.items() if entry["type"] == "file"}

    @contextmanager
    def read(self, file: RemoteFile) -> Iterator[Iterator[bytes]]:
        with self._bucket.open(file.path, "rb", block_size=REQUEST) as opened:
            yield iter(lambda: opened.read(BLOCK), b"")

    def _list(self, folder: str) -> dict[str, dict[str, Any]]:
        entries = self._bucket.ls(folder, detail=True)
        return {str(entry["name"]).rstrip("/").rpartition("/")[2]: entry for entry in entries}


def _remote_file(entry: dict[str, Any]) -> RemoteFile:
    tag = next((str(entry[key]) for key in ("ETag", "etag", "generation") if entry.get(key)), "")
    return RemoteFile(str(entry["name"]), entry["size"], tag)


def _open_s3(options: dict[str, Any]) -> Any:
    from s3fs import S3FileSystem

    config = {
        "connect_timeout": CONNECT_SECONDS,
        "read_timeout": READ_SECONDS,
        "retries": {"total_max_attempts": 1},  # s3fs and `fetch.py` try again
    }
    return S3FileSystem(**({"config_kwargs": config} | options))


def _open_google(options: dict[str, Any]) -> Any:
    from gcsfs.core import GCSFileSystem  # of the JSON API; the package's own also opens gRPC channels

    return GCSFileSystem(**options)
