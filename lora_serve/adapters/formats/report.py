"""The inspection report of a lowered adapter: what it is, what it touches, what a person should know of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lora_serve.adapters.adapter import BaseShape, Change
from lora_serve.kernels.contract import Delta


def report(
    config: Mapping[str, Any],
    base: BaseShape,
    *,
    method: str,
    deltas: Mapping[str, Delta] | None = None,
    changes: Mapping[str, Change] | None = None,
    features: Sequence[str] = (),
    lowered: Sequence[str] = (),
    warnings: Sequence[str] = (),
) -> dict[str, Any]:
    """Plain data for JSON.

    Args:
        method: the method's common name.
        features: of the method, those that this adapter uses.
        lowered: sentences on what became what, beyond the method's usual way.
        warnings: beside those that hold for every method.
    """
    deltas, changes = deltas or {}, changes or {}
    found = list(warnings)
    if deltas and not changes and all(not delta.b.any() or not delta.a.any() for delta in deltas.values()):
        found.append("all of its weights are zero: the adapter changes nothing")
    return {
        "method": method,
        "features": list(features),
        "ranks": sorted({delta.a.shape[0] for delta in deltas.values()}),
        "modules": f"{len(deltas.keys() | changes.keys())} of {len(base.sites.keys() | base.modules.keys())}",
        "lowered": list(lowered),
        "base_model_name_or_path": str(config.get("base_model_name_or_path") or "")[:200],
        "warnings": found,
    }
