"""The lowered form of an adapter, and what lowering must know of the base.

Whatever an adapter was on disk, here it is one flat tensor and a plan that says what lies where in it: for linear sites
the low-rank matrices of the one instruction, and for whatever else a format can express, a `ModuleOverride` of a module or a
`Prefix`. The batched kernel knows deltas only; the rest costs only the batches that hold such an adapter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lora_serve.kernels.contract import Delta

ALIGNMENT = 64  # bytes; every matrix starts at a multiple of it, so vector loads never straddle a cache line needlessly
VECTORS = ("gain_in", "gain_out", "shift")  # kept in float32: they are small, and their rounding would hit every row


@dataclass(frozen=True)
class Site:
    """A linear module of the base that a delta can be added to: y = x Wᵀ, W [out_features, in_features]."""

    name: str
    in_features: int
    out_features: int


def _unknown_parameter(path: str) -> Tensor:
    raise KeyError(path)


@dataclass(frozen=True)
class BaseShape:
    """What lowering needs to know of the resident base.

    Attributes:
        sites: adaptable linear maps by their path in the HF model (`model.layers.0.self_attn.q_proj`); one expert of a
            stacked parameter is a site too (`model.layers.0.mlp.experts.down_proj[3]`).
        groups: names of sites that read one input, in the order in which the bank keeps them; each site in one.
        weight: a site's own weights by name, [out_features, in_features], as the forward pass uses them: of a quantised
            base, the dequantised ones.
        others: paths of modules that cannot get a delta, with the reason (for messages).
        model_type: HF's name for the architecture.
        tied: whether the head shares the embedding's weights.
        modules: modules whose own parameters an adapter may replace, and the shapes of these: path → name → shape. Each
            works row by row, so that the rows of one batch may each have their own.
        parameter: a parameter of such a module by its full path, in full precision.
        embeddings: lookup modules, and the factor that each multiplies its rows by.
        input_embedding, head: path of the module that embeds the tokens, and of the one that makes the logits.
        hidden_size: width of an embedded token.
        kv: (heads, key_dim, value_dim) of every layer's keys and values.
        names: what the base is called (for warnings about adapters trained on another).
        vocabulary: digest of the tokenizer's vocabulary; empty if unknown.
        quantized: how the base's weights are stored, if not in full precision (for reports).
    """

    sites: dict[str, Site]
    groups: tuple[tuple[str, ...], ...]
    weight: Callable[[str], Tensor]
    others: dict[str, str] = field(default_factory=dict)
    model_type: str = ""
    tied: bool = False
    modules: dict[str, dict[str, tuple[int, ...]]] = field(default_factory=dict)
    parameter: Callable[[str], Tensor] = _unknown_parameter
    embeddings: dict[str, float] = field(default_factory=dict)
    input_embedding: str = ""
    head: str = ""
    hidden_size: int = 0
    kv: tuple[tuple[int, int, int], ...] = ()
    names: tuple[str, ...] = ()
    vocabulary: str = ""
    quantized: str = ""

    def bias(self, site: str) -> Tensor | None:
        """A linear module's own constant [out], if it has one."""
        return self.parameter(f"{site}.bias") if "bias" in self.modules.get(site, {}) else None


