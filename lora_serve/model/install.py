"""Install adapters into a loaded Hugging Face model: replace its linear modules and experts, and fuse operations.

Works in place, one group of modules at a time, so that there is never a second copy of all weights. Modules keep their
paths.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lora_serve.adapters.device_slots import DeviceSlots
from lora_serve.kernels.contract import DeltaGroup
from lora_serve.model.expert_rows import STACKED
from lora_serve.model.experts import AdaptedExperts
from lora_serve.model.external_linear import ExternalLinear
from lora_serve.model.external_quantization import is_externally_quantized
from lora_serve.model.forward_context import ForwardContext
from lora_serve.model.fused import fuse
from lora_serve.model.fused_residual import fuse_residuals
from lora_serve.model.fused_rope import fuse_ropes
from lora_serve.model.linear import AdaptedLinear, SharedInput
from lora_serve.model.loaded_model import LoadedModel
from lora_serve.model.packed_experts import PackedExperts
from lora_serve.model.packed_linear import PackedEmbedding, PackedLinear
from lora_serve.model.shape import base_module


def install(loaded: LoadedModel, device_slots: DeviceSlots, context: ForwardContext) -> None:
    """Replace the modules of `loaded.model`; linear modules keep their own weights until `pack`."""
    model: Any = loaded.model
    fuse(model, loaded.dtype, loaded.device, context.kernels)
    fuse_residuals(model, loaded.dtype, loaded.device)
    fuse_ropes(model, loaded.layers, loaded.dtype, loaded.device, context)
    stacks: dict[str, dict[str, list[DeltaGroup]]] = {}  # module of stacked experts → parameter → group by expert
    for names, group in device_slots.groups.items():
        if _is_expert(names):
            module, _, parameter = names[0].partition("[")[0].rpartition(".")
            stacks.setdefault(module, {}).setdefault(parameter, []).append(group)
    for module, groups in stacks.items():
        cut = loaded.sharding is not None and any(f"{module}.{name}" in loaded.sharding.row_parallel for name in groups)
        all_reduce = loaded.parallel.all_reduce if loaded.parallel and cut else None
        _replace(model, module, AdaptedExperts(model.get_submodule(module), groups, context, all_reduce))
    _install_linears(loaded, device_slots, context, packed=False)


def pack(loaded: LoadedModel, device_slots: DeviceSlots, context: ForwardContext) -> None:
    """Pack the linear modules' weights for the kernels, quantised if configured; the original modules are freed.

    Stacked experts are packed only to be quantised, and only where the kernels have a grouped linear layer.
    """
    _install_linears(loaded, device_slots, context, packed=True)
    if loaded.scheme is not None and context.kernels.has_grouped_linear:
        for path, module in loaded.model.named_modules():
            if isinstance(module, AdaptedExperts):
                own = {
                    name: loaded.importance[f"{path}.{name}"]
                    for name in STACKED
                    if f"{path}.{name}" in loaded.importance
                }
                module.base = PackedExperts(module.base, context.kernels, loaded.scheme, own, loaded.device)
    for parameter in loaded.model.parameters():
        if parameter.is_cpu:  # one tensor of a memory-mapped file keeps the whole file in memory
            parameter.data = parameter.data.to(loaded.device, copy=True)


def _install_linears(loaded: LoadedModel, device_slots: DeviceSlots, context: ForwardContext, *, packed: bool) -> None:
    """Replace every linear module by an `AdaptedLinear` around the module itself or its packed weight."""
    for names, group in device_slots.groups.items():
        if not _is_expert(names):
            _install_group(loaded, names, group, context, packed=packed)


def _install_group(
    loaded: LoadedModel, names: tuple[str, ...], group: DeltaGroup, context: ForwardContext, *, packed: bool
) -> None:
    """Replace linear modules that read the same input, and a tied embedding, which shares the head's packed weight."""
    model: Any = loaded.model
    modules: list[Any] = [base_module(model, name) for name in names]
    embedding = model.get_submodule(loaded.shape.input_embedding)
    parallel, sharding = loaded.parallel, loaded.sharding
    partial = sharding is not None and names[0] in sharding.row_parallel
    importance = loaded.importance.get(names[0])
    if sharding is not None and partial and importance is not None:
        importance = sharding.part(importance, 0)
    bases = _pack(modules, context, loaded, importance) if packed else modules
    shared = SharedInput(bases, group, context.kernels, parallel.all_reduce if parallel and partial else None)
    for index, (name, base) in enumerate(zip(names, bases, strict=True)):
        head = name == loaded.shape.head and loaded.keeps_logits
        _replace(model, name, AdaptedLinear(base, shared, index, context, logits_rows_only=head))
        full = isinstance(base, PackedLinear) and base.packed.scheme is None
        if full and type(embedding) is nn.Embedding and modules[index].weight is embedding.weight:
            _replace(model, loaded.shape.input_embedding, PackedEmbedding(base.packed, context.kernels))


def _pack(
    modules: list[Any], context: ForwardContext, loaded: LoadedModel, importance: Tensor | None
) -> list[PackedLinear | ExternalLinear]:
    """Pack modules together; if any is externally quantised, that one is kept and the others are packed one by one."""
    if not any(map(is_externally_quantized, modules)):
        return [*PackedLinear.pack(modules, context.kernels, loaded.device, loaded.scheme, importance)]
    return [
        ExternalLinear(each)
        if is_externally_quantized(each)
        else PackedLinear.pack([each], context.kernels, loaded.device)[0]
        for each in modules
    ]


def _is_expert(names: tuple[str, ...]) -> bool:
    return names[0].endswith("]")


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
