"""Digest of the vocabulary in a `tokenizer.json`, to detect adapters made for a base with another vocabulary.

Digests are only compared; requests are always tokenized with the base's tokenizer. An unreadable file counts as absent.
"""

from __future__ import annotations

import os
import stat
from hashlib import sha256
from pathlib import Path

import msgspec

from lora_serve.names import TOKENIZER

MAX_FILE = 48 << 20  # bytes; the largest vocabularies in use take about 35 MB


class _Model(msgspec.Struct):
    """The vocabulary: ids by token, or (Unigram) tokens with scores in the order of their ids."""

    vocab: dict[str, int] | list[tuple[str, float]]


class _Added(msgspec.Struct):
    id: int
    content: str


class _Tokenizer(msgspec.Struct):
    model: _Model
    added_tokens: list[_Added] = []


def vocabulary_digest(path: Path) -> str:
    """Digest of the token → id map, added tokens included; empty if there is no readable file.

    Args:
        path: a `tokenizer.json`, or the folder that contains it.
    """
    try:
        tokenizer = msgspec.json.decode(_read_bytes(path / TOKENIZER if path.is_dir() else path), type=_Tokenizer)
    except (OSError, ValueError, RecursionError, msgspec.MsgspecError):  # absent, too large, or not of this form
        return ""
    vocab = tokenizer.model.vocab
    ids = dict(vocab) if isinstance(vocab, dict) else {token: id_ for id_, (token, _) in enumerate(vocab)}
    ids |= {added.content: added.id for added in tokenizer.added_tokens}
    digest = sha256()
    for token, id_ in sorted(ids.items(), key=lambda item: (item[1], item[0])):
        digest.update(f"{id_} {len(token)} {token}\n".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _read_bytes(path: Path) -> bytes:
    """The content of a regular file. Raises OSError if it is missing, ValueError if it is not regular or too large."""
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_FILE:
            raise ValueError(f"{path.name} is not a regular file of at most {MAX_FILE} bytes")
        return file.read(MAX_FILE)
