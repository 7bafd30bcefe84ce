"""Runs a chat template for a bounded time: an adapter's, whose author is not the operator."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeVar

Result = TypeVar("Result")

MOST_SECONDS = 2.0  # of CPU time
_TEMPLATE = "<template>"  # what Jinja calls the code of a template that was given as text


class TemplateTooSlow(Exception):
    """A template took longer than it may."""


def run_template(work: Callable[[], Result], seconds: float = MOST_SECONDS) -> Result:
    """Call what runs a template, in this thread. Raises TemplateTooSlow between two of the template's own lines.

    What one operation takes is not bounded by this, nor is memory.
    """
    deadline = time.thread_time() + seconds

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        if frame.f_code.co_filename != _TEMPLATE:
            return None
        if time.thread_time() > deadline:
            raise TemplateTooSlow
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        return work()
    finally:
        sys.settrace(before)
