"""A base that is quantised on a device: it is never there in full precision, and serves what it does on a CPU."""

from __future__ import annotations

import gc
from math import prod
from pathlib import Path

import pytest
import torch
from driver import Driver
from second_device import DEVICE, second_device
from support import COMMON, EXPERTS, uncentred
from transformers import LlamaConfig, PretrainedConfig

from lora_serve.kernels.packed_weight import Scheme
from lora_serve.kernels.reference import ReferenceKernels

PROMPT = [5, 9, 33, 60, 21]


def largest_group(driver: Driver) -> int:
    """Bytes of the weights that are packed together, before they are quantised."""
    sites = driver.loaded.shape.sites
    sizes: dict[str, int] = {}
    for names in driver.loaded.shape.groups:
        packed = names[0].partition("[")[0]  # all experts of a layer are one tensor
        sizes[packed] = sizes.get(packed, 0) + sum(sites[name].in_features * sites[name].out_features for name in names)
    return 2 * max(sizes.values())


@pytest.mark.parametrize(
    ("config", "scheme"),
    [
        pytest.param(LlamaConfig(**COMMON | {"num_hidden_layers": 2}), "int4", id="llama"),
        pytest.param(LlamaConfig(**COMMON | {"num_hidden_layers": 2}), "fp8", id="llama in fp8"),
        pytest.param(EXPERTS["mixtral"], "int8", id="mixtral", marks=pytest.mark.slow),
    ],
)
def test_a_device_holds_one_group_of_modules_in_full_precision_at_a_time(
    config: PretrainedConfig, scheme: Scheme, tmp_path: Path
) -> None:
    model = uncentred(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    wanted = Driver(tmp_path, dtype="bfloat16", scheme=scheme, kernels=ReferenceKernels()).teach([PROMPT], decode=2)[0]
    with second_device() as memory:
        driver = Driver(tmp_path, dtype="bfloat16", scheme=scheme, device=DEVICE, kernels=ReferenceKernels())
        gc.collect()  # probes of modules, in cycles
        stays = memory.copied
        got = driver.teach([PROMPT], decode=2)[0].cpu()
    quantized = {name for name in driver.loaded.shape.sites if not name.endswith("]")}
    own = sum(
        2 * prod(each.shape)
        for name, each in model.named_parameters()
        if name.removesuffix(".weight") not in quantized and ".experts." not in name
    )
    assert stays == own
    assert 1 <= (memory.peak - stays) / largest_group(driver) < 1.1  # and some probes
    assert torch.equal(got, wanted)
