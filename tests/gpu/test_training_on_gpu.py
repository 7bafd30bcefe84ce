"""Adapters trained on the GPU have the losses of the same steps on a CPU, also over a quantised base."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gpu_device import DEVICE, ON_GPU, here
from support import VOCABULARY, save
from training_driver import TrainingDriver, examples

from lora_serve.engine.training.method_settings import AdapterSettings
from lora_serve.engine.training.micro_batch import MicroBatch
from lora_serve.engine.training.training_settings import LoraSettings
from lora_serve.engine.training.virtual_token_settings import PrefixTuningSettings, PTuningSettings
from lora_serve.kernels.gpu.backend import GpuKernels
from lora_serve.kernels.packed_weight import Scheme
from lora_serve.kernels.reference import ReferenceKernels
from lora_serve.kernels.select import refuse_scheme

pytestmark = here
STEPS = 4 if ON_GPU else 2
SETTINGS: tuple[AdapterSettings, ...] = (
    LoraSettings(r=4, lora_alpha=8, seed=1),
    LoraSettings(r=16, lora_alpha=16, seed=2),
    PTuningSettings(4, "LSTM", 16),
    PrefixTuningSettings(4, prefix_projection=True),
)


def losses(driver: TrainingDriver) -> list[list[float]]:
    """Losses of adapters by step, trained together."""
    adapters = [driver.trainer.create(str(index), settings) for index, settings in enumerate(SETTINGS)]
    found = []
    for _ in range(STEPS):
        batches = [MicroBatch(each, examples(2, VOCABULARY, seed)) for seed, each in enumerate(adapters)]
        found.append([result.loss for result in driver.trainer.forward_backward(batches).finish()])
        for adapter in adapters:
            adapter.optimizer_step(1e-2)
    return found


@pytest.mark.parametrize("scheme", [None, "int8", "fp8"] if ON_GPU else [None])
def test_losses_are_those_of_a_cpu(scheme: Scheme | None, tmp_path: Path) -> None:
    if reason := ON_GPU and refuse_scheme(scheme, DEVICE):
        pytest.skip(reason)
    folder = save("llama", tmp_path / "base")
    plain = ReferenceKernels() if scheme == "fp8" else None
    got, wanted = (
        losses(TrainingDriver(folder, scheme=scheme, device=device, kernels=kernels))
        for device, kernels in ((DEVICE, GpuKernels()), (torch.device("cpu"), plain))
    )
    torch.testing.assert_close(torch.tensor(got), torch.tensor(wanted), rtol=1e-3, atol=1e-3)
    assert all(last < first for first, last in zip(got[0][:2], got[-1][:2], strict=True))
