"""The inspection report of an adapter: method, features, adapted modules, size, and warnings.

A format creates its part with `report`; `complete` adds what is common to all methods. The report is plain data for
JSON, created once, when an adapter is published or inspected.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from lora_serve.adapters.adapter import BaseShape, Lowered, ModuleOverride
from lora_serve.adapters.checkpoint import Checkpoint, shorten
from lora_serve.kernels.contract import Delta
from lora_serve.request import Pooling

# Last parts of a path that do not name a model.
_NAMELESS = re.compile(
    r"(tmp.*|(base|hf)?[-_]?models?|base|(checkpoint|ckpt|step|epoch)s?[-_]?\d*|outputs?|out|final|merged|latest|weights"
    r"|snapshots|[0-9a-f]{40})",
    re.IGNORECASE,
)
_TEMPORARY = ("/tmp/", "/var/tmp/", "/var/folders/", "/private/var/", "/dev/shm/")


def report(
    config: Mapping[str, Any],
    base: BaseShape,
    *,
    method: str,
    deltas: Mapping[str, Delta] | None = None,
    overrides: Mapping[str, ModuleOverride] | None = None,
    features: Sequence[str] = (),
    lowered: Sequence[str] = (),
    warnings: Sequence[str] = (),
) -> dict[str, Any]:
    """A format's part of the report.

    Args:
        method: the method's common name.
        features: the method's features that this adapter uses.
        lowered: sentences on how it was lowered, where that is not obvious.
        warnings: in addition to those common to all methods.
    """
    deltas, overrides = deltas or {}, overrides or {}
    touched = deltas.keys() | overrides.keys()
    found = list(warnings)
    if touched and not any(map(_has_effect, deltas.values())) and not any(map(_changes, overrides.values())):
        found.append("all of its weights are zero: the adapter changes nothing")
    if "replaced base weights" in features:
        replaced = sorted(module for module, override in overrides.items() if override.parameters)
        found.append(
            f"it brings weights of the base that differ from this base's, and uses them: {shorten(replaced, 4)}"
        )
    return {
        "method": method,
        "features": list(features),
        "ranks": sorted({delta.a.shape[0] for delta in deltas.values()}),
        "modules": f"{len(touched & base.sites.keys())} of {len(base.sites)}",
        "touched": _by_kind(touched, base),
        "lowered": list(lowered),
        "base_model_name_or_path": str(config.get("base_model_name_or_path") or "")[:200],
        "warnings": found,
    }


def complete(lowered: Lowered, checkpoint: Checkpoint, base: BaseShape) -> dict[str, Any]:
    """The complete report: a format's part, size, result of lowering, composability and warnings."""
    summary = dict(lowered.report)
    trained_on = checkpoint.config.get("base_model_name_or_path")
    warnings = list(summary.get("warnings", ()))
    if is_other_base(trained_on, base):
        warnings.append(f"it was trained on {display_name(trained_on)}, this base is {_base_name(base)}")
    if checkpoint.vocabulary and base.vocabulary and checkpoint.vocabulary != base.vocabulary:
        warnings.append(
            "its tokenizer.json has another vocabulary than the base's: requests are tokenized with the base's own"
        )
    summary["lowered"] = [*_describe(lowered), *summary.get("lowered", ())]
    summary["size"] = {
        "elements": sum(tensor.numel() for tensor in lowered.tensors.values()),
        "file_bytes": checkpoint.file_bytes,
        "file_elements": sum(tensor.numel() for tensor in checkpoint.tensors.values()),
    }
    summary["composable"] = not lowered.not_additive
    if lowered.not_additive:
        summary["not_composable"] = lowered.not_additive
    if lowered.prefix is not None:
        summary["virtual_tokens"] = lowered.prefix.length
    if lowered.invocation:
        summary["invocation_tokens"] = list(lowered.invocation)
    if lowered.embeds:
        summary["embeddings"] = _describe_pooling(lowered.pooling)
    summary["warnings"] = warnings
    return summary


