"""Extract the files of a PEFT adapter from an uploaded, untrusted .tar, .tar.gz or .zip.

Every member's path, type and size is checked before it is extracted, under its bare file name, by `tarfile` (with the
`data` filter) or `zipfile`. What the files contain is checked by the engine.
"""

from __future__ import annotations

import gzip
import io
import re
import shutil
import stat
import struct
import tarfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, cast

from lora_serve.errors import AdapterInvalid, TooLarge
from lora_serve.names import CARD, CONFIG, MODULES, POOLING, TOKENIZER, WEIGHTS

# The tokenizer is only compared with the base's, not stored.
ADAPTER_FILES = (CONFIG, WEIGHTS, CARD, TOKENIZER, MODULES, POOLING)

MOST_MEMBERS = 64
MOST_RATIO = 100  # of unpacked to packed size; weights hardly compress, zip bombs do
FREE_OF_RATIO = 16 << 20  # bytes; in new adapters B is all zeros
LONGEST_HEADER = 1 << 20  # bytes of one tar header, pax records included
TAR_SLACK = 1 << 20  # bytes of headers and padding in a tar

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
# Written beside the adapter by trainers.
TRAINER_FILES = ("training_args.bin", "optimizer.pt", "optimizer.bin", "scheduler.pt", "rng_state.pth", "scaler.pt")
HARMLESS = (".json", ".txt", ".md", ".jinja", ".model", ".yaml", ".yml", ".toml", ".png", ".jsonl", ".tiktoken")
# Folders in which sentence-transformers keeps the configuration of what follows the transformer.
MODULE_FOLDERS = re.compile(r"[0-9]_(Pooling|Normalize|Dense|LayerNorm|Dropout)")
HARMLESS_NAMES = ("LICENSE", "NOTICE", ".gitattributes", ".gitignore", ".DS_Store")

_UNREADABLE = (
    tarfile.TarError,
    zipfile.BadZipFile,
    gzip.BadGzipFile,
    zlib.error,
    EOFError,
    struct.error,
    ValueError,
    NotImplementedError,
    RuntimeError,
)


def is_adapter_file(name: str) -> bool:
    """Whether a file of this name belongs to an adapter (True), or is known to be safe to leave out (False).

    Raises: `AdapterInvalid` for any other file.
    """
    if name in ADAPTER_FILES:
        return True
    if name in TRAINER_FILES or name in HARMLESS_NAMES or name.endswith(HARMLESS) or name.startswith("._"):
        return False
    if name.lower().endswith(PICKLES):
        raise AdapterInvalid(f"{name[:100]} is a pickle, which can run code: save the adapter as {WEIGHTS}")
    raise AdapterInvalid(f"{name[:100]} is no part of a PEFT adapter; the files are {CONFIG} and {WEIGHTS}")


def file_of(path: str) -> str:
    """The name under which a file of an adapter's folder is kept: without folders, except for `1_Pooling/config.json`.

    Empty for other files in folders of sentence-transformers' modules: what these do is in `modules.json`.
    """
    parts = PurePosixPath(path).parts
    if len(parts) > 1 and MODULE_FOLDERS.fullmatch(parts[-2]):
        return POOLING if "/".join(parts[-2:]) == POOLING else ""
    return parts[-1] if parts else ""


def unpack(archive: Path, folder: Path, most: int) -> None:
    """Extract the adapter's files from `archive` (.tar, .tar.gz or .zip, told by content) into `folder`.

    Args:
        most: bytes of the extracted files together.

    Raises: `AdapterInvalid`, `TooLarge`; `OSError` of the disk. `folder` may then hold some of the files.
    """
    limits = _Limits(most, max(FREE_OF_RATIO, MOST_RATIO * archive.stat().st_size))
    with archive.open("rb") as file:
        magic = file.read(4)
        file.seek(0)
        try:
            if magic.startswith(b"PK"):
                _unpack_zip(file, folder, limits)
            elif magic.startswith(b"\x1f\x8b"):
                _unpack_tar(gzip.GzipFile(fileobj=file), folder, limits)
            else:
                _unpack_tar(file, folder, limits)
        except _UNREADABLE as error:
            raise AdapterInvalid("the archive cannot be read; it must be a .tar, .tar.gz or .zip") from error


@dataclass(frozen=True)
class _Limits:
    """Largest unpacked size of an archive: as configured, and as a multiple of the archive's own size."""

    most: int
    by_ratio: int

    def check(self, unpacked: int) -> None:
        if unpacked > self.most:
            raise TooLarge(f"the archive unpacks to more than {self.most:,} bytes")
        if unpacked > self.by_ratio:
            raise AdapterInvalid(f"the archive unpacks to more than {MOST_RATIO} times its size")


