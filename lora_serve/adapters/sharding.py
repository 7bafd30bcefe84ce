"""Tensor parallelism: which part of every adapter a device holds, cut as its part of the base is.

A column-parallel site (q, k, v, gate, up) computes some of its outputs from all inputs: A is whole, B is cut by its
outputs. A row-parallel one (o, down) computes all outputs from some of its inputs: A is cut by its inputs and B whole,
so that B(A x) is a part of a sum, as the base's output is, and one all-reduce over both makes them whole. Each expert
of a mixture is cut like this. Everything else is whole on every device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lora_serve.adapters.adapter import Adapter, BaseShape, Lowered, ModuleOverride, Prefix, Site, flatten
from lora_serve.kernels.contract import Delta


@dataclass(frozen=True)
class Sharding:
    """One device's part of a base that `size` devices share.

    Attributes:
        column_parallel: linear modules, and stacked parameters of experts, whose outputs are cut: in how many blocks
            of equal size each of which is cut (two: gate and up, one after the other).
        row_parallel: those whose inputs are cut.
        kv_cut: by layer, whether its keys and values are cut by heads.
    """

    rank: int
    size: int
    column_parallel: Mapping[str, int]
    row_parallel: frozenset[str]
    kv_cut: tuple[bool, ...]

    def part(self, tensor: Tensor, dim: int, blocks: int = 1) -> Tensor:
        """This device's part of a tensor along a dimension, of each of its blocks; of one as a view."""
        parts = [block.chunk(self.size, dim)[self.rank] for block in tensor.chunk(blocks, dim)]
        return parts[0] if blocks == 1 else torch.cat(parts, dim)

    def shape(self, base: BaseShape) -> BaseShape:
        """The base with the sites as they are on this device."""
        return replace(base, sites={name: self._site(site) for name, site in base.sites.items()})

    def adapter(self, adapter: Adapter, base: BaseShape) -> Adapter:
        """This device's part of an adapter, copied.

        Args:
            base: with whole sites.
        """
        deltas = {
            name: self._delta(name, offsets.views(base.sites[name], adapter.flat))
            for name, offsets in adapter.offsets.items()
        }
        overrides = {name: self._override(name, override) for name, override in adapter.overrides.items()}
        prefix = None if adapter.prefix is None else self._prefix(adapter.prefix)
        return flatten(adapter.digest, Lowered(deltas, {}, overrides, prefix), adapter.flat.dtype)

    def _site(self, site: Site) -> Site:
        name = stack_of(site.name)
        if name in self.column_parallel:
            return replace(site, out_features=site.out_features // self.size)
        if name in self.row_parallel:
            return replace(site, in_features=site.in_features // self.size)
        return site

    def _delta(self, site: str, delta: Delta) -> Delta:
        name = stack_of(site)
        if name in self.column_parallel:
            return Delta(delta.a, self.part(delta.b, 1, self.column_parallel[name]))
        return Delta(self.part(delta.a, 1), delta.b) if name in self.row_parallel else delta

    def _override(self, module: str, override: ModuleOverride) -> ModuleOverride:
        parameters = dict(override.parameters)
        if (blocks := self.column_parallel.get(module)) is not None:
            return replace(
                override,
                parameters={name: self.part(tensor, 0, blocks) for name, tensor in parameters.items()},
                gain_out=None if override.gain_out is None else self.part(override.gain_out, 0, blocks),
                shift=None if override.shift is None else self.part(override.shift, 0, blocks),
            )
        if module in self.row_parallel:
            if "weight" in parameters:
                parameters["weight"] = self.part(parameters["weight"], 1)
            if "bias" in parameters and self.rank > 0:  # the parts are added up
                parameters["bias"] = torch.zeros_like(parameters["bias"])
            gain = None if override.gain_in is None else self.part(override.gain_in, 0)
            return replace(override, parameters=parameters, gain_in=gain)
        for name, tensor in parameters.items():  # of stacked experts, [experts, out, in]
            path = f"{module}.{name}"
            if path in self.column_parallel:
                parameters[name] = self.part(tensor, 1, self.column_parallel[path])
            elif path in self.row_parallel:
                parameters[name] = self.part(tensor, 2)
        return replace(override, parameters=parameters)

    def _prefix(self, prefix: Prefix) -> Prefix:
        def cut(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return tuple(self.part(each, 1) if self.kv_cut[layer] else each for layer, each in enumerate(tensors))

        return replace(prefix, keys=cut(prefix.keys), values=cut(prefix.values))


def stack_of(site: str) -> str:
    """A linear module's own name; of an expert, the path of the stacked parameter that it is in."""
    return site.partition("[")[0]
