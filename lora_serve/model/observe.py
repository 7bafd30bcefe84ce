"""Trace one short forward pass: KV shapes, linear modules that share an input, modules that compute row by row.

Nothing is inferred from module names. Only modules that compute row by row can treat the rows of a mixed batch
differently.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.pytorch_utils import Conv1D

from lora_serve.errors import ModelUnsupported
from lora_serve.kv.tensors import LayerShape
from lora_serve.model.external_quantization import is_externally_quantized
from lora_serve.model.paged_attention import PAGED_ATTENTION

OBSERVE_ATTENTION = "lora_serve_observe"  # the name registered with transformers
TOKENS = 13  # in the traced pass; unlikely to be mistaken for a number of heads


@dataclass(frozen=True)
class ObservedModel:
    """What the trace of one forward pass found.

    Attributes:
        layers: KV per token of each attention layer.
        groups: names of linear modules, grouped by the input that they share, in call order.
        rowwise: modules that get every row of a batch and compute each output row from the same input row only.
        heads_first: those of them whose tensors are [1, heads, tokens, ...], as some norms of queries and keys.
    """

    layers: list[LayerShape]
    groups: tuple[tuple[str, ...], ...]
    rowwise: frozenset[str]
    heads_first: frozenset[str]


class AttentionTrace(dict[int, LayerShape]):
    """KV shape by layer, filled in by a forward pass under `OBSERVE_ATTENTION`.

    Attributes:
        modules: the modules that called the attention function, in call order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.modules: list[nn.Module] = []


def observe_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    trace: AttentionTrace,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention function that records the shapes of keys and values, and returns zeros."""
    layer = module.layer_idx
    assert isinstance(layer, int)
    trace.modules.append(module)
    trace[layer] = LayerShape(key.shape[1], key.shape[3], value.shape[3])
    return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3]), None


AttentionInterface.register(OBSERVE_ATTENTION, observe_attention)


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a plain linear layer (not a subclass with other behaviour, such as a router)."""
    return is_externally_quantized(module) or type(module).forward in (nn.Linear.forward, Conv1D.forward)


def rows_of(x: Tensor, tokens: int) -> Tensor | None:
    """`x` [1, tokens, ...], [tokens, ...] or [1, 1, tokens, ...] as a view [tokens, ...]; None if it has other shapes.

    The last one is a latent of one head, such as the compressed keys and values of MLA.
    """
    for leading in (1, 0, 2):
        if x.ndim > leading and x.shape[: leading + 1] == (*(1,) * leading, tokens):
            return x[(0,) * leading]
    return None


def is_heads_first(x: Tensor, tokens: int) -> bool:
    """Whether `x` is [1, heads, tokens, ...]; as ambiguous as shapes are, so only for the traced pass."""
    return x.ndim > 3 and x.shape[0] == 1 and x.shape[2] == tokens and rows_of(x, tokens) is None


def tensors_of(value: Any) -> Iterator[Tensor]:
    """The tensors in a module's output, which is a tensor or a tuple."""
    for part in value if isinstance(value, tuple) else (value,):
        if isinstance(part, Tensor):
            yield part


def observe(model: Any, device: torch.device) -> ObservedModel:
    """Trace a forward pass; raises ModelUnsupported if attention cannot be replaced in every layer."""
    inputs: list[tuple[str, Tensor]] = []  # keeps every input alive, so that one id is one tensor
    rowwise: dict[str, bool] = {}
    heads_first: dict[str, bool] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            if is_linear(module):
                inputs.append((name, given[0]))
            seen = [*given[:1], *tensors_of(output)]
            for found, fits in (
                (rowwise, [rows_of(x, TOKENS) is not None for x in seen]),
                (heads_first, [is_heads_first(x, TOKENS) for x in seen]),
            ):
                found[name] = found.get(name, True) and len(seen) > 1 and all(fits)

        return hook

    hooks = [
        module.register_forward_hook(watch(name), with_kwargs=True)
        for name, module in model.named_modules()
        if next(module.parameters(recurse=False), None) is not None or is_linear(module)
    ]
    trace = AttentionTrace()
    ids = torch.arange(TOKENS, device=device).unsqueeze(0)
    model.set_attn_implementation(OBSERVE_ATTENTION)
    try:
        with torch.inference_mode():
            model(input_ids=ids, position_ids=ids, use_cache=False, trace=trace)
    except (TypeError, KeyError, AttributeError) as error:
        raise ModelUnsupported(
            f"{model.config.model_type} does not hand keyword arguments on to its attention "
            f"({type(error).__name__}: {str(error).strip().partition(chr(10))[0]})"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
        model.set_attn_implementation(PAGED_ATTENTION)
    if sorted(trace) != list(range(model.config.num_hidden_layers)):
        raise ModelUnsupported(
            f"{model.config.model_type}: {len(trace)} of {model.config.num_hidden_layers} layers "
            "use the attention interface"
        )
    if len(trace.modules) > len(trace):
        raise ModelUnsupported(
            f"{model.config.model_type} calls attention more than once in a layer, and the calls would overwrite each "
            "other's keys and values in the KV cache"
        )
    attention = {id(module) for module in trace.modules}  # mixes rows, although its shapes look row by row
    heads = {name for name, fits in heads_first.items() if fits and not is_linear(model.get_submodule(name))}
    names = {name for name, fits in rowwise.items() if fits and id(model.get_submodule(name)) not in attention}
    layers = [trace[layer] for layer in sorted(trace)]
    return ObservedModel(layers, _group_by_input(inputs, names), frozenset(names | heads), frozenset(heads))


def _group_by_input(inputs: list[tuple[str, Tensor]], rowwise: set[str]) -> tuple[tuple[str, ...], ...]:
    """Group consecutive calls whose input is the same tensor."""
    grouped: set[str] = set()
    groups: list[list[str]] = []
    last: Tensor | None = None
    for name, x in inputs:
        if name in grouped or name not in rowwise:
            continue
        grouped.add(name)
        if x is last:
            groups[-1].append(name)
        else:
            groups.append([name])
        last = x
    return tuple(map(tuple, groups))
