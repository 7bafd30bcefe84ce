"""Which files of a PEFT folder are taken, and how they are got out of an archive that may be hostile.

Names, links, sizes and counts are decided here before a byte is written; nothing is ever extracted by the archive's
own idea of a path. What is in the files is the engine's to check.
"""

from __future__ import annotations

import gzip
import io
import shutil
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Generator, Iterable
from contextlib import closing
from pathlib import Path, PurePosixPath
from typing import IO, cast

from lora_serve.errors import AdapterInvalid, TooLarge
from lora_serve.names import CARD, CONFIG, TOKENIZER, WEIGHTS

KEPT = (CONFIG, WEIGHTS, CARD, TOKENIZER)  # the engine compares the last with the base's, and stores the others

MOST_MEMBERS = 64
MOST_RATIO = 100  # of unpacked to packed; weights hardly shrink, bombs do
FREE_OF_RATIO = 16 << 20  # bytes; freshly made adapters are half zeros
CHUNK = 256 << 10
LONGEST_HEADER = 1 << 20  # of one tar member, names and extensions included
TAR_SLACK = 1 << 20  # headers and padding of a tar beside its members' bytes

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
# Beside the adapter in folders that a trainer wrote; they say nothing of the adapter.
LEFTOVERS = ("training_args.bin", "optimizer.pt", "optimizer.bin", "scheduler.pt", "rng_state.pth", "scaler.pt")
HARMLESS = (".json", ".txt", ".md", ".jinja", ".model", ".yaml", ".yml", ".toml", ".png", ".jsonl", ".tiktoken")
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


def kept(name: str) -> bool:
    """Whether a file of this bare name is handed on (True), or left out as no part of the adapter (False).

    Raises: `AdapterInvalid` for files that are neither.
    """
    if name in KEPT:
        return True
    if name in LEFTOVERS or name in HARMLESS_NAMES or name.endswith(HARMLESS) or name.startswith("._"):
        return False
    if name.lower().endswith(PICKLES):
        raise AdapterInvalid(f"{name[:100]} is a pickle, which can run code: save the adapter as {WEIGHTS}")
    raise AdapterInvalid(f"{name[:100]} is no part of a PEFT adapter; the files are {CONFIG} and {WEIGHTS}")


def unpack(archive: Path, folder: Path, most: int) -> None:
    """Write the adapter's files in `archive` (.tar, .tar.gz or .zip, told by content) into `folder`.

    Args:
        most: bytes of all members together, unpacked.

    Raises: `AdapterInvalid`, `TooLarge`; `OSError` of the disk. `folder` may then hold some of the files.
    """
    ratio = max(FREE_OF_RATIO, MOST_RATIO * archive.stat().st_size)
    budget = _Budget(most, ratio)
    with archive.open("rb") as file:
        magic = file.read(4)
        file.seek(0)
        try:
            if magic.startswith(b"PK"):
                members = _zip_members(file)
            elif magic.startswith(b"\x1f\x8b"):
                members = _tar_members(_Bounded(gzip.GzipFile(fileobj=file), most + TAR_SLACK, ratio))
            else:
                members = _tar_members(_Bounded(file, most + TAR_SLACK, ratio))
            with closing(members):
                _write(members, folder, budget)
        except _UNREADABLE as error:
            raise AdapterInvalid("the archive cannot be read; it must be a .tar, .tar.gz or .zip") from error


def bare_name(path: str, tops: set[str]) -> str:
    """The file name of a member, which may lie in one folder at most; that folder is added to `tops`.

    Empty for what macOS adds. Raises: `AdapterInvalid`.
    """
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or ".." in parts or "\\" in path or ":" in path or "\0" in path:
        raise AdapterInvalid("the archive has a member with a path that leads out of it")
    if parts[0] == "__MACOSX":
        return ""
    if len(parts) > 2:
        raise AdapterInvalid("the archive has folders in folders; it must hold one PEFT folder")
    tops.add(parts[0] if len(parts) == 2 else "")
    if len(tops) > 1:
        raise AdapterInvalid("the archive holds more than one folder; it must hold one PEFT folder")
    return parts[-1]


