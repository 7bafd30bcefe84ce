"""LoRA as PEFT saves it: y = W x + s · B(A x).

    s = α/r, or α/√r with `use_rslora`; `rank_pattern` and `alpha_pattern` override r and α by module name
    keys: base_model.model.<module>.lora_A.weight [r, in], base_model.model.<module>.lora_B.weight [out, r]

Conv1D modules (GPT-2) keep these shapes, whatever `fan_in_fan_out` says. Source: PEFT 0.21, `peft/tuners/lora`. A field
that would change the maths and is not served is refused by name; one that cannot matter at inference is ignored; an
unknown one is refused.
"""

from __future__ import annotations

import math
from typing import Any

import re2
import torch
from torch import Tensor

from lora_serve.adapters.adapter import BaseShape, Lowered, Site
from lora_serve.adapters.checkpoint import Checkpoint, some
from lora_serve.errors import AdapterInvalid
from lora_serve.kernels.contract import Delta

PREFIX = "base_model.model."
READ = {"peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights"}
# Say where deltas go (the keys say it too), how training went, or what a library is called.
WITHOUT_EFFECT = {
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "target_modules", "exclude_modules", "lora_dropout", "fan_in_fan_out", "layers_to_transform", "layers_pattern",
    "megatron_core", "runtime_config", "eva_config", "ensure_weight_tying", "qalora_group_size", "loftq_config",
}  # fmt: skip
# Field → the values at which it changes nothing; any other is refused.
MUST_BE_OFF: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "lora_bias": (False,),
    "use_dora": (False,),
    "use_qalora": (False,),
    "modules_to_save": ((), []),
    "trainable_token_indices": ([], {}),
    "layer_replication": ([],),
    "megatron_config": (),
    "corda_config": (),
    "lora_ga_config": (),
    "velora_config": (),
    "monteclora_config": (),
    "alora_invocation_tokens": (),
    "target_parameters": ([],),
    "use_bdlora": (False,),
    "arrow_config": (),
    "kasa_config": (),
}
# Initialisations that leave the base's weights as they are; the others would need the base changed alike.
PLAIN_INITIALISATIONS = (None, True, False, "gaussian", "eva", "orthogonal")
MAX_PATTERN = 200  # characters of a pattern key


def lower(checkpoint: Checkpoint, base: BaseShape) -> Lowered:
    """Compile to deltas, scaling folded into B in float32. Raises AdapterInvalid naming keys and fields."""
    config = checkpoint.config
    _check_fields(config)
    ranks = _patterns(config, "rank_pattern")
    alphas = _patterns(config, "alpha_pattern")
    deltas: dict[str, Delta] = {}
    for name, (a, b) in _pairs(checkpoint.tensors, base).items():
        site = base.sites[name]
        _check_shapes(site, a, b)
        rank = ranks.get(name, _number(config, "r", 8))
        if rank != a.shape[0]:
            raise AdapterInvalid(f"{name} has rank {a.shape[0]} in the weights and {rank:g} in adapter_config.json")
        alpha = alphas.get(name, _number(config, "lora_alpha", 8))
        scaling = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
        deltas[name] = Delta(a, (b.float() * scaling).T.contiguous())
    return Lowered(deltas, _report(checkpoint, base, deltas))


def _check_fields(config: dict[str, Any]) -> None:
    for field, off in MUST_BE_OFF.items():
        value = config.get(field)
        if value is not None and value not in off:
            raise AdapterInvalid(f"{field} = {str(value)[:60]!r} in adapter_config.json is not served yet")
    if config.get("init_lora_weights", True) not in PLAIN_INITIALISATIONS:
        raise AdapterInvalid(
            f"init_lora_weights = {str(config['init_lora_weights'])[:40]!r} changes the base's own weights; "
            "save the adapter with path_initial_model_for_weight_conversion, which makes a plain LoRA of it"
        )
    known = READ | WITHOUT_EFFECT | MUST_BE_OFF.keys()
    unknown = [field for field, value in config.items() if field not in known and value not in (None, False, [], {})]
    if unknown:
        raise AdapterInvalid(f"adapter_config.json has unknown fields that may matter: {some(unknown)}")


