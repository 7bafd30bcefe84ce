"""Reads and validates the untrusted files of a PEFT adapter: configuration, weights, and how it pools embeddings.

Links, pickles, oversized headers, duplicate keys, overlapping tensors, unsupported dtypes and non-finite numbers are
refused with the file, key or field named. Files are read into private memory, not mapped, so later changes to them have
no effect. The tensors are interpreted in `formats/`.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from lora_serve.adapters.vocabulary import vocabulary_digest
from lora_serve.errors import AdapterInvalid, TooLarge
from lora_serve.names import CONFIG, MODULES, POOLING, WEIGHTS

MAX_CONFIG = 1 << 20  # bytes
MAX_HEADER = 8 << 20  # bytes
MAX_TENSORS = 100_000
DTYPES = {"F32": 4, "F16": 2, "BF16": 2}  # safetensors' name → bytes an element
INDEX_DTYPES = {"U8": 1, "I16": 2, "I32": 4, "I64": 8}  # only under keys that end in INDICES
INDICES = "_topk_indices"  # VB-LoRA's choice of sub-vectors
# AdaLoRA modules whose rank was pruned to 0, and VB-LoRA top-k weights for k = 1.
MAY_BE_EMPTY = (".lora_A", ".lora_B", ".lora_E", "_topk_weights")


@dataclass(frozen=True)
class Checkpoint:
    """The content of a PEFT folder. `tensors` own their memory and are finite.

    `vocabulary` is the digest of the folder's tokenizer vocabulary, if it has one; the tokenizer itself is not used.
    `modules` and `pooling` are what sentence-transformers' `modules.json` and `1_Pooling/config.json` hold, if there.
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    file_bytes: int
    vocabulary: str = ""
    modules: Any = None
    pooling: Any = None


def read(folder: Path, *, max_bytes: int) -> Checkpoint:
    """Read `adapter_config.json`, `adapter_model.safetensors` and sentence-transformers' files of a folder.

    Raises: AdapterInvalid naming what is wrong; TooLarge if the weights file exceeds `max_bytes`.
    """
    config_bytes = _read_bytes(folder / CONFIG, MAX_CONFIG)
    config = _parse_json(config_bytes, CONFIG)
    if not isinstance(config, dict):
        raise AdapterInvalid(f"{CONFIG} is not a JSON object")
    if not (folder / WEIGHTS).exists():
        raise AdapterInvalid(_missing_weights_message(folder))
    data = _read_bytes(folder / WEIGHTS, max_bytes)
    check_container(data)
    try:
        tensors = safetensors.torch.load(data)
    except Exception as error:  # the library's own errors, and whatever else a malformed header causes
        raise AdapterInvalid(f"{WEIGHTS} cannot be read: {error}") from error
    not_finite = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if not_finite:
        raise AdapterInvalid(f"{WEIGHTS} has numbers that are not finite in {shorten(not_finite)}")
    modules, pooling = (
        _parse_json(_read_bytes(folder / name, MAX_CONFIG), name) if (folder / name).exists() else None
        for name in (MODULES, POOLING)
    )
    return Checkpoint(config, tensors, len(config_bytes) + len(data), vocabulary_digest(folder), modules, pooling)


def check_container(data: bytes) -> None:
    """Check a safetensors file: header, dtypes, and tensors that tile the data without gap or overlap.

    Raises AdapterInvalid. Stricter than the safetensors library, after the description of the format.
    """
    if len(data) < 8:
        raise AdapterInvalid(f"{WEIGHTS} is truncated: no header")
    length = int.from_bytes(data[:8], "little")
    if length > MAX_HEADER:
        raise AdapterInvalid(f"{WEIGHTS} has a header of {length} bytes; at most {MAX_HEADER} are read")
    if len(data) < 8 + length:
        raise AdapterInvalid(f"{WEIGHTS} is truncated: its header says {length} bytes")
    header = _parse_json(data[8 : 8 + length], WEIGHTS)
    if not isinstance(header, dict):
        raise AdapterInvalid(f"{WEIGHTS} has a header that is not a JSON object")
    header.pop("__metadata__", None)
    if len(header) > MAX_TENSORS:
        raise AdapterInvalid(f"{WEIGHTS} has {len(header)} tensors; at most {MAX_TENSORS} are read")
    ranges = sorted(_byte_range(name, entry) for name, entry in header.items())
    ends = [(0, 0), *ranges, (len(data) - 8 - length,) * 2]
    for (_, end), (start, _) in pairwise(ends):
        if start != end:
            raise AdapterInvalid(
                f"{WEIGHTS} is truncated or its tensors overlap or leave gaps (at byte {min(start, end)})"
            )


def shorten(names: Iterable[str], most: int = 8) -> str:
    """The first few names and the number of the others, for messages of bounded length."""
    names = [name if len(name) <= 120 else name[:117] + "..." for name in names]
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def _byte_range(name: str, entry: Any) -> tuple[int, int]:
    """A tensor's byte range in the data, from its header entry. Raises AdapterInvalid if the entry is inconsistent."""
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(start), int(end)]}:
            pass
        case _:
            raise AdapterInvalid(f"{WEIGHTS} describes {shorten([name])} in a way that is not safetensors'")
    is_index = name.endswith(INDICES)
    dtypes, served = (INDEX_DTYPES, "integers") if is_index else (DTYPES, "float32, float16 and bfloat16")
    if dtype not in dtypes:
        raise AdapterInvalid(f"{WEIGHTS} has {shorten([name])} as {dtype[:20]}; {served} are served")
    size, least = dtypes[dtype], 0 if name.endswith(MAY_BE_EMPTY) else 1
    for dimension in shape:
        if not isinstance(dimension, int) or isinstance(dimension, bool) or dimension < least:
            raise AdapterInvalid(f"{WEIGHTS} has {shorten([name])} with an empty or impossible shape")
        size *= dimension
    if start < 0 or end - start != size:
        raise AdapterInvalid(f"{WEIGHTS}: the place of {shorten([name])} does not fit its shape and dtype")
    return start, end


def _read_bytes(path: Path, most: int) -> bytes:
    """The content of a regular file. Raises AdapterInvalid for links and other files, TooLarge over `most` bytes."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
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
        return file.read(most + 1)


def _parse_json(data: bytes, name: str) -> Any:
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


def _missing_weights_message(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".pkl", ".ckpt"))]
    if pickles:
        return f"{shorten(pickles)} would run code when read; save the adapter again with safe_serialization=True"
    return f"{WEIGHTS} is missing"
