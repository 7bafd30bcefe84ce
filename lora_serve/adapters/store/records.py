"""Records of the adapter store: which files a version consists of, and which versions a name refers to.

A version's identity is the digest of its PEFT files as they came. Records on disk carry a checksum of their content, so
that a truncated or edited one is noticed when it is read.
"""

from __future__ import annotations

import hashlib
import os
import stat
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec

from lora_serve.errors import AdapterInvalid
from lora_serve.names import CARD, CONFIG, MODULES, POOLING, SETTINGS, WEIGHTS

IDENTITY = (CONFIG, WEIGHTS, MODULES, POOLING, SETTINGS)  # files whose content makes a version what it is
KEPT = (*IDENTITY, CARD)  # files of a PEFT folder that the store keeps
UNTRUSTED = tuple(name for name in KEPT if name != SETTINGS)  # of one whose settings nobody has vouched for
MAX_RECORD = 16 << 20  # bytes

_RecordType = TypeVar("_RecordType")


class FileRecord(msgspec.Struct, frozen=True):
    """Size in bytes and SHA-256 of one file."""

    size: int
    sha256: str


class VersionRecord(msgspec.Struct, frozen=True):
    """A version's PEFT files by their path in its folder.

    `created` in seconds since the epoch. `vocabulary`: digest of the vocabulary of the `tokenizer.json` that came with
    the adapter (see `vocabulary_digest`); the file itself is not kept.
    """

    digest: str
    created: float
    files: dict[str, FileRecord]
    vocabulary: str = ""


class NameRecord(msgspec.Struct, frozen=True):
    """The versions of a name, by digest, newest first; the plain name refers to the first.

    `source`: the folder that the newest is a copy of, or that folder's signature. Empty for an upload.
    `shared`: whether the catalog of a shared store decides it.
    """

    versions: list[str]
    source: str = ""
    pinned: bool = False
    unlisted: bool = False
    shared: bool = False


class TargetRecord(msgspec.Struct, frozen=True):
    """An adapter that an alias stands for; `version`: a digest, or empty for whatever is current."""

    name: str
    version: str = ""
    weight: float = 1.0

    def __str__(self) -> str:
        return f"{self.name}@{self.version}" if self.version else self.name


class AliasRecord(msgspec.Struct, frozen=True):
    """What an alias stands for. `sticky`: `user`, `header:NAME` or nothing; `created` in seconds since the epoch.

    `shared`: whether the catalog of a shared store decides it.
    """

    targets: list[TargetRecord]
    sticky: str = ""
    created: float = 0.0
    shared: bool = False

    @property
    def etag(self) -> str:
        """Hex SHA-256 of what it stands for."""
        return hashlib.sha256(msgspec.json.encode((self.targets, self.sticky))).hexdigest()

    def names(self, adapter: str, version: str | None = None) -> bool:
        """Whether it names an adapter, or this version of it."""
        return any(each.name == adapter and version in (None, each.version) for each in self.targets)


class FollowedCatalog(msgspec.Struct, frozen=True):
    """Which catalog of a shared store this one is a copy of, and up to which of its generations it has been seen."""

    id: str = ""
    generation: int = 0


class StoreMarker(msgspec.Struct, frozen=True):
    """What makes a folder an adapter store: its format, and the fingerprint and the name of the base it is for."""

    format: int
    base: str = ""
    model: str = ""


class _Sealed(msgspec.Struct):
    checksum: str
    content: msgspec.Raw


def version_digest(files: Mapping[str, FileRecord]) -> str:
    """Hex SHA-256 that identifies the version with these files; README.md has no part in it."""
    lines = (f"{name} {files[name].sha256}\n" for name in sorted(files) if name in IDENTITY)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def describe_folder(folder: Path, vocabulary: str = "", names: Sequence[str] = KEPT) -> VersionRecord:
    """The record of the version that a PEFT folder is; hashes its files of these names and looks into none.

    Raises: AdapterInvalid if a file is a link or not a regular file, or if configuration or weights are missing.
    """
    files = {name: hash_file(folder, name) for name in names if os.path.lexists(folder / name)}
    for name in (CONFIG, WEIGHTS):
        if name not in files:
            raise AdapterInvalid(f"{name} is missing")
    return VersionRecord(version_digest(files), time.time(), files, vocabulary)


