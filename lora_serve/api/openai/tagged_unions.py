"""Unions whose member is chosen by `type`, with a last member that refuses every other type with the reason."""

from __future__ import annotations

from typing import Any

from pydantic import ConfigDict, Discriminator, model_validator

from lora_serve.api.openai.schemas import Strict

LONGEST_KIND = 50  # characters of a type in a message


def kind_of(value: Any, missing: str = "unknown") -> str:
    """The `type` of a value before its validation; `missing` if it has none."""
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return kind if isinstance(kind, str) else missing if kind is None else "unknown"


def by_kind(what: str, *supported: str, missing: str = "unknown") -> Discriminator:
    """Choose the union's member with the tag `<type> <what>`; `other <what>` is that of every type not supported.

    Tags are not names of fields, which errors would mistake them for.
    """

    def tag(value: Any) -> str:
        kind = kind_of(value, missing)
        return f"{kind} {what}" if kind in supported else f"other {what}"

    return Discriminator(tag)


class NeverValid(Strict):
    """A union's member for what is not served; its validation always fails, with the reason."""

    model_config = ConfigDict(json_schema_extra={"not": {}})

    type: str

    @classmethod
    def refusal(cls, value: Any) -> str:
        """Why a value is refused."""
        raise NotImplementedError

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, value: Any) -> Any:
        raise ValueError(cls.refusal(value))
