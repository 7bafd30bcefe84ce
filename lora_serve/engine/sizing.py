"""Size of the KV cache: on a GPU, the memory that the base, its activations, CUDA graphs and adapters leave free."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import NamedTuple

import torch

from lora_serve.config import MOST_SEQS, ServeConfig
from lora_serve.engine.logprobs import logprobs
from lora_serve.engine.sampler import SamplingRow, sample
from lora_serve.errors import ModelUnsupported
from lora_serve.kv.tensors import LayerShape, bytes_per_token
from lora_serve.model.base import ResidentBase
from lora_serve.model.batch import dummy_batch
from lora_serve.request import Sampling

CPU_KV_BYTES = 1 << 30  # default KV cache on a CPU
ADAPTER_SHARE = 10  # by default a GPU's adapters get a tenth of its memory


class StepLimits(NamedTuple):
    """Maximum number of sequences and of tokens in one step."""

    seqs: int
    tokens: int


@dataclass(frozen=True)
class GpuMemory:
    """A GPU's memory in bytes: in total, in use before KV is allocated, and needed by everything except KV.

    Attributes:
        training: reserved for adapters in training and the pass that runs.
    """

    total: int
    taken: int
    passes: int
    graphs: int
    adapters: int
    training: int = 0

    def left(self, utilization: float) -> int:
        """Bytes left for KV at a given GPU memory utilization; may be negative."""
        return int(self.total * utilization) - self.taken - self.passes - self.graphs - self.adapters - self.training

    def __str__(self) -> str:
        def gib(number: int) -> str:
            return f"{number / (1 << 30):.2f}"

        return (
            f"of {gib(self.total)} GiB, {gib(self.taken)} are taken (the base and what else is there), a step takes up "
            f"to {gib(self.passes)}, graphs {gib(self.graphs)}, adapters {gib(self.adapters)}"
            + (f", training {gib(self.training)}" if self.training else "")
        )


def step_limits(config: ServeConfig, device: torch.device) -> StepLimits:
    """The configured limits, or the device's defaults."""
    default = StepLimits(MOST_SEQS, 2048) if device.type == "cuda" else StepLimits(64, 512)
    return StepLimits(config.max_num_seqs or default.seqs, config.max_num_batched_tokens or default.tokens)


def adapter_memory(config: ServeConfig, device: torch.device) -> int | None:
    """Bytes for adapters on the device; None on a CPU, where the host cache is the limit.

    Where processes share a base, each has a copy of its part of an adapter, which counts as if it were whole.
    """
    if config.adapter_device_memory is not None:
        return int(config.adapter_device_memory)
    if config.tensor_parallel > 1 and device.type == "cpu":
        return int(config.adapter_cache_memory)
    return torch.cuda.mem_get_info(device)[1] // ADAPTER_SHARE if device.type == "cuda" else None


def kv_memory(config: ServeConfig, memory: GpuMemory | None, layers: list[LayerShape], dtype: torch.dtype) -> int:
    """Bytes for KV: as configured, or what is left. Raises ModelUnsupported, with the numbers, if that is too little.

    Args:
        memory: measured on a GPU; None on a CPU.
    """
    if memory is None:
        return CPU_KV_BYTES if config.kv_cache_memory is None else int(config.kv_cache_memory)
    minimum = 2 * config.kv_block_size * bytes_per_token(layers, dtype)
    left = memory.left(config.gpu_memory_utilization)
    granted = left if config.kv_cache_memory is None else int(config.kv_cache_memory)
    if granted > memory.left(1.0) or (left < minimum and config.kv_cache_memory is None):
        raise ModelUnsupported(
            f"the GPU has no room for the KV cache: {memory}; {max(0, left) >> 20} MiB are left at "
            f"--gpu-memory-utilization {config.gpu_memory_utilization:g}. Lower --max-num-batched-tokens, "
            "--max-num-seqs, --adapter-device-memory, --training-memory or --kv-cache-memory, or use a smaller or "
            "quantised base"
        )
    return granted


def measure_memory(
    base: ResidentBase, config: ServeConfig, device: torch.device, limits: StepLimits, longest: int, adapters: int
) -> GpuMemory:
    """Measure a GPU's memory use by running the largest step and capturing the largest CUDA graph.

    Args:
        longest: tokens of the longest sequence.
        adapters: bytes reserved for adapters.
    """
    _release_cached_memory()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    largest_step(base, config.kv_block_size, limits, longest)
    torch.cuda.synchronize(device)
    passes = torch.cuda.max_memory_allocated(device) - before
    _release_cached_memory()
    free, total = torch.cuda.mem_get_info(device)
    blocks = -(-longest // config.kv_block_size)
    graphs = base.graph_memory(limits.seqs, limits.tokens, blocks, lambda: torch.cuda.mem_get_info(device)[0])
    _release_cached_memory()
    return GpuMemory(total, total - free, passes, graphs, adapters, int(config.training_memory))


def _release_cached_memory() -> None:
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


def largest_step(base: ResidentBase, block_size: int, limits: StepLimits, longest: int) -> None:
    """Run a step with the maximum number of tokens, logits, sampled rows and log-probabilities."""
    tokens = limits.tokens
    lengths = [min(longest, tokens - start) for start in range(0, tokens, longest)]
    logits = base.forward(dummy_batch(lengths, -(-longest // block_size)))
    rows = min(limits.seqs, tokens)
    row = SamplingRow(Sampling(max_tokens=1, temperature=1.0, top_p=0.5, logprobs=20), 0, 0, frozenset(), [], [])
    sample(logits[:rows], [row] * rows).wait()
    logprobs(logits, torch.zeros(tokens, dtype=torch.int64, device=logits.device), [20] * tokens).wait()
