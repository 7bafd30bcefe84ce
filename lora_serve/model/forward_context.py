"""What the modules of the resident base read besides their input tensors: kernels, KV cache, and the step's batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lora_serve.adapters.adapter import Prefix
from lora_serve.kernels.contract import Kernels
from lora_serve.kv.tensors import KVTensors
from lora_serve.model.batch import AdapterRows
from lora_serve.model.input_buffers import InputBuffers


@dataclass
class ForwardContext:
    """One object for all modules of a base, given to them at install; `inputs` and `virtual_rows` change every step.

    Attributes:
        windows: sliding window by layer (None: full attention), for models that keep it in their configuration only.
        prefixes: virtual tokens by adapter slot; the device slots keep it up to date.
        inputs: of the step that runs.
        virtual_rows: rows whose keys and values are not computed but given by an adapter's prefix.
    """

    kernels: Kernels
    kv: KVTensors
    windows: list[int | None]
    prefixes: Mapping[int, Prefix]
    inputs: InputBuffers | None = None
    virtual_rows: Sequence[AdapterRows] = ()

    @property
    def step(self) -> InputBuffers:
        """The inputs of the step that runs."""
        assert self.inputs is not None
        return self.inputs
