"""Which method a run asks for, with its settings; and those of IA³.

    y = l ⊙ (W x + b), in feed-forward modules W (l ⊙ x) + b; l begins as ones        Liu et al. 2022

Names and defaults are PEFT's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import re2

from lora_serve.adapters.adapter import BaseShape
from lora_serve.engine.training.target_sites import target_sites
from lora_serve.engine.training.trainable_layout import TrainableLayout
from lora_serve.engine.training.training_settings import LoraSettings
from lora_serve.engine.training.virtual_token_settings import (
    PrefixTuningSettings,
    PromptTuningSettings,
    PTuningSettings,
)
from lora_serve.errors import BadRequest
from lora_serve.training_messages import RunSettings

MOST_NAMES = 4096  # in a list, or patterns: the engine's loop compares each with the base's modules
LONGEST_NAME = 4000  # characters; as of a regular expression that is read


@dataclass(frozen=True)
class Ia3Settings:
    """IA³, as in PEFT's `IA3Config`.

    Attributes:
        target_modules: names of linear modules, as PEFT matches them, or "all-linear".
        feedforward_modules: the ends of the names of those whose input is multiplied, or a regular expression.
    """

    SIZED_BY: ClassVar = "target_modules"  # the field that says most about its memory

    target_modules: str | Sequence[str] = "all-linear"
    feedforward_modules: str | Sequence[str] = ()

    def layout(self, base: BaseShape) -> TrainableLayout:
        """The adapter's parts. Raises BadRequest naming the field that does not fit the base."""
        fits, sites = self._feedforward(), target_sites(self.peft_config(), base)
        return TrainableLayout.of_gains({name: (site, fits(name)) for name, site in sites.items()})

    def peft_config(self, targets: Sequence[str] | None = None, feedforward: Sequence[str] = ()) -> dict[str, Any]:
        """The adapter's `adapter_config.json`.

        Args:
            targets, feedforward: modules by path; None: `target_modules`.
        """
        given = self.target_modules if targets is None else targets
        return {
            "peft_type": "IA3",
            "task_type": "CAUSAL_LM",
            "inference_mode": True,
            "target_modules": given if isinstance(given, str) else sorted(given),
            "feedforward_modules": sorted(feedforward),
        }

    def _feedforward(self) -> Callable[[str], bool]:
        """Whether a module, by its path, has its input multiplied."""
        given = self.feedforward_modules
        if not isinstance(given, str):
            return lambda name: any(name.endswith(end) for end in given)
        options = re2.Options()
        options.log_errors = False
        options.max_mem = 1 << 20
        try:
            expression = re2.compile(given, options)
        except re2.error:
            raise BadRequest(
                "feedforward_modules is not a plain regular expression", param="feedforward_modules"
            ) from None
        return lambda name: expression.fullmatch(name) is not None


AdapterSettings = LoraSettings | Ia3Settings | PromptTuningSettings | PTuningSettings | PrefixTuningSettings
METHODS: dict[str, type[AdapterSettings]] = {
    "LORA": LoraSettings,
    "IA3": Ia3Settings,
    "PROMPT_TUNING": PromptTuningSettings,
    "P_TUNING": PTuningSettings,
    "PREFIX_TUNING": PrefixTuningSettings,
}


def adapter_settings(settings: RunSettings) -> AdapterSettings:
    """What a run asks for. Raises BadRequest for a method that is not trained, or a field that is another method's."""
    _check_sizes(settings)
    method = METHODS.get(settings.peft_type)
    if method is None:
        raise BadRequest(f"{settings.peft_type} is not trained here, only {', '.join(METHODS)}", param="peft_type")
    own, default = set(method.__dataclass_fields__), RunSettings()
    given = {name: getattr(settings, name) for name in settings.__struct_fields__ if name != "peft_type"}
    for name, value in given.items():
        if name not in own and name != "seed" and value != getattr(default, name):
            raise BadRequest(f"{name} does not belong to {settings.peft_type}", param=name)
    return method(**{name: value for name, value in given.items() if name in own})


def _check_sizes(settings: RunSettings) -> None:
    """Raise BadRequest for a field that would keep the engine busy before it is refused, or fill the message."""
    for name in settings.__struct_fields__:
        value = getattr(settings, name)
        parts = [value] if isinstance(value, str) else [*value] if isinstance(value, list | dict) else []
        if len(parts) > MOST_NAMES:
            raise BadRequest(f"{name} has {len(parts)} entries; at most {MOST_NAMES} are read", param=name)
        longest = max(map(len, parts), default=0)
        if longest > LONGEST_NAME:
            raise BadRequest(f"{name} has {longest} characters; at most {LONGEST_NAME} are read", param=name)
