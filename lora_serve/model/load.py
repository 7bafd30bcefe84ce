"""Load a Hugging Face model from a folder or hub id, and collect what the server needs to know about it.

A model that flat batches with paged attention would serve wrongly is refused, by name and with the reason.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from lora_serve.adapters.sharding import Sharding
from lora_serve.adapters.vocabulary import vocabulary_digest
from lora_serve.errors import ModelUnsupported, ServeError
from lora_serve.kernels.packed_weight import Scheme
from lora_serve.model.baichuan import divide_head
from lora_serve.model.base_config import (
    context_length,
    creation_time,
    generation_config,
    layer_windows,
    refuse_unsupported,
    remove_step_dependent_branches,
)
from lora_serve.model.base_pooling import read_pooling
from lora_serve.model.checkpoint_files import weight_files
from lora_serve.model.checkpoint_weights import CheckpointWeights
from lora_serve.model.experts import is_stacked, stacked_parameters
from lora_serve.model.external_linear import parameter_shapes
from lora_serve.model.external_quantization import (
    Quantization,
    find_quantization,
    is_externally_quantized,
    prepare_modules,
)
from lora_serve.model.host_weights import move_unquantized, reading_host_weights
from lora_serve.model.identity_experts import mark_experts
from lora_serve.model.importance import importance_digest, measure_importance, random_tokens, text_tokens
from lora_serve.model.loaded_model import LoadedModel
from lora_serve.model.observe import ObservedModel, observe
from lora_serve.model.paged_attention import PAGED_ATTENTION
from lora_serve.model.parallel_plan import cut_model, plan_sharding
from lora_serve.model.self_check import Oracle, compute_oracle, eager_experts, refusing
from lora_serve.model.shape import build_base_shape
from lora_serve.model.shared_oracle import share_importance, share_oracle
from lora_serve.model.tensor_parallel import TensorParallel


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
    refuse_unsupported(name, config)
    quantized = find_quantization(name, config, device)
    if parallel is not None and quantized is not None:
        raise ModelUnsupported(
            f"{name!r} is quantised ({quantized.label}), and cannot be shared by devices: name the original checkpoint "
            "and give --quantize, or leave --tensor-parallel away"
        )
    # The whole model of several devices fits none of them: it stays mapped from its files until it is cut.
    whole = device if parallel is None else torch.device("cpu")
    if quantized is not None:
        if scheme is not None:
            raise ModelUnsupported(
                f"{name!r} is quantised already ({quantized.label}): "
                "leave --quantize away, or name the original checkpoint"
            )
        notes.append(", ".join(filter(None, [f"the base's weights are {quantized.label}", quantized.remark])))
    max_model_len = context_length(config, notes)
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
    if quantized is not None:
        prepare_modules(name, model, None if dtype == "auto" else getattr(torch, dtype))
    elif scheme is None:
        model = model.to(whole)
    model = model.eval().requires_grad_(False)
    mark_experts(model)
    divided = divide_head(model)
    if scheme is not None and parallel is None:
        move_unquantized(model, device, quantizes_experts=quantizes_experts)
    progress("observing the forward pass", 0.8)
    with reading_host_weights(model, whole):
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
            importance = _importance(model, observed, ids[:max_model_len], whole, parallel)
    remove_step_dependent_branches(model)
    generation = generation_config(name, revision, model)
    eos = generation.get("eos_token_id", getattr(config, "eos_token_id", None))
    pooling, not_embedding = read_pooling(name, revision, notes)
    layers, rounding = observed.layers, importance_digest(importance)
    sharding: Sharding | None = None
    parts: dict[str, int] = {}
    if parallel is not None:
        sharding = plan_sharding(model, observed.groups, len(layers), parallel)
    if sharding is not None and scheme is not None:
        parts = dict.fromkeys(sharding.row_parallel, sharding.size)
        rounding = f"{rounding} {sharding.size} parts".strip()
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
        rounding=rounding,
        divided=divided,
        parts=parts,
    )
    headless = f"{shape.head}.weight" in loading_info["missing_keys"]
    if headless:
        notes.append("the checkpoint has no LM head: it makes embeddings, no text")
    vocab_size, parameters = parameter_shapes(model.get_output_embeddings())["weight"][0], _parameters(model)
    if sharding is not None:
        progress("cutting the base for its devices", 0.84)
        sharding, layers = cut_model(model, observed, sharding)
        if scheme is None:
            model = model.to(device)
        else:
            move_unquantized(model, device, quantizes_experts=quantizes_experts)
    return LoadedModel(
        model=model,
        shape=shape,
        layers=layers,
        windows=layer_windows(config, len(observed.layers)),
        max_model_len=max_model_len,
        vocab_size=vocab_size,
        eos_token_ids=() if eos is None else (eos,) if isinstance(eos, int) else tuple(eos),
        dtype=model.dtype,
        device=device,
        keeps_logits="logits_to_keep" in inspect.signature(type(model).forward).parameters,
        parameters=parameters,
        created=creation_time(name),
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


def _importance(
    model: Any, observed: ObservedModel, ids: list[int], device: torch.device, parallel: TensorParallel | None
) -> dict[str, Tensor]:
    """Importance of inputs, measured by rank 0 alone if several ranks share the base."""
    own: dict[str, Tensor] = {}
    if parallel is None or parallel.rank == 0:
        with reading_host_weights(model, device):
            own = measure_importance(model, observed.groups, ids, device)
    if parallel is None:
        return own
    widths = {
        name: parameter_shapes(model.get_submodule(name))["weight"][1] for names in observed.groups for name in names
    }
    for path, module in model.named_modules():
        if is_stacked(module):
            widths |= {f"{path}.{name}": sizes[0][0] for name, sizes in stacked_parameters(module).items()}
    return share_importance(own, widths, parallel)


@contextmanager
def _eager_attention(model: Any) -> Iterator[None]:
    """The model's own eager attention, before any module is replaced."""
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(PAGED_ATTENTION)


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
