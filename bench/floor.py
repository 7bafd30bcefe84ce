"""What a decode step cannot be faster than on this machine: its bytes over the bandwidth, its operations over the peak.

Both limits are measured here, in the process that measured the step; the sizes are read from the files' own headers.
What a step must read: every weight once (of an untied embedding only the rows looked up), each distinct adapter once,
the KV of every sequence. Activations, logits and what is written are left out, so the floor is a little too low, never
too high.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

REPEATS = 5
SMALL = {"int8": 1.0, "int4": 0.5 + 2 / 32}  # bytes of a weight with its share of the scales
BIG = 1 << 30  # bytes that are read to measure the bandwidth: far more than any cache


@dataclass(frozen=True)
class Machine:
    """Bytes a second of reading memory, operations a second of large matrix products (the best dtype's)."""

    bandwidth: float
    peak: float


@dataclass(frozen=True)
class Need:
    """What a step must move and compute: bytes, operations."""

    nbytes: float
    operations: float

    def seconds(self, machine: Machine) -> float:
        return max(self.nbytes / machine.bandwidth, self.operations / machine.peak)


def measure(device: torch.device, dtype: torch.dtype) -> Machine:
    """Both limits of the device, with as many threads as torch has now. Best of a few: a limit is not an average."""
    bandwidth = BIG / _best(torch.ones(BIG // 4, device=device).sum, device)
    size = 1024 if device.type == "cpu" else 8192
    squares = [torch.ones(size, size, dtype=kind, device=device) for kind in {torch.float32, dtype}]
    return Machine(bandwidth, max(2 * size**3 / _best(partial(torch.mm, each, each), device) for each in squares))


def _best(call: Callable[[], object], device: torch.device) -> float:
    taken = []
    for _ in range(REPEATS + 1):
        _settle(device)
        begin = time.perf_counter()
        call()
        _settle(device)
        taken.append(time.perf_counter() - begin)
    return min(taken[1:])


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def elements(folder: Path) -> dict[str, int]:
    """Elements of every tensor in a folder's safetensors files, from their headers."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118, not a mapping
                found[name] = math.prod(opened.get_slice(name).get_shape())
    return found


def need(
    model: Path, adapters: list[Path], *, batch: int, context: float, itemsize: int, scheme: str | None = None
) -> Need:
    """Bytes and operations of one decode step.

    Args:
        model: folder of the base, of the Llama kind.
        adapters: folder of each sequence's adapter; empty if all are the base's; one that comes twice is read once.
        batch: sequences.
        context: tokens of KV that each of them reads, on average.
        itemsize: bytes of a served weight, adapter or KV element.
        scheme: how the base's weights are made small, if they are.
    """
    config: dict[str, Any] = json.loads((model / "config.json").read_text())
    weights = elements(model)
    if not config["tie_word_embeddings"]:
        weights = {name: count for name, count in weights.items() if "embed_tokens" not in name}
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    layers = config["num_hidden_layers"]
    kv = 2 * layers * config["num_key_value_heads"] * head_dim * context * batch
    attention = 4 * layers * config["num_attention_heads"] * head_dim * context * batch
    sizes = {folder: sum(elements(folder).values()) for folder in set(adapters)}
    total = sum(weights.values())
    return Need(
        nbytes=SMALL.get(scheme or "", itemsize) * total + itemsize * (sum(sizes.values()) + kv),
        operations=2 * (batch * total + sum(sizes[folder] for folder in adapters)) + attention,
    )


def verdict(step: float, needed: Need, machine: Machine) -> dict[str, float]:
    """A measured step (seconds) beside its floor."""
    floor = needed.seconds(machine)
    return {"step": step, "floor": floor, "ratio": step / floor, **asdict(needed), **asdict(machine)}
