"""Fingerprint of a base checkpoint: the same wherever it lies and whatever it is called, another once it is trained on.

Configuration, and name, dtype, shape and a sample of the data of the tensors, are hashed. So it takes milliseconds for
100 GB; a change that touches only bytes outside the samples goes unnoticed, which training does not do.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from lora_serve.errors import ModelUnsupported
from lora_serve.model.checkpoint_files import CheckpointTensor, find_file, read_header, weight_files

SAMPLE = 4096  # bytes from the middle of a tensor; few pages, yet enough for training that changes few numbers
MOST_SAMPLES = 2048  # tensors of which the data is sampled
# Fields of config.json, at any depth, that say where a checkpoint came from, not what it is.
_PROVENANCE = {"_name_or_path", "name_or_path", "_commit_hash", "transformers_version"}


def base_fingerprint(name: str, revision: str | None) -> str:
    """Hex SHA-256 that identifies a base checkpoint by content, however it is split into files.

    Args:
        name: local folder, or id of a hub model that is in the local cache.

    Raises: ModelUnsupported if its configuration or safetensors files are missing or cannot be read.
    """
    try:
        config = msgspec.json.decode(find_file(name, revision, "config.json").read_bytes())
        tensors = sorted(each for file in weight_files(name, revision) for each in read_header(file))
        found = hashlib.sha256(msgspec.json.encode(_without_provenance(config), order="sorted"))
        for tensor in tensors:
            found.update(msgspec.json.encode([tensor.name, tensor.dtype, tensor.shape]))
        # Chosen by hash: evenly spaced ones could all be of one kind of module.
        chosen = sorted(tensors, key=lambda each: hashlib.sha256(each.name.encode()).digest())[:MOST_SAMPLES]
        for sample in _samples(chosen):
            found.update(hashlib.sha256(sample).digest())
        return found.hexdigest()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, msgspec.MsgspecError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelUnsupported(f"the checkpoint of {name!r} cannot be identified: {reason}") from error


def _samples(tensors: Iterable[CheckpointTensor]) -> Iterable[bytes]:
    """Bytes from the middle of each tensor, the whole of a small one."""
    descriptors: dict[Path, int] = {}
    try:
        for tensor in tensors:
            if tensor.file not in descriptors:
                descriptors[tensor.file] = os.open(tensor.file, os.O_RDONLY | os.O_CLOEXEC)
            size = min(tensor.end - tensor.start, SAMPLE)
            yield os.pread(descriptors[tensor.file], size, (tensor.start + tensor.end - size) // 2)
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)


def _without_provenance(value: Any) -> Any:
    match value:
        case dict():
            return {key: _without_provenance(each) for key, each in value.items() if key not in _PROVENANCE}
        case list():
            return [_without_provenance(each) for each in value]
        case _:
            return value
