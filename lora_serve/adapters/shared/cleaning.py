"""Removes files of a shared store that no version needs any more.

Every upload has a place of its own, which is never used again, so a file that the catalog does not name is either not
needed any more or of an upload that is under way. The latter are told by their age, by the store's own clock.
"""

from __future__ import annotations

import tempfile
import uuid
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from lora_serve.adapters.shared.catalog import decode_catalog
from lora_serve.adapters.shared.shared_objects import (
    CATALOG,
    CONTENTS,
    PROBES,
    UNFINISHED,
    ListedFile,
    ObjectsUnreachable,
    SharedObjects,
)
from lora_serve.errors import StoreUnusable, Unavailable


def clean(objects: SharedObjects, grace: float, *, remove: bool, found: Callable[[str], None]) -> int:
    """Remove what is not needed and older than `grace` seconds; calls `found` with each key. Returns how many.

    Args:
        remove: otherwise nothing is removed.

    Raises: StoreUnusable if there is no readable catalog, Unavailable.
    """
    try:
        now = _store_time(objects)
        listed = [file for folder in (CONTENTS, PROBES, UNFINISHED) for file in objects.files(folder)]
        # Read after the list is complete: what has been named meanwhile is needed.
        catalog = objects.read(CATALOG)
        if catalog is None or catalog.data is None:
            raise StoreUnusable("there is no catalog, so nobody knows what is needed")
        needed = decode_catalog(catalog.data).uploads
        needless = [file for file in listed if _upload_of(file) not in needed and now - file.modified > grace]
        for file in needless:
            if remove:
                objects.remove_file(file.key)
            found(file.key)
        return len(needless)
    except ObjectsUnreachable as error:
        raise Unavailable(f"the shared store cannot be reached ({error})") from error
    except ValueError as error:
        raise StoreUnusable(f"the catalog cannot be read: {error}") from None


def _upload_of(file: ListedFile) -> tuple[str, str]:
    """Digest and upload that a file belongs to; no catalog has those of a file that is somewhere else."""
    parts = PurePosixPath(file.key).parts
    return (parts[1], parts[2]) if parts[0] == CONTENTS and len(parts) > 3 else ("", "")


def _store_time(objects: SharedObjects) -> float:
    """The time by the clock that the store gives files their times by."""
    folder = f"{CONTENTS}/clock/{uuid.uuid4().hex}"
    with tempfile.NamedTemporaryFile() as empty:
        objects.upload(f"{folder}/now", Path(empty.name))
    try:
        return next(file.modified for file in objects.files(folder))
    finally:
        objects.remove_file(f"{folder}/now")
