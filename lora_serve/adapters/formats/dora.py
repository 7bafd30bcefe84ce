"""DoRA: a learned magnitude for every output channel of an adapted weight.

    g = m / ‖W + s·BA‖, norms of the rows of W + s·BA;   y = g ⊙ (W x + s·BA x) + b
    embeddings: e' = g ⊙ (e + s · lookup), norms over each embedding dimension's column
    keys: X.lora_magnitude_vector [out]

Norms are computed once, at load, from the base's weights (dequantised if the base is quantised). Source: PEFT 0.21,
`peft/tuners/lora/dora.py`; Liu et al. 2024 (arXiv 2402.09353).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_serve.adapters.formats.keys import check_shape
from lora_serve.errors import AdapterInvalid


def gain(name: str, magnitude: Tensor, weight: Tensor, update: Tensor) -> Tensor:
    """The output gain g [out], float32.

    Args:
        magnitude: m [out].
        weight, update: W and s·BA, both [out, in], float32.
    """
    check_shape(f"{name}.lora_magnitude_vector", magnitude, (weight.shape[0],))
    norm: Tensor = torch.linalg.vector_norm(weight + update, dim=1)
    if not norm.all():
        raise AdapterInvalid(f"{name} has an output without any weight, for which DoRA is not defined")
    return magnitude.float() / norm
