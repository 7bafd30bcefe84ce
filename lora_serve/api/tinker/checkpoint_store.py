"""Checkpoints of Tinker's API on disk; each belongs to the key that saved it.

checkpoints/<id>/checkpoint.json    its record
checkpoints/<id>/state              what the engine saved: weights and optimizer; not of weights for sampling

A checkpoint appears by one rename of a folder that is already on the disk. Weights for sampling are an adapter in the
adapter store, which the record names. Of a checkpoint that was deleted, expired or replaced the record stays as long as
its model's calls may be repeated: otherwise the one that saved it would do so again.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from lora_serve.api.tinker.tinker_errors import UnknownTinkerObject
from lora_serve.errors import BadRequest, StoreUnusable, Unavailable
from lora_serve.training_messages import RunSettings

RECORD, STATE_FOLDER, SCHEME = "checkpoint.json", "state", "tinker://"
TRAINING, SAMPLER = "weights", "sampler_weights"  # kinds, as paths name them
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
SHORTEST_TTL, LONGEST_TTL = 3600, 10 * 366 * 86_400  # seconds
_ID = re.compile(r"[0-9a-f]{32}")

log = logging.getLogger(__name__)


class ModelFacts(msgspec.Struct, frozen=True):
    """What a model is, from when it was made.

    Attributes:
        base_model: as its client named it.
        layers: which groups of layers it was made for: `train_mlp`, `train_attn`, `train_unembed`.
    """

    base_model: str
    settings: RunSettings
    layers: dict[str, bool]
    metadata: dict[str, str] = {}


class TinkerCheckpoint(msgspec.Struct, frozen=True):
    """A checkpoint and whose it is. Times in seconds since the epoch.

    Attributes:
        owner: as `Caller.owner` says.
        seq: number of the call that saved it.
        adapter, digest: of weights for sampling.
        deleted: whether only the record is left.
    """

    id: str
    owner: str
    model_id: str
    kind: str
    name: str
    seq: int
    created: float
    expires: float | None
    size: int
    model: ModelFacts
    metadata: dict[str, str] = {}
    adapter: str = ""
    digest: str = ""
    deleted: bool = False

    @property
    def path(self) -> str:
        return f"{SCHEME}{self.model_id}/{self.kind}/{self.name}"


def check_checkpoint_name(name: str) -> str:
    """Return the name of a checkpoint. Raises `BadRequest`."""
    if not NAME.fullmatch(name):
        raise BadRequest("a checkpoint's name is 1 to 128 letters, digits, '.', '_' or '-'", param="path")
    return name


class TinkerCheckpoints:
    """The checkpoints of all keys. Methods wait for the disk; they may be called by several threads.

    Args:
        root: returns the folder; None while it is not known.
        clock: seconds since the epoch.

    Raises: every method `Unavailable` while the folder is not known, `StoreUnusable` if it cannot be read or written.
    """

    def __init__(self, root: Callable[[], Path | None], clock: Callable[[], float] = time.time) -> None:
        self._root, self._clock = root, clock
        self._lock = threading.RLock()
        self._found: dict[str, TinkerCheckpoint] | None = None  # by id

    def expired(self) -> list[TinkerCheckpoint]:
        """Checkpoints of all keys whose time has come."""
        with self._lock:
            now = self._clock()
            return [each for each in self._kept() if each.expires is not None and each.expires <= now]

    def adapters(self) -> set[str]:
        """The adapters that checkpoints of all keys name."""
        with self._lock:
            return {each.adapter for each in self._kept() if each.adapter}

    def list(self, owner: str) -> list[TinkerCheckpoint]:
        """A key's checkpoints, oldest first."""
        with self._lock:
            now = self._clock()
            found = [each for each in self._kept() if each.owner == owner]
            return sorted(
                (each for each in found if each.expires is None or each.expires > now), key=lambda each: each.created
            )

    def find(self, path: str, owner: str) -> TinkerCheckpoint:
        """The checkpoint at a tinker:// path. Raises UnknownTinkerObject."""
        found = [each for each in self.list(owner) if each.path == path]
        if not found:
            raise UnknownTinkerObject(f"there is no checkpoint {path[:200]}", param="path")
        return found[-1]

    def saved_by(self, model_id: str, seq: int) -> TinkerCheckpoint | None:
        """The checkpoint that a call of a model has saved, whether it was deleted since or not."""
        with self._lock:
            return next(
                (each for each in self._opened().values() if (each.model_id, each.seq) == (model_id, seq)), None
            )

    def begin(self) -> tuple[str, Path]:
        """Id and folder of a new checkpoint, whose state can be saved there; it is none until `add`."""
        id_ = secrets.token_hex(16)
        folder = self._folder() / f"{id_}.unfinished"
        try:
            folder.mkdir(parents=True)
        except OSError as error:
            raise _unusable(error) from error
        return id_, folder

    def add(self, checkpoint: TinkerCheckpoint, folder: Path) -> TinkerCheckpoint:
        """Keep a checkpoint, and return it with its size; one of the same path is replaced."""
        with self._lock:
            try:
                size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) or checkpoint.size
                checkpoint = msgspec.structs.replace(checkpoint, size=size)
                self._write(folder, checkpoint)
                folder.rename(self._folder() / checkpoint.id)
                _sync(self._folder())
            except OSError as error:
                shutil.rmtree(folder, ignore_errors=True)
                raise _unusable(error) from error
            found = self._opened()
            for other in [each for each in self._kept() if each.path == checkpoint.path and each.id != checkpoint.id]:
                self.delete(other)
            found[checkpoint.id] = checkpoint
            return checkpoint

    def discard(self, folder: Path) -> None:
        """Remove what `begin` began."""
        shutil.rmtree(folder, ignore_errors=True)

    def state(self, checkpoint: TinkerCheckpoint) -> Path:
        """The folder with its weights and optimizer."""
        return self._folder() / checkpoint.id / STATE_FOLDER

    def set_expiry(self, checkpoint: TinkerCheckpoint, ttl: int | None) -> None:
        """Let a checkpoint expire so many seconds from now, or never."""
        with self._lock:
            found = self._opened().get(checkpoint.id)
            if found is None or found.deleted:
                raise UnknownTinkerObject(f"there is no checkpoint {checkpoint.path[:200]} any more", param="path")
            changed = msgspec.structs.replace(found, expires=None if ttl is None else self._clock() + ttl)
            try:
                self._write(self._folder() / checkpoint.id, changed)
            except OSError as error:
                raise _unusable(error) from error
            self._opened()[checkpoint.id] = changed

    def delete(self, checkpoint: TinkerCheckpoint) -> None:
        """Delete a checkpoint; its adapter is left to the caller."""
        with self._lock:
            folder, deleted = self._folder() / checkpoint.id, msgspec.structs.replace(checkpoint, deleted=True)
            self._opened()[checkpoint.id] = deleted
            try:
                self._write(folder, deleted)
                shutil.rmtree(folder / STATE_FOLDER, ignore_errors=True)
            except OSError:  # a full disk, say: space is worth more than the record
                self._remove(folder)

    def forget_deleted(self, may_repeat: Callable[[str], bool]) -> None:
        """Remove the records of deleted checkpoints, except those of models whose calls may be repeated."""
        with self._lock:
            for each in [each for each in self._opened().values() if each.deleted and not may_repeat(each.model_id)]:
                del self._opened()[each.id]
                self._remove(self._folder() / each.id)

    def _remove(self, folder: Path) -> None:
        with suppress(OSError):
            (folder / RECORD).unlink()  # first: a folder without a record is no checkpoint
        shutil.rmtree(folder, ignore_errors=True)

    def _kept(self) -> Sequence[TinkerCheckpoint]:
        return [each for each in self._opened().values() if not each.deleted]

    def _opened(self) -> dict[str, TinkerCheckpoint]:
        if self._found is None:
            found = {}
            folder = self._folder()
            for path in sorted(folder.iterdir()) if folder.is_dir() else ():
                if _ID.fullmatch(path.name.removesuffix(".unfinished")) and not path.is_symlink():
                    try:
                        checkpoint = msgspec.json.decode((path / RECORD).read_bytes(), type=TinkerCheckpoint)
                    except (OSError, msgspec.MsgspecError):
                        checkpoint = None
                    if checkpoint is None or checkpoint.id != path.name:
                        log.info("a checkpoint that was not saved completely is removed: %s", path.name)
                        shutil.rmtree(path, ignore_errors=True)
                    else:
                        found[checkpoint.id] = checkpoint
            self._found = found
        return self._found

    def _folder(self) -> Path:
        root = self._root()
        if root is None:
            raise Unavailable("the server is starting", retry_after=5)
        return root / "checkpoints"

    def _write(self, folder: Path, checkpoint: TinkerCheckpoint) -> None:
        fresh = folder / f"{RECORD}.new"
        with fresh.open("wb") as file:
            file.write(msgspec.json.encode(checkpoint))
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(folder / RECORD)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _unusable(error: OSError) -> StoreUnusable:
    return StoreUnusable(f"a checkpoint cannot be written at the moment: {error.strerror}")
