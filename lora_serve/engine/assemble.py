"""Start-up: from options to the parts of an engine, in the order in which they need each other."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch

from lora_serve.adapters.bank import Bank
from lora_serve.adapters.cache import Cache
from lora_serve.adapters.registry import Registry
from lora_serve.adapters.store import Store
from lora_serve.config import ServeConfig
from lora_serve.engine.cores import physical_cores
from lora_serve.engine.fairness import Turns
from lora_serve.engine.runner import Runner
from lora_serve.engine.scheduler import Scheduler
from lora_serve.errors import ModelUnsupported
from lora_serve.kernels.select import select
from lora_serve.kv.pool import BlockPool
from lora_serve.kv.tensors import KVTensors, bytes_per_token
from lora_serve.messages import EngineInfo
from lora_serve.model.base import ResidentBase
from lora_serve.model.load import LoadedModel, load

log = logging.getLogger(__name__)

QUANTUM = 16  # steps of a turn: long enough that loading an adapter is small beside running it


@dataclass(frozen=True)
class Parts:
    info: EngineInfo
    scheduler: Scheduler
    runner: Runner
    registry: Registry


def assemble(config: ServeConfig, wake: Callable[[], None], progress: Callable[[str, float], None]) -> Parts:
    """Load the base, size its KV, open the store, publish the adapters that were asked for at start."""
    device = torch.device(config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(config.threads or physical_cores())
    progress("building kernels", 0.0)
    kernels = select(device, config.native_kernels)
    loaded = load(
        config.model,
        revision=config.revision,
        dtype=config.dtype,
        device=device,
        progress=progress,
        scheme=config.quantize,
        names=(config.served_name(),),
    )
    progress("allocating KV", 0.85)
    max_model_len = _context(config, loaded)
    blocks = _blocks(config, loaded, max_model_len)
    kv = KVTensors(loaded.layers, blocks, config.kv_block_size, loaded.dtype, device)
    bank = Bank(loaded.shape, config.adapter_slots, loaded.dtype, device)
    base = ResidentBase(loaded, bank, kernels, kv)
    progress("proving the base", 0.88)
    base.prove()
    progress("opening the adapter store", 0.92)
    registry = Registry(
        Store(config.store_folder()),
        Cache(int(config.adapter_cache_memory)),
        bank,
        loaded.shape,
        loaded.dtype,
        wake,
        max_bytes=int(config.max_adapter_size),
    )
    notes = list(loaded.notes)
    if config.adapters is not None:
        for name, error in registry.publish_folder(config.adapters):
            notes.append(f"adapter {name} is not served: {error.message}")
    scheduler = Scheduler(
        BlockPool(blocks, config.kv_block_size),
        Turns(config.adapter_slots, QUANTUM),
        max_seqs=config.max_num_seqs,
        max_tokens=config.max_num_batched_tokens,
        prefix_cache=config.prefix_cache,
    )
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
        adapters=len(registry.describe_all()),
        parameters=loaded.parameters,
        created=loaded.created,
        generation_defaults=loaded.generation_defaults,
        notes=notes,
    )
    return Parts(info, scheduler, Runner(base, config.kv_block_size, device), registry)


def _context(config: ServeConfig, loaded: LoadedModel) -> int:
    wanted = config.max_model_len or loaded.max_model_len
    if wanted > loaded.max_model_len:
        raise ModelUnsupported(f"--max-model-len {wanted} is more than the base serves right ({loaded.max_model_len})")
    fits = int(config.kv_cache_memory) // bytes_per_token(loaded.layers, loaded.dtype)
    fits -= fits % config.kv_block_size
    if fits < 2 * config.kv_block_size:
        raise ModelUnsupported(
            f"--kv-cache-memory {config.kv_cache_memory.human_readable()} holds {fits} tokens; "
            f"a token takes {bytes_per_token(loaded.layers, loaded.dtype)} bytes"
        )
    if config.max_model_len is not None and wanted > fits:
        raise ModelUnsupported(f"--max-model-len {wanted} needs more KV than --kv-cache-memory holds ({fits} tokens)")
    if wanted > fits:
        loaded.notes.append(f"context is {fits} instead of {wanted} tokens: that is what --kv-cache-memory holds")
    return min(wanted, fits)


def _blocks(config: ServeConfig, loaded: LoadedModel, max_model_len: int) -> int:
    """Blocks that fit the memory given, but no more than all sequences at full length could use."""
    size = config.kv_block_size
    fit = int(config.kv_cache_memory) // (bytes_per_token(loaded.layers, loaded.dtype) * size)
    return max(2, min(fit, config.max_num_seqs * -(-max_model_len // size)))
