"""Cut a base's linear modules and experts for tensor parallelism, as transformers' own plan for the model says.

A plan names modules, and parameters of stacked experts, and how each is cut. Only cuts that go together without a
gather are made: column-parallel layers that feed row-parallel ones. What the plan would cut in another way and gather
again (embeddings, the LM head, Phi-3's merged projections) is whole on every device, which gives the same outputs.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_serve.adapters.sharding import Sharding
from lora_serve.errors import ModelUnsupported
from lora_serve.kv.tensors import LayerShape
from lora_serve.model.expert_rows import DOWN, STACKED, UP, UP_WITHOUT_GATE
from lora_serve.model.experts import is_stacked, stacked_parameters
from lora_serve.model.observe import ObservedModel, is_linear, observe
from lora_serve.model.tensor_parallel import TensorParallel

CPU = torch.device("cpu")
COLUMN, PACKED, ROW = "colwise", "packed_colwise", "rowwise"
BLOCKS = {COLUMN: 1, PACKED: 2}  # packed: gate and up in one
EXPERTS = "moe_tp_experts"  # modules of experts whose outputs are added up
# Inputs and outputs are whole on every device, so the module may be, too.
WHOLE = {
    "colwise_gather_output",
    "colwise_rep",
    "rowwise_split_input",
    "rowwise_rep",
    "embedding_rowwise",
    "embedding_colwise",
    "replicated_with_grad_allreduce",
    "replicate",
}


def plan_sharding(model: Any, groups: Sequence[Sequence[str]], layers: int, parallel: TensorParallel) -> Sharding:
    """What of a whole model this rank gets, as far as its plan says. Raises ModelUnsupported, with the reason.

    Args:
        groups: linear modules by the input that they share.
        layers: number of attention layers.
    """
    kind, size = model.config.model_type, parallel.size
    plan: dict[str, str] = model.tp_plan or {}
    if not plan:
        raise ModelUnsupported(f"{kind} has no plan for tensor parallelism in transformers; leave --tensor-parallel 1")
    names = [name for name, _ in (*model.named_modules(), *model.named_parameters())]
    found: dict[str, set[str]] = {style: set() for style in (*BLOCKS, ROW, EXPERTS)}
    for pattern, style in plan.items():
        matching = _matching(pattern, names)
        if not matching or style in WHOLE:
            continue
        if style not in found:
            raise ModelUnsupported(f"{kind} cuts {pattern} for tensor parallelism as {style!r}, which is not supported")
        found[style] |= matching
    columns = {name: blocks for style, blocks in BLOCKS.items() for name in found[style]}
    rows = frozenset(found[ROW])
    if not columns or not rows:
        raise ModelUnsupported(f"{kind}'s plan for tensor parallelism cuts no layers that need no gathering")
    for path in sorted(found[EXPERTS]):
        _check_experts(kind, path, model.get_submodule(path), columns, rows)
    for name in sorted(columns.keys() | rows):
        tall, wide = _features(model, name, found[EXPERTS])
        width, blocks = (tall, columns[name]) if name in columns else (wide, 1)
        if width % (blocks * size):
            raise ModelUnsupported(f"{kind}: {width} features of {name} cannot be divided among {size} devices")
    for group in groups:
        if 0 < sum(name in rows for name in group) < len(group):
            raise ModelUnsupported(f"{kind} cuts the input of only some of {', '.join(group)}")
    return Sharding(parallel.rank, size, columns, rows, (False,) * layers)


def _check_experts(kind: str, path: str, module: Any, columns: Mapping[str, int], rows: Collection[str]) -> None:
    """Raise ModelUnsupported for experts whose parts would not add up to the whole."""
    why = None
    if not is_stacked(module):
        why = f"is a {type(module).__name__}"
    elif module.has_bias or module.is_transposed or getattr(module, "has_identity", False):
        why = "has biases, transposed weights or experts that return their input"
    else:
        up = UP if module.has_gate else UP_WITHOUT_GATE
        if columns.get(f"{path}.{up}") != (2 if module.has_gate else 1) or f"{path}.{DOWN}" not in rows:
            why = f"is not cut at the outputs of {up} and the inputs of {DOWN}"
    if why is not None:
        raise ModelUnsupported(
            f"{kind} cuts the experts {path} for tensor parallelism, which is not supported: it {why}"
        )


def _features(model: Any, name: str, experts: Collection[str]) -> tuple[int, int]:
    """(out, in) features of a linear module, or of each expert of a stacked parameter. Raises ModelUnsupported."""
    owner, _, leaf = name.rpartition(".")
    if owner in experts:
        (wide, tall), *_ = stacked_parameters(model.get_submodule(owner))[leaf]
        return tall, wide
    try:
        module = model.get_submodule(name)
    except AttributeError:
        module = model.get_parameter(name)
    if not isinstance(module, nn.Module) or not is_linear(module) or isinstance(module, Conv1D):
        text = f"{model.config.model_type} cuts {name} for tensor parallelism, which is a {type(module).__name__}"
        raise ModelUnsupported(text)
    tall, wide = module.weight.shape  # type: ignore[misc]
    return tall, wide


def cut_model(model: Any, whole: ObservedModel, sharding: Sharding) -> tuple[Sharding, list[LayerShape]]:
    """Cut a model in place to this rank's part; returns what was cut, and the KV per token that is left to this rank.

    Args:
        model: on the CPU.
        whole: the trace of the uncut model.
        sharding: as planned.
    Raises ModelUnsupported.
    """
    _cut_modules(model, sharding)
    try:
        own = observe(model, CPU).layers
    except RuntimeError as error:  # heads were cut in two
        kv = sorted({layer.kv_heads for layer in whole.layers})
        raise ModelUnsupported(
            f"{model.config.model_type}: {model.config.num_attention_heads} attention heads and "
            f"{', '.join(map(str, kv))} of keys and values cannot be divided among {sharding.size} devices"
        ) from error
    return replace(sharding, kv_cut=_cut_layers(model.config.model_type, whole.layers, own, sharding.size)), own


def _cut_modules(model: Any, sharding: Sharding) -> None:
    """Cut the linear modules one at a time; the parts are copies, so that the whole weights can be freed."""
    stacks = {
        f"{path}.{name}": module for path, module in model.named_modules() if is_stacked(module) for name in STACKED
    }
    for name, blocks in sharding.column_parallel.items():
        if name in stacks:
            _cut_stack(stacks[name], name, sharding, 1, blocks)
            continue
        module = model.get_submodule(name)
        module.weight = _parameter(sharding.part(module.weight, 0, blocks))
        if module.bias is not None:
            module.bias = _parameter(sharding.part(module.bias, 0, blocks))
        module.out_features //= sharding.size
    for name in sharding.row_parallel:
        if name in stacks:
            _cut_stack(stacks[name], name, sharding, 2)
            continue
        module = model.get_submodule(name)
        module.weight = _parameter(sharding.part(module.weight, 1))
        if sharding.rank > 0:  # the ranks' outputs are added up, and so would be their biases
            module.bias = None
        module.in_features //= sharding.size


def _cut_stack(module: nn.Module, path: str, sharding: Sharding, dim: int, blocks: int = 1) -> None:
    """Cut every expert of a stacked parameter [experts, out, in]."""
    name = path.rpartition(".")[2]
    module.register_parameter(name, _parameter(sharding.part(module.get_parameter(name), dim, blocks)))


def _cut_layers(kind: str, whole: Sequence[LayerShape], own: Sequence[LayerShape], size: int) -> tuple[bool, ...]:
    """By layer, whether keys and values were cut by heads. Raises ModelUnsupported if they were cut otherwise."""
    cut = []
    for before, after in zip(whole, own, strict=True):
        parts = LayerShape(before.kv_heads // size, before.key_dim, before.value_dim)
        if after not in (before, parts):
            raise ModelUnsupported(f"{kind} does not divide its heads when its layers are cut")
        cut.append(after == parts)
    return tuple(cut)


def _matching(pattern: str, names: Iterable[str]) -> set[str]:
    """The modules and parameters that an entry of a plan names; `*` stands for a number."""
    expression = re.compile(re.escape(pattern).replace(r"\*", r"\d+"))
    return {name for name in names if expression.fullmatch(name)}


def _parameter(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach().clone(), requires_grad=False)
