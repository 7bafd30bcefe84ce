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
        prompts = _read_json(name, PROMPTS, revision)
    except ValueError as error:
        notes.append(f"the base alone makes no embeddings: {error}")
        return None, str(error)
    if isinstance(prompts, dict) and prompts.get("default_prompt_name"):
        notes.append(f"the default prompt in {PROMPTS} is not put before texts to embed: clients send it with the text")
    return pooling, ""


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