class _Members:
    """Checks the members of an archive one by one, before they are extracted."""

    def __init__(self, limits: _Limits) -> None:
        self._limits = limits
        self._count = 0
        self._bytes = 0
        self._folders: set[str] = set()
        self._names: set[str] = set()

    def file_name(self, path: str, size: int, *, folder: bool, plain: bool) -> str:
        """The file name to extract a member under; empty if it is left out.

        Files may be in one top-level folder, the same for all of them.

        Args:
            size: unpacked, in bytes; `tarfile` and `zipfile` never write more than a member's header says.

        Raises: `AdapterInvalid`, `TooLarge`.
        """
        self._count += 1
        if self._count > MOST_MEMBERS:
            raise AdapterInvalid(f"the archive has more than {MOST_MEMBERS} members")
        if folder:
            return ""
        shown = path[:100]
        parts = PurePosixPath(path).parts
        if not plain:
            raise AdapterInvalid(f"{shown} in the archive is not a plain file; links are not taken")
        if not parts or path.startswith("/") or ".." in parts or "\\" in path or ":" in path or "\0" in path:
            raise AdapterInvalid(f"{shown} in the archive is a path that leads out of it")
        if parts[0] == "__MACOSX":
            return ""
        name = file_of(path)
        if not name:
            return ""
        parts = parts[: -name.count("/") or None]
        if len(parts) > 2:
            raise AdapterInvalid(f"the archive has folders in folders ({shown}); it must hold one PEFT folder")
        self._folders.add(parts[0] if len(parts) == 2 else "")
        if len(self._folders) > 1:
            raise AdapterInvalid(f"the archive holds more than one folder ({shown}); it must hold one PEFT folder")
        if not is_adapter_file(name):
            return ""
        if name in self._names:
            raise AdapterInvalid(f"the archive has two files {name}")
        self._names.add(name)
        self._bytes += size
        self._limits.check(self._bytes)
        return name


def _unpack_tar(file: IO[bytes] | gzip.GzipFile, folder: Path, limits: _Limits) -> None:
    members = _Members(limits)

    def choose(member: tarfile.TarInfo, path: str) -> tarfile.TarInfo | None:
        plain = member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and not member.issparse()
        name = members.file_name(member.name, member.size, folder=member.isdir(), plain=plain)
        if member.size < 0:
            raise tarfile.ReadError("negative size")
        if not name:
            return None
        own = member.replace(name=name, mtime=None, mode=None)  # type: ignore[arg-type]  # None: as for any new file
        return tarfile.data_filter(own, path)

    with tarfile.open(fileobj=cast(IO[bytes], _Bounded(file, limits)), mode="r:") as tar:
        tar.extractall(folder, filter=choose)


def _unpack_zip(file: IO[bytes], folder: Path, limits: _Limits) -> None:
    _check_directory(file)
    members = _Members(limits)
    with zipfile.ZipFile(file) as archive:
        for member in archive.infolist():
            plain = stat.S_IFMT(member.external_attr >> 16) in (0, stat.S_IFREG)
            name = members.file_name(member.filename, member.file_size, folder=member.is_dir(), plain=plain)
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise AdapterInvalid(f"{member.filename[:100]} in the archive must be stored or deflated")
            if name:
                member.filename = name
                archive.extract(member, folder)


class _Bounded:
    """A file for `tarfile` that reads no further than the limits, and no header too large for memory."""

    def __init__(self, file: IO[bytes] | gzip.GzipFile, limits: _Limits) -> None:
        self._file = file
        self._limits = limits

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= LONGEST_HEADER:
            raise AdapterInvalid("the archive has a header that is too long")
        data = self._file.read(size)
        self._limits.check(self._file.tell() - TAR_SLACK)
        return data

    def seek(self, offset: int, whence: int = 0) -> int:
        self._limits.check(offset - TAR_SLACK)
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()


def _check_directory(file: IO[bytes]) -> None:
    """Refuse a zip with a large central directory: `zipfile` reads it into memory before members can be counted.

    Accepted is only an end record at the very end of the file, without comment or zip64 locator: otherwise readers
    disagree on which directory counts.
    """
    end, locator = 22, 20
    size = file.seek(0, io.SEEK_END)
    file.seek(max(0, size - end - locator))
    tail = file.read()
    record = tail[-end:]
    if len(record) < end or record[:4] != b"PK\x05\x06" or record[-2:] != b"\0\0" or tail[:4] == b"PK\x06\x07":
        raise AdapterInvalid("the zip cannot be read: it is cut off, has a comment or is a zip64; a .tar.gz will do")
    (length,) = struct.unpack("<L", record[12:16])
    if length > 1024 * MOST_MEMBERS:
        raise AdapterInvalid(f"the archive has more than {MOST_MEMBERS} members")
    file.seek(0)


def copy(source: Path, folder: Path, roots: list[Path], most: int) -> None:
    """Copy the adapter's files from `source`, a PEFT folder on this machine, into `folder`.

    Every file, with links resolved, must be below one of `roots` (resolved).

    Raises: `AdapterInvalid`, `TooLarge`; `OSError` of the disk.
    """
    if not (source / WEIGHTS).exists():
        for path in sorted(source.iterdir()):
            if path.is_file():
                is_adapter_file(path.name)  # raises with advice if the weights are a pickle
    total = 0
    for name in ADAPTER_FILES:
        path = (source / name).resolve()
        if not path.is_file():
            continue
        if not any(path.is_relative_to(root) for root in roots):
            raise AdapterInvalid(f"{name} is a link that leads out of the folders that may be read")
        total += path.stat().st_size
        if total > most:
            raise TooLarge(f"the adapter is larger than {most:,} bytes")
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(path, folder / name)
