"""What a base's configuration says about serving it: what is refused, how long its context is, its layers' windows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from lora_serve.errors import ModelUnsupported

SERVED_LAYER_TYPES = {"full_attention", "sliding_attention"}
# RoPE types whose angles depend on the longest position in the batch once that exceeds the original context.
BATCH_DEPENDENT_ROPES = {"dynamic", "longrope"}


def refuse_unsupported(name: str, config: Any) -> None:
    """Raise ModelUnsupported for what is known to be served wrongly, before any weight is read."""
    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise ModelUnsupported(f"{name!r} ({kind}) is an encoder-decoder; only decoders are served")
    types = set(getattr(config, "layer_types", None) or ())
    if "chunked_attention" in types or getattr(config, "attention_chunk_size", None):
        raise ModelUnsupported(f"{name!r} ({kind}) attends in chunks, which paged attention does not do")
    if alien := types - SERVED_LAYER_TYPES:
        raise ModelUnsupported(
            f"{name!r} ({kind}) has layers of type {', '.join(sorted(alien))}, "
            "whose state would leak between requests in a flat batch"
        )


def context_length(config: Any, notes: list[str]) -> int:
    """Longest context in which every request is independent of others in the batch."""
    longest = getattr(config, "max_position_embeddings", None)
    if not isinstance(longest, int):
        raise ModelUnsupported(f"{config.model_type} does not say how long its context is (max_position_embeddings)")
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    for entry in [rope, *(value for value in rope.values() if isinstance(value, dict))]:
        kind = entry.get("rope_type", entry.get("type"))
        if kind in BATCH_DEPENDENT_ROPES:
            original = int(
                entry.get("original_max_position_embeddings")
                or getattr(config, "original_max_position_embeddings", None)
                or longest
            )
            if original < longest:
                notes.append(
                    f"context is {original} instead of {longest} tokens: "
                    f"beyond it the {kind} rope of one request would change others"
                )
                longest = original
    return longest


def remove_step_dependent_branches(model: Any) -> None:
    """Disable checks in the forward pass that read values from the device and always have the same outcome.

    Contexts stay below the length at which these RoPE types change, and there are no padding tokens to warn of.
    """
    vars(model.config)["pad_token_id"] = None  # some configurations do not allow assigning it
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        if isinstance(kinds, str) and kinds in BATCH_DEPENDENT_ROPES:
            module.rope_type = "default"
        elif isinstance(kinds, dict):
            module.rope_type = {
                layer: "default" if kind in BATCH_DEPENDENT_ROPES else kind for layer, kind in kinds.items()
            }


def layer_windows(config: Any, layers: int) -> list[int | None]:
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    if types is None or window is None:
        return [None] * layers
    return [window if kind == "sliding_attention" else None for kind in types]


def generation_config(name: str, revision: str | None, model: Any) -> dict[str, Any]:
    try:
        found: dict[str, Any] = GenerationConfig.from_pretrained(name, revision=revision or "main").to_dict()
    except OSError:  # many checkpoints have none
        found = model.generation_config.to_dict()
    return found


def creation_time(name: str) -> int:
    """Modification time of the model's configuration, which does not change from start to start; 0 if unknown."""
    config = Path(name) / "config.json"
    return int(config.stat().st_mtime) if config.is_file() else 0
