"""Timed forward passes of a base and adapters with random weights, created on the device without files.

Speed does not depend on the values of weights. Everything else is the server's code: loading, modules, CUDA graphs.
"""

from __future__ import annotations

import gc
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from bench.gpu.figures import Limits
from bench.shapes import Shape
from lora_serve.adapters.adapter import Adapter, BaseShape, Lowered, flatten
from lora_serve.adapters.device_slots import DeviceSlots
from lora_serve.kernels.contract import Delta
from lora_serve.kernels.packed_weight import Scheme
from lora_serve.kernels.select import select
from lora_serve.kv.tensors import KVTensors
from lora_serve.model import load as loading
from lora_serve.model.base import ResidentBase
from lora_serve.model.batch import AdapterRows, Batch

BLOCK = 16  # tokens of a KV block
DTYPE = torch.bfloat16
REPEATS = 5


def synchronize(device: torch.device) -> None:
    """Wait for the device to finish."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def used_memory(device: torch.device) -> int:
    """Bytes of the device's memory in use, by all processes."""
    if device.type != "cuda":
        return 0
    gc.collect()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return total - free


def time_in_turns(calls: Mapping[str, Callable[[], object]], device: torch.device, budget: float) -> dict[str, float]:
    """Median seconds of each call, run in turns with the others; a repeat of one takes about `budget` seconds."""
    counts = {}
    for name, call in calls.items():
        _run(call, 2, device)
        counts[name] = max(2, min(100, round(budget / _run(call, 1, device))))
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(REPEATS):
        for name, call in calls.items():
            found[name].append(_run(call, counts[name], device))
    return {name: statistics.median(each) for name, each in found.items()}


def _run(call: Callable[[], object], count: int, device: torch.device) -> float:
    synchronize(device)
    begin = time.perf_counter()
    for _ in range(count):
        call()
    synchronize(device)
    return (time.perf_counter() - begin) / count


