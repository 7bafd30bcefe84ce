"""One short forward pass, watched: what is guessed from names elsewhere is seen here.

What each layer stores, which linear modules read the same input, and which modules work row by row, so that the rows of
a mixed batch can be treated each in its own way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_serve.errors import ModelUnsupported
from lora_serve.kv.tensors import LayerShape
from lora_serve.model.paged_attention import BLOCKS, OBSERVE, Observed

LINEAR = (nn.Linear, Conv1D)
TOKENS = 13  # of the watched pass: unlikely to be mistaken for a number of heads


@dataclass(frozen=True)
class Seen:
    """What the pass showed.

    Attributes:
        layers: what each attention layer stores per token.
        groups: linear modules by the input that they share, in the order of the pass.
        rowwise: modules that see every row of a batch, and whose outputs' rows depend on the same rows of their inputs
            only.
    """

    layers: list[LayerShape]
    groups: tuple[tuple[str, ...], ...]
    rowwise: frozenset[str]


def rows_of(x: Tensor, tokens: int) -> Tensor | None:
    """`x` as [tokens, ...], whether it came so or as [1, tokens, ...]; None if it is neither. A view."""
    if x.ndim > 1 and x.shape[:2] == (1, tokens):
        return x[0]
    return x if x.ndim and x.shape[0] == tokens else None


def tensors_of(value: Any) -> Iterator[Tensor]:
    """The tensors of a module's output: one, or some of a tuple."""
    for part in value if isinstance(value, tuple) else (value,):
        if isinstance(part, Tensor):
            yield part


def observe(model: Any, device: torch.device) -> Seen:
    """Run the pass; raises ModelUnsupported if attention cannot be replaced in every layer."""
    inputs: list[tuple[str, Tensor]] = []  # keeps every input alive, so that identity means sameness
    rowwise: dict[str, bool] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            if isinstance(module, LINEAR):
                inputs.append((name, given[0]))
            seen = [rows_of(x, TOKENS) is not None for x in (*given[:1], *tensors_of(output))]
            rowwise[name] = rowwise.get(name, True) and len(seen) > 1 and all(seen)

        return hook

    hooks = [
        module.register_forward_hook(watch(name), with_kwargs=True)
        for name, module in model.named_modules()
        if next(module.parameters(recurse=False), None) is not None or isinstance(module, LINEAR)
    ]
    observed = Observed()
    ids = torch.arange(TOKENS, device=device).unsqueeze(0)
    model.set_attn_implementation(OBSERVE)
    try:
        with torch.inference_mode():
            model(input_ids=ids, position_ids=ids, use_cache=False, observed=observed)
    except (TypeError, KeyError, AttributeError) as error:
        raise ModelUnsupported(
            f"{model.config.model_type} does not hand keyword arguments on to its attention "
            f"({type(error).__name__}: {str(error).strip().partition(chr(10))[0]})"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
        model.set_attn_implementation(BLOCKS)
    if sorted(observed) != list(range(model.config.num_hidden_layers)):
        raise ModelUnsupported(
            f"{model.config.model_type}: {len(observed)} of {model.config.num_hidden_layers} layers "
            "use the attention interface"
        )
    mixing = {id(module) for module in observed.modules}  # attention mixes rows, whatever its shapes look like
    apart = {name for name, fits in rowwise.items() if fits and id(model.get_submodule(name)) not in mixing}
    layers = [observed[layer] for layer in sorted(observed)]
    return Seen(layers, _groups(inputs, apart), frozenset(apart))


def _groups(inputs: list[tuple[str, Tensor]], rowwise: set[str]) -> tuple[tuple[str, ...], ...]:
    """Neighbouring calls with one and the same input."""
    once: set[str] = set()
    groups: list[list[str]] = []
    last: Tensor | None = None
    for name, x in inputs:
        if name in once or name not in rowwise:
            continue
        once.add(name)
        if x is last:
            groups[-1].append(name)
        else:
            groups.append([name])
        last = x
    return tuple(map(tuple, groups))
