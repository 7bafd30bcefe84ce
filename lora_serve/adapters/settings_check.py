"""Reads an adapter's `serve.yaml`, and tries its chat template.

This runs in the compiler's process, whose memory and time are bounded. What a template does with a short conversation
is seen here; what it does with any other, where requests are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lora_serve.errors import AdapterInvalid
from lora_serve.names import SETTINGS
from lora_serve.serve_settings import MOST_BYTES, ServeSettings, parse_settings

LONGEST_PROMPT = 100_000  # characters that a template may make of a few words
_SPECIAL: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
_TALK = [
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "What is LoRA?"},
]


def read_settings(folder: Path) -> ServeSettings:
    """The settings of a staged or stored version, which has the file. Raises AdapterInvalid."""
    with (folder / SETTINGS).open("rb") as file:
        settings = parse_settings(file.read(MOST_BYTES + 1))
    if settings.chat_template is not None:
        _try_template(settings.chat_template, settings.system)
    return settings


def _try_template(template: str, system: str | None) -> None:
    """Write two short conversations with a chat template. Raises AdapterInvalid that says why it cannot."""
    from transformers.utils.chat_template_utils import render_jinja_template  # here: few adapters have a template

    first = [] if system is None else [{"role": "system", "content": system}]
    for talk in (_TALK[:1], _TALK):
        try:
            texts = render_jinja_template(
                [[*first, *talk]], chat_template=template, add_generation_prompt=True, **_SPECIAL
            )
        except MemoryError:
            raise
        except Exception as error:  # a template is a program: it can raise whatever it likes
            problem = f"it cannot write a short conversation: {str(error)[:200]}"
            raise AdapterInvalid(f"{SETTINGS}: chat_template: {problem}", param="settings") from None
        text = texts[0][0]
        if not text:
            raise AdapterInvalid(f"{SETTINGS}: chat_template: it writes nothing", param="settings")
        if len(text) > LONGEST_PROMPT + len(template) + len(system or ""):
            problem = f"it makes {len(text):,} characters of a few words"
            raise AdapterInvalid(f"{SETTINGS}: chat_template: {problem}", param="settings")