def measure_limits(device: torch.device) -> Limits:
    """Peak rates of the device, the best of a few repeats each."""
    on_gpu = device.type == "cuda"
    size, wide = (1 << 29, 8192) if on_gpu else (1 << 22, 512)  # float32 elements: 2 GiB, far more than any cache
    source, target = torch.randn(size, device=device), torch.empty(size, device=device)
    left, right = (torch.randn(wide, wide, device=device).to(DTYPE) for _ in range(2))
    host = torch.ones(size // 8, pin_memory=on_gpu)
    moved = target[: size // 8]

    def best(call: Callable[[], object]) -> float:
        return min([_run(call, 5, device) for _ in range(REPEATS)][1:])

    return Limits(
        read=source.nbytes / best(source.sum),
        copy=2 * source.nbytes / best(lambda: target.copy_(source)),
        host_to_device=host.nbytes / best(lambda: moved.copy_(host, non_blocking=True)),
        flops=2 * wide**3 / best(lambda: torch.mm(left, right)),
    )


def write_config(shape: Shape, folder: Path) -> Path:
    """Write a model folder with a config and no weights, but the empty file by which the engine identifies a base."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(shape.config(shape.vocabulary - 1)))
    save_file({}, folder / "model.safetensors")
    return folder


class _RandomModel:
    """Stand-in for `AutoModelForCausalLM` that creates a model on the device from its config."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def from_pretrained(self, name: str, *, attn_implementation: str, **_: Any) -> tuple[Any, dict[str, Any]]:
        """The model, and what a checkpoint would have lacked."""
        config = AutoConfig.from_pretrained(name)
        with torch.device(self._device):
            model = AutoModelForCausalLM.from_config(config, dtype=DTYPE, attn_implementation=attn_implementation)
        return model, {"missing_keys": set()}


@contextmanager
def random_weights_on(device: torch.device) -> Iterator[None]:
    """Within this context, the loader creates random weights on the device instead of reading them."""
    before = loading.AutoModelForCausalLM
    loading.AutoModelForCausalLM = _RandomModel(device)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        loading.AutoModelForCausalLM = before  # type: ignore[attr-defined]


class RandomBase:
    """A base with KV for `rows` sequences of `context` tokens, `slots` adapter slots, and captured CUDA graphs.

    Attributes:
        startup: seconds and bytes of its start-up, by part.

    Args:
        longest: tokens of the longest sequence.
        tokens: of the largest step that is captured; None: `longest`.
        scheme: how the base is quantised.
    """

    def __init__(
        self,
        folder: Path,
        device: torch.device,
        *,
        rows: int,
        context: int,
        slots: int,
        longest: int,
        tokens: int | None = None,
        scheme: Scheme | None = None,
    ) -> None:
        self._device = device
        self.startup: dict[str, float] = {}
        with random_weights_on(device), self._recorded("base"):
            loaded = loading.load(
                str(folder),
                revision=None,
                dtype="bfloat16",
                device=device,
                progress=lambda stage, done: None,
                scheme=scheme,
            )
            self.shape = loaded.shape
            self._device_slots = DeviceSlots(loaded.shape, slots, DTYPE, device)
            held = max(rows * (context + BLOCK), longest)
            kv = KVTensors(loaded.layers, -(-held // BLOCK), BLOCK, DTYPE, device)
            self._base = ResidentBase(loaded, self._device_slots, select(device), kv)
            self._base.pack()
            del loaded
        with self._recorded("graphs"):
            self._base.prepare(rows, longest if tokens is None else tokens, -(-longest // BLOCK))

    def load(self, adapter: Adapter) -> int:
        """Load an adapter onto the device; returns its slot."""
        return self._device_slots.load(adapter)

    def evict_all(self) -> None:
        """Evict all adapters."""
        for slot in list(self._device_slots.ranks):
            self._device_slots.evict(slot)

    def step(self, batch: Batch, *, eager: bool = False) -> Callable[[], Tensor]:
        """A call that runs the step once, as the engine's runner does, or through the model's Python."""
        return torch.inference_mode()(lambda: self._base._eager(batch)) if eager else lambda: self._base.forward(batch)

    @contextmanager
    def _recorded(self, what: str) -> Iterator[None]:
        before, begin = used_memory(self._device), time.perf_counter()
        yield
        synchronize(self._device)
        self.startup[f"{what} seconds"] = time.perf_counter() - begin
        self.startup[f"{what} bytes"] = used_memory(self._device) - before


def random_adapter(base: BaseShape, rank: int, name: str, device: torch.device) -> Adapter:
    """A LoRA adapter with random weights on all linear modules but the head, created on the device."""
    with torch.device(device):
        deltas = {
            site.name: Delta(
                torch.randn(rank, site.in_features, dtype=DTYPE) / math.sqrt(site.in_features),
                torch.randn(rank, site.out_features, dtype=DTYPE) * 0.02,
            )
            for site in base.sites.values()
            if site.name != base.head
        }
        return flatten(name, Lowered(deltas, {}), DTYPE)


def decode_batch(slots: Sequence[int], context: int) -> Batch:
    """A decode step of one sequence per entry of `slots` (0: the base), at `context` tokens with the new one."""
    width = -(-context // BLOCK)
    tables = [range(1 + i * width, 1 + (i + 1) * width) for i in range(len(slots))]
    adapter_rows = _adapter_rows(slots)
    return Batch(
        token_ids=[1 + i for i in range(len(slots))],
        positions=[context - 1] * len(slots),
        kv_index=[table[-1] * BLOCK + (context - 1) % BLOCK for table in tables],
        query_start=range(len(slots) + 1),
        context=[context] * len(slots),
        block_tables=tables,
        logits_rows=range(len(slots)),
        adapter_rows=adapter_rows,
        logits_adapter_rows=adapter_rows,
    )


def prefill_batch(tokens: int, slot: int) -> Batch:
    """Prefill of a whole prompt in one step, with the adapter in `slot` (0: none)."""
    return Batch(
        token_ids=[1 + i % 1000 for i in range(tokens)],
        positions=range(tokens),
        kv_index=range(BLOCK, BLOCK + tokens),
        query_start=[0, tokens],
        context=[tokens],
        block_tables=[range(1, 1 + -(-tokens // BLOCK))],
        logits_rows=[tokens - 1],
        adapter_rows=_adapter_rows([slot] * tokens),
        logits_adapter_rows=_adapter_rows([slot]),
    )


def mixed_batch(rows: int, context: int, tokens: int, slot: int) -> Batch:
    """A step in which so many sequences decode at `context` tokens and a prompt is computed, all with one adapter."""
    decode, prompt = decode_batch([slot] * rows, context), prefill_batch(tokens, slot)
    first = 1 + rows * -(-context // BLOCK)  # KV block after those of the sequences that decode
    return Batch(
        token_ids=[*decode.token_ids, *prompt.token_ids],
        positions=[*decode.positions, *prompt.positions],
        kv_index=[*decode.kv_index, *range(first * BLOCK, first * BLOCK + tokens)],
        query_start=[*decode.query_start, rows + tokens],
        context=[*decode.context, tokens],
        block_tables=[*decode.block_tables, range(first, first + -(-tokens // BLOCK))],
        logits_rows=[*range(rows), rows + tokens - 1],
        adapter_rows=_adapter_rows([slot] * (rows + tokens)),
        logits_adapter_rows=_adapter_rows([slot] * (rows + 1)),
    )


def _adapter_rows(slots: Sequence[int]) -> list[AdapterRows]:
    """Consecutive rows with the same slot."""
    adapter_rows = []
    for slot, group in groupby(range(len(slots)), key=lambda row: slots[row]):
        rows = list(group)
        if slot:
            adapter_rows.append(AdapterRows(rows[0], rows[-1] + 1, slot, 1.0))
    return adapter_rows
