"""Base parameters that any PEFT method may save and replace: `modules_to_save`, biases, embeddings, token rows.

    modules_to_save                      X.weight, X.bias, and the same below X     a copy of X, used instead of X
    bias: lora_only, all                 X.base_layer.bias, X.bias                  X's own bias
    a vocabulary that was resized        X.base_layer.weight, X.weight, X.original_module.weight,
    a head or embedding that is adapted  X.token_adapter.base_layer.weight          X's own weight
    trainable_token_indices              X.token_adapter.trainable_tokens_delta     rows of X, replaced

PEFT loads an own parameter into the base, also where it is adapted and where it is only rounded, and whatever the
adapter does to X comes on top. A tied head and embedding have one own weight; a copy belongs to its module only, unless
`ensure_weight_tying` is set. A copy's own parameters are kept under X.modules_to_save as well, and not read twice.
Replaced rows of an embedding are a tied head's too, unless it has rows of its own. Parameters that equal the base's
have no effect. Source: PEFT 0.21, `peft/utils/other.py` and `save_and_load.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lora_serve.adapters.adapter import BaseShape, ModuleOverride, divide_rows
from lora_serve.adapters.formats.fields import name_list
from lora_serve.adapters.formats.keys import check_shape, refuse_unknown_keys, split_key
from lora_serve.errors import AdapterInvalid

TOKENS = "token_adapter.trainable_tokens_delta"
WRAPPER = re.compile(r"\.((token_adapter\.)?base_layer|original_module)(?=\.)")  # before a module's own parameter

Parameters = dict[tuple[str, str], Tensor]  # (module, parameter) → tensor


@dataclass(frozen=True)
class SavedParameters:
    """What was read.

    Attributes:
        overrides: by module.
        rest: the remaining tensors, which are the method's own.
        features: of the adapter, for the report.
        own: modules whose own weight was saved, whether or not it equals the base's.
    """

    overrides: dict[str, ModuleOverride]
    rest: dict[str, Tensor]
    features: list[str]
    own: frozenset[str]


def split_saved(config: dict[str, Any], tensors: Mapping[str, Tensor], base: BaseShape) -> SavedParameters:
    """Separate replaced parameters of the base from a method's own tensors. Raises AdapterInvalid naming keys."""
    own: Parameters = {}
    copies: Parameters = {}
    rows: dict[str, Tensor] = {}
    rest: dict[str, Tensor] = {}
    unknown: list[str] = []
    saved_modules = name_list(config, "modules_to_save")
    for key, tensor in sorted(tensors.items()):
        if ".modules_to_save." in key:
            continue
        path, wrappers = WRAPPER.subn("", key)
        module, parameter = split_key(path, base)
        if module and parameter == TOKENS:
            rows[module] = tensor
        elif parameter in base.modules.get(module, {}):
            if module in base.divided and parameter == "weight" and tensor.ndim == 2:
                tensor = divide_rows(tensor)
            is_copy = not wrappers and any(_matches(module, name) for name in saved_modules)
            (copies if is_copy else own)[module, parameter] = tensor
        elif module in base.sites and parameter in ("weight", "bias"):
            unknown.append(f"{key} (the base has none)" if parameter == "bias" else key)
        elif parameter in ("weight", "bias") and module in base.others:
            unknown.append(f"{key} ({base.others[module]})")
        else:
            rest[key] = tensor
    refuse_unknown_keys(unknown)
    ids = {module: token_ids(config, module) for module in rows}
    if base.tied and base.input_embedding in rows and not _has_own_rows(config, ids, base):
        rows[base.head], ids[base.head] = rows[base.input_embedding], ids[base.input_embedding]
    _check_saved(config, saved_modules, copies, rows, base)
    if base.tied:
        _tie(own, copies, base, copies_too=bool(config.get("ensure_weight_tying")))
    overrides: dict[str, ModuleOverride] = {}
    features: dict[str, None] = {}
    for (module, parameter), tensor in sorted((own | copies).items()):
        if not _equals_base(base, module, parameter, tensor):
            features[_feature(base, module, parameter, tensor, (module, parameter) in copies)] = None
            _replace_parameter(overrides, module, parameter, tensor, base)
    for module in rows:
        _replace_tokens(overrides, module, ids[module], rows[module], base)
        features["trainable_token_indices"] = None
    own_weights = frozenset(module for module, parameter in own if parameter == "weight")
    return SavedParameters(overrides, rest, list(features), own_weights)


