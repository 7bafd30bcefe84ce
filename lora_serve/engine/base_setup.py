"""Bring a base into service: load it, check it, size its KV cache, prepare its steps.

Where several ranks share a base (`engine/ranks.py`), all of them do this, each for its part and its device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from lora_serve.adapters.device_slots import DeviceSlots
from lora_serve.config import ServeConfig
from lora_serve.engine.cores import compute_threads
from lora_serve.engine.host_memory import host_memory, process_memory
from lora_serve.engine.memory_plan import MemoryPlan, gpu_plans, host_plan, step_bytes_on_cpu
from lora_serve.engine.ranks import LeadingBase, LeadingDeviceSlots, Ranks
from lora_serve.engine.runner import SampledTokens
from lora_serve.engine.sizing import GpuMemory, StepLimits, adapter_memory, kv_memory, measure_memory, step_limits
from lora_serve.errors import ModelUnsupported
from lora_serve.kernels.select import refuse_scheme, select
from lora_serve.kv.tensors import KVTensors, bytes_per_token
from lora_serve.malloc import trim
from lora_serve.model.base import ResidentBase
from lora_serve.model.load import load
from lora_serve.model.loaded_model import LoadedModel
from lora_serve.model.self_check import blocks_needed, refusing
from lora_serve.model.tensor_parallel import TensorParallel
from lora_serve.model.trainable_base import TrainableBase

MOST_RUNS = 64  # adapters in training at a time, if memory allows
MIN_KV_BLOCKS = 2  # for the check of replayed steps


@dataclass(frozen=True)
class BaseSetup:
    """A base in service.

    Attributes:
        kernels: name of the backend, and which build of it.
        adapter_bytes: memory for adapters on the device; None: host memory is the limit.
        tokens: sampled tokens on the device, if steps are launched before those of the last one are read.
        blocks: of KV.
        trainable: the base as training runs it; None: there is no memory for training.
        memory: what may be taken of which memory.
    """

    loaded: LoadedModel
    kernels: str
    limits: StepLimits
    adapter_bytes: int | None
    device_slots: DeviceSlots
    tokens: SampledTokens | None
    base: ResidentBase
    max_model_len: int
    blocks: int
    trainable: TrainableBase | None
    memory: list[MemoryPlan]


def set_up_base(
    config: ServeConfig,
    device: torch.device,
    progress: Callable[[str, float], None],
    overlap: bool | None,
    parallel: TensorParallel | None = None,
    ranks: Ranks | None = None,
) -> BaseSetup:
    """Load the base, or this rank's part of it, and prepare everything that a step needs.

    Args:
        overlap: launch a step before the outputs of the previous one are read; None: on any device but a CPU.
        parallel: the ranks that share the base; None: it is whole here.
        ranks: in rank 0, the others.
    Raises ModelUnsupported if the base cannot be served.
    """
    torch.set_num_threads(compute_threads(config.threads, config.tensor_parallel))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if reason := refuse_scheme(config.quantize, device):
        raise ModelUnsupported(reason)
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
        parallel=parallel,
    )
    limits = step_limits(config, device)
    capacity = adapter_memory(config, device)
    own = (loaded.shape, config.adapter_slots, loaded.dtype, device, loaded.sharding)
    device_slots = DeviceSlots(*own) if ranks is None else LeadingDeviceSlots(ranks, *own)
    tokens = SampledTokens(limits.seqs, device) if overlap or (overlap is None and device.type != "cpu") else None
    kv = KVTensors(loaded.layers, blocks_needed(config.kv_block_size), config.kv_block_size, loaded.dtype, device)
    trainable = TrainableBase(loaded, kernels, MOST_RUNS) if config.training_memory else None
    with refusing(loaded.shape.model_type):
        parts = (loaded, device_slots, kernels, kv, None if tokens is None else tokens.previous)
        base = ResidentBase(*parts) if ranks is None else LeadingBase(ranks, *parts)
    progress("checking the base against the model as it was loaded", 0.85)
    base.self_check()
    if trainable is not None:
        trainable.check()
    progress("allocating KV", 0.88)
    longest = _requested_context(config, loaded)
    gpu = measure_memory(base, config, device, limits, longest, capacity or 0) if device.type == "cuda" else None
    memory = kv_memory(config, gpu, loaded.layers, loaded.dtype)
    if parallel is not None:
        memory = parallel.least(memory)
        capacity = None if capacity is None else parallel.least(capacity)
    max_model_len = _max_model_len(config, loaded, memory, longest)
    blocks = _kv_blocks(config, loaded, memory, max_model_len, limits.seqs)
    plans = _memory_plans(config, device, loaded, limits, gpu, blocks)
    for plan in plans:
        plan.check()
        loaded.notes.extend([] if plan.note is None else [plan.note])
    kv.resize(blocks)
    progress("preparing steps", 0.9)
    base.prepare(limits.seqs, limits.tokens, -(-max_model_len // config.kv_block_size))
    described = f"{kernels.name} kernels" + (f" {kernels.build}" if kernels.build else "")
    return BaseSetup(
        loaded, described, limits, capacity, device_slots, tokens, base, max_model_len, blocks, trainable, plans
    )


def _memory_plans(
    config: ServeConfig,
    device: torch.device,
    loaded: LoadedModel,
    limits: StepLimits,
    gpu: GpuMemory | None,
    blocks: int,
) -> list[MemoryPlan]:
    """What may be taken of which memory, once the base is there."""
    trim()  # what loading has freed
    host, taken = host_memory(), process_memory() or 0
    kv = blocks * config.kv_block_size * bytes_per_token(loaded.layers, loaded.dtype)
    if gpu is not None:
        return gpu_plans(config, device, gpu, taken, kv, host)
    step = step_bytes_on_cpu(loaded, limits)
    return [host_plan(config, taken, step, kv, host, config.tensor_parallel)]


def device_of(name: str, rank: int = 0, size: int = 1) -> torch.device:
    """The device of that name; "auto" and "cuda" mean the first GPU, "auto" the CPU if there is none.

    Args:
        rank, size: of the process that it is for; several take the first GPUs, one each.
    Raises ModelUnsupported if there is no such device.
    """
    try:
        device = torch.device(name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    except RuntimeError as error:
        raise ModelUnsupported(f"--device {name}: auto, cpu, cuda and cuda:N are known") from error
    if device.type != "cuda":
        return device
    if size > 1 and device.index is not None:
        raise ModelUnsupported(f"--device {name} is one device, and --tensor-parallel {size} takes more: give cuda")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    number = device.index or 0
    if number >= count:
        raise ModelUnsupported(f"--device {name}: torch {torch.__version__} sees {count} GPUs here")
    if size > count:
        raise ModelUnsupported(f"--tensor-parallel {size}: torch {torch.__version__} sees {count} GPUs here")
    return torch.device("cuda", number + rank)


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
