"""The media type of request bodies."""

from __future__ import annotations

from email.message import Message


def is_json(content_type: str | None) -> bool:
    """Whether a `Content-Type` is one of JSON: application/json, application/*+json, or none at all."""
    if not content_type:
        return True
    parsed = Message()
    parsed["content-type"] = content_type
    subtype = parsed.get_content_subtype()
    return parsed.get_content_maintype() == "application" and (subtype == "json" or subtype.endswith("+json"))
