"""Reads, checks and lowers one adapter, and writes its lowered file: what a compiler process does (`compiler.py`).

The files are untrusted, so this runs in no process that another one needs to live.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path

import msgspec
import torch

from lora_serve.adapter_files import describe_missing
from lora_serve.adapters import archive, checkpoint, lowered_file
from lora_serve.adapters.adapter import BaseShape, Lowered, flatten
from lora_serve.adapters.finite import check_finite
from lora_serve.adapters.formats.dispatch import lower
from lora_serve.adapters.formats.report import complete
from lora_serve.adapters.lowered_file import Summary
from lora_serve.adapters.settings_check import read_settings
from lora_serve.adapters.store.records import KEPT, UNTRUSTED, VersionRecord, describe_folder
from lora_serve.adapters.traits import traits
from lora_serve.adapters.vocabulary import vocabulary_digest
from lora_serve.errors import AdapterBroken, AdapterInvalid, TooLarge
from lora_serve.names import ARCHIVE, CONFIG, SETTINGS, WEIGHTS


class LoweringJob(msgspec.Struct, frozen=True):
    """One adapter to lower.

    Attributes:
        folder: of its PEFT files, or if they may be moved, of an archive with them.
        staged: an empty folder that becomes the version's: gets the PEFT files and the lowered file; empty: nothing is
            written, the adapter is only inspected.
        move: whether the files may be moved out of `folder` instead of copied.
        version: the record of a version of the store that is lowered again, of which only the lowered file is written.
        vocabulary: as in `VersionRecord`, where it is known and the tokenizer does not come with the files.
        trust_settings: whether an administrator vouches for the adapter's `serve.yaml`; otherwise it does not count.
    """

    folder: str
    staged: str = ""
    move: bool = False
    version: VersionRecord | None = None
    vocabulary: str = ""
    trust_settings: bool = False


class LoweredVersion(msgspec.Struct, frozen=True):
    """The result: what the store keeps of the version, and the summary of its lowered form."""

    record: VersionRecord
    summary: Summary


@dataclass(frozen=True)
class LoweringContext:
    """What every adapter is lowered for.

    Attributes:
        fingerprint_of_base: digest of its checkpoint's content.
        dtype: the serving dtype.
        max_bytes: largest weights file.
        max_elements: most elements of a lowered adapter: what the host cache holds.
        base_bytes: memory that the base takes where it can be read as a whole only; else 0.
    """

    base: BaseShape
    fingerprint_of_base: str
    dtype: torch.dtype
    max_bytes: int
    max_elements: int
    base_bytes: int = 0

    @property
    def fingerprint(self) -> str:
        """Digest of all that a lowered form depends on besides the adapter's files."""
        base = self.base
        depends = (_release(), self.fingerprint_of_base, base.quantized, base.rounding, str(self.dtype))
        return sha256("\n".join(depends).encode()).hexdigest()


def run(job: LoweringJob, context: LoweringContext) -> LoweredVersion:
    """Lower one adapter. Raises AdapterInvalid and TooLarge that name keys and fields, or AdapterBroken."""
    source, staged = Path(job.folder), Path(job.staged) if job.staged else None
    if job.move and (source / ARCHIVE).is_file():
        source = _unpack(source, context.max_bytes)
    names = {path.name for path in source.iterdir()} if source.is_dir() else set()
    if not {CONFIG, WEIGHTS} <= names:
        raise (AdapterInvalid if job.version is None else AdapterBroken)(describe_missing(names))
    vocabulary = job.vocabulary or vocabulary_digest(source) if job.version is None else job.version.vocabulary
    folder = source
    kept = KEPT if job.trust_settings or job.version is not None else UNTRUSTED
    if staged is not None and job.version is None:
        folder = _stage(source, staged, kept, move=job.move)
    record = describe_folder(folder, vocabulary, kept)
    if job.version is not None and record.digest != job.version.digest:
        raise AdapterBroken("its stored files are not those that were published")
    read = checkpoint.read(
        folder, max_bytes=context.max_bytes, most_elements=context.max_elements, vocabulary=vocabulary
    )
    lowered = lower(read, context.base)
    check_finite(lowered, context.dtype)
    _check_size(lowered, context)
    own_traits, report = traits(lowered, context.base), complete(lowered, read, context.base)
    settings = None
    if SETTINGS in record.files:
        settings = read_settings(folder)
    elif SETTINGS in names:
        report["warnings"].append(f"its {SETTINGS} is ignored: it counts only if it is published with trust_settings")
    adapter = flatten(record.digest, lowered, context.dtype)
    description = lowered_file.describe(
        adapter,
        context.fingerprint,
        modules=len(lowered.deltas.keys() | lowered.overrides.keys()),
        file_bytes=read.file_bytes,
        report=report,
        traits=own_traits,
        settings=settings,
    )
    if staged is not None:
        lowered_file.write(staged, adapter, description)
    return LoweredVersion(job.version or record, description.summary)


def _unpack(folder: Path, most: int) -> Path:
    """Extract an archive in a staged folder; returns the folder with its files."""
    unpacked = folder / "unpacked"
    unpacked.mkdir()
    archive.unpack(folder / ARCHIVE, unpacked, most)
    (folder / ARCHIVE).unlink()
    return unpacked


def _stage(source: Path, staged: Path, kept: Sequence[str], *, move: bool) -> Path:
    """Move or copy the files that are kept, so that what is read is what is stored."""
    for name in kept:
        path = source / name
        if path.is_symlink():
            raise AdapterInvalid(f"{name} is a link")
        if path.is_file():
            (staged / name).parent.mkdir(exist_ok=True)
            if move:
                path.rename(staged / name)
            else:
                shutil.copyfile(path, staged / name)
    return staged


def _check_size(lowered: Lowered, context: LoweringContext) -> None:
    elements = sum(tensor.numel() for tensor in lowered.tensors.values())
    if elements + lowered.vectors > context.max_elements:
        raise TooLarge(f"the adapter has {elements} numbers; --adapter-cache-memory holds {context.max_elements}")


@cache
def _release() -> str:
    """Digest of the source that lowers: another release's lowered files are made again if it lowers differently."""
    package = Path(__file__).parent.parent
    adapters, kernels, model = package / "adapters", package / "kernels", package / "model"
    sources = [
        *sorted((adapters / "formats").glob("*.py")),
        *(adapters / name for name in ("adapter.py", "checkpoint.py", "finite.py", "lowered_file.py")),
        *(adapters / name for name in ("lowering_job.py", "pooling_config.py", "settings_check.py", "traits.py")),
        package / "serve_settings.py",
        kernels / "packed_weight.py",
        model / "checkpoint_files.py",
        model / "checkpoint_weights.py",
    ]
    digest = sha256()
    for path in sources:
        digest.update(f"{path.name}\n".encode() + path.read_bytes())
    return digest.hexdigest()
