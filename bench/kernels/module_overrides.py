"""Cost of adapters that do more than LoRA (gains, biases, norms, embeddings), and none for batches without them.

    python -m bench.kernels.module_overrides

One decode step of eight rows, each with its own adapter (rank 16 on all linear modules), on six layers of the 0.5B
shape in bf16. The cases are run in turns, so that noise of the machine affects all alike; figures are medians, ratios
are to the first case. The last line is JSON.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from bench.machine import describe
from bench.make_model import make_model
from bench.report import json_line, number, table
from bench.shapes import SHAPES
from lora_serve.adapters.adapter import BaseShape, Lowered, ModuleOverride, flatten
from lora_serve.adapters.device_slots import DeviceSlots
from lora_serve.kernels.contract import Delta
from lora_serve.kernels.select import select
from lora_serve.kv.tensors import KVTensors
from lora_serve.model.base import ResidentBase
from lora_serve.model.batch import AdapterRows, Batch
from lora_serve.model.load import load

CPU = torch.device("cpu")
ROWS = 8
SHAPE = replace(SHAPES["qwen2.5-0.5b"], layers=6, vocabulary=2048)
Changing = Callable[[BaseShape], dict[str, ModuleOverride]]


@dataclass(frozen=True)
class Cost:
    """Median step of a case, and its ratio to plain LoRA with no other adapters on the device."""

    what: str
    step_us: float
    ratio: float


def gains(shape: BaseShape) -> dict[str, ModuleOverride]:
    """As in DoRA, or IA³ with a bias: an output gain and a constant on every linear module."""
    sites = [site for site in shape.sites.values() if site.name != shape.head]
    return {
        site.name: ModuleOverride(gain_out=torch.rand(site.out_features) + 0.5, shift=torch.rand(site.out_features))
        for site in sites
    }


def norms(shape: BaseShape) -> dict[str, ModuleOverride]:
    """As in LN tuning: every norm's weight replaced."""
    names = [name for name in shape.modules if name.endswith("norm")]
    return {name: ModuleOverride(parameters={"weight": torch.rand(shape.modules[name]["weight"])}) for name in names}


def lookup(shape: BaseShape) -> dict[str, ModuleOverride]:
    """LoRA on the embedding."""
    ids, width = shape.modules[shape.input_embedding]["weight"]
    return {shape.input_embedding: ModuleOverride(lookup=Delta(torch.rand(ids, 16), torch.rand(16, width)))}


CASES: dict[str, Changing] = {
    "output gains and constants everywhere": gains,
    "every norm replaced": norms,
    "low-rank embedding": lookup,
}


class Bench:
    """A base with eight plain LoRA adapters, and on request eight more per case."""

    def __init__(self, folder: Path) -> None:
        loaded = load(str(folder), revision=None, dtype="bfloat16", device=CPU, progress=lambda stage, done: None)
        self.device_slots = DeviceSlots(loaded.shape, ROWS * (1 + len(CASES)), loaded.dtype, CPU)
        self._base = ResidentBase(
            loaded, self.device_slots, select(CPU), KVTensors(loaded.layers, 64, 16, loaded.dtype, CPU)
        )
        self._base.pack()
        self._shape = loaded.shape
        self.plain = self._load("plain", lambda shape: {})

    def load_cases(self) -> dict[str, list[int]]:
        """Load the adapters of all cases; their slots by case."""
        return {name: self._load(name, changing) for name, changing in CASES.items()}

    def _load(self, name: str, changing: Changing) -> list[int]:
        slots = []
        for index in range(ROWS):
            deltas = {
                site.name: Delta(torch.randn(16, site.in_features) * 0.03, torch.randn(16, site.out_features) * 0.02)
                for site in self._shape.sites.values()
                if site.name != self._shape.head
            }
            lowered = Lowered(deltas, {}, changing(self._shape))
            slots.append(self.device_slots.load(flatten(f"{name} {index}", lowered, torch.bfloat16)))
        return slots

    def step(self, slots: list[int]) -> float:
        """Seconds of one forward pass with a row for each slot."""
        adapter_rows = [AdapterRows(row, row + 1, slot, 1.0) for row, slot in enumerate(slots)]
        batch = Batch(
            token_ids=range(ROWS),
            positions=[0] * ROWS,
            kv_index=range(16, 16 * (ROWS + 1), 16),
            query_start=range(ROWS + 1),
            context=[1] * ROWS,
            block_tables=[[row + 1] for row in range(ROWS)],
            logits_rows=range(ROWS),
            adapter_rows=adapter_rows,
            logits_adapter_rows=adapter_rows,
        )
        begin = time.perf_counter()
        self._base.forward(batch)
        return time.perf_counter() - begin


def measure(repeats: int) -> list[Cost]:
    """Costs of all cases, the plain ones first; medians over `repeats` steps each."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        make_model(SHAPE, Path(folder) / "model")
        lone, full = Bench(Path(folder) / "model"), Bench(Path(folder) / "model")
        cases = {
            "plain LoRA alone": (lone, lone.plain),
            "plain LoRA beside loaded adapters of all cases": (full, full.plain),
        }
        cases |= {name: (full, slots) for name, slots in full.load_cases().items()}
        taken: dict[str, list[float]] = {name: [] for name in cases}
        for turn in range(3 + repeats):
            for name, (bench, slots) in cases.items():
                if (seconds := bench.step(slots)) and turn >= 3:
                    taken[name].append(seconds)
    medians = {name: statistics.median(each) for name, each in taken.items()}
    base = next(iter(medians.values()))
    return [Cost(name, seconds * 1e6, seconds / base) for name, seconds in medians.items()]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=40)
    args = parser.parse_args(arguments)
    costs = measure(args.repeats)
    rows = [[cost.what, number(cost.step_us, 1), number(cost.ratio, 2)] for cost in costs]
    print(table([f"decode step, {ROWS} adapters, {SHAPE.layers} layers", "µs", "ratio"], rows))
    print(json_line({"bench": "module_overrides", "machine": describe(), "rows": [asdict(cost) for cost in costs]}))


if __name__ == "__main__":
    main()
