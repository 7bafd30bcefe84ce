"""One account of memory: what each part of the engine may take of the device's, or of the host's, made at start.

Parts are bounds: the base is there, KV, adapters and training fill up to theirs. What can never fit together is refused
with the numbers. What fits only while the parts that nobody asked for (the defaults) are not full is noted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from lora_serve.config import ServeConfig
from lora_serve.engine.host_memory import HostMemory
from lora_serve.engine.logprobs import CHUNK_LOGITS_CPU
from lora_serve.engine.sizing import GpuMemory, StepLimits
from lora_serve.errors import ModelUnsupported
from lora_serve.model.loaded_model import LoadedModel

HOST = "host memory"


@dataclass(frozen=True)
class MemoryPlan:
    """What may be taken of one memory, in bytes.

    Attributes:
        place: which memory.
        parts: by name.
        total: that there is; None: not known.
        free: of it, beside the base.
        defaults: parts whose size nobody asked for.
    """

    place: str
    parts: dict[str, int]
    total: int | None = None
    free: int | None = None
    defaults: Sequence[str] = field(default=())

    @property
    def sum(self) -> int:
        """Bytes of all parts."""
        return sum(self.parts.values())

    def __str__(self) -> str:
        parts = ", ".join(f"{part} {_gib(size)}" for part, size in self.parts.items() if size)
        of = "" if self.total is None else f" of {_gib(self.total)}"
        return f"{self.place}: {_gib(self.sum)}{of} GiB at most ({parts})"

    def check(self) -> None:
        """Raise ModelUnsupported, with the numbers, if what was asked for can never fit."""
        asked = self.sum - sum(self.parts[part] for part in self.defaults)
        if self.total is not None and asked > self.total:
            raise ModelUnsupported(
                f"the memory does not hold what was asked for. {self}. Lower --training-memory, --kv-cache-memory or "
                "--adapter-cache-memory, or use a smaller or quantised base"
            )

    @property
    def note(self) -> str | None:
        """What the operator should know: that the parts do not fit when all are full, or not beside other processes."""
        if self.total is not None and self.sum > self.total:
            return (
                f"{self}: that is more than there is, and the server may be killed when all of it is used; lower "
                "--adapter-cache-memory or --kv-cache-memory"
            )
        if self.free is not None and self.sum - self.parts.get("base", 0) > self.free:
            return f"{self}, of which {_gib(self.free)} GiB are free now: other processes take the rest"
        return None


def host_plan(
    config: ServeConfig, base: int, step: int, kv: int, host: HostMemory | None, processes: int = 1
) -> MemoryPlan:
    """What is taken of the host's memory where it is the device's.

    Args:
        base, step, kv: bytes of each process that shares the base, of which there are so many.
    """
    adapters = int(config.adapter_cache_memory)
    if processes > 1:
        adapters += processes * int(config.adapter_device_memory or config.adapter_cache_memory)
    parts = {
        "base": processes * base,
        "step": processes * step,
        "KV": processes * kv,
        "adapters": adapters,
        "training": int(config.training_memory),
    }
    return MemoryPlan(HOST, parts, *_limits(host), _defaults(config))


def gpu_plans(
    config: ServeConfig, device: torch.device, memory: GpuMemory, base: int, kv: int, host: HostMemory | None
) -> list[MemoryPlan]:
    """What is taken of a GPU's memory, which was measured and checked, and of the host's beside it.

    Args:
        base: bytes of the host's memory that the process takes.
    """
    parts = {
        "base": memory.taken,
        "step": memory.passes,
        "graphs": memory.graphs,
        "KV": kv,
        "adapters": memory.adapters,
        "training": memory.training,
    }
    beside = {"base": base, "adapters": int(config.adapter_cache_memory)}
    defaults = [part for part in _defaults(config) if part in beside]
    return [MemoryPlan(str(device), parts, memory.total), MemoryPlan(HOST, beside, *_limits(host), defaults)]


def step_bytes_on_cpu(loaded: LoadedModel, limits: StepLimits) -> int:
    """About what a step of the most tokens takes on a CPU: a layer's results, logits of all tokens, their copies.

    Of a base that is quantised at load as in float32; a third more, as `bench/training_memory.py` found.
    """
    sites, item = loaded.shape.sites.items(), loaded.dtype.itemsize if loaded.scheme is None else 4
    widest = max((site.out_features for name, site in sites if name != loaded.shape.head), default=0)
    token = 8 * loaded.shape.hidden_size + 5 * widest + loaded.vocab_size
    return 4 * limits.tokens * token * item // 3 + 20 * CHUNK_LOGITS_CPU


def _defaults(config: ServeConfig) -> list[str]:
    """Parts whose size nobody asked for."""
    usual = ServeConfig.model_fields["adapter_cache_memory"].default
    named = {"KV": config.kv_cache_memory is None, "adapters": config.adapter_cache_memory == usual}
    return [part for part, default in named.items() if default]


def _limits(host: HostMemory | None) -> tuple[int | None, int | None]:
    return (None, None) if host is None else (host.total, host.free)


def _gib(size: int) -> str:
    return f"{size / (1 << 30):.2f}"
