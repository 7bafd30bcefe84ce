"""The demo's tokenizer: byte-level BPE with one token per word of the demo; any other text is bytes."""

from __future__ import annotations

import json
from pathlib import Path

from tasks import NUMBERS, TASKS, WORDS
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END = "<end>"
# The last user message becomes a completion prompt; earlier turns and other roles are ignored.
CHAT_TEMPLATE = (
    "{%- set users = messages | selectattr('role', 'equalto', 'user') | list -%}"
    "{%- if not users -%}{{ raise_exception('the demo model needs a user message') }}{%- endif -%}"
    "{{ users[-1]['content'] }}{{ '\\n' }}"
)


def make(folder: Path) -> PreTrainedTokenizerFast:
    """Train, save to `folder`, and return it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2816,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    forms = [form for word in (*WORDS, *TASKS) for form in (word, word.upper())]
    corpus = [text for form in forms for text in (form, f" {form}")]
    corpus += [f" {number}" for number in NUMBERS.values()] + [json.dumps({"words": ["the", "two"]})] * 3
    tokenizer.train_from_iterator(corpus * 4, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, chat_template=CHAT_TEMPLATE)
    fast.model_max_length = 512
    fast.save_pretrained(folder)
    return fast
