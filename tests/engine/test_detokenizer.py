"""Incremental detokenization gives the text of all tokens decoded together, in pieces that are safe to send."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lora_serve.engine.detokenizer import Detokenizer

CORPUS = ["the red fox runs home", "the old owls sing, softly.", "naïve café 漢字 🦊 fox", "red, red owls!"] * 5


def _wrap(backend: Tokenizer) -> Any:
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


def byte_level() -> Any:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return _wrap(backend)


def metaspace() -> Any:
    """As sentencepiece models come: words begin with ▁, unknown characters fall back to bytes."""
    pieces = ["</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += sorted({character for text in CORPUS for character in text if character.isascii()} - {" "})
    pieces += ["▁", "▁the", "▁red", "▁fox", "▁owls", "ing", "▁s"]
    backend = Tokenizer(
        models.BPE({piece: index for index, piece in enumerate(pieces)}, [], byte_fallback=True, fuse_unk=True)
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _wrap(backend)


TOKENIZERS = {"byte-level": byte_level(), "metaspace": metaspace()}


def whole(tokenizer: Any, ids: list[int]) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(data=st.data())
def test_the_pieces_add_up_to_the_whole_text(kind: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[kind]
    text = data.draw(st.lists(st.sampled_from([*CORPUS[:4], "é", "🦊", " ", "漢", "x"]), max_size=6).map("".join))
    ids = tokenizer(text)["input_ids"]
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.feed([token]) for token in ids]
    assert "".join(pieces) + detokenizer.flush() == whole(tokenizer, ids)
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_the_first_word_after_a_prompt_keeps_its_space(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]
    prompt, ids = tokenizer("the red")["input_ids"], tokenizer("the red fox")["input_ids"]
    detokenizer = Detokenizer(tokenizer, prompt)
    assert detokenizer.feed(ids[len(prompt) :]) + detokenizer.flush() == " fox"


def test_bytes_that_never_form_a_character_are_not_held_back_forever() -> None:
    tokenizer = TOKENIZERS["byte-level"]
    broken = tokenizer.convert_tokens_to_ids("ł")  # 0x82, a continuation byte on its own
    detokenizer = Detokenizer(tokenizer)
    text = "".join(detokenizer.feed([broken]) for _ in range(20))
    assert len(text) >= 8


@given(
    text=st.text("abST", max_size=30),
    stops=st.lists(st.text("abST", min_size=1, max_size=4), min_size=1, max_size=3),
    include=st.booleans(),
)
def test_a_stop_string_ends_the_text_at_any_token_boundary(text: str, stops: list[str], include: bool) -> None:
    tokenizer = TOKENIZERS["byte-level"]
    detokenizer = Detokenizer(tokenizer, stop=stops, include_stop=include)
    to_device = ""
    for character in text:
        to_device += detokenizer.feed(tokenizer(character)["input_ids"])
        if detokenizer.stopped:
            break
    to_device += detokenizer.flush()
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    if not ends:
        assert not detokenizer.stopped
        assert to_device == text
        return
    assert detokenizer.stopped
    stop = next(s for s in sorted(stops, key=len, reverse=True) if text[: min(ends)].endswith(s))
    expected = {text[: min(ends) - len(s)] + (s if include else "") for s in stops if text[: min(ends)].endswith(s)}
    assert to_device in expected, (stop, to_device)
    assert detokenizer.stop_string in stops
    assert text[: min(ends)].endswith(detokenizer.stop_string)


def test_nothing_that_could_become_a_stop_string_is_sent_early() -> None:
    tokenizer = TOKENIZERS["byte-level"]
    detokenizer = Detokenizer(tokenizer, stop=["END"])
    pieces = [detokenizer.feed(tokenizer(character)["input_ids"]) for character in "aENxEN"]
    assert pieces == ["a", "", "", "ENx", "", ""]
    assert detokenizer.flush() == "EN"


def test_special_tokens_are_not_shown() -> None:
    tokenizer = TOKENIZERS["byte-level"]
    detokenizer = Detokenizer(tokenizer)
    assert detokenizer.feed([*tokenizer("fox")["input_ids"], tokenizer.eos_token_id]) + detokenizer.flush() == "fox"


class CountingTokenizer:
    """Counts the tokens that it has to decode."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.decoded = 0

    def decode(self, token_ids: list[int], **options: Any) -> str:
        self.decoded += len(token_ids)
        text: str = self._tokenizer.decode(token_ids, **options)
        return text


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_tokens_without_text_cost_no_more_than_others(kind: str) -> None:
    tokenizer = CountingTokenizer(TOKENIZERS[kind])
    ids = TOKENIZERS[kind]("the red fox", add_special_tokens=False)["input_ids"]
    textless = [0] * 10_000  # special tokens
    detokenizer = Detokenizer(tokenizer)
    text = detokenizer.feed(ids) + detokenizer.feed(textless) + detokenizer.feed(ids) + detokenizer.flush()
    assert text == whole(TOKENIZERS[kind], [*ids, *textless, *ids])
    assert tokenizer.decoded < 50 * len(textless)
