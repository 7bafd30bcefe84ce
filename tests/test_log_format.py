"""Log lines as text and as JSON."""

from __future__ import annotations

import json
import logging
import sys
from typing import Any

from lora_serve.log_format import JSONFormatter, TextFormatter


def record(message: str, fields: dict[str, Any] | None = None, **more: Any) -> logging.LogRecord:
    made = logging.LogRecord("lora_serve.access", logging.INFO, "file", 1, message, (), more.get("exc_info"))
    made.created, made.msecs = 1.5, 500.0
    if fields is not None:
        made.fields = fields
    return made


def test_a_text_line_ends_with_the_fields() -> None:
    line = TextFormatter("engine[7]").format(record("GET / 200", {"key": "a", "seconds": 0.123456, "reason": 'no "x"'}))
    assert line.endswith('INFO engine[7] lora_serve.access: GET / 200 key=a seconds=0.1235 reason="no \\"x\\""')
    assert TextFormatter().format(record("plain")).endswith("INFO lora_serve.access: plain")


def test_a_value_cannot_begin_a_line_of_its_own() -> None:
    assert "\n" not in TextFormatter().format(record("x", {"reason": "a\nb", "empty": "", "long": "y" * 10_000}))


def test_a_json_line_is_one_object_with_the_fields() -> None:
    line = JSONFormatter("engine[7]").format(record("a\nb", {"seconds": 0.12345678, "key": "ä"}))
    assert "\n" not in line
    assert json.loads(line) == {
        "time": "1970-01-01T00:00:01.500Z",
        "level": "info",
        "process": "engine[7]",
        "logger": "lora_serve.access",
        "message": "a\nb",
        "seconds": 0.123457,
        "key": "ä",
    }


def test_a_traceback_is_a_field_of_its_json_line() -> None:
    try:
        raise ValueError("broken")
    except ValueError:
        line = JSONFormatter().format(record("failed", exc_info=sys.exc_info()))
    assert json.loads(line)["traceback"].endswith("ValueError: broken")
