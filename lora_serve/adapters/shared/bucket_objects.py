"""A shared store in a bucket with S3's API, through obstore: objects are changed by `If-None-Match` and `If-Match`.

Credentials, region and endpoint are obstore's own, from the environment (`AWS_…`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, NotModifiedError, PreconditionError
from obstore.store import S3Store

from lora_serve.adapters.shared.shared_objects import ListedFile, ObjectConflict, ObjectsUnreachable, StoredObject

CONNECT, REQUEST = timedelta(seconds=3), timedelta(seconds=30)  # that a connection, and a whole request, may take
RETRIES = timedelta(seconds=5)  # in which a failed request is sent again
PART = 8 << 20  # bytes of a file that are sent or asked for at once


class BucketObjects:
    """A shared store below a prefix of a bucket. Raises ObjectsUnreachable for options that obstore refuses."""

    def __init__(self, bucket: str, prefix: str) -> None:
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
        with _reaching():
            self._store = S3Store(
                bucket,
                prefix=prefix or None,
                client_options={
                    "connect_timeout": CONNECT,
                    "timeout": REQUEST,
                    "allow_http": endpoint.startswith("http://"),
                },
                retry_config={"max_retries": 3, "retry_timeout": RETRIES},
            )
        self._place = f"s3://{bucket}/{prefix}"

    def __repr__(self) -> str:
        return f"<BucketObjects {self._place}>"

    def read(self, key: str, known: str = "") -> StoredObject | None:
        with _reaching():
            try:
                found = obstore.get(self._store, key, options={"if_none_match": known} if known else {})
            except FileNotFoundError:
                return None
            except NotModifiedError:
                return StoredObject(None, known)
            return StoredObject(bytes(found.bytes()), _tag(found.meta["e_tag"]))

    def create(self, key: str, data: bytes) -> str:
        with _reaching():
            try:
                return _tag(obstore.put(self._store, key, data, mode="create")["e_tag"])
            except AlreadyExistsError:
                raise ObjectConflict(key) from None

    def replace(self, key: str, data: bytes, tag: str) -> str:
        with _reaching():
            try:
                return _tag(obstore.put(self._store, key, data, mode={"e_tag": tag})["e_tag"])
            except (PreconditionError, AlreadyExistsError, FileNotFoundError):
                raise ObjectConflict(key) from None

    def remove(self, key: str) -> None:
        with _reaching():
            obstore.delete(self._store, key)

    def upload(self, key: str, path: Path) -> None:
        with _reaching():
            obstore.put(self._store, key, path, chunk_size=PART)

    def download(self, key: str, path: Path, size: int) -> None:
        with path.open("xb") as target:
            for start in range(0, size, PART):
                with _reaching(missing=True):
                    block = obstore.get_range(self._store, key, start=start, length=min(PART, size - start))
                target.write(block)

    def files(self, folder: str) -> Iterator[ListedFile]:
        with _reaching():
            for page in obstore.list(self._store, folder):
                for found in page:
                    yield ListedFile(found["path"], found["last_modified"].timestamp())

    def remove_file(self, key: str) -> None:
        self.remove(key)


def _tag(tag: str | None) -> str:
    """An object's tag. Raises ObjectsUnreachable if the store gives none."""
    if not tag:
        raise ObjectsUnreachable("it gives objects no ETag")
    return tag


@contextmanager
def _reaching(*, missing: bool = False) -> Iterator[None]:
    """What the library raises, as the interface says. `missing`: whether a file may be missing, not the bucket."""
    try:
        yield
    except FileNotFoundError as error:
        if missing:
            raise
        raise ObjectsUnreachable("the bucket does not exist") from error
    except BaseError as error:
        raise ObjectsUnreachable(_first_line(error)) from error


def _first_line(error: BaseError) -> str:
    """The beginning of a message, which goes on with the request and, over lines, with how it came about."""
    return str(error).partition("\n")[0].partition(" - Server returned")[0][:300]
