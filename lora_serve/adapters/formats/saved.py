"""What any PEFT method may save beside its own matrices: parameters of the base, replaced whole.

    modules_to_save                      X.weight, X.bias, and the same below X     the module's own, replaced
    bias: lora_only, all                 X.base_layer.bias, X.bias                  the bias, replaced
    a vocabulary that was resized        X.base_layer.weight, X.weight, X.modules_to_save.weight (and
                                         X.original_module.weight, which is not used) of the embedding and the head
    trainable_token_indices              X.token_adapter.trainable_tokens_delta     rows of the embedding, replaced

Of tied weights, an embedding in `modules_to_save` is a copy that the head does not follow, unless
`ensure_weight_tying`; an embedding saved because it was resized is the head's too; so are replaced token rows.
Saved copies that equal the base's own parameters change nothing. Source: PEFT 0.21, `peft/utils/other.py` and
`save_and_load.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lora_serve.adapters.adapter import BaseShape, ModuleOverride
from lora_serve.adapters.formats.keys import check_shape, home, refuse_strays
from lora_serve.errors import AdapterInvalid

TOKENS = "token_adapter.trainable_tokens_delta"


@dataclass(frozen=True)
class Saved:
    """What was found: changes by module, and the tensors that are the method's own."""

    overrides: dict[str, ModuleOverride]
    rest: dict[str, Tensor]
    features: list[str]


def take(config: dict[str, Any], tensors: dict[str, Tensor], base: BaseShape) -> Saved:
    """Separate replaced parameters of the base from a method's own matrices. Raises AdapterInvalid naming keys."""
    overrides: dict[str, ModuleOverride] = {}
    rest: dict[str, Tensor] = {}
    features: dict[str, None] = {}
    strays: list[str] = []
    whole = _names(config, "modules_to_save")
    seen = set()
    for key, tensor in sorted(tensors.items()):
        module, tail = home(key, base)
        seen.add(module)
        own = tail.removeprefix("token_adapter.").removeprefix("base_layer.").removeprefix("modules_to_save.")
        if module and tail.startswith("original_module."):
            continue  # what the copy in modules_to_save stands in front of
        if module and tail == TOKENS:
            _replace_tokens(overrides, module, token_ids(config, module), tensor, base)
            features["trainable_token_indices"] = None
        elif own not in base.modules.get(module, {}):
            if module in base.sites and own in ("weight", "bias"):
                strays.append(f"{key} (the base has none)" if own == "bias" else key)
            elif own in ("weight", "bias") and module in base.others:
                strays.append(f"{key} ({base.others[module]})")
            else:
                rest[key] = tensor
        elif not _is_own(base, module, own, tensor):
            saved = any(_within(module, name) for name in whole)
            features[_feature(base, module, own, tensor, saved)] = None
            tied = (
                base.tied and module == base.input_embedding and (not saved or bool(config.get("ensure_weight_tying")))
            )
            for target in (module, base.head) if tied else (module,):
                _replace_parameter(overrides, target, own, tensor, base)
    refuse_strays(strays)
    for name in whole:
        if any(_within(module, name) for module in base.modules) and not any(_within(module, name) for module in seen):
            raise AdapterInvalid(f"modules_to_save in adapter_config.json names {name}, of which no weights were saved")
    if config.get("trainable_token_indices") and not any(override.token_ids for override in overrides.values()):
        raise AdapterInvalid("trainable_token_indices in adapter_config.json names tokens whose rows were not saved")
    return Saved(overrides, rest, list(features))


def token_ids(config: dict[str, Any], module: str) -> list[int]:
    """Which rows `trainable_token_indices` means for a module: a list, or lists by the module's name."""
    given = config.get("trainable_token_indices")
    if given is None:
        given = config.get("token_indices")  # what the method of its own calls it
    if isinstance(given, dict):
        given = next((ids for name, ids in given.items() if module == name or module.endswith("." + name)), None)
    if not isinstance(given, list) or not all(isinstance(id_, int) and not isinstance(id_, bool) for id_ in given):
        raise AdapterInvalid(f"trainable_token_indices in adapter_config.json has no list of token ids for {module}")
    if len(set(given)) != len(given):
        raise AdapterInvalid("trainable_token_indices in adapter_config.json has token ids twice")
    return given


