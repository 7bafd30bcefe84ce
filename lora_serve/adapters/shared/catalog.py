"""What all replicas serve: the adapters with their versions, and the aliases, as one object; and the changes to it.

A change is a function from one catalog to the next, without files or clocks. It raises the ServeError for which it
cannot be made, and is tried again on a newer catalog if another replica was faster.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable

import msgspec

from lora_serve.adapters.aliases import HEADER, MOST_ALIASES, MOST_STICKY_HEADERS
from lora_serve.adapters.store.folder import DIGEST
from lora_serve.adapters.store.records import KEPT, AliasRecord, FileRecord, TargetRecord, version_digest
from lora_serve.errors import AdapterBusy, AdapterExists, AdapterNotFound, BadRequest, TooLarge
from lora_serve.messages import AliasTarget
from lora_serve.names import NAME_PATTERN, adapter_not_found, alias_not_found, shorten
from lora_serve.precondition import Precondition

FORMAT = 1
MOST_RECENT = 256  # changes whose ids are kept
_UPLOAD = re.compile(r"[0-9a-f]{32}")


class SharedVersion(msgspec.Struct, frozen=True):
    """Where the files of a version are, and what they are.

    Attributes:
        upload: id of the upload that the files came with; no other one ever has it.
        created: when it was published first, in seconds since the epoch; shown, and never compared.
        files, vocabulary: as in `VersionRecord`.
    """

    upload: str
    created: float
    files: dict[str, FileRecord]
    vocabulary: str = ""


class Catalog(msgspec.Struct, frozen=True):
    """The state of all replicas.

    Attributes:
        id: of this catalog and its successors; one that was begun anew has another.
        base, model: fingerprint and name of the base that the adapters are for.
        generation: number of changes so far.
        adapters: name → digests of its versions, newest first.
        aliases: what each alias stands for; every target is in `adapters`.
        versions: digest → files, of the versions that `adapters` names.
        recent: ids of the last changes, the newest first: who had no answer to a change finds out if it was made.
    """

    format: int
    id: str
    base: str
    model: str = ""
    generation: int = 0
    adapters: dict[str, list[str]] = {}
    aliases: dict[str, AliasRecord] = {}
    versions: dict[str, SharedVersion] = {}
    recent: list[str] = []

    def entry(self, name: str) -> list[str] | AliasRecord | None:
        """What a name refers to: an adapter's versions, or an alias."""
        return self.adapters.get(name) or self.aliases.get(name)

    @property
    def uploads(self) -> set[tuple[str, str]]:
        """Digest and upload of all files that are needed."""
        return {(digest, version.upload) for digest, version in self.versions.items()}


Edit = Callable[[Catalog], Catalog]


class _Format(msgspec.Struct):
    format: int


class _Envelope(msgspec.Struct):
    sha256: str
    catalog: msgspec.Raw


def encode_catalog(catalog: Catalog) -> bytes:
    """A catalog with a checksum, as JSON."""
    content = msgspec.json.encode(catalog)
    return msgspec.json.encode(_Envelope(hashlib.sha256(content).hexdigest(), msgspec.Raw(content)))


def decode_catalog(data: bytes) -> Catalog:
    """The catalog in an object. Raises ValueError that says what is wrong with it."""
    try:
        envelope = msgspec.json.decode(data, type=_Envelope)
        if hashlib.sha256(envelope.catalog).hexdigest() != envelope.sha256:
            raise ValueError("it has been altered: its checksum does not fit")
        if (found := msgspec.json.decode(envelope.catalog, type=_Format).format) != FORMAT:
            raise ValueError(f"it is of format {found}; this release reads {FORMAT}")
        catalog = msgspec.json.decode(envelope.catalog, type=Catalog)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise ValueError("it is truncated, or not a catalog") from None
    _check(catalog)
    return catalog


def publish_version(
    name: str, digest: str, version: SharedVersion, *, replace: bool, precondition: Precondition, keep: int
) -> Edit:
    """Let a name refer to a version whose files are in the store; of its older ones as many stay as `keep` allows."""

    def edit(catalog: Catalog) -> Catalog:
        check_may_publish(catalog, name, replace=replace, precondition=precondition)
        known = catalog.versions.get(digest, version)
        older = [each for each in catalog.adapters.get(name, ()) if each != digest]
        return _settle(
            catalog,
            adapters=catalog.adapters | {name: [digest, *older]},
            versions=catalog.versions | {digest: msgspec.structs.replace(version, created=known.created)},
            reviewed={name: keep},
        )

    return edit


def check_may_publish(catalog: Catalog, name: str, *, replace: bool, precondition: Precondition) -> None:
    """Check that a version of a name may be published. Raises AdapterExists, PreconditionFailed."""
    if name in catalog.aliases:
        raise AdapterExists(f"{name} is an alias", param="name")
    precondition.check(next(iter(catalog.adapters.get(name, ())), None))
    if name in catalog.adapters and not replace:
        raise AdapterExists(f"adapter {name} exists; PUT publishes a new version of it", param="name")


def delete_adapter(name: str, precondition: Precondition) -> Edit:
    """Let a name refer to nothing. Raises AdapterNotFound, PreconditionFailed, AdapterBusy if an alias names it."""

    def edit(catalog: Catalog) -> Catalog:
        if name not in catalog.adapters:
            raise adapter_not_found(name)
        precondition.check(catalog.adapters[name][0])
        if found := sorted(alias for alias, record in catalog.aliases.items() if record.names(name)):
            stand = f"alias {found[0]} stands" if len(found) == 1 else f"aliases {shorten(found)} stand"
            raise AdapterBusy(f"{stand} for adapter {name}; change or delete it first", param="name")
        return _settle(catalog, adapters={other: each for other, each in catalog.adapters.items() if other != name})

    return edit


