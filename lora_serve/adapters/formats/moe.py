"""LoRA on mixtures of experts, whose experts lie stacked in 3-D parameters.

`target_parameters`, E experts (PEFT wraps a module once per parameter, the first one innermost, so the keys of the
others' nest in `base_layer`):

    X.[base_layer.…]lora_A.weight [E·r, in]   expert by expert: A_e = A[e·r : (e+1)·r]
    X.[base_layer.…]lora_B.weight [out, r·E]  rank by rank: B_e = B viewed as [out, r, E], at e
    ΔW_e = s · B_e A_e;  a 2-D parameter (a router's weights) is one map, replaced whole by W + s · B A

Adapters from before experts were stacked have each expert's own modules (`…experts.3.w1`, `…experts.3.gate_proj`).
Gate and up are halves of one map now: A = [A_gate; A_up], B block-diagonal; a router's LoRA replaces the router's map.
Source: PEFT 0.21, `peft/tuners/lora/layer.py` (ParamWrapper) and `utils/transformers_weight_conversion.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lora_serve.adapters.adapter import BaseShape
from lora_serve.adapters.checkpoint import some
from lora_serve.adapters.formats.fields import Config
from lora_serve.adapters.formats.keys import PREFIX, check_delta, check_shape, home
from lora_serve.errors import AdapterInvalid
from lora_serve.kernels.contract import Delta

Scale = Callable[[str, int], float]

_NESTED = re.compile(r"((?:base_layer\.)*)lora_([AB])\.weight")
_OLD = re.compile(r"(.+)\.(?:block_sparse_moe|mlp)\.(?:experts\.(\d+)\.(\w+)|(gate))\.lora_([AB])\.weight")
_HALVES = {"w1": 0, "gate_proj": 0, "w3": 1, "up_proj": 1}
_DOWN = ("w2", "down_proj")


@dataclass
class Stacks:
    """What was found: deltas by expert's site, replaced parameters by module, and the tensors that are not experts'."""

    deltas: dict[str, Delta] = field(default_factory=dict)
    parameters: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    rest: dict[str, Tensor] = field(default_factory=dict)
    features: list[str] = field(default_factory=list)
    lowered: list[str] = field(default_factory=list)


def take(config: Config, tensors: dict[str, Tensor], base: BaseShape, scale: Scale) -> Stacks:
    """Separate the experts' and routers' LoRA from the rest. Raises AdapterInvalid naming keys."""
    found = Stacks()
    nested: dict[tuple[str, int], dict[str, Tensor]] = {}  # (module, depth of nesting) → A and B
    old: dict[tuple[str, str], dict[str, Tensor]] = {}  # (layer, old name) → A and B
    for key, tensor in sorted(tensors.items()):
        module, tail = home(key, base)
        fits, former = _NESTED.fullmatch(tail), _OLD.fullmatch(key.removeprefix(PREFIX))
        if fits and module not in base.sites and module not in base.embeddings and module in base.modules:
            nested.setdefault((module, fits[1].count(".")), {})[fits[2]] = tensor
        elif former and f"{former[1]}.mlp.experts" in base.modules:
            name = former[4] or f"{former[2]}.{former[3]}"
            old.setdefault((former[1], name), {})[former[5]] = tensor
        else:
            found.rest[key] = tensor
    halves = [" ".join(map(str, name)) for name, pair in (*nested.items(), *old.items()) if len(pair) < 2]
    if halves:
        raise AdapterInvalid(f"only one of lora_A and lora_B is there for {some(halves)}")
    odd = [" ".join(map(str, name)) for name, pair in (*nested.items(), *old.items()) if _flat(pair)]
    if odd:
        raise AdapterInvalid(f"lora_A and lora_B have two dimensions, unlike those of {some(odd)}")
    for (module, depth), pair in nested.items():
        _parameter(found, module, _targeted(config, module, depth, base), pair["A"], pair["B"], base, scale)
    if nested:
        found.features.append("target_parameters")
    _former(found, old, base, scale)
    return found


def _flat(pair: dict[str, Tensor]) -> bool:
    return any(tensor.ndim != 2 for tensor in pair.values())


def _targeted(config: Config, module: str, depth: int, base: BaseShape) -> str:
    """Which parameter of a module the LoRA at this depth is on: the first one targeted lies deepest."""
    given = config.get("target_parameters") or []
    if not isinstance(given, list) or not all(isinstance(name, str) for name in given):
        raise AdapterInvalid("target_parameters in adapter_config.json is not a list of names")
    own = base.modules[module]
    hit = [name for name in own if any(f".{module}.{name}".endswith(f".{target}") for target in given)]
    if not hit and depth == 0 and len(own) == 1:
        return next(iter(own))  # a router as a module of its own, as it was before
    if depth >= len(hit):
        raise AdapterInvalid(f"target_parameters in adapter_config.json does not say what {module} has a LoRA for")
    return hit[len(hit) - 1 - depth]


def _parameter(found: Stacks, module: str, name: str, a: Tensor, b: Tensor, base: BaseShape, scale: Scale) -> None:
    shape = base.modules[module][name]
    path = f"{module}.{name}"
    if len(shape) == 2:
        _replace(found, module, name, a, b, scale(path, a.shape[0]), base)
        return
    experts = shape[0]
    rank = a.shape[0] // experts
    if len(shape) != 3 or f"{path}[0]" not in base.sites or a.shape[0] != rank * experts or rank == 0:
        raise AdapterInvalid(f"{path} {list(shape)} takes no LoRA with A {list(a.shape)} and B {list(b.shape)}")
    check_shape(f"{path}.lora_B", b, (b.shape[0], rank * experts))
    factor = scale(path, rank)
    each = b.view(b.shape[0], rank, experts)
    for expert in range(experts):
        site = base.sites[f"{path}[{expert}]"]
        own, up = a[expert * rank : (expert + 1) * rank].contiguous(), each[:, :, expert]
        check_delta(site, own, up)
        found.deltas[site.name] = Delta(own, (up.float() * factor).T.contiguous())


def _replace(found: Stacks, module: str, name: str, a: Tensor, b: Tensor, factor: float, base: BaseShape) -> None:
    tall, wide = base.modules[module][name]
    check_shape(f"{module}.lora_A", a, (a.shape[0], wide))
    check_shape(f"{module}.lora_B", b, (tall, a.shape[0]))
    weight = base.parameter(f"{module}.{name}").float().cpu() + factor * (b.float() @ a.float())
    found.parameters.setdefault(module, {})[name] = weight


def _former(found: Stacks, old: dict[tuple[str, str], dict[str, Tensor]], base: BaseShape, scale: Scale) -> None:
    """Each expert's own modules, put where they are now."""
    fused: dict[str, dict[int, Delta]] = {}
    for (layer, name), pair in old.items():
        a, b = pair["A"], pair["B"]
        if name == "gate":
            module = f"{layer}.mlp.gate"
            if base.modules.get(module, {}).keys() != {"weight"}:
                raise AdapterInvalid(f"{layer}: the base has no router for the adapter's LoRA on one")
            _replace(found, module, "weight", a, b, scale(module, a.shape[0]), base)
            continue
        expert, _, leaf = name.partition(".")
        experts = f"{layer}.mlp.experts"
        up = (b.float() * scale(f"{experts}.{expert}.{leaf}", a.shape[0])).T.contiguous()
        whole = f"{experts}.{'down_proj' if leaf in _DOWN else 'gate_up_proj'}[{expert}]"
        if whole not in base.sites or (leaf not in _DOWN and leaf not in _HALVES):
            raise AdapterInvalid(f"the base has no place for the adapter's LoRA on {layer} experts.{expert}.{leaf}")
        if leaf in _DOWN:
            check_delta(base.sites[whole], a, b)
            found.deltas[whole] = Delta(a, up)
        else:
            fused.setdefault(whole, {})[_HALVES[leaf]] = Delta(a, up)
    for whole, parts in fused.items():
        site = base.sites[whole]
        half = site.out_features // 2
        for delta in parts.values():
            check_shape(whole, delta.a, (delta.a.shape[0], site.in_features))
            check_shape(whole, delta.b, (delta.a.shape[0], half))
        blocks = [
            torch.nn.functional.pad(delta.b, (index * half, (1 - index) * half))
            for index, delta in sorted(parts.items())
        ]
        found.deltas[whole] = Delta(torch.cat([parts[index].a for index in sorted(parts)]), torch.cat(blocks))
    if old:
        found.features.append("experts saved one by one")
        found.lowered.append("LoRA of experts' own modules became LoRA of their slices of the stacked parameters")
