"""The lowered form of a version on disk: one file, written once by the compiler, read as a whole to load the adapter.

    8 bytes     MAGIC
    8 bytes     length of the description, little endian
    16 bytes    checksum of the description
    ...         `Description` as JSON; zeros up to a multiple of PAGE
    ...         the flat tensor in the serving dtype

Loading is reading, verifying and copying: it needs neither formats nor base. At start only summaries are read.

Checksums are XXH3's of 128 bits: they find damage as fast as memory is read. A version's name is the SHA-256 of its
PEFT files (`store/records.py`), from which this file can be made again.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import msgspec
import torch
from torch import Tensor
from xxhash import xxh3_128_digest, xxh3_128_hexdigest

from lora_serve.adapters.adapter import Adapter, MatrixOffsets, ModuleOverride, Prefix
from lora_serve.adapters.traits import Traits
from lora_serve.errors import AdapterBroken
from lora_serve.kernels.contract import Delta
from lora_serve.serve_settings import ServeSettings

NAME = "lowered/adapter.bin"  # in a version's folder
MAGIC = b"lora-lo2"
HEAD = 32  # bytes before the description
PAGE = 4096
MAX_DESCRIPTION = 256 << 20  # bytes
T = TypeVar("T")


class Location(msgspec.Struct, frozen=True, array_like=True):
    """Where a tensor is in the flat tensor: offset in elements of its own dtype, shape, dtype."""

    offset: int
    shape: tuple[int, ...]
    dtype: str

    @classmethod
    def of(cls, tensor: Tensor) -> Location:
        """The location of a contiguous view."""
        return cls(int(tensor.storage_offset()), tuple(tensor.shape), _name(tensor.dtype))

    def view(self, flat: Tensor) -> Tensor:
        """The tensor as a view into `flat`."""
        size = 1
        for dimension in self.shape:
            size *= dimension
        return flat.view(getattr(torch, self.dtype))[self.offset : self.offset + size].view(self.shape)


class OverrideLocations(msgspec.Struct, frozen=True, omit_defaults=True):
    """A `ModuleOverride` with locations in place of tensors; `lookup` are those of a and b."""

    parameters: dict[str, Location] = {}
    gain_in: Location | None = None
    gain_out: Location | None = None
    shift: Location | None = None
    lookup: tuple[Location, Location] | None = None
    token_ids: tuple[int, ...] = ()
    token_rows: Location | None = None


class PrefixLocations(msgspec.Struct, frozen=True, omit_defaults=True):
    """A `Prefix` with locations in place of tensors."""

    length: int
    embeddings: Location | None = None
    keys: tuple[Location, ...] = ()
    values: tuple[Location, ...] = ()


class FlatLayout(msgspec.Struct, frozen=True):
    """Where each of an adapter's tensors is in its flat tensor.

    Attributes:
        deltas: element offsets of A and B, and the rank, by site.
        overrides, prefix: everything else.
    """

    deltas: dict[str, tuple[int, int, int]] = {}
    overrides: dict[str, OverrideLocations] = {}
    prefix: PrefixLocations | None = None

    @classmethod
    def of(cls, adapter: Adapter) -> FlatLayout:
        return cls(
            deltas={site: (offsets.a, offsets.b, offsets.rank) for site, offsets in adapter.offsets.items()},
            overrides={module: _override_locations(override) for module, override in adapter.overrides.items()},
            prefix=None if adapter.prefix is None else _prefix_locations(adapter.prefix),
        )

    def adapter(self, digest: str, flat: Tensor) -> Adapter:
        """The adapter of that digest whose flat tensor this is."""
        return Adapter(
            digest,
            flat,
            {site: MatrixOffsets(*offsets) for site, offsets in self.deltas.items()},
            {module: _override(locations, flat) for module, locations in self.overrides.items()},
            None if self.prefix is None else _prefix(self.prefix, flat),
        )


class Summary(msgspec.Struct, frozen=True):
    """What is known of a lowered version besides its tensors.

    Attributes:
        digest: of the version.
        fingerprint: of all that lowering depends on besides the version's files: the base, its quantisation, the
            serving dtype, and how this release lowers.
        nbytes, checksum: of the flat tensor, whose elements are `dtype`.
        rank: the largest.
        modules: number of adapted modules.
        file_bytes: of the files that it was made from.
        report: for users.
        settings: of the version's `serve.yaml`, if it has one.
    """

    digest: str
    fingerprint: str
    dtype: str
    nbytes: int
    checksum: str
    rank: int
    modules: int
    file_bytes: int
    report: dict[str, Any]
    traits: Traits
    settings: ServeSettings | None = None


class Description(Summary, frozen=True):
    """The summary, and where each tensor is: see `FlatLayout`."""

    deltas: dict[str, tuple[int, int, int]] = {}
    overrides: dict[str, OverrideLocations] = {}
    prefix: PrefixLocations | None = None

    @property
    def summary(self) -> Summary:
        return Summary(**{name: getattr(self, name) for name in Summary.__struct_fields__})

    @property
    def layout(self) -> FlatLayout:
        return FlatLayout(self.deltas, self.overrides, self.prefix)


def describe(
    adapter: Adapter,
    fingerprint: str,
    *,
    modules: int,
    file_bytes: int,
    report: dict[str, Any],
    traits: Traits,
    settings: ServeSettings | None = None,
) -> Description:
    """The description of an adapter in memory."""
    layout = FlatLayout.of(adapter)
    return Description(
        digest=adapter.digest,
        fingerprint=fingerprint,
        dtype=_name(adapter.flat.dtype),
        nbytes=adapter.nbytes,
        checksum=xxh3_128_hexdigest(flat_bytes(adapter.flat)),
        rank=max((offsets.rank for offsets in adapter.offsets.values()), default=0),
        modules=modules,
        file_bytes=file_bytes,
        report=report,
        traits=traits,
        settings=settings,
        deltas=layout.deltas,
        overrides=layout.overrides,
        prefix=layout.prefix,
    )


def write(folder: Path, adapter: Adapter, description: Description) -> None:
    """Write `NAME` below a version's folder; the store waits until it is on the disk."""
    encoded = msgspec.json.encode(description)
    path = folder / NAME
    path.parent.mkdir(exist_ok=True)
    with path.open("wb") as file:
        head = MAGIC + len(encoded).to_bytes(8, "little") + xxh3_128_digest(encoded) + encoded
        file.write(head + bytes(-len(head) % PAGE))
        file.write(flat_bytes(adapter.flat))