def vocabulary_warnings(overrides: Mapping[str, ModuleOverride], base: BaseShape) -> list[str]:
    """A warning if an adapter's embedding has new tokens and its head has not."""
    if base.head not in base.modules or base.input_embedding not in overrides:
        return []
    new = [
        _vocabulary(overrides, module, base) - base.modules[module]["weight"][0]
        for module in (base.input_embedding, base.head)
    ]
    if new[0] <= max(new[1], 0):
        return []
    return [
        f"its vocabulary has {new[0]} new tokens, of which its files have no rows of the head: they are read and never "
        "generated; save it with save_embedding_layers=True and without the embedding in target_modules"
    ]


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


def _tie(own: Parameters, copies: Parameters, base: BaseShape, *, copies_too: bool) -> None:
    """Give a tied head and embedding one weight; of two that were saved, PEFT loads the head's last."""
    embedding, head = (base.input_embedding, "weight"), (base.head, "weight")
    weight = own.get(head, own.get(embedding))
    if weight is not None:
        own[embedding] = own[head] = weight
    if copies_too and embedding in copies:
        copies.setdefault(head, copies[embedding])


def _check_saved(
    config: dict[str, Any], names: list[str], copies: Parameters, rows: Mapping[str, Tensor], base: BaseShape
) -> None:
    """Raise AdapterInvalid if the configuration names modules or tokens of which nothing was saved."""
    for name in names:
        if any(_matches(module, name) for module in rows):
            raise AdapterInvalid(
                f"modules_to_save and trainable_token_indices in adapter_config.json both name {name}, which PEFT does "
                "not run either; train it whole or some of its rows"
            )
    seen = {module for module, _ in copies}
    for name in names:
        if any(_matches(module, name) for module in base.modules) and not any(
            _matches(module, name) for module in seen
        ):
            raise AdapterInvalid(f"modules_to_save in adapter_config.json names {name}, of which no weights were saved")
    if config.get("trainable_token_indices") and not rows:
        raise AdapterInvalid("trainable_token_indices in adapter_config.json names tokens whose rows were not saved")


def _has_own_rows(config: dict[str, Any], ids: Mapping[str, list[int]], base: BaseShape) -> bool:
    """Whether a tied head has rows of its own: only if the configuration gives it other tokens than the embedding."""
    named = isinstance(config.get("trainable_token_indices"), dict)
    return named and base.head in ids and ids[base.head] != ids[base.input_embedding]


def _replace_tokens(
    overrides: dict[str, ModuleOverride], module: str, ids: list[int], rows: Tensor, base: BaseShape
) -> None:
    if module not in base.embeddings and module != base.head:
        raise AdapterInvalid(
            f"trainable_token_indices in adapter_config.json names {module}, which neither embeds tokens nor is the "
            "head; the trainable tokens method can replace its rows"
        )
    override = overrides.get(module, ModuleOverride())
    table = override.parameters.get("weight")
    ids_, width = _vocabulary(overrides, module, base), base.modules[module]["weight"][1]
    check_shape(f"{module}.{TOKENS}", rows, (len(ids), width))
    beyond = [id_ for id_ in ids if id_ >= ids_]
    if min(ids, default=0) < 0 or sorted(beyond) != [*range(ids_, ids_ + len(beyond))]:
        raise AdapterInvalid(
            f"trainable_token_indices in adapter_config.json has token ids outside 0..{ids_ - 1}, and the files have "
            f"no rows for all tokens up to {max(ids)}; save the adapter with save_embedding_layers=True"
        )
    if beyond:  # of a resized vocabulary that was not saved; the rows that follow are all of what is new
        table = base.parameter(f"{module}.weight").detach().float().cpu() if table is None else table.float()
        table = torch.cat([table, rows[[ids.index(id_) for id_ in sorted(beyond)]].float()])
        override = replace(override, parameters=override.parameters | {"weight": table})
    if module == base.head:
        override = remove_bias(override, module, base)
    else:
        rows = rows.float() * base.embeddings[module]
    overrides[module] = replace(override, token_ids=tuple(ids), token_rows=rows)


def _vocabulary(overrides: Mapping[str, ModuleOverride], module: str, base: BaseShape) -> int:
    """Number of rows of an embedding or a head, replaced or the base's."""
    table = overrides.get(module, ModuleOverride()).parameters.get("weight")
    return base.modules[module]["weight"][0] if table is None else table.shape[0]


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
