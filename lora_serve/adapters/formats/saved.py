"""Base parameters that any PEFT method may save and replace: `modules_to_save`, biases, embeddings, token rows.

    modules_to_save                      X.weight, X.bias, and the same below X     parameters of X, replaced
    bias: lora_only, all                 X.base_layer.bias, X.bias                  the bias, replaced
    a vocabulary that was resized        X.base_layer.weight, X.weight, X.modules_to_save.weight (and
                                         X.original_module.weight, which is not used) of the embedding and the head
    trainable_token_indices              X.token_adapter.trainable_tokens_delta     rows of the embedding, replaced

With tied weights, an embedding in `modules_to_save` does not change the head, unless `ensure_weight_tying` is set; a
resized embedding and replaced token rows do. Saved parameters that equal the base's have no effect. Source: PEFT 0.21,
`peft/utils/other.py` and `save_and_load.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lora_serve.adapters.adapter import BaseShape, ModuleOverride
from lora_serve.adapters.formats.keys import check_shape, refuse_unknown_keys, split_key
from lora_serve.errors import AdapterInvalid

TOKENS = "token_adapter.trainable_tokens_delta"


@dataclass(frozen=True)
class SavedParameters:
    """Overrides by module, the remaining tensors of the method itself, and the features found."""

    overrides: dict[str, ModuleOverride]
    rest: dict[str, Tensor]
    features: list[str]


def split_saved(config: dict[str, Any], tensors: dict[str, Tensor], base: BaseShape) -> SavedParameters:
    """Separate replaced parameters of the base from a method's own tensors. Raises AdapterInvalid naming keys."""
    overrides: dict[str, ModuleOverride] = {}
    rest: dict[str, Tensor] = {}
    features: dict[str, None] = {}
    unknown: list[str] = []
    saved_modules = _name_list(config, "modules_to_save")
    seen = set()
    for key, tensor in sorted(tensors.items()):
        module, tail = split_key(key, base)
        seen.add(module)
        parameter = tail.removeprefix("token_adapter.").removeprefix("base_layer.").removeprefix("modules_to_save.")
        if module and tail.startswith("original_module."):
            continue  # the original of a module in modules_to_save; not used
        if module and tail == TOKENS:
            _replace_tokens(overrides, module, token_ids(config, module), tensor, base)
            features["trainable_token_indices"] = None
        elif parameter not in base.modules.get(module, {}):
            if module in base.sites and parameter in ("weight", "bias"):
                unknown.append(f"{key} (the base has none)" if parameter == "bias" else key)
            elif parameter in ("weight", "bias") and module in base.others:
                unknown.append(f"{key} ({base.others[module]})")
            else:
                rest[key] = tensor
        elif not _equals_base(base, module, parameter, tensor):
            saved = any(_matches(module, name) for name in saved_modules)
            features[_feature(base, module, parameter, tensor, saved)] = None
            tied = (
                base.tied and module == base.input_embedding and (not saved or bool(config.get("ensure_weight_tying")))
            )
            for target in (module, base.head) if tied else (module,):
                _replace_parameter(overrides, target, parameter, tensor, base)
    refuse_unknown_keys(unknown)
    for name in saved_modules:
        if any(_matches(module, name) for module in base.modules) and not any(
            _matches(module, name) for module in seen
        ):
            raise AdapterInvalid(f"modules_to_save in adapter_config.json names {name}, of which no weights were saved")
    if config.get("trainable_token_indices") and not any(override.token_ids for override in overrides.values()):
        raise AdapterInvalid("trainable_token_indices in adapter_config.json names tokens whose rows were not saved")
    return SavedParameters(overrides, rest, list(features))


