"""Strict validation of `adapter_config.json`, shared by all formats.

A field that a format reads is checked where it is read. Of the others, those that cannot change inference are ignored,
those that would are refused by name unless they are off, and unknown ones are refused unless they are empty.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

import re2

from lora_serve.adapters.checkpoint import shorten
from lora_serve.errors import AdapterInvalid

Config = dict[str, Any]

# Fields of every PEFT configuration: target modules (the keys of the weights name them too), training, and names; and
# those that `saved.py` reads for all formats.
COMMON = {
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out",
    "modules_to_save", "ensure_weight_tying",
}  # fmt: skip
MAX_PATTERN = 200  # characters of a pattern key


def check_fields(
    config: Config,
    read: Set[str],
    without_effect: Set[str] = frozenset(),
    off: Mapping[str, tuple[Any, ...]] | None = None,
) -> None:
    """Raise AdapterInvalid for fields that would change the result and are not supported.

    Args:
        read: fields that the format reads.
        without_effect: fields that cannot matter at inference, beside the common ones.
        off: field → values without effect (None always has none); any other value is refused.
    """
    off = off or {}
    for field, values in off.items():
        value = config.get(field)
        if value is not None and value not in values:
            raise AdapterInvalid(f"{field} = {str(value)[:60]!r} in adapter_config.json is not served")
    known = COMMON | read | without_effect | off.keys()
    unknown = [field for field, value in config.items() if field not in known and value not in (None, False, [], {})]
    if unknown:
        raise AdapterInvalid(f"adapter_config.json has unknown fields that may matter: {shorten(unknown)}")


def number(config: Config, field: str, default: float, shown: str | None = None) -> float:
    """A field's value as a non-zero number. Raises AdapterInvalid naming the field (as `shown`, if given)."""
    value = config.get(field, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < abs(value) < 1e6:
        raise AdapterInvalid(f"{(shown or field)[:100]} in adapter_config.json is not a usable number")
    return value


class Patterns:
    """A `rank_pattern` or `alpha_pattern`: the value of the first key that matches a module's path.

    Keys are untrusted regular expressions, so they are matched in linear time (RE2).
    """

    def __init__(self, config: Config, field: str) -> None:
        patterns = config.get(field) or {}
        if not isinstance(patterns, dict):
            raise AdapterInvalid(f"{field} in adapter_config.json is not an object")
        options = re2.Options()
        options.log_errors = False
        options.max_mem = 1 << 20
        self._compiled = []
        for key in patterns:
            value = number(patterns, key, 0, f"{field}.{key}")
            if len(key) > MAX_PATTERN:
                raise AdapterInvalid(f"{field} has a key of {len(key)} characters; at most {MAX_PATTERN} are read")
            try:
                self._compiled.append((re2.compile(rf"(.*\.)?({key})", options), value))
            except re2.error:
                raise AdapterInvalid(f"{field} has a key that is not a plain regular expression: {key}") from None

    def get(self, name: str, default: float) -> float:
        return next((value for pattern, value in self._compiled if pattern.fullmatch(name)), default)
