"""The safetensors files of a base's checkpoint, of a local folder or of the hub's cache, and the tensors in them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec
from transformers.utils.hub import cached_file

MAX_HEADER = 256 << 20  # bytes
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


class CheckpointTensor(NamedTuple):
    """A tensor of a checkpoint: safetensors' name of its dtype, and its place in the file, in bytes."""

    name: str
    dtype: str
    shape: list[int]
    file: Path
    start: int
    end: int


def find_file(name: str, revision: str | None, file: str) -> Path:
    """A file of a checkpoint. Raises FileNotFoundError if it has none of that name here."""
    found = cached_file(
        name, file, revision=revision or "main", local_files_only=True, _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False, _raise_exceptions_for_gated_repo=False,
    )  # fmt: skip
    if found is None:
        raise FileNotFoundError(f"it has no {file}")
    return Path(found)


def weight_files(name: str, revision: str | None) -> list[Path]:
    """The checkpoint's safetensors files. Raises FileNotFoundError if it has none."""
    try:
        return [find_file(name, revision, WEIGHTS_FILE)]
    except FileNotFoundError:
        index = msgspec.json.decode(find_file(name, revision, INDEX_FILE).read_bytes())
        return [find_file(name, revision, file) for file in sorted(set(index["weight_map"].values()))]


def read_header(path: Path) -> Iterator[CheckpointTensor]:
    """The tensors of a safetensors file, without their data. Raises ValueError if its header is too long."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > MAX_HEADER:
            raise ValueError(f"{path.name} has a header of {length} bytes")
        header = msgspec.json.decode(file.read(length))
    for name, entry in header.items():
        if name != "__metadata__":
            start, end = (8 + length + offset for offset in entry["data_offsets"])
            yield CheckpointTensor(name, entry["dtype"], entry["shape"], path, start, end)
