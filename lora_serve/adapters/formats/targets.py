"""Which modules a configuration adapts, after PEFT's rules, and what becomes of saved keys that contradict it.

    a module is adapted     if `target_modules` names it (the end of its path, or all of it as a regular expression), in
                            one of `layers_to_transform` if that is set, and neither `exclude_modules` nor
                            `modules_to_save` names it; or if `target_parameters` names one of its parameters
    keys of other modules   are not used: PEFT has no module to load them into
    modules without keys    are the base's: PEFT leaves them as they were initialised, which is without effect

Both become warnings in the report. Source: PEFT 0.21, `peft/tuners/tuners_utils.py` (check_target_module_exists,
_inject_parameters).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Set
from dataclasses import replace
from typing import Any

import re2

from lora_serve.adapters.adapter import BaseShape
from lora_serve.adapters.checkpoint import Checkpoint, shorten
from lora_serve.adapters.formats.fields import Config, name_list
from lora_serve.adapters.formats.keys import PREFIX, split_key
from lora_serve.errors import AdapterInvalid

MAX_EXPRESSION = 4000  # characters of a regular expression
ALL_LINEAR = "all-linear"
EMBEDDING = "embed_tokens"  # PEFT ties the head's adapter to that of an embedding of this name only
_SAVED = re.compile(r"(weight|bias|(modules_to_save|original_module|token_adapter)\..*|trainable_tokens_delta)")
_UNSTACKED_EXPERT = re.compile(r"(\d+\.\w+)\..*")


class Targets:
    """The modules that a configuration adapts. Raises AdapterInvalid naming a field that cannot be read.

    Attributes:
        ties: whether a tied head gets the adapter of an embedding that is named.
        unreadable: a regular expression in the configuration that is not matched in linear time; then every module is
            taken for one that is adapted.
    """

    def __init__(self, config: Config, base: BaseShape, *, short: bool = False) -> None:
        self._base = base
        self._body = f"{base.body}." if short else ""  # PEFT's paths start below it
        self.unreadable = ""
        self._targets = self._names(config, "target_modules")
        self._excluded = self._names(config, "exclude_modules")
        self._parameters = frozenset(name_list(config, "target_parameters"))
        self._saved = frozenset(name_list(config, "modules_to_save"))
        self._layers = _layers(config)
        self._patterns = self._layer_patterns(config)
        ties = config.get("ensure_weight_tying") and base.input_embedding.rpartition(".")[2] == EMBEDDING
        self.ties = base.tied and (bool(ties) or config.get("peft_type") == "TRAINABLE_TOKENS")

    def parameters(self, module: str) -> int:
        """How many parameters of a module the configuration names."""
        own = self._base.modules.get(module, {}) if self._parameters else {}
        return sum(ends_with(f"{self._path(module)}.{parameter}", self._parameters) for parameter in own)

    def names(self, module: str) -> bool:
        """Whether the configuration names a module, by its path in the base, or one of its parameters."""
        path = self._path(module)
        if self.parameters(module):
            return True
        if self._excluded is not None and _matches(path, self._excluded):
            return False
        if self._targets is None or (self._saved and any(name in self._saved for name in _parts(path))):
            return False
        if self._targets == {ALL_LINEAR}:
            return module in self._base.sites and module != self._base.head
        by_name = isinstance(self._targets, frozenset) and path not in self._targets
        return _matches(path, self._targets) and (not by_name or self._in_layers(path))

    def adapts(self, module: str) -> bool:
        """Whether a module gets the tensors that were saved for it: it is named, or tied to one that is."""
        if self.unreadable or (self._targets is None and not self._parameters):
            return True
        base = self._base
        return self.names(module) or (self.ties and module == base.head and self.names(base.input_embedding))

    def _in_layers(self, path: str) -> bool:
        if not self._layers:
            return True
        found = next((match for pattern in self._patterns if (match := pattern.match(path))), None)
        return found is not None and found.group("idx") in self._layers

    def _path(self, module: str) -> str:
        return module.removeprefix(self._body)

    def _names(self, config: Config, field: str) -> Any:
        """A set of names, a compiled expression, or None."""
        given = config.get(field)
        if not isinstance(given, str):
            return None if given is None else frozenset(name_list(config, field))
        if field == "target_modules" and given.lower() == ALL_LINEAR:
            return frozenset({ALL_LINEAR})
        return self._compile(given, field)

    def _layer_patterns(self, config: Config) -> list[Any]:
        given = config.get("layers_pattern")
        if not given:
            return [self._compile(r".*?\.[^.]*\.(?P<idx>\d+)\.", "layers_pattern")]
        names = [given] if isinstance(given, str) else name_list(config, "layers_pattern")
        return [self._compile(rf"(?:^|.*?\.){name}\.(?P<idx>\d+)\.", "layers_pattern") for name in names]

    def _compile(self, expression: str, field: str) -> Any:
        if len(expression) > MAX_EXPRESSION:
            raise AdapterInvalid(f"{field} has {len(expression)} characters; at most {MAX_EXPRESSION} are read")
        options = re2.Options()
        options.log_errors = False
        options.max_mem = 1 << 20
        try:
            return re2.compile(expression, options)
        except re2.error:  # look-around, or no regular expression
            self.unreadable = field
            return None


def select(checkpoint: Checkpoint, base: BaseShape, *, short: bool) -> tuple[Checkpoint, list[str]]:
    """The checkpoint without tensors of modules that its configuration does not adapt, and warnings for the report.

    Args:
        short: whether the adapter's own paths start below the LM head's model.
    """
    targets = Targets(checkpoint.config, base, short=short)
    kept, dropped = {}, []
    found: set[str] = set()
    own: set[str] = set()  # modules whose own weight was saved
    for key, tensor in checkpoint.tensors.items():
        module, tail = split_key(key, base)
        plain = tail in base.modules.get(module, {})
        if plain and targets.names(module) and not targets.unreadable:  # PEFT has it below base_layer
            dropped.append(key.removeprefix(PREFIX))
            continue
        if not module or plain or _SAVED.fullmatch(tail):
            kept[key] = tensor  # of the base's own parameters, or shared by all modules
            found |= {module} if tail == "trainable_tokens_delta" else set()
            continue
        expert = _UNSTACKED_EXPERT.fullmatch(tail)
        if targets.adapts(f"{module}.{expert[1]}" if expert else module) or module not in base.modules:
            kept[key] = tensor
            if tail.removeprefix("base_layer.") in base.modules.get(module, {}):
                own.add(module)
            else:
                found.add(_nested(module, tail.count("base_layer.")))
        else:
            dropped.append(key.removeprefix(PREFIX))
    warnings = []
    if targets.unreadable:
        warnings.append(
            f"{targets.unreadable} in adapter_config.json is an expression that is not evaluated here: every saved "
            "tensor is used"
        )
    if dropped:
        warnings.append(
            f"{len(dropped)} tensors are of modules that adapter_config.json does not target, and are not used: "
            f"{shorten(dropped, 4)}"
        )
    missing = [] if targets.unreadable else _missing(checkpoint.config, targets, found, base)
    if missing:
        _refuse_changed(checkpoint.config, missing, own, base)
        warnings.append(
            f"{len(missing)} of {len(missing) + len(found)} modules that adapter_config.json targets have no tensors, "
            f"and are the base's: {shorten(missing, 4)}"
        )
    return replace(checkpoint, tensors=kept), warnings


def ends_with(path: str, names: Set[str]) -> bool:
    """Whether one of the names is the path, or its last parts."""
    parts = path.split(".")
    return any(".".join(parts[start:]) in names for start in range(len(parts)))


def _nested(module: str, depth: int) -> str:
    """The path of an adapter on a module that has others around it, one for each parameter that is adapted."""
    return module + depth * ".base_layer"


def _missing(config: Config, targets: Targets, found: Set[str], base: BaseShape) -> list[str]:
    if config.get("target_modules") is None and not config.get("target_parameters"):
        return []
    expected = (
        _nested(module, depth)
        for module in base.modules
        if targets.names(module)
        for depth in range(max(1, targets.parameters(module)))
    )
    return [module for module in expected if module not in found]


def _refuse_changed(config: Config, missing: list[str], own: set[str], base: BaseShape) -> None:
    """Raise AdapterInvalid where PEFT would leave modules without tensors changed, or at random numbers.

    Args:
        own: modules whose own weight was saved.
    """
    shared = {base.head, base.input_embedding} if base.tied else set()
    changes_weight = str(config.get("init_lora_weights")).lower() in ("pissa", "olora")
    fields = [field for field in ("init_lora_weights", "init_weights") if config.get(field) is False]
    fields += ["kasa_config"] if config.get("kasa_config") else []
    fields += ["use_dora"] if config.get("use_dora") and own.intersection(missing) else []
    fields += ["init_lora_weights"] if changes_weight and (own | shared).intersection(missing) else []
    fields += ["ensure_weight_tying"] if config.get("ensure_weight_tying") and shared.intersection(missing) else []
    method = config.get("peft_type")
    if method == "VBLORA" or (method in ("VERA", "RANDLORA") and not config.get("save_projection", True)):
        fields.append(f"peft_type {method}")
    if fields:
        raise AdapterInvalid(
            f"{len(missing)} modules that adapter_config.json targets have no tensors ({shorten(missing, 4)}), and "
            f"{fields[0]} leaves open what they would be; save the adapter again, whole"
        )


def _matches(path: str, names: Any) -> bool:
    return ends_with(path, names) if isinstance(names, frozenset) else bool(names.fullmatch(path))


def _parts(path: str) -> Iterator[str]:
    """Every run of parts of a path."""
    parts = path.split(".")
    for start in range(len(parts)):
        for end in range(start, len(parts)):
            yield ".".join(parts[start : end + 1])


def _layers(config: Config) -> frozenset[str]:
    """The numbers in `layers_to_transform`, as in a path; empty: all layers."""
    given = config.get("layers_to_transform")
    numbers = [] if given is None else given if isinstance(given, list) else [given]
    if not all(isinstance(number, int) and not isinstance(number, bool) for number in numbers):
        raise AdapterInvalid("layers_to_transform in adapter_config.json is not a list of numbers")
    return frozenset(map(str, numbers))
