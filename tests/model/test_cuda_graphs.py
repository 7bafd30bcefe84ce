"""Decoding steps on a ladder of sizes that were noted at start, as CUDA graphs want it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from driver import CPU, Driver
from memory_recording import MemoryRecording
from parity import bring, make
from support import save

from lora_serve.kernels.contract import GraphBuckets
from lora_serve.kernels.reference import ReferenceKernels
from lora_serve.model.cuda_graphs import NOTHING, CudaGraphs
from lora_serve.model.input_buffers import Bounds, Place, Placed, Sizes

PROMPTS = [[3, 5, 7, 11], [2, 4, 6], [9, 8, 7, 6, 5], [1, 2]]
BLOCKS = 12


class LadderKernels(ReferenceKernels):
    ladder = GraphBuckets(rows=(1, 2, 4, 8), longest=2, rank=8)

    def __init__(self) -> None:
        self.made: list[MemoryRecording] = []

    def tape(self, *, check_values: bool = False) -> MemoryRecording:  # type: ignore[override]
        self.made.append(MemoryRecording())
        return self.made[-1]


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Driver, Driver]:
    """One that plays, one that does not."""
    folder = save("llama", tmp_path / "base")
    played, passed = Driver(folder, native=False), Driver(folder, native=False)
    kernels = LadderKernels()
    played.base._replay = CudaGraphs(played.base._logits, kernels, kernels.ladder, played.device_slots.ranks, CPU)
    played.base.prepare(3, 64, BLOCKS)
    assert played.base._replay.refused is None
    return played, passed


def plays(driver: Driver) -> list[tuple[int, bool]]:
    """Rows and whether adapted, of every step that is played from now on."""
    seen: list[tuple[int, bool]] = []
    for sizes, noted in driver.base._replay._noted.items():

        def play(sizes: object = sizes, own: Callable[[], None] = noted.tape.play) -> None:
            seen.append((sizes.rows, bool(sizes.segments)))  # type: ignore[attr-defined]
            own()

        noted.tape.play = play  # type: ignore[method-assign]
    return seen


def test_rungs_reach_up_to_the_first_that_holds_all(pair: tuple[Driver, Driver]) -> None:
    noted = pair[0].base._replay._noted
    assert sorted({sizes.rows for sizes in noted}) == [1, 2, 4]
    assert len(noted) == 6


@pytest.mark.parametrize("prompts", [1, 2, 3, 4])
def test_a_step_of_the_base_is_played_on_the_smallest_rung_that_holds_it(
    pair: tuple[Driver, Driver], prompts: int
) -> None:
    played, passed = pair
    seen = plays(played)
    got, wanted = played.teach(PROMPTS[:prompts], 8), passed.teach(PROMPTS[:prompts], 8)
    assert {1: (1, False), 2: (2, False), 3: (4, False), 4: (4, False)}[prompts] in seen
    assert not any(adapted for _, adapted in seen)
    for left, right in zip(got, wanted, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-5)


def test_adapters_of_all_ranks_come_and_go_on_the_same_tapes(pair: tuple[Driver, Driver], tmp_path: Path) -> None:
    played = pair[0]
    for seed, rank in enumerate((2, 8, 5, 9)):
        make("llama", tmp_path / str(seed), seed, peft.LoraConfig(r=rank, target_modules=["q_proj", "down_proj"]))
    names = [[driver.load_adapter(bring(driver, tmp_path / str(seed))) for seed in range(4)] for driver in pair]
    seen = plays(played)
    for first, second, third in ([0], [1], [2]), ([1], [1], [1]), ([], [0], []), ([], [], []), ([3], [1], []):
        before = len(seen)
        results = []
        for driver, own in zip(pair, names, strict=True):
            uses = [[(own[index], 0.5) for index in chosen] for chosen in (first, second, third)]
            results.append(driver.teach(PROMPTS[:3], 6, uses))
        for left, right in zip(*results, strict=True):
            torch.testing.assert_close(left, right, rtol=0, atol=1e-5)
        steps = seen[before:]
        assert (3 in first) == (not steps)  # its rank is beyond the ladder's, so it is served without
        assert all(adapted == bool(first + second + third) for _, adapted in steps)


def test_where_adapters_need_a_pass_that_cannot_be_noted_the_base_alone_is_played(tmp_path: Path) -> None:
    driver = Driver(save("llama", tmp_path / "base"), native=False)
    kernels = LadderKernels()

    def run(step: Placed) -> torch.Tensor:
        if step.segments is not None:
            kernels.made[-1].refused = "values steer it"
        return driver.base._logits(step)

    driver.base._replay = rungs = CudaGraphs(run, kernels, kernels.ladder, driver.device_slots.ranks, CPU)
    driver.base.prepare(3, 64, BLOCKS)
    assert rungs.refused == "values steer it"
    assert len(kernels.made) == 3 + 1
    make("llama", tmp_path / "0", 0, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    name = driver.load_adapter(bring(driver, tmp_path / "0"))
    seen = plays(driver)
    driver.teach(PROMPTS[:2], 4)
    assert seen
    seen.clear()
    driver.teach(PROMPTS[:2], 4, [[(name, 1.0)], []])
    assert not seen


def test_what_is_left_of_a_place_is_nobody_s_whatever_lay_in_the_memory() -> None:
    place = Place(Sizes(4, 4, 4, 4, -1, 3), Bounds(2, 8, 1, 12), CPU)
    flat = torch.full((place._table,), 77, dtype=torch.int32)
    blocks = torch.full((4, 3), 77, dtype=torch.int32)
    place._fill(flat, blocks, NOTHING)
    (ids, positions, kv_index, rows), (starts, contexts, begin, end, slot, *_) = place._parts(flat)
    assert (ids.tolist(), positions.tolist(), kv_index.tolist()) == ([0] * 4, [0] * 4, [0] * 4)
    assert (rows.tolist(), starts.tolist(), contexts.tolist()) == ([0, 1, 2, 3], [0, 1, 2, 3, 4], [1] * 4)
    assert (begin.tolist(), end.tolist(), slot.tolist()) == ([0] * 4, [0] * 4, [0] * 4)
    assert blocks[:, 0].tolist() == [0] * 4


def test_a_composition_takes_a_rung_with_room_for_its_segments(pair: tuple[Driver, Driver], tmp_path: Path) -> None:
    for seed in range(3):
        make("llama", tmp_path / str(seed), seed, peft.LoraConfig(r=2, target_modules=["q_proj", "o_proj"]))
    names = [[driver.load_adapter(bring(driver, tmp_path / str(seed))) for seed in range(3)] for driver in pair]
    seen = plays(pair[0])
    results = [
        driver.teach(PROMPTS[:1], 6, [[(name, 0.5) for name in own]]) for driver, own in zip(pair, names, strict=True)
    ]
    torch.testing.assert_close(results[0][0], results[1][0], rtol=0, atol=1e-5)
    assert set(seen) == {(4, True)}