@dataclass(frozen=True)
class ModuleOverride:
    """What an adapter does to one module besides a linear site's delta. Tensors that are None change nothing.

    For the adapter's rows, in this order (a composition's weight w is 1 unless only `lookup` and `shift` are set):

        y = module(gain_in ⊙ x), with `parameters` in place of the module's own
        y += w · lookup.a[x] @ lookup.b                  # embeddings: x are token ids
        y += w · B(A x)                                  # linear sites: the delta, which is not part of a change
        y = gain_out ⊙ y + w · shift
        y at `token_ids` = `token_rows`                  # embeddings: x equal to an id gives its row;
                                                         # the head: that id's logit is x @ row (no bias)
    Attributes:
        parameters: by the parameter's name in the module; shapes as the module's own, except that a table of tokens
            (embedding, head) may have another number of them.
        gain_in [in], gain_out [out], shift [out].
        lookup: a [ids, rank], b [rank, out].
        token_ids, token_rows: ids, and [ids, width].
    """

    parameters: dict[str, Tensor] = field(default_factory=dict)
    gain_in: Tensor | None = None
    gain_out: Tensor | None = None
    shift: Tensor | None = None
    lookup: Delta | None = None
    token_ids: tuple[int, ...] = ()
    token_rows: Tensor | None = None

    @property
    def additive(self) -> bool:
        """Whether the change is a sum onto the module's output, so that it can be weighted and composed."""
        return not self.parameters and self.gain_in is None and self.gain_out is None and self.token_rows is None

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Every tensor, under its role."""
        found = {f"parameter {name}": tensor for name, tensor in sorted(self.parameters.items())}
        if self.lookup is not None:
            found |= {"lookup a": self.lookup.a, "lookup b": self.lookup.b}
        rest = {role: getattr(self, role) for role in ("gain_in", "gain_out", "shift", "token_rows")}
        return found | {role: tensor for role, tensor in rest.items() if tensor is not None}

    def map(
        self, function: Callable[[Tensor], Tensor], vectors: Callable[[Tensor], Tensor] | None = None
    ) -> ModuleOverride:
        """The same change with every tensor passed through `function`, gains and constants through `vectors`."""
        vectors = vectors or function
        own = {role: tensor for role in VECTORS if (tensor := getattr(self, role)) is not None}
        return ModuleOverride(
            parameters={name: function(tensor) for name, tensor in sorted(self.parameters.items())},
            lookup=None if self.lookup is None else Delta(function(self.lookup.a), function(self.lookup.b)),
            token_ids=self.token_ids,
            token_rows=None if self.token_rows is None else function(self.token_rows),
            **{role: vectors(tensor) for role, tensor in own.items()},
        )


@dataclass(frozen=True)
class Prefix:
    """Virtual tokens that stand before every prompt: embedded ones, or ones whose keys and values are given.

    Attributes:
        length: how many.
        embeddings: [length, hidden], what the input embedding would have given.
        keys, values: per layer [length, kv_heads, dim], position already in them; empty if `embeddings` is set.
    """

    length: int
    embeddings: Tensor | None = None
    keys: tuple[Tensor, ...] = ()
    values: tuple[Tensor, ...] = ()

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Every tensor, under its role."""
        found = {} if self.embeddings is None else {"embeddings": self.embeddings}
        found |= {f"keys {layer}": tensor for layer, tensor in enumerate(self.keys)}
        return found | {f"values {layer}": tensor for layer, tensor in enumerate(self.values)}

    def map(self, function: Callable[[Tensor], Tensor]) -> Prefix:
        """The same with every tensor passed through `function`."""
        embeddings = None if self.embeddings is None else function(self.embeddings)
        return Prefix(self.length, embeddings, tuple(map(function, self.keys)), tuple(map(function, self.values)))


