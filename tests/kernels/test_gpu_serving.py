"""A model on the GPU backend, in Triton's interpreter: mixed batches equal PEFT, with graphs and without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import interpreter  # noqa: F401  (before the kernels)
import peft
import pytest
import torch
from driver import Driver
from memory_recording import MemoryRecording
from parity import logits, make_adapter, read_adapter
from support import reference, save

from lora_serve.kernels.contract import GraphBuckets
from lora_serve.kernels.gpu.backend import GpuKernels
from lora_serve.kernels.gpu.graph_sizes import MAX_RANK, MAX_SEGMENT_ROWS

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT warns about heads and ties

STEP = 17  # tokens; the interpreter is slow
PROMPTS = [[5, 9, 33, 60, 21], [7, 8, 40], [11], list(range(3, 23))]


class KernelsWithFakeGraphs(GpuKernels):
    """The backend with `MemoryRecording` in place of CUDA graphs, and few buckets.

    Args:
        tokens: buckets of steps with prompts.
    """

    def __init__(self, tokens: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.graph_buckets = GraphBuckets((4,), MAX_SEGMENT_ROWS, MAX_RANK, tokens, tokens)
        self.replay = "cuda_graphs"
        self.recordings: list[MemoryRecording] = []

    def new_recording(self, *, check_values: bool) -> MemoryRecording:  # type: ignore[override]
        self.recordings.append(MemoryRecording())
        return self.recordings[-1]


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_mixed_batches_equal_peft(architecture: str, tmp_path: Path) -> None:
    kernels = KernelsWithFakeGraphs((STEP + 1,) if architecture == "llama" else ())
    driver = Driver(save(architecture, tmp_path / "base"), kernels=kernels, max_tokens=STEP)
    assert driver.base._steps.disabled is None
    targets = ["q_proj", "v_proj", "down_proj"]
    models = [reference(architecture)]
    routes: list[list[tuple[str, float]]] = [[]]
    for seed, rank in enumerate((3, 20)):
        config = peft.LoraConfig(r=rank, target_modules=targets)
        models.append(make_adapter(architecture, tmp_path / str(seed), seed, config))
        routes.append([(driver.load_adapter(read_adapter(driver, tmp_path / str(seed))), 1.0)])
    which = [1, 0, 2, 1]
    rows = driver.teach(PROMPTS, decode=3, adapters=[routes[index] for index in which])
    for index, tokens, got in zip(which, driver.sequences, rows, strict=True):
        torch.testing.assert_close(got, logits(models[index], tokens), atol=1e-4, rtol=1e-4)
    half = len(kernels.recordings) // 2
    plain, adapted = kernels.recordings[:half], kernels.recordings[half:]
    assert len(adapted) == (2 if architecture == "llama" else 1)
    # Of prompts, which come in two chunks, the second beside sequences that decode; and of decoding steps.
    assert all(each.replays >= 2 for each in adapted)
    before = [each.replays for each in plain]
    driver.teach(PROMPTS[:2], decode=2)
    assert all(each.replays > replays for each, replays in zip(plain, before, strict=True))


@pytest.mark.parametrize("scheme", ["int8", "int4", pytest.param("fp8", marks=pytest.mark.slow)])
def test_a_quantized_base_equals_the_reference(scheme: Any, tmp_path: Path) -> None:
    folder = save("llama", tmp_path / "base")
    got = Driver(folder, kernels=KernelsWithFakeGraphs(), scheme=scheme, max_tokens=STEP).teach(PROMPTS[:2], decode=2)
    wanted = Driver(folder, native=False, scheme=scheme, max_tokens=STEP).teach(PROMPTS[:2], decode=2)
    for left, right in zip(got, wanted, strict=True):
        assert (left - right).norm() / right.norm() < 2e-2  # a value halfway between two integers may round differently
