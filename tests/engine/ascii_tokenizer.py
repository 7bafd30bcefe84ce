"""A tokenizer for the small test models: a token per ASCII character without capitals, and a few longer ones."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

EOS = 2
MERGES = [("n", "a"), ("m", "e"), ("na", "me"), ('"', ":"), ("{", '"'), ("t", "r"), ("tr", "u"), ("tru", "e")]


def ascii_tokenizer() -> PreTrainedTokenizerFast:
    """Ids below the test models' vocabulary of 96; 1 is BOS, 2 is EOS."""
    letters = ["Ġ", *(chr(code) for code in range(0x21, 0x7F) if not chr(code).isupper())]
    tokens = ["<pad>", "<s>", "</s>", *letters, *(left + right for left, right in MERGES)]
    backend = Tokenizer(models.BPE({token: id for id, token in enumerate(tokens)}, MERGES))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
