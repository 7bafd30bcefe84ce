"""The two JSON forms of log-probabilities in OpenAI's API."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import Any

from lora_serve.request import Logprob

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class TokenTexts:
    """Single tokens as text and as bytes."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._texts: dict[int, str] = {}  # cache: a call repeats the same few tokens

    @cached_property
    def _byte_level(self) -> bool:
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        return backend is not None and "ByteLevel" in str(backend.decoder)

    def text(self, token: int) -> str:
        if token not in self._texts:
            self._texts[token] = self._tokenizer.decode(
                [token], skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        return self._texts[token]

    def bytes(self, token: int) -> bytes:
        """The token's bytes, which may be part of a character only."""
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if piece is None:
            return b""
        if self._byte_level and all(character in _alphabet() for character in piece):
            return bytes(_alphabet()[character] for character in piece)
        if match := _BYTE.fullmatch(piece):
            return bytes([int(match[1], 16)])
        return self.text(token).encode()

    def key(self, token: int) -> str:
        """The token as a JSON key: its text, or its bytes if they are not valid UTF-8."""
        text = self.text(token)
        if "\ufffd" not in text:
            return text
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in self.bytes(token))


@lru_cache(1)
def _alphabet() -> dict[str, int]:
    """Characters that stand for bytes in byte-level BPE (as in GPT-2's vocabulary)."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + index): byte for index, byte in enumerate(rest)}


def completion_logprobs(
    texts: TokenTexts, entries: Sequence[Logprob | None], tokens: Sequence[int], top: int, offset: int
) -> dict[str, Any]:
    """The `logprobs` object of a completion.

    Args:
        entries: one per token; None for the first token of a prompt.
        offset: of the first token in the returned text.

    The chosen token is always included in `top_logprobs`. Alternatives with the same text get distinct keys.
    """
    shown: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for token, entry in zip(tokens, entries, strict=True):
        text = texts.key(token)
        shown["tokens"].append(text)
        shown["text_offset"].append(offset)
        offset += len(texts.text(token))
        if entry is None:
            shown["token_logprobs"].append(None)
            shown["top_logprobs"].append(None)
            continue
        shown["token_logprobs"].append(entry.value)
        likely = {text: entry.value}
        for other, value in entry.top[:top]:
            if other != token:
                key = texts.key(other)
                likely[key if key not in likely else f"token_id:{other}"] = value
        shown["top_logprobs"].append(likely)
    return shown


def chat_logprobs(texts: TokenTexts, entries: Sequence[Logprob], top: int) -> dict[str, Any]:
    """The `logprobs` object of a chat choice."""

    def entry(token: int, value: float) -> dict[str, Any]:
        return {"token": texts.key(token), "logprob": value, "bytes": [*texts.bytes(token)]}

    return {
        "content": [
            entry(found.token, found.value)
            | {"top_logprobs": [entry(token, value) for token, value in found.top[:top]]}
            for found in entries
        ]
    }
