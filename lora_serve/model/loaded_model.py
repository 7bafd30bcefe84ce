"""A base model as `load.py` makes it, and as `base.py` brings it into service."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lora_serve.adapters.adapter import BaseShape
from lora_serve.adapters.sharding import Sharding
from lora_serve.kernels.packed_weight import Scheme
from lora_serve.kv.tensors import LayerShape
from lora_serve.model.self_check import Oracle
from lora_serve.model.tensor_parallel import TensorParallel
from lora_serve.request import Pooling


@dataclass(frozen=True)
class LoadedModel:
    """A base model as loaded, before adapters are installed.

    Attributes:
        shape: of the whole base.
        layers: KV per token of each attention layer, as far as it is on this device.
        windows: sliding window of each layer, which the modelling code may not pass on; None: full attention.
        max_model_len: the longest context that is served correctly.
        keeps_logits: whether the model's forward takes `logits_to_keep`.
        created: seconds since the epoch.
        scheme: how to quantise the linear modules when they are packed.
        notes: remarks for the operator, in the start-up summary.
        replayable: whether steps of one shape make the same calls, so that they can be replayed (see `Quantization`).
        oracle: the untouched model's logits, for the self-check.
        importance: see `measure_importance`; empty where no weight will be int4.
        headless: whether the checkpoint has no LM head, so that it can only embed.
        pooling: how the base alone makes embeddings; None if it does not, then `not_embedding` says why.
        loaded_whole: bytes of the checkpoint if single weights of it cannot be read (`CheckpointWeights`); else 0.
        parallel, sharding: the ranks that share the base, and this one's part; None: it is whole here.
    """

    model: nn.Module
    shape: BaseShape
    layers: list[LayerShape]
    windows: list[int | None]
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    keeps_logits: bool
    parameters: int
    created: int
    generation_defaults: dict[str, Any]
    notes: list[str]
    scheme: Scheme | None
    replayable: bool
    oracle: Oracle
    headless: bool = False
    pooling: Pooling | None = None
    not_embedding: str = ""
    loaded_whole: int = 0
    importance: Mapping[str, Tensor] = field(default_factory=dict)
    parallel: TensorParallel | None = None
    sharding: Sharding | None = None
