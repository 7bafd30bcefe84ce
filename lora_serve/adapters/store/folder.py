"""Layout of an adapter store's folder, and the changes to it that leave either the old state or the new one.

lora-serve-store.json   marker: the format, and which base the adapters are for
versions/<digest>/      version.json, the PEFT files as they came, and lowered/, which can be made again from them
names/<name>.json       the versions of a name
aliases/<name>.json     the names and versions that an alias stands for
shared.json             which catalog of a shared store was followed, and how far
staging/                unfinished work of this server, swept when the store is opened
set-aside/              what was found and not understood, or had no name; never deleted by the server
lock                    held by the process that has the store open
"""

from __future__ import annotations

import logging
import os
import re
import uuid
from collections.abc import Collection
from contextlib import suppress
from itertools import count
from pathlib import Path

from lora_serve.adapters.store.disk import Disk
from lora_serve.adapters.store.records import KEPT

FORMAT = 2
MARKER = "lora-serve-store.json"
RECORD = "version.json"
LOWERED = "lowered"
DIGEST = re.compile(r"[0-9a-f]{64}")
# Names that this server gives to its entries in staging/; everything else there is not its own.
STAGED = re.compile(r"(upload|publish|write|lowered|drop)-[0-9a-f]{32}")
_OWN_FILES = (*KEPT, RECORD, "meta.json")  # meta.json: of format 1
log = logging.getLogger(__name__)


class StoreFolder:
    """Paths of a store, and changes to single entries of it. Methods that change something raise OSError."""

    def __init__(self, root: Path, disk: Disk | None = None) -> None:
        self.root = root
        self.disk = disk or Disk()
        self.marker = root / MARKER
        self.lock = root / "lock"
        self.shared = root / "shared.json"
        self.versions = root / "versions"
        self.names = root / "names"
        self.aliases = root / "aliases"
        self.staging = root / "staging"
        self.aside = root / "set-aside"

    def version(self, digest: str) -> Path:
        return self.versions / digest

    def name(self, name: str) -> Path:
        return self.names / f"{name}.json"

    def alias(self, name: str) -> Path:
        return self.aliases / f"{name}.json"

    def new_path(self, kind: str) -> Path:
        """An unused path in staging; `kind` is one of those in `STAGED`."""
        return self.staging / f"{kind}-{uuid.uuid4().hex}"

    def replace_file(self, path: Path, data: bytes) -> None:
        """Write a small file, in place of an existing one, by one rename."""
        temporary = self.new_path("write")
        try:
            self.disk.write(temporary, data)
            self.disk.move(temporary, path)
        except BaseException:
            with suppress(OSError):
                self.disk.remove(temporary)
            raise
        self.sync_entries(path.parent)

    def sync_entries(self, path: Path) -> None:
        """Wait until a folder's entries are on the disk. A failure is logged: what was renamed is done."""
        try:
            self.disk.sync(path)
        except OSError as error:
            log.error("the adapter store %s may lose its last change: %s", self.root, error)

    def aside_path(self, path: Path) -> Path:
        """An unused path in set-aside/ for an entry of the store; its parent exists."""
        target = self.aside / path.relative_to(self.root)
        self.disk.make_folder(target.parent)
        if not os.path.lexists(target):
            return target
        return next(each for n in count(2) if not os.path.lexists(each := target.with_name(f"{target.name}.{n}")))

    def set_aside(self, path: Path) -> Path:
        """Move an entry of the store to set-aside/. Returns where it is now."""
        target = self.aside_path(path)
        self.disk.move(path, target)
        return target

    def discard(self, path: Path) -> None:
        """Remove an entry of staging; what others put into a version's folder is set aside first.

        What cannot be removed stays until the store is opened again.
        """
        with suppress(OSError):
            if path.name.startswith("drop-"):
                for entry in unwanted_entries(path, _OWN_FILES):
                    self.set_aside(entry)
            self.disk.remove(path)


def unwanted_entries(version: Path, files: Collection[str]) -> list[Path]:
    """Entries of a version's folder other than `lowered/` and these files, which are named by their path in it."""
    folders = {version / name for file in files for name in [Path(file).parts[0]] if name != file}
    found = []
    for parent in (version, *folders):
        if parent.is_dir() and not parent.is_symlink():
            found += [path for path in parent.iterdir() if str(path.relative_to(version)) not in (*files, LOWERED)]
    return sorted(path for path in found if path not in folders or path.is_symlink())
