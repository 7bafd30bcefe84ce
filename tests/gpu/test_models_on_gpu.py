"""Whole models on the GPU: every architecture, with graphs and without, adapters loaded and evicted between replays."""

from __future__ import annotations

import copy
import gc
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from driver import Driver
from gpu_device import DEVICE, ON_GPU, gpu_only, here, sized
from parity import load_peft, logits, make_adapter, read_adapter
from support import ARCHITECTURES, COMMON, reference, save
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from lora_serve.kernels.contract import GraphBuckets
from lora_serve.kernels.gpu.backend import GpuKernels
from lora_serve.kernels.packed_weight import Scheme
from lora_serve.kernels.select import refuse_scheme

pytestmark = [*here, pytest.mark.filterwarnings("ignore::UserWarning")]  # PEFT warns

PROMPTS = [[3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37], [2, 4, 6], [9, 8, 7, 6, 5], [1, 2]]
DECODE = 8 if ON_GPU else 2
BOTH = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Graphs(GpuKernels):
    """The backend as served, with few graph buckets, so that it starts quickly."""

    graph_buckets = (
        GraphBuckets((1, 2, 4, 8), 16, 64, (4, 8, 16, 23), (4, 23))
        if ON_GPU
        else GraphBuckets((1, 4), 16, 64, (23,), (23,))
    )


class NoGraphs(GpuKernels):
    """The same kernels without CUDA graphs."""

    def __init__(self) -> None:
        super().__init__()
        self.replay = "none"


def driver(folder: Path, kernels: GpuKernels | None = None, dtype: str = "float32") -> Driver:
    return Driver(folder, dtype=dtype, device=DEVICE, kernels=kernels or Graphs(), max_tokens=23)


def recordings(driver: Driver) -> list[int]:
    """The identity of every captured graph; none in the interpreter."""
    return [id(graph.recording) for graph in getattr(driver.base._steps, "_graphs", {}).values()]


