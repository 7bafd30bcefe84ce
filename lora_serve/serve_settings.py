"""Settings that an adapter brings for the requests that name it: `serve.yaml` in its folder.

They count only where an administrator has said so when the adapter was published: a system prompt speaks for whoever
serves, and a chat template is a program. The text is untrusted until it has passed `parse_settings`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Hashable, Mapping
from difflib import get_close_matches
from typing import Annotated, Any

import msgspec
import yaml
from msgspec import Meta

from lora_serve.errors import AdapterInvalid
from lora_serve.names import SETTINGS

MOST_BYTES = 128 << 10  # of the file
MOST_STOPS = 4
MOST_TOKENS = 64  # in a list of tokens
DEEPEST = 8  # lists in lists
LONGEST_TOKEN = 256  # characters, of a stop string as well
LONGEST_SYSTEM = 32_000  # characters
LONGEST_TEMPLATE = 64_000  # characters

_Token = Annotated[str, Meta(min_length=1, max_length=LONGEST_TOKEN)]
_Tokens = Annotated[tuple[_Token, ...], Meta(max_length=MOST_TOKENS)]
_Penalty = Annotated[float, Meta(ge=-2, le=2)]


class ServeSettings(msgspec.Struct, frozen=True, omit_defaults=True):
    """Defaults of requests, named as their fields are, and how prompts are written. None leaves it to the base.

    Attributes:
        stop: strings that end the text.
        stop_tokens: tokens, as text, that end it besides the model's end tokens and whatever the request asks for.
        system: the system prompt of conversations without one.
        chat_template: Jinja, in place of the base's.
        added_tokens: texts that the adapter was trained on as single tokens: their ids follow the base's tokenizer's,
            in this order, as `tokenizer.add_tokens` gave them.
    """

    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    presence_penalty: _Penalty | None = None
    frequency_penalty: _Penalty | None = None
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=10)] | None = None
    max_tokens: Annotated[int, Meta(ge=1, le=2**31 - 1)] | None = None
    stop: Annotated[tuple[_Token, ...], Meta(max_length=MOST_STOPS)] | None = None
    stop_tokens: _Tokens | None = None
    system: Annotated[str, Meta(min_length=1, max_length=LONGEST_SYSTEM)] | None = None
    chat_template: Annotated[str, Meta(min_length=1, max_length=LONGEST_TEMPLATE)] | None = None
    added_tokens: _Tokens | None = None

    @property
    def given(self) -> dict[str, Any]:
        """The settings that are not None, by name."""
        return {name: value for name in SETTING_NAMES if (value := getattr(self, name)) is not None}


NO_SETTINGS = ServeSettings()
SETTING_NAMES = ServeSettings.__struct_fields__
SAMPLING = (
    "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty",
)  # fmt: skip


def parse_settings(data: bytes) -> ServeSettings:
    """The settings in a `serve.yaml`. Raises AdapterInvalid that names the file and the field."""
    if len(data) > MOST_BYTES:
        raise _invalid(f"it is larger than {MOST_BYTES:,} bytes")
    try:
        text = data.decode()
        loaded = yaml.load(text, _Loader)
    except UnicodeDecodeError:
        raise _invalid("it is not UTF-8") from None
    except RecursionError:
        raise _invalid("it is nested too deeply") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # the latter two of numbers and dates
        raise _invalid(f"it is not YAML of plain values: {_problem(error)}") from None
    fields = {} if loaded is None else loaded
    if not isinstance(fields, dict):
        raise _invalid("it is not a list of settings, NAME: VALUE")
    for name in fields:
        if name not in SETTING_NAMES:
            raise _invalid(f"there is no setting {str(name)[:100]}{_similar(str(name))}")
    if isinstance(fields.get("stop"), str):
        fields["stop"] = [fields["stop"]]
    for name, value in fields.items():
        _check_value(name, value)
    settings = msgspec.convert(fields, ServeSettings)
    for name in ("stop_tokens", "added_tokens"):
        listed = getattr(settings, name) or ()
        if len(set(listed)) < len(listed):
            raise _invalid(f"{name} has a token twice")
    return settings


def _check_value(name: str, value: Any) -> None:
    try:
        found = getattr(msgspec.convert({name: value}, ServeSettings), name)
    except msgspec.ValidationError as error:
        problem = re.sub(r" - at `\$\.\w+(.*)`$", r" \1", str(error)).replace(" | null", "").rstrip()
        raise _invalid(f"{name}: {problem[:300]}") from None
    if isinstance(found, float) and not math.isfinite(found):
        raise _invalid(f"{name} is not a number")
    for text in (found,) if isinstance(found, str) else found if isinstance(found, tuple) else ():
        if any("\ud800" <= letter <= "\udfff" for letter in text):  # which YAML's escapes can make
            raise _invalid(f"{name} has characters that are none")


def _similar(name: str) -> str:
    found = get_close_matches(name[:100], SETTING_NAMES, n=1)
    return f"; did you mean {found[0]}?" if found else f"; there are {', '.join(SETTING_NAMES)}"


def _problem(error: Exception) -> str:
    problem = error.problem if isinstance(error, yaml.MarkedYAMLError) else str(error)
    mark = error.problem_mark if isinstance(error, yaml.MarkedYAMLError) else None
    where = "" if mark is None else f" (line {mark.line + 1})"
    return f"{(problem or 'it cannot be read')[:200]}{where}"


def _invalid(problem: str) -> AdapterInvalid:
    return AdapterInvalid(f"{SETTINGS}: {problem}", param="settings")


class _Loader(yaml.SafeLoader):
    """YAML without references, which make large things of small ones, tags, or repeated names, and not deep."""

    _depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "references (*name) are not read", event.start_mark)
        if (tag := getattr(event, "tag", None)) is not None:  # !!set has no order, by which added tokens get their ids
            raise yaml.composer.ComposerError(None, None, f"tags ({tag}) are not read", event.start_mark)
        self._depth += 1
        if self._depth > DEEPEST:
            raise RecursionError
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        mapping: Mapping[Hashable, Any] = super().construct_mapping(node, deep)
        if isinstance(node, yaml.MappingNode) and len(mapping) < len(node.value):
            raise yaml.constructor.ConstructorError(None, None, "a name is given twice", node.start_mark)
        return dict(mapping)


# As in YAML 1.2 and JSON; YAML 1.1, which is PyYAML's, takes 1e-3 for a text.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(?:\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)
