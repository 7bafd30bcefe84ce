"""LoRA on mixtures of experts: y = W_e x + s · B_e(A_e x), experts stacked in 3-D parameters.

`target_parameters` with E experts (PEFT wraps a module once per parameter, the first one innermost, so the keys of
further ones are nested in `base_layer`):

    X.[base_layer.…]lora_A.weight [E·r, in]   expert by expert: A_e = A[e·r : (e+1)·r]
    X.[base_layer.…]lora_B.weight [out, r·E]  rank by rank: B_e = B viewed as [out, r, E], at e
    ΔW_e = s · B_e A_e;  a 2-D parameter (a router's weight) is replaced by W + s · B A, and by W' + s · B A with
                              PiSSA and OLoRA (`residual.py`)

Older adapters have a module per expert (`…experts.3.w1`, `…experts.3.gate_proj`). Gate and up projection are now one
parameter: A = [A_gate; A_up], B block-diagonal; a router's LoRA replaces the router's weight.
Source: PEFT 0.21, `peft/tuners/lora/layer.py` (ParamWrapper) and `utils/transformers_weight_conversion.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lora_serve.adapters.adapter import BaseShape
from lora_serve.adapters.checkpoint import shorten
from lora_serve.adapters.formats import residual
from lora_serve.adapters.formats.fields import Config, name_list
from lora_serve.adapters.formats.keys import PREFIX, check_delta, check_shape, split_key
from lora_serve.errors import AdapterInvalid
from lora_serve.kernels.contract import Delta

Scale = Callable[[str, int, tuple[int, ...]], float]

_NESTED = re.compile(r"((?:base_layer\.)*)lora_([AB])\.weight")
_UNSTACKED = re.compile(r"(.+)\.(?:block_sparse_moe|mlp)\.(?:experts\.(\d+)\.(\w+)|(gate))\.lora_([AB])\.weight")
_HALVES = {"w1": 0, "gate_proj": 0, "w3": 1, "up_proj": 1}
_DOWN = ("w2", "down_proj")


@dataclass
class ExpertAdapters:
    """Deltas by site of an expert, replaced parameters by module, and the remaining tensors."""

    deltas: dict[str, Delta] = field(default_factory=dict)
    parameters: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    rest: dict[str, Tensor] = field(default_factory=dict)
    features: list[str] = field(default_factory=list)
    lowered: list[str] = field(default_factory=list)


def split_experts(config: Config, tensors: dict[str, Tensor], base: BaseShape, scale: Scale) -> ExpertAdapters:
    """Lower the LoRA of experts and routers, and separate it from the rest. Raises AdapterInvalid naming keys."""
    adapters = ExpertAdapters()
    nested: dict[tuple[str, int], dict[str, Tensor]] = {}  # (module, depth of nesting) → A and B
    unstacked: dict[tuple[str, str], dict[str, Tensor]] = {}  # (layer, old name) → A and B
    for key, tensor in sorted(tensors.items()):
        module, tail = split_key(key, base)
        nested_match, unstacked_match = _NESTED.fullmatch(tail), _UNSTACKED.fullmatch(key.removeprefix(PREFIX))
        if nested_match and module not in base.sites and module not in base.embeddings and module in base.modules:
            nested.setdefault((module, nested_match[1].count(".")), {})[nested_match[2]] = tensor
        elif unstacked_match and f"{unstacked_match[1]}.mlp.experts" in base.modules:
            name = unstacked_match[4] or f"{unstacked_match[2]}.{unstacked_match[3]}"
            unstacked.setdefault((unstacked_match[1], name), {})[unstacked_match[5]] = tensor
        else:
            adapters.rest[key] = tensor
    incomplete = [" ".join(map(str, name)) for name, pair in (*nested.items(), *unstacked.items()) if len(pair) < 2]
    if incomplete:
        raise AdapterInvalid(f"only one of lora_A and lora_B is there for {shorten(incomplete)}")
    malformed = [
        " ".join(map(str, name)) for name, pair in (*nested.items(), *unstacked.items()) if _not_matrices(pair)
    ]
    if malformed:
        raise AdapterInvalid(f"lora_A and lora_B have two dimensions, unlike those of {shorten(malformed)}")
    for (module, depth), pair in nested.items():
        parameter = _target_parameter(config, module, depth, base)
        _lower_parameter(adapters, module, parameter, pair["A"], pair["B"], config, base, scale)
    if nested:
        adapters.features.append("target_parameters")
    if unstacked and residual.is_residual(config):
        raise AdapterInvalid(
            f"{residual.method_name(config)} on experts that were saved one by one is not defined for the base's "
            "stacked ones"
        )
    _lower_unstacked(adapters, unstacked, config, base, scale)
    return adapters


def _not_matrices(pair: dict[str, Tensor]) -> bool:
    return any(tensor.ndim != 2 for tensor in pair.values())


def _target_parameter(config: Config, module: str, depth: int, base: BaseShape) -> str:
    """The parameter that a LoRA at this depth of nesting targets; the first targeted parameter is nested deepest."""
    targets = name_list(config, "target_parameters")
    parameters = base.modules[module]
    matches = [name for name in parameters if any(f".{module}.{name}".endswith(f".{target}") for target in targets)]
    if not matches and depth == 0 and len(parameters) == 1:
        return next(iter(parameters))  # a router that was a linear module in older versions
    if depth >= len(matches):
        raise AdapterInvalid(f"target_parameters in adapter_config.json does not say what {module} has a LoRA for")
    return matches[len(matches) - 1 - depth]


def _lower_parameter(
    adapters: ExpertAdapters,
    module: str,
    name: str,
    a: Tensor,
    b: Tensor,
    config: Config,
    base: BaseShape,
    scale: Scale,
) -> None:
    shape = base.modules[module][name]
    path = f"{module}.{name}"
    if len(shape) == 2:
        _replace_parameter(adapters, module, name, a, b, scale(path, a.shape[0], shape), config, base)
        return
    if residual.is_residual(config):
        raise AdapterInvalid(f"{residual.method_name(config)} is not defined for stacked experts ({path})")
    experts = shape[0]
    rank = a.shape[0] // experts
    if len(shape) != 3 or f"{path}[0]" not in base.sites or a.shape[0] != rank * experts or rank == 0:
        raise AdapterInvalid(f"{path} {list(shape)} takes no LoRA with A {list(a.shape)} and B {list(b.shape)}")
    check_shape(f"{path}.lora_B", b, (b.shape[0], rank * experts))
    factor = scale(path, rank, ())
    b_by_expert = b.view(b.shape[0], rank, experts)
    for expert in range(experts):
        site = base.sites[f"{path}[{expert}]"]
        a_expert, b_expert = a[expert * rank : (expert + 1) * rank].contiguous(), b_by_expert[:, :, expert]
        check_delta(site, a_expert, b_expert)
        adapters.deltas[site.name] = Delta(a_expert, (b_expert.float() * factor).T.contiguous())


def _replace_parameter(
    adapters: ExpertAdapters,
    module: str,
    name: str,
    a: Tensor,
    b: Tensor,
    factor: float,
    config: Config,
    base: BaseShape,
) -> None:
    out_features, in_features = base.modules[module][name]
    check_shape(f"{module}.lora_A", a, (a.shape[0], in_features))
    check_shape(f"{module}.lora_B", b, (out_features, a.shape[0]))
    weight = base.parameter(f"{module}.{name}").float().cpu()
    update = factor * (b.float() @ a.float())
    if residual.is_residual(config):
        up, down = residual.component(f"{module}.{name}", weight, a.shape[0], factor, config)
        update = (update.double() - up @ down).float()
    adapters.parameters.setdefault(module, {})[name] = weight + update


def _lower_unstacked(
    adapters: ExpertAdapters,
    unstacked: dict[tuple[str, str], dict[str, Tensor]],
    config: Config,
    base: BaseShape,
    scale: Scale,
) -> None:
    """Lower the LoRA of unstacked experts to their slices of the stacked parameters."""
    gate_up: dict[str, dict[int, Delta]] = {}
    for (layer, name), pair in unstacked.items():
        a, b = pair["A"], pair["B"]
        if name == "gate":
            module = f"{layer}.mlp.gate"
            if base.modules.get(module, {}).keys() != {"weight"}:
                raise AdapterInvalid(f"{layer}: the base has no router for the adapter's LoRA on one")
            _replace_parameter(adapters, module, "weight", a, b, scale(module, a.shape[0], ()), config, base)
            continue
        expert, _, leaf = name.partition(".")
        experts = f"{layer}.mlp.experts"
        b_expert = (b.float() * scale(f"{experts}.{expert}.{leaf}", a.shape[0], ())).T.contiguous()
        site_name = f"{experts}.{'down_proj' if leaf in _DOWN else 'gate_up_proj'}[{expert}]"
        if site_name not in base.sites or (leaf not in _DOWN and leaf not in _HALVES):
            raise AdapterInvalid(f"the base has no place for the adapter's LoRA on {layer} experts.{expert}.{leaf}")
        if leaf in _DOWN:
            check_delta(base.sites[site_name], a, b)
            adapters.deltas[site_name] = Delta(a, b_expert)
        else:
            gate_up.setdefault(site_name, {})[_HALVES[leaf]] = Delta(a, b_expert)
    for site_name, parts in gate_up.items():
        site = base.sites[site_name]
        half = site.out_features // 2
        for delta in parts.values():
            check_shape(site_name, delta.a, (delta.a.shape[0], site.in_features))
            check_shape(site_name, delta.b, (delta.a.shape[0], half))
        blocks = [
            torch.nn.functional.pad(delta.b, (index * half, (1 - index) * half))
            for index, delta in sorted(parts.items())
        ]
        adapters.deltas[site_name] = Delta(torch.cat([parts[index].a for index in sorted(parts)]), torch.cat(blocks))
    if unstacked:
        adapters.features.append("experts saved one by one")
        adapters.lowered.append("LoRA of experts' own modules became LoRA of their slices of the stacked parameters")
