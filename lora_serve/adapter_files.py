"""The files of an adapter, and where they are among others: in a trainer's output, an archive, or a folder of adapters.

Only `ADAPTER_FILES` are ever opened. Whatever else lies beside them (pickled optimizer states, scripts, logs) is left
alone, and named where the adapter's own files are missing.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from lora_serve.errors import AdapterInvalid
from lora_serve.names import CARD, CONFIG, MODULES, POOLING, SETTINGS, TOKENIZER, WEIGHTS, shorten

# The tokenizer is only compared with the base's, not stored.
ADAPTER_FILES = (CONFIG, WEIGHTS, CARD, TOKENIZER, MODULES, POOLING, SETTINGS)
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
# Pickles that trainers write beside the weights.
TRAINER_FILES = ("training_args.bin", "optimizer.pt", "optimizer.bin", "scheduler.pt", "rng_state.pth", "scaler.pt")
DEEPEST = 4  # folders in folders that are looked into
MOST_FILES = 10_000  # that are looked at


def find_adapter(folder: Path) -> Path:
    """The folder of the one adapter in `folder`: itself, or one inside it. Raises AdapterInvalid, saying what is there.

    Raises AdapterInvalid as well if an adapter's file is missing.
    """
    top = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return folder / choose_folder(top if CONFIG in top else _files_below(folder))


def choose_folder(paths: Iterable[str]) -> str:
    """The folder of the one adapter among relative paths of files; "." is the top. Raises AdapterInvalid.

    A trainer's output contains the adapter and, further inside, its checkpoints: the outermost counts.
    """
    folders: dict[str, set[str]] = {}
    for path in paths:
        folder, _, name = path.rpartition("/")
        folders.setdefault(folder or ".", set()).add(name)
    found = {folder for folder, names in folders.items() if CONFIG in names}
    outermost = sorted(folder for folder in found if not any(parent in found for parent in _parents(folder)))
    if len(outermost) > 1:
        raise AdapterInvalid(f"there are {len(outermost)} adapters, in {shorten(outermost)}: give one of these folders")
    folder = outermost[0] if outermost else "."
    names = folders.get(folder, set())
    if not {CONFIG, WEIGHTS} <= names:
        where = "" if folder == "." else f" in {shorten([folder])}"
        raise AdapterInvalid(describe_missing(names) + where)
    return folder


def describe_missing(names: Collection[str]) -> str:
    """What is missing in a folder with files of these names, and what to do."""
    if CONFIG not in names:
        if "config.json" in names:
            return (
                f"{CONFIG} is missing; there is a config.json, as in a whole model, which is served as a base instead"
            )
        return f"{CONFIG} is missing"
    pickles = sorted(name for name in names if name.lower().endswith(PICKLES) and name not in TRAINER_FILES)
    if pickles:
        return (
            f"{WEIGHTS} is missing; {shorten(pickles)} would run code when read: save the adapter as {WEIGHTS}, "
            "with PEFT's save_pretrained(..., safe_serialization=True)"
        )
    others = sorted(name for name in names if name.endswith(".safetensors"))
    return f"{WEIGHTS} is missing" + (
        f"; there is {shorten(others)}, which PEFT would not read either" if others else ""
    )


def _parents(folder: str) -> Iterator[str]:
    """Folders that contain a folder, "." last."""
    while folder != ".":
        folder = folder.rpartition("/")[0] or "."
        yield folder


def _files_below(folder: Path) -> Iterator[str]:
    """Relative paths of files, in no deeper folders than `DEEPEST` and at most `MOST_FILES`."""
    count = 0
    for root, folders, names in os.walk(folder):
        inside = Path(root).relative_to(folder).as_posix()
        if inside.count("/") + 1 >= DEEPEST:
            folders.clear()
        for name in names:
            count += 1
            if count > MOST_FILES:
                raise AdapterInvalid(f"there are more than {MOST_FILES} files: give the adapter's own folder")
            yield name if inside == "." else f"{inside}/{name}"
