"""State that adapted modules and attention read in a forward pass: kernels, KV cache, the step's input buffers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lora_serve.adapters.adapter import Prefix
from lora_serve.kernels.contract import Kernels, Rotation
from lora_serve.kv.tensors import KVTensors
from lora_serve.model.batch import AdapterRows
from lora_serve.model.input_buffers import InputBuffers


@dataclass
class ForwardContext:
    """Shared by all modules of a base, which get it at install; `inputs` and `virtual_rows` change every step.

    Attributes:
        windows: sliding window by layer (None: full attention), for models that do not pass it to attention.
        prefixes: virtual tokens by adapter slot; the device slots keep it up to date.
        inputs: input buffers of the running step.
        virtual_rows: rows whose keys and values come from an adapter's prefix instead of being computed.
        rotation: what the running layer leaves to its attention (`fused_rope.py`); None: nothing.
    """

    kernels: Kernels
    kv: KVTensors
    windows: list[int | None]
    prefixes: Mapping[int, Prefix]
    inputs: InputBuffers | None = None
    virtual_rows: Sequence[AdapterRows] = ()
    rotation: Rotation | None = None

    @property
    def step(self) -> InputBuffers:
        """The input buffers of the running step."""
        assert self.inputs is not None
        return self.inputs
