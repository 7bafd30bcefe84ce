"""Build an engine from its configuration: load the base, check it, size KV, open the adapter store."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from llguidance import LLTokenizer
from llguidance.hf import from_tokenizer
from transformers import PreTrainedTokenizerFast

from lora_serve.adapters.compiler import Compiler, CompilerLimits, start_compilers
from lora_serve.adapters.device_slots import DeviceSlots
from lora_serve.adapters.lowering_job import LoweringContext
from lora_serve.adapters.opening import open_store, publish_folders
from lora_serve.adapters.operations import AdapterOperations
from lora_serve.adapters.publisher import Publisher
from lora_serve.adapters.registry import Registry
from lora_serve.adapters.residency import Budget, Residency
from lora_serve.adapters.store.location import default_store_folder, describe_other_stores
from lora_serve.adapters.store.store import Store
from lora_serve.adapters.workers import Workers
from lora_serve.config import ServeConfig
from lora_serve.engine.base_tokenizer import load_base_tokenizer
from lora_serve.engine.cores import physical_cores
from lora_serve.engine.fairness import Fairness
from lora_serve.engine.grammar_compiler import GrammarCompiler
from lora_serve.engine.runner import Runner, SampledTokens
from lora_serve.engine.scheduler import Scheduler
from lora_serve.engine.sizing import adapter_memory, kv_memory, measure_memory, step_limits
from lora_serve.engine.slot_rotation import SlotRotation
from lora_serve.errors import BadRequest, ModelUnsupported
from lora_serve.kernels.select import select
from lora_serve.kv.pool import BlockPool
from lora_serve.kv.tensors import KVTensors, bytes_per_token
from lora_serve.messages import EngineInfo
from lora_serve.model.base import ResidentBase
from lora_serve.model.fingerprint import base_fingerprint
from lora_serve.model.load import LoadedModel, load
from lora_serve.model.self_check import blocks_needed, refusing

log = logging.getLogger(__name__)

MIN_KV_BLOCKS = 2  # for the check of replayed steps
QUANTUM = 16  # steps for which an adapter keeps its slot: long enough to outweigh copying it to the device


@dataclass(frozen=True)
class EngineParts:
    info: EngineInfo
    scheduler: Scheduler
    runner: Runner
    registry: Registry
    operations: AdapterOperations
    grammars: GrammarCompiler


def build_parts(
    config: ServeConfig, wake: Callable[[], None], progress: Callable[[str, float], None], overlap: bool | None = None
) -> EngineParts:
    """Load the base, size its KV cache, open the store, publish the adapters given at start.

    Args:
        overlap: launch a step before the outputs of the previous one are read; None: on any device but a CPU.
    Raises ModelUnsupported if the base cannot be served.
    """
    device = device_of(config.device)
    try:
        return _build_parts(config, device, wake, progress, overlap)
    except torch.OutOfMemoryError as error:
        raise ModelUnsupported(
            f"the base does not fit {device}: {str(error).partition('. ')[0]}. Use a smaller or quantised base, or "
            "lower --max-num-batched-tokens"
        ) from error


def _build_parts(
    config: ServeConfig,
    device: torch.device,
    wake: Callable[[], None],
    progress: Callable[[str, float], None],
    overlap: bool | None,
) -> EngineParts:
    torch.set_num_threads(config.threads or physical_cores())
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if config.adapters is not None:
        start_compilers()  # they import while the base is loaded
    progress("building kernels", 0.0)
    kernels = select(device, config.native_kernels)
    loaded = load(
        config.model,
        revision=config.revision,
        dtype=config.dtype,
        device=device,
        progress=progress,
        scheme=config.quantize,
        quantizes_experts=kernels.has_grouped_linear,
        names=(config.served_name(),),
    )
    limits = step_limits(config, device)
    capacity = adapter_memory(config, device)
    device_slots = DeviceSlots(loaded.shape, config.adapter_slots, loaded.dtype, device)
    tokens = SampledTokens(limits.seqs, device) if overlap or (overlap is None and device.type != "cpu") else None
    kv = KVTensors(loaded.layers, blocks_needed(config.kv_block_size), config.kv_block_size, loaded.dtype, device)
    with refusing(loaded.shape.model_type):
        base = ResidentBase(loaded, device_slots, kernels, kv, None if tokens is None else tokens.previous)
    progress("checking the base against the model as it was loaded", 0.85)
    base.self_check()
    progress("allocating KV", 0.88)
    longest = _requested_context(config, loaded)
    gpu = measure_memory(base, config, device, limits, longest, capacity or 0) if device.type == "cuda" else None
    memory = kv_memory(config, gpu, loaded.layers, loaded.dtype)
    max_model_len = _max_model_len(config, loaded, memory, longest)
    blocks = _kv_blocks(config, loaded, memory, max_model_len, limits.seqs)
    kv.resize(blocks)
    progress("preparing steps", 0.9)
    base.prepare(limits.seqs, limits.tokens, -(-max_model_len // config.kv_block_size))
    progress("opening the adapter store", 0.92)
    fingerprint = base_fingerprint(config.model, config.revision)
    root = config.store or default_store_folder(config.model, fingerprint)
    store = Store(root, fingerprint, config.served_name())
    notes = [*loaded.notes, *base.notes, *store.notes]
    if config.store is None:
        notes += describe_other_stores(config.model, fingerprint, root)
    registry, operations, compiler = _open_adapters(
        config, store, loaded, fingerprint, device_slots, capacity, wake, progress, notes
    )
    fairness = Fairness()
    scheduler = Scheduler(
        BlockPool(blocks, config.kv_block_size),
        SlotRotation(fairness, config.adapter_slots, QUANTUM, capacity, registry.bytes),
        fairness,
        max_seqs=limits.seqs,
        max_tokens=limits.tokens,
        prefix_cache=config.prefix_cache,
    )
    compiler.is_busy = lambda: bool(scheduler.running)
    listed = operations.describe_all()
    info = EngineInfo(
        model=config.served_name(),
        root=config.model,
        device=str(device),
        dtype=str(loaded.dtype).removeprefix("torch."),
        kernels=kernels.name,
        max_model_len=max_model_len,
        vocab_size=loaded.vocab_size,
        eos_token_ids=loaded.eos_token_ids,
        kv_tokens=blocks * config.kv_block_size,
        adapter_slots=config.adapter_slots,
        adapters=len(listed),
        broken_adapters=sum(each.broken is not None for each in listed),
        parameters=loaded.parameters,
        created=loaded.created,
        generation_defaults=loaded.generation_defaults,
        notes=notes,
        hidden_size=loaded.shape.modules[loaded.shape.head]["weight"][1],
        pooling=loaded.pooling,
        not_embedding=loaded.not_embedding,
        headless=loaded.headless,
        store=str(root),
    )
    grammars = GrammarCompiler(lambda: _grammar_tokenizer(config, loaded), wake)
    runner = Runner(base, config.kv_block_size, device, tokens)
    return EngineParts(info, scheduler, runner, registry, operations, grammars)


def _open_adapters(
    config: ServeConfig,
    store: Store,
    loaded: LoadedModel,
    fingerprint: str,
    device_slots: DeviceSlots,
    capacity: int | None,
    wake: Callable[[], None],
    progress: Callable[[str, float], None],
    notes: list[str],
) -> tuple[Registry, AdapterOperations, Compiler]:
    """The adapters of the store and of `config.adapters`; what the operator should know of them is added to `notes`."""
    host = int(config.adapter_cache_memory)
    elements = host // loaded.dtype.itemsize
    context = LoweringContext(
        loaded.shape, fingerprint, loaded.dtype, int(config.max_adapter_size), elements, loaded.loaded_whole
    )
    limits = CompilerLimits(int(config.compiler_memory), config.compiler_cpu_time)
    cores = physical_cores()
    workers = Workers(wake, compilers=max(2, cores // 2))
    compiler = Compiler(context, limits)
    publisher = Publisher(store, compiler, workers)
    residency = Residency(Budget(config.adapter_slots, host, capacity), config.keep_versions)
    registry = Registry(residency, device_slots, publisher, workers)
    operations = AdapterOperations(registry, residency, publisher, config.served_name())

    def report(done: int, of: int) -> None:
        progress(f"lowering adapters ({done} of {of})", 0.92 + 0.08 * done / of)

    notes += open_store(registry, residency, publisher, config.served_name(), report)
    if config.adapters is not None:
        notes += publish_folders(registry, operations, residency, config.adapters, report)
    return registry, operations, compiler


def device_of(name: str) -> torch.device:
    """The device of that name; "auto" and "cuda" mean the first GPU, "auto" the CPU if there is none.

    Raises ModelUnsupported if there is no such device.
    """
    try:
        device = torch.device(name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    except RuntimeError as error:
        raise ModelUnsupported(f"--device {name}: auto, cpu, cuda and cuda:N are known") from error
    if device.type != "cuda":
        return device
    number = device.index or 0
    if not torch.cuda.is_available() or number >= torch.cuda.device_count():
        raise ModelUnsupported(f"--device {name}: torch {torch.__version__} sees {torch.cuda.device_count()} GPUs here")
    return torch.device("cuda", number)


def _grammar_tokenizer(config: ServeConfig, loaded: LoadedModel) -> LLTokenizer:
    """The base's tokenizer for grammars. Raises BadRequest if it has none of the kind that is needed."""
    try:
        tokenizer = load_base_tokenizer(config.model, config.revision)
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise ValueError(f"{type(tokenizer).__name__} is not a fast tokenizer")
        return from_tokenizer(tokenizer, n_vocab=loaded.vocab_size, eos_token=list(loaded.eos_token_ids) or None)
    except (OSError, ValueError, KeyError) as error:
        log.warning("structured output is not available: %s", error)
        raise BadRequest("structured output is not available with this model's tokenizer") from error


