"""Names of adapters and of the files of an adapter; free of heavy imports, for both processes."""

from __future__ import annotations

import re

from lora_serve.errors import AdapterNotFound, BadRequest

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
CARD = "README.md"
TOKENIZER = "tokenizer.json"  # only compared with the base's tokenizer
MODULES = "modules.json"  # sentence-transformers' list of what follows the transformer
POOLING = "1_Pooling/config.json"
NAME_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"  # of adapters and of API keys


def check_name(name: str, param: str = "name") -> str:
    """Return `name` if it is a valid adapter name (safe as a folder name). Raises `BadRequest`."""
    if not re.fullmatch(NAME_PATTERN, name):
        raise BadRequest("a name is 1 to 64 letters, digits, '.', '_' or '-', a letter or digit first", param=param)
    return name


def adapter_not_found(name: str) -> AdapterNotFound:
    """The error for an adapter that does not exist or that the caller may not use; both look the same."""
    return AdapterNotFound(f"adapter {name[:100]} does not exist", param="adapter")