def put_alias(
    name: str, targets: Iterable[AliasTarget], sticky: str, precondition: Precondition, *, created: float, keep: int
) -> Edit:
    """Let a name stand for adapters, all of which must be in the catalog."""

    def edit(catalog: Catalog) -> Catalog:
        if name in catalog.adapters:
            raise AdapterExists(f"{name} is the name of an adapter", param="name")
        before = catalog.aliases.get(name)
        precondition.check(None if before is None else before.etag)
        found = [_find_target(catalog, number, target) for number, target in enumerate(targets)]
        if not any(target.weight > 0 for target in found):
            raise BadRequest("no target has a weight above 0", param="targets")
        record = AliasRecord(found, sticky, created if before is None else before.created, shared=True)
        aliases = catalog.aliases | {name: record}
        if len(aliases) > MOST_ALIASES:
            raise TooLarge(f"there may be {MOST_ALIASES:,} aliases; delete others first", param="name")
        headers = {each.sticky.lower() for each in aliases.values() if each.sticky.startswith(HEADER)}
        if len(headers) > MOST_STICKY_HEADERS:
            raise BadRequest(f"aliases may go by {MOST_STICKY_HEADERS} different headers", param="sticky")
        return _settle(catalog, aliases=aliases, reviewed=_named(before, keep))

    return edit


def delete_alias(name: str, precondition: Precondition, *, keep: int) -> Edit:
    """Remove an alias. Raises AdapterNotFound, PreconditionFailed."""

    def edit(catalog: Catalog) -> Catalog:
        record = catalog.aliases.get(name)
        if record is None:
            raise alias_not_found(name)
        precondition.check(record.etag)
        aliases = {other: each for other, each in catalog.aliases.items() if other != name}
        return _settle(catalog, aliases=aliases, reviewed=_named(record, keep))

    return edit


def _find_target(catalog: Catalog, number: int, target: AliasTarget) -> TargetRecord:
    """What a target names, with the whole digest of a version. Raises the ServeError that names its field."""
    field = f"targets.{number}.adapter"
    name, at, prefix = target.adapter.partition("@")
    if name in catalog.aliases:
        raise BadRequest(f"{name} is an alias; an alias stands for adapters", param=field)
    if at and not prefix:
        raise BadRequest("an adapter's name ends in @ without a version", param=field)
    digests = [digest for digest in catalog.adapters.get(name, ()) if digest.startswith(prefix)]
    if not digests:
        raise AdapterNotFound(f"adapter {target.adapter[:200]} is not in the shared store", param=field)
    if prefix and len(digests) > 1:
        raise BadRequest(f"{prefix} names more than one version of {name}", param=field)
    return TargetRecord(name, digests[0] if prefix else "", target.weight)


def _named(record: AliasRecord | None, keep: int) -> dict[str, int]:
    return {} if record is None else dict.fromkeys((target.name for target in record.targets), keep)


def _settle(
    catalog: Catalog,
    *,
    adapters: dict[str, list[str]] | None = None,
    aliases: dict[str, AliasRecord] | None = None,
    versions: dict[str, SharedVersion] | None = None,
    reviewed: dict[str, int] | None = None,
) -> Catalog:
    """A catalog with some of its parts replaced, without versions that are not kept any more.

    Args:
        reviewed: name → how many of its newest versions are kept, beside those that aliases name.
    """
    adapters = dict(catalog.adapters if adapters is None else adapters)
    aliases = catalog.aliases if aliases is None else aliases
    versions = catalog.versions if versions is None else versions
    for name, keep in (reviewed or {}).items():
        if digests := adapters.get(name):
            aliased = {each.version for record in aliases.values() for each in record.targets if each.name == name}
            adapters[name] = [digest for at, digest in enumerate(digests) if at < keep or digest in aliased]
    named = {digest for digests in adapters.values() for digest in digests}
    kept = {digest: version for digest, version in versions.items() if digest in named}
    return msgspec.structs.replace(catalog, adapters=adapters, aliases=aliases, versions=kept)


def _check(catalog: Catalog) -> None:
    """Check that a catalog is what changes leave. Raises ValueError: then somebody else has written it."""
    named = {digest for digests in catalog.adapters.values() for digest in digests}
    names = (*catalog.adapters, *catalog.aliases)
    targets = [target for record in catalog.aliases.values() for target in record.targets]
    if not (
        all(re.fullmatch(NAME_PATTERN, name) for name in names)
        and len(set(names)) == len(names)
        and all(catalog.adapters.values())
        and named == catalog.versions.keys()
        and all(record.targets for record in catalog.aliases.values())
        and all(not each.version or each.version in catalog.adapters.get(each.name, ()) for each in targets)
        and all(each.name in catalog.adapters for each in targets)
        and all(_is_whole(digest, version) for digest, version in catalog.versions.items())
    ):
        raise ValueError("it contradicts itself")


def _is_whole(digest: str, version: SharedVersion) -> bool:
    return (
        DIGEST.fullmatch(digest) is not None
        and _UPLOAD.fullmatch(version.upload) is not None
        and version.files.keys() <= set(KEPT)
        and version_digest(version.files) == digest
    )


def find_changed(before: Catalog | None, after: Catalog) -> set[str]:
    """The names that refer to something else in a later catalog; all of its names, if there was none before."""
    if before is None:
        return {*after.adapters, *after.aliases}
    names = before.adapters.keys() | before.aliases.keys() | after.adapters.keys() | after.aliases.keys()
    return {name for name in names if before.entry(name) != after.entry(name)}
