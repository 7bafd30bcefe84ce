"""What `--quantize` did to a base, in one sentence for the operator: how much is quantised, what is not, and why.

Parameters are counted on the packed modules themselves.
"""

from __future__ import annotations

from collections import Counter

from torch import nn

from lora_serve.adapters.adapter import BaseShape
from lora_serve.kernels.packed_weight import GROUP, Scheme
from lora_serve.model.experts import is_stacked
from lora_serve.model.linear import AdaptedLinear
from lora_serve.model.observe import is_linear
from lora_serve.model.packed_experts import PackedExperts
from lora_serve.model.packed_linear import PackedLinear

LEAST_SHARE = 0.5  # of the weights of linear modules and experts; if less is quantised, the sentence is a warning
EMBEDDINGS, SMALL = "embeddings", "norms, biases and routers"  # which are never quantised


def quantization_note(model: nn.Module, shape: BaseShape, scheme: Scheme, dtype: str, kernels: str) -> str:
    """The sentence about a packed model.

    Args:
        scheme: as configured; where int4 does not fit a module, it is int8.
        dtype: of the parameters that are not quantised.
        kernels: name of the backend.
    """
    quantized: Counter[Scheme] = Counter()
    full: Counter[str] = Counter()
    head = model.get_submodule(shape.head)
    copied = head.base if shape.tied and isinstance(head, AdaptedLinear) else None  # of the embeddings, counted as such
    seen: set[int] = set()
    for module in model.modules():
        if isinstance(module, PackedLinear) and module.packed.scheme is not None and module is not copied:
            quantized[module.packed.scheme] += module.packed.shape[0] * module.packed.shape[1]
        elif isinstance(module, PackedExperts):
            for weights in module.packed.values():
                quantized[weights.scheme or scheme] += len(weights) * weights.shape[0] * weights.shape[1]
        for parameter in module.parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                full[_kind(module, parameter.ndim, kernels)] += parameter.numel()
    done, all_parameters = quantized.total(), quantized.total() + full.total()
    text = f"{_percent(quantized[scheme], all_parameters)} of the base's parameters are {scheme}"
    if scheme == "int4" and quantized["int8"]:
        text += f" and {_percent(quantized['int8'], all_parameters)} int8 (inputs that are no multiple of {GROUP})"
    rest = ", ".join(f"{kind} ({_percent(count, all_parameters)})" for kind, count in full.most_common())
    text = f"--quantize {scheme}: {text}; {dtype} stay {rest}"
    if copied is not None:
        text += "; the LM head has a quantised copy of the embeddings"
    weights_left = sum(count for kind, count in full.items() if kind not in (EMBEDDINGS, SMALL))
    little = done < LEAST_SHARE * (done + weights_left) or done == 0
    return f"warning: most weights are not quantised. {text}" if little else text


def _kind(module: nn.Module, dimensions: int, kernels: str) -> str:
    """What a parameter in full precision is, and why it is not quantised."""
    if isinstance(module, nn.Embedding):
        return EMBEDDINGS
    if dimensions > 2:
        form = f"{type(module).__name__} are of a form that is not known"
        return f"experts, as {f'the {kernels} kernels have no quantised ones' if is_stacked(module) else form}"
    return "linear modules that see some tokens only" if dimensions == 2 and is_linear(module) else SMALL


def _percent(count: int, of: int) -> str:
    share = 100 * count / of
    return f"{share:.0f} %" if share >= 9.95 or count == 0 else f"{share:.1f} %" if share >= 0.05 else "under 0.1 %"