def without_bias(override: ModuleOverride, module: str, base: BaseShape) -> ModuleOverride:
    """PEFT applies a linear module that has replaced rows without its bias."""
    bias = base.bias(module)
    return override if bias is None else shifted(override, -bias.detach().float().cpu())


def shifted(override: ModuleOverride, more: Tensor) -> ModuleOverride:
    """The change with `more` [out] added to its constant."""
    return replace(override, shift=more if override.shift is None else override.shift + more)


def _replace_parameter(
    overrides: dict[str, ModuleOverride], module: str, name: str, tensor: Tensor, base: BaseShape
) -> None:
    shape = base.modules[module][name]
    table = name == "weight" and (module in base.embeddings or module == base.head)
    check_shape(f"{module}.{name}", tensor, (tensor.shape[0], *shape[1:]) if table and tensor.ndim else shape)
    override = overrides.get(module, ModuleOverride())
    if name == "bias" and module in base.sites:  # a linear map's bias is a constant: cheaper than another map
        own = base.parameter(f"{module}.bias").float().cpu()
        overrides[module] = shifted(override, tensor.float() - own)
    else:
        overrides[module] = replace(override, parameters=override.parameters | {name: tensor})


def _replace_tokens(
    overrides: dict[str, ModuleOverride], module: str, ids: list[int], rows: Tensor, base: BaseShape
) -> None:
    if module not in base.embeddings:
        raise AdapterInvalid(f"trainable_token_indices: {module} of this base does not embed tokens")
    override = overrides.get(module, ModuleOverride())
    table = override.parameters.get("weight")  # of a resized vocabulary; its key sorts before the rows'
    ids_, width = base.modules[module]["weight"] if table is None else table.shape
    check_shape(f"{module}.{TOKENS}", rows, (len(ids), width))
    if ids and not 0 <= min(ids) <= max(ids) < ids_:
        raise AdapterInvalid(f"trainable_token_indices in adapter_config.json has token ids outside 0..{ids_ - 1}")
    overrides[module] = replace(override, token_ids=tuple(ids), token_rows=rows * base.embeddings[module])
    if base.tied and module == base.input_embedding:
        override = overrides.get(base.head, ModuleOverride())
        overrides[base.head] = replace(without_bias(override, base.head, base), token_ids=tuple(ids), token_rows=rows)


def _is_own(base: BaseShape, module: str, name: str, tensor: Tensor) -> bool:
    """PEFT saves some of the base's own parameters beside an adapter; harmless if they are just that."""
    if tuple(tensor.shape) != base.modules[module][name]:
        return False
    own = base.parameter(f"{module}.{name}")
    return torch.equal(own.cpu(), tensor.to(own.dtype))


def _feature(base: BaseShape, module: str, name: str, tensor: Tensor, saved: bool) -> str:
    if saved:
        return "modules_to_save"
    if name == "bias":
        return "bias"
    return "resized vocabulary" if tuple(tensor.shape) != base.modules[module][name] else "replaced base weights"


def _within(module: str, name: str) -> bool:
    """Whether a module is one that `modules_to_save` means by `name` (the end of a path), or lies in one."""
    parts = module.split(".")
    return any(".".join(parts[: end + 1]).endswith(name) for end in range(len(parts)))


def _names(config: dict[str, Any], field: str) -> list[str]:
    given = config.get(field) or []
    if not isinstance(given, list) or not all(isinstance(name, str) for name in given):
        raise AdapterInvalid(f"{field} in adapter_config.json is not a list of names")
    return given
