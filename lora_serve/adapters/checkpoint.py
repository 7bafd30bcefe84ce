"""Reads and validates the untrusted files of a PEFT adapter: configuration, weights, and how it pools embeddings.

Links, pickles, oversized headers, duplicate keys, overlapping tensors, unsupported dtypes and non-finite numbers are
refused with the file, key or field named. Files are read into private memory, not mapped, so later changes to them have
no effect. The safetensors library accepts some of these, so tensors are made from the header that was checked here; the
library's own reading is the reference in tests. The tensors are interpreted in `formats/`.
"""

from __future__ import annotations

import json
import os
import stat
from dataclasses import dataclass
from itertools import groupby, pairwise
from math import prod
from operator import attrgetter, itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
from torch import Tensor

from lora_serve.adapter_files import describe_missing
from lora_serve.adapters.formats.refusals import refuse_known_method
from lora_serve.adapters.vocabulary import vocabulary_digest
from lora_serve.errors import AdapterInvalid, TooLarge
from lora_serve.names import CONFIG, MODULES, POOLING, WEIGHTS, shorten

__all__ = ["Checkpoint", "read", "shorten"]

MAX_CONFIG = 1 << 20  # bytes
MAX_HEADER = 8 << 20  # bytes
MAX_TENSORS = 100_000
MAX_DIMENSIONS = 8  # of a tensor; more than any method uses
MOST_ELEMENTS = 1 << 30  # of a lowered adapter, unless told otherwise
LFS_POINTER = b"version https://git-lfs"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}  # by safetensors' name
INDEX_DTYPES = {"U8": torch.uint8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64}  # under keys in INDICES
INDICES = "_topk_indices"  # VB-LoRA's choice of sub-vectors
# AdaLoRA modules whose rank was pruned to 0, and VB-LoRA top-k weights for k = 1.
MAY_BE_EMPTY = (".lora_A", ".lora_B", ".lora_E", "_topk_weights")


@dataclass(frozen=True)
class Checkpoint:
    """The content of a PEFT folder. `tensors` are private and finite; float64 ones were made float32.

    `vocabulary` is the digest of the folder's tokenizer vocabulary, if it has one; the tokenizer itself is not used.
    `modules` and `pooling` are what sentence-transformers' `modules.json` and `1_Pooling/config.json` hold, if there.
    `most_elements` bounds what lowering may make of it (`formats/budget.py`).
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    file_bytes: int
    vocabulary: str = ""
    modules: Any = None
    pooling: Any = None
    most_elements: int = MOST_ELEMENTS


class _HeaderEntry(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    """A tensor's entry in the header of a safetensors file."""

    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


class StoredTensor(NamedTuple):
    """A tensor's place in the data of a safetensors file, in bytes."""

    start: int
    end: int
    name: str
    dtype: torch.dtype
    shape: list[int]


def read(
    folder: Path, *, max_bytes: int, most_elements: int = MOST_ELEMENTS, vocabulary: str | None = None
) -> Checkpoint:
    """Read `adapter_config.json`, `adapter_model.safetensors` and sentence-transformers' files of a folder.

    Args:
        vocabulary: digest of the tokenizer's vocabulary, where it is known; None: that of the folder's tokenizer.

    Raises: AdapterInvalid naming what is wrong, first of all a method that is not served; TooLarge if the weights file
    exceeds `max_bytes`.
    """
    config_bytes = _read_bytes(folder / CONFIG, MAX_CONFIG)
    config = _parse_json(config_bytes, CONFIG)
    if not isinstance(config, dict):
        raise AdapterInvalid(f"{CONFIG} is not a JSON object")
    refuse_known_method(config.get("peft_type"))  # before its weights, which may be of no form that is read here
    if not (folder / WEIGHTS).exists():
        raise AdapterInvalid(describe_missing([path.name for path in folder.iterdir()]))
    data = _read_bytes(folder / WEIGHTS, max_bytes)
    modules, pooling = (
        _parse_json(_read_bytes(folder / name, MAX_CONFIG), name) if (folder / name).exists() else None
        for name in (MODULES, POOLING)
    )
    return Checkpoint(
        config=config,
        tensors=load_tensors(data),
        file_bytes=len(config_bytes) + len(data),
        vocabulary=vocabulary_digest(folder) if vocabulary is None else vocabulary,
        modules=modules,
        pooling=pooling,
        most_elements=most_elements,
    )


