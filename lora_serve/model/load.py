"""Load a Hugging Face model from a folder or hub id, and collect what the server needs to know about it.

A model that flat batches with paged attention would serve wrongly is refused, by name and with the reason.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.utils.logging import disable_progress_bar

from lora_serve.adapters.adapter import BaseShape
from lora_serve.adapters.sharding import Sharding
from lora_serve.adapters.vocabulary import vocabulary_digest
from lora_serve.errors import ModelUnsupported, ServeError
from lora_serve.kernels.packed_weight import Scheme
from lora_serve.kv.tensors import LayerShape
from lora_serve.model.baichuan import divide_head
from lora_serve.model.base_pooling import read_pooling
from lora_serve.model.checkpoint_files import weight_files
from lora_serve.model.checkpoint_weights import CheckpointWeights
from lora_serve.model.external_linear import parameter_shapes
from lora_serve.model.external_quantization import (
    Quantization,
    find_quantization,
    is_externally_quantized,
    prepare_modules,
)
from lora_serve.model.identity_experts import mark_experts
from lora_serve.model.importance import importance_digest, measure_importance, random_tokens, text_tokens
from lora_serve.model.observe import ObservedModel, observe
from lora_serve.model.paged_attention import PAGED_ATTENTION
from lora_serve.model.parallel_plan import cut_model
from lora_serve.model.self_check import Oracle, compute_oracle, eager_experts, refusing
from lora_serve.model.shape import build_base_shape
from lora_serve.model.shared_oracle import share_oracle
from lora_serve.model.tensor_parallel import TensorParallel
from lora_serve.request import Pooling

SERVED_LAYER_TYPES = {"full_attention", "sliding_attention"}
# RoPE types whose angles depend on the longest position in the batch once that exceeds the original context.
BATCH_DEPENDENT_ROPES = {"dynamic", "longrope"}


@dataclass(frozen=True)
class LoadedModel:
    """A base model as loaded, before adapters are installed.

    Attributes:
        shape: of the whole base.
        layers: KV per token of each attention layer, as far as it is on this device.
        windows: sliding window of each layer, which the modelling code may not pass on; None: full attention.
        max_model_len: the longest context that is served correctly.
        keeps_logits: whether the model's forward takes `logits_to_keep`.
        created: seconds since the epoch.
        scheme: how to quantise the linear modules when they are packed.
        notes: remarks for the operator, in the start-up summary.
        replayable: whether steps of one shape make the same calls, so that they can be replayed (see `Quantization`).
        oracle: the untouched model's logits, for the self-check.
        importance: see `measure_importance`; empty where no weight will be int4.
        headless: whether the checkpoint has no LM head, so that it can only embed.
        pooling: how the base alone makes embeddings; None if it does not, then `not_embedding` says why.
        loaded_whole: bytes of the checkpoint if single weights of it cannot be read (`CheckpointWeights`); else 0.
        parallel, sharding: the ranks that share the base, and this one's part; None: it is whole here.
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
    headless: bool = False
    pooling: Pooling | None = None
    not_embedding: str = ""
    loaded_whole: int = 0
    importance: Mapping[str, Tensor] = field(default_factory=dict)
    parallel: TensorParallel | None = None
    sharding: Sharding | None = None


def load(
    name: str,
    *,
    revision: str | None,
    dtype: str,
    device: torch.device,
    progress: Callable[[str, float], None],
    scheme: Scheme | None = None,
    quantizes_experts: bool = False,
    names: tuple[str, ...] = (),
    parallel: TensorParallel | None = None,
) -> LoadedModel:
    """Load a base model; raises ModelUnsupported if it cannot be served correctly.

    Args:
        scheme: how its linear modules will be quantised when they are packed; None: not at all.
        quantizes_experts: whether its experts will be quantised as well, which the kernels decide.
        names: other names of the base besides `name`.
        parallel: the ranks that share the base, each of which loads its part; None: all of it is loaded here.
    """
    progress("reading the model's configuration", 0.02)
    try:
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
    except Exception as error:  # some configurations validate themselves and raise errors of their own
        raise ModelUnsupported(f"the base model {name!r} cannot be read: {_first_line(error)}") from error
    with refusing(config.model_type):
        return _load(name, config, revision, dtype, device, progress, scheme, quantizes_experts, names, parallel)


