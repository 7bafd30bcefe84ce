"""How much memory the KV cache gets: on a GPU, what the base, its passes, the graphs and the adapters leave."""

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

HOST = 1 << 30  # bytes of KV where memory is shared with everything else
ADAPTERS = 10  # a GPU's memory over that of its adapters


class Limits(NamedTuple):
    """Sequences and tokens in one step."""

    seqs: int
    tokens: int


@dataclass(frozen=True)
class Needs:
    """A GPU's memory in bytes: all of it, what is taken already, and what will be taken beside KV."""

    total: int
    taken: int
    passes: int
    graphs: int
    adapters: int

    def left(self, utilization: float) -> int:
        """For KV, if only a share of the memory may be used; perhaps less than nothing."""
        return int(self.total * utilization) - self.taken - self.passes - self.graphs - self.adapters

    def __str__(self) -> str:
        def gib(number: int) -> str:
            return f"{number / (1 << 30):.2f}"

        return (
            f"of {gib(self.total)} GiB, {gib(self.taken)} are taken (the base and what else is there), a step takes up "
            f"to {gib(self.passes)}, graphs {gib(self.graphs)}, adapters {gib(self.adapters)}"
        )


def limits_of(config: ServeConfig, device: torch.device) -> Limits:
    """As given, or what suits the device."""
    usual = Limits(MOST_SEQS, 2048) if device.type == "cuda" else Limits(64, 512)
    return Limits(config.max_num_seqs or usual.seqs, config.max_num_batched_tokens or usual.tokens)


def adapter_memory(config: ServeConfig, device: torch.device) -> int | None:
    """Bytes for adapters on the device; None where the host's cache is the limit."""
    if config.adapter_device_memory is not None:
        return int(config.adapter_device_memory)
    return torch.cuda.mem_get_info(device)[1] // ADAPTERS if device.type == "cuda" else None


def kv_memory(config: ServeConfig, needs: Needs | None, layers: list[LayerShape], dtype: torch.dtype) -> int:
    """Bytes for KV: as given, or what is left. Raises ModelUnsupported, with the numbers, if that is too little.

    Args:
        needs: of a GPU; None on a CPU.
    """
    if needs is None:
        return HOST if config.kv_cache_memory is None else int(config.kv_cache_memory)
    least = 2 * config.kv_block_size * bytes_per_token(layers, dtype)
    left = needs.left(config.gpu_memory_utilization)
    wanted = left if config.kv_cache_memory is None else int(config.kv_cache_memory)
    if wanted > needs.left(1.0) or (left < least and config.kv_cache_memory is None):
        raise ModelUnsupported(
            f"the GPU has no room for the KV cache: {needs}; {max(0, left) >> 20} MiB are left at "
            f"--gpu-memory-utilization {config.gpu_memory_utilization:g}. Lower --max-num-batched-tokens, "
            "--max-num-seqs, --adapter-device-memory or --kv-cache-memory, or use a smaller or quantised base"
        )
    return wanted


def measured(
    base: ResidentBase, config: ServeConfig, device: torch.device, limits: Limits, longest: int, adapters: int
) -> Needs:
    """What a GPU's memory is needed for, by trying the largest step and the largest graph.

    Args:
        longest: tokens of the longest sequence.
        adapters: bytes of them at once.
    """
    _settle()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    _largest_step(base, config.kv_block_size, limits, longest)
    torch.cuda.synchronize(device)
    passes = torch.cuda.max_memory_allocated(device) - before
    _settle()
    free, total = torch.cuda.mem_get_info(device)
    graphs = base.graph_memory(limits.seqs, lambda: torch.cuda.mem_get_info(device)[0])
    _settle()
    return Needs(total, total - free, passes, graphs, adapters)


def _settle() -> None:
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


def _largest_step(base: ResidentBase, block_size: int, limits: Limits, longest: int) -> None:
    """All tokens that a step may have, all their logits, as many draws and log-probabilities as there may be."""
    tokens = limits.tokens
    lengths = [min(longest, tokens - start) for start in range(0, tokens, longest)]
    logits = base.forward(dummy_batch(lengths, -(-longest // block_size)))
    rows = min(limits.seqs, tokens)
    row = SamplingRow(Sampling(max_tokens=1, temperature=1.0, top_p=0.5, logprobs=20), 0, 0, frozenset(), [], [])
    sample(logits[:rows], [row] * rows).wait()
    logprobs(logits, torch.zeros(tokens, dtype=torch.int64, device=logits.device), [20] * tokens).wait()
