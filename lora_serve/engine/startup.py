"""Build an engine from its configuration: the base in service, the adapter store, and what schedules requests."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from llguidance import LLTokenizer
from llguidance.hf import from_tokenizer
from transformers import PreTrainedTokenizerFast

from lora_serve.adapters.compiler import Compiler, CompilerLimits
from lora_serve.adapters.device_slots import DeviceSlots
from lora_serve.adapters.folder_watch import FolderScanner, FolderWatch
from lora_serve.adapters.lowering_job import LoweringContext
from lora_serve.adapters.opening import open_store, publish_folders
from lora_serve.adapters.operations import AdapterOperations
from lora_serve.adapters.publisher import Publisher
from lora_serve.adapters.registry import Registry
from lora_serve.adapters.residency import Budget, Residency
from lora_serve.adapters.shared.shared_location import open_objects
from lora_serve.adapters.shared.shared_store import SharedStore
from lora_serve.adapters.sharing import SharedOperations
from lora_serve.adapters.store.location import default_store_folder, describe_other_stores
from lora_serve.adapters.store.store import Store
from lora_serve.adapters.workers import Workers
from lora_serve.config import ServeConfig
from lora_serve.engine.base_setup import device_of, set_up_base
from lora_serve.engine.base_tokenizer import load_base_tokenizer
from lora_serve.engine.cores import physical_cores
from lora_serve.engine.fairness import Fairness
from lora_serve.engine.grammar_compiler import GrammarCompiler
from lora_serve.engine.ranks import Ranks
from lora_serve.engine.runner import Runner
from lora_serve.engine.scheduler import Scheduler
from lora_serve.engine.slot_rotation import SlotRotation
from lora_serve.engine.training.training_pacer import TrainingPacer
from lora_serve.engine.training.training_runs import TrainingRuns
from lora_serve.errors import BadRequest, ModelUnsupported
from lora_serve.kv.pool import BlockPool
from lora_serve.messages import EngineInfo
from lora_serve.model.fingerprint import base_fingerprint
from lora_serve.model.loaded_model import LoadedModel

log = logging.getLogger(__name__)

SCAN_EVERY = 2.0  # seconds between scans of a folder that is watched
QUANTUM = 16  # steps for which an adapter keeps its slot: long enough to outweigh copying it to the device


@dataclass(frozen=True)
class EngineParts:
    """What an engine is made of.

    Attributes:
        ranks: the other processes that share its base, if there are any.
        shared: the changes that all replicas make, if these share a store.
        training: None if there is no memory for it.
    """

    info: EngineInfo
    scheduler: Scheduler
    runner: Runner
    registry: Registry
    operations: AdapterOperations
    grammars: GrammarCompiler
    ranks: Ranks | None
    shared: SharedOperations | None
    training: TrainingRuns | None


def build_parts(
    config: ServeConfig, wake: Callable[[], None], progress: Callable[[str, float], None], overlap: bool | None = None
) -> EngineParts:
    """Load the base, size its KV cache, open the store, publish the adapters given at start.

    Args:
        overlap: launch a step before the outputs of the previous one are read; None: on any device but a CPU.
    Raises ModelUnsupported if the base cannot be served.
    """
    device = device_of(config.device, size=config.tensor_parallel)
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
    ranks = Ranks.start(config, device, overlap) if config.tensor_parallel > 1 else None
    try:
        setup = set_up_base(config, device, progress, overlap, None if ranks is None else ranks.parallel, ranks)
    except BaseException:
        if ranks is not None:
            ranks.kill()
        raise
    loaded, base, limits = setup.loaded, setup.base, setup.limits
    if ranks is not None:
        ranks.following = True
    progress("opening the adapter store", 0.92)
    fingerprint = base_fingerprint(config.model, config.revision)
    root = config.store or default_store_folder(config.model, fingerprint)
    store = Store(root, fingerprint, config.served_name())
    notes = [*loaded.notes, *base.notes, *store.notes]
    if config.store is None:
        notes += describe_other_stores(config.model, fingerprint, root)
    workers = Workers(wake, compilers=max(2, physical_cores() // 2))
    registry, operations, shared, compiler = _open_adapters(
        config, store, loaded, fingerprint, setup.device_slots, setup.adapter_bytes, workers, progress, notes
    )
    training = None
    if setup.trainable is not None:
        pacer = TrainingPacer(config.training_share, config.itl_target)
        memory = int(config.training_memory)
        training = TrainingRuns(setup.trainable, memory, registry.memory, pacer, workers, config.model)
    fairness = Fairness()
    scheduler = Scheduler(
        BlockPool(setup.blocks, config.kv_block_size),
        SlotRotation(fairness, config.adapter_slots, QUANTUM, setup.adapter_bytes, registry.bytes),
        fairness,
        max_seqs=limits.seqs,
        max_tokens=limits.tokens,
        prefix_cache=config.prefix_cache,
    )
    compiler.is_busy = lambda: bool(scheduler.running)
    listed, broken = operations.count()
    info = EngineInfo(
        model=config.served_name(),
        root=config.model,
        device=str(device),
        dtype=str(loaded.dtype).removeprefix("torch."),
        kernels=setup.kernels,
        max_model_len=setup.max_model_len,
        vocab_size=loaded.vocab_size,
        eos_token_ids=loaded.eos_token_ids,
        kv_tokens=setup.blocks * config.kv_block_size,
        adapter_slots=config.adapter_slots,
        adapters=listed,
        broken_adapters=broken,
        parameters=loaded.parameters,
        created=loaded.created,
        generation_defaults=loaded.generation_defaults,
        notes=notes,
        hidden_size=loaded.shape.modules[loaded.shape.head]["weight"][1],
        pooling=loaded.pooling,
        not_embedding=loaded.not_embedding,
        headless=loaded.headless,
        store=str(root),
        tensor_parallel=config.tensor_parallel,
        training_memory=int(config.training_memory),
        memory={plan.place: plan.parts for plan in setup.memory},
    )
    for plan in setup.memory:
        log.info("%s", plan)
    grammars = GrammarCompiler(lambda: _grammar_tokenizer(config, loaded), wake)
    runner = Runner(base, config.kv_block_size, device, setup.tokens)
    return EngineParts(info, scheduler, runner, registry, operations, grammars, ranks, shared, training)


def _open_adapters(
    config: ServeConfig,
    store: Store,
    loaded: LoadedModel,
    fingerprint: str,
    device_slots: DeviceSlots,
    capacity: int | None,
    workers: Workers,
    progress: Callable[[str, float], None],
    notes: list[str],
) -> tuple[Registry, AdapterOperations, SharedOperations | None, Compiler]:
    """The adapters of the store, of a shared one and of `config.adapters`.

    What the operator should know of them is added to `notes`.
    """
    host = int(config.adapter_cache_memory)
    elements = host // loaded.dtype.itemsize
    context = LoweringContext(
        loaded.shape, fingerprint, loaded.dtype, int(config.max_adapter_size), elements, loaded.loaded_whole
    )
    limits = CompilerLimits(int(config.compiler_memory), config.compiler_cpu_time)
    compiler = Compiler(context, limits)
    publisher = Publisher(store, compiler, workers)
    budget = Budget(config.adapter_slots, host, capacity, int(config.training_memory))
    residency = Residency(budget, config.keep_versions)
    registry = Registry(residency, device_slots, publisher, workers)
    operations = AdapterOperations(registry, residency, publisher, config.served_name())

    def report(done: int, of: int) -> None:
        progress(f"lowering adapters ({done} of {of})", 0.92 + 0.08 * done / of)

    notes += open_store(registry, residency, publisher, config.served_name(), report)
    shared = None
    if config.shared_store is not None:
        objects = open_objects(config.shared_store)
        shared = SharedOperations(
            SharedStore(objects, fingerprint, config.served_name(), store.followed(), int(config.max_adapter_size)),
            operations,
            registry,
            residency,
            publisher,
            workers,
            base_name=config.served_name(),
            keep_versions=config.keep_versions,
        )
        notes += shared.start(report)
    if config.adapters is not None:
        changes = shared or operations
        folder, trust = config.adapters, config.trust_settings
        scanner = FolderScanner(folder, trust_settings=trust)
        first = scanner.scan() or {}
        notes += publish_folders(registry, changes, residency, folder, report, trust_settings=trust)
        if config.watch:
            watch = FolderWatch(folder, changes, residency, first, trust_settings=trust)
            workers.repeat(scanner.scan, watch.handle, SCAN_EVERY)
    return registry, operations, shared, compiler


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
