"""Where a base's adapters are kept by default: a folder per fingerprint of the base, in the user's data folder."""

from __future__ import annotations

import os
import re
from pathlib import Path

from lora_serve.adapters.store.folder import StoreFolder
from lora_serve.adapters.store.scan import is_first_format, read_marker
from lora_serve.errors import StoreUnusable

_SHOWN = 12  # digits of the fingerprint in a folder's name


def default_store_folder(model_name: str, fingerprint: str) -> Path:
    """The store of the base with this fingerprint, whatever the base was called when it was made, or where to make it.

    Args:
        model_name: folder or hub id of the base.
    """
    chosen = _stores() / f"{_short_name(model_name)}-{fingerprint[:_SHOWN]}"
    existing = stores_of(fingerprint)
    return chosen if chosen in existing or not existing else existing[0]


def stores_of(fingerprint: str) -> list[Path]:
    """All stores in the user's data folder of the base with this fingerprint."""
    return [path for path, base in default_stores().items() if base == fingerprint]


def default_stores() -> dict[Path, str]:
    """The stores in the user's data folder, with the fingerprints of their bases."""
    found = {}
    for path in sorted(_stores().glob("*/")):
        try:
            marker = read_marker(StoreFolder(path))
        except (StoreUnusable, OSError):
            continue
        if marker is not None:
            found[path] = marker.base
    return found


def describe_other_stores(model_name: str, fingerprint: str, chosen: Path) -> list[str]:
    """A note for each folder, other than the chosen one, that seems to hold adapters of this base.

    Earlier versions of lora-serve kept them in a folder named by the base's name or folder, and a digest of these.
    """
    older = _data() / "lora-serve"
    names = {re.escape(name) for name in (model_name.replace("/", "--"), Path(model_name).resolve().name)}
    named = re.compile(f"({'|'.join(names)})-[0-9a-f]{{8}}")
    found = [path for path in stores_of(fingerprint) if path != chosen]
    if older.is_dir():
        found += [path for path in sorted(older.iterdir()) if named.fullmatch(path.name) and _has_adapters(path)]
    return [
        f"{path} also holds adapters of this base; to have them here, stop the server and run: "
        f"lora-serve store import {path} --store {chosen}"
        for path in found
        if path != chosen
    ]


def _has_adapters(path: Path) -> bool:
    try:
        return is_first_format(StoreFolder(path)) and any((path / "names").iterdir())
    except OSError:
        return False


def _data() -> Path:
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share")


def _stores() -> Path:
    return _data() / "lora-serve" / "stores"


def _short_name(model_name: str) -> str:
    name = Path(model_name).resolve().name if Path(model_name).is_dir() else model_name.rpartition("/")[2]
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name)[:64].strip(".-") or "model"