def other_base_hint(config: Mapping[str, Any], base: BaseShape) -> str:
    """Addition to an error about keys or shapes that do not fit: the base that the adapter names, and the served one.

    Empty if the two have the same name.
    """
    name = config.get("base_model_name_or_path")
    if is_other_base(name, base):
        trained_on = f"it was trained on {display_name(name)}"
        return f". It seems to be made for another base: {trained_on}, this is {_base_name(base)}"
    if model_name(name) and any(map(model_name, base.names)):
        return ""
    trained_on = f"it was trained on {display_name(name)}" if name else "it does not say on which it was trained"
    return f". It may be made for another base: {trained_on}, this is {_base_name(base)}"


def is_other_base(trained_on: Any, base: BaseShape) -> bool:
    """Whether an adapter's base has another name than this base; False if either has no meaningful name."""
    given = model_name(trained_on)
    ours = {name for name in map(model_name, base.names) if name}
    return bool(given and ours) and given not in ours


def model_name(path: Any) -> str:
    """The model's name in a folder or hub id: its last meaningful part in lower case; empty if it has none."""
    if not isinstance(path, str) or path.startswith(_TEMPORARY):
        return ""
    for part in reversed(re.split(r"[/\\]", path.strip())):
        if part.startswith("models--"):  # the hub's cache: models--owner--name/snapshots/commit
            return part.rpartition("--")[2].lower()
        if part.strip(".~") and not _NAMELESS.fullmatch(part):
            return part.lower()
    return ""


def display_name(path: Any) -> str:
    """A base's name for users: a hub id in full, of a folder only its name."""
    text = str(path)
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", text) and not text.startswith("."):
        return text[:100]
    return (model_name(path) or "an unnamed folder")[:100]


def _base_name(base: BaseShape) -> str:
    named = next((name for name in base.names if model_name(name)), "")
    return f"{display_name(named)} ({base.model_type})" if named else f"a {base.model_type or 'nameless'} model"


def _by_kind(touched: Collection[str], base: BaseShape) -> dict[str, str]:
    """'N of M' for every kind of module that the adapter changes; each expert counts as a module."""
    counts: dict[str, tuple[int, int]] = {}
    for module in dict.fromkeys([*base.sites, *base.modules]):
        if module == base.head:
            kind = "head"
        elif module in base.sites:
            kind = "expert" if module.endswith("]") else "linear"
        else:
            kind = "embedding" if module in base.embeddings else "other"
        touched_count, total = counts.get(kind, (0, 0))
        counts[kind] = (touched_count + (module in touched), total + 1)
    return {kind: f"{touched_count} of {total}" for kind, (touched_count, total) in counts.items() if touched_count}


def _describe(lowered: Lowered) -> list[str]:
    """Counts of the lowered adapter's parts, as sentences."""
    overrides = lowered.overrides.values()
    counts = {
        "low-rank updates": len(lowered.deltas),
        "modules with parameters of their own": sum(bool(override.parameters) for override in overrides),
        "modules with gains": sum(
            override.gain_in is not None or override.gain_out is not None for override in overrides
        ),
        "modules with a constant added": sum(override.shift is not None for override in overrides),
        "embeddings with low-rank updates": sum(override.lookup is not None for override in overrides),
        "tables with replaced token rows": sum(override.token_rows is not None for override in overrides),
        "virtual tokens before every prompt": 0 if lowered.prefix is None else lowered.prefix.length,
    }
    return [f"{count} {what}" for what, count in counts.items() if count]


def _describe_pooling(pooling: Pooling | None) -> str:
    if pooling is None:
        return "pooled as the base's, or else the last token, normalised"
    pooled = "mean of all tokens" if pooling.mode == "mean" else f"{pooling.mode} token"
    return pooled + (", normalised" if pooling.normalize else "")


def _has_effect(delta: Delta) -> bool:
    return bool(delta.a.any()) and bool(delta.b.any())


def _changes(override: ModuleOverride) -> bool:
    if override.parameters or override.token_rows is not None:
        return True
    gains = any(gain is not None and bool((gain != 1).any()) for gain in (override.gain_in, override.gain_out))
    shift = override.shift is not None and bool(override.shift.any())
    return gains or shift or (override.lookup is not None and _has_effect(override.lookup))
