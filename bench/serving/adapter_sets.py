"""Sets of PEFT adapters for the adapter laws, made in seconds: those of a rank differ in two numbers only.

Speed depends on sizes, not on values, but every adapter needs a digest of its own.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from bench.make_model import adapter_weights, write_adapter
from bench.shapes import Shape

WEIGHTS = "adapter_model.safetensors"
STEP = 2.0**-12  # multiples of it up to 256 are exact in bf16
# Modules of the adapters of a large set, from most to fewest bytes.
SMALLER: tuple[tuple[str, ...] | None, ...] = (None, ("q_proj", "v_proj"), ("v_proj",))


class AdapterMaker:
    """Writes adapters for a model of this shape into `folder`, each with a number of its own."""

    def __init__(self, shape: Shape, folder: Path) -> None:
        self.shape, self.folder = shape, folder
        self._made = 0
        self._weights = cache(self._random_weights)

    def make(
        self,
        name: str,
        rank: int,
        *,
        targets: tuple[str, ...] | None = None,
        dtype: torch.dtype = torch.bfloat16,
        init_lora_weights: str | bool = True,
        folder: Path | None = None,
    ) -> Path:
        """Write one adapter; returns its folder, in `folder` or the one given."""
        weights = self._weights(rank, targets, dtype)
        number(weights, self._made)
        self._made += 1
        path = (folder or self.folder) / name
        write_adapter(path, weights, init_lora_weights=init_lora_weights)
        return path

    def size(self, rank: int, targets: tuple[str, ...] | None) -> int:
        """Bytes of an adapter's bf16 weights."""
        sites = {name.rpartition(".")[2]: size for name, size in self.shape.linears().items()}
        chosen = [size for name, size in sites.items() if targets is None or name in targets]
        return 2 * self.shape.layers * rank * sum(inputs + outputs for inputs, outputs in chosen)

    def targets_within(self, limit: int, ranks: Sequence[int]) -> tuple[str, ...] | None:
        """All linear modules, or fewer if adapters of these ranks would take more bytes than `limit` together."""
        fitting = (each for each in SMALLER if sum(self.size(rank, each) for rank in ranks) <= limit)
        return next(fitting, SMALLER[-1])

    def _random_weights(self, rank: int, targets: tuple[str, ...] | None, dtype: torch.dtype) -> dict[str, Tensor]:
        weights = adapter_weights(self.shape, rank=rank, seed=rank, targets=targets)
        return {name: tensor.to(dtype) for name, tensor in weights.items()}


def number(weights: dict[str, Tensor], which: int) -> None:
    """Write a number below 65,536 into two elements of the last tensor, in place."""
    last = next(reversed(weights.values())).view(-1)
    for index, digit in enumerate(divmod(which, 256)):
        last[index] = STEP * (1 + digit)


def elements(folder: Path) -> int:
    """Number of elements of an adapter's tensors."""
    with safe_open(folder / WEIGHTS, "pt") as opened:
        return sum(math.prod(opened.get_slice(key).get_shape()) for key in opened.keys())  # noqa: SIM118, not a mapping


def copy_to_disk(source: Path, target: Path) -> None:
    """Read every file below a folder and write it to another one, down to the disk."""
    for path in files(source):
        copy = target / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        with copy.open("wb") as file:
            file.write(path.read_bytes())
            file.flush()
            os.fsync(file.fileno())


def files(folder: Path) -> Iterator[Path]:
    """All files below a folder."""
    return (path for path in sorted(folder.rglob("*")) if path.is_file())
