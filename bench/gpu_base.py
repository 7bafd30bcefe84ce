"""A base and adapters that are made on the device, with random weights and without a file, and steps of them timed.

Speed does not depend on what weights say. Everything but their source is the server's own: loading, wrapping, graphs.
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
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from bench.gpu_figures import Limits
from bench.shapes import Shape
from lora_serve.adapters.adapter import Adapter, BaseShape, Lowered, flatten
from lora_serve.adapters.device_slots import DeviceSlots
from lora_serve.kernels.contract import Delta
from lora_serve.kernels.select import select
from lora_serve.kv.tensors import KVTensors
from lora_serve.model import load as loading
from lora_serve.model.base import ResidentBase
from lora_serve.model.batch import Batch, Run

BLOCK = 16  # tokens of a KV block
DTYPE = torch.bfloat16
REPEATS = 5


def settle(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def taken(device: torch.device) -> int:
    """Bytes of the device's memory that are in use, by whomever."""
    if device.type != "cuda":
        return 0
    gc.collect()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return total - free


def in_turns(calls: Mapping[str, Callable[[], object]], device: torch.device, budget: float) -> dict[str, float]:
    """Seconds of each call, medians over repeats in which they take turns; a repeat of one lasts about `budget`."""
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
    settle(device)
    begin = time.perf_counter()
    for _ in range(count):
        call()
    settle(device)
    return (time.perf_counter() - begin) / count


def limits(device: torch.device) -> Limits:
    """Best of a few each: a limit is not an average."""
    on_gpu = device.type == "cuda"
    size, wide = (1 << 29, 8192) if on_gpu else (1 << 22, 512)  # fp32 numbers: two gibibytes, far more than any cache
    source, target = torch.randn(size, device=device), torch.empty(size, device=device)
    left, right = (torch.randn(wide, wide, device=device).to(DTYPE) for _ in range(2))
    host = torch.ones(size // 8, pin_memory=on_gpu)
    moved = target[: size // 8]

    def best(call: Callable[[], object]) -> float:
        return min([_run(call, 5, device) for _ in range(REPEATS)][1:])

    return Limits(
        read=source.nbytes / best(source.sum),
        copied=2 * source.nbytes / best(lambda: target.copy_(source)),
        sent=host.nbytes / best(lambda: moved.copy_(host, non_blocking=True)),
        peak=2 * wide**3 / best(lambda: torch.mm(left, right)),
    )


def write_config(shape: Shape, folder: Path) -> Path:
    """A model folder that says what the model is, and has no weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(shape.config(shape.vocabulary - 1)))
    return folder


class _Maker:
    """Stands where the loader asks for a model from disk: makes one on the device from its configuration."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def from_pretrained(self, name: str, *, attn_implementation: str, **_: Any) -> Any:
        config = AutoConfig.from_pretrained(name)
        with torch.device(self._device):
            return AutoModelForCausalLM.from_config(config, dtype=DTYPE, attn_implementation=attn_implementation)


@contextmanager
def made_on(device: torch.device) -> Iterator[None]:
    """While this holds, bases are made on the device instead of read."""
    before = loading.AutoModelForCausalLM
    loading.AutoModelForCausalLM = _Maker(device)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        loading.AutoModelForCausalLM = before  # type: ignore[attr-defined]


class Resident:
    """A base with room for `rows` sequences of `context` tokens and for `slots` adapters, its graphs noted.

    Attributes:
        notes: seconds and bytes of its start, by what they went into.
    """

    def __init__(
        self, folder: Path, device: torch.device, *, rows: int, context: int, slots: int, longest: int
    ) -> None:
        self._device = device
        self.notes: dict[str, float] = {}
        with made_on(device), self._noted("base"):
            loaded = loading.load(
                str(folder), revision=None, dtype="bfloat16", device=device, progress=lambda stage, done: None
            )
            self.shape = loaded.shape
            self._device_slots = DeviceSlots(loaded.shape, slots, DTYPE, device)
            tokens = max(rows * (context + BLOCK), longest)
            kv = KVTensors(loaded.layers, -(-tokens // BLOCK), BLOCK, DTYPE, device)
            self._base = ResidentBase(loaded, self._device_slots, select(device), kv)
            self._base.pack()
            del loaded
        with self._noted("graphs"):
            self._base.prepare(rows, longest, -(-longest // BLOCK))

    def load_adapter(self, adapter: Adapter) -> int:
        """Put an adapter on the device; its slot."""
        return self._device_slots.load(adapter)

    def clear(self) -> None:
        """Let all adapters go."""
        for digest in self._device_slots.resident:
            self._device_slots.evict(digest)

    def step(self, batch: Batch) -> Callable[[], Tensor]:
        """What makes the step once, as the engine's runner makes it."""
        return lambda: self._base.forward(batch)

    @contextmanager
    def _noted(self, what: str) -> Iterator[None]:
        before, begin = taken(self._device), time.perf_counter()
        yield
        settle(self._device)
        self.notes[f"{what} seconds"] = time.perf_counter() - begin
        self.notes[f"{what} bytes"] = taken(self._device) - before


def random_adapter(base: BaseShape, rank: int, name: str, device: torch.device) -> Adapter:
    """An adapter on all linear modules but the head, made on the device."""
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


def decoding(slots: Sequence[int], context: int) -> Batch:
    """A step of sequences with `context` tokens, this one's too; a row for each of `slots` (0: the base's)."""
    width = -(-context // BLOCK)
    tables = [range(1 + i * width, 1 + (i + 1) * width) for i in range(len(slots))]
    runs = _runs(slots)
    return Batch(
        token_ids=[1 + i for i in range(len(slots))],
        positions=[context - 1] * len(slots),
        kv_index=[table[-1] * BLOCK + (context - 1) % BLOCK for table in tables],
        query_start=range(len(slots) + 1),
        context=[context] * len(slots),
        block_tables=tables,
        logits_rows=range(len(slots)),
        runs=runs,
        logits_runs=runs,
    )


def reading(tokens: int, slot: int) -> Batch:
    """A whole prompt in one step, under one adapter (0: none)."""
    return Batch(
        token_ids=[1 + i % 1000 for i in range(tokens)],
        positions=range(tokens),
        kv_index=range(BLOCK, BLOCK + tokens),
        query_start=[0, tokens],
        context=[tokens],
        block_tables=[range(1, 1 + -(-tokens // BLOCK))],
        logits_rows=[tokens - 1],
        runs=_runs([slot] * tokens),
        logits_runs=_runs([slot]),
    )


def _runs(slots: Sequence[int]) -> list[Run]:
    """Neighbouring rows of one slot are a run."""
    runs = []
    for slot, group in groupby(range(len(slots)), key=lambda row: slots[row]):
        rows = list(group)
        if slot:
            runs.append(Run(rows[0], rows[-1] + 1, slot, 1.0))
    return runs