def load_tensors(data: bytearray) -> dict[str, Tensor]:
    """The tensors of a safetensors file, which share the memory of `data`. Raises AdapterInvalid, also for NaN."""
    stored = check_container(data)
    if not stored:
        raise AdapterInvalid(f"{WEIGHTS} has no tensors: the adapter changes nothing")
    body = len(data) - stored[-1].end
    tensors: dict[str, Tensor] = {}
    # Neighbours of one dtype are handled at once: there may be tens of thousands of small tensors.
    for dtype, group in groupby(stored, key=attrgetter("dtype")):
        run = list(group)
        sizes = [(tensor.end - tensor.start) // dtype.itemsize for tensor in run]
        values = torch.empty(0, dtype=dtype)
        if count := sum(sizes):
            values = torch.frombuffer(data, dtype=dtype, count=count, offset=body + run[0].start)
        if values.data_ptr() % dtype.itemsize:
            values = values.clone()
        values = values.float() if dtype == torch.float64 else values
        found = {
            tensor.name: flat.view(tensor.shape) for tensor, flat in zip(run, torch.split(values, sizes), strict=True)
        }
        if not _is_finite(values):
            not_finite = [name for name, tensor in found.items() if not _is_finite(tensor)]
            raise AdapterInvalid(f"{WEIGHTS} has numbers that are not finite in {shorten(not_finite)}")
        tensors |= found
    return tensors


def _is_finite(tensor: Tensor) -> bool:
    """Whether all numbers are finite; without a temporary tensor, and in one pass (NaN propagates)."""
    return not tensor.numel() or all(bool(extreme.isfinite()) for extreme in tensor.aminmax())


def check_container(data: bytes | bytearray) -> list[StoredTensor]:
    """Check a safetensors file and describe its tensors, in the order of their data.

    Raises AdapterInvalid for a faulty header, dtype or shape, and for tensors that do not tile the data without gap or
    overlap. Stricter than the safetensors library, after the description of the format.
    """
    if len(data) < 8:
        raise AdapterInvalid(f"{WEIGHTS} is truncated: no header")
    length = int.from_bytes(data[:8], "little")
    if length > MAX_HEADER:
        raise AdapterInvalid(f"{WEIGHTS} has a header of {length} bytes; at most {MAX_HEADER} are read")
    if len(data) < 8 + length:
        raise AdapterInvalid(f"{WEIGHTS} is truncated: its header says {length} bytes")
    header = _parse_header(bytes(data[8 : 8 + length]))
    if len(header) > MAX_TENSORS:
        raise AdapterInvalid(f"{WEIGHTS} has {len(header)} tensors; at most {MAX_TENSORS} are read")
    decoder = msgspec.json.Decoder(_HeaderEntry)
    stored = sorted((_locate(name, entry, decoder) for name, entry in header.items()), key=itemgetter(0, 1))
    ends = [(0, 0), *((tensor.start, tensor.end) for tensor in stored), (len(data) - 8 - length,) * 2]
    for (_, end), (start, _) in pairwise(ends):
        if start != end:
            raise AdapterInvalid(
                f"{WEIGHTS} is truncated or its tensors overlap or leave gaps (at byte {min(start, end)})"
            )
    return stored


def _parse_header(data: bytes) -> dict[str, msgspec.Raw]:
    """The entries of a header by name, undecoded. Raises AdapterInvalid if it is no JSON object or has keys twice."""
    try:
        header = msgspec.json.decode(data, type=dict[str, msgspec.Raw])
        msgspec.json.decode(header.pop("__metadata__", b"{}"), type=dict[str, str])  # not used
    except (msgspec.MsgspecError, ValueError, RecursionError):
        raise AdapterInvalid(f"{WEIGHTS} has a header that is not safetensors'") from None
    # Without escapes, as many of each field as entries means that none was there twice; a slower parse tells in full.
    if b"\\" in data or any(
        data.count(b'"%s"' % field.encode()) != len(header) for field in _HeaderEntry.__struct_fields__
    ):
        _parse_json(data, WEIGHTS)
    return header


def _locate(name: str, entry: msgspec.Raw, decoder: msgspec.json.Decoder[_HeaderEntry]) -> StoredTensor:
    """A tensor's place in the data, from its header entry. Raises AdapterInvalid if the entry is inconsistent."""
    try:
        described = decoder.decode(entry)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        raise AdapterInvalid(f"{WEIGHTS} describes {shorten([name])} in a way that is not safetensors'") from None
    is_index = name.endswith(INDICES)
    dtypes, served = (INDEX_DTYPES, "integers") if is_index else (DTYPES, "float64, float32, float16 and bfloat16")
    dtype = dtypes.get(described.dtype)
    if dtype is None:
        raise AdapterInvalid(f"{WEIGHTS} has {shorten([name])} as {described.dtype[:20]}; {served} are served")
    least = 0 if name.endswith(MAY_BE_EMPTY) else 1
    if len(described.shape) > MAX_DIMENSIONS or min(described.shape, default=1) < least:
        raise AdapterInvalid(f"{WEIGHTS} has {shorten([name])} with an empty or impossible shape")
    start, end = described.data_offsets
    if start < 0 or end - start != dtype.itemsize * prod(described.shape):
        raise AdapterInvalid(f"{WEIGHTS}: the place of {shorten([name])} does not fit its shape and dtype")
    return StoredTensor(start, end, name, dtype, described.shape)


def _read_bytes(path: Path, most: int) -> bytearray:
    """The content of a regular file. Raises AdapterInvalid for links and other files, TooLarge over `most` bytes."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise AdapterInvalid(f"{path.name} is missing") from None
    except OSError:
        raise AdapterInvalid(f"{path.name} is a link or cannot be opened") from None
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise AdapterInvalid(f"{path.name} is not a regular file")
        if status.st_size > most:
            raise TooLarge(f"{path.name} has {status.st_size} bytes; at most {most} are read")
        data = bytearray(status.st_size)
        del data[file.readinto(data) :]
    if data.startswith(LFS_POINTER):
        raise AdapterInvalid(
            f"{path.name} is a pointer that Git LFS left in place of the file: run git lfs pull where it was cloned"
        )
    return data


def _parse_json(data: bytes | bytearray, name: str) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            seen: set[str] = set()
            twice = [key for key, _ in pairs if key in seen or seen.add(key)]  # type: ignore[func-returns-value]
            raise AdapterInvalid(f"{name} has keys twice: {shorten(twice)}")
        return found

    def number(text: str) -> None:
        raise AdapterInvalid(f"{name} has a number that is not finite ({text})")

    def integer(text: str) -> int:
        if len(text) > 19:  # messages carry 64-bit integers
            raise AdapterInvalid(f"{name} has a number of {len(text)} digits")
        return int(text)

    try:
        found = json.loads(data, object_pairs_hook=unique, parse_constant=number, parse_int=integer)
        json.dumps(found, ensure_ascii=False).encode()  # escapes can produce lone surrogates
        return found
    except (ValueError, RecursionError):  # not UTF-8, not JSON, or nested beyond reason
        raise AdapterInvalid(f"{name} is not valid JSON") from None
