"""Where the parts of an adapter in training lie in its flat tensors: matrices, magnitudes, gains and virtual tokens.

Virtual tokens may be computed by an encoder, whose parameters lie there too. Every part starts at a multiple of
`ALIGNMENT`; the numbers between parts are zero and stay so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lora_serve.adapters.adapter import ALIGNMENT, MatrixOffsets, Site
from lora_serve.engine.training.table_encoder import TableEncoder

_STEP = ALIGNMENT // 4  # elements


@dataclass(frozen=True)
class AdaptedSite:
    """A linear module of the base with the rank and the scaling of its delta."""

    site: Site
    rank: int
    scaling: float


@dataclass(frozen=True)
class FlatLayer:
    """One module's matrices; offsets in elements.

    Attributes:
        offsets: of A and B; their rank is 2r where the initial delta is subtracted.
        magnitude: offset of DoRA's magnitude; -1 without.
    """

    module: AdaptedSite
    offsets: MatrixOffsets
    magnitude: int

    @property
    def subtracts(self) -> bool:
        """Whether the initial delta is subtracted: rows r to 2r hold A0 and −s·B0, and are not trained."""
        return self.offsets.rank > self.module.rank

    def a(self, flat: Tensor) -> Tensor:
        """[rank, in], a view."""
        return self.offsets.views(self.module.site, flat).a[: self.module.rank]

    def b(self, flat: Tensor) -> Tensor:
        """[rank, out], a view; PEFT's transposed."""
        return self.offsets.views(self.module.site, flat).b[: self.module.rank]

    def initial(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """A0 [rank, in] and −s·B0 [rank, out], views; without rows if nothing is subtracted."""
        whole, rank = self.offsets.views(self.module.site, flat), self.module.rank
        return whole.a[rank:], whole.b[rank:]

    def m(self, flat: Tensor) -> Tensor:
        """[out], a view."""
        return flat[self.magnitude : self.magnitude + self.module.site.out_features]


@dataclass(frozen=True)
class FlatGain:
    """One module's gain.

    Attributes:
        on_input: whether it multiplies the module's input, and not its output.
    """

    site: Site
    on_input: bool
    offset: int

    def values(self, flat: Tensor) -> Tensor:
        """[in] or [out], a view."""
        width = self.site.in_features if self.on_input else self.site.out_features
        return flat[self.offset : self.offset + width]


@dataclass(frozen=True)
class FlatTable:
    """Embeddings of virtual tokens."""

    tokens: int
    width: int
    offset: int

    def values(self, flat: Tensor) -> Tensor:
        """[tokens, width], a view."""
        return flat[self.offset : self.offset + self.tokens * self.width].view(self.tokens, self.width)


@dataclass(frozen=True)
class FlatPrefix:
    """Keys and values of virtual tokens in every layer, as PEFT's table [tokens, layers · 2 · heads · dim]."""

    tokens: int
    layers: int
    heads: int
    dim: int
    offset: int

    def values(self, flat: Tensor) -> Tensor:
        """[tokens, layers · 2, heads, dim], a view; of layer i keys are [:, 2i], values [:, 2i + 1]."""
        shape = (self.tokens, self.layers * 2, self.heads, self.dim)
        return flat[self.offset : self.offset + math.prod(shape)].view(shape)


@dataclass(frozen=True)
class FlatEncoder:
    """Parameters of an encoder, which are trained, and the virtual tokens that it computes, which are not themselves.

    Attributes:
        offsets: of each parameter, by PEFT's name.
        table: its output.
    """

    encoder: TableEncoder
    offsets: Mapping[str, int]
    table: FlatTable | FlatPrefix

    def parameters(self, flat: Tensor) -> dict[str, Tensor]:
        """Views."""
        return {
            name: flat[self.offsets[name] : self.offsets[name] + math.prod(shape)].view(shape)
            for name, shape in self.encoder.shapes.items()
        }

    @torch.no_grad()
    def encode(self, masters: Tensor) -> None:
        """Compute the virtual tokens of the parameters."""
        table = self.table.values(masters)
        table.copy_(self.encoder(self.parameters(masters)).view_as(table))

    def backward(self, masters: Tensor, gradients: Tensor) -> None:
        """Turn the gradient of the virtual tokens into that of the parameters."""
        leaves = {name: each.detach().requires_grad_() for name, each in self.parameters(masters).items()}
        for name, gradient in self.parameters(gradients).items():
            leaves[name].grad = gradient.zero_()  # which is then added to in place
        with torch.enable_grad():
            output = self.encoder(leaves)
        table = self.table.values(gradients)
        torch.autograd.backward(output, table.view_as(output), inputs=[*leaves.values()])
        table.zero_()


@dataclass(frozen=True)
class TrainableLayout:
    """All parts of an adapter.

    Attributes:
        size: of a flat tensor, in elements.
        layers, gains: by module.
        table: embeddings of virtual tokens.
        prefix: their keys and values.
        encoder: what computes the table, or the prefix.
    """

    size: int
    layers: Mapping[str, FlatLayer] = field(default_factory=dict)
    gains: Mapping[str, FlatGain] = field(default_factory=dict)
    table: FlatTable | None = None
    prefix: FlatPrefix | None = None
    encoder: FlatEncoder | None = None

    @classmethod
    def of_matrices(cls, modules: Mapping[str, AdaptedSite], *, dora: bool, subtract: bool) -> TrainableLayout:
        """A and B of each module, with `dora` a magnitude, with `subtract` the initial A and B."""
        place, layers = _Places(), {}
        for name, module in modules.items():
            site, rank = module.site, module.rank * (2 if subtract else 1)
            offsets = MatrixOffsets(place(rank * site.in_features), place(rank * site.out_features), rank)
            layers[name] = FlatLayer(module, offsets, place(site.out_features) if dora else -1)
        return cls(place.size, layers)

    @classmethod
    def of_gains(cls, sites: Mapping[str, tuple[Site, bool]]) -> TrainableLayout:
        """A gain for each module, on its input or not."""
        place = _Places()
        gains = {
            name: FlatGain(site, on_input, place(site.in_features if on_input else site.out_features))
            for name, (site, on_input) in sites.items()
        }
        return cls(place.size, gains=gains)

    @classmethod
    def of_virtual_tokens(cls, tokens: int, width: int, encoder: TableEncoder | None = None) -> TrainableLayout:
        """The embeddings of virtual tokens."""
        place = _Places()
        table = FlatTable(tokens, width, place(tokens * width))
        flat_encoder = _place_encoder(place, encoder, table)
        return cls(place.size, table=table, encoder=flat_encoder)

    @classmethod
    def of_prefix(
        cls, tokens: int, layers: int, heads: int, dim: int, encoder: TableEncoder | None = None
    ) -> TrainableLayout:
        """Keys and values of virtual tokens."""
        place = _Places()
        prefix = FlatPrefix(tokens, layers, heads, dim, place(tokens * layers * 2 * heads * dim))
        flat_encoder = _place_encoder(place, encoder, prefix)
        return cls(place.size, prefix=prefix, encoder=flat_encoder)

    @property
    def saved(self) -> int:
        """Numbers that modules with a gain or a magnitude save of each token for their backward pass, in all layers."""
        gained = sum(gain.site.in_features if gain.on_input else gain.site.out_features for gain in self.gains.values())
        return gained + sum(layer.module.site.out_features for layer in self.layers.values() if layer.magnitude >= 0)


class _Places:
    """Hands out offsets."""

    def __init__(self) -> None:
        self.size = 0

    def __call__(self, elements: int) -> int:
        start, self.size = self.size, self.size + -(-elements // _STEP) * _STEP
        return start


def _place_encoder(place: _Places, encoder: TableEncoder | None, table: FlatTable | FlatPrefix) -> FlatEncoder | None:
    if encoder is None:
        return None
    return FlatEncoder(encoder, {name: place(math.prod(shape)) for name, shape in encoder.shapes.items()}, table)
