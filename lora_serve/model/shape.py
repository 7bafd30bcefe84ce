"""Build the `BaseShape` of a loaded model: the sites, modules and weights against which adapters are lowered."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_serve.adapters.adapter import BaseShape, Site
from lora_serve.model.experts import AdaptedExperts, expert_weight, is_stacked, stacked_parameters
from lora_serve.model.external_linear import ExternalLinear, parameter_shapes
from lora_serve.model.linear import AdaptedLinear
from lora_serve.model.observe import ObservedModel, is_linear
from lora_serve.model.packed_linear import PackedLinear

_EXPERT = re.compile(r"(.+)\.(\w+)\[(\d+)\]")


def build_base_shape(
    model: Any, observed: ObservedModel, *, names: tuple[str, ...], vocabulary: str = "", quantized: str = ""
) -> BaseShape:
    """Describe a traced model; its weights can be read once its linear modules are packed.

    Args:
        observed: the trace of its forward pass.
        names, vocabulary, quantized: see `BaseShape`.
    """
    paths = {id(module): name for name, module in model.named_modules()}
    sites: dict[str, Site] = {}
    others: dict[str, str] = {}
    modules: dict[str, dict[str, tuple[int, ...]]] = {}
    groups = list(observed.groups)
    for name, module in model.named_modules():
        own = parameter_shapes(module)
        if name in observed.rowwise:
            modules[name] = own
        if is_linear(module):
            if name in observed.rowwise:
                rows, columns = own["weight"]
                sites[name] = Site(name, rows, columns) if isinstance(module, Conv1D) else Site(name, columns, rows)
            else:
                others[name] = "not used in the forward pass, or not for every token"
        elif is_stacked(module) and name in observed.rowwise:
            for parameter, experts in stacked_parameters(module).items():
                for index, (wide, tall) in enumerate(experts):
                    site = Site(f"{name}.{parameter}[{index}]", wide, tall)
                    sites[site.name] = site
                    groups.append((site.name,))
        elif name and own:
            others[name] = f"a {type(module).__name__}, not a linear module"
        elif name and next(module.children(), None) is None:
            others[name] = f"a {type(module).__name__}, which has no parameters"
    inputs = model.get_input_embeddings()
    return BaseShape(
        sites=sites,
        groups=tuple(groups),
        weight=lambda site: _weight(model, site),
        others=others,
        model_type=model.config.model_type,
        tied=bool(model.config.tie_word_embeddings),
        modules=modules,
        parameter=lambda path: _parameter(model, path),
        embeddings={
            name: float(getattr(module, "embed_scale", 1.0))
            for name, module in model.named_modules()
            if isinstance(module, nn.Embedding) and name in observed.rowwise
        },
        input_embedding=paths[id(inputs)],
        head=paths[id(model.get_output_embeddings())],
        hidden_size=inputs.weight.shape[1],
        kv=tuple((layer.kv_heads, layer.key_dim, layer.value_dim) for layer in observed.layers),
        names=names,
        vocabulary=vocabulary,
        quantized=quantized,
        body=paths.get(id(model.base_model), ""),
    )


def _weight(model: Any, site: str) -> Tensor:
    """A site's weight [out, in], as the forward pass uses it."""
    expert = _EXPERT.fullmatch(site)
    module = base_module(model, site if expert is None else expert[1])
    if expert is not None:
        return expert_weight(module, expert[2], int(expert[3]))
    assert isinstance(module, PackedLinear | ExternalLinear)
    return module.full_weight


def _parameter(model: Any, path: str) -> Tensor:
    """A parameter by its path in the original model, dequantised if the base is quantised."""
    name, _, leaf = path.rpartition(".")
    module = base_module(model, name)
    parameter = getattr(module, leaf)
    assert isinstance(parameter, Tensor)
    return parameter


def base_module(model: Any, name: str) -> nn.Module:
    """The base's own module at a path, also where an adapted module has replaced it."""
    module = model.get_submodule(name)
    assert isinstance(module, nn.Module)
    return module.base if isinstance(module, AdaptedLinear | AdaptedExperts) else module
