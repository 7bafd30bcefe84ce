"""Roofline of a decode step: the larger of bytes ÷ memory bandwidth and operations ÷ peak, both measured here.

A step has to read every weight once (of an untied embedding only the rows looked up), each distinct adapter once, and
the KV of every sequence. Activations, logits and writes are left out, so this lower bound (the floor) is a little too
low, never too high. Sizes come from the headers of the safetensors files.
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
QUANTIZED = {"int8": 1.0, "fp8": 1.0, "int4": 0.5 + 2 / 32}  # bytes per weight, scales included
READ = 1 << 30  # bytes read to measure the bandwidth: far more than any cache


@dataclass(frozen=True)
class Peak:
    """Memory read bandwidth in bytes per second; FLOP/s of large matrix products in the faster of two dtypes."""

    bandwidth: float
    flops: float


@dataclass(frozen=True)
class StepCost:
    """Bytes that a step has to read and operations that it has to do."""

    nbytes: float
    operations: float

    def seconds(self, peak: Peak) -> float:
        """The lower bound of its duration."""
        return max(self.nbytes / peak.bandwidth, self.operations / peak.flops)


def read_bandwidth(device: torch.device) -> float:
    """Bytes per second of reading memory, with torch's current number of threads; the best of a few repeats."""
    return READ / _best(torch.ones(READ // 4, device=device).sum, device)


def measure_peak(device: torch.device, dtype: torch.dtype) -> Peak:
    """Bandwidth and FLOP/s of the device in float32 and `dtype`; the best of a few repeats each."""
    size = 1024 if device.type == "cpu" else 8192
    squares = [torch.ones(size, size, dtype=kind, device=device) for kind in {torch.float32, dtype}]
    flops = max(2 * size**3 / _best(partial(torch.mm, each, each), device) for each in squares)
    return Peak(read_bandwidth(device), flops)


def _best(call: Callable[[], object], device: torch.device) -> float:
    taken = []
    for _ in range(REPEATS + 1):
        _synchronize(device)
        begin = time.perf_counter()
        call()
        _synchronize(device)
        taken.append(time.perf_counter() - begin)
    return min(taken[1:])


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def elements(folder: Path) -> dict[str, int]:
    """Number of elements of every tensor in a folder's safetensors files."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118, not a mapping
                found[name] = math.prod(opened.get_slice(name).get_shape())
    return found


def decode_cost(
    model: Path, adapters: list[Path], *, batch: int, context: float, itemsize: int, scheme: str | None = None
) -> StepCost:
    """Bytes and operations of one decode step.

    Args:
        model: folder of a Llama-style base.
        adapters: folder of each sequence's adapter; empty if all use the base. Repeated ones are read once.
        batch: number of sequences.
        context: mean tokens of KV per sequence.
        itemsize: bytes of a weight, adapter or KV element.
        scheme: the base's quantisation, if any.
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
    return StepCost(
        nbytes=QUANTIZED.get(scheme or "", itemsize) * total + itemsize * (sum(sizes.values()) + kv),
        operations=2 * (batch * total + sum(sizes[folder] for folder in adapters)) + attention,
    )


def compare(step: float, cost: StepCost, peak: Peak) -> dict[str, float]:
    """A measured step (seconds) beside its lower bound."""
    floor = cost.seconds(peak)
    return {"step": step, "floor": floor, "ratio": step / floor, **asdict(cost), **asdict(peak)}