def hash_file(folder: Path, name: str) -> FileRecord:
    """Size and hash of a regular file. Raises AdapterInvalid if it is a link, not a regular file or unreadable."""
    path = folder / name
    try:
        if path.parent != folder and path.parent.is_symlink():
            raise AdapterInvalid(f"{path.parent.name} is a link")
        # O_NONBLOCK: opening a pipe does not wait for a writer.
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb", buffering=0) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise AdapterInvalid(f"{name} is not a regular file")
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return FileRecord(file.tell(), digest)
    except OSError as error:
        if path.is_symlink():
            raise AdapterInvalid(f"{name} is a link") from None
        raise AdapterInvalid(f"{name} cannot be read ({error.strerror})") from error


def find_damage(folder: Path, record: VersionRecord) -> str:
    """What is wrong with the PEFT files of a version, hashing each; empty if nothing is."""
    if damage := find_missing(folder, record):
        return damage
    for name, expected in record.files.items():
        try:
            if hash_file(folder, name) != expected:
                return f"{name} has been altered"
        except AdapterInvalid as error:
            return error.message
    return ""


def find_missing(folder: Path, record: VersionRecord) -> str:
    """As `find_damage`, from the files' sizes alone."""
    for name, expected in record.files.items():
        try:
            status = os.lstat(folder / name)
        except OSError as error:
            return f"{name} is missing" if isinstance(error, FileNotFoundError) else f"{name}: {error.strerror}"
        if not stat.S_ISREG(status.st_mode):
            return f"{name} is not a regular file"
        if status.st_size != expected.size:
            return f"{name} has {status.st_size:,} bytes instead of {expected.size:,}"
    return ""


def read_version(folder: Path) -> VersionRecord:
    """The record of the version in `folder`, whose name is its digest. Raises ValueError that says what is wrong."""
    record = read_sealed(folder / "version.json", VersionRecord)
    if not record.files.keys() <= set(KEPT) or record.digest != version_digest(record.files):
        raise ValueError("version.json contradicts itself")
    if record.digest != folder.name.partition(".")[0]:  # what follows a dot tells twins in set-aside/ apart
        raise ValueError("version.json is of another version")
    return record


def read_sealed(path: Path, kind: type[_RecordType]) -> _RecordType:
    """Read a record and check its checksum. Raises ValueError that says what is wrong with it."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_RECORD:
            raise ValueError(f"{path.name} is not a file of at most {MAX_RECORD:,} bytes")
        data = path.read_bytes()
    except FileNotFoundError:
        raise ValueError(f"{path.name} is missing") from None
    except OSError as error:
        raise ValueError(f"{path.name} cannot be read ({error.strerror})") from error
    if not data.strip(b"\0 \n"):
        raise ValueError(f"{path.name} is empty")
    try:
        sealed = msgspec.json.decode(data, type=_Sealed)
        if sealed.checksum != _checksum(bytes(sealed.content)):
            raise ValueError(f"{path.name} has been altered: its checksum does not fit")
        return msgspec.json.decode(sealed.content, type=kind)
    except msgspec.ValidationError:
        raise ValueError(f"{path.name} is not of the format that this version of lora-serve writes") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise ValueError(f"{path.name} is truncated or not JSON") from None


def seal(record: msgspec.Struct) -> bytes:
    """A record with its checksum, as JSON that people can read."""
    content = msgspec.json.encode(record)
    sealed = _Sealed(_checksum(content), msgspec.Raw(content))
    return msgspec.json.format(msgspec.json.encode(sealed), indent=1) + b"\n"


def _checksum(content: bytes) -> str:
    """SHA-256 of JSON whatever its layout and the order of its keys."""
    return hashlib.sha256(msgspec.json.encode(msgspec.json.decode(content), order="sorted")).hexdigest()
