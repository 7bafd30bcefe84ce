"""The keys of `adapter_model.safetensors`: which module of the base each names, and what of it.

A key is `base_model.model.<module>.<tail>`; the module is the longest path that the base knows. Every key must have a
home, or the adapter is refused with the list of those that have none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from lora_serve.adapters.adapter import BaseShape, Site
from lora_serve.adapters.checkpoint import some
from lora_serve.errors import AdapterInvalid

PREFIX = "base_model.model."


class Misfit(AdapterInvalid):
    """Keys or shapes for which the base has no place, as they are when an adapter was made for another base."""


def home(key: str, base: BaseShape) -> tuple[str, str]:
    """(module, tail) that a key names; an empty module if the base has none of that path."""
    path = key.removeprefix(PREFIX).split(".")
    for length in range(len(path) - 1, 0, -1):
        module = ".".join(path[:length])
        if module in base.sites or module in base.modules or module in base.others:
            return module, ".".join(path[length:])
    return "", key


def by_module(
    tensors: Mapping[str, Tensor], base: BaseShape, tails: Mapping[str, str], wanted: Callable[[str], bool]
) -> dict[str, dict[str, Tensor]]:
    """Tensors by module, then by matrix.

    Args:
        tails: what may follow the module in a key → the name of the matrix it is.
        wanted: whether the format can change this module of the base.
    """
    found: dict[str, dict[str, Tensor]] = {}
    strays = []
    for key, tensor in sorted(tensors.items()):
        module, tail = home(key, base)
        if tail in tails and module and wanted(module):
            found.setdefault(module, {})[tails[tail]] = tensor
        else:
            strays.append(f"{key} ({base.others[module]})" if module in base.others else key)
    refuse_strays(strays)
    return found


def by_site(tensors: Mapping[str, Tensor], base: BaseShape, tails: Mapping[str, str]) -> dict[str, dict[str, Tensor]]:
    """The same for a format that changes linear sites only, in the base's own order."""
    found = by_module(tensors, base, tails, base.sites.__contains__)
    return {name: found[name] for name in base.sites if name in found}


def refuse_strays(strays: list[str]) -> None:
    if strays:
        raise Misfit(f"{len(strays)} tensors of the adapter have no place in this base: {some(strays)}")


def need(found: Mapping[str, Mapping[str, Tensor]], matrices: set[str]) -> None:
    """Refuse modules that lack one of these matrices."""
    halves = [name for name, group in found.items() if not matrices <= group.keys()]
    if halves:
        raise AdapterInvalid(f"not all of {', '.join(sorted(matrices))} are there for {some(halves)}")


def check_delta(site: Site, a: Tensor, b: Tensor) -> None:
    """Hold A [r, in] and B [out, r], as PEFT saves them, to a site."""
    rank = a.shape[0] if a.ndim else 0
    if tuple(a.shape) != (rank, site.in_features) or tuple(b.shape) != (site.out_features, rank):
        raise Misfit(
            f"{site.name} takes A [r, {site.in_features}] and B [{site.out_features}, r]; "
            f"the adapter has {list(a.shape)} and {list(b.shape)}"
        )


def check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Hold a tensor to the shape that its place has."""
    if tuple(tensor.shape) != shape:
        raise Misfit(f"{name} takes {list(shape)}; the adapter has {list(tensor.shape)}")
