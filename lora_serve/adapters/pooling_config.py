"""Reads from PEFT's and sentence-transformers' files how a base or an adapter makes embeddings.

modules.json            what follows the transformer: Pooling, perhaps Normalize; anything else is refused
1_Pooling/config.json   the pooling mode, as `pooling_mode` or as older flags (`pooling_mode_lasttoken`, …)
adapter_config.json     "task_type": "FEATURE_EXTRACTION"
"""

from __future__ import annotations

from typing import Any

from lora_serve.adapters.checkpoint import Checkpoint
from lora_serve.errors import AdapterInvalid
from lora_serve.names import POOLING
from lora_serve.request import Pooling

MODES = {"mean": "mean", "lasttoken": "last", "cls": "first"}
FLAGS = {  # older spelling → mode
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


def adapter_pooling(checkpoint: Checkpoint) -> tuple[bool, Pooling | None]:
    """Whether an adapter is made for embeddings, and its own pooling; None: the base's. Raises AdapterInvalid.

    It is if it was trained for `FEATURE_EXTRACTION`, or has a pooling of its own.
    """
    trained_for_it = checkpoint.config.get("task_type") == "FEATURE_EXTRACTION"
    if checkpoint.pooling is None and not (trained_for_it and checkpoint.modules is not None):
        return trained_for_it, None
    try:
        return True, parse_pooling(checkpoint.modules, checkpoint.pooling)
    except ValueError as error:
        raise AdapterInvalid(str(error)) from None


def parse_pooling(modules: Any, config: Any) -> Pooling:
    """The pooling that the decoded files describe. Raises ValueError that names what is not served.

    Args:
        modules: of `modules.json`; None if there is none, then embeddings are normalised.
        config: of `1_Pooling/config.json`; None if there is none.
    """
    normalize = True
    if modules is not None:
        kinds = _module_kinds(modules)
        others = [kind for kind in kinds if kind not in ("Transformer", "Pooling", "Normalize")]
        if others:
            raise ValueError(f"embeddings with a {others[0][:60]} module (modules.json) are not served")
        if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
            raise ValueError("modules.json is not a Transformer, then Pooling, then perhaps Normalize")
        normalize = "Normalize" in kinds
    if not isinstance(config, dict):
        raise ValueError(f"{POOLING} is missing or not a JSON object")
    mode = _mode(config)
    if mode not in MODES:
        raise ValueError(f"pooling mode {mode[:60]} ({POOLING}) is not served; {', '.join(MODES)} are")
    if config.get("include_prompt") is False and mode != "lasttoken":
        raise ValueError(f"include_prompt = false ({POOLING}) is not served: a request does not tell prompt from text")
    return Pooling(MODES[mode], normalize)  # type: ignore[arg-type]


def _module_kinds(modules: Any) -> list[str]:
    """Class names of the modules, in order."""
    entries: list[Any] = modules if isinstance(modules, list) else [None]
    if not all(isinstance(entry, dict) and isinstance(entry.get("type"), str) for entry in entries):
        raise ValueError("modules.json is not a list of modules")
    if [entry.get("path") for entry in entries[1:2]] not in ([], [POOLING.partition("/")[0]]):
        raise ValueError(f"modules.json keeps its second module elsewhere than in {POOLING.partition('/')[0]}")
    return [entry["type"].rpartition(".")[2] for entry in entries]


def _mode(config: dict[str, Any]) -> str:
    """The one pooling mode; several are joined with '+'."""
    given = config.get("pooling_mode")
    if given is None:
        given = [mode for flag, mode in FLAGS.items() if config.get(flag)] or "mean"
    return "+".join(map(str, given)) if isinstance(given, list) else str(given)