@dataclass(frozen=True)
class Lowered:
    """A format's result, still separate tensors.

    Attributes:
        deltas: per linear site A [rank, in] and B [rank, out], scaling folded in.
        report: for people: method, features found, ranks, modules, warnings.
        changes: per module, what is not a linear site's delta.
        prefix: virtual tokens before the prompt.
        invocation: tokens from whose last occurrence in the prompt on the adapter is active (never without one); empty:
            always active.
    """

    deltas: dict[str, Delta]
    report: dict[str, Any]
    overrides: dict[str, ModuleOverride] = field(default_factory=dict)
    prefix: Prefix | None = None
    invocation: tuple[int, ...] = ()

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Every tensor, under a name that says what it does."""
        found: dict[str, Tensor] = {}
        for site, delta in self.deltas.items():
            found |= {f"{site} a": delta.a, f"{site} b": delta.b}
        for module in sorted(self.overrides):
            found |= {f"{module} {role}": tensor for role, tensor in self.overrides[module].tensors.items()}
        if self.prefix is not None:
            found |= {f"prefix {role}": tensor for role, tensor in self.prefix.tensors.items()}
        return found

    @property
    def vectors(self) -> int:
        """How many of its numbers are kept in float32, whatever the serving dtype."""
        return sum(tensor.numel() for name, tensor in self.tensors.items() if _is_vector(name))

    @property
    def not_additive(self) -> str:
        """Why the adapter cannot be weighted or composed; empty if it can."""
        if self.prefix is not None:
            return "it puts virtual tokens before the prompt"
        fixed = [module for module, override in self.overrides.items() if not override.additive]
        return f"it replaces or rescales parts of the base ({fixed[0]})" if fixed else ""


@dataclass(frozen=True)
class MatrixOffsets:
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
        places: deltas by site name.
        changes, prefix: as lowered; their tensors are views into `flat`.
    """

    digest: str
    flat: Tensor
    offsets: dict[str, MatrixOffsets]
    overrides: dict[str, ModuleOverride] = field(default_factory=dict)
    prefix: Prefix | None = None

    @property
    def nbytes(self) -> int:
        return self.flat.numel() * self.flat.element_size()

    def delta(self, site: Site, flat: Tensor | None = None) -> Delta | None:
        """Views of the site's matrices in `flat` (this adapter's flat tensor, on some device), if it has any."""
        place = self.offsets.get(site.name)
        if place is None:
            return None
        source = self.flat if flat is None else flat
        rank, wide, tall = place.rank, site.in_features, site.out_features
        return Delta(
            a=source.as_strided((rank, wide), (wide, 1), place.a),
            b=source.as_strided((rank, tall), (tall, 1), place.b),
        )

    def moved(self, flat: Tensor) -> tuple[dict[str, ModuleOverride], Prefix | None]:
        """ModuleOverrides and prefix as views into `flat`, a copy of this adapter's flat tensor."""

        def view(tensor: Tensor) -> Tensor:
            whole = flat if tensor.dtype == flat.dtype else flat.view(tensor.dtype)
            return whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

        overrides = {module: override.map(view) for module, override in self.overrides.items()}
        return overrides, None if self.prefix is None else self.prefix.map(view)


def flatten(digest: str, lowered: Lowered, dtype: torch.dtype) -> Adapter:
    """Lay all tensors end to end in one tensor of `dtype`, each at an aligned offset; vectors in float32."""
    step = ALIGNMENT // dtype.itemsize

    def room(tensor: Tensor, kept: torch.dtype) -> int:
        return -(-tensor.numel() * kept.itemsize // ALIGNMENT) * step

    size = sum(room(tensor, torch.float32 if _is_vector(name) else dtype) for name, tensor in lowered.tensors.items())
    flat = torch.zeros(size, dtype=dtype)
    at = 0

    def put(tensor: Tensor, kept: torch.dtype = dtype) -> Tensor:
        nonlocal at
        place = flat[at : at + tensor.numel() * kept.itemsize // dtype.itemsize].view(kept).view(tensor.shape)
        place.copy_(tensor)
        at += room(tensor, kept)
        return place

    offsets = {}
    for name, delta in lowered.deltas.items():
        a, b = put(delta.a), put(delta.b)
        offsets[name] = MatrixOffsets(int(a.storage_offset()), int(b.storage_offset()), a.shape[0])
    overrides = {
        name: lowered.overrides[name].map(put, lambda vector: put(vector, torch.float32))
        for name in sorted(lowered.overrides)
    }
    return Adapter(digest, flat, offsets, overrides, None if lowered.prefix is None else lowered.prefix.map(put))


def _is_vector(name: str) -> bool:
    """Whether a tensor of `Lowered.tensors` is a gain or a constant."""
    return name.rpartition(" ")[2] in VECTORS
