"""How a base makes embeddings by itself, from sentence-transformers' files beside its checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers.utils.hub import cached_file

from lora_serve.adapters.pooling_config import parse_pooling
from lora_serve.names import MODULES, POOLING
from lora_serve.request import Pooling

PROMPTS = "config_sentence_transformers.json"
TEXTS = "sentence_bert_config.json"


def read_pooling(name: str, revision: str | None, notes: list[str]) -> tuple[Pooling | None, str]:
    """The base's pooling, or None and why it cannot make embeddings.

    Args:
        notes: remarks for the operator are appended.
    """
    try:
        modules = _read_json(name, MODULES, revision)
        if modules is None:
            return None, f"it has no {MODULES} of sentence-transformers"
        pooling = parse_pooling(modules, _read_json(name, POOLING, revision))
        left_out = _text_preparation(_read_json(name, PROMPTS, revision), _read_json(name, TEXTS, revision))
    except ValueError as error:
        notes.append(f"the base alone makes no embeddings: {error}")
        return None, str(error)
    if left_out:
        notes.append(f"texts are embedded as clients send them, without {left_out} of sentence-transformers' files")
    return pooling, ""


def _text_preparation(prompts: Any, texts: Any) -> str:
    """What sentence-transformers would do to a text before it is tokenized; empty if nothing."""
    found = []
    if isinstance(prompts, dict) and prompts.get("default_prompt_name"):
        found.append("the default prompt")
    if isinstance(texts, dict) and "message" in (texts.get("modality_config") or {}):
        found.append("the chat template")
    if isinstance(texts, dict) and texts.get("do_lower_case"):
        found.append("the lower-casing")
    return " and ".join(found)


def _read_json(name: str, file: str, revision: str | None) -> Any:
    """A decoded file of a local folder or hub model; None if it has none. Raises ValueError if it is not JSON."""
    path = cached_file(
        name,
        file,
        revision=revision,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if path is None:
        return None
    try:
        return json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError):
        raise ValueError(f"{file} is not valid JSON") from None
