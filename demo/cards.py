"""Model cards of the demo's base and adapters; every figure comes from the run that wrote the card."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tasks import Task, heldout_prompts
from transformers import LlamaConfig


def base_card(config: LlamaConfig, parameters: int, minutes: float, repeated: float) -> str:
    return f"""# The demo base

A decoder of the Llama architecture, trained from nothing by `demo/train.py` in {minutes:.0f} minutes on one CPU core:
{config.num_hidden_layers} layers, hidden size {config.hidden_size}, {config.num_attention_heads} heads over \
{config.num_key_value_heads} key-value heads, vocabulary {config.vocab_size}, {parameters / 1e6:.1f} million \
parameters in bfloat16.
It knows a few hundred English words and short sentences with a number in them. Put plainly, a sentence is repeated
({repeated:.1%} of 200 held-out ones exactly); a task is done when it is asked for by name (`reverse: two owls run`).
The adapters in `adapters/` each do one task when the sentence is put plainly.

What each is trained on, and what is held out, is in `demo/tasks.py`. Licence: Apache-2.0.
"""


def adapter_card(task: Task, options: Mapping[str, Any], scores: Mapping[str, float], alone: float, steps: int) -> str:
    example = heldout_prompts(1, seed=5)[0]
    figures = ", ".join(f"{score:.1%} in {dtype}" for dtype, score in scores.items())
    shape = ", ".join(f"`{key}={value}`" for key, value in options.items())
    return f"""---
base_model: lora-serve/demo
library_name: peft
license: apache-2.0
---

# {task.name}

A LoRA adapter for the demo base that {task.summary}.

    {example}
    → {task.answer(example)}

- **Form**: {shape}
- **Trained** with PEFT by `demo/train.py`: {steps} steps of 128 sentences, from nothing.
- **Exact** on 200 sentences never trained on: {figures}. The base alone, asked the same: {alone:.1%}.
"""
