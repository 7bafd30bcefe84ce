"""Virtual tokens in the forward pass: rows whose embedding, or whose keys and values, an adapter gives.

Only batches that hold such rows run any of this. Given keys and values are stored by `model/paged_attention.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from lora_serve.adapters.adapter import Prefix
from lora_serve.model.batch import VirtualRun


@contextmanager
def embedded(embedding: nn.Module, virtual: Sequence[VirtualRun], prefixes: Mapping[int, Prefix]) -> Iterator[None]:
    """Have the input embedding [1, tokens] → [1, tokens, hidden] give the adapters' own rows meanwhile.

    The rows take the place of what the module returns, so whatever the model does to its input's embeddings after that
    is done to them too, as in PEFT.
    """

    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        for start, end, slot, offset in virtual:
            rows = prefixes[slot].embeddings
            if rows is not None:
                output[0, start:end] = rows[offset : offset + end - start]
        return output

    handle = embedding.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
