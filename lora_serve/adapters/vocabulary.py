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
# How often a character may occur, as parsing takes time for each; counted before. The largest vocabularies in use have
# 262,144 tokens (with a colon or a bracket each) and 514,906 merges (with a bracket each).
MAX_COUNTS = {b":": 600_000, b"[": 900_000}


class _Model(msgspec.Struct, gc=False):
    """The vocabulary: ids by token, or (Unigram) tokens with scores in the order of their ids."""

    vocab: dict[str, int] | list[tuple[str, float]]


class _Added(msgspec.Struct, gc=False):
    id: int
    content: str


class _Tokenizer(msgspec.Struct, gc=False):
    model: _Model
    added_tokens: list[_Added] = []


def vocabulary_digest(path: Path) -> str:
    """Digest of the token → id map, added tokens included; empty if there is no readable file.

    Args:
        path: a `tokenizer.json`, or the folder that contains it.
    """
    try:
        tokenizer = msgspec.json.decode(_read_bytes(path / TOKENIZER if path.is_dir() else path), type=_Tokenizer)
        vocab = tokenizer.model.vocab
        ids = vocab if isinstance(vocab, dict) else {token: id_ for id_, (token, _) in enumerate(vocab)}
        ids.update((added.content, added.id) for added in tokenizer.added_tokens)
        by_id = msgspec.json.encode(sorted(zip(ids.values(), ids.keys(), strict=True)))
    except (OSError, ValueError, RecursionError, msgspec.MsgspecError):  # absent, too large, or not of this form
        return ""
    return sha256(by_id).hexdigest()


def _read_bytes(path: Path) -> bytes:
    """The content of a regular file. Raises OSError if it is missing, ValueError if it is not regular or too large."""
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_FILE:
            raise ValueError(f"{path.name} is not a regular file of at most {MAX_FILE} bytes")
        data = file.read(MAX_FILE)
    if any(data.count(character) > most for character, most in MAX_COUNTS.items()):
        raise ValueError(f"{path.name} has more entries than any vocabulary")
    return data
