"""Which backend serves a device."""

from __future__ import annotations

import logging

import torch

from lora_serve.kernels.build import BuildError, library
from lora_serve.kernels.contract import Kernels
from lora_serve.kernels.native import NativeKernels
from lora_serve.kernels.reference import ReferenceKernels

log = logging.getLogger(__name__)


def select(device: torch.device, native: bool = True) -> Kernels:
    """The fastest backend that works on `device`; without `native`, plain torch.

    Where the native kernels were wanted and cannot be had, one warning says why.
    """
    if not native or device.type != "cpu":
        return ReferenceKernels()
    try:
        return NativeKernels(library())
    except (BuildError, OSError) as error:
        log.warning("no native CPU kernels (%s); plain torch serves adapters and attention, slower", error)
        return ReferenceKernels()
