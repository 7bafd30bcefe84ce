"""Dispatch by PEFT's `peft_type` to the format that lowers it.

A new method needs one new file beside this one, and its import and `FORMATS` entry here. If the lowered
form can be larger than its file, it asks an `ElementBudget` first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from torch import Tensor

from lora_serve.adapters.adapter import BaseShape, Lowered
from lora_serve.adapters.checkpoint import Checkpoint
from lora_serve.adapters.formats import (
    adalora,
    delora,
    ia3,
    ln_tuning,
    loha,
    lokr,
    lora,
    miss,
    prefix_tuning,
    prompt_tuning,
    randlora,
    trainable_tokens,
    vblora,
    vera,
)
from lora_serve.adapters.formats.keys import WRAPPERS, BaseMismatch, check_count, complete_paths, without_wrappers
from lora_serve.adapters.formats.refusals import refuse_method, refuse_other_tools
from lora_serve.adapters.formats.report import other_base_hint
from lora_serve.adapters.formats.saved import vocabulary_warnings
from lora_serve.adapters.formats.targets import select
from lora_serve.adapters.pooling_config import adapter_pooling
from lora_serve.errors import AdapterInvalid

Lower = Callable[[Checkpoint, BaseShape], Lowered]

FORMATS: Mapping[str, Lower] = {
    "LORA": lora.lower,
    "ADALORA": adalora.lower,
    "VERA": vera.lower,
    "LOHA": loha.lower,
    "LOKR": lokr.lower,
    "VBLORA": vblora.lower,
    "RANDLORA": randlora.lower,
    "DELORA": delora.lower,
    "MISS": miss.lower,
    "IA3": ia3.lower,
    "LN_TUNING": ln_tuning.lower,
    "TRAINABLE_TOKENS": trainable_tokens.lower,
    "PROMPT_TUNING": prompt_tuning.lower,
    "P_TUNING": prompt_tuning.lower_p_tuning,
    "CPT": prompt_tuning.lower_cpt,
    "MULTITASK_PROMPT_TUNING": prompt_tuning.lower_multitask,
    "PREFIX_TUNING": prefix_tuning.lower,
    "CARTRIDGE": prefix_tuning.lower_cartridge,
}

# Methods of virtual tokens save modules of the base without PEFT's wrapper in the path; `virtual_tokens.py` reads them.
UNWRAPPED = {
    "PROMPT_TUNING", "P_TUNING", "CPT", "MULTITASK_PROMPT_TUNING", "PREFIX_TUNING", "CARTRIDGE",
}  # fmt: skip


def lower(checkpoint: Checkpoint, base: BaseShape, formats: Mapping[str, Lower] = FORMATS) -> Lowered:
    """Lower a checkpoint of any supported method. Raises AdapterInvalid naming what is not supported."""
    method = checkpoint.config.get("peft_type")
    if not isinstance(method, str):
        raise AdapterInvalid("adapter_config.json does not say its peft_type")
    if method not in formats:
        raise refuse_method(method, formats)
    check_count(checkpoint.tensors, base)
    embeds, pooling = adapter_pooling(checkpoint)
    warnings: list[str] = []

    def attempt(tensors: Mapping[str, Tensor]) -> Lowered:
        if method in UNWRAPPED:
            chosen = replace(checkpoint, tensors=dict(tensors))
        else:
            completed = complete_paths(tensors, base)
            short = completed.keys() != tensors.keys()
            chosen, warnings[:] = select(replace(checkpoint, tensors=completed), base, short=short)
        try:
            lowered = formats[method](chosen, base)
        except BaseMismatch as error:
            raise AdapterInvalid(error.message + other_base_hint(checkpoint.config, base)) from error
        if not (lowered.deltas or lowered.overrides or lowered.prefix):
            nothing = "the adapter changes nothing: no tensor of it belongs to a module of the base that it adapts"
            raise AdapterInvalid("; ".join([nothing, *warnings]))
        return lowered

    try:
        lowered = attempt(checkpoint.tensors)
    except AdapterInvalid:
        refuse_other_tools(checkpoint.tensors)
        tensors, parts = without_wrappers(checkpoint.tensors)
        if not parts:
            raise
        lowered = attempt(tensors)
        notes = [f"{part}. was left out of its keys: it is from {WRAPPERS[part]}" for part in parts]
        lowered = replace(lowered, report=lowered.report | {"lowered": [*lowered.report.get("lowered", ()), *notes]})
    warnings += vocabulary_warnings(lowered.overrides, base)
    if warnings:
        lowered.report["warnings"] = [*warnings, *lowered.report.get("warnings", ())]
    return replace(lowered, embeds=embeds, pooling=pooling)
