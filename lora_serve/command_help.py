"""How `--help` is laid out: the docstring as paragraphs, each option with a default where it has one."""

from __future__ import annotations

import argparse
import inspect
import re
import textwrap

# What pydantic-settings writes for an option without a default, or after one that the description names itself.
NO_DEFAULT = re.compile(r" \(default: (None|\[\]|)\)$")


class HelpFormatter(argparse.HelpFormatter):
    """Help of a command."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = re.split(r"\n\s*\n", inspect.cleandoc(text))
        return "\n\n".join(textwrap.fill(" ".join(paragraph.split()), width) for paragraph in paragraphs)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return NO_DEFAULT.sub("", action.help or "")
