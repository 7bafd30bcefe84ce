"""What adapters and their files may be called, and the one answer about an adapter that is not there.

Both processes need these; none of it needs a tensor library.
"""

from __future__ import annotations

import re

from lora_serve.errors import AdapterNotFound, BadRequest

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
CARD = "README.md"
TOKENIZER = "tokenizer.json"  # of an adapter: never used, only compared with the base's
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def check_name(name: str, param: str = "name") -> str:
    """The name itself, if an adapter can have it; names never become paths of their own. Raises `BadRequest`."""
    if not _NAME.fullmatch(name):
        raise BadRequest("a name is 1 to 64 letters, digits, '.', '_' or '-', a letter or digit first", param=param)
    return name


def unknown(name: str) -> AdapterNotFound:
    """The one answer about adapters that are not there, or not for this caller."""
    return AdapterNotFound(f"adapter {name[:100]} does not exist", param="adapter")