def _load(
    name: str,
    config: Any,
    revision: str | None,
    dtype: str,
    device: torch.device,
    progress: Callable[[str, float], None],
    scheme: Scheme | None,
    quantizes_experts: bool,
    names: tuple[str, ...],
    parallel: TensorParallel | None,
) -> LoadedModel:
    notes: list[str] = []
    _refuse_unsupported(name, config)
    quantized = find_quantization(name, config, device)
    if parallel is not None and (quantized is not None or scheme is not None):
        raise ModelUnsupported(f"{name!r} is quantised, and cannot be shared by devices; leave --tensor-parallel away")
    # The whole model of several devices fits none of them: it stays mapped from its files until it is cut.
    whole = device if parallel is None else torch.device("cpu")
    if quantized is not None:
        if scheme is not None:
            raise ModelUnsupported(
                f"{name!r} is quantised already ({quantized.label}): "
                "leave --quantize away, or name the original checkpoint"
            )
        notes.append(", ".join(filter(None, [f"the base's weights are {quantized.label}", quantized.remark])))
    max_model_len = _context(config, notes)
    progress("loading weights", 0.05)
    disable_progress_bar()  # type: ignore[no-untyped-call]  # `progress` replaces it
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name,
            revision=revision,
            dtype="auto" if dtype == "auto" else getattr(torch, dtype),
            attn_implementation=PAGED_ATTENTION,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            # Other libraries create their weights on the device; that needs accelerate, so it is for these only.
            **({} if quantized is None else {"device_map": str(device)}),
        )
    except KeyError as error:  # the model has a fixed table of attention functions
        raise ModelUnsupported(f"{config.model_type} does not let its attention be replaced ({error})") from error
    except (OSError, ValueError, ImportError) as error:
        raise ModelUnsupported(f"the base model {name!r} cannot be loaded: {_first_line(error)}") from error
    except RuntimeError as error:
        if quantized is None or isinstance(error, torch.OutOfMemoryError):
            raise
        raise ModelUnsupported(f"{name!r} ({quantized.label}) cannot be loaded: {_first_line(error)}") from error
    model, loading_info = loaded
    if quantized is None:
        model = model.to(whole)
    else:
        prepare_modules(name, model, None if dtype == "auto" else getattr(torch, dtype))
    model = model.eval().requires_grad_(False)
    mark_experts(model)
    divided = divide_head(model)
    progress("observing the forward pass", 0.8)
    observed = _observe(name, model, whole, quantized)
    importance: dict[str, Tensor] = {}
    with _eager_attention(model):
        with eager_experts(model):
            oracle = _oracle(model, whole, parallel, external=quantized is not None)
        if scheme == "int4":
            progress("measuring which inputs matter", 0.83)
            ids = text_tokens(name, revision, vocabulary := model.get_input_embeddings().weight.shape[0])
            if ids is None:
                notes.append("warning: int4 is fitted to random tokens: there is no tokenizer to read a text with")
                ids = random_tokens(vocabulary)
            importance = measure_importance(model, observed.groups, ids[:max_model_len], device)
    _remove_step_dependent_branches(model)
    generation = _generation_config(name, revision, model)
    eos = generation.get("eos_token_id", getattr(config, "eos_token_id", None))
    pooling, not_embedding = read_pooling(name, revision, notes)
    shape = build_base_shape(
        model,
        observed,
        partial(
            CheckpointWeights,
            name,
            revision,
            model.dtype,
            divided=divided,
            importance=importance,
            external=quantized is not None,
        ),
        scheme=scheme,
        quantizes_experts=quantizes_experts,
        names=(name, str(getattr(config, "_name_or_path", "")), *names),
        vocabulary=vocabulary_digest(Path(name)),
        quantized=scheme or (quantized.label if quantized else ""),
        rounding=importance_digest(importance),
        divided=divided,
    )
    headless = f"{shape.head}.weight" in loading_info["missing_keys"]
    if headless:
        notes.append("the checkpoint has no LM head: it makes embeddings, no text")
    vocab_size, parameters = parameter_shapes(model.get_output_embeddings())["weight"][0], _parameters(model)
    layers, sharding = observed.layers, None
    if parallel is not None:
        progress("cutting the base for its devices", 0.84)
        sharding, layers = cut_model(model, observed, parallel)
        model = model.to(device)
    return LoadedModel(
        model=model,
        shape=shape,
        layers=layers,
        windows=_windows(config, len(observed.layers)),
        max_model_len=max_model_len,
        vocab_size=vocab_size,
        eos_token_ids=() if eos is None else (eos,) if isinstance(eos, int) else tuple(eos),
        dtype=model.dtype,
        device=device,
        keeps_logits="logits_to_keep" in inspect.signature(type(model).forward).parameters,
        parameters=parameters,
        created=_created(name),
        generation_defaults={
            key: generation[key]
            for key in ("temperature", "top_k", "top_p", "repetition_penalty")
            if generation.get("do_sample") and generation.get(key) is not None
        },
        notes=notes,
        scheme=scheme,
        # Recorded steps (CPU) know nothing of collectives; CUDA graphs capture NCCL's.
        replayable=(quantized is None or quantized.replayable) and (parallel is None or device.type == "cuda"),
        oracle=oracle,
        headless=headless,
        pooling=pooling,
        not_embedding=not_embedding,
        importance=importance,
        loaded_whole=0 if quantized is None else sum(file.stat().st_size for file in weight_files(name, revision)),
        parallel=parallel,
        sharding=sharding,
    )


def _refuse_unsupported(name: str, config: Any) -> None:
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


def _observe(name: str, model: Any, device: torch.device, quantized: Quantization | None) -> ObservedModel:
    try:
        return observe(model, device)
    except (ServeError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever another library raises on a device that it does not support
        if quantized is None:
            raise
        raise ModelUnsupported(
            f"{name!r} is quantised ({quantized.label}), which does not run on {device}: {_first_line(error)}"
        ) from error


def _oracle(model: Any, device: torch.device, parallel: TensorParallel | None, *, external: bool) -> Oracle:
    """The oracle, computed by rank 0 alone if several ranks share the base."""
    if parallel is None:
        return compute_oracle(model, device, external=external)
    own = compute_oracle(model, device, external=external) if parallel.rank == 0 else None
    return share_oracle(own, parallel)


@contextmanager
def _eager_attention(model: Any) -> Iterator[None]:
    """The model's own eager attention, before any module is replaced."""
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(PAGED_ATTENTION)


def _context(config: Any, notes: list[str]) -> int:
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


def _remove_step_dependent_branches(model: Any) -> None:
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
    """Modification time of the model's configuration, which does not change from start to start; 0 if unknown."""
    config = Path(name) / "config.json"
    return int(config.stat().st_mtime) if config.is_file() else 0


def _parameters(model: nn.Module) -> int:
    """Number of parameters, quantised or not; tied ones count once."""
    plain: dict[int, int] = {}  # by identity
    external = 0
    for module in model.modules():
        if is_externally_quantized(module):
            external += sum(map(prod, parameter_shapes(module).values()))
        else:
            plain |= {id(each): each.numel() for each in module.parameters(recurse=False)}
    return external + sum(plain.values())


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
