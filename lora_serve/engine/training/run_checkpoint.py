"""A training run on disk: `run.json` describes it, `state.safetensors` has master weights and AdamW's moments.

What was written continues bit for bit, on a run with the same modules, ranks and scalings. Gradients that were added
and not yet applied are no part of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_serve.adapters.store.disk import Disk
from lora_serve.adapters.tensor_folder import json_bytes, read_tensors, tensor_bytes, write_folder
from lora_serve.engine.training.trainable_adapter import MOMENTS, TrainableAdapter
from lora_serve.errors import BadRequest

RECORD, STATE, CHECKSUM = "run.json", "state.safetensors", "sha256"


class RunCheckpoint:
    """The state of a run at one moment: copies of its tensors on the host, and what describes them.

    Attributes:
        steps: of the optimizer.
    """

    def __init__(self, record: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
        self._record, self._state = record, state
        self.steps = int(state["steps"])

    def __repr__(self) -> str:
        return f"<RunCheckpoint after {self.steps} steps>"

    @classmethod
    def of(cls, adapter: TrainableAdapter) -> RunCheckpoint:
        """Copy the state of an adapter in training."""
        record = {"settings": asdict(adapter.settings), "modules": _modules(adapter), "steps": adapter.steps}
        return cls(record, {key: tensor.cpu() for key, tensor in adapter.state().items()})

    def write(self, folder: Path, disk: Disk | None = None) -> None:
        """Write a new folder; see `write_folder` for errors. May block."""
        data = tensor_bytes(self._state)
        record = {**self._record, CHECKSUM: hashlib.sha256(data).hexdigest()}
        write_folder(folder, {STATE: data, RECORD: json_bytes(record)}, disk)

    @classmethod
    def read(cls, folder: Path) -> RunCheckpoint:
        """Read what `write` wrote. May block. Raises BadRequest if it is missing or damaged."""
        record, state = read_tensors(folder, RECORD, STATE, CHECKSUM)
        if "steps" not in state:
            raise BadRequest("the saved run is damaged: its files do not fit together", param="folder")
        return cls(record, state)

    def restore(self, adapter: TrainableAdapter, *, optimizer: bool) -> None:
        """Continue from here; without `optimizer` only the weights are restored. Raises BadRequest if they do not fit.

        Gradients are zeroed.
        """
        if self._record.get("modules") != _modules(adapter):
            raise BadRequest("the saved run has other modules, ranks or scalings than this one", param="folder")
        state = {key: tensor for key, tensor in self._state.items() if optimizer or key not in MOMENTS}
        adapter.restore(state if optimizer else state | {"steps": torch.tensor(0)})


def _modules(adapter: TrainableAdapter) -> dict[str, Any]:
    """What the flat tensors hold, as JSON has it.

    Of each module rank, scaling, whether it has DoRA's magnitude and an initial delta; gains; virtual tokens; their
    encoder, where there is one: older files have no word for it.
    """
    layers = {
        name: [layer.module.rank, layer.module.scaling, layer.magnitude >= 0, layer.subtracts]
        for name, layer in adapter.layers.items()
    }
    gains = {name: "input" if gain.on_input else "output" for name, gain in adapter.layout.gains.items()}
    encoder = adapter.layout.encoder
    encoded = {} if encoder is None else {"encoder": asdict(encoder.encoder) | {"widths": [*encoder.encoder.widths]}}
    return encoded | {
        "layers": layers,
        "gains": gains,
        "virtual_tokens": adapter.virtual_tokens,
        "prefix_tokens": adapter.prefix_tokens,
    }
