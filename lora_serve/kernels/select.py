"""Select the kernel backend for a device."""

from __future__ import annotations

import logging

import torch

from lora_serve.kernels.contract import Kernels
from lora_serve.kernels.cpu.backend import NativeKernels
from lora_serve.kernels.cpu.build import BuildError, library, more_flags
from lora_serve.kernels.cpu.prebuilt import prebuilt_libraries
from lora_serve.kernels.packed_weight import Scheme
from lora_serve.kernels.reference import ReferenceKernels

FP8_CAPABILITY = (8, 9)  # GPUs that multiply it: Ada and Hopper
log = logging.getLogger(__name__)


def select(device: torch.device, native: bool = True) -> Kernels:
    """The fastest backend that works on `device`; without `native`, plain torch.

    Where that falls back to plain torch, one warning gives the reason.
    """
    if not native:
        return ReferenceKernels()
    if device.type == "cuda":
        return _triton()
    if device.type != "cpu":
        log.warning("no kernels for %s; using the slower plain torch kernels", device.type)
        return ReferenceKernels()
    return _native()


def refuse_scheme(scheme: Scheme | None, device: torch.device) -> str | None:
    """Why a base cannot be quantised in this scheme for the device; None if it can."""
    if scheme != "fp8":
        return None
    if device.type != "cuda":
        return f"--quantize fp8 needs an NVIDIA GPU, and the base is for {device}: int8 is as small"
    capability = torch.cuda.get_device_capability(device)
    if capability < FP8_CAPABILITY:
        return (
            f"--quantize fp8 needs a GPU of compute capability {_dotted(FP8_CAPABILITY)} or newer, and "
            f"{torch.cuda.get_device_name(device)} has {_dotted(capability)}: int8 is as small"
        )
    return None


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def _native() -> Kernels:
    """Those that came with the package if this CPU runs any of them, else compiled here, else plain torch."""
    reasons = []
    for instruction_set, path in [] if more_flags() else prebuilt_libraries():
        try:
            return NativeKernels(path, f"prebuilt for {instruction_set}")
        except (BuildError, OSError) as error:
            reasons = [f"none that came with the package: {error}"]
    try:
        return NativeKernels(library(), "compiled on this machine")
    except (BuildError, OSError) as error:
        reasons.append(str(error))
    log.warning("no native CPU kernels (%s); using the slower plain torch kernels", "; ".join(reasons))
    return ReferenceKernels()


def _triton() -> Kernels:
    try:
        from lora_serve.kernels.gpu.backend import GpuKernels  # only torch's CUDA builds bring Triton
    except ImportError as error:
        log.warning("no GPU kernels (%s); using the slower plain torch kernels", error)
        return ReferenceKernels()
    return GpuKernels()