def _requested_context(config: ServeConfig, loaded: LoadedModel) -> int:
    """The configured context length, or the model's. Raises ModelUnsupported if it is more than the model's."""
    wanted = config.max_model_len or loaded.max_model_len
    if wanted > loaded.max_model_len:
        raise ModelUnsupported(f"--max-model-len {wanted} is more than the base serves right ({loaded.max_model_len})")
    return wanted


def _max_model_len(config: ServeConfig, loaded: LoadedModel, memory: int, wanted: int) -> int:
    """Context length that `memory` bytes of KV hold, at most `wanted`; a longer one is refused if it was configured."""
    fits = memory // bytes_per_token(loaded.layers, loaded.dtype)
    fits -= fits % config.kv_block_size
    if fits < 2 * config.kv_block_size:
        raise ModelUnsupported(
            f"--kv-cache-memory {memory} holds {fits} tokens; "
            f"a token takes {bytes_per_token(loaded.layers, loaded.dtype)} bytes"
        )
    if config.max_model_len is not None and wanted > fits:
        raise ModelUnsupported(f"--max-model-len {wanted} needs more KV than --kv-cache-memory holds ({fits} tokens)")
    if wanted > fits:
        loaded.notes.append(f"context is {fits} instead of {wanted} tokens: that is what --kv-cache-memory holds")
    return min(wanted, fits)


def _kv_blocks(config: ServeConfig, loaded: LoadedModel, memory: int, max_model_len: int, seqs: int) -> int:
    """KV blocks that fit `memory`, but no more than `seqs` sequences at full length could use."""
    size = config.kv_block_size
    fit = memory // (bytes_per_token(loaded.layers, loaded.dtype) * size)
    return max(MIN_KV_BLOCKS, min(fit, seqs * -(-max_model_len // size)))
