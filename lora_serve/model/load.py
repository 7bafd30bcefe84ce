"""From a folder or hub id to a Hugging Face model in memory, and what the server must know of it.

A model that the flat, paged forward pass would serve wrongly is refused here, by name and with the reason.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.utils.logging import disable_progress_bar

from lora_serve.adapters.adapter import BaseShape
from lora_serve.adapters.vocabulary import vocabulary_digest
from lora_serve.errors import ModelUnsupported, ServeError
from lora_serve.kernels.packed_weight import Scheme
from lora_serve.kv.tensors import LayerShape
from lora_serve.model.external_linear import parameter_shapes
from lora_serve.model.external_quantization import Quantization, is_externally_quantized, quantization, settle
from lora_serve.model.observe import Seen, observe
from lora_serve.model.paged_attention import BLOCKS
from lora_serve.model.self_check import Oracle, compute_oracle, eager_experts, refusing
from lora_serve.model.shape import shape_of

SERVED_LAYER_TYPES = {"full_attention", "sliding_attention"}
# Ropes whose angles depend on the longest position of the whole batch once it passes the original context.
BATCH_DEPENDENT_ROPES = {"dynamic", "longrope"}


@dataclass(frozen=True)
class LoadedModel:
    """A base as it came from disk, not yet adapted.

    Attributes:
        layers: what each attention layer stores per token.
        windows: sliding window of each layer that the modelling code may not pass on.
        max_model_len: the longest context that is served right.
        keeps_logits: the model's forward takes the rows whose logits are wanted.
        created: seconds since the epoch.
        scheme: how the linear maps are to be quantised.
        notes: what an operator should know, for the start-up summary.
        replayable: steps of one shape make the same calls, so they can be recorded (see `Quantization`).
        oracle: what the untouched model computes, for the self-check.
    """

    model: nn.Module
    shape: BaseShape
    layers: list[LayerShape]
    windows: list[int | None]
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    keeps_logits: bool
    parameters: int
    created: int
    generation_defaults: dict[str, Any]
    notes: list[str]
    scheme: Scheme | None
    replayable: bool
    oracle: Oracle


def load(
    name: str,
    *,
    revision: str | None,
    dtype: str,
    device: torch.device,
    progress: Callable[[str, float], None],
    scheme: Scheme | None = None,
    names: tuple[str, ...] = (),
) -> LoadedModel:
    """Load a base model; raises ModelUnsupported if it cannot be served right.

    Args:
        scheme: how its linear maps will be quantised when they are packed; None leaves them as they are.
        names: what else the base is called, beside `name`.
    """
    progress("reading the model's configuration", 0.02)
    try:
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
    except Exception as error:  # some configurations check themselves, and say so in their own ways
        raise ModelUnsupported(f"the base model {name!r} cannot be read: {_first_line(error)}") from error
    with refusing(config.model_type):
        return _loaded(name, config, revision, dtype, device, progress, scheme, names)


def _loaded(
    name: str,
    config: Any,
    revision: str | None,
    dtype: str,
    device: torch.device,
    progress: Callable[[str, float], None],
    scheme: Scheme | None,
    names: tuple[str, ...],
) -> LoadedModel:
    notes: list[str] = []
    _check(name, config)
    quantized = quantization(name, config, device)
    if quantized is not None:
        if scheme is not None:
            raise ModelUnsupported(
                f"{name!r} is quantised already ({quantized.label}): "
                "leave --quantize away, or name the original checkpoint"
            )
        notes.append(", ".join(filter(None, [f"the base's weights are {quantized.label}", quantized.remark])))
    max_model_len = _context(config, notes)
    progress("loading weights", 0.05)
    disable_progress_bar()  # type: ignore[no-untyped-call]  # ours says it
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            name,
            revision=revision,
            dtype="auto" if dtype == "auto" else getattr(torch, dtype),
            attn_implementation=BLOCKS,
            use_safetensors=True,
            trust_remote_code=False,
            # Other libraries make their weights on the device itself; this takes accelerate, a need of theirs only.
            **({} if quantized is None else {"device_map": str(device)}),
        )
    except KeyError as error:  # its table of attention functions has no room for ours
        raise ModelUnsupported(f"{config.model_type} does not let its attention be replaced ({error})") from error
    except (OSError, ValueError, ImportError) as error:
        raise ModelUnsupported(f"the base model {name!r} cannot be loaded: {_first_line(error)}") from error
    except RuntimeError as error:
        if quantized is None or isinstance(error, torch.OutOfMemoryError):
            raise
        raise ModelUnsupported(f"{name!r} ({quantized.label}) cannot be loaded: {_first_line(error)}") from error
    if quantized is None:
        model = model.to(device)
    else:
        settle(name, model, None if dtype == "auto" else getattr(torch, dtype))
    model = model.eval().requires_grad_(False)
    progress("observing the forward pass", 0.8)
    seen = _observed(name, model, device, quantized)
    oracle = _oracle(model, device, quantized)
    _settle(model)
    generation = _generation_config(name, revision, model)
    eos = generation.get("eos_token_id", getattr(config, "eos_token_id", None))
    return LoadedModel(
        model=model,
        shape=shape_of(
            model,
            seen,
            names=(name, str(getattr(config, "_name_or_path", "")), *names),
            vocabulary=vocabulary_digest(Path(name)),
            quantized=scheme or (quantized.label if quantized else ""),
        ),
        layers=seen.layers,
        windows=_windows(config, len(seen.layers)),
        max_model_len=max_model_len,
        vocab_size=parameter_shapes(model.get_output_embeddings())["weight"][0],
        eos_token_ids=() if eos is None else (eos,) if isinstance(eos, int) else tuple(eos),
        dtype=model.dtype,
        device=device,
        keeps_logits="logits_to_keep" in inspect.signature(type(model).forward).parameters,
        parameters=_parameters(model),
        created=_created(name),
        generation_defaults={
            key: generation[key]
            for key in ("temperature", "top_k", "top_p", "repetition_penalty")
            if generation.get("do_sample") and generation.get(key) is not None
        },
        notes=notes,
        scheme=scheme,
        replayable=quantized is None or quantized.replayable,
        oracle=oracle,
    )


def _check(name: str, config: Any) -> None:
    """Refuse what is known to be served wrongly, before any weight is read."""
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


def _observed(name: str, model: Any, device: torch.device, quantized: Quantization | None) -> Seen:
    try:
        return observe(model, device)
    except (ServeError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever another library says of a device that it has nothing for
        if quantized is None:
            raise
        raise ModelUnsupported(
            f"{name!r} is quantised ({quantized.label}), which does not run on {device}: {_first_line(error)}"
        ) from error


def _oracle(model: Any, device: torch.device, quantized: Quantization | None) -> Oracle:
    """What the model computes under eager attention, while nothing of it is replaced."""
    model.set_attn_implementation("eager")
    try:
        with eager_experts(model):
            return compute_oracle(model, device, external=quantized is not None)
    finally:
        model.set_attn_implementation(BLOCKS)


def _context(config: Any, notes: list[str]) -> int:
    """Longest context in which every request is independent of its neighbours."""
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


def _settle(model: Any) -> None:
    """Take out of the forward pass what it would decide anew every time, always in the same way, by waiting for values.

    Contexts stay below where these ropes begin to change; and there is no padding that one could be warned of.
    """
    vars(model.config)["pad_token_id"] = None  # some configurations would not have it set
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        if isinstance(kinds, str) and kinds in BATCH_DEPENDENT_ROPES:
            module.rope_type = "default"
        elif isinstance(kinds, dict):
            module.rope_type = {
                layer: "default" if kind in BATCH_DEPENDENT_ROPES else kind for layer, kind in kinds.items()
            }


def _windows(config: Any, layers: int) -> list[int | None]:
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    if types is None or window is None:
        return [None] * layers
    return [window if kind == "sliding_attention" else None for kind in types]


def _generation_config(name: str, revision: str | None, model: Any) -> dict[str, Any]:
    try:
        found: dict[str, Any] = GenerationConfig.from_pretrained(name, revision=revision or "main").to_dict()
    except OSError:  # many checkpoints have none
        found = model.generation_config.to_dict()
    return found


def _created(name: str) -> int:
    """When the model's configuration was written, so that what clients are told does not change from start to start."""
    config = Path(name) / "config.json"
    return int(config.stat().st_mtime) if config.is_file() else 0


def _parameters(model: nn.Module) -> int:
    """How many numbers the model has, quantised or not; tied ones count once."""
    plain: dict[int, int] = {}
    kept = 0
    for module in model.modules():
        if is_externally_quantized(module):
            kept += sum(map(prod, parameter_shapes(module).values()))
        else:
            plain |= {id(each): each.numel() for each in module.parameters(recurse=False)}
    return kept + sum(plain.values())


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
