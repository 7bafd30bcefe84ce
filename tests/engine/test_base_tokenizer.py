"""A tokenizer that comes as code of the checkpoint's own is read without running it, exactly, or refused."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from transformers import PreTrainedTokenizerFast

from lora_serve.engine.base_tokenizer import decoder, load_base_tokenizer

TEXTS = [
    "今天天气很好，我们去公园散步吧。", "百川的大模型支持中文和英文。", "The quick brown fox jumps over the lazy dog.",
    "def add(left, right):\n    return left + right", "In 2023 it read 2.6 trillion tokens.", "你好，世界！  🙂",
]  # fmt: skip
# As Baichuan 2's: no normalisation, no space before the first word, bytes for characters that it does not know.
BAICHUAN_2: dict[str, Any] = {
    "model_type": "bpe", "vocab_size": 460, "byte_fallback": True, "add_dummy_prefix": False,
    "remove_extra_whitespaces": False, "normalization_rule_name": "identity", "split_digits": True,
    "hard_vocab_limit": False, "minloglevel": 2,
}  # fmt: skip


def save_tokenizer(folder: Path, **options: Any) -> SentencePieceProcessor:
    """A checkpoint's tokenizer files, with code of its own that fails when it is run."""
    model = io.BytesIO()
    SentencePieceTrainer.train(sentence_iterator=iter(TEXTS * 20), model_writer=model, **(BAICHUAN_2 | options))
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    (folder / "tokenization_baichuan.py").write_text("raise RuntimeError('must not run')\n")
    (folder / "config.json").write_text(json.dumps({"model_type": "baichuan"}))
    code = {"AutoTokenizer": ["tokenization_baichuan.BaichuanTokenizer", None]}
    config = {"tokenizer_class": "BaichuanTokenizer", "auto_map": code, "add_bos_token": False, "add_eos_token": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"bos_token": "<s>", "eos_token": "</s>"}))
    return SentencePieceProcessor(model_proto=model.getvalue())


def test_baichuan_s_sentencepiece_file_is_read_as_sentencepiece_reads_it(tmp_path: Path) -> None:
    original = save_tokenizer(tmp_path)
    tokenizer = load_base_tokenizer(str(tmp_path), None)
    for text in [*TEXTS, "", " ", "  two  spaces ", "\n\n", "1234567", "한국어 ẞ\u200b", "a▁b", " ".join(TEXTS)]:
        ids = tokenizer(text)["input_ids"]
        assert ids == original.encode(text)
        assert tokenizer.decode(ids) == text.replace("▁", " ")
    assert tokenizer("</s>你好")["input_ids"][0] == tokenizer.eos_token_id == original.eos_id()


def test_a_tokenizer_json_is_preferred(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    load_base_tokenizer(str(tmp_path), None).save_pretrained(tmp_path / "saved")
    (tmp_path / "tokenizer.model").write_bytes(b"no sentencepiece file")
    (tmp_path / "saved" / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    tokenizer = load_base_tokenizer(str(tmp_path), None)
    assert tokenizer.decode(tokenizer(TEXTS[0])["input_ids"]) == TEXTS[0]


def test_a_file_that_would_be_read_otherwise_is_refused_with_a_way_out(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, add_dummy_prefix=True)
    with pytest.raises(ValueError, match=r"reads 'a' otherwise than its tokenizer.model does: save the tokenizer as a"):
        load_base_tokenizer(str(tmp_path), None)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").unlink()
    with pytest.raises(ValueError, match=r"neither a tokenizer.json nor a tokenizer.model"):
        load_base_tokenizer(str(tmp_path), None)


def test_missing_libraries_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tokenizer(tmp_path)
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(ValueError, match="needs sentencepiece and protobuf: pip install"):
        load_base_tokenizer(str(tmp_path), None)


def test_any_other_code_of_a_checkpoint_s_own_is_refused(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    file.write_text(file.read_text().replace("BaichuanTokenizer", "ChatGLMTokenizer"))
    with pytest.raises(ValueError, match="custom code"):
        load_base_tokenizer(str(tmp_path), None)


@pytest.mark.parametrize("skip", [True, False])
def test_decoding_without_transformers_layers_gives_what_it_gives_with_them(tmp_path: Path, skip: bool) -> None:
    save_tokenizer(tmp_path)
    tokenizer = load_base_tokenizer(str(tmp_path), None)
    decode = decoder(tokenizer, skip_special_tokens=skip)
    for text in TEXTS:
        ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        for part in (ids, ids[:1], ids[2:5], ids[-1:], []):
            expected = tokenizer.decode(part, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
            assert decode(part) == expected


def test_a_tokenizer_that_decodes_in_its_own_way_is_asked(tmp_path: Path) -> None:
    class Shouting(PreTrainedTokenizerFast):
        def _decode(self, *args: Any, **options: Any) -> str:
            return super()._decode(*args, **options).upper()

    save_tokenizer(tmp_path)
    backend = load_base_tokenizer(str(tmp_path), None).backend_tokenizer
    ids = backend.encode("the fox").ids
    assert decoder(PreTrainedTokenizerFast(tokenizer_object=backend), skip_special_tokens=True)(ids) == "the fox"
    assert decoder(Shouting(tokenizer_object=backend), skip_special_tokens=True)(ids) == "THE FOX"
