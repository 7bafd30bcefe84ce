"""The lowered form of an adapter, common to all PEFT methods, and the description of the base that lowering needs.

In memory an adapter is one flat tensor and the offsets of its parts: low-rank matrices (`lora_a`, `lora_b`) of linear
sites and, for whatever else a format can express, a `ModuleOverride` per module or a `Prefix`. The batched kernels
compute deltas only; the rest costs only the batches that contain such an adapter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_serve.kernels.contract import Delta
from lora_serve.request import Pooling

ALIGNMENT = 64  # bytes; every matrix starts at a multiple of it, so vector loads do not straddle cache lines
VECTORS = (
    "gain_in",
    "gain_out",
    "shift",
)  # kept in float32: they are small, and their rounding error would reach every row


@dataclass(frozen=True)
class Site:
    """A linear module of the base that a delta can be added to: y = x Wᵀ, W [out_features, in_features].

    `transposed`: whether its parameter is Wᵀ, as a Conv1D's.
    """

    name: str
    in_features: int
    out_features: int
    transposed: bool = False


def _unknown_parameter(path: str) -> Tensor:
    raise KeyError(path)


@dataclass(frozen=True)
class BaseShape:
    """Modules, shapes and weights of the resident base, as lowering needs them.

    Attributes:
        sites: adaptable linear modules by path in the HF model (`model.layers.0.self_attn.q_proj`); one expert of a
            stacked parameter is a site too (`model.layers.0.mlp.experts.down_proj[3]`).
        groups: names of sites that read the same input, in the order of the pointer tables; each site is in one group.
        weight: a site's weight by name, [out_features, in_features], as the forward pass uses it (dequantised if the
            base is quantised).
        others: paths of modules that cannot get a delta, with the reason (for error messages).
        model_type: HF's name for the architecture.
        tied: whether the LM head shares the embedding's weights.
        modules: modules whose parameters an adapter may replace, and their shapes: path → parameter name → shape. They
            compute each row independently, so rows of one batch may use different parameters.
        parameter: a parameter of such a module by its full path, in full precision.
        embeddings: embedding modules, and the factor that each multiplies its rows by.
        heads_first: those of `modules` whose inputs and outputs are [1, heads, tokens, ...].
        input_embedding, head: paths of the input embedding and of the LM head.
        hidden_size: hidden size.
        kv: (heads, key_dim, value_dim) of every layer's keys and values.
        names: names of the base (for warnings about adapters trained on another).
        vocabulary: digest of the tokenizer's vocabulary; empty if unknown.
        quantized: how the base's weights are quantised, or empty (for reports).
        rounding: digest of what else their rounding depends on, or empty.
        body: path of the model without its LM head, which adapters for embeddings are trained on.
        divided: modules whose weight's rows are divided by their lengths; `weight` and `parameter` give the quotients.
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
    heads_first: frozenset[str] = frozenset()
    input_embedding: str = ""
    head: str = ""
    hidden_size: int = 0
    kv: tuple[tuple[int, int, int], ...] = ()
    names: tuple[str, ...] = ()
    vocabulary: str = ""
    quantized: str = ""
    rounding: str = ""
    body: str = ""
    divided: frozenset[str] = frozenset()

    def bias(self, site: str) -> Tensor | None:
        """The bias [out] of a linear module of the base, if it has one."""
        return self.parameter(f"{site}.bias") if "bias" in self.modules.get(site, {}) else None


def divide_rows(weight: Tensor) -> Tensor:
    """A matrix [rows, columns] with each row divided by its length, which is computed in float32."""
    lengths = torch.linalg.vector_norm(weight, dim=1, keepdim=True, dtype=torch.float32)
    quotients: Tensor = weight / lengths.clamp(min=1e-12)
    return quotients.to(weight.dtype)


