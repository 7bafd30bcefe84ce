"""CUDA graphs: steps of all kinds are padded to sizes captured at start (with a fake recording, on a CPU)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from driver import CPU, Driver
from memory_recording import MemoryRecording
from parity import make_adapter, read_adapter
from support import save

from lora_serve.kernels.contract import GraphBuckets
from lora_serve.kernels.reference import ReferenceKernels
from lora_serve.model.cuda_graphs import EMPTY_BATCH, GRAPH_BYTES, CudaGraphs
from lora_serve.model.graph_buckets import kind_of
from lora_serve.model.input_buffers import BatchShape, InputBuffers
from lora_serve.model.step_executor import EagerSteps

PROMPTS = [[3, 5, 7, 11], [2, 4, 6], [9, 8, 7, 6, 5], [1, 2]]
BLOCKS = 12
Uses = list[list[tuple[str, float]]]
Seen = tuple[int, bool]


class BucketKernels(ReferenceKernels):
    replay = "cuda_graphs"
    graph_buckets = GraphBuckets(
        rows=(1, 2, 4, 8), max_segment_rows=2, max_rank=8, tokens=(4, 8, 16, 32), sequences=(2, 4)
    )

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


def replays(driver: Driver, *, prompts: bool = False) -> list[tuple[int, bool]]:
    """Rows and whether adapted, of every decode step (or step with prompts) that is replayed from now on."""
    seen: list[tuple[int, bool]] = []
    for shape, graph in driver.base._steps._graphs.items():

        def replay(shape: BatchShape = shape, own: Callable[[], None] = graph.recording.replay) -> None:
            if (shape.max_query_len > 1) == prompts:
                seen.append((shape.rows, bool(shape.segments)))
            own()

        graph.recording.replay = replay  # type: ignore[method-assign]
    return seen


def test_buckets_are_captured_up_to_the_first_that_holds_the_largest_batch(pair: tuple[Driver, Driver]) -> None:
    graphs = pair[0].base._steps._graphs
    decode = [shape.rows for shape in graphs if shape.max_query_len == 1]
    assert decode == [1, 1, 2, 2, 4, 4]
    prompts = [(shape.rows, shape.sequences) for shape in graphs if shape.max_query_len > 1 and not shape.segments]
    assert prompts == [(4, 2), (4, 4), (8, 2), (8, 4), (16, 2), (16, 4), (32, 2), (32, 4)]
    assert pair[0].base.token_buckets == [4, 8, 16, 32]


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
    assert graphs.disabled == "steps with prompts and adapters: it branches on values"
    assert len(kernels.made) == 8 + 3 + 1 + 1
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


def teach_in_chunks(
    pair: tuple[Driver, Driver], prompts: list[list[int]], uses: list[Uses] | None = None
) -> list[Seen]:
    """Teach both drivers, whose steps have at most 8 tokens: prompts in chunks, beside sequences that decode.

    Only last rows' logits are wanted, as when serving. Returns the replayed steps with prompts.
    """
    seen = replays(pair[0], prompts=True)
    results = []
    for driver, own in zip(pair, uses or [None, None], strict=True):
        driver.scheduler.max_tokens = 8
        results.append(driver.teach(prompts, 6, own, look_up=True))
    assert pair[0].sequences == pair[1].sequences
    for left, right in zip(*results, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-5)
    return seen


LONG = [[3, 5, 7, 11] * 4, [2, 4, 6], [9, 8, 7, 6, 5] * 3]


def test_steps_with_prompts_are_replayed_beside_sequences_that_decode(pair: tuple[Driver, Driver]) -> None:
    seen = teach_in_chunks(pair, LONG)
    assert seen
    assert set(seen) <= {(4, False), (8, False)}


@pytest.mark.parametrize("tokens", [2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32])
def test_a_prompt_of_any_length_gets_the_eager_logits_from_the_next_bucket(
    pair: tuple[Driver, Driver], tokens: int
) -> None:
    prompt = [3 + token % 50 for token in range(tokens)]
    seen = replays(pair[0], prompts=True)
    got, wanted = (driver.teach([prompt], 2, look_up=True)[0] for driver in pair)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)
    assert seen == [(next(size for size in (4, 8, 16, 32) if size >= tokens), False)]


@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT warns about the head
def test_adapters_in_steps_with_prompts_are_added_to_their_own_rows(
    pair: tuple[Driver, Driver], tmp_path: Path
) -> None:
    targets = ["q_proj", "down_proj", "lm_head"]  # the head has segments of its own
    for seed, rank in enumerate((2, 8)):
        make_adapter("llama", tmp_path / str(seed), seed, peft.LoraConfig(r=rank, target_modules=targets))
    names = [[driver.load_adapter(read_adapter(driver, tmp_path / str(seed))) for seed in range(2)] for driver in pair]
    uses: list[Uses] = [[[(own[0], 1.0)], [], [(own[1], 0.5)]] for own in names]
    seen = teach_in_chunks(pair, LONG, uses)
    assert (8, True) in seen


def test_nan_in_padding_rows_and_in_the_scratch_block_does_not_spread(
    pair: tuple[Driver, Driver], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attention leaves rows of no sequence as the memory was; here that is always NaN."""
    own = ReferenceKernels.attention

    def attention(self: ReferenceKernels, q: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        out = own(self, q, *rest, **options)
        out[int(rest[2].query_start[-1]) :] = float("nan")
        return out

    monkeypatch.setattr(BucketKernels, "attention", attention)
    context = pair[0].base._context
    context.kernels = BucketKernels()
    for pool in (*context.kv.keys, *context.kv.values):
        pool[0] = float("nan")
    seen = teach_in_chunks(pair, LONG)
    assert seen


def test_what_no_bucket_holds_runs_eagerly(pair: tuple[Driver, Driver]) -> None:
    seen = replays(pair[0], prompts=True)
    prompts = [[5] * 33, [7] * 20]
    got, wanted = (driver.teach(prompts, 1) for driver in pair)  # all rows' logits are wanted
    assert not seen
    for left, right in zip(got, wanted, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-5)


def test_a_kind_of_step_that_cannot_be_captured_leaves_the_others(tmp_path: Path) -> None:
    driver = Driver(save("llama", tmp_path / "base"), native=False)
    kernels = BucketKernels()

    def forward(inputs: InputBuffers) -> torch.Tensor:
        if inputs.attention.max_query_len > 1 and kernels.made:
            kernels.made[-1].unsupported = "it waits for the device"
        return driver.base._forward(inputs)

    eager = EagerSteps(forward, driver.device_slots.ranks, CPU)
    driver.base._steps = graphs = CudaGraphs(eager, kernels, kernels.graph_buckets)
    driver.base.prepare(3, 64, BLOCKS)
    assert graphs.disabled == "steps with prompts: it waits for the device"
    assert {kind_of(shape) for shape in graphs._graphs} == {"decode steps", "decode steps with adapters"}
    assert driver.base.token_buckets == []
    seen = replays(driver)
    driver.teach(PROMPTS[:2], 4, look_up=True)
    assert seen


def test_a_pass_that_replays_prompts_wrongly_is_found_and_decode_is_still_replayed(tmp_path: Path) -> None:
    driver = Driver(save("llama", tmp_path / "base"), native=False)
    kernels = BucketKernels()
    passes = iter(range(1, 1000))

    def forward(inputs: InputBuffers) -> torch.Tensor:
        logits = driver.base._forward(inputs)
        return logits * next(passes) if inputs.attention.max_query_len > 1 else logits

    eager = EagerSteps(forward, driver.device_slots.ranks, CPU)
    driver.base._steps = graphs = CudaGraphs(eager, kernels, kernels.graph_buckets)
    driver.base.prepare(3, 64, BLOCKS)
    assert graphs.disabled == "steps with prompts: it depends on more than its input tensors"
    assert {kind_of(shape) for shape in graphs._graphs} == {"decode steps", "decode steps with adapters"}


def test_memory_of_graphs_is_measured_on_the_largest_of_each_kind(pair: tuple[Driver, Driver]) -> None:
    graphs = pair[0].base._steps
    before = dict(graphs._graphs)
    free = iter((5000, 4000))
    assert graphs.graph_memory(3, 64, BLOCKS, 4 * BLOCKS, lambda: next(free)) == 1000 + (len(before) - 4) * GRAPH_BYTES
    assert not graphs._graphs
