"""CUDA graphs: decode batches are padded to batch sizes captured at start (with a fake recording, on a CPU)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from driver import CPU, Driver
from memory_recording import MemoryRecording
from parity import make_adapter, read_adapter
from support import save

from lora_serve.kernels.contract import GraphBuckets
from lora_serve.kernels.reference import ReferenceKernels
from lora_serve.model.cuda_graphs import EMPTY_BATCH, CudaGraphs
from lora_serve.model.input_buffers import BatchShape, InputBuffers
from lora_serve.model.step_executor import EagerSteps

PROMPTS = [[3, 5, 7, 11], [2, 4, 6], [9, 8, 7, 6, 5], [1, 2]]
BLOCKS = 12


class BucketKernels(ReferenceKernels):
    replay = "cuda_graphs"
    graph_buckets = GraphBuckets(rows=(1, 2, 4, 8), max_segment_rows=2, max_rank=8)

    def __init__(self) -> None:
        self.made: list[MemoryRecording] = []

    def new_recording(self, *, check_values: bool) -> MemoryRecording:
        self.made.append(MemoryRecording())
        return self.made[-1]


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Driver, Driver]:
    """One driver that replays steps and one that does not."""
    folder = save("llama", tmp_path / "base")
    replayed, eager_driver = Driver(folder, native=False), Driver(folder, native=False)
    kernels = BucketKernels()
    replayed.base._steps = CudaGraphs(replayed.base._eager, kernels, kernels.graph_buckets)
    replayed.base.prepare(3, 64, BLOCKS)
    assert replayed.base._steps.disabled is None
    return replayed, eager_driver


def replays(driver: Driver) -> list[tuple[int, bool]]:
    """Rows and whether adapted, of every step that is replayed from now on."""
    seen: list[tuple[int, bool]] = []
    for shape, graph in driver.base._steps._graphs.items():

        def replay(shape: BatchShape = shape, own: Callable[[], None] = graph.recording.replay) -> None:
            seen.append((shape.rows, bool(shape.segments)))
            own()

        graph.recording.replay = replay  # type: ignore[method-assign]
    return seen


def test_buckets_are_captured_up_to_the_first_that_holds_the_largest_batch(pair: tuple[Driver, Driver]) -> None:
    graphs = pair[0].base._steps._graphs
    assert sorted({shape.rows for shape in graphs}) == [1, 2, 4]
    assert len(graphs) == 6


@pytest.mark.parametrize("prompts", [1, 2, 3, 4])
def test_a_step_of_the_base_is_replayed_in_the_smallest_bucket_that_holds_it(
    pair: tuple[Driver, Driver], prompts: int
) -> None:
    replayed, eager_driver = pair
    seen = replays(replayed)
    got, wanted = replayed.teach(PROMPTS[:prompts], 8), eager_driver.teach(PROMPTS[:prompts], 8)
    assert {1: (1, False), 2: (2, False), 3: (4, False), 4: (4, False)}[prompts] in seen
    assert not any(adapted for _, adapted in seen)
    for left, right in zip(got, wanted, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-5)


def test_graphs_stay_valid_while_adapters_of_all_ranks_are_loaded_and_evicted(
    pair: tuple[Driver, Driver], tmp_path: Path
) -> None:
    replayed = pair[0]
    for seed, rank in enumerate((2, 8, 5, 9)):
        make_adapter(
            "llama", tmp_path / str(seed), seed, peft.LoraConfig(r=rank, target_modules=["q_proj", "down_proj"])
        )
    names = [[driver.load_adapter(read_adapter(driver, tmp_path / str(seed))) for seed in range(4)] for driver in pair]
    seen = replays(replayed)
    for first, second, third in ([0], [1], [2]), ([1], [1], [1]), ([], [0], []), ([], [], []), ([3], [1], []):
        before = len(seen)
        results = []
        for driver, own in zip(pair, names, strict=True):
            uses = [[(own[index], 0.5) for index in chosen] for chosen in (first, second, third)]
            results.append(driver.teach(PROMPTS[:3], 6, uses))
        for left, right in zip(*results, strict=True):
            torch.testing.assert_close(left, right, rtol=0, atol=1e-5)
        steps = seen[before:]
        assert (3 in first) == (not steps)  # its rank is beyond the buckets', so it is served eagerly
        assert all(adapted == bool(first + second + third) for _, adapted in steps)


def test_if_passes_with_adapters_cannot_be_captured_the_base_alone_is_replayed(tmp_path: Path) -> None:
    driver = Driver(save("llama", tmp_path / "base"), native=False)
    kernels = BucketKernels()

    def forward(inputs: InputBuffers) -> torch.Tensor:
        if inputs.segments is not None:
            kernels.made[-1].unsupported = "it branches on values"
        return driver.base._forward(inputs)

    eager = EagerSteps(forward, driver.device_slots.ranks, CPU)
    driver.base._steps = graphs = CudaGraphs(eager, kernels, kernels.graph_buckets)
    driver.base.prepare(3, 64, BLOCKS)
    assert graphs.disabled == "it branches on values"
    assert len(kernels.made) == 3 + 1
    make_adapter("llama", tmp_path / "0", 0, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    name = driver.load_adapter(read_adapter(driver, tmp_path / "0"))
    seen = replays(driver)
    driver.teach(PROMPTS[:2], 4)
    assert seen
    seen.clear()
    driver.teach(PROMPTS[:2], 4, [[(name, 1.0)], []])
    assert not seen


def test_padding_rows_belong_to_no_sequence_whatever_the_memory_held_before() -> None:
    buffers = InputBuffers(BatchShape(4, 4, 4, 4, -1, 3, 2, 8, 1, 12), CPU)
    flat = torch.full((buffers._table,), 77, dtype=torch.int32)
    blocks = torch.full((4, 3), 77, dtype=torch.int32)
    buffers._fill(flat, blocks, EMPTY_BATCH)
    (ids, positions, kv_index, rows), (starts, contexts, begin, end, slot, *_) = buffers._split(flat)
    assert (ids.tolist(), positions.tolist(), kv_index.tolist()) == ([0] * 4, [0] * 4, [0] * 4)
    assert (rows.tolist(), starts.tolist(), contexts.tolist()) == ([0, 1, 2, 3], [0, 1, 2, 3, 4], [1] * 4)
    assert (begin.tolist(), end.tolist(), slot.tolist()) == ([0] * 4, [0] * 4, [0] * 4)
    assert blocks[:, 0].tolist() == [0] * 4


def test_a_composition_uses_a_bucket_that_holds_all_its_segments(pair: tuple[Driver, Driver], tmp_path: Path) -> None:
    for seed in range(3):
        make_adapter("llama", tmp_path / str(seed), seed, peft.LoraConfig(r=2, target_modules=["q_proj", "o_proj"]))
    names = [[driver.load_adapter(read_adapter(driver, tmp_path / str(seed))) for seed in range(3)] for driver in pair]
    seen = replays(pair[0])
    results = [
        driver.teach(PROMPTS[:1], 6, [[(name, 0.5) for name in own]]) for driver, own in zip(pair, names, strict=True)
    ]
    torch.testing.assert_close(results[0][0], results[1][0], rtol=0, atol=1e-5)
    assert set(seen) == {(4, True)}