def read_summary(folder: Path) -> Summary:
    """The summary of the version in a folder. Raises AdapterBroken if the file is missing or damaged."""
    with _open(folder) as file:
        return _read_description(file, Summary)


def read(folder: Path, digest: str) -> Adapter:
    """The adapter of the version in a folder, verified. Raises AdapterBroken if the file is missing or damaged."""
    with _open(folder) as file:
        description = _read_description(file, Description)
        file.seek(-file.tell() % PAGE, io.SEEK_CUR)
        dtype = getattr(torch, description.dtype)
        flat = torch.empty(description.nbytes // dtype.itemsize, dtype=dtype)
        buffer = flat_bytes(flat)
        if file.readinto(buffer) != description.nbytes or file.read(1):  # type: ignore[attr-defined]
            raise AdapterBroken("its stored weights are truncated")
    if xxh3_128_hexdigest(buffer) != description.checksum or description.digest != digest:
        raise AdapterBroken("its stored weights are not those that were written")
    return description.layout.adapter(digest, flat)


def verify(folder: Path) -> None:
    """Read a version's lowered file and verify it. Raises AdapterBroken."""
    read(folder, folder.name)


def _open(folder: Path) -> BinaryIO:
    try:
        return (folder / NAME).open("rb")
    except OSError as error:
        raise AdapterBroken(f"its stored weights cannot be read: {error.strerror}") from error


def _read_description(file: BinaryIO, kind: type[T]) -> T:
    head = file.read(HEAD)
    length = int.from_bytes(head[8:16], "little")
    if len(head) < HEAD or head[:8] != MAGIC or length > MAX_DESCRIPTION:
        raise AdapterBroken("its stored weights are not in the form that this server writes")
    encoded = file.read(length)
    if len(encoded) < length or xxh3_128_digest(encoded) != head[16:]:
        raise AdapterBroken("the description of its stored weights is damaged")
    try:
        return msgspec.json.decode(encoded, type=kind)
    except msgspec.MsgspecError as error:
        raise AdapterBroken("its stored weights were written by another release") from error


def _override_locations(override: ModuleOverride) -> OverrideLocations:
    vectors = {role: getattr(override, role) for role in ("gain_in", "gain_out", "shift", "token_rows")}
    lookup = override.lookup
    return OverrideLocations(
        parameters={name: Location.of(tensor) for name, tensor in override.parameters.items()},
        lookup=None if lookup is None else (Location.of(lookup.a), Location.of(lookup.b)),
        token_ids=override.token_ids,
        **{role: Location.of(tensor) for role, tensor in vectors.items() if tensor is not None},
    )


def _override(locations: OverrideLocations, flat: Tensor) -> ModuleOverride:
    vectors = {role: getattr(locations, role) for role in ("gain_in", "gain_out", "shift", "token_rows")}
    lookup = locations.lookup
    return ModuleOverride(
        parameters={name: location.view(flat) for name, location in locations.parameters.items()},
        lookup=None if lookup is None else Delta(lookup[0].view(flat), lookup[1].view(flat)),
        token_ids=locations.token_ids,
        **{role: location.view(flat) for role, location in vectors.items() if location is not None},
    )


def _prefix_locations(prefix: Prefix) -> PrefixLocations:
    return PrefixLocations(
        prefix.length,
        None if prefix.embeddings is None else Location.of(prefix.embeddings),
        tuple(map(Location.of, prefix.keys)),
        tuple(map(Location.of, prefix.values)),
    )


def _prefix(locations: PrefixLocations, flat: Tensor) -> Prefix:
    return Prefix(
        locations.length,
        None if locations.embeddings is None else locations.embeddings.view(flat),
        tuple(location.view(flat) for location in locations.keys),
        tuple(location.view(flat) for location in locations.values),
    )


def flat_bytes(flat: Tensor) -> memoryview:
    """The bytes of a contiguous tensor, writable."""
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
