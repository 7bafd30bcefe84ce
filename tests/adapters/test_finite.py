"""Adapters of finite numbers whose effect overflows are refused at publish, naming the module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft_folders import BASE, PREFIX, tensors, write
from torch import Tensor

from lora_serve.adapters.adapter import Lowered, ModuleOverride, Prefix
from lora_serve.adapters.checkpoint import read
from lora_serve.adapters.finite import check_finite
from lora_serve.adapters.formats.dispatch import lower
from lora_serve.adapters.lowering_job import LoweringContext, LoweringJob, run
from lora_serve.errors import AdapterInvalid
from lora_serve.kernels.contract import Delta

Q = "layers.0.q_proj"


def scaled(a: float, b: float) -> dict[str, Tensor]:
    """The usual weights, those of one module scaled."""
    factors = {f"{PREFIX}{Q}.lora_A.weight": a, f"{PREFIX}{Q}.lora_B.weight": b}
    return {name: tensor.clamp(-1, 1) * factors.get(name, 1.0) for name, tensor in tensors().items()}


TOO_LARGE: dict[str, tuple[torch.dtype, float, float, dict[str, Any]]] = {
    "scaling": (torch.float32, 1.0, 3.4e38, {"lora_alpha": 999_999}),
    "product": (torch.float32, 1e30, 1e30, {}),
    "product in bfloat16": (torch.bfloat16, 1e30, 1e30, {}),
    "cast": (torch.float16, 1.0, 1e5, {}),
    "product in float16": (torch.float16, 1e3, 1e3, {}),
}


@pytest.mark.parametrize("what", TOO_LARGE)
def test_a_delta_that_overflows_is_refused(what: str, tmp_path: Path) -> None:
    dtype, a, b, fields = TOO_LARGE[what]
    lowered = lower(read(write(tmp_path, scaled(a, b), **fields), max_bytes=1 << 20), BASE)
    with pytest.raises(
        AdapterInvalid, match=rf"not finite in {str(dtype).removeprefix('torch.')}, at layers\.0\.q_proj:"
    ):
        check_finite(lowered, dtype)


def test_large_numbers_that_fit_are_served(tmp_path: Path) -> None:
    lowered = lower(read(write(tmp_path, scaled(1e4, 1e4)), max_bytes=1 << 20), BASE)
    check_finite(lowered, torch.bfloat16)
    check_finite(lower(read(write(tmp_path / "b", scaled(1e2, 10)), max_bytes=1 << 20), BASE), torch.float16)


HELD: dict[str, Lowered] = {
    "gain": Lowered({}, {}, {"norm": ModuleOverride(gain_out=torch.tensor([1e5]))}),
    "shift": Lowered({}, {}, {"norm": ModuleOverride(shift=torch.tensor([-1e5]))}),
    "parameter": Lowered({}, {}, {"norm": ModuleOverride(parameters={"weight": torch.tensor([1e5])})}),
    "lookup": Lowered({}, {}, {"norm": ModuleOverride(lookup=Delta(torch.ones(2, 1), torch.full((1, 2), 1e5)))}),
    "nan": Lowered({}, {}, {"norm": ModuleOverride(parameters={"weight": torch.tensor([torch.nan])})}),
    "prefix": Lowered({}, {}, prefix=Prefix(1, torch.full((1, 2), 1e5))),
}


@pytest.mark.parametrize("what", HELD)
def test_whatever_else_overflows_is_refused(what: str) -> None:
    with pytest.raises(AdapterInvalid, match="the virtual tokens" if what == "prefix" else "norm"):
        check_finite(HELD[what], torch.float16)
    if what != "nan":
        check_finite(HELD[what], torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_it_is_checked_in_the_serving_dtype_when_an_adapter_is_published(dtype: torch.dtype, tmp_path: Path) -> None:
    job = LoweringJob(str(write(tmp_path / "a", scaled(1.0, 1e5))))
    context = LoweringContext(BASE, "a base", dtype, 1 << 20, 1 << 20)
    if dtype == torch.float16:
        with pytest.raises(AdapterInvalid, match=r"float16, at layers\.0\.q_proj"):
            run(job, context)
    else:
        assert run(job, context).summary.rank == 4
