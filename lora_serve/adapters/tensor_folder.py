"""Folders of tensors and JSON that appear as a whole or not at all, whatever happens while they are written.

A folder is written beside its place, brought to the disk and then renamed. What a killed process left is removed by the
next attempt to write the same folder. Everything here may block: it runs in a thread.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from lora_serve.adapters.store.disk import Disk
from lora_serve.errors import BadRequest, StorageFull, StoreUnusable

UNFINISHED = ".unfinished"  # follows the name of a folder that is being written

log = logging.getLogger(__name__)


def json_bytes(content: Mapping[str, Any]) -> bytes:
    """A JSON file."""
    return json.dumps(content, indent=2).encode()


def tensor_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """A safetensors file of contiguous tensors on the host."""
    return save(dict(tensors), metadata={"format": "pt"})


def write_folder(folder: Path, files: Mapping[str, bytes], disk: Disk | None = None) -> None:
    """Write a new folder with these files, which are on the disk afterwards.

    Raises BadRequest if it exists, StorageFull and StoreUnusable; then there is no folder.
    """
    disk = disk or Disk()
    if not folder.is_absolute() or folder.name in ("", "..") or "\0" in str(folder):
        raise BadRequest("the folder is no absolute path of one", param="folder")
    unfinished, own = folder.with_name(folder.name + UNFINISHED), False
    try:
        if os.path.lexists(folder):
            raise BadRequest("the folder exists already", param="folder")
        disk.remove(unfinished)
        disk.make_folder(unfinished)
        for name, content in files.items():
            disk.write(unfinished / name, content)
        disk.sync(unfinished)
        disk.move(unfinished, folder)
        own = True
        disk.sync(folder.parent)
    except OSError as error:
        log.error("%s cannot be written: %s", folder, error)
        for path in (unfinished, *([folder] if own else [])):  # another may have made the folder meanwhile
            with suppress(OSError):
                disk.remove(path)
        if error.errno in StorageFull.errnos:
            raise StorageFull("the disk for training runs is full; nothing was written") from error
        raise StoreUnusable(f"the training run cannot be written ({error.strerror}); nothing was written") from error


def read_tensors(folder: Path, record: str, tensors: str, checksum: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A folder's JSON file `record` and its tensors, whose SHA-256 that file gives under the key `checksum`.

    Raises BadRequest if they are missing, damaged or do not belong together.
    """
    try:
        described: dict[str, Any] = json.loads((folder / record).read_bytes())
        data = (folder / tensors).read_bytes()
        if hashlib.sha256(data).hexdigest() != described[checksum]:
            raise ValueError(f"{tensors} is not as it was written")
        return described, load(data)
    except FileNotFoundError as error:
        raise BadRequest("there is no saved run in the folder", param="folder") from error
    except OSError as error:
        raise BadRequest(f"the saved run cannot be read ({error.strerror})", param="folder") from error
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise BadRequest("the saved run is damaged: its files do not fit together", param="folder") from error
