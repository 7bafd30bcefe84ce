"""Map the keys of `adapter_model.safetensors` to modules of the base.

A key is `base_model.model.<module>.<tail>`; the module is the longest path that exists in the base. An adapter with
keys that belong to no module is refused with the list of them. Adapters trained on the model without its LM head
(transformers' `AutoModel`, for embeddings) have shorter paths, which are completed first. Adapters saved from a model
inside a wrapper (`torch.compile`, DDP) have longer ones.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from torch import Tensor

from lora_serve.adapters.adapter import BaseShape, Site
from lora_serve.adapters.checkpoint import shorten
from lora_serve.errors import AdapterInvalid

PREFIX = "base_model.model."
MOST_PARTS = 32  # of a module's path; deeper ones exist in no model
MOST_TENSORS = 32  # for each module of the base

_WRAPPER = re.compile(r"(?:^|(?<=\.))(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_FRONT = re.compile(
    r"((?:module\.)*)(base_model\.model\.)?((?:(?:base_model\.model|module)\.)*)(model\.)?(language_model\.)?"
)
WRAPPERS = {
    "_orig_mod": "torch.compile",
    "_fsdp_wrapped_module": "FSDP",
    "_checkpoint_wrapped_module": "activation checkpointing",
    "module": "DistributedDataParallel",
    "base_model.model": "a second PEFT model",
    "language_model": "a model of images and text",
}


class BaseMismatch(AdapterInvalid):
    """Keys or shapes that do not fit the base, as in adapters made for another base."""


def complete_paths(tensors: Mapping[str, Tensor], base: BaseShape) -> dict[str, Tensor]:
    """Tensors with keys that start at the model with its LM head, also if they start below it."""
    paths = [*base.sites, *base.modules, *base.others]
    tops = {path.partition(".")[0] for path in paths}
    below = {path.removeprefix(f"{base.body}.").partition(".")[0] for path in paths if path.startswith(f"{base.body}.")}
    found = {}
    for key, tensor in tensors.items():
        path = key.removeprefix(PREFIX)
        first = path.partition(".")[0]
        is_short = key.startswith(PREFIX) and first in below and first not in tops
        found[f"{PREFIX}{base.body}.{path}" if is_short else key] = tensor
    return found


def without_wrappers(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors with keys that lack the parts which wrappers around the model add, and the parts found.

    No parts are found, and nothing is changed, if keys would then coincide.
    """
    parts: set[str] = set()
    found = {}
    for key, tensor in tensors.items():
        parts.update(_WRAPPER.findall(key))
        path = _WRAPPER.sub("", key)
        match = _FRONT.match(path)
        assert match is not None  # every part is optional
        outer, prefix, inner, model, language_model = match.groups(default="")
        parts.update(part for part in ("module", "base_model.model") if f"{part}." in outer + inner)
        parts.update(["language_model"] if language_model else [])
        found[prefix + model + path[match.end() :]] = tensor
    return (found, sorted(parts)) if len(found) == len(tensors) else (dict(tensors), [])


def check_count(tensors: Mapping[str, Tensor], base: BaseShape) -> None:
    """Raise AdapterInvalid for far more tensors than the base's modules could take: each costs time."""
    most = MOST_TENSORS * len({*base.sites, *base.modules, *base.others})
    if len(tensors) > most:
        raise AdapterInvalid(f"the adapter has {len(tensors)} tensors; this base has modules for {most} at most")


def split_key(key: str, base: BaseShape) -> tuple[str, str]:
    """A key's module and the rest of the key; the module is empty if the base has none of that path."""
    path = key.removeprefix(PREFIX).split(".", MOST_PARTS)
    for length in range(len(path) - 1, 0, -1):
        module = ".".join(path[:length])
        if module in base.sites or module in base.modules or module in base.others:
            return module, ".".join(path[length:])
    return "", key


def group_by_module(
    tensors: Mapping[str, Tensor], base: BaseShape, tails: Mapping[str, str], accepts: Callable[[str], bool]
) -> dict[str, dict[str, Tensor]]:
    """Tensors by module, then by matrix. Raises BaseMismatch listing keys that do not fit.

    Args:
        tails: tail of a key → name of the matrix.
        accepts: whether the format can adapt a module.
    """
    found: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for key, tensor in sorted(tensors.items()):
        module, tail = split_key(key, base)
        if tail in tails and module and accepts(module):
            found.setdefault(module, {})[tails[tail]] = tensor
        else:
            unknown.append(f"{key} ({base.others[module]})" if module in base.others else key)
    refuse_unknown_keys(unknown)
    return found


def group_by_site(
    tensors: Mapping[str, Tensor], base: BaseShape, tails: Mapping[str, str]
) -> dict[str, dict[str, Tensor]]:
    """`group_by_module` for formats that adapt linear sites only, in the order of the base's sites."""
    found = group_by_module(tensors, base, tails, base.sites.__contains__)
    return {name: found[name] for name in base.sites if name in found}


def refuse_unknown_keys(unknown: list[str]) -> None:
    if unknown:
        raise BaseMismatch(f"{len(unknown)} tensors of the adapter have no place in this base: {shorten(unknown)}")


def require_matrices(found: Mapping[str, Mapping[str, Tensor]], matrices: set[str]) -> None:
    """Raise AdapterInvalid for modules that lack one of these matrices, and if there is no module at all."""
    if not found:
        raise AdapterInvalid(f"no module has {', '.join(sorted(matrices))}")
    incomplete = [name for name, group in found.items() if not matrices <= group.keys()]
    if incomplete:
        raise AdapterInvalid(f"not all of {', '.join(sorted(matrices))} are there for {shorten(incomplete)}")


def check_delta(site: Site, a: Tensor, b: Tensor) -> None:
    """Raise BaseMismatch if A [r, in] and B [out, r], as PEFT saves them, do not fit a site."""
    rank = a.shape[0] if a.ndim else 0
    if tuple(a.shape) != (rank, site.in_features) or tuple(b.shape) != (site.out_features, rank):
        raise BaseMismatch(
            f"{site.name} takes A [r, {site.in_features}] and B [{site.out_features}, r]; "
            f"the adapter has {list(a.shape)} and {list(b.shape)}"
        )


def check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Raise BaseMismatch if a tensor has another shape."""
    if tuple(tensor.shape) != shape:
        raise BaseMismatch(f"{name} takes {list(shape)}; the adapter has {list(tensor.shape)}")
