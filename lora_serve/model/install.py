"""Install adapters into a loaded Hugging Face model: replace its linear modules, expert stacks and small operations.

Works in place, one group of modules after the other, so that no second copy of the weights is ever held. Modules keep
their paths. Called once at start by `ResidentBase`.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from lora_serve.adapters.device_slots import DeviceSlots
from lora_serve.kernels.contract import DeltaGroup
from lora_serve.model.experts import AdaptedExperts
from lora_serve.model.external_linear import ExternalLinear
from lora_serve.model.external_quantization import is_externally_quantized
from lora_serve.model.forward_context import ForwardContext
from lora_serve.model.fused import fuse
from lora_serve.model.linear import AdaptedLinear, SharedInput
from lora_serve.model.load import LoadedModel
from lora_serve.model.packed_linear import PackedEmbedding, PackedLinear


def install(loaded: LoadedModel, device_slots: DeviceSlots, context: ForwardContext) -> None:
    """Replace the modules of `loaded.model`; their own weights are released as soon as they are packed."""
    model: Any = loaded.model
    fuse(model, loaded.dtype, context.kernels)
    stacks: dict[str, dict[str, list[DeltaGroup]]] = {}  # module of stacked experts → parameter → group by expert
    for names, group in device_slots.groups.items():
        if names[0].endswith("]"):
            module, _, parameter = names[0].partition("[")[0].rpartition(".")
            stacks.setdefault(module, {}).setdefault(parameter, []).append(group)
        else:
            _install_linears(loaded, names, group, context)
    for module, groups in stacks.items():
        _replace(model, module, AdaptedExperts(model.get_submodule(module), groups, context))
    for parameter in model.parameters():
        if parameter.is_cpu:  # one tensor left of a memory-mapped file keeps all of it in memory
            parameter.data = parameter.data.clone()


def _install_linears(loaded: LoadedModel, names: tuple[str, ...], group: DeltaGroup, context: ForwardContext) -> None:
    """Replace linear modules that read one input; and a tied embedding, which then shares the head's packed weights."""
    model: Any = loaded.model
    modules = [model.get_submodule(name) for name in names]
    embedding = model.get_submodule(loaded.shape.input_embedding)
    bases: list[PackedLinear | ExternalLinear]
    if any(map(is_externally_quantized, modules)):
        bases = [
            ExternalLinear(each) if is_externally_quantized(each) else PackedLinear.pack([each], context.kernels)[0]
            for each in modules
        ]
    else:
        bases = [*PackedLinear.pack(modules, context.kernels, loaded.scheme)]
    shared = SharedInput(bases, group, context.kernels)
    for index, (name, base) in enumerate(zip(names, bases, strict=True)):
        head = name == loaded.shape.head and loaded.keeps_logits
        _replace(model, name, AdaptedLinear(base, shared, index, context, logits_rows_only=head))
        tied = type(embedding) is nn.Embedding and modules[index].weight is embedding.weight
        if isinstance(base, PackedLinear) and tied and base.packed.scheme is None:
            _replace(model, loaded.shape.input_embedding, PackedEmbedding(base.packed, context.kernels))


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
