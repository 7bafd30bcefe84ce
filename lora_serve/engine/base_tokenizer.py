"""The base's tokenizer, loaded without running code that comes with the checkpoint.

A tokenizer that is code of the checkpoint's own is refused, but for Baichuan's: that is sentencepiece and nothing else,
which transformers' general tokenizer reads. The result is compared with sentencepiece itself.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils.hub import cached_file

from lora_serve.names import TOKENIZER

PLAIN_SENTENCEPIECE = {"BaichuanTokenizer"}  # tokenizer classes
SENTENCEPIECE_FILE = "tokenizer.model"
SAMPLES = (
    "a", " a", "  a  b ", "\n", "\n\n\tx", "12,345.67", "今天天气很好，我们去散步。", "日本語と한국어", "🙂 é ẞ\u200b",
    "x▁y", "def f(x):\n    return {'k': x}\n",
)  # fmt: skip


def load_base_tokenizer(model: str, revision: str | None) -> Any:
    """Load a tokenizer by its model's folder or hub id; raises OSError, ValueError or KeyError if it cannot be."""
    declared = get_tokenizer_config(model, revision=revision).get("tokenizer_class")
    if declared not in PLAIN_SENTENCEPIECE:
        return AutoTokenizer.from_pretrained(model, revision=revision, trust_remote_code=False)
    if _file(model, TOKENIZER, revision) is None:
        return _read_sentencepiece(model, revision)
    return PreTrainedTokenizerFast.from_pretrained(model, revision=revision or "main")


def decoder(tokenizer: Any, *, skip_special_tokens: bool) -> Callable[[list[int]], str]:
    """A tokenizer's `decode` without clean-up of spaces.

    If the tokenizer does not override it, without transformers' layers, which take three times as long as the decoding.
    """
    kind, plain = type(tokenizer), PreTrainedTokenizerFast
    if issubclass(kind, plain) and kind.decode is plain.decode and kind._decode is plain._decode:
        return partial(tokenizer.backend_tokenizer.decode, skip_special_tokens=skip_special_tokens)
    return partial(tokenizer.decode, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)


def _read_sentencepiece(model: str, revision: str | None) -> Any:
    """The tokenizer of a sentencepiece file, checked against sentencepiece."""
    file = _file(model, SENTENCEPIECE_FILE, revision)
    if file is None:
        raise ValueError(f"it has neither a {TOKENIZER} nor a {SENTENCEPIECE_FILE}")
    way_out = f"save the tokenizer as a {TOKENIZER} with transformers, where the model's own code may run"
    try:
        import google.protobuf  # noqa: F401  # transformers reads the file with it
        from sentencepiece import SentencePieceProcessor
    except ImportError as error:
        raise ValueError(
            f"its {SENTENCEPIECE_FILE} needs sentencepiece and protobuf: pip install 'lora-serve[sentencepiece]', "
            f"or {way_out}"
        ) from error
    original = SentencePieceProcessor(model_file=file)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model, revision=revision or "main")
    for text in SAMPLES:
        ids = original.encode(text)
        if tokenizer.encode(text, add_special_tokens=False) != ids or tokenizer.decode(ids) != original.decode(ids):
            raise ValueError(f"transformers reads {text!r} otherwise than its {SENTENCEPIECE_FILE} does: {way_out}")
    return tokenizer


def _file(model: str, name: str, revision: str | None) -> str | None:
    """The path of a file of a local folder or hub model; None if it has none."""
    found: str | None = cached_file(
        model,
        name,
        revision=revision,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return found
