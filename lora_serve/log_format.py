"""How log lines are written: as text, or as one JSON object each; the same for both processes of a server."""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any, Literal

Format = Literal["text", "json"]
LONGEST_VALUE = 500  # characters of a value in a line of text


def configure(level: str, format: Format, process: str) -> None:
    """Send log records of `level` and above to standard error.

    Args:
        process: name of this process in every line; empty for none.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JSONFormatter(process) if format == "json" else TextFormatter(process))
    logging.basicConfig(level=level.upper(), handlers=[handler])


class TextFormatter(logging.Formatter):
    """Time, level, logger and message, then the fields that a record has, as name=value."""

    def __init__(self, process: str = "") -> None:
        super().__init__(f"%(asctime)s %(levelname)s {process and process + ' '}%(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # logging's name
        fields = " ".join(f"{name}={_text(value)}" for name, value in _fields(record).items())
        line = super().formatMessage(record)
        return f"{line} {fields}" if fields else line


class JSONFormatter(logging.Formatter):
    """One JSON object a line: time (UTC), level, logger, message, the fields that a record has, and a traceback."""

    def __init__(self, process: str = "") -> None:
        super().__init__()
        self._process = {"process": process} if process else {}

    def format(self, record: logging.LogRecord) -> str:
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        content: dict[str, Any] = {
            "time": f"{seconds}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            **self._process,
            "logger": record.name,
            "message": record.getMessage(),
            **{name: round(value, 6) if isinstance(value, float) else value for name, value in _fields(record).items()},
        }
        if record.exc_info:
            content["traceback"] = self.formatException(record.exc_info)
        return json.dumps(content, ensure_ascii=False, default=str)


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    fields: dict[str, Any] = getattr(record, "fields", {})
    return fields


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    text = str(value)[:LONGEST_VALUE]
    return text if text.isprintable() and not set(text) & set(' "=') else json.dumps(text)
