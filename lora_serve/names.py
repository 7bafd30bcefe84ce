"""Names of adapters and of the files of an adapter; free of heavy imports, for both processes."""

from __future__ import annotations

import re
from collections.abc import Iterable

from lora_serve.errors import AdapterBroken, AdapterExists, AdapterNotFound, BadRequest

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
CARD = "README.md"
TOKENIZER = "tokenizer.json"  # only compared with the base's tokenizer
MODULES = "modules.json"  # sentence-transformers' list of what follows the transformer
POOLING = "1_Pooling/config.json"
SETTINGS = "serve.yaml"  # counts where an administrator said so; see `serve_settings.py`
ARCHIVE = "archive"  # a file that holds an adapter's files, in staging
RESERVED = ("base", "other")  # what metrics call the base, and adapters beyond those that they name
NAME_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"  # of adapters and of API keys
MOST_TARGETS, MOST_WEIGHT = 16, 1_000_000  # of an alias
STICKY_PATTERN = r"(user|header:[A-Za-z0-9!#$%&'*+.^_`|~-]{1,100})"  # what an alias goes by


def shorten(names: Iterable[str], most: int = 8) -> str:
    """The first few names and the number of the others, for messages of bounded length."""
    names = [name if len(name) <= 120 else name[:117] + "..." for name in names]
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def check_name(name: str, param: str = "name") -> str:
    """Return `name` if it is a valid adapter name (safe as a folder name). Raises `BadRequest`."""
    if not re.fullmatch(NAME_PATTERN, name):
        raise BadRequest("a name is 1 to 64 letters, digits, '.', '_' or '-', a letter or digit first", param=param)
    return name


def check_adapter_name(name: str, base_name: str = "") -> str:
    """Return `name` if an adapter may have it. Raises BadRequest, or AdapterExists for a reserved name."""
    if base_name and name == base_name:
        raise AdapterExists(f"{name} is the name of the base model", param="name")
    if name in RESERVED:
        raise AdapterExists(f"{name} is a reserved name", param="name")
    return check_name(name)


def adapter_not_found(name: str) -> AdapterNotFound:
    """The error for an adapter that does not exist or that the caller may not use; both look the same."""
    return AdapterNotFound(f"adapter {name[:100]} does not exist", param="adapter")


def alias_not_found(name: str) -> AdapterNotFound:
    """The error for an alias that does not exist or that the caller may not use; both look the same."""
    return AdapterNotFound(f"alias {name[:100]} does not exist", param="name")


def adapter_broken(name: str, reason: str) -> AdapterBroken:
    """The error for an adapter whose stored files cannot be served."""
    return AdapterBroken(f"adapter {name} cannot be served: {reason}", param="adapter")
