"""The lowered form of an adapter, and what lowering must know of the base.

Whatever an adapter was on disk, here it is one flat tensor and a plan that says where each module's A and B lie in it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lora_serve.kernels.contract import Delta

ALIGNMENT = 64  # bytes; every matrix starts at a multiple of it, so vector loads never straddle a cache line needlessly


@dataclass(frozen=True)
class Site:
    """A linear module of the base that a delta can be added to: y = x Wᵀ, W [out_features, in_features]."""

    name: str
    in_features: int
    out_features: int


@dataclass(frozen=True)
class BaseShape:
    """What lowering needs to know of the resident base.

    Attributes:
        sites: adaptable modules by their full path in the HF model (`model.layers.0.self_attn.q_proj`).
        groups: names of sites that read one input, in the order in which the bank keeps them; each site in one.
        others: paths of modules that exist but cannot be adapted, with the reason (for messages).
        model_type: HF's name for the architecture.
        tied: whether the head shares the embedding's weights.
        weight: a site's own weights by name, for checks and formats that need them.
    """

    sites: dict[str, Site]
    groups: tuple[tuple[str, ...], ...]
    weight: Callable[[str], Tensor]
    others: dict[str, str] = field(default_factory=dict)
    model_type: str = ""
    tied: bool = False


@dataclass(frozen=True)
class Lowered:
    """A format's result: per site A [rank, in] and B [rank, out] with scaling folded in, still separate tensors.

    `report` is for people: method, features found, ranks, modules, warnings.
    """

    deltas: dict[str, Delta]
    report: dict[str, Any]


@dataclass(frozen=True)
class Place:
    """Where one module's matrices lie in the flat tensor: element offsets; sizes follow from rank and the site."""

    a: int
    b: int
    rank: int


@dataclass(frozen=True)
class Adapter:
    """One immutable adapter version in memory: exactly its own size, end to end in one allocation.

    Attributes:
        digest: hex digest of the content; the identity that KV, leases and metrics key on.
        flat: one-dimensional tensor of the serving dtype.
        places: by site name.
    """

    digest: str
    flat: Tensor
    places: dict[str, Place]

    @property
    def nbytes(self) -> int:
        return self.flat.numel() * self.flat.element_size()

    def delta(self, site: Site, flat: Tensor | None = None) -> Delta | None:
        """Views of the site's matrices in `flat` (this adapter's flat tensor, on some device), if it has any."""
        place = self.places.get(site.name)
        if place is None:
            return None
        source = self.flat if flat is None else flat
        rank, wide, tall = place.rank, site.in_features, site.out_features
        return Delta(
            a=source.as_strided((rank, wide), (wide, 1), place.a),
            b=source.as_strided((rank, tall), (tall, 1), place.b),
        )


def flatten(digest: str, lowered: Lowered, dtype: torch.dtype) -> Adapter:
    """Lay all matrices end to end in one tensor of `dtype`, each at an aligned offset."""
    step = ALIGNMENT // dtype.itemsize
    places: dict[str, Place] = {}
    parts: list[tuple[int, Tensor]] = []
    size = 0
    for name, delta in lowered.deltas.items():
        offsets = []
        for matrix in (delta.a, delta.b):
            offsets.append(size)
            parts.append((size, matrix))
            size += -(-matrix.numel() // step) * step
        places[name] = Place(offsets[0], offsets[1], delta.a.shape[0])
    flat = torch.zeros(size, dtype=dtype)
    for offset, matrix in parts:
        flat[offset : offset + matrix.numel()] = matrix.reshape(-1)
    return Adapter(digest, flat, places)
