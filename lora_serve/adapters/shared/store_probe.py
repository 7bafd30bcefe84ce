"""Finds out whether a shared store compares before it swaps: many servers with S3's API overwrite silently."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from contextlib import suppress

from lora_serve.adapters.shared.shared_objects import PROBES, ObjectConflict, ObjectsUnreachable, SharedObjects
from lora_serve.errors import StoreUnusable


def check_preconditions(objects: SharedObjects) -> None:
    """Try every way in which objects are changed. Raises StoreUnusable that names what is missing; ObjectsUnreachable.

    Leaves nothing behind, unless the store goes away.
    """
    key = f"{PROBES}/{uuid.uuid4().hex}"
    try:
        first = objects.create(key, b"1")
        _check_refused(lambda: objects.create(key, b"2"), "it makes an object that there is already (If-None-Match: *)")
        second = objects.replace(key, b"3", first)
        _check_refused(lambda: objects.replace(key, b"4", first), "it changes an object that has changed (If-Match)")
        found = objects.read(key)
        if found is None or found.data != b"3" or found.tag != second or objects.read(key, second) != (None, second):
            raise _unusable("it does not read what was written last")
    except ObjectConflict:
        raise _unusable("it refuses changes whose condition holds") from None
    finally:
        with suppress(ObjectsUnreachable):
            objects.remove(key)


def _check_refused(change: Callable[[], object], what: str) -> None:
    with suppress(ObjectConflict):
        change()
        raise _unusable(what)


def _unusable(what: str) -> StoreUnusable:
    return StoreUnusable(
        f"the shared store cannot be used: {what}; replicas would undo each other's changes without noticing"
    )