class _Budget:
    """Bytes that may still be unpacked."""

    def __init__(self, most: int, ratio: int) -> None:
        self._most = most
        self._ratio = ratio
        self._spent = 0

    def spend(self, count: int) -> None:
        self._spent += count
        if self._spent > self._most:
            raise TooLarge(f"the archive unpacks to more than {self._most:,} bytes")
        if self._spent > self._ratio:
            raise AdapterInvalid(f"the archive unpacks to more than {MOST_RATIO} times its size")


class _Bounded(io.RawIOBase):
    """A file that is read no further than `most`, in pieces that fit into memory: tar headers may claim any size."""

    def __init__(self, file: IO[bytes] | gzip.GzipFile, most: int, ratio: int) -> None:
        self._file = file
        self._most = most
        self._ratio = ratio + TAR_SLACK

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= LONGEST_HEADER:
            raise AdapterInvalid("the archive has a header that is too long")
        data = self._file.read(size)
        self._check(self._file.tell())
        return data

    def seek(self, offset: int, whence: int = 0) -> int:
        self._check(offset)
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def _check(self, position: int) -> None:
        if position > self._most:
            raise TooLarge(f"the archive unpacks to more than {self._most - TAR_SLACK:,} bytes")
        if position > self._ratio:
            raise AdapterInvalid(f"the archive unpacks to more than {MOST_RATIO} times its size")


Member = tuple[str, IO[bytes]]  # bare name, content


def _write(members: Iterable[Member], folder: Path, budget: _Budget) -> None:
    for name, content in members:
        target = folder / name
        if target.exists():
            raise AdapterInvalid(f"the archive has two files {name}")
        with target.open("xb") as file:
            while chunk := content.read(CHUNK):
                budget.spend(len(chunk))
                file.write(chunk)


def _counted(count: int) -> None:
    if count > MOST_MEMBERS:
        raise AdapterInvalid(f"the archive has more than {MOST_MEMBERS} members")


def _tar_members(file: _Bounded) -> Generator[Member]:
    tops: set[str] = set()
    with tarfile.open(fileobj=cast(IO[bytes], file), mode="r:") as tar:
        for count, member in enumerate(tar, 1):
            _counted(count)
            if member.isdir():
                continue
            if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.issparse():
                raise AdapterInvalid("the archive has a member that is not a plain file; links are not taken")
            name = bare_name(member.name, tops)
            if name and kept(name) and (content := tar.extractfile(member)):
                with content:
                    yield name, content


def _zip_members(file: IO[bytes]) -> Generator[Member]:
    _check_directory(file)
    tops: set[str] = set()
    with zipfile.ZipFile(file) as archive:
        for count, member in enumerate(archive.infolist(), 1):
            _counted(count)
            if member.is_dir():
                continue
            kind = stat.S_IFMT(member.external_attr >> 16)
            if kind not in (0, stat.S_IFREG):
                raise AdapterInvalid("the archive has a member that is not a plain file; links are not taken")
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise AdapterInvalid("the archive must be stored or deflated")
            name = bare_name(member.filename, tops)
            if name and kept(name):
                with archive.open(member) as content:
                    yield name, content


def _check_directory(file: IO[bytes]) -> None:
    """Refuse a zip whose directory is long: it is read into memory whole, before its members can be counted.

    Only the plainest end of a zip is taken: a directory record at the very end, no comment, no zip64 locator; with
    those, readers disagree on which directory counts.
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
    """Copy the adapter's files from `source`, a PEFT folder of this machine, into `folder`.

    Every file must, with all links followed, lie below one of `roots` (resolved).

    Raises: `AdapterInvalid`, `TooLarge`; `OSError` of the disk.
    """
    if not (source / WEIGHTS).exists():
        for path in sorted(source.iterdir()):
            if path.is_file():
                kept(path.name)  # the advice for adapter_model.bin
    total = 0
    for name in KEPT:
        path = (source / name).resolve()
        if not path.is_file():
            continue
        if not any(path.is_relative_to(root) for root in roots):
            raise AdapterInvalid(f"{name} is a link that leads out of the folders that may be read")
        total += path.stat().st_size
        if total > most:
            raise TooLarge(f"the adapter is larger than {most:,} bytes")
        shutil.copyfile(path, folder / name)
