"""Strict validation of `adapter_config.json`, shared by all formats.

A field that a format reads is checked where it is read. Of the others, those that cannot change inference are ignored,
those that would are refused by name unless they are off, and unknown ones are refused unless they are empty.
"""

from __future__ import annotations

import re
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
MOST_PATTERNS = 200  # in a rank_pattern or alpha_pattern; paths of modules count once per form
MOST_NAMES = 256  # in a list of modules or parameters
NAME_LISTS = ("modules_to_save", "target_parameters")  # every name is compared with every module
_PATH = re.compile(r"\^?[A-Za-z0-9_.]+")  # in which a dot is the only character that stands for others


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
    for field in NAME_LISTS:
        if isinstance(config.get(field), list) and len(config[field]) > MOST_NAMES:
            raise AdapterInvalid(
                f"{field} in adapter_config.json has {len(config[field])} names; at most {MOST_NAMES} are read"
            )
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


def name_list(config: Config, field: str) -> list[str]:
    """A field's names; none if it is not there. Raises AdapterInvalid naming the field if it is no list of strings."""
    given = config.get(field) or []
    if not isinstance(given, list) or not all(isinstance(name, str) for name in given):
        raise AdapterInvalid(f"{field} in adapter_config.json is not a list of names")
    return given


class Patterns:
    """A `rank_pattern` or `alpha_pattern`: the value of the first key that matches a module's path.

    Keys are untrusted regular expressions `(.*\\.)?(key)$`, so they are matched in linear time (RE2), and their number
    is bounded. Those that are plain paths, of which some initialisations (EVA) write one for every module, are looked
    up instead: all of one form, that is of one length and with dots (which match any character) at the same places, at
    once.
    """

    def __init__(self, config: Config, field: str) -> None:
        patterns = config.get(field) or {}
        if not isinstance(patterns, dict):
            raise AdapterInvalid(f"{field} in adapter_config.json is not an object")
        options = re2.Options()
        options.log_errors = False
        options.max_mem = 1 << 20
        self._compiled: list[tuple[int, Any, float]] = []  # with their place in the order of keys
        self._paths: dict[tuple[bool, int, tuple[int, ...]], dict[str, tuple[int, float]]] = {}
        for place, key in enumerate(patterns):
            value = number(patterns, key, 0, f"{field}.{key}")
            if len(key) > MAX_PATTERN:
                raise AdapterInvalid(f"{field} has a key of {len(key)} characters; at most {MAX_PATTERN} are read")
            if _PATH.fullmatch(key):
                path = key.removeprefix("^")
                form = key != path, len(path), tuple(at for at, letter in enumerate(path) if letter == ".")
                self._paths.setdefault(form, {})[path] = place, value
                continue
            try:
                self._compiled.append((place, re2.compile(rf"(.*\.)?({key})", options), value))
            except re2.error:
                raise AdapterInvalid(f"{field} has a key that is not a plain regular expression: {key}") from None
            if len(self._compiled) > MOST_PATTERNS:
                break
        if len(self._compiled) + len(self._paths) > MOST_PATTERNS:
            raise AdapterInvalid(f"{field} in adapter_config.json has more than {MOST_PATTERNS} different patterns")

    def get(self, name: str, default: float) -> float:
        found = [(place, value) for place, pattern, value in self._compiled if pattern.fullmatch(name)]
        for (whole, length, dots), values in self._paths.items():
            before, path = name[:-length], list(name[-length:])
            if len(path) < length or (before and (whole or not before.endswith("."))):
                continue
            for at in dots:
                path[at] = "."
            if (match := values.get("".join(path))) is not None:
                found.append(match)
        return min(found)[1] if found else default
