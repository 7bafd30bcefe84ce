"""Where a shared store is: a URL of a folder or of a bucket."""

from __future__ import annotations

from pathlib import Path

from lora_serve.adapters.shared.folder_objects import FolderObjects
from lora_serve.adapters.shared.shared_objects import ObjectsUnreachable, SharedObjects
from lora_serve.config import parse_shared_store
from lora_serve.errors import BadRequest, StoreUnusable


def open_objects(url: str) -> SharedObjects:
    """The shared store at a URL. Raises StoreUnusable, or BadRequest that says what to install."""
    scheme, place = parse_shared_store(url)
    if scheme == "file":
        return FolderObjects(Path(place))
    try:
        from lora_serve.adapters.shared.bucket_objects import BucketObjects  # here: an extra
    except ModuleNotFoundError:
        raise BadRequest("a shared store in a bucket needs obstore: pip install 'lora-serve[bucket]'") from None
    bucket, _, prefix = place.partition("/")
    try:
        return BucketObjects(bucket, prefix)
    except ObjectsUnreachable as error:
        raise StoreUnusable(f"the shared store {url} cannot be used: {error}") from error
