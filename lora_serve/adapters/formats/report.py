"""The inspection report of a lowered adapter: what it is, what it touches, what a person should know of it.

A format makes its part with `report`; `complete` adds what holds for every method. All of it is plain data for JSON,
made once, when an adapter is published or inspected.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from lora_serve.adapters.adapter import BaseShape, Lowered, ModuleOverride
from lora_serve.adapters.checkpoint import Checkpoint, some
from lora_serve.kernels.contract import Delta

# Last parts of a path that do not say which model lies there.
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
    """A format's part.

    Args:
        method: the method's common name.
        features: of the method, those that this adapter uses.
        lowered: sentences on what became what, beyond the method's usual way.
        warnings: beside those that hold for every method.
    """
    deltas, overrides = deltas or {}, overrides or {}
    touched = deltas.keys() | overrides.keys()
    found = list(warnings)
    if touched and not any(map(_has_effect, deltas.values())) and not any(map(_changes, overrides.values())):
        found.append("all of its weights are zero: the adapter changes nothing")
    if "replaced base weights" in features:
        replaced = sorted(module for module, override in overrides.items() if override.parameters)
        found.append(f"it brings weights of the base that differ from this base's, and uses them: {some(replaced, 4)}")
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
    """The whole report: a format's part, size, what it became, how it may be used, and whether it is of this base."""
    made = dict(lowered.report)
    trained_on = checkpoint.config.get("base_model_name_or_path")
    warnings = list(made.get("warnings", ()))
    if is_another(trained_on, base):
        warnings.append(f"it was trained on {shown(trained_on)}, this base is {_served(base)}")
    if checkpoint.vocabulary and base.vocabulary and checkpoint.vocabulary != base.vocabulary:
        warnings.append(
            "its tokenizer.json has another vocabulary than the base's: requests are tokenized with the base's own"
        )
    made["lowered"] = [*_became(lowered), *made.get("lowered", ())]
    made["size"] = {
        "elements": sum(tensor.numel() for tensor in lowered.tensors.values()),
        "file_bytes": checkpoint.file_bytes,
        "file_elements": sum(tensor.numel() for tensor in checkpoint.tensors.values()),
    }
    made["composable"] = not lowered.not_additive
    if lowered.not_additive:
        made["not_composable"] = lowered.not_additive
    if lowered.prefix is not None:
        made["virtual_tokens"] = lowered.prefix.length
    if lowered.invocation:
        made["invocation_tokens"] = list(lowered.invocation)
    made["warnings"] = warnings
    return made


def made_for_another(config: Mapping[str, Any], base: BaseShape) -> str:
    """What a refusal adds when keys or shapes do not fit: the base that the adapter names, and the one that is here.

    Empty if the two have one name: then it is something else.
    """
    name = config.get("base_model_name_or_path")
    if is_another(name, base):
        return f". It seems to be made for another base: it was trained on {shown(name)}, this is {_served(base)}"
    if model_name(name) and any(map(model_name, base.names)):
        return ""
    trained_on = f"it was trained on {shown(name)}" if name else "it does not say on which it was trained"
    return f". It may be made for another base: {trained_on}, this is {_served(base)}"


def is_another(trained_on: Any, base: BaseShape) -> bool:
    """Whether a base's name is none of this base's; False where one of the two does not say enough to tell."""
    given = model_name(trained_on)
    ours = {name for name in map(model_name, base.names) if name}
    return bool(given and ours) and given not in ours


def model_name(path: Any) -> str:
    """What a folder or hub id calls a model: its last part that says something, in lower case; empty if none does."""
    if not isinstance(path, str) or path.startswith(_TEMPORARY):
        return ""
    for part in reversed(re.split(r"[/\\]", path.strip())):
        if part.startswith("models--"):  # the hub's cache: models--owner--name/snapshots/commit
            return part.rpartition("--")[2].lower()
        if part.strip(".~") and not _NAMELESS.fullmatch(part):
            return part.lower()
    return ""


def shown(path: Any) -> str:
    """A base's name for people: a hub id as it is, of a folder only what it is called."""
    text = str(path)
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", text) and not text.startswith("."):
        return text[:100]
    return (model_name(path) or "an unnamed folder")[:100]


def _served(base: BaseShape) -> str:
    named = next((name for name in base.names if model_name(name)), "")
    return f"{shown(named)} ({base.model_type})" if named else f"a {base.model_type or 'nameless'} model"


def _by_kind(touched: Collection[str], base: BaseShape) -> dict[str, str]:
    """'N of M' for every kind of module that the adapter changes; an expert is a module of its own."""
    counts: dict[str, tuple[int, int]] = {}
    for module in dict.fromkeys([*base.sites, *base.modules]):
        if module == base.head:
            kind = "head"
        elif module in base.sites:
            kind = "expert" if module.endswith("]") else "linear"
        else:
            kind = "embedding" if module in base.embeddings else "other"
        hit, all_ = counts.get(kind, (0, 0))
        counts[kind] = (hit + (module in touched), all_ + 1)
    return {kind: f"{hit} of {all_}" for kind, (hit, all_) in counts.items() if hit}


def _became(lowered: Lowered) -> list[str]:
    """What the adapter is here, in the words of the lowered form."""
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


def _has_effect(delta: Delta) -> bool:
    return bool(delta.a.any()) and bool(delta.b.any())


def _changes(override: ModuleOverride) -> bool:
    if override.parameters or override.token_rows is not None:
        return True
    gains = any(gain is not None and bool((gain != 1).any()) for gain in (override.gain_in, override.gain_out))
    shift = override.shift is not None and bool(override.shift.any())
    return gains or shift or (override.lookup is not None and _has_effect(override.lookup))
