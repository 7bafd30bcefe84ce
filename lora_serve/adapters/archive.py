"""Extract the files of a PEFT adapter from an uploaded, untrusted .tar, .tar.gz or .zip.

All members' paths are checked, and the adapter's files chosen among them, before any is extracted, under its own name,
by `tarfile` (with the `data` filter) or `zipfile`. Other members are not read. What the files contain is checked by the
engine.
"""

from __future__ import annotations

import errno
import gzip
import io
import shutil
import stat
import struct
import tarfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

from lora_serve.adapter_files import ADAPTER_FILES, choose_folder, find_adapter
from lora_serve.errors import AdapterInvalid, TooLarge

MOST_MEMBERS = 1000
MOST_RATIO = 100  # of unpacked to packed size; weights hardly compress, zip bombs do
FREE_OF_RATIO = 16 << 20  # bytes; in new adapters B is all zeros
LONGEST_HEADER = 1 << 20  # bytes of one tar header, pax records included
TAR_SLACK = 1 << 20  # bytes of headers and padding in a tar

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
    IndexError,  # a zip's member without a name
)


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
        except OSError as error:
            if error.errno != errno.EINVAL:  # of a seek to where an archive's own numbers led
                raise
            raise AdapterInvalid("the archive cannot be read; places in it are not where it says") from error


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
    """The files of an archive that are to be extracted, chosen when all members have been seen."""

    def __init__(self, limits: _Limits) -> None:
        self._limits = limits
        self._count = 0
        self._seen: dict[str, list[tuple[Any, int, bool]]] = {}  # path → members, their sizes, and whether plain files

    def add(self, member: Any, path: str, size: int, *, folder: bool, plain: bool) -> None:
        """Take note of a member.

        Args:
            size: unpacked, in bytes; `tarfile` and `zipfile` never write more than a member's header says.

        Raises: `AdapterInvalid` for too many members and for paths that lead out of the archive.
        """
        self._count += 1
        if self._count > MOST_MEMBERS:
            raise AdapterInvalid(f"the archive has more than {MOST_MEMBERS} members")
        parts = PurePosixPath(path).parts
        if path.startswith("/") or ".." in parts or "\\" in path or ":" in path or "\0" in path:
            raise AdapterInvalid(f"{path[:100]} in the archive is a path that leads out of it")
        if parts and parts[0] != "__MACOSX" and not folder:
            self._seen.setdefault("/".join(parts), []).append((member, size, plain))

    def choose(self) -> list[tuple[Any, str]]:
        """Members to extract, and the names to extract them under. Raises `AdapterInvalid`, `TooLarge`."""
        folder = choose_folder(self._seen)
        chosen: list[tuple[Any, str]] = []
        total = 0
        for name in ADAPTER_FILES:
            path = name if folder == "." else f"{folder}/{name}"
            for member, size, plain in self._seen.get(path, ())[:2]:
                if not plain:
                    raise AdapterInvalid(f"{path[:100]} in the archive is not a plain file; links are not taken")
                if any(name == other for _, other in chosen):
                    raise AdapterInvalid(f"the archive has two files {path[:100]}")
                chosen.append((member, name))
                total += size
        self._limits.check(total)
        return chosen


def _unpack_tar(file: IO[bytes] | gzip.GzipFile, folder: Path, limits: _Limits) -> None:
    members = _Members(limits)
    with tarfile.open(fileobj=cast(IO[bytes], _Bounded(file, limits)), mode="r:") as tar:
        for member in tar:
            if member.size < 0:
                raise tarfile.ReadError("negative size")
            plain = member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and not member.issparse()
            members.add(member, member.name, member.size, folder=member.isdir(), plain=plain)
        # Without a mode and a time of their own, files get those of any new file.
        own = [member.replace(name=name, mtime=None, mode=None) for member, name in members.choose()]
        tar.extractall(folder, own, filter="data")


def _unpack_zip(file: IO[bytes], folder: Path, limits: _Limits) -> None:
    _check_directory(file)
    members = _Members(limits)
    with zipfile.ZipFile(file) as archive:
        for member in archive.infolist():
            plain = stat.S_IFMT(member.external_attr >> 16) in (0, stat.S_IFREG)
            members.add(member, member.filename, member.file_size, folder=member.is_dir(), plain=plain)
        for member, name in members.choose():
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise AdapterInvalid(f"{member.filename[:100]} in the archive must be stored or deflated")
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
    length, offset = struct.unpack("<LL", record[12:20])
    if length > 1024 * MOST_MEMBERS:
        raise AdapterInvalid(f"the archive has more than {MOST_MEMBERS} members")
    if offset + length != size - end:
        raise AdapterInvalid("the zip cannot be read: its directory is not where its end says")
    file.seek(0)


def copy_file(path: Path, target: Path, most: int) -> None:
    """Copy one file. Raises `TooLarge`; `OSError` of the disk."""
    if path.stat().st_size > most:
        raise TooLarge(f"the archive is larger than {most:,} bytes")
    shutil.copyfile(path, target)


def copy(source: Path, folder: Path, roots: list[Path], most: int) -> None:
    """Copy the adapter's files from `source`, a PEFT folder on this machine or one that contains one, into `folder`.

    Every file, with links resolved, must be below one of `roots` (resolved).

    Raises: `AdapterInvalid`, `TooLarge`; `OSError` of the disk.
    """
    source = find_adapter(source)
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
