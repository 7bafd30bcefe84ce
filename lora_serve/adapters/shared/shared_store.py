"""The store that replicas share, as one of them uses it: read and change the catalog, upload and fetch versions.

Methods block, may be called from any thread, and raise Unavailable while the store cannot be reached or has another
history than this replica has followed: nothing is ever deleted for what may be an unmounted folder or a wrong URL.
"""

from __future__ import annotations

import random
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec

from lora_serve.adapters.shared.catalog import (
    FORMAT,
    MOST_RECENT,
    Catalog,
    Edit,
    SharedVersion,
    decode_catalog,
    encode_catalog,
)
from lora_serve.adapters.shared.shared_objects import (
    CATALOG,
    CONTENTS,
    ObjectConflict,
    ObjectsUnreachable,
    OutcomeUnknown,
    SharedObjects,
    StoredObject,
)
from lora_serve.adapters.shared.store_probe import check_preconditions
from lora_serve.adapters.store.records import FollowedCatalog, VersionRecord
from lora_serve.errors import StorageFull, StoreUnusable, Unavailable

ATTEMPTS = 100  # at a change that other replicas are faster than
LONGEST_PAUSE = 0.2  # seconds between two of them
RETRY_AFTER = 5.0  # seconds after which clients may try again


class SharedStore:
    """A shared store for one base.

    Args:
        base, model: fingerprint and name of the base.
        followed: what this replica has followed before.
        pause: waits between attempts.
    """

    def __init__(
        self,
        objects: SharedObjects,
        base: str,
        model: str,
        followed: FollowedCatalog | None = None,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self._objects, self._base, self._model, self._pause = objects, base, model, pause
        self._followed = followed or FollowedCatalog()
        self._known: tuple[str, Catalog] | None = None
        self._lock = threading.Lock()
        self._opening = threading.Lock()
        self._open = False

    def __repr__(self) -> str:
        return f"<SharedStore {self._objects!r}, generation {self._followed.generation}>"

    def read(self) -> Catalog:
        """The newest catalog; the first time, check what the store does, and begin a catalog if there is none.

        Raises: StoreUnusable for a store that cannot be used, or is for another base.
        """
        self._check_open()
        return self._read()[1]

    def change(self, edit: Edit) -> Catalog:
        """Make a change on the newest catalog; returns the one in which it was made. Raises what `edit` raises."""
        self._check_open()
        id, asked = uuid.uuid4().hex, False
        for attempt in range(ATTEMPTS):
            try:
                tag, before = self._read()
            except Unavailable as error:
                if asked:
                    raise Unavailable(
                        "the shared store went away: it is not known whether the change was made; look before you "
                        "send it again",
                        retry_after=RETRY_AFTER,
                    ) from error
                raise
            if id in before.recent:
                return before
            after = msgspec.structs.replace(
                edit(before), generation=before.generation + 1, recent=[id, *before.recent][:MOST_RECENT]
            )
            try:
                with _translated():
                    self._take(self._objects.replace(CATALOG, encode_catalog(after), tag), after)
                return after
            except ObjectConflict:
                pass
            except (OutcomeUnknown, Unavailable):
                asked = True  # the next look says whether it was made
            self._pause(random.uniform(0, min(LONGEST_PAUSE, 0.005 * 2 ** min(attempt, 8))))
        raise Unavailable("too many changes of the shared store at once", retry_after=1.0)

    def upload(self, folder: Path, record: VersionRecord) -> SharedVersion:
        """Store the files of a version, which are in `folder`. No catalog names them yet."""
        self._check_open()
        version = SharedVersion(uuid.uuid4().hex, record.created, record.files, record.vocabulary)
        with _translated():
            for name in record.files:
                self._objects.upload(_key(record.digest, version, name), folder / name)
        return version

    def fetch(self, digest: str, version: SharedVersion, folder: Path) -> None:
        """Copy the files of a version into an empty folder; their content is not checked.

        Raises: Unavailable also if they are gone, as those of a version that is deleted meanwhile; StorageFull.
        """
        try:
            for name, file in version.files.items():
                (folder / name).parent.mkdir(exist_ok=True)
                with _translated():
                    self._objects.download(_key(digest, version, name), folder / name, file.size)
        except FileNotFoundError:
            raise Unavailable(
                f"files of version {digest[:12]} are missing in the shared store; publish it again"
            ) from None
        except OSError as error:
            if error.errno in StorageFull.errnos:
                raise StorageFull("the disk of the adapter store is full") from error
            raise StoreUnusable(f"the adapter store cannot be written ({error.strerror})") from error

    def _check_open(self) -> None:
        """See that the store can be used. Raises StoreUnusable."""
        with self._opening:
            if self._open:
                return
            with _translated():
                check_preconditions(self._objects)
                if self._objects.read(CATALOG) is None and not self._followed.id:
                    first = Catalog(FORMAT, uuid.uuid4().hex, self._base, self._model)
                    with suppress(ObjectConflict, OutcomeUnknown):  # another replica began it
                        self._objects.create(CATALOG, encode_catalog(first))
            self._read()
            self._open = True

    def _read(self) -> tuple[str, Catalog]:
        """The newest catalog and its tag."""
        known, followed = self._known, self._followed
        with _translated():
            found = self._objects.read(CATALOG, "" if known is None else known[0])
        if found is None:
            raise Unavailable("the shared store has no catalog any more; nothing was changed", retry_after=RETRY_AFTER)
        if known is not None and found.tag == known[0]:
            return known
        catalog = self._decode(found)
        _check_history(catalog, followed)
        return self._take(found.tag, catalog)

    def _decode(self, found: StoredObject) -> Catalog:
        try:
            catalog = decode_catalog(found.data or b"")
        except ValueError as error:
            raise Unavailable(
                f"the catalog of the shared store cannot be read: {error}", retry_after=RETRY_AFTER
            ) from None
        if catalog.base != self._base:
            raise StoreUnusable(
                f"the shared store is for {catalog.model or 'another model'} (fingerprint {catalog.base[:12]}), "
                f"not for {self._model} ({self._base[:12]}): name another one with --shared-store"
            )
        return catalog

    def _take(self, tag: str, catalog: Catalog) -> tuple[str, Catalog]:
        """Take note of a catalog that was read or written; returns it, or a newer one that another thread took."""
        with self._lock:
            if self._known is None or catalog.generation >= self._known[1].generation:
                self._followed = FollowedCatalog(catalog.id, catalog.generation)
                self._known = tag, catalog
            return self._known


def _check_history(catalog: Catalog, followed: FollowedCatalog) -> None:
    """Check that a catalog is what came of the one that was followed. Raises Unavailable."""
    if followed.id not in ("", catalog.id):
        raise Unavailable(
            "the shared store has another catalog than this replica has followed; nothing was changed. Is "
            "--shared-store right?",
            retry_after=RETRY_AFTER,
        )
    if catalog.generation < followed.generation:
        raise Unavailable(
            f"the shared store's catalog is of generation {catalog.generation}, and this replica has followed "
            f"{followed.generation}: it was restored from a copy. Nothing was changed",
            retry_after=RETRY_AFTER,
        )


def _key(digest: str, version: SharedVersion, name: str) -> str:
    return f"{CONTENTS}/{digest}/{version.upload}/{name}"


@contextmanager
def _translated() -> Iterator[None]:
    """What a store that is away raises, as the error for clients."""
    try:
        yield
    except ObjectsUnreachable as error:
        raise Unavailable(
            f"the shared store cannot be reached ({error}); nothing was changed", retry_after=RETRY_AFTER
        ) from error
