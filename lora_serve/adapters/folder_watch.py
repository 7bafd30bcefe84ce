"""Follow the operator's folder of adapters (`--watch`): publish what is added or changed, unpublish what is removed.

The folder is scanned every few seconds, which works on network folders as well. Sizes and times of an adapter's files
must be the same in two scans before it is published, so that a folder is left alone while it is being written; the
compiler refuses what is truncated all the same. Only names whose newest version came from this folder are unpublished,
which their records in the store say, also after a restart.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

from lora_serve.adapter_files import find_adapter
from lora_serve.adapters.operations import AdapterChanges
from lora_serve.adapters.residency import Residency
from lora_serve.adapters.store.records import IDENTITY
from lora_serve.errors import AdapterInvalid, BadRequest, ServeError, TooLarge
from lora_serve.messages import AdapterInfo, Publish
from lora_serve.names import CONFIG, SETTINGS

TRY_AGAIN = 30  # scans after a failure that is not the adapter's
LASTING = (AdapterInvalid, TooLarge, BadRequest)

log = logging.getLogger(__name__)


class FolderState(NamedTuple):
    """One folder in the operator's: what publishing it would be the copy of, or why there is no adapter in it.

    Attributes:
        unreadable: whether nobody knows if there is an adapter in it.
    """

    source: str = ""
    problem: str = ""
    unreadable: bool = False


Scan = Mapping[str, FolderState]


def folder_source(folder: Path, *, trust_settings: bool = False) -> str:
    """What is recorded of a folder that is published: its path, and a hash of its files' sizes and times.

    Its `serve.yaml` is one of them if it counts, so that it is published again when that changes.
    """
    signature = sha256()
    for path in (folder / name for name in IDENTITY if trust_settings or name != SETTINGS):
        if path.exists():
            status = path.stat()
            signature.update(f"{path.resolve()} {status.st_size} {status.st_mtime_ns}\n".encode())
    return f"{_begin(folder.parent)}{folder.name} {signature.hexdigest()}"


def describe_missing_adapter(folder: Path) -> str:
    """Why no adapter is in a folder at the place where it is looked for."""
    try:
        return f"the adapter is further inside, in {find_adapter(folder).relative_to(folder)}; put it where it is seen"
    except (AdapterInvalid, OSError) as error:
        return str(error)


class FolderScanner:
    """Scans a folder; looks only once into one without an adapter, until it changes. Blocks.

    Args:
        trust_settings: whether the `serve.yaml` of adapters count.
    """

    def __init__(self, root: Path, *, trust_settings: bool = False) -> None:
        self._root, self._trust_settings = root, trust_settings
        self._explained: dict[str, tuple[int, str]] = {}
        status = root.stat()
        self._identity = status.st_dev, status.st_ino

    def scan(self) -> Scan | None:
        """All folders by name; None if the folder cannot be read, or an empty one is in its place.

        The latter is what a share leaves that is not mounted any more.
        """
        try:
            status = self._root.stat()
            identity = status.st_dev, status.st_ino
            found: dict[str, FolderState] = {}
            with os.scandir(self._root) as entries:
                for entry in sorted(entries, key=lambda entry: entry.name):
                    if not entry.name.startswith(".") and (state := self._look(entry)) is not None:
                        found[entry.name] = state
            if not found and identity != self._identity:
                return None
            self._identity = identity
            return found
        except OSError:
            return None

    def _look(self, entry: os.DirEntry[str]) -> FolderState | None:
        """What is in a folder; None if it is none, or not there any more."""
        try:
            return self._describe(Path(entry.path)) if entry.is_dir() else None
        except FileNotFoundError:
            return None
        except OSError as error:
            return FolderState(problem=f"it cannot be read: {error.strerror}", unreadable=True)

    def _describe(self, folder: Path) -> FolderState:
        if (folder / CONFIG).exists():
            return FolderState(folder_source(folder, trust_settings=self._trust_settings))
        changed = folder.stat().st_mtime_ns
        known = self._explained.get(folder.name)
        if known is None or known[0] != changed:
            known = self._explained[folder.name] = changed, describe_missing_adapter(folder)
        return FolderState(problem=known[1])


class FolderWatch:
    """What the engine's loop does about scans. Used by the loop alone, and never blocks.

    Args:
        first: a scan from before the folder's adapters were published at start.
        trust_settings: as of the `FolderScanner`.
    """

    def __init__(
        self,
        root: Path,
        operations: AdapterChanges,
        residency: Residency,
        first: Scan,
        *,
        trust_settings: bool = False,
    ) -> None:
        self._root, self._operations, self._residency = root, operations, residency
        self._trust_settings = trust_settings
        self._begin = _begin(root)  # once: it is compared with every name's, in the loop that computes steps
        self._previous = self._handled = dict(first)
        self._seen_any = bool(first)
        self._said: dict[str, str] = {}
        self._leaving: set[str] = set()  # names that are being unpublished
        self._failed: dict[str, int] = {}  # name → scans until it is tried again, where the adapter is not to blame

    def handle(self, scan: Scan | ServeError | None) -> None:
        """Publish and unpublish what differs from what was handled before."""
        if scan is None or isinstance(scan, ServeError):
            self._say("", f"{self._root} cannot be read; its adapters stay as they are")
            return
        # An empty folder at start is more likely a share that is not mounted than a wish to unpublish everything.
        self._seen_any = self._seen_any or bool(scan)
        self._try_failed_again()
        for name, state in scan.items():
            last = self._previous.get(name)
            if last != state:
                if last is not None and last.unreadable:
                    self._said.pop(name, None)
            elif state.unreadable:
                self._say(name, f"{_shown(name)} is not followed: {state.problem}")
            elif self._handled.get(name) != state:
                self._handled = self._handled | {name: state}
                self._publish(name, state)
        before, self._previous = self._previous, dict(scan)
        for name in [name for name, record in self._residency.names.items() if self._is_from_here(name, record.source)]:
            gone = not _may_have_adapter(scan, name) and not _may_have_adapter(before, name)
            if gone and self._seen_any and name not in self._leaving:
                self._unpublish(name)
        self._handled = {name: state for name, state in self._handled.items() if name in scan or name in before}
        self._said = {name: line for name, line in self._said.items() if name in scan or name in self._residency.names}

    def _try_failed_again(self) -> None:
        self._failed = {name: scans - 1 for name, scans in self._failed.items()}
        for name in [name for name, scans in self._failed.items() if scans <= 0]:
            del self._failed[name]
            self._handled = {other: state for other, state in self._handled.items() if other != name}

    def _publish(self, name: str, state: FolderState) -> None:
        shown = _shown(name)

        def done(result: AdapterInfo | ServeError) -> None:
            if isinstance(result, ServeError):
                if not isinstance(result, LASTING):
                    self._failed[name] = TRY_AGAIN
                self._say(name, f"{shown} is not served: {result.message}")
                return
            self._said.pop(name, None)
            log.info("adapter %s is published as %s", name, result.versions[0].digest[:12])
            for warning in result.versions[0].report.get("warnings", ()):
                log.warning("adapter %s: %s", name, warning)

        if state.problem:
            self._say(name, f"{shown} is not served: {state.problem}")
            return
        folder, source, trust = str(self._root / name), state.source, self._trust_settings
        try:
            publish = Publish(name, folder, replace=True, source=source, local=True, trust_settings=trust)
            self._operations.publish(publish, done)
        except ServeError as error:
            done(error)

    def _unpublish(self, name: str) -> None:
        def done(result: AdapterInfo | ServeError) -> None:
            self._leaving.discard(name)
            if isinstance(result, ServeError):
                self._say(name, f"{name} is no longer in the folder, and stays published: {result.message}")
            else:
                self._said.pop(name, None)
                log.info("adapter %s is unpublished: it is no longer in the folder", name)

        self._leaving.add(name)
        self._operations.delete(name, done)

    def _is_from_here(self, name: str, source: str) -> bool:
        return source.startswith(f"{self._begin}{name} ")

    def _say(self, name: str, line: str) -> None:
        """Say something about a folder once, until it is no longer so."""
        if self._said.get(name) != line:
            self._said[name] = line
            log.warning("%s", line)


def _begin(root: Path) -> str:
    """How the sources of all folders in one begin; the folder's name follows."""
    return f"folder {os.path.join(root.absolute(), '')}"


def _shown(name: str) -> str:
    """A folder's name, for a line of the log."""
    return name if name.isprintable() else repr(name)


def _may_have_adapter(scan: Scan, name: str) -> bool:
    return name in scan and (scan[name].unreadable or not scan[name].problem)
