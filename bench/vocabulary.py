"""A made-up byte-level BPE tokenizer of any size, without training: every id decodes to text, every text encodes.

The 256 bytes come first, then ever longer words of small letters, each the merge of a shorter word and a letter, first
with a space in front. English text comes to three or four letters a token, about what real vocabularies give.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, product
from string import ascii_lowercase
from typing import Any

from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
SPACE = "Ġ"  # how byte-level BPE writes a space
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer(size: int) -> Any:
    """A tokenizer with exactly `size` ids, the last three special (end of text, start and end of a message)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if size < len(alphabet) + len(SPECIAL):
        raise ValueError(f"a byte-level vocabulary has at least {len(alphabet) + len(SPECIAL)} ids")
    ids = {byte: index for index, byte in enumerate(alphabet)}
    merges = []
    for stem, letter in _words():
        if len(ids) == size - len(SPECIAL):
            break
        merges.append((stem, letter))
        ids[stem + letter] = len(ids)
    tokenizer = Tokenizer(BPE(vocab=ids, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    fast: Any = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, eos_token=SPECIAL[2], pad_token=SPECIAL[0]
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def _words() -> Iterator[tuple[str, str]]:
    """Merges in the order of their ids: (a token that is there already, the letter that is added)."""
    for length in range(1, 5):
        spaced = ((SPACE + "".join(stem), letter) for *stem, letter in product(ascii_lowercase, repeat=length))
        bare = (("".join(stem), letter) for *stem, letter in product(ascii_lowercase, repeat=length) if stem)
        yield from chain(spaced, bare)
