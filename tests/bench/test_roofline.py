"""The roofline of a decode step follows from the files' sizes and the machine's peaks."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from bench import roofline
from bench.make_model import make_adapter, make_model
from bench.shapes import SHAPES

TINY = SHAPES["tiny"]


def test_a_step_reads_every_weight_once_each_adapter_once_and_all_kv(tmp_path: Path) -> None:
    make_model(TINY, tmp_path / "model")
    for name in ("a", "b"):
        make_adapter(TINY, tmp_path / name, rank=4, seed=1, targets=["q_proj"])
    kv = TINY.kv_heads * TINY.head_dim
    layer = 2 * TINY.hidden**2 + 2 * TINY.hidden * kv + 3 * TINY.hidden * TINY.intermediate
    layer += TINY.hidden + 2 * kv + 2 * TINY.hidden  # biases and norms
    weights = TINY.vocabulary * TINY.hidden + TINY.hidden + TINY.layers * layer
    adapter = TINY.layers * 4 * 2 * TINY.hidden
    a, b = tmp_path / "a", tmp_path / "b"
    cost = roofline.decode_cost(tmp_path / "model", [a, b, b], batch=3, context=10, itemsize=2)
    assert cost.nbytes == 2 * (weights + 2 * adapter + 3 * 10 * TINY.layers * 2 * kv)
    assert cost.operations == 2 * (3 * weights + 3 * adapter) + 3 * 10 * TINY.layers * 4 * TINY.hidden

    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    untied = roofline.decode_cost(tmp_path / "model", [], batch=3, context=0, itemsize=2)
    assert untied.nbytes == 2 * (weights - TINY.vocabulary * TINY.hidden)


def test_the_lower_bound_is_the_larger_of_bandwidth_and_compute_time() -> None:
    cost = roofline.StepCost(nbytes=100.0, operations=1000.0)
    assert cost.seconds(roofline.Peak(bandwidth=10.0, flops=1000.0)) == 10.0
    assert cost.seconds(roofline.Peak(bandwidth=1000.0, flops=10.0)) == 100.0
    assert roofline.compare(15.0, cost, roofline.Peak(10.0, 1000.0))["ratio"] == 1.5


def test_the_peak_of_this_machine_is_plausible() -> None:
    peak = roofline.measure_peak(torch.device("cpu"), torch.bfloat16)
    assert 1e8 < peak.bandwidth < 1e13
    assert 1e8 < peak.flops < 1e15
