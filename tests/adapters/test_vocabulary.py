"""Digests of tokenizer vocabularies: equal for equal tokens and ids, empty for unreadable files."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from lora_serve.adapters.vocabulary import MAX_FILE, vocabulary_digest

WORDS = {"a": 0, "b": 1, "ä": 2}


def tokenizer(vocab: Any, *added: tuple[int, str], **more: Any) -> str:
    model = {"type": "BPE", "vocab": vocab, "merges": [["a", "b"]]}
    return json.dumps({"model": model, "added_tokens": [{"id": id_, "content": token} for id_, token in added], **more})


def digest(folder: Path, text: str) -> str:
    (folder / "tokenizer.json").write_text(text)
    assert vocabulary_digest(folder / "tokenizer.json") == vocabulary_digest(folder)
    return vocabulary_digest(folder)


def test_the_digest_depends_on_tokens_and_their_ids_only(tmp_path: Path) -> None:
    plain = digest(tmp_path, tokenizer(WORDS))
    assert len(plain) == 64
    assert digest(tmp_path, tokenizer(dict(reversed(WORDS.items())), truncation=None)) == plain
    assert digest(tmp_path, tokenizer({"a": 0, "b": 1}, (2, "ä"))) == plain
    assert digest(tmp_path, tokenizer([["a", -1.0], ["b", -2.5], ["ä", 0.0]])) == plain
    others = [tokenizer(WORDS, (3, "<pad>")), tokenizer(WORDS | {"a": 1, "b": 0}), tokenizer(WORDS | {"A": 0})]
    assert len({plain, *(digest(tmp_path, text) for text in others)}) == 4


@pytest.mark.parametrize(
    "text",
    ["", "x", "[]", "{}", '{"model": {}}', '{"model": {"vocab": {"a": "0"}}}', '{"model": {"vocab": ' + "[" * 100_000],
    ids=["empty", "no json", "list", "no model", "no vocabulary", "ids as text", "deep"],
)
def test_an_invalid_tokenizer_file_has_no_digest(tmp_path: Path, text: str) -> None:
    assert digest(tmp_path, text) == ""


def test_missing_special_and_oversized_files_are_not_read(tmp_path: Path) -> None:
    assert vocabulary_digest(tmp_path) == ""
    os.mkfifo(tmp_path / "tokenizer.json")
    assert vocabulary_digest(tmp_path) == ""
    (tmp_path / "tokenizer.json").unlink()
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(MAX_FILE + 1)
    assert vocabulary_digest(tmp_path) == ""