class _Patterns:
    """A `rank_pattern` or `alpha_pattern`: the first key, in order, that matches a module's path decides.

    The keys are a stranger's regular expressions, so they are matched in linear time (RE2).
    """

    def __init__(self, field: str, patterns: dict[str, float]) -> None:
        options = re2.Options()
        options.log_errors = False
        options.max_mem = 1 << 20
        self._compiled = []
        for key, value in patterns.items():
            if len(key) > MAX_PATTERN:
                raise AdapterInvalid(f"{field} has a key of {len(key)} characters; at most {MAX_PATTERN} are read")
            try:
                self._compiled.append((re2.compile(rf"(.*\.)?({key})", options), value))
            except re2.error:
                raise AdapterInvalid(f"{field} has a key that is not a plain regular expression: {key}") from None

    def get(self, name: str, otherwise: float) -> float:
        return next((value for pattern, value in self._compiled if pattern.fullmatch(name)), otherwise)


def _patterns(config: dict[str, Any], field: str) -> _Patterns:
    patterns = config.get(field) or {}
    if not isinstance(patterns, dict):
        raise AdapterInvalid(f"{field} in adapter_config.json is not an object")
    return _Patterns(field, {key: _number(patterns, key, 0, f"{field}.{key}") for key in patterns})


def _number(config: dict[str, Any], field: str, otherwise: float, shown: str | None = None) -> float:
    value = config.get(field, otherwise)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < abs(value) < 1e6:
        raise AdapterInvalid(f"{(shown or field)[:100]} in adapter_config.json is not a usable number")
    return value


def _pairs(tensors: dict[str, Tensor], base: BaseShape) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B by site, in the base's order; every key must have a home."""
    found: dict[str, dict[str, Tensor]] = {}
    strays: list[str] = []
    for key, tensor in sorted(tensors.items(), key=lambda item: item[0]):
        name, matrix = _home(key)
        if name in base.sites and matrix in ("lora_A", "lora_B"):
            found.setdefault(name, {})[matrix] = tensor
        elif not (name in base.sites and matrix == "base_layer" and _is_copy(base, name, tensor)):
            strays.append(_why(key, name, matrix, base))
    if strays:
        raise AdapterInvalid(f"{len(strays)} tensors of the adapter have no place in this base: {some(strays)}")
    halves = [name for name, pair in found.items() if len(pair) != 2]
    if halves:
        raise AdapterInvalid(f"only one of lora_A and lora_B is there for {some(halves)}")
    return {name: (found[name]["lora_A"], found[name]["lora_B"]) for name in base.sites if name in found}


def _home(key: str) -> tuple[str, str]:
    """(module, matrix) that a key names."""
    path, _, kind = key.removeprefix(PREFIX).rpartition(".")
    name, _, matrix = path.rpartition(".")
    return name, matrix if kind == "weight" else f"{matrix}.{kind}"


def _is_copy(base: BaseShape, name: str, tensor: Tensor) -> bool:
    """PEFT saves the head's own weights beside its LoRA; harmless if they are the base's."""
    own = base.weight(name)
    return own.shape == tensor.shape and torch.equal(own.cpu(), tensor.to(own.dtype))


def _why(key: str, name: str, matrix: str, base: BaseShape) -> str:
    if name in base.others:
        return f"{key} ({base.others[name]})"
    if name in base.sites and matrix == "base_layer":
        return f"{key} (differs from the base's own weights)"
    return key


def _check_shapes(site: Site, a: Tensor, b: Tensor) -> None:
    rank = a.shape[0]
    if tuple(a.shape) != (rank, site.in_features) or tuple(b.shape) != (site.out_features, rank):
        raise AdapterInvalid(
            f"{site.name} takes A [r, {site.in_features}] and B [{site.out_features}, r]; "
            f"the adapter has {list(a.shape)} and {list(b.shape)}"
        )


def _report(checkpoint: Checkpoint, base: BaseShape, deltas: dict[str, Delta]) -> dict[str, Any]:
    config = checkpoint.config
    ranks = sorted({delta.a.shape[0] for delta in deltas.values()})
    features = [field for field in ("use_rslora", "rank_pattern", "alpha_pattern") if config.get(field)]
    warnings = []
    if all(not delta.b.any() for delta in deltas.values()):
        warnings.append("all of B is zero: the adapter changes nothing")
    return {
        "method": "LoRA",
        "features": features,
        "ranks": ranks,
        "modules": f"{len(deltas)} of {len(base.sites)}",
        "base_model_name_or_path": str(config.get("base_model_name_or_path") or "")[:200],
        "warnings": warnings,
    }