def token_ids(config: dict[str, Any], module: str) -> list[int]:
    """Token ids of a module in `trainable_token_indices`: a list, or lists by the module's name."""
    given = config.get("trainable_token_indices")
    if given is None:
        given = config.get("token_indices")  # its name in the trainable tokens method
    if isinstance(given, dict):
        given = next((ids for name, ids in given.items() if module == name or module.endswith("." + name)), None)
    if not isinstance(given, list) or not all(isinstance(id_, int) and not isinstance(id_, bool) for id_ in given):
        raise AdapterInvalid(f"trainable_token_indices in adapter_config.json has no list of token ids for {module}")
    if len(set(given)) != len(given):
        raise AdapterInvalid("trainable_token_indices in adapter_config.json has token ids twice")
    return given


def remove_bias(override: ModuleOverride, module: str, base: BaseShape) -> ModuleOverride:
    """The override with the module's bias subtracted: PEFT applies a linear module with replaced rows without bias."""
    bias = base.bias(module)
    return override if bias is None else add_shift(override, -bias.detach().float().cpu())


def add_shift(override: ModuleOverride, more: Tensor) -> ModuleOverride:
    """The override with `more` [out] added to its shift."""
    return replace(override, shift=more if override.shift is None else override.shift + more)


def _replace_parameter(
    overrides: dict[str, ModuleOverride], module: str, name: str, tensor: Tensor, base: BaseShape
) -> None:
    shape = base.modules[module][name]
    table = name == "weight" and (module in base.embeddings or module == base.head)
    check_shape(f"{module}.{name}", tensor, (tensor.shape[0], *shape[1:]) if table and tensor.ndim else shape)
    override = overrides.get(module, ModuleOverride())
    if name == "bias" and module in base.sites:  # a shift is cheaper than replacing the parameter
        parameter = base.parameter(f"{module}.bias").float().cpu()
        overrides[module] = add_shift(override, tensor.float() - parameter)
    else:
        overrides[module] = replace(override, parameters=override.parameters | {name: tensor})


def _replace_tokens(
    overrides: dict[str, ModuleOverride], module: str, ids: list[int], rows: Tensor, base: BaseShape
) -> None:
    if module not in base.embeddings:
        raise AdapterInvalid(f"trainable_token_indices: {module} of this base does not embed tokens")
    override = overrides.get(module, ModuleOverride())
    table = override.parameters.get("weight")  # of a resized vocabulary; its key is sorted before the rows' key
    ids_, width = base.modules[module]["weight"] if table is None else table.shape
    check_shape(f"{module}.{TOKENS}", rows, (len(ids), width))
    if ids and not 0 <= min(ids) <= max(ids) < ids_:
        raise AdapterInvalid(f"trainable_token_indices in adapter_config.json has token ids outside 0..{ids_ - 1}")
    overrides[module] = replace(override, token_ids=tuple(ids), token_rows=rows * base.embeddings[module])
    if base.tied and module == base.input_embedding:
        override = overrides.get(base.head, ModuleOverride())
        overrides[base.head] = replace(remove_bias(override, base.head, base), token_ids=tuple(ids), token_rows=rows)


def _equals_base(base: BaseShape, module: str, name: str, tensor: Tensor) -> bool:
    """Whether a saved parameter equals the base's; PEFT saves some unchanged ones with an adapter."""
    if tuple(tensor.shape) != base.modules[module][name]:
        return False
    parameter = base.parameter(f"{module}.{name}")
    return torch.equal(parameter.cpu(), tensor.to(parameter.dtype))


def _feature(base: BaseShape, module: str, name: str, tensor: Tensor, saved: bool) -> str:
    if saved:
        return "modules_to_save"
    if name == "bias":
        return "bias"
    return "resized vocabulary" if tuple(tensor.shape) != base.modules[module][name] else "replaced base weights"


def _matches(module: str, name: str) -> bool:
    """Whether a module is, or is inside, one that `name` in `modules_to_save` matches (the end of a path)."""
    parts = module.split(".")
    return any(".".join(parts[: end + 1]).endswith(name) for end in range(len(parts)))


def _name_list(config: dict[str, Any], field: str) -> list[str]:
    given = config.get(field) or []
    if not isinstance(given, list) or not all(isinstance(name, str) for name in given):
        raise AdapterInvalid(f"{field} in adapter_config.json is not a list of names")
    return given
