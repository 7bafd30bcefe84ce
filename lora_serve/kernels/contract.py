"""The kernel backend interface, with exact semantics, by purpose.

| module | operations |
|---|---|
| `layer_contract.py` | packing, linear layers, experts, norms, gated activations |
| `delta_contract.py` | LoRA deltas, and the pointer tables and segments that say whose |
| `attention_contract.py` | RoPE, KV writes, paged attention |
| `training_contract.py` | exact products, gradients |
| `replay_contract.py` | recorded steps and CUDA graphs |

Backends (`reference`, `cpu`, `gpu`) implement `Kernels` and declare what they support; callers never check which one
they have. All tensors of one call are on one device. Nothing is allocated for a maximum: rows without a segment are not
touched, ranks are not padded, slots that are not in a batch cost nothing.
"""

from __future__ import annotations

from typing import Protocol

from lora_serve.kernels.attention_contract import AttentionMetadata, AttentionOperations, Rotation
from lora_serve.kernels.delta_contract import (
    Delta,
    DeltaGroup,
    DeltaOperations,
    ExpertsGroup,
    Segments,
    pointer_tables,
)
from lora_serve.kernels.layer_contract import Activation, LayerOperations, Layers
from lora_serve.kernels.replay_contract import GraphBuckets, Recording, ReplayOperations, ReplaySupport
from lora_serve.kernels.training_contract import TrainingOperations

__all__ = [
    "Activation",
    "AttentionMetadata",
    "Delta",
    "DeltaGroup",
    "ExpertsGroup",
    "GraphBuckets",
    "Kernels",
    "Layers",
    "Recording",
    "ReplaySupport",
    "Rotation",
    "Segments",
    "pointer_tables",
]


class Kernels(LayerOperations, DeltaOperations, AttentionOperations, TrainingOperations, ReplayOperations, Protocol):
    """A backend.

    Attributes:
        name: for logs and messages.
        build: which build of it this is, for people; empty where there is only one.
    """

    name: str
    build: str