def assert_alike(got: list[Tensor], wanted: list[Tensor], tolerance: float) -> None:
    for left, right in zip(got, wanted, strict=True):
        torch.testing.assert_close(left.float().cpu(), right.float().cpu(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("architecture", sized(list(ARCHITECTURES), ["gemma2"]))
def test_logits_equal_transformers_with_graphs_and_without(architecture: str, tmp_path: Path) -> None:
    folder = save(architecture, tmp_path / "base")
    graphs, plain = driver(folder), driver(folder, NoGraphs())
    assert bool(recordings(graphs)) == ON_GPU
    got, wanted = (each.teach(PROMPTS, DECODE) for each in (graphs, plain))
    assert graphs.sequences == plain.sequences
    assert_alike(got, wanted, 1e-4)
    assert_alike(got, [logits(reference(architecture), tokens) for tokens in graphs.sequences], 1e-3)


@pytest.mark.parametrize(
    ("architecture", "dtype"),
    sized([("llama", "float32"), ("llama", "bfloat16"), ("qwen3", "bfloat16")], [("llama", "float32")]),
)
def test_a_mixed_batch_equals_peft(architecture: str, dtype: str, tmp_path: Path) -> None:
    kind = getattr(torch, dtype)
    served = driver(save(architecture, tmp_path / "base"), dtype=dtype)
    routes: list[list[tuple[str, float]]] = [[]]
    for seed, rank in enumerate((4, 16, 40)):
        make_adapter(architecture, tmp_path / str(seed), seed, peft.LoraConfig(r=rank, target_modules=BOTH))
        routes.append([(served.load_adapter(read_adapter(served, tmp_path / str(seed))), 1.0)])
    models: list[Any] = [copy.deepcopy(reference(architecture)).to(kind)]
    models += [load_peft(architecture, tmp_path / str(seed), kind) for seed in range(3)]
    rows = served.teach(PROMPTS, DECODE, routes)
    for model, tokens, got in zip(models, served.sequences, rows, strict=True):
        wanted, base = logits(model, tokens).float(), logits(models[0], tokens).float()
        apart = float((got.float().cpu() - wanted).norm() / wanted.norm())
        assert apart < (1e-4 if kind is torch.float32 else 5e-2)
        if model is not models[0]:
            assert float((base - wanted).norm() / wanted.norm()) > 0.1, "an adapter that changes little proves little"


def test_adapters_are_loaded_and_evicted_between_replays_of_the_same_graphs(tmp_path: Path) -> None:
    folder = save("llama", tmp_path / "base")
    served, plain = driver(folder), Driver(folder, native=False, max_tokens=23)
    for seed, rank in enumerate((8, 64, 2)):
        make_adapter("llama", tmp_path / str(seed), seed, peft.LoraConfig(r=rank, target_modules=BOTH[seed:]))
    graphs = recordings(served)
    slots = []
    for seed in range(3 if ON_GPU else 2):
        names = [each.load_adapter(read_adapter(each, tmp_path / str(seed))) for each in (served, plain)]
        slots.append(served.slots[names[0]])
        results = [
            each.teach(PROMPTS[:3], DECODE, [[(name, 1.0)], [], [(name, 0.5)]])
            for each, name in zip((served, plain), names, strict=True)
        ]
        assert served.sequences == plain.sequences
        assert_alike(*results, 1e-3)
        for each, name in zip((served, plain), names, strict=True):
            each.device_slots.evict(each.slots[name])
    assert len(set(slots)) == 1
    assert recordings(served) == graphs


@gpu_only
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_steps_with_prompts_replayed_from_graphs_equal_eager_ones(dtype: str, tmp_path: Path) -> None:
    """Prompts in chunks beside sequences that decode, with and without adapters, at every border of the buckets."""
    folder = save("llama", tmp_path / "base")
    graphs, plain = driver(folder, dtype=dtype), driver(folder, NoGraphs(), dtype)
    make_adapter("llama", tmp_path / "a", 0, peft.LoraConfig(r=8, target_modules=BOTH))
    names = [each.load_adapter(read_adapter(each, tmp_path / "a")) for each in (graphs, plain)]
    replayed = []
    for shape, step in graphs.base._steps._graphs.items():

        def replay(shape: Any = shape, own: Any = step.recording.replay) -> None:
            replayed.append(shape)
            own()

        step.recording.replay = replay
    tolerance = 1e-4 if dtype == "float32" else 5e-2
    for most in (3, 4, 5, 8, 9, 16, 17, 23):
        prompts = [[3 + (7 * token + most) % 50 for token in range(length)] for length in (41, 2, 9)]
        for adapted in (False, True):
            results = []
            for each, name in zip((graphs, plain), names, strict=True):
                each.scheduler.max_tokens = most
                uses = [[(name, 1.0)], [], [(name, 0.5)]] if adapted else None
                results.append(each.teach(prompts, 1, uses))
            assert_alike(*results, tolerance)
    kinds = {(shape.rows, bool(shape.segments)) for shape in replayed if shape.max_query_len > 1}
    assert kinds == {(rows, adapted) for rows in (4, 8, 16, 23) for adapted in (False, True)}


@gpu_only
def test_a_model_whose_pass_depends_on_values_is_served_without_graphs(tmp_path: Path) -> None:
    served = driver(save("mixtral", tmp_path / "base"))
    got = served.teach(PROMPTS, DECODE)
    assert_alike(got, [logits(reference("mixtral"), tokens) for tokens in served.sequences], 1e-3)


@gpu_only
def test_memory_of_an_evicted_adapter_is_freed(tmp_path: Path) -> None:
    served = driver(save("llama", tmp_path / "base"))
    make_adapter("llama", tmp_path / "a", 0, peft.LoraConfig(r=64, target_modules=BOTH))
    taken = []
    for _ in range(3):
        adapter = read_adapter(served, tmp_path / "a")
        name = served.load_adapter(adapter)
        torch.cuda.synchronize()
        resident = torch.cuda.memory_allocated()
        served.teach(PROMPTS[:1], DECODE, [[(name, 1.0)]])
        served.device_slots.evict(served.slots[name])
        gc.collect()
        torch.cuda.synchronize()
        taken.append(torch.cuda.memory_allocated())
        assert resident - taken[-1] >= adapter.nbytes or len(taken) == 1  # the first pass leaves the libraries' scratch
    assert taken[1] == taken[2]


@gpu_only
@pytest.mark.parametrize("scheme", ["int8", "fp8"])
def test_a_base_is_quantised_without_being_there_in_full_precision(scheme: Scheme, tmp_path: Path) -> None:
    if reason := refuse_scheme(scheme, DEVICE):
        pytest.skip(reason)
    shape = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 20, "num_attention_heads": 8}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**COMMON | shape), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    Driver(tmp_path, dtype="bfloat16", device=DEVICE, scheme=scheme, max_tokens=23, kernels=NoGraphs())
    peak = torch.cuda.max_memory_allocated() - before
    assert peak < 0.85 * sum(parameter.nbytes for parameter in model.parameters())  # packed they are half