@dataclass(frozen=True)
class ModuleOverride:
    """An adapter's effects on one module other than a low-rank delta. A tensor that is None has no effect.

    For the adapter's rows, in this order (a composition's weight w is 1 unless only `lookup` and `shift` are set):

        y = module(gain_in ⊙ x), with `parameters` in place of the module's own
        y += w · lookup.a[x] @ lookup.b                  # embeddings: x are token ids
        y += w · B(A x)                                  # linear sites: the delta, which is not part of the override
        y = gain_out ⊙ y + w · shift
        y at `token_ids` = `token_rows`                  # embeddings: x equal to an id gives its row;
                                                         # the head: that id's logit is x @ row (no bias)
    Attributes:
        parameters: replacements by parameter name; same shapes as the module's, except that the vocabulary size of an
            embedding or LM head may differ.
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
        """Whether the override only adds to the module's output, so that it can be weighted and composed."""
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
        """A copy with `function` applied to every tensor, and `vectors` to gains and shifts."""
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
    """Virtual tokens before every prompt, given as embeddings or as keys and values.

    Attributes:
        length: number of virtual tokens.
        embeddings: [length, hidden], in place of the input embedding's output.
        keys, values: per layer [length, kv_heads, dim], positions already applied; empty if `embeddings` is set.
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
        """A copy with `function` applied to every tensor."""
        embeddings = None if self.embeddings is None else function(self.embeddings)
        return Prefix(self.length, embeddings, tuple(map(function, self.keys)), tuple(map(function, self.values)))


@dataclass(frozen=True)
class Lowered:
    """The result of lowering, as separate tensors (see `flatten`).

    Attributes:
        deltas: per linear site A [rank, in] and B [rank, out], scaling folded in.
        report: for users: method, features found, ranks, modules, warnings.
        overrides: per module, effects other than deltas.
        prefix: virtual tokens before the prompt.
        invocation: aLoRA's invocation tokens: the adapter is active from their last occurrence in the prompt on (not at
            all without one); empty: always active.
        embeds, pooling: whether the adapter is made for embeddings, and its own pooling; None: the base's.
    """

    deltas: dict[str, Delta]
    report: dict[str, Any]
    overrides: dict[str, ModuleOverride] = field(default_factory=dict)
    prefix: Prefix | None = None
    invocation: tuple[int, ...] = ()
    embeds: bool = False
    pooling: Pooling | None = None

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Every tensor, by module and role."""
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
        """Number of elements that are kept in float32, whatever the serving dtype."""
        return sum(tensor.numel() for name, tensor in self.tensors.items() if _is_vector(name))

    @property
    def not_additive(self) -> str:
        """Why the adapter cannot be weighted or composed; empty if it can."""
        if self.prefix is not None:
            return "it puts virtual tokens before the prompt"
        fixed = [module for module, override in self.overrides.items() if not override.additive]
        return f"it replaces or rescales parts of the base ({fixed[0]})" if fixed else ""


class MatrixOffsets(NamedTuple):
    """Element offsets of one module's A and B in the flat tensor; their sizes follow from the rank and the site."""

    a: int
    b: int
    rank: int

    def views(self, site: Site, flat: Tensor) -> Delta:
        """A and B as views into a flat tensor."""
        return Delta(
            a=flat.as_strided((self.rank, site.in_features), (site.in_features, 1), self.a),
            b=flat.as_strided((self.rank, site.out_features), (site.out_features, 1), self.b),
        )


@dataclass(frozen=True)
class Adapter:
    """One immutable adapter version in memory, in one allocation of exactly its own size.

    Attributes:
        digest: hex digest of the content; KV blocks, leases and metrics are keyed by it.
        flat: one-dimensional tensor of the serving dtype.
        offsets: A and B by site name.
        overrides, prefix: as lowered; their tensors are views into `flat`.
    """

    digest: str
    flat: Tensor
    offsets: dict[str, MatrixOffsets]
    overrides: dict[str, ModuleOverride] = field(default_factory=dict)
    prefix: Prefix | None = None

    @property
    def nbytes(self) -> int:
        return self.flat.numel() * self.flat.element_size()

    def delta(self, site: Site) -> Delta | None:
        """A site's A and B as views into the host tensor; None if it has no delta."""
        offsets = self.offsets.get(site.name)
        return None if offsets is None else offsets.views(site, self.flat)

    def override_views(self, flat: Tensor) -> tuple[dict[str, ModuleOverride], Prefix | None]:
        """The overrides and the prefix as views into `flat`, a copy of this adapter's flat tensor."""

        def view(tensor: Tensor) -> Tensor:
            whole = flat if tensor.dtype == flat.dtype else flat.view(tensor.dtype)
            return whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

        overrides = {module: override.map(view) for module, override in self.overrides.items()}
        return overrides, None if self.prefix is None else self.prefix.map(view)


def flatten(digest: str, lowered: Lowered, dtype: torch.dtype) -> Adapter:
    """Copy all tensors to aligned offsets of one flat tensor of `dtype`; gains and shifts stay float32."""
    step = ALIGNMENT // dtype.itemsize

    def aligned_size(tensor: Tensor, dtype_kept: torch.dtype) -> int:
        return -(-tensor.numel() * dtype_kept.itemsize // ALIGNMENT) * step

    size = sum(
        aligned_size(tensor, torch.float32 if _is_vector(name) else dtype) for name, tensor in lowered.tensors.items()
    )
    flat = torch.zeros(size, dtype=dtype)
    offset = 0

    def append(tensor: Tensor, dtype_kept: torch.dtype = dtype) -> Tensor:
        nonlocal offset
        offsets = (
            flat[offset : offset + tensor.numel() * dtype_kept.itemsize // dtype.itemsize]
            .view(dtype_kept)
            .view(tensor.shape)
        )
        offsets.copy_(tensor)
        offset += aligned_size(tensor, dtype_kept)
        return offsets

    offsets = {}
    for name, delta in lowered.deltas.items():
        a, b = append(delta.a), append(delta.b)
        offsets[name] = MatrixOffsets(int(a.storage_offset()), int(b.storage_offset()), a.shape[0])
    overrides = {
        name: lowered.overrides[name].map(append, lambda vector: append(vector, torch.float32))
        for name in sorted(lowered.overrides)
    }
    return Adapter(digest, flat, offsets, overrides, None if lowered.prefix is None else lowered.prefix.map(append))


def _is_vector(name: str) -> bool:
    """Whether a name in `Lowered.tensors` is a gain or a shift."""
    return name.rpartition(" ")[2] in VECTORS
