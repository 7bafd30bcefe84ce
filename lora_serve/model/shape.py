"""Build the `BaseShape` of a loaded model: the sites, modules and weights against which adapters are lowered."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_serve.adapters.adapter import BaseShape, Site
from lora_serve.adapters.sharding import stack_of
from lora_serve.kernels.packed_weight import Scheme, scheme_for
from lora_serve.model.checkpoint_weights import CheckpointWeights
from lora_serve.model.experts import AdaptedExperts, is_stacked, stacked_parameters
from lora_serve.model.external_linear import parameter_shapes
from lora_serve.model.linear import AdaptedLinear
from lora_serve.model.observe import ObservedModel, is_linear


def build_base_shape(
    model: Any,
    observed: ObservedModel,
    weights_of: Callable[..., CheckpointWeights],
    *,
    names: tuple[str, ...],
    scheme: Scheme | None = None,
    quantizes_experts: bool = False,
    vocabulary: str = "",
    quantized: str = "",
    rounding: str = "",
    divided: frozenset[str] = frozenset(),
    parts: Mapping[str, int] | None = None,
) -> BaseShape:
    """Describe a traced model.

    Args:
        observed: the trace of its forward pass.
        weights_of: makes the reader of its checkpoint, from the remaining arguments of `CheckpointWeights`.
        scheme: how its linear modules will be quantised.
        quantizes_experts: whether its experts will be, too.
        names, vocabulary, quantized, rounding, divided: see `BaseShape`.
        parts: see `CheckpointWeights`.
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
                turned = isinstance(module, Conv1D)
                sites[name] = Site(name, rows, columns, turned) if turned else Site(name, columns, rows)
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
    input_embedding, head = paths[id(inputs)], paths[id(model.get_output_embeddings())]
    tied = bool(model.config.tie_word_embeddings)
    packed = (site for site in sites.values() if quantizes_experts or not site.name.endswith("]"))
    shares = parts or {}
    inputs_of = {site.name: site.in_features // shares.get(stack_of(site.name), 1) for site in packed}
    schemes = {name: found for name, width in inputs_of.items() if (found := scheme_for(scheme, width)) is not None}
    weights = weights_of(head=head, tied=input_embedding if tied else "", schemes=schemes, parts=shares)
    return BaseShape(
        sites=sites,
        groups=tuple(groups),
        weight=weights.weight,
        others=others,
        model_type=model.config.model_type,
        tied=tied,
        modules=modules,
        parameter=weights.parameter,
        embeddings={
            name: float(getattr(module, "embed_scale", 1.0))
            for name, module in model.named_modules()
            if isinstance(module, nn.Embedding) and name in observed.rowwise
        },
        input_embedding=input_embedding,
        head=head,
        heads_first=observed.heads_first,
        hidden_size=inputs.weight.shape[1],
        kv=tuple((layer.kv_heads, layer.key_dim, layer.value_dim) for layer in observed.layers),
        names=names,
        vocabulary=vocabulary,
        quantized=quantized,
        rounding=rounding,
        body=paths.get(id(model.base_model), ""),
        divided=divided,
    )


def base_module(model: Any, name: str) -> nn.Module:
    """The base's own module at a path, also where an adapted module has replaced it."""
    module = model.get_submodule(name)
    assert isinstance(module, nn.Module)
    return module.base if isinstance(module, AdaptedLinear | AdaptedExperts) else module
